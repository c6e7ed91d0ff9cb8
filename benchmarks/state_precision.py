"""How exact S and z stay over a long sequence, by the format they are kept in.

    python benchmarks/state_precision.py

Keys are folded into S and z one terraced window at a time, as decoding does, by fp32 products added into a state of
another format; the reference adds in fp64. Keys, values and queries are normal random numbers with a mean of their own
per channel; features are Hedgehog's with the weights that conversion starts from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from lolcats.attention import FeatureMap

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS, HEAD_DIM, FEATURE_DIM, WINDOW = 8, 64, 64, 64


def measure(lengths: list[int], seed: int = 0) -> Iterator[tuple[int, str, float, float, float]]:
    """(tokens, format, relative errors of S, of z, and of the linear term's output for 64 queries)."""
    torch.manual_seed(seed)
    phi = FeatureMap("hedgehog", HEADS, HEAD_DIM, FEATURE_DIM).requires_grad_(False)
    means = torch.randn(2, 1, HEADS, 1, HEAD_DIM)
    fq = phi(means[0] + torch.randn(1, HEADS, 64, HEAD_DIM)).double()
    shapes = (1, HEADS, phi.num_features, HEAD_DIM), (1, HEADS, phi.num_features)
    exact = [torch.zeros(shape, dtype=torch.double) for shape in shapes]
    states = {name: [torch.zeros(shape, dtype=dtype) for shape in shapes] for name, dtype in FORMATS.items()}
    for tokens in range(WINDOW, max(lengths) + WINDOW, WINDOW):
        k, v = means + torch.randn(2, 1, HEADS, WINDOW, HEAD_DIM)
        fk = phi(k)
        for total, new in zip(exact, (fk.double().mT @ v.double(), fk.double().sum(2)), strict=True):
            total += new
        for state in states.values():
            for i, new in enumerate((fk.mT @ v, fk.sum(2))):
                state[i] = (state[i].float() + new).to(state[i].dtype)
        if any(tokens - WINDOW < length <= tokens for length in lengths):
            for name, (S, z) in states.items():
                y = output(fq, S.double(), z.double())
                yield tokens, name, error(S, exact[0]), error(z, exact[1]), error(y, output(fq, *exact))


def output(fq: Tensor, S: Tensor, z: Tensor) -> Tensor:
    return (fq @ S) / (fq @ z[..., None])


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    print("| tokens | state | error of S | of z | of the output |\n|---:|---|---:|---:|---:|")
    for tokens, name, *errors in measure(parser.parse_args().lengths):
        print(f"| {tokens:,} | {name} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")


if __name__ == "__main__":
    main()
