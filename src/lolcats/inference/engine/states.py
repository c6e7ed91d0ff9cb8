"""States of many sequences: the table of slots, snapshots of single sequences, and a cache of prefixes.

A *snapshot* is what every linearized layer remembers after some tokens: a few MB, whatever their number.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from lolcats.attention import AttentionState, SlotState
from lolcats.errors import LolcatsError
from lolcats.files import give_usual_mode
from lolcats.modeling.cache import LinearizedCacheLayer, install_cache
from lolcats.modeling.layer import LinearizedAttention


@dataclass(frozen=True)
class Snapshot:
    """The state after ``tokens``: one :class:`AttentionState` of batch 1 for each layer.

    Nothing changes it, so using it twice forks the sequence.
    """

    tokens: tuple[int, ...]
    layers: tuple[AttentionState, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.long)}
        for index, layer in enumerate(self.layers):
            tensors |= {f"{index}.{name}": x.contiguous() for name, x in layer.tensors().items()}
        save_file(tensors, path)
        give_usual_mode(Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
        try:
            tensors = load_file(path, device=str(device))
            tokens = tuple(tensors.pop("tokens").tolist())
        except (OSError, KeyError, SafetensorError) as error:
            raise LolcatsError(f"{path}: no saved state ({error}).") from None
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, field = name.partition(".")
            layers.setdefault(int(index), {})[field] = tensor
        return cls(tokens, tuple(AttentionState.of_tensors(layers[i], len(tokens)) for i in sorted(layers)))


class PrefillCache:
    """transformers' cache of one sequence, or of several of one length, for their prefill."""

    def __init__(self, layers: dict[int, LinearizedAttention], start: Snapshot | None = None) -> None:
        self.cache = DynamicCache()
        install_cache(self.cache, layers)
        self.layers: list[LinearizedCacheLayer] = [self.cache.layers[i] for i in layers]
        if start is not None:
            for layer, state in zip(self.layers, start.layers, strict=True):
                sums = state.sums._replace(S=state.sums.S.float())  # a snapshot out of a table may have bf16
                layer.state = replace(state, sums=sums)
                layer.length, layer.is_initialized = len(start.tokens), True

    def states(self) -> tuple[AttentionState, ...]:
        """The layers' states. Moving a state forward makes a new one, so these stay as they are."""
        states = tuple(layer.state for layer in self.layers)
        assert all(state is not None for state in states)
        return states  # type: ignore[return-value]


class SlotTable:
    """States of all slots, one :class:`SlotState` a layer, allocated once and written in place.

    A decode step sees the first n slots as transformers' cache, and moves the states of all n.
    """

    def __init__(
        self, layers: dict[int, LinearizedAttention], slots: int, dtype: torch.dtype, device: Any,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.slots = slots
        self.states: list[SlotState] = []
        self.views: dict[int, list[SlotState]] = {}
        for layer in layers.values():
            g = layer.geometry
            k = torch.empty(slots, g.kv_heads, 0, layer.spec.channels(g.head_dim), dtype=dtype, device=device)
            v = torch.empty(slots, g.kv_heads, 0, g.value_dim, dtype=dtype, device=device)
            self.states.append(SlotState.of(layer.empty_state(k, v, state_dtype)))
        self.cache = DynamicCache()
        install_cache(self.cache, layers)
        self.layers: list[LinearizedCacheLayer] = [self.cache.layers[i] for i in layers]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    def view(self, rows: int, counts: tuple[int, ...] | None = None) -> DynamicCache:
        """A cache of the first ``rows`` slots, on the table's own memory; ``counts``: how many tokens each has seen."""
        if rows not in self.views:
            self.views[rows] = [state.map(lambda x: x[:rows]) for state in self.states]
        for layer, state in zip(self.layers, self.views[rows], strict=True):
            layer.state, layer.length = state.at(counts), 0
        return self.cache

    def put(self, slot: int, states: Sequence[AttentionState]) -> None:
        """Copy the states of one or several sequences into the slots from ``slot`` on."""
        for state, new in zip(self.states, states, strict=True):
            for table, x in zip(state.tensors().values(), new.tensors().values(), strict=True):
                table[slot : slot + len(x)].copy_(x)

    def clear(self) -> None:
        """Forget everything, also what an interrupted step left half written."""
        for state in self.states:
            for x in state.tensors().values():
                x.zero_()

    def move(self, source: int, target: int) -> None:
        for state in self.states:
            for x in state.tensors().values():
                x[target].copy_(x[source])

    def take(self, slot: int, tokens: Sequence[int]) -> Snapshot:
        """A copy of what a slot remembers, which must be ``tokens``."""
        return Snapshot(tuple(tokens), tuple(state.row(slot, len(tokens)) for state in self.states))


class PrefixCache:
    """Snapshots of prompts at the ends of prefill pieces, least recently used first, within ``limit`` bytes."""

    def __init__(self, limit: int, piece: int) -> None:
        self.limit, self.piece = limit, piece
        self.nbytes = self.hits = 0
        self.entries: OrderedDict[bytes, Snapshot] = OrderedDict()

    def find(self, tokens: Sequence[int]) -> Snapshot | None:
        """The longest known prefix that leaves at least one token to compute."""
        for key in reversed(self._keys(tokens[:-1])):
            if key in self.entries:
                self.entries.move_to_end(key)
                self.hits += 1
                return self.entries[key]
        return None

    def offer(self, tokens: Sequence[int], done: int, states: Sequence[AttentionState]) -> None:
        """Keep the state after the first ``done`` tokens of a prompt, if it is worth its memory.

        A long prompt keeps the states after 1, 2, 4, 8, ... pieces and after its last whole piece.
        """
        pieces, remainder = divmod(done, self.piece)
        last = done + self.piece > len(tokens)
        if remainder or not pieces or (pieces & (pieces - 1) and not last):
            return
        key, nbytes = self._keys(tokens[:done])[-1], sum(state.nbytes for state in states)
        if key in self.entries or nbytes > self.limit:
            return
        self.entries[key] = Snapshot(tuple(tokens[:done]), tuple(state.map(torch.clone) for state in states))
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self.entries.popitem(last=False)[1].nbytes

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        """A key for each whole piece: a hash of all tokens up to its end."""
        digest, keys = hashlib.sha256(), []
        for start in range(0, len(tokens) - self.piece + 1, self.piece):
            digest.update(torch.tensor(tokens[start : start + self.piece], dtype=torch.long).numpy().tobytes())
            keys.append(digest.digest())
        return keys
