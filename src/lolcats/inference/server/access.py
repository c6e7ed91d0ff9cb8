"""Who may use the server: API keys, the Host header, and pages of other origins."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lolcats.errors import LolcatsError
from lolcats.inference.server.errors import ApiError

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
ORIGIN = re.compile(r"https?://[^/?#\s*]+")
HOST = re.compile(r"[\w.-]+|\[[0-9a-fA-F:.]+\]")


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Args:
        api_key: clients must send it as ``Authorization: Bearer KEY``; empty: none needed.
        origins: pages of these origins may use the API from a browser; ``*``: of any.
        hosts: names that the Host header may have, without port; empty: any. Without this check a page of any site can
            reach a server on this machine by DNS rebinding.
    """

    api_key: str = ""
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.api_key.strip() != self.api_key or not self.api_key.isprintable():
            raise LolcatsError("The API key must be printable text without blanks at its ends.")
        for host in self.hosts:
            if not HOST.fullmatch(host):
                raise LolcatsError(f"--allowed-host {host}: expected a name without scheme or port, such as a.lan.")
        if "*" in self.origins and not self.api_key:
            raise LolcatsError("--allow-origin '*' needs an API key; without one, any web page could use this server.")
        for origin in self.origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise LolcatsError(f"--allow-origin {origin}: expected an origin such as https://chat.example.org.")

    def authorize(self, request: Request) -> None:
        """
        Raises:
            ApiError: 401, without the right key.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip(" \t").encode("latin-1"), self.api_key.encode())
        if self.api_key and not (right and scheme.lower() == "bearer"):
            raise ApiError(
                401, "Missing or wrong API key. Send the header Authorization: Bearer KEY.", code="invalid_api_key"
            )

    def guard(self, app: FastAPI) -> None:
        """Add the checks that come before any route. Cross-origin headers are outermost, so that errors have them."""
        if self.hosts:
            app.add_middleware(HostCheck, hosts=self.hosts)
        if self.origins:
            app.add_middleware(
                CORSMiddleware, allow_origins=self.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )


class HostCheck:
    """Refuses requests whose Host header names another host, whatever its port."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            if re.sub(r":\d*$", "", host) not in self.hosts:
                error = ApiError(403, f"This server does not answer to the host {host!r}: see --allowed-host.")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address, which may be a name."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def access_for(host: str, api_key: str | None, origins: Sequence[str], hosts: Sequence[str]) -> Access:
    """What ``lolcats serve`` allows at this address.

    api_key: None if none was given; an empty one is a mistake where others can reach the server.

    Raises:
        LolcatsError: an empty key on an address that is not loopback, or origins that are not allowed.
    """
    local = is_loopback(host)
    if api_key == "" and not local:
        raise LolcatsError(
            f"The API key is empty, but {host} can be reached by others. Set LOLCATS_API_KEY to a key, or unset the "
            "variable to serve without one."
        )
    own = (*LOCAL_NAMES, f"[{host}]" if ":" in host else host) if local and not api_key else ()
    return Access(api_key or "", tuple(origins), (*own, *hosts))
