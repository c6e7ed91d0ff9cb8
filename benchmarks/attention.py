"""The Triton kernels against the fp32 reference, the fastest softmax attention and flash-linear-attention, on one GPU.

    python benchmarks/attention.py                          # writes results/attention.json, attention.md, attention.png
    python benchmarks/attention.py --activations FILE ...   # errors on real activations, too (see activations.py)
    python benchmarks/attention.py --only errors            # sections whose name has the word; the others stay
    python benchmarks/attention.py --variants               # ways to run a kernel, and the best for each shape
    python benchmarks/attention.py --plot                   # table and picture again, from the JSON

Geometry of one Llama-3-8B layer: 32 query heads, 8 kv heads, head dim 128, f = 64, window 64, 4 sinks; random data.
Feature maps are part of what is timed. flash-linear-attention and matplotlib are used where installed.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import attention_rotary
import attention_variants
import common
import torch
import triton
from attention_problem import (
    F_COLUMNS,
    HYBRID,
    D,
    G,
    H,
    Problem,
    Unrotated,
    both,
    eager,
    fastest,
    flash,
    relative,
    replayed,
    softmax_peers,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lolcats.attention import AttentionSpec, Mixer
from lolcats.attention.kernels import triton_attention

FORWARD = {(1, 2048): None, (8, 1024): 1.0, (1, 8192): 6.0, (1, 32768): 26.0, (1, 131072): 110.0}
BACKWARD = {(8, 1024): 1.0, (1, 8192): 4.0, (1, 32768): 16.0}  # batch, tokens: target against the fastest softmax
QUERY_SHARE = 0.7  # share of a target that is asked for with key maps per query head
SHARES = {8192: 25, 131072: 40}  # tokens: percent of the bound that are the target
RATES = {"H100": (3.0e12, 782e12), "H200": (4.3e12, 790e12)}  # bytes and operations a second: copy, bf16 product
NAMES = ("q", "k", "v", "γ", "φ_q", "φ_k")
PEER = "flash-linear-attention"
VARIANTS = "Variants of "  # sections of --variants begin with it


def rates(device: str) -> tuple[float, float]:
    """Bytes and operations a second that were measured on such a GPU; an H100's for one that is not known."""
    return next((known for name, known in RATES.items() if name in device), RATES["H100"])


def bound(maps: int, device: str) -> tuple[float, float]:
    """Nanoseconds a token that moving q, k, v and o takes, and that the products take (window: 1.5 chunks + sinks)."""
    moved = 2 * D * (2 * H + 2 * G)
    features, near, state = 2 * D * F_COLUMNS, 4 * D * (1.5 * 64 + 4), 4 * D * F_COLUMNS
    operations = H * (features + near + state) + maps * (features + state)
    moving, computing = rates(device)
    return moved / moving * 1e9, operations / computing * 1e9


def target(asked: float | None, maps: int) -> str:
    return "" if asked is None else f"{asked * (QUERY_SHARE if maps == H else 1):g}"


def forward_rows() -> Iterator[list[Any]]:
    device = common.hardware(torch.device("cuda"))
    with torch.no_grad():
        for (batch, length), asked in FORWARD.items():
            tokens, peers = batch * length, softmax_peers(Problem.random(batch, length))
            name, softmax = fastest({name: replayed(peer) for name, peer in peers.items()})
            launched = eager(peers[name])
            for maps in (H, G):
                problem = Problem.random(batch, length, maps)
                ours, slow = replayed(problem.kernels), eager(problem.kernels)
                share = 100 * max(bound(maps, device)) * tokens / (ours * 1e6)
                yield [
                    shape(batch, length), "query" if maps == H else "kv", name, f"{softmax:.3f}", f"{ours:.3f}",
                    f"{softmax / ours:.2f}", target(asked, maps), f"{ours * 1e6 / tokens:.1f}", f"{share:.0f}",
                    f"{SHARES.get(tokens, '') if batch == 1 else ''}", f"{launched:.3f}", f"{slow:.3f}",
                    f"{launched / slow:.2f}",
                ]  # fmt: skip


