"""The modules added to each attention module of a converted model, under the name ``lolcats``.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lolcats.attention import (
    AttentionSpec,
    AttentionState,
    Documents,
    FeatureMap,
    HeadNorm,
    Mixer,
    SlotState,
    attention,
    choose_path,
    extend,
    step,
)
from lolcats.attention.advance import SEGMENT, compacted
from lolcats.attention.path import choose_decode_path
from lolcats.attention.reference import attention_weights
from lolcats.attention.subset import HeadSubset
from lolcats.attention.turning import Turning
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError

Mode = Literal["student", "teacher", "transfer"]


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention in transfer mode, with detached tensors: what stage 1 learns from.

    q: (B, H, T, D); k, v: (B, G, T, D); target: (B, T, H, D), the softmax output; padding: (B, T) bool or None.
    If feature maps see q and k without RoPE, these have 2D channels (``AttentionSpec.rotated``), or D channels and a
    ``turning``; :meth:`queries_and_keys` gives them as every path takes them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    target: Tensor
    scale: float
    softcap: float | None
    padding: Tensor | None
    documents: Documents | None = None
    """Set if rows hold several sequences."""
    turning: Turning | None = None
    """Set if the kernels turn q and k back by themselves."""

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """q and k, with 2D channels if feature maps see them without RoPE."""
        return (self.q, self.k) if self.turning is None else self.turning.beside(self.q, self.k)

    def per_query(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``function(q, k)`` (B, H, T, ...), applied to each document on its own if rows hold several."""
        q, k = self.queries_and_keys()
        return function(q, k) if self.documents is None else self.documents.apart(function, q, k)


Observer = Callable[["LinearizedAttention", AttentionCall], None]


