"""Programs that tests start and stop: ``lolcats serve``, routers, proxies."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LOLCATS_PYTHON", str(ROOT / ".venv/bin/python"))
ROUTERS = Path(os.environ.get("LOLCATS_ROUTERS", ROOT / ".venv-routers"))
"""The environment that has the routers, if it is there."""
WAIT = 180  # seconds; LiteLLM's proxy takes 5 where it does not share the processor


@contextmanager
def lolcats_serve(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``lolcats serve``, which may still be loading its model: see :func:`address_of`."""
    command = [PYTHON, "-u", "-m", "lolcats.cli", "serve", str(directory), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def address_of(process: subprocess.Popen[str]) -> str:
    """Where ``lolcats serve`` listens, once it does."""
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:[1-9]\d+", line):
            break
    else:
        raise AssertionError("the server did not start: " + "".join(said)[-4000:])
    wait_until(lambda: answers(f"{found[0]}/health"), f"the server was not ready within {WAIT} s")
    return found[0]


@contextmanager
def router(name: str, ready: str, log: Path, *options: str) -> Iterator[str]:
    """The address of a program of the routers' environment; ``ready``: a path that it answers once it works."""
    port = free_port()
    command = [str(ROUTERS / "bin" / name), "--host", "127.0.0.1", "--port", str(port), *options]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(
                lambda: answers(f"{address}{ready}") or process.poll() is not None, f"{name} was not ready: {log}"
            )
            assert process.poll() is None, log.read_text()[-4000:]
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until(true: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)