def shape(batch: int, length: int) -> str:
    return f"{batch} × {length}"


def backward_rows() -> Iterator[list[Any]]:
    """Softmax attentions give the gradients of q, k and v, as stage 2 needs them; ours are also timed with those of the
    maps."""
    for (batch, length), asked in BACKWARD.items():
        peers = softmax_peers(Problem.random(batch, length))
        direction = torch.randn_like(Problem.random(batch, length).qkv[0])
        steps = {n: both(peer, list(peer.args), direction) for n, peer in peers.items()}
        name, softmax = fastest({n: replayed(step) for n, step in steps.items()})
        launched = eager(steps[name])
        for maps in (H, G):
            problem = Problem.random(batch, length, maps)
            weights = [*problem.phi_q.parameters(), *problem.phi_k.parameters()]
            every = replayed(both(problem.kernels, problem.leaves(), direction))
            inputs = both(frozen(problem, weights).kernels, problem.qkv, direction)
            timed, slow = replayed(inputs), eager(inputs)
            maps_only = replayed(both(frozen(problem, problem.qkv).kernels, weights, direction))
            yield [
                shape(batch, length), "query" if maps == H else "kv", name, f"{softmax:.2f}", f"{timed:.2f}",
                f"{softmax / timed:.2f}", target(asked, maps), f"{every:.2f}", f"{softmax / every:.2f}",
                f"{maps_only:.2f}", f"{launched:.2f}", f"{slow:.2f}", f"{launched / slow:.2f}",
            ]  # fmt: skip


def frozen(problem: Problem, tensors: list[Any]) -> Problem:
    """No gradient for γ and these; for all others."""
    leaves = problem.leaves()
    for leaf in leaves:
        leaf.requires_grad_(not any(leaf is x for x in (problem.gamma, *tensors)))
    return problem


def unrotated_rows() -> Iterator[list[Any]]:
    """As ``backward_rows``; where maps see other queries and keys, these follow the rotated ones, as in models."""
    for length in (1024, 4096, 16384):
        for maps in (H, G):
            rotated = Problem.random(1, length, maps)
            unrotated = Unrotated.beside(rotated)
            direction, row = torch.randn_like(rotated.qkv[0]), [f"{length}", "query" if maps == H else "kv"]
            weights = [*rotated.phi_q.parameters(), *rotated.phi_k.parameters()]
            times: list[list[float]] = []
            for problem in (rotated, unrotated):
                with torch.no_grad():
                    times.append([replayed(problem.kernels)])
                times[-1].append(replayed(both(problem.kernels, problem.leaves(), direction)))
                times[-1].append(replayed(both(frozen(problem, weights).kernels, problem.qkv, direction)))
                times[-1].append(replayed(both(frozen(problem, problem.qkv).kernels, weights, direction)))
                for leaf in problem.leaves():
                    leaf.requires_grad_()
            for a, b in zip(*times, strict=True):
                row += [f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f}"]
            yield row


