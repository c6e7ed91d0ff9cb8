"""What calls of one kind share: sizes, block sizes, strides, and the kernels compiled for them.

To find the compiled kernel, Triton inspects every argument of a launch, including compile-time constants. With as many
arguments as here that takes 50 to 100 µs, longer than many of these kernels run. A launcher does it once. Launchers are
keyed by everything that Triton specialises a kernel on: dtypes, shapes, strides and alignment of the inputs; those of
tensors allocated here follow from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lolcats.attention.kernels.layout import (
    BlockSizes,
    Launch,
    Layout,
    Phi,
    Rows,
    Tiling,
    choose_blocks,
    choose_launch,
    choose_tiling,
    fits_twice,
    make_layout,
    window_tiles,
)
from lolcats.attention.spec import AttentionSpec

MOST = 1024  # maximum number of launchers kept
NOT_OF_STATES = ("SOFTMAX", "LINEAR", "NEAR", "CAPPED", "TILES")  # constants that the state kernel does not take
NOT_OF_GRADIENTS = ("BLOCK_P",)
NOT_OF_SINKS = ("SOFTMAX", "LINEAR", "NEAR", "TILES", "WINDOW", "SIZE", "WIDTH", "PHI", "SPAN", "BLOCK_P", "BLOCK_F")
ONLY_PROJECTION = ("DIM", "WIDTH", "LOW", "PRECISION", "C", "BLOCK_F", "num_warps")
ONLY_WEIGHTS = (*ONLY_PROJECTION, "BLOCK_D", "BLOCK_P")
LEFT_OUT = {
    **dict.fromkeys(("state", "seen_state", "query_state"), NOT_OF_STATES),
    **dict.fromkeys(("query", "key"), NOT_OF_GRADIENTS), "sink": NOT_OF_SINKS,
}  # fmt: skip
SAME_LAUNCH = {"sink": "query", "projection": "weight"}

_launchers: dict[Any, Launcher] = {}


class Launcher:
    """For one kind of call. ``heads``: query heads; ``maps``: key maps; ``width``: f, half of the features."""

    def __init__(
        self, spec: AttentionSpec, phi: Phi, capped: bool, tiling: Tiling | None,
        tensors: Mapping[str, Tensor | None],
    ) -> None:  # fmt: skip
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        assert q is not None and k is not None and v is not None  # noqa: PT018
        fq, fk, wq, wk = (tensors[name] for name in ("fq", "fk", "wq", "wk"))
        self.spec, self.phi, self.capped, self.device, self.dtype = spec, phi, capped, q.device, q.dtype
        self.batch, self.heads, self.tokens, self.dim = q.shape
        self.kv_heads, self.value_dim = k.shape[1], v.shape[3]
        self.maps = self.heads if wk is None and fk is None else fk.shape[1] if wk is None else wk.shape[0]  # type: ignore[union-attr]
        columns = 16 if fq is None else fq.shape[3] // 2 if phi == "given" else fq.shape[3]
        self.width = columns if wq is None else wq.shape[2]
        self.wide = q.dtype == torch.float32  # products are computed in fp32
        self.tiling = tiling or choose_tiling(q.dtype.itemsize)
        self.strides = {name: _strides(x) for name, x in tensors.items() if x is not None and x.ndim == 4}
        self.strides["none"] = 0, 0, tl.constexpr(0), 0
        self._constants: dict[str, dict[str, Any]] = {}
        self._launches: dict[str, Launch] = {}
        self._compiled: dict[Any, Any] = {}

    @cached_property
    def blocks(self) -> BlockSizes:
        return choose_blocks(self.dim, self.width, self.dtype.itemsize)

    def layout(self, rows: Rows) -> Layout:
        grid = self.batch, self.tokens
        return make_layout(rows, grid, self.tiling, self.heads, self.kv_heads, self.maps, self.device)

    @cached_property
    def near(self) -> bool:
        """Whether some keys older than a window may not yet be in the state of a step."""
        # A step's state holds all of them if the windows of its tiles begin where steps do.
        spec = self.spec
        whole = spec.kind != "linear" and spec.window == "terraced" and spec.window_size % self.tiling.span == 0
        return spec.has_linear and not whole

    @cached_property
    def seen(self) -> str:
        """For which of q and k the forward pass multiplies inside what maps see: ``qk``, ``q`` or neither."""
        if self.phi != "projected" or not self.tiling.see or not fits_twice(self.dim, self.width, self.dtype.itemsize):
            return ""
        return "q" if self.near else "qk"

    def launch(self, kernel: str) -> Launch:
        if kernel not in self._launches:
            self._launches[kernel] = self._choose_launch(kernel)
        return self._launches[kernel]

    def _choose_launch(self, kernel: str) -> Launch:
        tiling, itemsize = self.tiling, self.dtype.itemsize
        inside = self.phi == "inside" and self.spec.has_linear
        chosen = choose_launch(kernel, self.value_dim, self.blocks, tiling.tile, itemsize, inside)
        for name, warps, stages in tiling.launches:
            if name == kernel:
                chosen = dataclasses.replace(chosen, num_warps=warps, num_stages=stages)
        return chosen

    def strided(self, name: str, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """A tensor and its strides as the kernels take them. ``name``: strides of this name follow from the sizes."""
        strides = self.strides.get(name)
        if strides is None:
            strides = self.strides[name] = _strides(x)
        return x, strides

    def run(self, kernel: Any, kind: str, grid: tuple[int, int, int], args: tuple[Any, ...], variant: Any = (),
            **constants: Any) -> None:  # fmt: skip
        """Launch a kernel.

        Args:
            kind: ``state``, ``seen_state``, ``query_state``, ``output``, ``query``, ``sink``, ``key``, ``weight`` or
                ``projection``; selects the constants.
            constants: besides these, or instead of them.
            variant: what the compiled kernel depends on besides the launcher and ``constants``.
        """
        key = kind, variant, tuple(constants.values())
        launch(self._compiled, key, kernel, grid, args, lambda: self.constants(kind) | constants)

    def constants(self, kind: str) -> dict[str, Any]:
        if kind not in self._constants:
            every = self._every_constant(self.launch(SAME_LAUNCH.get(kind, kind)))
            if kind in LEFT_OUT:
                every = {name: value for name, value in every.items() if name not in LEFT_OUT[kind]}
            elif kind in ("weight", "projection"):
                only = ONLY_WEIGHTS if kind == "weight" else ONLY_PROJECTION
                every = {name: every[name] for name in only} | {"num_stages": 2}
            self._constants[kind] = every
        return self._constants[kind]

    def _every_constant(self, launch: Launch) -> dict[str, Any]:
        spec, blocks, tiling = self.spec, self.blocks, self.tiling
        return {
            "DIM": self.dim, "VALUE_DIM": self.value_dim, "WIDTH": self.width,
            "SOFTMAX": spec.has_softmax, "LINEAR": spec.has_linear, "NEAR": self.near,
            "WINDOW": "none" if spec.kind == "linear" else spec.window, "SIZE": spec.window_size,
            "SINKS": spec.softmax_sinks, "CAPPED": self.capped, "PHI": self.phi,
            "LOW": tl.float32 if self.wide else tl.bfloat16, "PRECISION": precision(),
            "TILES": window_tiles(spec, tiling.tile), "C": tiling.tile, "SPAN": tiling.span, "BLOCK_D": blocks.dim,
            "BLOCK_P": blocks.half, "BLOCK_V": launch.value, "BLOCK_F": blocks.feature, "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }  # fmt: skip


def find_launcher(
    spec: AttentionSpec, phi: Phi, capped: bool, tiling: Tiling | None, context: bool,
    tensors: Mapping[str, Tensor | None],
) -> Launcher:  # fmt: skip
    """The launcher of calls like this one."""
    key = spec, phi, capped, tiling, context, *map(kind_of, tensors.values())
    launcher = _launchers.get(key)
    if launcher is None:
        if len(_launchers) >= MOST:
            _launchers.clear()
        launcher = _launchers[key] = Launcher(spec, phi, capped, tiling, tensors)
    return launcher


def precision() -> str:
    """Precision of products of fp32 tiles: on NVIDIA's tensor cores, three tf32 products that add up to fp32."""
    return "tf32x3" if torch.cuda.is_available() and torch.version.hip is None else "ieee"


def launch(
    known: dict[Any, Any], key: Any, kernel: Any, grid: tuple[int, ...], args: Sequence[Any],
    constants: Callable[[], dict[str, Any]],
) -> None:  # fmt: skip
    """Launch a kernel. ``known`` remembers what was compiled, by a ``key`` of all that it depends on: Triton's own
    search costs the host more.

    constants: the kernel's compile-time constants.
    """
    if key in known:
        compiled, unused = known[key]
        compiled[grid](*args, *unused)
        return
    compiled = kernel[grid](*args, **constants())
    if hasattr(compiled, "packed_metadata"):  # missing in the interpreter
        known[key] = compiled, (None,) * sum(parameter.is_constexpr for parameter in kernel.params)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def kind_of(x: Tensor | None) -> Any:
    return x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def ready(x: Tensor | None) -> Any:
    """``x`` with contiguous columns, as the kernels need it."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[Any, ...]:
    """Strides of batch, head, token and, for a 5-D tensor, piece; that of tokens is compiled in to save registers."""
    *piece, batch, head, token, _ = x.stride()
    return batch, head, tl.constexpr(token), *piece