@dataclass(frozen=True)
class Geometry:
    """Shapes of one attention layer, read from a real call: layer index, H, G, D of q and k, dim of v."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


class KeptAttention(nn.Module):
    """A layer that stays the base model's softmax attention. No parameters; remembers the base implementation, and the
    index of its keys in the cache."""

    def __init__(self, base_implementation: str, layer: int | None) -> None:
        super().__init__()
        self.base_implementation, self.layer = base_implementation, layer


def layer_spec(config: AttentionConfig, kind: Any) -> AttentionSpec:
    """The attention spec of a layer of kind ``kind``, which must not be ``softmax``. Without linear attention nothing
    sees queries and keys before RoPE."""
    unrotated = config.feature_inputs == "unrotated" and kind != "window"
    return AttentionSpec(
        kind, config.window, config.window_size, config.sinks, config.decay, config.normalizer, unrotated
    )  # fmt: skip


class LinearizedAttention(nn.Module):
    """The extra parameters of one linearized layer: feature maps φ_q, φ_k and the gate g (γ = sigmoid(g)), in fp32.
    With ``attention.normalizer=group_norm``, also those of the norm.

    Heads are those of ``geometry``; if some of the layer's heads stay softmax attention (``kept``), only the others.

    ``mode`` says what the layer outputs: ``student`` (hybrid attention), ``teacher`` (the base model's softmax
    attention) or ``transfer`` (softmax, while ``observer`` receives each call: stage 1).
    """

    def __init__(
        self, geometry: Geometry, config: AttentionConfig, spec: AttentionSpec, implementation: str, kept: Any = None
    ) -> None:
        super().__init__()
        self.kept = kept
        """:class:`lolcats.modeling.heads.KeptHeads`, or None if all heads are linearized."""
        self.geometry, self.spec, self.base_implementation = geometry, spec, implementation
        self.mode: Mode = "student"
        self.trial: Any = None
        """:class:`lolcats.modeling.heads.Trial`: heads that are softmax attention while a selection tries them."""
        self.constant: tuple[Any, Tensor] | None = None
        """γ and what it was computed from, while the model generates (:func:`constant_gates`)."""
        self.ranks = 1  # ranks that share the heads in tensor parallelism
        self.observer: Observer | None = None
        groups = geometry.heads // geometry.kv_heads
        self.maps = geometry.kv_heads if config.key_maps == "per_kv_head" else geometry.heads
        self.phi_q = FeatureMap(config.feature_map, geometry.heads, geometry.head_dim, config.feature_dim)
        self.phi_k = FeatureMap(config.feature_map, self.maps, geometry.head_dim, config.feature_dim)
        with torch.no_grad():  # φ_k starts as a copy of φ_q; heads that share a key map start from the same φ_q
            for name, key_map in self.phi_k.named_parameters():
                query_map = getattr(self.phi_q, name)
                if self.maps < geometry.heads:
                    query_map.copy_(key_map.repeat_interleave(groups, 0))
                else:
                    key_map.copy_(query_map)
        self.gate = nn.Parameter(torch.full((geometry.heads,), config.gate_init))
        normed = config.normalizer == "group_norm"
        self.norm = HeadNorm(geometry.heads, geometry.value_dim) if normed else None
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Let parameters that this kind does not use require no gradient: DDP waits for one from all that do.

        The gate weights softmax against the linear term, so it cancels out where one of them is missing. The parameters
        exist all the same, so that every kind is saved alike and another can be tried (:func:`override`).
        """
        used = {"gate": self.spec.has_softmax and self.spec.has_linear, "norm": not self.spec.divides}
        for name, parameter in self.named_parameters():
            if not used.get(name.partition(".")[0], self.spec.has_linear):
                parameter.requires_grad_(False)

    def split_heads(self, ranks: int) -> None:
        """Become one of ``ranks`` that each hold some of the heads; the caller splits the parameters, and with kept
        heads the numbers of maps as well."""
        count = self.geometry.kv_heads if self.kept is None else self.kept.geometry.kv_heads
        if count % ranks:
            raise LolcatsError(
                f"Layer {self.geometry.layer} has {count} key/value heads, which {ranks} ranks cannot share equally: "
                "use a number of ranks that divides it."
            )
        if self.spec.decays:
            raise LolcatsError(
                "Tensor parallelism does not support attention.decay: a head's decay follows from its number in the "
                "whole layer. Load the model without tensor parallelism."
            )
        self.ranks = ranks
        if self.kept is not None:
            return
        self.maps //= ranks
        self.phi_q.heads //= ranks
        self.phi_k.heads //= ranks

    @property
    def gamma(self) -> Tensor:
        """(H,) weight of the window against the linear term, in (0, 1)."""
        if self.constant is not None and not torch.is_grad_enabled() and self.constant[0] == _version(self.gate):
            return self.constant[1]
        return torch.sigmoid(self.gate.float())

    def mixer(self, scale: float, softcap: float | None = None) -> Mixer:
        """This layer's attention as a value, for logits of this scale."""
        return Mixer(self.phi_q, self.phi_k, self.gamma, self.spec, scale, softcap, self.norm)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None,
                padding: Tensor | None = None, documents: Documents | None = None,
                backend: str | None = None, turning: Turning | None = None) -> Tensor:  # fmt: skip
        """Outputs (B, H, T, D) for whole sequences, bf16 from the kernels for bf16 inputs, else fp32.

        For backward, the kernels keep q, k, v, the output and a few numbers per query. The chunked path keeps q, k, v
        and recomputes the rest, since its intermediates in a whole model (stage 2) are many times larger.

        Args:
            q: (B, H, T, D); k, v: (B, G, T, D), any float dtype.
            padding: (B, T) bool, False for padding.
            documents: the sequences packed into each row, without padding.
            backend: asked for when the decoder's call began; default: what :func:`use_backend` says now.
            turning: how RoPE turned q and k, if the maps see them before it and q and k have only D channels.
        """
        spec = self.spec if turning is None else replace(self.spec, unrotated=False)
        path, mixer = choose_path(q, spec, backend=backend), self.mixer(scale, softcap)
        if turning is not None and path != "kernels":
            (q, k), turning = turning.beside(q, k), None
        if documents is not None and path != "kernels":
            return documents.apart(partial(self.forward, scale=scale, softcap=softcap, backend=backend), q, k, v)

        def whole(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
            turned = Turning.laid_out(*table) if table else turning
            return attention(q, k, v, mixer, path, documents=documents, turning=turned)[0]

        if path == "kernels" and padding is not None:
            return compacted(padding, whole, q, k, v, *(() if turning is None else (turning.of_rows(len(q)),)))
        if path == "kernels":
            return whole(q, k, v)
        if padding is not None or q.shape[2] > SEGMENT:
            return extend(self.empty_state(k, v), q, k, v, mixer, padding, path=path)[0]
        if torch.is_grad_enabled() and q.requires_grad:
            return checkpoint(whole, q, k, v, use_reentrant=False, preserve_rng_state=False)
        return whole(q, k, v)

    def over_heads(self, values: Sequence[Any]) -> list[Any]:
        """Values of this layer's heads at the places of all query heads of the attention module; None for those that
        stay softmax attention."""
        if self.kept is None:
            return list(values)
        places: list[Any] = [None] * self.kept.geometry.heads
        for head, value in zip(self.kept.queries(self.kept.linearized), values, strict=True):
            places[head] = value
        return places

    def answer(self, call: AttentionCall) -> Tensor:
        """What this layer puts out instead of the call's target, (B, T, H, D)."""
        settings = call.scale, call.softcap, call.padding, call.documents
        y = self(call.q, call.k, call.v, *settings, turning=call.turning)
        return y.transpose(1, 2)

    def advance(
        self, state: AttentionState, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None,
        padding: Tensor | None = None, counts: Sequence[int] | None = None, backend: str | None = None,
        subset: HeadSubset | None = None,
    ) -> tuple[Tensor, AttentionState]:  # fmt: skip
        """Outputs (B, H, T, D) for T new tokens after ``state``, and the state after them (see :func:`extend`).

        subset: this layer's heads, if q, k and v have more (:meth:`steps_in_place`).
        """
        mixer = self.mixer(scale, softcap)
        if q.shape[2] == 1 and padding is None:
            return step(state, q, k, v, mixer, backend, subset)
        assert subset is None
        path = choose_path(q, self.spec, final=True, backend=backend)
        return extend(state, q, k, v, mixer, padding, counts, path)

    def steps_in_place(
        self, state: AttentionState | None, q: Tensor, padding: Tensor | None, backend: str | None = None
    ) -> bool:
        """Whether the decode kernel moves this state by the tokens of queries like ``q``."""
        if q.shape[2] > 1 or padding is not None or not isinstance(state, SlotState):
            return False
        return choose_decode_path(q, self.mixer(1.0), backend) == "kernels"

    def empty_state(self, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float32) -> AttentionState:
        return AttentionState.empty(k, v, self.maps, self.phi_k.num_features, self.spec, dtype)

    def weights(self, q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
        """(B, H, T, T) attention weights, for plots; quadratic in T. Rows sum to 1 in every variant."""
        features, spec = (self.phi_q(q), self.phi_k(k)), self.spec
        return attention_weights(spec.rotated(q), spec.rotated(k), *features, self.gamma, spec, scale, softcap)


def attached(module: Any) -> KeptAttention | LinearizedAttention | None:
    """What a conversion attached to an attention module, if anything: PEFT's trained copy of it in use, with
    ``modules_to_save=["lolcats"]``."""
    layer: Any = getattr(module, "lolcats", None)
    if layer is None or isinstance(layer, KeptAttention | LinearizedAttention):  # in every layer of every call
        return layer
    if hasattr(layer, "modules_to_save"):
        off = layer.disable_adapters or not layer.active_adapters
        layer = layer.original_module if off else layer.modules_to_save[layer.active_adapters[0]]
    return layer  # type: ignore[no-any-return]


def linearized_layers(model: nn.Module) -> list[LinearizedAttention]:
    """The linearized layers of a model (or PEFT wrapper) in order."""
    return [m for m in model.modules() if isinstance(m, LinearizedAttention)]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a converted model: the list whose members hold the linearized attentions."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and linearized_layers(module):
            return module
    raise LolcatsError(f"{type(model).__name__} has no list of decoder layers.")


@contextmanager
def constant_gates(layers: Iterable[LinearizedAttention]) -> Iterator[None]:
    """Inside the block, calls without gradients take γ as it is now, instead of computing it each time. A gate that
    changes nevertheless is noticed."""
    constants = []
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            if not layer.gate.is_inference():  # whose changes leave no trace
                layer.constant = _version(layer.gate), layer.gamma
                constants.append((layer, layer.constant))
    try:
        yield
    finally:  # until here CUDA graphs may read them
        for layer, constant in constants:
            if layer.constant is constant:
                layer.constant = None


def _version(x: Tensor) -> Any:
    return x.data_ptr(), x._version


@contextmanager
def override(model: nn.Module | Iterable[LinearizedAttention], mode: Mode | None = None,
             observer: Observer | None = None, **spec: Any) -> Iterator[None]:  # fmt: skip
    """Change the mode or fields of the spec in every linearized layer for the duration of the block.

    ``override(model, mode="teacher")`` is the base model (with its LoRA, if any); ``override(model, kind="window",
    sinks=0)`` is only its window; ``kind="remote"`` only its linear term.

    Args:
        model: the model, or only some of its layers.
    """
    layers = linearized_layers(model) if isinstance(model, nn.Module) else list(model)
    before = [(layer.mode, layer.observer, layer.spec) for layer in layers]
    for layer in layers:
        layer.mode, layer.observer = mode or layer.mode, observer
        layer.spec = replace(layer.spec, **spec)
    try:
        yield
    finally:
        for layer, (old_mode, old_observer, old_spec) in zip(layers, before, strict=True):
            layer.mode, layer.observer, layer.spec = old_mode, old_observer, old_spec
