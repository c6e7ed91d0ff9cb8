"""Warps and stages of two state kernels, timed on the same shapes. Each row names the fastest, which is what
``layout.choose_launch`` should choose."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from attention_problem import G, H, Problem, Unrotated, both, fastest, replayed, softmax_peers

from lolcats.attention.kernels.layout import Tiling

SHAPES = ((8, 1024), (1, 8192), (1, 32768))
# If query heads share a key map, this kernel spills today, and only one of its programs fits on a processor.
LAUNCHES = {
    "now": (),
    "4 warps, 1 stage": (("query_state", 4, 1),),
    "8 warps, 1 stage": (("query_state", 8, 1),),
    "8 warps, 2 stages": (("query_state", 8, 2),),
}
# Of the states of keys if maps see other vectors: two stages need 128 KB of shared memory, so only one program fits.
SEEN_LAUNCHES = {
    "now": (),
    "4 warps, 2 stages": (("seen_state", 4, 2),),
    "8 warps, 1 stage": (("seen_state", 8, 1),),
    "8 warps, 2 stages": (("seen_state", 8, 2),),
}
SEEN_COLUMNS = " | ".join(("tokens", "key maps per head of", *SEEN_LAUNCHES, "best", "to now"))
COLUMNS = " | ".join(
    ("tokens", "maps see", "fastest softmax", "softmax ms", *LAUNCHES, "best", "ratio to softmax", "to now")
)


def rows() -> Iterator[list[str]]:
    """Forward and backward for q, k and v, key maps per kv head."""
    for batch, length in SHAPES:
        direction = torch.randn_like(Problem.random(batch, length).qkv[0])
        peers = softmax_peers(Problem.random(batch, length))
        peer, softmax = fastest({n: replayed(both(f, list(f.args), direction)) for n, f in peers.items()})
        del peers
        rotated = Problem.random(batch, length, G)
        for problem in (rotated, Unrotated.beside(rotated)):
            yield row(problem, f"{batch} × {length}", direction, peer, softmax)


def row(problem: Problem, name: str, direction: torch.Tensor, peer: str, softmax: float) -> list[str]:
    for leaf in problem.leaves():
        leaf.requires_grad_(any(leaf is x for x in problem.qkv))

    def time(launches: tuple[tuple[str, int, int], ...]) -> float:
        return replayed(both(replace(problem, tiling=Tiling(launches=launches)).kernels, problem.qkv, direction))

    times = {label: time(launches) for label, launches in LAUNCHES.items()}
    best, least = fastest(times)
    sees = "before RoPE" if isinstance(problem, Unrotated) else "after RoPE"
    return [
        name, sees, peer, f"{softmax:.3f}", *(f"{t:.3f}" for t in times.values()), best, f"{softmax / least:.2f}",
        f"{times['now'] / least:.2f}",
    ]  # fmt: skip


def seen_rows() -> Iterator[list[str]]:
    """Forward, maps before RoPE."""
    with torch.no_grad():
        for batch, length in SHAPES:
            for maps in (G, H):
                problem = Unrotated.beside(Problem.random(batch, length, maps))
                times = {
                    label: replayed(replace(problem, tiling=Tiling(launches=launches)).kernels)
                    for label, launches in SEEN_LAUNCHES.items()
                }
                best, least = fastest(times)
                cells = [*(f"{t:.3f}" for t in times.values()), best, f"{times['now'] / least:.2f}"]
                yield [f"{batch} × {length}", "query" if maps == H else "kv", *cells]
