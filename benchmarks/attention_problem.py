"""One attention layer as the benchmarks time it, and the softmax attentions that it is compared with."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lolcats.attention import AttentionSpec, FeatureMap, Mixer, chunked_attention, parallel_attention
from lolcats.attention.kernels import triton_attention
from lolcats.attention.kernels.layout import Tiling

DEVICE = torch.device("cuda")
H, G, D, F_COLUMNS = 32, 8, 128, 64
HYBRID = AttentionSpec("hybrid", "terraced", window_size=64, sinks=4)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA = {"FlashAttention 2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PACKAGES = {"FlashAttention 3": "flash_attn_interface", "FlashAttention 4": "flash_attn.cute"}
REPEATED = 8192  # tokens up to which k and v are also tried repeated for every query head


@dataclass
class Problem:
    """q, k, v laid out as a model's projections leave them, feature maps and γ."""

    qkv: list[Tensor]
    phi_q: FeatureMap
    phi_k: FeatureMap
    gamma: Tensor
    spec: AttentionSpec = HYBRID
    tiling: Tiling | None = None  # None: what the kernels choose

    @classmethod
    def random(cls, batch: int, length: int, maps: int = H, dtype: torch.dtype = torch.bfloat16) -> "Problem":
        torch.manual_seed(0)
        shapes = ((batch, length, heads, D) for heads in (H, G, G))
        return cls.of([torch.randn(s, device=DEVICE, dtype=dtype).transpose(1, 2) for s in shapes], maps)

    @classmethod
    def of(cls, qkv: list[Tensor], maps: int) -> "Problem":
        heads, dim = qkv[0].shape[1], qkv[0].shape[3]
        phi_q, phi_k = (FeatureMap("hedgehog", n, dim, F_COLUMNS).to(DEVICE) for n in (heads, maps))
        gamma = torch.full((heads,), 0.1, device=DEVICE, requires_grad=True)
        return cls([x.detach().requires_grad_() for x in qkv], phi_q, phi_k, gamma)

    def mixer(self, spec: AttentionSpec) -> Mixer:
        return Mixer(self.phi_q, self.phi_k, self.gamma, spec, self.scale)

    def kernels(self) -> Tensor:
        return triton_attention(*self.qkv, self.mixer(self.spec), tiling=self.tiling)[0]

    def group(self, g: int) -> "Problem":
        """Only one kv head and the query heads that share it, in fp32."""
        q, k, v = (x.detach().float() for x in self.qkv)
        size, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
        heads = slice(g * size, (g + 1) * size)
        each = self.phi_k.weight.shape[0] // kv_heads
        part = Problem.of([q[:, heads], k[:, g : g + 1], v[:, g : g + 1]], each)
        with torch.no_grad():
            part.phi_q.weight.copy_(self.phi_q.weight[heads])
            part.phi_k.weight.copy_(self.phi_k.weight[g * each : (g + 1) * each])
        return replace(part, spec=self.spec)

    def reference(self) -> Tensor:
        """By the quadratic reference up to 8,192 tokens, beyond by the chunked path in fp32, tested against it."""
        q, k, v = self.qkv
        if q.shape[2] > 8192:
            return chunked_attention(q, k, v, self.mixer(self.spec))[0]
        return parallel_attention(q, k, v, self.phi_q(q), self.phi_k(k), self.gamma, self.spec, self.scale)

    @property
    def scale(self) -> float:
        return self.qkv[0].shape[3] ** -0.5

    def leaves(self) -> list[Tensor]:
        return [*self.qkv, self.gamma, *self.phi_q.parameters(), *self.phi_k.parameters()]


class Unrotated(Problem):
    """q and k are twice as wide, as models give them: feature maps see what lies after the first D channels."""

    def kernels(self) -> Tensor:
        q, k, v = self.qkv
        (q, x_q), (k, x_k) = q.chunk(2, -1), k.chunk(2, -1)
        mixer = replace(self.mixer(replace(self.spec, unrotated=True)), scale=D**-0.5)
        return triton_attention(q, k, v, mixer, seen=(x_q, x_k), tiling=self.tiling)[0]

    @classmethod
    def beside(cls, rotated: Problem) -> "Unrotated":
        """The same with random vectors for the maps, after the rotated ones."""
        wide = [torch.cat([x.detach(), torch.randn_like(x)], 3).requires_grad_() for x in rotated.qkv[:2]]
        return cls(**vars(rotated) | {"qkv": [*wide, rotated.qkv[2]]})


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])


flash: Attend = partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)


def softmax_attentions() -> dict[str, Attend]:
    """SDPA's fast backends, and FlashAttention 3 and 4 where they are installed, for (B, heads, T, D)."""
    found: dict[str, Attend] = {name: partial(sdpa, backend=backend) for name, backend in SDPA.items()}
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package.split(".")[0]) and importlib.util.find_spec(package):
            function = importlib.import_module(package).flash_attn_func

            def attend(q: Tensor, k: Tensor, v: Tensor, function: Callable[..., object] = function) -> Tensor:
                y = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
                return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)  # type: ignore[attr-defined, no-any-return]

            found[name] = attend
    return found


def softmax_peers(problem: Problem) -> dict[str, partial[Tensor]]:
    """Every softmax attention that runs here, on up to three layouts of the same tensors, as "name, layout"."""
    q, k, v = (x.detach() for x in problem.qkv)
    plain = [x.contiguous() for x in (q, k, v)]
    layouts = {"as projected": [q, k, v], "contiguous": plain}
    if q.shape[2] <= REPEATED:
        layouts["k, v repeated"] = [plain[0], *(x.repeat_interleave(H // G, 1) for x in plain[1:])]
    peers = {}
    for name, attend in softmax_attentions().items():
        try:
            attend(q, k, v)
        except RuntimeError as error:  # a backend that this GPU or build lacks
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            continue
        for layout, tensors in layouts.items():
            peers[f"{name}, {layout}"] = partial(attend, *(x.requires_grad_() for x in tensors))
    return peers


def eager(function: Callable[[], object]) -> float:
    """Median milliseconds, launched one by one, L2 cleared in between."""
    return triton.testing.do_bench(function, warmup=30, rep=120, return_mode="median")


def replayed(function: Callable[[], object]) -> float:
    """Median milliseconds as a CUDA graph: what the launches cost the host is left out."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return triton.testing.do_bench_cudagraph(function, rep=60, return_mode="median")


def both(
    function: Callable[[], Tensor | tuple[Tensor, ...]], leaves: list[Tensor], direction: Tensor | list[Tensor]
) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(), leaves, direction)


def fastest(timed: dict[str, float]) -> tuple[str, float]:
    return min(timed.items(), key=lambda item: item[1])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
