"""Time and peak memory of the chunked path against sequence length on a CPU, softmax attention beside it.

    python benchmarks/scaling.py            # writes benchmarks/results/scaling.md and scaling.png

Every measurement runs in a process of its own, so that its peak memory is its own. Geometry of one SmolLM2-135M layer.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date

import common
import torch
from torch import Tensor

from lolcats.attention import AttentionSpec
from lolcats.config import AttentionConfig
from lolcats.modeling.layer import Geometry, LinearizedAttention

B, H, G, D, F_COLUMNS = 1, 9, 3, 64, 64
SPEC = AttentionSpec("hybrid", "terraced", window_size=64, sinks=4)
LENGTHS = [512 * 2**i for i in range(7)]
RUNS, SECONDS = 25, 8


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def hybrid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in a converted model: feature maps included, one key map per query head, recomputed in backward."""
    torch.manual_seed(0)
    config = AttentionConfig(feature_dim=F_COLUMNS, window_size=SPEC.window_size, sinks=SPEC.sinks)
    return LinearizedAttention(Geometry(0, H, G, D, D), config, SPEC, "sdpa")(q, k, v, D**-0.5)


def measure(name: str, length: int, backward: bool) -> dict[str, float]:
    """Median seconds and peak bytes above the inputs."""
    function = {"softmax": softmax, "hybrid": hybrid}[name]
    q, k, v = (torch.randn(B, heads, length, D, requires_grad=backward) for heads in (H, G, G))

    def once() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = function(q, k, v)
        if backward:
            y.sum().backward()
        return time.perf_counter() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    times: list[float] = []
    while len(times) < 2 or (len(times) < RUNS and sum(times) < SECONDS):
        times.append(once())
    return {"seconds": statistics.median(times), "bytes": peak}


def all_rows() -> list[dict[str, float]]:
    rows = []
    for backward in (False, True):
        for length in LENGTHS:
            row: dict[str, float] = {"T": length, "backward": backward}
            for name in ("softmax", "hybrid"):
                command = [sys.executable, __file__, name, str(length), str(int(backward))]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row |= {f"{name}_{key}": value for key, value in json.loads(output).items()}
            print(row, flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        "| T | softmax ms | hybrid ms | against T/2 | softmax MiB | hybrid MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    previous = None
    for row in rows:
        ratio = f"{row['hybrid_seconds'] / previous:.2f}×" if previous else ""
        previous = row["hybrid_seconds"]
        times = f"{1e3 * row['softmax_seconds']:.1f} | {1e3 * row['hybrid_seconds']:.1f} | {ratio}"
        sizes = f"{row['softmax_bytes'] / 2**20:.0f} | {row['hybrid_bytes'] / 2**20:.0f}"
        lines.append(f"| {row['T']:,} | {times} | {sizes} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, float]]) -> None:
    pyplot = common.load_pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, scale, label in ((axes[0], "seconds", 1e3, "ms"), (axes[1], "bytes", 2**-20, "MiB")):
        for backward, style in ((False, "-"), (True, "--")):
            for name, color in (("softmax", "tab:red"), ("hybrid", "tab:blue")):
                points = [(r["T"], r[f"{name}_{key}"] * scale) for r in rows if r["backward"] == backward]
                title = f"{name}, {'forward + backward' if backward else 'forward'}"
                axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, label=title)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(common.RESULTS / "scaling.png", dpi=120)


def main() -> None:
    rows = all_rows()
    common.RESULTS.mkdir(exist_ok=True)
    head = f"""# Time and memory against sequence length

`python benchmarks/scaling.py`, {date.today()}, {common.processor()}, {torch.get_num_threads()} threads, fp32,
torch {torch.__version__}, Python {platform.python_version()}. One layer, batch {B}, {H} query and {G} key/value heads
of {D}, f = {F_COLUMNS}, terraced window of {SPEC.window_size}, {SPEC.sinks} sinks; feature maps included, attention
recomputed in backward as in training. Medians of {RUNS} runs, fewer where {SECONDS} s were over first (at least 2);
memory is the peak above the inputs. Softmax is `scaled_dot_product_attention` (its CPU flash kernel).
"""
    parts = [f"## {title}\n\n{table([r for r in rows if r['backward'] == b])}\n" for b, title in
             ((False, "Forward"), (True, "Forward and backward"))]  # fmt: skip
    (common.RESULTS / "scaling.md").write_text("\n".join([head, *parts, "![Scaling](scaling.png)\n"]))
    draw(rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))))
    else:
        main()
