"""How fast and how fair the server is: answers on one connection, a short prompt beside a long one, throughput.

    python benchmarks/serving.py [--against COMMIT] [--geometry smollm2-135m] [--long 6600] [--rounds 3]

Random weights: speed does not need real ones. Both trees run as ``lolcats serve``, one after the other in each round,
with the same model directory; medians over rounds. Writes results/serving.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VOCABULARY = 49152
ROWS = {
    "models_ms": "`GET /v1/models` on one connection, median of 200, ms",
    "alone_s": "first token of a 4-token prompt, alone, s",
    "piece_s": "a piece of 256 tokens of the long prompt, s",
    "beside_s": "first token of a 4-token prompt sent while the long prompt is prefilled, s",
    "long_s": "first token of the long prompt, alone, s",
    "mixed_s": "4 prompts of 1,500 tokens and 12 of 60 at once, 32 tokens each: until the last one has ended, s",
}


def make_model(path: Path, geometry: str, dtype: torch.dtype = torch.float32) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from lolcats.config import AttentionConfig
    from lolcats.lab.bench import random_model

    model = random_model(geometry, AttentionConfig(), torch.device("cpu"), dtype)
    model.save_pretrained(path)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", unk_token="w0").save_pretrained(path)


@contextmanager
def served(tree: Path, model: Path) -> Iterator[httpx.Client]:
    command = [sys.executable, "-u", "-m", "lolcats.cli", "serve", str(model), "--port", "0", "--prefix-mb", "0"]
    env = {**os.environ, "PYTHONPATH": str(tree / "src")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert address is not None, "the server did not start"
        with httpx.Client(base_url=address[0], timeout=600, transport=httpx.HTTPTransport(retries=50)) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def first_token(client: httpx.Client, tokens: int, new: int = 1) -> float:
    """Seconds until the first token of a prompt of so many."""
    prompt = [2 + i % 5000 for i in range(tokens)]
    body = {"model": "model", "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        first = 0.0
        for line in reply.iter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter() - started
    return first


def several(client: httpx.Client, sizes: list[int], new: int) -> list[float]:
    """First tokens of prompts sent at once, once all have ended."""
    seconds = [0.0] * len(sizes)

    def one(i: int) -> None:
        seconds[i] = first_token(client, sizes[i], new)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def measure(client: httpx.Client, long: int) -> dict[str, float]:
    client.get("/v1/models")
    times = []
    for _ in range(200):
        started = time.perf_counter()
        client.get("/v1/models")
        times.append(time.perf_counter() - started)
    first_token(client, 300, 8)  # warm
    alone = statistics.median(first_token(client, 4) for _ in range(5))
    whole = first_token(client, long)
    slow = threading.Thread(target=first_token, args=(client, long))
    slow.start()
    time.sleep(0.15 * whole)
    beside = first_token(client, 4)  # one: after it the long prompt may be over
    slow.join()
    started = time.perf_counter()
    several(client, [1500, 60, 60, 60] * 4, 32)
    return {
        "models_ms": 1e3 * statistics.median(times), "alone_s": alone, "piece_s": whole / -(-long // 256),
        "beside_s": beside, "long_s": whole, "mixed_s": time.perf_counter() - started,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    names = list(result["systems"])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for key, about in ROWS.items():
        lines.append(f"| {about} | " + " | ".join(f"{result['systems'][name][key]:.3g}" for name in names) + " |")
    about = (
        f"{result['date']}, {result['machine']}, {result['geometry']} with random weights, fp32; `{result['command']}`"
    )
    return f"# The server\n\n{about}\n\nA long prompt has {result['long']:,} tokens.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="", help="also measure this commit, in a worktree")
    parser.add_argument("--geometry", default="smollm2-135m")
    parser.add_argument("--long", type=int, default=6600)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees, model = {"this tree": ROOT}, Path(folder) / "model"
        make_model(model, options.geometry)
        if options.against:
            other = Path(folder) / "tree"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", other, options.against], check=True, cwd=ROOT)
            trees[options.against] = other
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        try:
            for _ in range(options.rounds):
                for name, tree in trees.items():
                    with served(tree, model) as client:
                        rounds[name].append(measure(client, options.long))
                    print(name, {key: round(value, 4) for key, value in rounds[name][-1].items()}, flush=True)
        finally:
            if options.against:
                subprocess.run(["git", "worktree", "remove", "--force", trees[options.against]], check=False, cwd=ROOT)
    systems = {
        name: {key: statistics.median(row[key] for row in rows) for key in ROWS} for name, rows in rounds.items()
    }
    result = {
        "date": date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "geometry": options.geometry, "long": options.long, "systems": systems, "rounds": rounds,
        "command": "python " + " ".join(["benchmarks/serving.py", *sys.argv[1:]]),
    }  # fmt: skip
    RESULTS.joinpath("serving.json").write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.joinpath("serving.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
