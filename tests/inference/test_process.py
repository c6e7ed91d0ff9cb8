"""``lolcats serve`` as a process: signals, restart, the real model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import tiny_model
from support.serving import CONFIG, ready, wait_until
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app

REAL = os.environ.get("LOLCATS_TEST_MODEL", "")  # a linearized SmolLM2-135M: DIR or DIR/merged of make demo


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny"
    lolcats.convert(tiny_model(max_position_embeddings=100_000), CONFIG).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def served(directory: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running ``lolcats serve`` and its address."""
    command = [sys.executable, "-u", "-m", "lolcats.cli", "serve", str(directory), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = process.stdout.readline()  # once the model is loaded
        address = re.search(r"http://127\.0\.0\.1:[1-9]\d+", said)[0]
        wait_until(lambda: ready(address), 60)
        yield address, process
    finally:
        process.kill()
        process.communicate()


def ask(address: str, tokens: int, replies: list[Any]) -> threading.Thread:
    """A request in a thread; its reply or error is appended."""
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 0}

    def post() -> None:
        try:
            replies.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60).json())
        except httpx.TransportError as error:
            replies.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    wait_until(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
    return thread


def test_sigterm_finishes_what_runs(directory: Path) -> None:
    with served(directory) as (address, process):
        replies: list[Any] = []
        thread = ask(address, 700, replies)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health")
        thread.join(60)
        assert replies[0]["usage"]["completion_tokens"] == 700
        assert process.wait(20) in (0, -signal.SIGTERM)


STOPPING = "Stopping now: unfinished answers are cut off.\n"


@pytest.mark.parametrize("presses", [2, 3])
def test_a_second_ctrl_c_stops_at_once_with_one_line(presses: int, directory: Path) -> None:
    with served(directory, "--max-tokens", "90000") as (address, process):
        replies: list[Any] = []
        thread = ask(address, 90_000, replies)
        started = time.monotonic()
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(20) in (0, -signal.SIGINT)  # the third may come when it has already ended
        assert time.monotonic() - started < 15, "long before the deadline of 30 s"
        assert process.stdout.read() == STOPPING
        thread.join(10)
        assert replies[0]["error"]["message"] == "The server shut down before the answer was complete."


def test_a_client_that_does_not_read_cannot_hold_it_up(directory: Path) -> None:
    with served(directory, "--max-tokens", "90000") as (address, process):
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        body = '{"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 90000, "temperature": 0, "stream": true}'
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
            time.sleep(1)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)  # two signals at once would be one
            assert process.wait(20) == 0
        assert process.stdout.read() == STOPPING


@pytest.mark.slow
def test_sigterm_ends_at_the_deadline(directory: Path) -> None:
    options = ("--deadline", "1", "--max-tokens", "90000")
    with served(directory, *options) as (address, process):
        replies: list[Any] = []
        thread = ask(address, 90_000, replies)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 5
        thread.join(10)
        assert replies[0]["error"]["message"] == "The server shut down before the answer was complete."


@pytest.mark.slow
def test_a_killed_server_answers_the_same_after_its_restart(directory: Path) -> None:
    answers, lost = [], list[Any]()
    for _ in range(2):
        with served(directory) as (address, process):
            if not lost:
                ask(address, 4000, lost)
            body = {"model": "tiny", "prompt": "the cat", "max_tokens": 20, "temperature": 0}
            answers.append(httpx.post(f"{address}/v1/completions", json=body).json()["choices"])
            process.kill()
            process.wait()
            wait_until(lambda: lost)
    assert answers[0] == answers[1]
    assert isinstance(lost[0], httpx.TransportError)


def test_a_model_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "no"), "--port", "0"])
    assert done.exit_code == 2
    assert "does not exist" in done.stderr


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "Address already in use"), ("203.0.113.1", "Cannot assign requested address")]
)
def test_an_address_that_cannot_be_had_is_a_sentence_before_anything_is_loaded(host: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", "no-model", "--host", host, "--port", port])
    assert done.exit_code == 2
    assert done.stderr == f"Cannot listen on {host}, port {port}: {reason}. Use another --port or --host.\n"


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="LOLCATS_TEST_MODEL names no linearized SmolLM2-135M")
def test_a_restart_is_ready_in_ten_seconds() -> None:
    for _ in range(2):
        started = time.monotonic()
        with served(Path(REAL)) as (_, process):
            seconds = time.monotonic() - started
            process.kill()
    assert seconds < 10


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="LOLCATS_TEST_MODEL names no linearized SmolLM2-135M")
def test_a_real_request_does_not_depend_on_its_batch_mates() -> None:
    from transformers import AutoTokenizer

    from lolcats.inference.engine import Engine, Request
    from lolcats.inference.engine.sampling import SamplingParams
    from lolcats.modeling.checkpoint import load

    engine = Engine(load(REAL, "float32"), AutoTokenizer.from_pretrained(REAL), slots=32, prefix_bytes=0)
    texts = [f"The {i} most important things about the number {i} are" for i in range(32)]

    def submit(text: str) -> Request:
        request = Request(engine.tokenizer(text)["input_ids"], SamplingParams(max_tokens=100), lambda _: None)
        engine.submit(request)
        return request

    together = [submit(text) for text in texts]
    engine.run()
    for text, request in list(zip(texts, together, strict=True))[::8]:
        alone = submit(text)
        engine.run()
        assert alone.generated == request.generated
