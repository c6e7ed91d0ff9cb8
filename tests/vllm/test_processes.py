"""vLLM in several processes: its server, two servers behind vLLM's router, tensor parallelism, and what starts without
the plugin or must not start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, Case, references, run, wanted
from support.programs import ROUTERS, answers, free_port, router, wait_until

ONCE = str(HERE / "generate_once.py")


@pytest.fixture(scope="module")
def servers(models: Path) -> Iterator[list[str]]:
    """Addresses of two servers with OpenAI's API. Each has an engine in a process of its own, which gets the
    configuration pickled."""
    with ExitStack() as stack:
        started = [stack.enter_context(starting(models / "llama")) for _ in range(2)]
        end = time.monotonic() + 400
        for address, process in started:
            while not answers(f"{address}/health"):
                assert process.poll() is None, process.communicate()[1][-4000:]
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.5)
        yield [address for address, _ in started]


@contextmanager
def starting(model: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    options = ["--model", str(model), "--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"]
    options += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.05"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def asked(address: str, case: Case, **more: Any) -> urllib.request.Request:
    body = {"model": "tiny", "prompt": case["prompt"], "max_tokens": len(case["output"]), "temperature": 0}
    body |= {"ignore_eos": True, "skip_special_tokens": False, **more}
    return urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )


def complete(address: str, case: Case) -> list[int]:
    with urllib.request.urlopen(asked(address, case), timeout=300) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return [int(word.removeprefix("t")) for word in text.split()]


def leave(address: str, case: Case) -> None:
    """Close the connection after the first piece of a stream."""
    with urllib.request.urlopen(asked(address, case, stream=True, max_tokens=300), timeout=300) as response:
        assert response.readline().startswith(b"data:")


def metric(address: str, name: str) -> float:
    """The sum over all labels."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        found = re.findall(rf"^vllm:{name}\{{.*?\}} (\S+)", response.read().decode(), re.M)
    assert found, name
    return sum(map(float, found))


def test_the_server_answers_as_transformers_does(servers: list[str], models: Path) -> None:
    cases = references(models / "llama")
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(lambda case: complete(servers[0], case), cases)) == wanted(cases)


def test_clients_that_close_their_connections(servers: list[str], models: Path) -> None:
    """1,000 requests, a third of whose clients leave: all others are answered, and no request and no memory is left."""
    cases = references(models / "llama")

    def one(number: int) -> list[int] | None:
        case = cases[number % len(cases)]
        return leave(servers[0], case) if number % 3 == 0 else complete(servers[0], short(case, number))

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, range(1000)))
    for number, output in enumerate(found):
        assert output == (short(cases[number % len(cases)], number)["output"] if number % 3 else None)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        wait_until(lambda name=name: metric(servers[0], name) == 0, f"{name} is not 0")


def short(case: Case, number: int) -> Case:
    return {**case, "output": case["output"][: 1 + number % 6]}


def test_two_replicas_behind_the_router(servers: list[str], models: Path, tmp_path: Path) -> None:
    if not (ROUTERS / "bin/vllm-router").is_file():
        pytest.skip(f"{ROUTERS} has no vllm-router: make .venv-routers/done")
    cases = references(models / "llama")
    before = [metric(address, "request_success_total") for address in servers]
    options = ("--policy", "round_robin", "--prometheus-port", str(free_port()), "--worker-urls", *servers)
    with router("vllm-router", "/readiness", tmp_path / "log", *options) as address, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: complete(address, case), cases)) == wanted(cases)
    after = [metric(address, "request_success_total") for address in servers]
    assert all(now > then for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["qwen3", "unrotated glm4"])
def test_two_ranks_share_the_heads(name: str, models: Path, tmp_path: Path) -> None:
    options, out = json.dumps({"tensor_parallel_size": 2}), tmp_path / "tokens.json"
    done = run(ONCE, str(models / name), options, str(out), VLLM_WORKER_MULTIPROC_METHOD="spawn")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(out.read_text()) == wanted(references(models / name))


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, str], str]] = {
    "without the plugin": ("llama", {}, {"VLLM_PLUGINS": ""}, "trust_remote_code=True"),
    "without the plugin, with trust": (
        "llama", {"trust_remote_code": True}, {"VLLM_PLUGINS": ""}, "Transformers backend would compute softmax"
    ),
    "Transformers backend": ("llama", {"model_impl": "transformers"}, {}, "Transformers backend would compute softmax"),
    "Transformers backend by name": (
        "llama", {"hf_overrides": {"architectures": ["TransformersForCausalLM"]}}, {},
        "Transformers backend would compute softmax",
    ),
}  # fmt: skip
"""Model, options, environment, and what vLLM says before it ends."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_does_not_start(name: str, models: Path, tmp_path: Path) -> None:
    model, options, environment, said = REFUSED[name]
    done = run(ONCE, str(models / model), json.dumps(options), str(tmp_path / "tokens.json"), **environment)
    assert done.returncode != 0
    assert said in done.stderr + done.stdout
