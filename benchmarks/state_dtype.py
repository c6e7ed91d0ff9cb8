"""What a state in bf16 costs over a long generation: its error against one in fp32, by number of tokens.

    python benchmarks/state_dtype.py                  # prints a table; a GPU takes seconds a row, a CPU minutes

One layer, one sequence, random keys, queries and values around means of their own (so that S grows as in a real layer),
decoded one token at a time by ``step``. The error is ‖y − y₃₂‖ / ‖y₃₂‖ over 64 tokens, of the linear readout alone and
of the whole output, with stochastic rounding and, for comparison, rounded to the nearest.
"""

import argparse
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lolcats.attention.state as states
from lolcats.attention import AttentionSpec, FeatureMap, Mixer, SlotState, step, use_backend

MARKS = (1_000, 10_000, 30_000, 100_000)
AVERAGED = 64


class Layer:
    """Feature maps and the statistics of a layer's inputs."""

    def __init__(self, args: argparse.Namespace, maps: int, window: Any, device: str) -> None:
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.dim, self.maps = args.heads, args.kv_heads, args.dim, maps
        self.spec = AttentionSpec("hybrid", window, 64, 4)
        self.phi_q, self.phi_k = (
            FeatureMap("hedgehog", n, args.dim, args.features).to(device) for n in (args.heads, maps)
        )
        self.gamma = torch.full((args.heads,), 0.1, device=device)
        self.means = [torch.randn(1, n, 1, args.dim, device=device) for n in (args.heads, args.kv_heads, args.kv_heads)]

    def tokens(self) -> Iterator[list[Tensor]]:
        """q, k, v of one token after the other, always the same ones."""
        generator = torch.Generator(self.gamma.device).manual_seed(1)
        while True:
            noise = [torch.randn(AVERAGED, *m.shape[1:], generator=generator, device=m.device) for m in self.means]
            for i in range(AVERAGED):
                yield [m + x[i : i + 1] for m, x in zip(self.means, noise, strict=True)]

    def run(self, dtype: torch.dtype, marks: list[int], backend: str) -> dict[int, tuple[Tensor, Tensor]]:
        """At each mark, the linear readouts and the outputs of the last tokens before it."""
        _, k, v = (m.new_empty(1, m.shape[1], 0, self.dim) for m in self.means)
        state = SlotState.empty(k, v, self.maps, self.phi_k.num_features, self.spec, dtype)
        mixer, found = Mixer(self.phi_q, self.phi_k, self.gamma, self.spec, self.dim**-0.5), {}
        recent: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), use_backend(backend):
            for n, (q, k, v) in zip(range(1, max(marks) + 1), self.tokens(), strict=False):
                y, _ = step(state, q, k, v, mixer)
                if min((m - n for m in marks if m >= n), default=AVERAGED) < AVERAGED:
                    fq = self.phi_q(q)[:, :, 0].unflatten(1, (self.maps, -1))
                    linear = (fq @ state.sums.S.float()) / (fq @ state.sums.z[..., None])
                    recent = [*recent[1 - AVERAGED :], (linear, y)]
                if n in marks:
                    found[n] = torch.stack([x for x, _ in recent]), torch.stack([x for _, x in recent])
        return found


def nearest(x: Tensor, _: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def errors(exact: dict[int, tuple[Tensor, Tensor]], found: dict[int, tuple[Tensor, Tensor]]) -> list[str]:
    return [
        " / ".join(f"{float((a - b).norm() / b.norm()):.1e}" for a, b in zip(found[n], exact[n], strict=True))
        for n in exact
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("heads", 4), ("kv_heads", 2), ("dim", 64), ("features", 32), ("tokens", 100_000)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--windows", nargs="+", default=["terraced", "sliding"])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marks = [m for m in MARKS if m < args.tokens] + [args.tokens]
    print("linear readout / whole output\n")
    print("| window | key maps | rounding | " + " | ".join(f"{m:,}" for m in marks) + " |")
    print("|---|---|---|" + "---:|" * len(marks))
    for window in args.windows:
        for maps in (args.heads, args.kv_heads):
            layer = Layer(args, maps, window, device)
            exact = layer.run(torch.float32, marks, "chunked" if device == "cpu" else "auto")
            with mock.patch.object(states, "stochastic", nearest):
                plain = layer.run(torch.bfloat16, marks, "chunked")  # the kernel rounds stochastically
            stochastic = layer.run(torch.bfloat16, marks, "chunked" if device == "cpu" else "auto")
            about = f"| {window} | {'per query head' if maps == args.heads else 'per kv head'} | "
            for name, found in (("stochastic", stochastic), ("nearest", plain)):
                print(about + f"{name} | " + " | ".join(errors(exact, found)) + " |", flush=True)


if __name__ == "__main__":
    main()
