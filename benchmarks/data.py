"""Time and peak memory of reading a large .jsonl file, the first time and again from the cache.

    python benchmarks/data.py MODEL --text FILE --megabytes 50 2000

MODEL gives the tokenizer. Documents are made of FILE's paragraphs (any data file with a text column) in random order,
so that none is like another. Every measurement runs in a process of its own, with a cache of its own.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lolcats.config import DataConfig
from lolcats.data.rows import load_data
from lolcats.data.sources import read_records
from lolcats.weights.base import find_base, load_tokenizer

PARAGRAPHS = 6  # of a document


def write_file(path: Path, text: str, megabytes: int) -> None:
    records, _ = read_records(text, DataConfig())
    paragraphs = [p for record in records for p in record["text"].split("\n\n") if len(p) > 100]
    rng, size = random.Random(0), 0
    with path.open("w") as file:
        while size < megabytes << 20:
            size += file.write(json.dumps({"text": "\n\n".join(rng.sample(paragraphs, PARAGRAPHS))}) + "\n")


def measure(model: str, path: str) -> dict[str, float]:
    """In this process: seconds, peak resident memory before and after, and of the largest worker. Linux only."""
    tokenizer = load_tokenizer(find_base(model))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, started = peak(), time.time()
    data = load_data(path, tokenizer, DataConfig(sequence_length=1024))
    seconds, rows = time.time() - started, data.dataset("train")
    for index in range(0, len(rows), max(1, len(rows) // 1000)):  # a thousand rows from all over the file
        rows[index]
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "MB before": before, "MB": peak(), "MB of a worker": worker, "seconds": seconds, "tokens": len(rows) * 1024,
        "documents": data.summary["documents"],
    }  # fmt: skip


def peak() -> float:
    """MB of memory that this process has held at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 2000])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.text)))
        return
    print("| file | run | seconds | peak MB (before) | of a worker | tokens | documents |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.jsonl"
            write_file(path, options.text, megabytes)
            for run in ("first", "second"):
                command = [sys.executable, __file__, options.model, "--text", str(path), "--child"]
                environment = {**os.environ, "LOLCATS_CACHE": folder}
                out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                m = json.loads(out.splitlines()[-1])
                print(
                    f"| {megabytes} MB | {run} | {m['seconds']:.1f} | {m['MB']:.0f} ({m['MB before']:.0f}) | "
                    f"{m['MB of a worker']:.0f} | {m['tokens']:,} | {m['documents']:,} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
