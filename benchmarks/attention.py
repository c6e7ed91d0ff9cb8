"""The Triton kernels against the fp32 reference and against SDPA's FlashAttention, on one GPU.

    python benchmarks/attention.py          # writes benchmarks/results/attention.md

Geometry of one Llama-3-8B layer: 32 query heads, 8 kv heads, head dim 128, f = 64, window 64, 4 sinks; random data.
Medians of ``triton.testing.do_bench``; feature maps are part of what is timed. Ratios above 1: the kernels are faster.
"""

from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lolcats.attention import AttentionSpec, FeatureMap, parallel_attention
from lolcats.attention.kernels import triton_attention

H, G, D, F_COLUMNS = 32, 8, 128, 64
HYBRID = AttentionSpec("hybrid", "terraced", window_size=64, sinks=4)
NAMES = ("q", "k", "v", "γ", "φ_q", "φ_k")


class Problem:
    """Random q, k, v, feature maps and γ; laid out as a model's projections leave them."""

    def __init__(self, batch: int, length: int, maps: int = H, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        shapes = ((batch, length, heads, D) for heads in (H, G, G))
        self.qkv = [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]
        self.phi_q = FeatureMap("hedgehog", H, D, F_COLUMNS).cuda()
        self.phi_k = FeatureMap("hedgehog", maps, D, F_COLUMNS).cuda()
        self.gamma = torch.full((H,), 0.1, device="cuda", requires_grad=True)

    def kernels(self, spec: AttentionSpec = HYBRID) -> Tensor:
        return triton_attention(*self.qkv, self.phi_q, self.phi_k, self.gamma, spec, D**-0.5)[0]

    def reference(self, spec: AttentionSpec) -> Tensor:
        q, k, v = (x.float() for x in self.qkv)
        fk = self.phi_k(k.repeat_interleave(self.phi_k.weight.shape[0] // G, 1))
        return parallel_attention(q, k, v, self.phi_q(q), fk, self.gamma, spec, D**-0.5)

    def softmax(self) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*self.qkv, is_causal=True, enable_gqa=True)

    def leaves(self) -> list[Tensor]:
        return [*self.qkv, self.gamma, *self.phi_q.parameters(), *self.phi_k.parameters()]


def milliseconds(function: Callable[[], object]) -> float:
    return triton.testing.do_bench(function, warmup=50, rep=300, return_mode="median")


def error_rows(length: int = 1000) -> list[str]:
    """‖actual − reference‖ / ‖reference‖ of outputs and every gradient, memory poisoned with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for kind, window in (("hybrid", "terraced"), ("hybrid", "sliding"), ("linear", "terraced")):
            spec, problem = AttentionSpec(kind, window, 64, 4), Problem(1, length, dtype=dtype)
            expected = problem.reference(spec)
            direction = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, problem.leaves(), direction, allow_unused=True)
            try:
                actual = problem.kernels(spec)
                got = torch.autograd.grad(actual, problem.leaves(), direction.to(actual.dtype), allow_unused=True)
                cells = [error(actual, expected), *(error(a, b) for a, b in zip(got, wanted, strict=True))]
            except triton.runtime.errors.OutOfResources as failure:
                cells = [f"does not fit: {failure.name} {failure.required} > {failure.limit}"] + [""] * len(NAMES)
            rows.append(f"| {str(dtype).removeprefix('torch.')} | {kind} {window} | " + " | ".join(cells) + " |")
    torch.use_deterministic_algorithms(False)
    return rows


def error(actual: Tensor | None, expected: Tensor | None) -> str:
    if expected is None:
        return "–"
    assert actual is not None
    return f"{((actual.float() - expected.float()).norm() / expected.float().norm()).item():.1e}"


def forward_rows() -> list[str]:
    rows = []
    for length in (2048, 8192, 32768, 131072):
        with torch.no_grad():
            softmax = milliseconds(Problem(1, length).softmax)
            for name, maps in (("query", H), ("kv", G)):
                ours = milliseconds(Problem(1, length, maps).kernels)
                times = f"{softmax:.3f} | {ours:.3f} | {softmax / ours:.2f} | {ours * 1e6 / length:.1f}"
                rows.append(f"| 1 × {length} | {name} | {times} |")
    return rows


def both(problem: Problem, function: Callable[[], Tensor], direction: Tensor) -> None:
    """Forward and backward."""
    for leaf in problem.leaves():
        leaf.grad = None
    function().backward(direction)


def backward_rows() -> list[str]:
    """Times of both; `maps only`: no gradients of q, k and v, as in stage 1."""
    rows = []
    for batch, length in ((8, 1024), (1, 8192)):
        problem = Problem(batch, length)
        direction = torch.randn_like(problem.qkv[0])
        softmax, ours = (
            milliseconds(partial(both, problem, function, direction)) for function in (problem.softmax, problem.kernels)
        )
        for x in problem.qkv:
            x.requires_grad_(False)
        maps_only = milliseconds(partial(both, problem, problem.kernels, direction))
        rows.append(f"| {batch} × {length} | {softmax:.2f} | {ours:.2f} | {softmax / ours:.2f} | {maps_only:.2f} |")
    return rows


def part_rows(length: int = 65536) -> list[str]:
    """Which part of the hybrid costs what: kinds are the same kernels with a part compiled away."""
    rows = []
    for kind in ("hybrid", "window", "remote", "linear"):
        function = partial(Problem(1, length).kernels, AttentionSpec(kind, "terraced", 64, 4))
        with torch.no_grad():
            rows.append(f"| {kind} | {milliseconds(function) * 1e6 / length:.1f} |")
    return rows


SECTIONS = {
    "Relative error against the fp32 reference, 1 × 1,000 tokens\n"
    f"| dtype | kind | outputs | {' | '.join(NAMES)} |": error_rows,
    "Forward\n"
    "| tokens | key maps per head of | SDPA FlashAttention, ms | kernels, ms | ratio | ns a token |": forward_rows,
    "Forward and backward\n"
    "| tokens | SDPA FlashAttention, ms | kernels, ms | ratio | kernels, maps only, ms |": backward_rows,
    "Forward of each kind, 1 × 65,536 tokens\n| kind | ns a token |": part_rows,
}  # fmt: skip


def main() -> None:
    report = (
        f"# Attention kernels\n`python benchmarks/attention.py`, {date.today()}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, triton {triton.__version__}, bf16, {H} query heads, {G} kv heads, D {D}, "
        f"f {F_COLUMNS}, window 64, 4 sinks, random data.\n"
    )
    path = Path(__file__).parent / "results" / "attention.md"
    for heading, rows in SECTIONS.items():
        columns = heading.splitlines()[1].count("|") - 1
        report += "\n".join([f"\n## {heading}", f"|{'---|' * columns}", *rows()]) + "\n"
        path.write_text(report)  # what is measured stays, should a later section fail
    print(report)


if __name__ == "__main__":
    main()
