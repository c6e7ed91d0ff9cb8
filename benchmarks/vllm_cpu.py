"""Throughput of the same linearized model with vLLM and with ``lolcats serve``, one after the other, on CPUs.

    python benchmarks/vllm_cpu.py [--model DIR] [--vllm .venv-vllm/bin/python] [--dtype float32] [--rounds 3]

Without a model: SmolLM2-135M's geometry with random weights, since speed does not need real ones. Each round sends all
requests at once; a round ends with the last answer. Medians over rounds. The processors' seconds of the server's
processes are written, too: they say something even if the machine has other work. Writes results/vllm_cpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from common import RESULTS, processor, write
from serving import make_model

ROOT = Path(__file__).parents[1]


def commands(arguments: argparse.Namespace, model: Path, port: int) -> dict[str, list[str]]:
    count = str(arguments.requests)
    ours = [sys.executable, "-m", "lolcats.cli", "serve", str(model), "--slots", count, "--prefix-mb", "0"]
    theirs = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    theirs += ["--max-num-seqs", count, "--served-model-name", model.name]
    theirs += ["--max-model-len", "2048", "--no-enable-prefix-caching"]
    theirs += ["--dtype", arguments.dtype, "--gpu-memory-utilization", "0.3"]
    both = {"lolcats serve": ours, "vLLM, --enforce-eager": [*theirs, "--enforce-eager"], "vLLM": theirs}
    return {name: [*command, "--port", str(port)] for name, command in both.items()}


@contextmanager
def served(command: list[str], port: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process, once it answers."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
        try:
            while not answers(address):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"{command[2]} did not start: {log.read()[-3000:]}")
                time.sleep(0.5)
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def processor_seconds(process: psutil.Process) -> float:
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def measure(
    address: str, process: psutil.Process, model: str, arguments: argparse.Namespace, end_tokens: list[int]
) -> dict[str, Any]:
    """Seconds of each round, and the processors' seconds, after two requests that warm up."""
    choose, seconds, busy = random.Random(0), [], []
    client = httpx.Client(base_url=address, timeout=1200, trust_env=False)

    def one(prompt: list[int]) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": arguments.new, "temperature": 0}
        bias = {"logit_bias": {str(token): -100 for token in end_tokens}}
        answer = client.post("/v1/completions", json=body | bias).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == arguments.new, answer

    for count in [2] + [arguments.requests] * arguments.rounds:
        prompts = [[choose.randint(100, 40000) for _ in range(arguments.prompt)] for _ in range(count)]
        begin, before = time.perf_counter(), processor_seconds(process)
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(one, prompts))
        seconds.append(time.perf_counter() - begin)
        busy.append(processor_seconds(process) - before)
    seconds, busy = seconds[1:], busy[1:]
    rate = arguments.requests * arguments.new / statistics.median(seconds)
    return {"seconds": seconds, "processor_seconds": busy, "tokens_per_second": rate}


def report(results: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {row['tokens_per_second']:.1f} | {listed(row['seconds'])} | {listed(row['processor_seconds'])} |"
        for name, row in results["servers"].items()
    )
    return (
        f"# vLLM and lolcats serve on CPUs\n\n{results['date']}, {results['hardware']}; {results['model']}, "
        f"{results['dtype']}; `{results['command']}`\n\n{results['requests']} requests at once, {results['prompt']} "
        f"tokens of prompt and {results['new']} new ones each, no prefix cache; load before: {results['load']}.\n\n"
        f"| server | new tokens per second (median) | seconds of each round | of processors |\n|---|---:|---|---|\n"
        f"{rows}\n"
    )


def listed(values: list[float]) -> str:
    return ", ".join(f"{x:.1f}" for x in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--vllm", default=str(ROOT / ".venv-vllm/bin/python"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, default in {"requests": 16, "prompt": 256, "new": 64, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        model = arguments.model or Path(scratch) / "smollm2-135m"
        if arguments.model is None:
            make_model(model, "smollm2-135m", getattr(torch, arguments.dtype))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        end = json.loads((model / "config.json").read_text()).get("eos_token_id") or []
        load, servers = [round(x, 1) for x in os.getloadavg()], {}
        for name, command in commands(arguments, model, port).items():
            with served(command, port) as (address, process):
                tokens = end if isinstance(end, list) else [end]
                servers[name] = measure(address, process, model.name, arguments, tokens)
            print(name, servers[name], flush=True)
    settings = {name: getattr(arguments, name) for name in ("requests", "prompt", "new", "dtype")}
    written = {
        "date": date.today().isoformat(), "hardware": f"{os.cpu_count()} cores of {processor()} ({platform.machine()})",
        "model": model.name if arguments.model else "smollm2-135m with random weights", "load": load,
        "command": f"python benchmarks/vllm_cpu.py --rounds {arguments.rounds}", **settings, "servers": servers,
    }  # fmt: skip
    write(written, report(written), arguments.out, "vllm_cpu")


if __name__ == "__main__":
    main()
