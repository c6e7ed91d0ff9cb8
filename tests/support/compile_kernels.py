"""Compile the kernels for an NVIDIA Hopper GPU without one, and print the shared memory of each in bytes.

The interpreter forgives what the compiler does not: names that change their type in a loop, shapes that are not powers
of two. test_kernels.py runs this in a separate process, since the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lolcats.attention import AttentionSpec, FeatureMap, Mixer, SlotState
from lolcats.attention.kernels import columns, decode, function, launcher, paged, projection, unrotate
from lolcats.attention.kernels.layout import choose_tiling
from lolcats.attention.state import KeyValues
from lolcats.attention.subset import HeadSubset
from lolcats.attention.turning import Turning


class NoDevice:
    """The driver functions that triton calls before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


class Compiled:
    """Stands in for a kernel: compiles it for the arguments of each launch."""

    def __init__(self, kernel: Any, name: str, shared: dict[str, int]) -> None:
        self.kernel, self.name, self.shared = kernel, name, shared

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            size = self.kernel.warmup(*args, grid=grid, **kwargs).metadata.shared
            self.shared[self.name] = max(size, self.shared.get(self.name, 0))

        return launch


def main(kind: Any, window: Any, size: int, dim: int, f: int, dtype: str, phi: str) -> None:
    driver.set_active(NoDevice())
    launcher.precision = lambda: "tf32x3"
    shared: dict[str, int] = {}
    for module in (function, projection, unrotate):
        for name in dir(module):
            if name.endswith("_kernel"):
                setattr(module, name, Compiled(getattr(module, name), name, shared))
    q, k, v = (torch.empty(1, heads, 512, dim, dtype=getattr(torch, dtype), requires_grad=True) for heads in (4, 2, 2))
    phi_q, phi_k = (FeatureMap("hedgehog", 4, dim, f) for _ in range(2))
    gamma, spec = torch.rand(4, requires_grad=True), AttentionSpec(kind, window, size, 4)
    seen, tiling, turning = (q, k) if phi == "projected" else None, None, None
    if phi == "turned":
        turning = Turning.of(*(torch.empty(1, 512, dim) for _ in range(2)), q.dtype)
        tiling = choose_tiling(q.dtype.itemsize)
    mixer = Mixer(phi_q, phi_k, gamma, spec, 0.1)
    y, _, _ = function.triton_attention(q, k, v, mixer, seen=seen, tiling=tiling, turning=turning)
    y.backward(torch.empty_like(y))
    decode_kernels(q, k, v, phi_q, gamma, spec, shared)
    paged_kernels(q, k, v, shared)
    rotary_kernels(q, k)
    print(json.dumps(shared))


def decode_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, phi_q: FeatureMap, gamma: torch.Tensor, spec: AttentionSpec,
    shared: dict[str, int],
) -> None:  # fmt: skip
    """Decode kernels for key maps per query and per key/value head, with the state in fp32 and bf16, with one program
    and several for a head, of whole layers and of some heads, with a row for each state and with slots."""
    decode.precision = launcher.precision
    kernel = decode.decode_kernel
    token = [x.detach()[:, :, :1] for x in (q, k, v)]
    for maps in (4, 2):
        phi_k = FeatureMap("hedgehog", maps, q.shape[3], phi_q.weight.shape[2])
        for dtype in (torch.float32, torch.bfloat16):
            decode.decode_kernel = Compiled(kernel, f"decode_kernel_{maps}_{dtype}", shared)
            state = SlotState.empty(k.detach(), v.detach(), maps, phi_k.num_features, spec, dtype)
            mixer = Mixer(phi_q, phi_k, gamma.detach(), spec, 0.1)
            decode.decode(state, *token, mixer)
            decode.decode(state, *token, mixer, slots=torch.zeros(1, dtype=torch.int32))
            whole = [x.repeat(1, 2, 1, 1) for x in token]
            decode.choose_splits = lambda *_: 2
            decode.decode(state, *token, mixer, slots=torch.zeros(1, dtype=torch.int32))
            decode.decode(state, *whole, mixer, HeadSubset(torch.tensor([0, 3]), whole[0].new_empty(1, 8, q.shape[3])))
            decode.choose_splits = lambda *_: 1


def paged_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: dict[str, int]) -> None:
    """The kernels for keys in blocks of 64 tokens, and that which gives heads their queries, keys and values."""
    paged.precision = launcher.precision
    columns.columns_kernel = Compiled(columns.columns_kernel, "columns_kernel", shared)
    columns.columns(q.detach()[:, 0, :1], (q.shape[3] // 2, q.shape[3] // 4, q.shape[3] // 4))
    for name in ("paged_kernel", "join_kernel"):
        setattr(paged, name, Compiled(getattr(paged, name), name, shared))
    memory = KeyValues(*(x.detach()[0].transpose(0, 1).contiguous() for x in (k, v)))
    token = [x.detach()[:, :, :1] for x in (q, k, v)]
    tables, positions = torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.long)
    paged.paged_decode(*token, memory, tables, positions, 64, 0.1, parts=7)
    whole = [x.repeat(1, 2, 1, 1) for x in token]
    subset = HeadSubset(torch.tensor([0, 3]), whole[0].new_empty(1, 8, q.shape[3]))
    paged.paged_decode(*whole, memory, tables, positions, 64, 0.1, subset=subset, parts=7)


def rotary_kernels(q: torch.Tensor, k: torch.Tensor) -> None:
    """RoPE undone, with backward: pairs of distant and of adjacent channels, of all channels and of half of them."""
    for turned, form in ((q.shape[3], (False, False)), (q.shape[3] // 2, (True, True))):
        tables = [torch.empty(1, q.shape[2], turned, dtype=q.dtype) for _ in range(2)]
        wide = unrotate.append_unrotated(q, k, *tables, unrotate.RotaryForm(*form))
        torch.autograd.backward(wide, [torch.empty_like(x) for x in wide])


if __name__ == "__main__":
    kind, window, size, dim, f, dtype, phi = sys.argv[1:]
    main(kind, window, int(size), int(dim), int(f), dtype, phi)
