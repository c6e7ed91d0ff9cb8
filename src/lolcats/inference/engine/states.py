"""States of many sequences: the table of slots, snapshots of single sequences, and a cache of prefixes.

A *snapshot* is what every linearized layer remembers after some tokens: a few MB, whatever their number. If the model
keeps heads or layers, it also has their keys and values, which it shares with other sequences (:mod:`.kept`).
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
from torch import Tensor
from transformers import DynamicCache

from lolcats.attention import AttentionState, SlotState
from lolcats.attention.state import KeyValues
from lolcats.errors import LolcatsError
from lolcats.files import give_usual_mode
from lolcats.inference.engine.blocks import OutOfBlocks, Tables
from lolcats.inference.engine.kept import Copied, Group, Held, Kept, KeptKeys, PagedCache
from lolcats.modeling.cache import LinearizedCacheLayer, install_cache
from lolcats.modeling.layer import LinearizedAttention

KEPT = "kept"
"""Begins the names of kept keys and values in a saved file."""


@dataclass(frozen=True)
class Snapshot:
    """The state after ``tokens``: one :class:`AttentionState` of batch 1 for each layer.

    Nothing changes it, so using it twice forks the sequence. ``kept``: keys and values of kept heads, if the model has
    any. They stay in the engine's blocks, which are taken as long as the snapshot lives; a saved file has copies.
    """

    tokens: tuple[int, ...]
    layers: tuple[AttentionState, ...]
    kept: Kept | None = None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers) + (self.kept.nbytes if self.kept else 0)

    def to_host(self) -> Snapshot:
        """A copy in the host's memory, which holds none of the engine's blocks."""
        layers = tuple(layer.map(lambda x: x.to("cpu", copy=True)) for layer in self.layers)
        return Snapshot(self.tokens, layers, self.kept and self.kept.copied("cpu"))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.long)}
        for index, layer in enumerate(self.layers):
            tensors |= {f"{index}.{name}": x.contiguous() for name, x in layer.tensors().items()}
        for index, pair in (self.kept.copied().layers if self.kept else {}).items():
            tensors |= {f"{KEPT}.{index}.{name}": x.contiguous() for name, x in pair._asdict().items()}
        save_file(tensors, path)
        give_usual_mode(Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
        """
        Raises:
            LolcatsError: the file cannot be read, or is not a whole saved state.
        """
        try:
            return cls._of_tensors(load_file(path, device=str(device)))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise LolcatsError(f"{path} is not a saved state ({reason}).") from None

    @classmethod
    def _of_tensors(cls, tensors: dict[str, Tensor]) -> Snapshot:
        tokens = tuple(map(int, tensors.pop("tokens").tolist()))
        layers, kept = dict[int, dict[str, Any]](), dict[int, dict[str, Any]]()
        for name, tensor in tensors.items():
            of, rest = (kept, name.removeprefix(f"{KEPT}.")) if name.startswith(KEPT) else (layers, name)
            index, _, field = rest.partition(".")
            of.setdefault(int(index), {})[field] = tensor
        states = tuple(AttentionState.of_tensors(layers[i], len(tokens)) for i in range(len(layers)))
        return cls(tokens, states, Copied({i: KeyValues(**kept[i]) for i in sorted(kept)}) if kept else None)


class PrefillCache:
    """transformers' cache of one sequence, or of several of one length, for their prefill.

    Args:
        start: what all of them go on from.
        kept: where the model's kept keys go, if it has any; ``tables`` are the sequences' blocks there, with room for
            what is still to come.
        rows: how many sequences.
    """

    def __init__(
        self, layers: dict[int, LinearizedAttention], start: Snapshot | None = None, kept: KeptKeys | None = None,
        tables: Sequence[Tables] = (), rows: int = 1,
    ) -> None:  # fmt: skip
        self.cache, self.layers = _cache(layers, kept)
        self.tables = tables
        if start is not None:
            for layer, state in zip(self.layers, start.layers, strict=True):
                sums = state.sums._replace(S=state.sums.S.float())  # a snapshot out of a table may have bf16
                layer.state = replace(state, sums=sums)
                if rows > 1:
                    layer.state = layer.state.map(lambda x: x.repeat_interleave(rows, 0))
                layer.length, layer.is_initialized = len(start.tokens), True

    def extended(self, tokens: int) -> DynamicCache:
        """The cache for a call with ``tokens`` new ones in each row."""
        if isinstance(self.cache, PagedCache):
            self.cache.see(self.tables, tokens)
        return self.cache

    def held(self) -> Held | None:
        """The kept keys of the first sequence so far.

        Raises:
            OutOfBlocks: too few blocks are free for those that it cannot share.
        """
        return self.cache.memory.held(self.tables[0]) if isinstance(self.cache, PagedCache) else None

    def snapshot(self, tokens: Sequence[int]) -> Snapshot:
        """The state of a single sequence, which must be ``tokens`` and does not go on in this cache."""
        kept = Held(self.cache.memory, self.tables[0].fork()) if isinstance(self.cache, PagedCache) else None
        return Snapshot(tuple(tokens), tuple(state.map(torch.clone) for state in self.states()), kept)

    def states(self) -> tuple[AttentionState, ...]:
        """The layers' states. Moving a state forward makes a new one, so these stay as they are."""
        states = tuple(layer.state for layer in self.layers)
        assert all(state is not None for state in states)
        return states  # type: ignore[return-value]


