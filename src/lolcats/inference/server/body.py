"""A request's body: read within limits of size and time, parsed off the event loop where it is large."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from fastapi import Request

from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.limits import Limits
from lolcats.inference.server.schema import Body, parse
from lolcats.inference.server.tokenizing import Tokenizing

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, kind: type[Body], limits: Limits, threads: Tokenizing) -> Body:
    """The request's JSON, validated.

    Raises:
        ApiError: what is wrong with it.
        ClientDisconnect: the client went away.
    """
    data = await read_bytes(request, limits)
    return await threads.run(len(data), lambda: parse(kind, parsed_json(data)))


async def read_bytes(request: Request, limits: Limits) -> bytes:
    """A body that is to be JSON; raises what :func:`read_body` does."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send JSON, with Content-Type: application/json.")
    data = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for piece in request.stream():
                data += piece
                if len(data) > limits.body_bytes:
                    raise ApiError(413, f"The request is larger than {limits.body_bytes} bytes.")
    except TimeoutError:
        raise ApiError(408, f"The request did not arrive within {limits.read_seconds:g} seconds.") from None
    return bytes(data)


def parsed_json(data: bytes) -> Any:
    try:
        parsed = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if SURROGATE.search(data):
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except UnicodeEncodeError:
        raise ApiError(400, "The request holds a lone surrogate, which is not Unicode text.") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The request is not valid UTF-8: {error.reason} at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request is not valid JSON: {error}.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
