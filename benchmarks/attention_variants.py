"""Ways to run the forward kernel, timed on the same shapes: the stored states of every 64 tokens, and walks that carry
them. Each row ends in the fastest, which is what ``layout.BEST_WALKS`` should hold."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
from attention_problem import G, H, Problem, Unrotated, both, fastest, relative, replayed, softmax_peers

from lolcats.attention.kernels.layout import Tiling, Walk, dense_rows, fitting_walk, make_stretches

SHAPES = ((8, 1024), (1, 8192), (1, 32768), (1, 131072))
WALKS = {
    "2 heads": Walk(heads=2),
    "2 heads, half the values": Walk(heads=2, value=64),
    "1 head, half the values, 4 warps": Walk(value=64, num_warps=4, resident=2),
    "1 head, 8 warps": Walk(),
    "128 tokens": Walk(tile=128),
    "128 tokens, half the values": Walk(tile=128, value=64),
}
STRETCHES = (0.5, 2.0)  # times the length of stretch that was chosen, tried for the fastest walk
BACKWARD_SHAPES = ((8, 1024), (1, 8192), (1, 32768))
# Of the states of queries, if their heads share a key map: today they spill, and only one fits on a processor.
LAUNCHES = {
    "stored": (),
    "4 warps, 1 stage": (("query_state", 4, 1),),
    "8 warps, 1 stage": (("query_state", 8, 1),),
    "8 warps, 2 stages": (("query_state", 8, 2),),
}
WRONG = 5e-3  # relative difference from the stored states that rounding does not explain
COLUMNS = " | ".join(
    ("tokens", "key maps per head of", "maps see", "fastest softmax", "softmax ms", "stored ms", *WALKS,
     "fastest walk, half the stretch", "twice the stretch", "best", "best ms", "ratio to softmax", "to stored")
)  # fmt: skip
BACKWARD_COLUMNS = " | ".join(
    ("tokens", "maps see", "fastest softmax", "softmax ms", *LAUNCHES, "the best, walking forward with 2 heads", "best",
     "ratio to softmax", "to stored")
)  # fmt: skip


def rows() -> Iterator[list[str]]:
    with torch.no_grad():
        for batch, length in SHAPES:
            peers = softmax_peers(Problem.random(batch, length))
            peer, softmax = fastest({name: replayed(attend) for name, attend in peers.items()})
            del peers
            for maps in (G, H):
                rotated = Problem.random(batch, length, maps)
                for problem in (rotated, Unrotated.beside(rotated)):
                    yield row(problem, f"{batch} × {length}", maps, peer, softmax)


def backward_rows() -> Iterator[list[str]]:
    """Forward and backward for q, k and v, key maps per kv head."""
    for batch, length in BACKWARD_SHAPES:
        direction = torch.randn_like(Problem.random(batch, length).qkv[0])
        peers = softmax_peers(Problem.random(batch, length))
        peer, softmax = fastest({n: replayed(both(f, list(f.args), direction)) for n, f in peers.items()})
        del peers
        rotated = Problem.random(batch, length, G)
        for problem in (rotated, Unrotated.beside(rotated)):
            yield backward_row(problem, f"{batch} × {length}", direction, peer, softmax)


def backward_row(problem: Problem, name: str, direction: torch.Tensor, peer: str, softmax: float) -> list[str]:
    for leaf in problem.leaves():
        leaf.requires_grad_(any(leaf is x for x in problem.qkv))

    def time(tiling: Tiling) -> float:
        return replayed(both(replace(problem, tiling=tiling).kernels, problem.qkv, direction))

    times = {label: time(Tiling(launches=launches)) for label, launches in LAUNCHES.items()}
    label = fastest(times)[0]
    walking = time(Tiling(launches=LAUNCHES[label], carry=WALKS["2 heads"]))
    best, least = fastest({**times, f"{label}, walking forward": walking})
    sees = "before RoPE" if isinstance(problem, Unrotated) else "after RoPE"
    return [
        name, sees, peer, f"{softmax:.3f}", *map(written, times.values()), written(walking), best,
        f"{softmax / least:.2f}", f"{times['stored'] / least:.2f}",
    ]  # fmt: skip


def row(problem: Problem, name: str, maps: int, peer: str, softmax: float) -> list[str]:
    problem = replace(problem, tiling=Tiling())
    stored, expected = replayed(problem.kernels), problem.kernels()
    times = {variant: measured(problem, walk, expected) for variant, walk in WALKS.items()}
    right = {variant: time for variant, time in times.items() if isinstance(time, float)}
    others: list[float | str] = []
    if right:
        best_walk = fastest(right)[0]
        size = chosen_stretch(problem, WALKS[best_walk])
        others = [
            measured(problem, replace(WALKS[best_walk], stretch=max(1, int(size * c))), expected) for c in STRETCHES
        ]
        labels = (f"{best_walk}, stretch {max(1, int(size * c))}" for c in STRETCHES)
        right |= {label: time for label, time in zip(labels, others, strict=True) if isinstance(time, float)}
    best, time = fastest({"stored": stored, **right})
    cells = [written(x) for x in (*times.values(), *(others or ["–", "–"]))]
    sees = "before RoPE" if isinstance(problem, Unrotated) else "after RoPE"
    return [
        name, "query" if maps == H else "kv", sees, peer, f"{softmax:.3f}", f"{stored:.3f}", *cells, best,
        f"{time:.3f}", f"{softmax / time:.2f}", f"{stored / time:.2f}",
    ]  # fmt: skip


def measured(problem: Problem, walk: Walk, expected: torch.Tensor) -> float | str:
    """Milliseconds, or why there are none; "–" if the walk would be another one, or states be stored."""
    walking = replace(problem, tiling=(tiling := Tiling(carry=walk)))
    if fitting_walk(problem.spec, tiling, problem.phi_q.heads, problem.phi_k.heads) != walk:
        return "–"
    try:
        difference = relative(walking.kernels(), expected)
        if not difference < WRONG:
            return f"wrong: {difference:.1e}"
        return replayed(walking.kernels)
    except triton.runtime.errors.OutOfResources as failure:
        return f"does not fit: {failure.required}"
    except RuntimeError as failure:  # the others are measured all the same
        print(walk, failure, file=sys.stderr, flush=True)
        return type(failure).__name__


def chosen_stretch(problem: Problem, walk: Walk) -> int:
    """Tiles per program that ``make_stretches`` chooses for this problem."""
    q = problem.qkv[0]
    maps = problem.phi_k.heads
    stretches = make_stretches(dense_rows(q.shape[0], q.shape[2]), walk, 64, 64, q.shape[1], maps, q.device)
    return int(stretches.tiles[0, 2] - stretches.tiles[0, 1])


def written(time: float | str) -> str:
    return time if isinstance(time, str) else f"{time:.3f}"