def linear_rows() -> Iterator[list[Any]]:
    """Plain linear attention of given bf16 features and as many kv heads as query heads, normalised by both."""
    if not importlib.util.find_spec("fla"):
        yield [f"{PEER} is not installed", "", "", "", "", "", ""]
        return
    from fla.ops.linear_attn import chunk_linear_attn

    spec = AttentionSpec("linear")
    for length in (1024, 4096, 16384, 131072):
        torch.manual_seed(0)
        fq, fk = (torch.rand(1, length, H, 2 * F_COLUMNS, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        v = torch.randn(1, length, H, D, device="cuda", dtype=torch.bfloat16)
        leaves = [x.requires_grad_() for x in (fq, fk, v)]
        gamma = torch.ones(H, device="cuda")

        def peer(q: Tensor = fq, k: Tensor = fk, v: Tensor = v) -> Tensor:
            return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0]

        def ours(q: Tensor = fq, k: Tensor = fk, v: Tensor = v, gamma: Tensor = gamma) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return triton_attention(q, k, v, Mixer(nn.Identity(), nn.Identity(), gamma, spec, 1.0))[0].transpose(1, 2)

        direction = torch.randn_like(v)
        with torch.no_grad():
            a, b, difference = eager(peer), eager(ours), error(ours(), peer())
        c, d = (eager(both(f, leaves, direction)) for f in (peer, ours))
        yield [f"{length}", f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}", f"{c:.3f}", f"{d:.3f}", f"{c / d:.2f}", difference]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error_rows() -> Iterator[list[Any]]:
    """‖actual − reference‖ / ‖reference‖ of outputs and every gradient, of the first and the last kv head."""
    for batch, length in FORWARD:
        for maps in (H, G):
            yield compare(f"random, {batch} × {length}, maps per {'query' if maps == H else 'kv'} head",
                          Problem.random(batch, length, maps))  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for spec in (HYBRID, replace(HYBRID, window="sliding"), replace(HYBRID, kind="linear")):
            name = f"random, 1 × 1000, {str(dtype).removeprefix('torch.')}, {spec.kind} {spec.window}"
            yield compare(name, replace(Problem.random(1, 1000, dtype=dtype), spec=spec))
    problem = Problem.random(1, 1000)
    yield compare("random, 1 × 1000, dy = y", problem, problem.kernels().detach())


def activation_rows(activations: list[Path]) -> Iterator[list[Any]]:
    """The same on q, k and v of real layers, FlashAttention's errors on them beside ours."""
    for file in activations:
        from safetensors.torch import load_file

        tensors = load_file(file, device="cuda")
        for layer in sorted({name.split(".")[0] for name in tensors}, key=int):
            q, k, v = (tensors[f"{layer}.{name}"] for name in "qkv")
            name = f"{file.stem}, layer {layer}, {' × '.join(map(str, q.shape))}"
            problem = Problem.of([q, k, v], q.shape[1])
            yield compare(name, problem)
            yield compare_softmax(f"{name}, SDPA FlashAttention", problem)


def compare(name: str, problem: Problem, direction: Tensor | None = None) -> list[str]:
    """``direction``: the gradient of the outputs, random if None."""
    kv_heads, count = problem.qkv[1].shape[1], len(problem.qkv)
    direction = torch.randn_like(problem.qkv[0]) if direction is None else direction
    try:
        with poisoned():
            y = problem.kernels()
            got = torch.autograd.grad(y, problem.leaves(), direction.to(y.dtype), allow_unused=True)
    except triton.runtime.errors.OutOfResources as failure:
        return [name, f"does not fit: {failure.name} {failure.required} > {failure.limit}", *[""] * len(NAMES)]
    worst = [0.0] * (1 + len(NAMES))
    for g in {0, kv_heads - 1}:
        part = problem.group(g)
        expected = part.reference()
        heads = slice(g * expected.shape[1], (g + 1) * expected.shape[1])
        wanted = torch.autograd.grad(expected, part.leaves(), direction[:, heads].float(), allow_unused=True)
        values = [relative(y[:, heads], expected)]
        for i, (actual, right) in enumerate(zip(got, wanted, strict=True)):
            if right is None or actual is None:
                values.append(float("nan"))
                continue
            dim = 1 if i < count else 0
            size = right.shape[dim]
            values.append(relative(actual.narrow(dim, g * size, size), right))
        worst = [max(a, b) if b == b else b for a, b in zip(worst, values, strict=True)]
    return [name, *("–" if value != value else f"{value:.1e}" for value in worst)]


def compare_softmax(name: str, problem: Problem) -> list[str]:
    """How well FlashAttention does on the same tensors, against softmax attention in fp32."""
    direction = torch.randn_like(problem.qkv[0])
    results = []
    for attend, dtype in ((flash, None), (exact_softmax, torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in problem.qkv]
        y = attend(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))])
    return [name, *(error(a, b) for a, b in zip(*results, strict=True)), "", "", ""]