def _cache(
    layers: dict[int, LinearizedAttention], kept: KeptKeys | None
) -> tuple[DynamicCache, list[LinearizedCacheLayer]]:
    """An empty cache for the model's layers, and those of it that hold states."""
    cache = DynamicCache() if kept is None else PagedCache(kept)
    install_cache(cache, layers)
    states: list[Any] = [cache.layers[i] for i in layers]
    if isinstance(cache, PagedCache):
        cache.install()
    return cache, states


class SlotTable:
    """States of all slots, one :class:`SlotState` a layer, allocated once and written in place.

    A decode step sees the first n slots as transformers' cache, and moves the states of all n. Kept keys lie elsewhere:
    of these a slot has the table of blocks, which is all that moves with it.
    """

    def __init__(
        self, layers: dict[int, LinearizedAttention], slots: int, dtype: torch.dtype, device: Any,
        state_dtype: torch.dtype = torch.float32, kept: KeptKeys | None = None,
    ) -> None:  # fmt: skip
        self.slots = slots
        self.states: list[SlotState] = []
        self.views: dict[int, list[SlotState]] = {}
        for layer in layers.values():
            g = layer.geometry
            k = torch.empty(slots, g.kv_heads, 0, layer.spec.channels(g.head_dim), dtype=dtype, device=device)
            v = torch.empty(slots, g.kv_heads, 0, g.value_dim, dtype=dtype, device=device)
            self.states.append(SlotState.of(layer.empty_state(k, v, state_dtype)))
        self.cache, self.layers = _cache(layers, kept)
        self.kept, self.tables = kept, list[Tables | None]([None] * slots)
        self.shown = [torch.full((slots, group.width), group.waste, dtype=torch.int32, device=device)
                      for group in (kept.groups if kept else ())]  # fmt: skip
        self.versions = [[0] * slots for _ in self.shown]

    @property
    def nbytes(self) -> int:
        """Bytes of what does not grow."""
        return sum(state.nbytes for state in self.states)

    def view(self, rows: int, positions: Tensor, counts: tuple[int, ...] | None = None) -> DynamicCache:
        """A cache of the first ``rows`` slots, on the table's own memory, for one token more in each.

        positions: (rows,) of these. counts: the same on the host, for running rows; None if it does not know.
        """
        before = 0
        if isinstance(self.cache, PagedCache) and counts is not None:
            before = self.cache.see(self.tables[:rows], 1)
        elif isinstance(self.cache, PagedCache):
            self.cache.see_blocks([shown[:rows] for shown in self.shown], positions)
        if rows not in self.views:
            self.views[rows] = [state.map(lambda x: x[:rows]) for state in self.states]
        for layer, state in zip(self.layers, self.views[rows], strict=True):
            layer.state, layer.length, layer.pending = state.at(counts), before, False
        return self.cache

    def put(self, slot: int, states: Sequence[AttentionState]) -> None:
        """Copy the states of one or several sequences into the slots from ``slot`` on."""
        for state, new in zip(self.states, states, strict=True):
            for table, x in zip(state.tensors().values(), new.tensors().values(), strict=True):
                table[slot : slot + len(x)].copy_(x)

    def lacking(self, rows: int) -> list[int]:
        """Blocks of each group that have to be free for one more token in each of the first ``rows`` slots."""
        return [sum(each) for each in zip(*(tables.lacking(1) for tables in self.tables[:rows] if tables), strict=True)]

    def reserve(self, rows: int) -> None:
        """Make room for that token."""
        for tables in filter(None, self.tables[:rows]):
            assert self.kept is not None
            self.kept.reserve(tables, 1)

    def launch(self, rows: int) -> None:
        """Before a step that the device does by itself, with a token more in each of the first ``rows`` slots."""
        if self.kept is not None:
            for number, group in enumerate(self.kept.groups):
                self._show(number, group)
            for tables in filter(None, self.tables[:rows]):
                tables.advance(1)

    def _show(self, number: int, group: Group) -> None:
        """Tell the device which blocks of a group the slots have, where that has changed. Blocks that have gone back
        are not read any more."""
        tables = [tables and tables.each[number] for tables in self.tables]
        versions, shown = [table.version if table else 0 for table in tables], self.shown[number]
        changed = [slot for slot, version in enumerate(versions) if version != self.versions[number][slot]]
        if not changed:
            return
        rows = torch.full((len(changed), group.width), group.waste, dtype=torch.int32)
        for row, slot in zip(rows, changed, strict=True):
            if table := tables[slot]:
                row[table.passed : table.passed + len(table.blocks)] = torch.tensor(table.blocks, dtype=torch.int32)
        where = torch.tensor(changed)
        if shown.is_cuda:
            rows, where = rows.pin_memory(), where.pin_memory()
        where, rows = (x.to(shown.device, non_blocking=True) for x in (where, rows))
        shown.index_copy_(0, where, rows)
        self.versions[number] = versions

    def clear(self) -> None:
        """Forget everything, also what an interrupted step left half written."""
        self.tables = [None] * self.slots
        for state in self.states:
            for x in state.tensors().values():
                x.zero_()

    def move(self, source: int, target: int) -> None:
        self.tables[target] = self.tables[source]
        for state in self.states:
            for x in state.tensors().values():
                x[target].copy_(x[source])

    def leave(self, slot: int) -> None:
        """Nothing is in this slot any more."""
        self.tables[slot] = None

    def check_start(self, start: Snapshot) -> None:
        """
        Raises:
            LolcatsError: a state of another model.
        """

        def shapes(states: Sequence[AttentionState]) -> list[Any]:
            return [[x.shape[1:] for x in state.tensors().values()] for state in states]

        fits = self.kept.takes(start.kept, len(start.tokens)) if self.kept else start.kept is None
        if shapes(start.layers) != shapes(self.states) or not fits:
            raise LolcatsError("This saved state is of another model: its layers have other shapes.")

    def take(self, slot: int, tokens: Sequence[int]) -> Snapshot:
        """A copy of what a slot remembers, which must be ``tokens``."""
        tables, kept = self.tables[slot], None
        if tables is not None and self.kept is not None:
            assert tables.length == len(tokens)
            kept = Held(self.kept, tables.fork())
        return Snapshot(tuple(tokens), tuple(state.row(slot, len(tokens)) for state in self.states), kept)


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

    def offer(self, tokens: Sequence[int], done: int, cache: PrefillCache) -> None:
        """Keep the state after the first ``done`` tokens of a prompt, if it is worth its memory.

        A long prompt keeps the states after 1, 2, 4, 8, ... pieces and after its last whole piece. Blocks that several
        of them share count for each.
        """
        pieces, remainder = divmod(done, self.piece)
        last = done + self.piece > len(tokens)
        if remainder or not pieces or (pieces & (pieces - 1) and not last):
            return
        key, states = self._keys(tokens[:done])[-1], cache.states()
        if key in self.entries:
            return
        while True:
            try:
                kept = cache.held()
                break
            except OutOfBlocks:
                if not self.evict():
                    return
        nbytes = Snapshot((), states, kept).nbytes
        if nbytes > self.limit:
            return
        self.entries[key] = Snapshot(tuple(tokens[:done]), tuple(state.map(torch.clone) for state in states), kept)
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            self.evict()

    def evict(self) -> bool:
        """Drop the state that was used least recently. False if there is none."""
        if not self.entries:
            return False
        self.nbytes -= self.entries.popitem(last=False)[1].nbytes
        return True

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        """A key for each whole piece: a hash of all tokens up to its end."""
        digest, keys = hashlib.sha256(), []
        for start in range(0, len(tokens) - self.piece + 1, self.piece):
            digest.update(torch.tensor(tokens[start : start + self.piece], dtype=torch.long).numpy().tobytes())
            keys.append(digest.digest())
        return keys
