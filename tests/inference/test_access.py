"""Keys, Host headers, and pages of other origins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.serving import serving, tiny_engine
from typer.testing import CliRunner

from lolcats.cli import app
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Engine
from lolcats.inference.server import Access, access_for, is_loopback

PAGE = "https://chat.example.org"
ASKS = {"Origin": PAGE, "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> Engine:
    return tiny_engine(tokenizer, slots=1)


@pytest.fixture(scope="module")
def open_to_a_page(engine: Engine) -> Iterator[str]:
    with serving(engine, access=Access("sesame", (PAGE,))) as (address, _):
        yield address


def test_a_page_of_an_allowed_origin_may_ask_before_it_has_a_key(open_to_a_page: str) -> None:
    reply = httpx.options(f"{open_to_a_page}/v1/chat/completions", headers=ASKS)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [("v1/models", "sesame", 200), ("v1/models", "no", 401), ("v1/models/other", "sesame", 404), ("no", "sesame", 404)],
)
def test_answers_and_errors_can_be_read_by_that_page_only(
    open_to_a_page: str, path: str, key: str, status: int
) -> None:
    for origin, allowed in ((PAGE, PAGE), ("https://other.example.org", None), (f"{PAGE}.evil.example", None)):
        headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
        reply = httpx.get(f"{open_to_a_page}/{path}", headers=headers)
        assert reply.status_code == status
        assert reply.headers.get("access-control-allow-origin") == allowed
        assert "access-control-allow-credentials" not in reply.headers


def test_what_nobody_expected_can_be_read_as_well(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engine, access=Access("", (PAGE,))) as (address, service):
        monkeypatch.setattr(service, "check_name", lambda _: 1 / 0)
        reply = httpx.get(f"{address}/v1/models/tiny", headers={"Origin": PAGE})
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "The server failed: ZeroDivisionError."
    assert reply.headers["access-control-allow-origin"] == PAGE


def test_without_allowed_origins_no_page_may_use_it(engine: Engine) -> None:
    with serving(engine) as (address, _):
        reply = httpx.options(f"{address}/v1/chat/completions", headers=ASKS)
        assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (405, None)


def test_any_origin_needs_a_key(engine: Engine) -> None:
    with pytest.raises(LolcatsError, match="needs an API key"):
        Access("", ("*",))
    for wrong in ("chat.example.org", "https://*.example.org", "https://a/b", "null"):
        with pytest.raises(LolcatsError, match="expected an origin"):
            Access("sesame", (wrong,))
    with serving(engine, access=Access("sesame", ("*",))) as (address, _):
        reply = httpx.get(f"{address}/v1/models", headers={"Origin": PAGE, "Authorization": "bearer sesame"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_s_case_does_not_matter(open_to_a_page: str, scheme: str) -> None:
    reply = httpx.get(f"{open_to_a_page}/v1/models", headers={"Authorization": f"{scheme} sesame"})
    assert reply.status_code == 200
    for wrong in (f"{scheme} other", f"{scheme}", "Basic sesame", "sesame"):
        assert httpx.get(f"{open_to_a_page}/v1/models", headers={"Authorization": wrong}).status_code == 401


LOCAL = ["localhost", "127.0.0.1", "[::1]", "localhost:8000", "LOCALHOST:1"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "", "192.168.0.5", "[::2]"]


@pytest.mark.parametrize(
    ("access", "hosts", "others"),
    [
        (access_for("127.0.0.1", None, (), ()), LOCAL, FOREIGN),
        (access_for("127.0.0.1", "", (), ()), LOCAL, FOREIGN),
        (access_for("::1", None, (), ("models.lan",)), [*LOCAL, "models.lan:80"], FOREIGN),
        (access_for("127.0.0.1", "sesame", (), ()), [*LOCAL, *FOREIGN], []),
        (access_for("0.0.0.0", None, (), ()), [*LOCAL, *FOREIGN], []),
        (access_for("0.0.0.0", "sesame", (), ("models.lan",)), ["models.lan", "models.lan:1"], [*LOCAL, *FOREIGN]),
    ],
)
def test_host_headers(engine: Engine, access: Access, hosts: list[str], others: list[str]) -> None:
    with serving(engine, access=access) as (address, _):
        for host in hosts:
            assert httpx.get(f"{address}/health", headers={"Host": host}).status_code == 200, host
        for host in others:
            reply = httpx.get(f"{address}/health", headers={"Host": host})
            assert reply.status_code == 403, host
            assert "--allowed-host" in reply.json()["error"]["message"]


def test_an_empty_key_where_others_can_reach_the_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOLCATS_API_KEY", "")
    done = CliRunner().invoke(app, ["serve", "no-model", "--host", "0.0.0.0", "--port", "0"])
    assert done.exit_code == 2
    assert "The API key is empty" in done.stderr
    monkeypatch.delenv("LOLCATS_API_KEY")
    for options in (["--api-key", ""], ["--allow-origin", "*"]):
        done = CliRunner().invoke(app, ["serve", "no-model", "--host", "0.0.0.0", "--port", "0", *options])
        assert done.exit_code == 2
        assert "key" in done.stderr
        assert "No API key" not in done.stderr


@pytest.mark.parametrize("key", [" key", "key\n", "   ", "\udcff", "a\tb"])
def test_keys_that_no_client_could_send_are_refused(key: str) -> None:
    with pytest.raises(LolcatsError, match="printable text without blanks"):
        Access(key)


@pytest.mark.parametrize("host", ["example.org:8000", "http://example.org", "a/b", "[::1]:80"])
def test_allowed_hosts_are_names(host: str) -> None:
    with pytest.raises(LolcatsError, match="without scheme or port"):
        Access("", (), (host,))


def test_what_is_loopback() -> None:
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.1", "127.0.0.2", "::1"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "192.168.0.5", "no-such-host.invalid"):
        assert not is_loopback(host), host


def test_a_server_that_anyone_can_use_says_so_at_its_start() -> None:
    done = CliRunner().invoke(app, ["serve", "no-model", "--host", "0.0.0.0", "--port", "0"])
    assert "No API key: anyone who reaches 0.0.0.0 can use this server." in done.stderr
    done = CliRunner().invoke(app, ["serve", "no-model", "--port", "0"])
    assert "No API key" not in done.stderr