def exact_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])


def error(actual: Tensor, expected: Tensor) -> str:
    return f"{relative(actual, expected):.1e}"


def kernel_rows(length: int = 32768) -> Iterator[list[Any]]:
    """Nanoseconds a token in each kernel of forward and backward, as torch's profiler sees them."""
    for maps in (H, G):
        problem = Problem.random(1, length, maps)
        step = both(problem.kernels, problem.leaves(), torch.randn_like(problem.qkv[0]))
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        times: dict[str, float] = {}
        for event in profile.key_averages():
            name = event.key if event.key.endswith("_kernel") and "::" not in event.key else "all others (PyTorch)"
            times[name] = times.get(name, 0) + event.device_time_total * 1e3 / 3 / length
        for name, time in sorted(times.items(), key=lambda item: -item[1]):
            yield ["query" if maps == H else "kv", name, f"{time:.1f}"]


def sections(activations: list[Path]) -> dict[str, tuple[str, Callable[[], Iterator[list[Any]]]]]:
    return {
        "Forward": (
            "tokens | key maps per head of | fastest softmax | softmax ms | kernels ms | ratio | target | "
            "ns a token | % of the bound | target | softmax ms, eager | kernels ms, eager | ratio, eager",
            forward_rows,
        ),
        "Forward and backward": (
            "tokens | key maps per head of | fastest softmax | softmax ms | kernels ms, gradients of q, k, v | "
            "ratio | target | with those of maps and γ, ms | ratio | maps only (stage 1), ms | softmax ms, eager | "
            "kernels ms, eager | ratio, eager", backward_rows,
        ),
        "Feature maps of unrotated queries and keys": (
            "tokens | key maps per head of | forward, ms | unrotated | ratio | forward and all gradients, ms | "
            "unrotated | ratio | gradients of q, k, v | unrotated | ratio | maps only (stage 1) | unrotated | ratio",
            unrotated_rows,
        ),
        "Maps before RoPE, RoPE undone included": (attention_rotary.COLUMNS, attention_rotary.rows),
        "Maps before RoPE, only RoPE undone": (attention_rotary.ALONE_COLUMNS, attention_rotary.alone_rows),
        f"{VARIANTS}the state kernel of queries, with backward, key maps per kv head": (
            attention_variants.COLUMNS, attention_variants.rows,
        ),
        f"{VARIANTS}the state kernel of keys, forward, maps before RoPE": (
            attention_variants.SEEN_COLUMNS, attention_variants.seen_rows,
        ),
        f"Plain linear attention against {PEER}": (
            "tokens | fla ms | kernels ms | ratio | fla ms, with backward | kernels ms | ratio | difference",
            linear_rows,
        ),
        "Where the time goes, 1 × 32,768 tokens, forward and all gradients": (
            "key maps per head of | kernel | ns a token", kernel_rows,
        ),
        "Relative errors": (f"data | outputs | {' | '.join(NAMES)}", error_rows),
        "Relative errors, real activations": (
            f"model, layer | outputs | {' | '.join(NAMES)}", partial(activation_rows, activations),
        ),
    }  # fmt: skip


