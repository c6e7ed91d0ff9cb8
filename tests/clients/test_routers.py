"""``lolcats serve`` behind vLLM's router and behind LiteLLM's proxy, which have an environment of their own."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from compatibility import router_version
from plain import GREEDY, MESSAGES, PROMPT, TOKENS, USER, Server
from recording import Recorder
from support.programs import ROUTERS, address_of, free_port, lolcats_serve, router
from support.vllm_fields import ROUTER_CHAT, ROUTER_COMPLETION

KEY = "sk-test"  # the proxy's own
POLICIES = ("round_robin", "cache_aware")
PREFIXES = ("openai/", "hosted_vllm/")
MISSING = [name for name in ("vllm-router", "litellm") if not router_version(name)]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{ROUTERS} has no {' and no '.join(MISSING)}: make .venv-routers/done"
)


def works(feature: str, program: str, *kinds: str) -> pytest.MarkDecorator:
    """Runs the test for each policy or prefix."""
    marked = [pytest.param(x, marks=pytest.mark.works(f"{program} {x}", feature), id=x) for x in kinds]
    return pytest.mark.parametrize("kind", marked)


@pytest.fixture(scope="module")
def servers(directory: Path) -> Iterator[list[Server]]:
    """Two replicas that soon have no room, and one that soon has no connections left."""
    with ExitStack() as stack:
        few = ("--slots", "2", "--max-waiting")
        options = [(*few, "2"), (*few, "2"), (*few, "64", "--max-connections", "3")]
        processes = [stack.enter_context(lolcats_serve(directory, *each)) for each in options]
        yield [Server(address_of(process), directory) for process in processes]


@pytest.fixture(scope="module")
def recorder(servers: list[Server]) -> Recorder:
    """In front of the first replica."""
    return Recorder(servers[0].address)


@pytest.fixture(scope="module")
def routers(
    servers: list[Server], recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """By policy, in front of both replicas; ``connections``: of the third server, ``recorded``: of the recorder."""
    workers = {
        **{policy: [server.address for server in servers[:2]] for policy in POLICIES},
        "connections": [servers[2].address], "recorded": [recorder.address],
    }  # fmt: skip
    logs = tmp_path_factory.mktemp("routers")
    with ExitStack() as stack:
        yield {
            name: Server(stack.enter_context(router(
                "vllm-router", "/readiness", logs / name, "--policy", name if name in POLICIES else "round_robin",
                "--prometheus-port", str(free_port()), "--worker-urls", *addresses,
            )))
            for name, addresses in workers.items()
        }  # fmt: skip


@pytest.fixture(scope="module")
def proxy(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """LiteLLM's proxy with the first replica under both prefixes, which are also the models' names."""
    place = tmp_path_factory.mktemp("proxy")
    models = [
        {
            "model_name": prefix,
            "litellm_params": {"model": f"{prefix}tiny", "api_base": servers[0].url, "api_key": "no"},
        }
        for prefix in PREFIXES
    ]
    settings = {"model_list": models, "general_settings": {"master_key": KEY}}
    (place / "config.yaml").write_text(json.dumps(settings))
    options = ("--config", str(place / "config.yaml"), "--telemetry", "False")
    with router("litellm", "/health/readiness", place / "log", *options) as address:
        yield Server(address)


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


def answer(server: Server, model: str, chat: bool, stream: bool, **more: Any) -> tuple[str, str]:
    """Text and finish reason of a greedy answer, whole or joined."""
    http, options = client(server), {"model": model, **GREEDY, **more, "stream": stream}
    if chat:
        reply: Any = http.chat.completions.create(messages=MESSAGES, **options)
    else:
        reply = http.completions.create(prompt=PROMPT, **options)
    choices = [choice for chunk in (reply if stream else [reply]) for choice in chunk.choices]
    parts = [(choice.delta if stream else choice.message) if chat else choice for choice in choices]
    text = "".join((part.content if chat else part.text) or "" for part in parts)
    return text, "".join(choice.finish_reason or "" for choice in choices)


def expected(server: Server, chat: bool) -> tuple[str, str]:
    return (server.said() if chat else str(server.complete()["text"])), "length"


def asked_for(chat: bool, stream: bool) -> str:
    return f"{'streamed ' if stream else ''}{'chat' if chat else 'completions'}"


def ended(server: Server) -> int:
    """How many requests the server has answered."""
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=60) as response:
        counts = re.findall(r"^lolcats_requests_total\{.*?\} (\S+)", response.read().decode(), re.M)
    return int(sum(map(float, counts)))


@works("completions and chat, streamed and not, by two replicas", "vllm-router", *POLICIES)
def test_answers(kind: str, servers: list[Server], routers: dict[str, Server]) -> None:
    replicas, ways = servers[:2], [(chat, stream) for chat in (False, True) for stream in (False, True)]
    before = [ended(replica) for replica in replicas]
    with ThreadPoolExecutor(4) as pool:  # as many at once as one replica has room for
        found = list(pool.map(lambda way: answer(routers[kind], "tiny", *way), ways * 3))
    assert [ended(replica) > count for replica, count in zip(replicas, before, strict=True)] == [True, True]
    assert found == [expected(replicas[0], chat) for chat, _ in ways] * 3


@works("errors", "vllm-router", *POLICIES)
def test_errors_of_the_server_come_through(kind: str, routers: dict[str, Server]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        answer(routers[kind], "tiny", True, False, temperature=-1)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_what_the_router_adds_is_what_our_tests_send(
    chat: bool, routers: dict[str, Server], recorder: Recorder
) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    recorder.client = ("vllm-router", "")
    answer(routers["recorded"], "tiny", chat, False)
    sent = {name: values[0] for name, values in recorder.fields["vllm-router", "", path].items()}
    for name in ("model", "messages" if chat else "prompt", *GREEDY):
        del sent[name]
    assert sent == (ROUTER_CHAT if chat else ROUTER_COMPLETION)


def load(server: Server, count: int) -> Counter[tuple[int, str]]:
    """(status, code of the error) of many long requests at once."""

    def one(number: int) -> tuple[int, str]:
        chat, stream = number % 2 == 0, number % 4 < 2
        try:
            text, _ = answer(server, "tiny", chat, stream, max_tokens=300, logit_bias={"2": -100})
            return 200, "" if text else "no text"
        except openai.APIStatusError as error:
            return error.status_code, str(error.code)

    with ThreadPoolExecutor(count) as pool:
        return Counter(pool.map(one, range(count)))


@works("429 under load", "vllm-router", *POLICIES)
def test_a_full_replica_refuses_with_429_and_stays_in(
    kind: str, servers: list[Server], routers: dict[str, Server]
) -> None:
    statuses = load(routers[kind], 32)
    assert statuses.keys() == {(200, ""), (429, "queue_full")}
    before = [ended(replica) for replica in servers[:2]]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: answer(routers[kind], "tiny", False, False)[0], range(8)))
    assert texts == [expected(servers[0], False)[0]] * 8
    assert all(ended(replica) > count for replica, count in zip(servers[:2], before, strict=True))


def test_a_replica_without_connections_refuses_with_429_and_stays_in(routers: dict[str, Server]) -> None:
    for _ in range(2):
        statuses = load(routers["connections"], 32)
        assert statuses.keys() == {(200, ""), (429, "too_many_connections")}
    assert answer(routers["connections"], "tiny", False, False)[1] == "length"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
@works("completions and chat, streamed and not", "litellm[proxy]", *PREFIXES)
def test_answers_of_the_proxy(kind: str, chat: bool, stream: bool, servers: list[Server], proxy: Server) -> None:
    assert answer(proxy, kind, chat, stream) == expected(servers[0], chat)


@works("usage of streams", "litellm[proxy]", *PREFIXES)
def test_usage_of_a_stream(kind: str, proxy: Server) -> None:
    chunks = list(client(proxy).chat.completions.create(
        model=kind, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    ))  # fmt: skip
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage][-1] == TOKENS


@works("multi-turn chat", "litellm[proxy]", *PREFIXES)
def test_multi_turn(kind: str, servers: list[Server], proxy: Server) -> None:
    """The reply goes back as the object that came."""
    create = client(proxy).chat.completions.create
    message = create(model=kind, messages=USER, **GREEDY).choices[0].message
    again = create(model=kind, messages=[*USER, message, *USER], **GREEDY).choices[0].message
    assert again.content == servers[0].said([*USER, {"role": "assistant", "content": message.content}, *USER])


@works("errors", "litellm[proxy]", *PREFIXES)
def test_a_bad_value_does_not_take_the_server_out(kind: str, servers: list[Server], proxy: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        answer(proxy, kind, True, False, temperature=-1)
    assert answer(proxy, kind, True, False) == expected(servers[0], True)
