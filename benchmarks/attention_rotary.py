"""Maps before RoPE as stages pay for them: RoPE is undone first or on chip, and gradients flow back through that."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from attention_problem import DEVICE, D, G, H, Problem, both, replayed
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lolcats.attention.kernels import triton_attention
from lolcats.attention.kernels.layout import Tiling
from lolcats.attention.kernels.unrotate import RotaryForm, append_unrotated
from lolcats.attention.turning import Turning
from lolcats.modeling.rotary import append_by_family

SHAPES = ((8, 1024), (1, 8192), (1, 32768))
Append = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
WAYS: dict[str, Append] = {
    "kernel": partial(append_unrotated, form=RotaryForm(interleaved=False, first_half=False)),
    "family's function": partial(append_by_family, rotate=apply_rotary_pos_emb),
}
COLUMNS = (
    "tokens | key maps per head of | part | after RoPE, ms | on chip | ratio | on chip, x·W first | ratio | kernel | "
    "ratio | kernel, x·W first | ratio | family's function | ratio"
)
ALONE_COLUMNS = "tokens | kernel, forward, ms | with backward | family's function, forward | with backward"


@dataclass
class Undone(Problem):
    """q and k after RoPE; maps see them with RoPE undone by ``append``."""

    append: Append = WAYS["kernel"]
    see: bool = True
    tables: tuple[Tensor, ...] = ()

    @classmethod
    def of_problem(cls, problem: Problem, append: Append = WAYS["kernel"], see: bool = True) -> "Undone":
        return cls(**vars(problem), append=append, see=see, tables=tables(problem.qkv[0].shape[2]))

    def kernels(self) -> Tensor:
        q, k, v = self.qkv
        q, k = self.append(q, k, *self.tables)
        mixer = self.mixer(replace(self.spec, unrotated=True))
        (q, x_q), (k, x_k) = q.chunk(2, -1), k.chunk(2, -1)
        return triton_attention(q, k, v, mixer, seen=(x_q, x_k), tiling=Tiling(see=self.see))[0]


class OnChip(Undone):
    """The kernels turn q and k back. Their table, which a decoder makes once for all layers, is not timed."""

    @cached_property
    def turning(self) -> Turning:
        return Turning.of(*self.tables, self.qkv[0].dtype)

    def kernels(self) -> Tensor:
        mixer = self.mixer(replace(self.spec, unrotated=True))
        tiling = Tiling(see=self.see)
        return triton_attention(*self.qkv, mixer, turning=self.turning, tiling=tiling)[0]


def tables(length: int) -> tuple[Tensor, ...]:
    """cos and sin (1, T, D) in bf16, as models hand them on."""
    angles = torch.arange(length, device=DEVICE)[:, None] / 1e4 ** (torch.arange(0, D, 2, device=DEVICE) / D)
    return tuple(torch.cat([x, x], -1)[None].bfloat16() for x in (angles.cos(), angles.sin()))


def rows() -> Iterator[list[str]]:
    for batch, length in SHAPES:
        direction = torch.randn_like(Problem.random(batch, length).qkv[0])
        for maps in (G, H):
            rotated = Problem.random(batch, length, maps)
            problems = [
                rotated, OnChip.of_problem(rotated), OnChip.of_problem(rotated, see=False), Undone.of_problem(rotated),
                Undone.of_problem(rotated, see=False), Undone.of_problem(rotated, WAYS["family's function"]),
            ]  # fmt: skip
            for part in ("forward", "stage 2: gradients of q, k, v", "stage 1: gradients of maps"):
                first, *times = [measured(problem, part, direction) for problem in problems]
                ratios = (cell for time in times for cell in (f"{time:.3f}", f"{time / first:.2f}"))
                yield [f"{batch} × {length}", "query" if maps == H else "kv", part, f"{first:.3f}", *ratios]


def measured(problem: Problem, part: str, direction: Tensor) -> float:
    weights = [*problem.phi_q.parameters(), *problem.phi_k.parameters()]
    wanted: list[Tensor] = {"forward": [], "stage 2: gradients of q, k, v": problem.qkv}.get(part, weights)
    for leaf in problem.leaves():
        leaf.requires_grad_(any(leaf is x for x in wanted))
    return replayed(both(problem.kernels, wanted, direction) if wanted else problem.kernels)


def alone_rows() -> Iterator[list[str]]:
    """Only RoPE undone."""
    for batch, length in SHAPES:
        q, k, _ = Problem.random(batch, length).qkv
        cells = []
        for append in WAYS.values():
            undo = partial(append, q, k, *tables(length))
            with torch.no_grad():
                directions = [torch.ones_like(x) for x in undo()]
                cells.append(replayed(undo))
            cells.append(replayed(both(undo, [q, k], directions)))
        yield [f"{batch} × {length}", *(f"{time:.3f}" for time in cells)]