def run(directory: Path, activations: list[Path], only: str) -> dict[str, Any]:
    """Sections with ``only`` in their name; what is measured is written, should a later section fail."""
    before = common.read(directory, "attention") if only and (directory / "attention.json").exists() else {}
    every, kept = sections(activations), before.get("sections", {})
    device = common.hardware(torch.device("cuda"))
    results: dict[str, Any] = {
        "device": before.get("device", device), "torch": torch.__version__, "triton": triton.__version__,
        PEER: common.installed(PEER)[PEER] or before.get(PEER),
        "sections": {name: kept[name] for name in every if name in kept},
    }  # fmt: skip
    for name, (columns, rows) in every.items():
        if only not in name:
            continue
        section = {"date": str(date.today()), "columns": columns.split(" | "), "rows": []}
        if device != results["device"]:
            section["device"] = device
        results["sections"][name] = section
        for row in rows():
            section["rows"].append(row)
            print(name, row, file=sys.stderr, flush=True)
            common.write(results, report(results), directory, "attention")
    return results


def report(results: dict[str, Any]) -> str:
    moved, computed = bound(H, results["device"])
    moving, computing = rates(results["device"])
    lines = [
        "# Attention kernels",
        "",
        f"`python benchmarks/attention.py`, {results['device']}, torch {results['torch']}, triton "
        f"{results['triton']}, bf16 where nothing else is said, {H} query heads, {G} kv heads, D {D}, f {F_COLUMNS}, "
        "window 64 (terraced), 4 sinks, random data. Medians; ratios above 1: the kernels are faster.",
        "",
        f"Bound: {moved:.1f} ns a token to move q, k, v and o at {moving / 1e12:.1f} TB/s, {computed:.1f} ns for the "
        f"products at {computing / 1e12:.0f} TFLOP/s (key maps per query head); the larger counts. Timed as CUDA "
        "graphs; eager: launched one by one, L2 cleared in between. "
        f"Against {common.listed({PEER: results[PEER]})} (`chunk_linear_attn`, normalised): {H} kv heads, "
        f"{2 * F_COLUMNS} given features, eager.",
        "",
        "![Forward](attention.png)",
    ]
    for name, section in results["sections"].items():
        lines += [
            "",
            f"## {name}",
            ", ".join([section["date"], *filter(None, [section.get("device"), section.get("note")])]),
            "",
            "| " + " | ".join(section["columns"]) + " |",
            "|---" * len(section["columns"]) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in section["rows"]]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], directory: Path) -> None:
    pyplot = common.load_pyplot()
    if pyplot is None or "Forward" not in results["sections"]:
        return
    rows, device = (
        results["sections"]["Forward"]["rows"],
        results["sections"]["Forward"].get("device", results["device"]),
    )
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    single = [row for row in rows if "×" not in row[0] or row[0].startswith("1 ×")]
    query, kv = ([row for row in single if row[1] == name] for name in ("query", "kv"))
    for points, column, label in ((query, 3, "fastest softmax"), (query, 4, "kernels, key maps per query head"),
                                  (kv, 4, "kernels, key maps per kv head")):  # fmt: skip
        lengths = [int(row[0].split()[-1]) for row in points]
        axis.plot(
            lengths, [1e6 * float(row[column]) / n for row, n in zip(points, lengths, strict=True)], "o-", label=label
        )
    axis.axhline(max(bound(H, device)), color="gray", linestyle="--", label="bound")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ns a token, forward", title=device)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(directory / "attention.png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--activations", type=Path, nargs="+", default=[], help="q, k, v of real layers, written by activations.py"
    )
    parser.add_argument("--only", default="", help="measure sections with this in their name")
    parser.add_argument("--variants", action="store_true", help=f'the same as --only "{VARIANTS}"')
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="directory of the results")
    parser.add_argument("--plot", action="store_true", help="only write table and picture again from the JSON")
    arguments = parser.parse_args()
    if arguments.plot:
        results = common.read(arguments.out, "attention")
        common.write(results, report(results), arguments.out, "attention")
    elif torch.cuda.is_available():
        results = run(arguments.out, arguments.activations, VARIANTS if arguments.variants else arguments.only)
    else:
        sys.exit("This benchmark needs a CUDA (or ROCm) GPU; torch finds none.")
    draw(results, arguments.out)
    print((arguments.out / "attention.md").read_text())


if __name__ == "__main__":
    main()
