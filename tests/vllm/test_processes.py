"""vLLM in several processes: its server, tensor parallelism, and what starts without the plugin or must not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, references, run, wanted
from support.programs import answers, free_port

ONCE = str(HERE / "generate_once.py")


@pytest.fixture
def server(models: Path) -> Iterator[str]:
    """OpenAI's API. The engine is a process of its own, which gets the configuration pickled."""
    port = free_port()
    options = ["--model", str(models / "llama"), "--served-model-name", "tiny", "--port", str(port)]
    options += ["--host", "127.0.0.1"]
    options += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.05"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 400
    try:
        while not answers(f"{address}/health"):
            assert process.poll() is None, process.communicate()[1][-4000:]
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


def complete(address: str, case: dict[str, list[int]]) -> list[int]:
    body = {"model": "tiny", "prompt": case["prompt"], "max_tokens": len(case["output"]), "temperature": 0}
    body |= {"ignore_eos": True, "skip_special_tokens": False}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return [int(word.removeprefix("t")) for word in text.split()]


def test_the_server_answers_as_transformers_does(server: str, models: Path) -> None:
    cases = references(models / "llama")
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(lambda case: complete(server, case), cases)) == wanted(cases)


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
