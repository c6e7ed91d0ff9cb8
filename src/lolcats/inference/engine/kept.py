"""Keys and values of kept heads and kept layers, in blocks that sequences take as they grow.

One memory for the whole engine, allocated once: for each layer keys and values (places, G, D), where a place is a
token of a block. Layers that see all keys have a pool of blocks, and layers that see the same window have another, from
which keys go back once no later token sees them. A call of the model sees the memory through :class:`PagedCache`, which
has a cache layer on it wherever the model keeps keys. The base model's own attention then gets keys for all tokens of
each row, padded on the left, with zeros for those that are gone, so masks, windows, scales and caps are the family's.

Shapes: B rows, G kept key/value heads of a layer, T new tokens, L keys of the longest row, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lolcats.attention.paged import paged_attention
from lolcats.attention.state import KeyValues
from lolcats.attention.subset import HeadSubset
from lolcats.inference.engine.blocks import Blocks, Table, Tables
from lolcats.modeling.cache import AttendingLayer, SplitCacheLayer

BLOCK = 64
"""Tokens of a block."""


class KeptLayer(NamedTuple):
    """A layer that keeps keys, and of how many key/value heads; head_dim is D of keys, value_dim that of values.

    window: how many of the last keys a token sees, its own among them; 0 for all.
    """

    layer: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0


def keeps_keys(model: PreTrainedModel) -> bool:
    """Whether any layer keeps the keys of every token."""
    return any(entry["kind"] == "softmax" or entry.get("softmax_heads") for entry in model.config.lolcats["layers"])


@torch.inference_mode()
def kept_layers(model: PreTrainedModel) -> list[KeptLayer]:
    """The layers that keep keys, as a call leaves them in transformers' cache: some families keep compressed ones."""
    cache, found = DynamicCache(config=model.config), []
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        own = layer.kept if isinstance(layer, SplitCacheLayer) else layer
        if isinstance(own, DynamicLayer) and own.is_initialized:
            assert own.keys is not None
            assert own.values is not None
            window = own.sliding_window if isinstance(own, DynamicSlidingWindowLayer) else 0
            found.append(KeptLayer(index, own.keys.shape[1], own.keys.shape[3], own.values.shape[3], window))
    return found


def by_window(layers: Sequence[KeptLayer]) -> dict[int, list[KeptLayer]]:
    """The layers that share blocks, those that see all keys first."""
    return {window: [x for x in layers if x.window == window] for window in sorted({x.window for x in layers})}


def token_bytes(layers: Sequence[KeptLayer], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values."""
    return sum(x.kv_heads * (x.head_dim + x.value_dim) for x in layers) * dtype.itemsize


@dataclass(frozen=True)
class Copied:
    """A sequence's kept keys and values by layer, (tokens, G, D), apart from any engine.

    Layers with a window have at least those of the last tokens that later ones see.
    """

    layers: dict[int, KeyValues]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(i, x.k.shape[1], x.k.shape[2], x.v.shape[2]) for i, x in sorted(self.layers.items())]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    def copied(self, device: Any = None) -> Copied:
        return Copied({i: KeyValues(*(x.to(device) for x in pair)) for i, pair in self.layers.items()})


@dataclass(frozen=True)
class Held:
    """The same in blocks of an engine's memory, which stay as they are as long as this lives."""

    memory: KeptKeys
    tables: Tables

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return self.memory.shapes

    @property
    def nbytes(self) -> int:
        each = zip(self.tables.each, self.memory.groups, strict=True)
        return sum(len(table.blocks) * group.block_bytes for table, group in each)

    def copied(self, device: Any = None) -> Copied:
        """A copy of the keys; ``device``: where to, by default where they are."""
        layers: dict[int, KeyValues] = {}
        for table, group in zip(self.tables.each, self.memory.groups, strict=True):
            places = group.places_of(table)
            for i, pair in group.tensors.items():
                layers[i] = KeyValues(*(x.index_select(0, places).to(device) for x in pair))
        return Copied(dict(sorted(layers.items())))


Kept = Held | Copied


class Group:
    """The memory of layers that share blocks: ``count`` blocks, of which a sequence has up to ``width`` in all.

    Two more belong to nobody: one holds zeros, the other what is thrown away.
    """

    def __init__(
        self, layers: list[KeptLayer], count: int, dtype: torch.dtype, device: torch.device, size: int, piece: int,
        width: int,
    ) -> None:  # fmt: skip
        self.layers, self.device, self.width = layers, device, width
        self.blocks = Blocks(count, size, layers[0].window, piece)
        self.zeros, self.waste = count, count + 1
        self.token_bytes = token_bytes(layers, dtype)
        self.block_bytes = self.token_bytes * size

        def places(heads: int, dim: int) -> Tensor:
            x = torch.empty((count + 2) * size, heads, dim, dtype=dtype, device=device)
            x[count * size :] = 0
            return x

        self.tensors = {x.layer: KeyValues(places(x.kv_heads, x.head_dim), places(x.kv_heads, x.value_dim))
                        for x in layers}  # fmt: skip
        self.offsets = torch.arange(size)

    def reserve(self, table: Table, tokens: int) -> None:
        """Make room for ``tokens`` more."""
        if copy := table.reserve(tokens):
            source, target = (slice(block * self.blocks.size, (block + 1) * self.blocks.size) for block in copy)
            for pair in self.tensors.values():
                for x in pair:
                    x[target] = x[source]

    def copy_of(self, table: Table) -> Table:
        """A table with the same keys in blocks of its own.

        Raises:
            OutOfBlocks: too few are free.
        """
        return self.filled({i: KeyValues(*(x[self.places_of(table)] for x in pair))
                            for i, pair in self.tensors.items()}, table.length)  # fmt: skip

    def filled(self, keys: dict[int, KeyValues], length: int) -> Table:
        """A table of a sequence of ``length`` tokens with these keys of the last ones.

        Raises:
            OutOfBlocks: too few are free.
        """
        passed = self.blocks.passed(length)
        table = Table(self.blocks, self.blocks.take(self.blocks.needed(length) - passed), length, passed)
        places = self.places_of(table)
        for i, pair in keys.items():
            for x, new in zip(self.tensors[i], pair, strict=True):
                count = min(len(new), len(places))  # an engine with blocks of another size has kept more or fewer
                x.index_fill_(0, places[: len(places) - count], 0)
                x.index_copy_(0, places[len(places) - count :], new[len(new) - count :].to(self.device, x.dtype))
        return table

    def places_of(self, table: Table) -> Tensor:
        """(tokens,) places of all tokens of a sequence whose keys are there."""
        return self._places(table, table.length)[table.passed * self.blocks.size :].to(self.device)

    def places(self, tables: Sequence[Table | None], tokens: int) -> Places:
        """Where ``tokens`` new ones of each row go, for which room was made. A row without a table is thrown away."""
        lengths = [table.length if table else 0 for table in tables]
        total, size = max(lengths) + tokens, self.blocks.size
        keys = torch.full((len(tables), total), self.zeros * size)
        for row, table in enumerate(tables):
            if table:
                keys[row, total - lengths[row] - tokens :] = self._places(table, lengths[row] + tokens)
            else:
                keys[row, total - tokens :] = self.waste * size + self.offsets[torch.arange(tokens) % size]
        mask = None
        if len(set(lengths)) > 1:
            first = total - tokens - torch.tensor(lengths)
            mask = (torch.arange(total) >= first[:, None]).to(self.device)
        keys = keys.to(self.device)
        return Places(keys, keys[:, total - tokens :].flatten(), mask)

    def _places(self, table: Table, tokens: int) -> Tensor:
        """(tokens,) places of a sequence's first tokens, zeros for what has gone back."""
        blocks = torch.tensor(([self.zeros] * table.passed + table.blocks)[: self.blocks.needed(tokens)])
        return (blocks.long()[:, None] * self.blocks.size + self.offsets).flatten()[:tokens]


class KeptKeys:
    """The memory of all layers that keep keys.

    Args:
        counts: blocks of each group of layers, as :func:`by_window` gives them.
        width: maximum number of blocks for the tokens of a sequence.
    """

    def __init__(
        self, layers: list[KeptLayer], counts: Sequence[int], dtype: torch.dtype, device: torch.device,
        size: int = BLOCK, piece: int = 1, width: int = 0,
    ) -> None:  # fmt: skip
        self.layers, self.size, self.width, self.device = layers, size, width, device
        self.groups = [Group(of, count, dtype, device, size, piece, width)
                       for of, count in zip(by_window(layers).values(), counts, strict=True)]  # fmt: skip

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [layer[:4] for layer in self.layers]

    @property
    def token_bytes(self) -> int:
        """Bytes that each token adds."""
        return sum(group.token_bytes for group in self.groups if not group.blocks.window)

    @property
    def window_bytes(self) -> int:
        """Bytes of a sequence's keys in layers that see a window, once it is full."""
        return sum(group.token_bytes * group.blocks.window for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Of all blocks, free or not."""
        return sum(group.block_bytes * group.blocks.count for group in self.groups)

    @property
    def held_bytes(self) -> int:
        """Of the blocks in use."""
        return sum(group.block_bytes * group.blocks.held for group in self.groups)

    @property
    def free(self) -> list[int]:
        """Free blocks of each group."""
        return [group.blocks.free for group in self.groups]

    def lacking(self, before: int, shared: bool, tokens: int) -> list[int]:
        """Blocks of each group for a sequence of ``before`` tokens, perhaps in shared blocks, and ``tokens`` more."""

        def count(pool: Blocks) -> int:
            own = before % pool.size > 0 if shared else pool.needed(before) - pool.passed(before)
            # A cached prefix's last block may have to be copied; its others make up for that only without a window.
            copy = pool.window > 0
            return own + pool.added(before, tokens) + copy

        return [count(group.blocks) for group in self.groups]

    def takes(self, kept: Kept | None, length: int) -> bool:
        """Whether a sequence of ``length`` tokens can go on from ``kept``."""
        if kept is None or kept.shapes != self.shapes:
            return False
        if isinstance(kept, Held):
            return kept.memory.layers == self.layers
        return all(
            len(kept.layers[x.layer].k) >= min(length, x.window - 1 if x.window else length) for x in self.layers
        )

    def empty(self) -> Tables:
        return Tables(Table(group.blocks) for group in self.groups)

    def reserve(self, tables: Tables, tokens: int) -> None:
        """Make room for ``tokens`` more."""
        for group, table in zip(self.groups, tables.each, strict=True):
            group.reserve(table, tokens)

    def tables_of(self, kept: Kept, length: int) -> Tables:
        """Tables of its own for a sequence that goes on from ``kept``, which has ``length`` tokens.

        Raises:
            OutOfBlocks: too few are free for a copy.
        """
        if isinstance(kept, Held) and kept.memory is self:
            return kept.tables.fork()
        keys = kept.copied(self.device).layers
        return Tables(group.filled({i: keys[i] for i in group.tensors}, length) for group in self.groups)

    def held(self, tables: Tables) -> Held:
        """The keys so far of a sequence that goes on. Where the window will pass them, they are copied: the sequence
        counts on using its blocks again.

        Raises:
            OutOfBlocks: too few are free for the copy.
        """
        return Held(self, Tables(group.copy_of(table) if group.blocks.window else table.fork()
                                 for group, table in zip(self.groups, tables.each, strict=True)))  # fmt: skip


class Places(NamedTuple):
    """Where the keys of a call's rows lie.

    keys: (B, L), padded on the left with places of zeros; new: (B T,), those of the new tokens; mask: (B, L) bool,
    False for padding, or None if all rows are of one length.
    """

    keys: Tensor
    new: Tensor
    mask: Tensor | None

    @property
    def before(self) -> int:
        """Keys of the longest row before this call."""
        return self.keys.shape[1] - len(self.new) // len(self.keys)


@dataclass
class Call:
    """Which keys a call sees: ``places`` of each group of layers, or ``blocks``, about which only the device knows."""

    places: list[Places] = field(default_factory=list)
    blocks: tuple[Sequence[Tensor], Tensor] | None = None


class PagedCache(DynamicCache):
    """transformers' cache, with keys of kept heads in blocks.

    Its layers refer to its call, not to the cache, so its memory is free as soon as nothing refers to the cache.
    """

    def __init__(self, memory: KeptKeys) -> None:
        super().__init__()
        self.memory, self.call = memory, Call()

    @property
    def padding(self) -> dict[str, Tensor]:
        """What the model has to be told of padding among the keys."""
        places = self.call.places
        return {"attention_mask": places[0].mask} if places and places[0].mask is not None else {}

    def install(self) -> None:
        """Put a layer on the memory wherever the model keeps keys, once the others are there."""
        for number, group in enumerate(self.memory.groups):
            for layer, keys in group.tensors.items():
                while len(self.layers) <= layer:
                    self.layers.append(DynamicLayer())
                paged, own = PagedLayer(self.call, number, keys, self.memory.size), self.layers[layer]
                if isinstance(own, SplitCacheLayer):
                    own.kept = paged
                else:
                    self.layers[layer] = paged

    def see_blocks(self, tables: Sequence[Tensor], positions: Tensor) -> None:
        """Prepare for a call with one new token in each row, about which only the device knows: tables (B, W) of each
        group and positions (B,) are read there, so the call can be a CUDA graph."""
        self.call.places, self.call.blocks = [], (tables, positions)

    def see(self, tables: Sequence[Tables | None], tokens: int) -> int:
        """Prepare for a call with ``tokens`` new ones in each row; returns how many keys the longest has already."""
        self.call.blocks = None
        self.call.places = [group.places([each.each[i] if each else None for each in tables], tokens)
                            for i, group in enumerate(self.memory.groups)]  # fmt: skip
        for each in filter(None, tables):
            each.advance(tokens)
        return self.call.places[0].before


class PagedLayer(AttendingLayer):
    """transformers' view of one layer's kept keys: ``update`` stores new ones, and gives back those of all tokens.

    If only the device knows where they are, this layer attends itself, straight to the blocks.
    """

    is_sliding = False

    def __init__(self, call: Call, group: int, memory: KeyValues, size: int) -> None:
        super().__init__()
        self.call, self.group, self.memory, self.size, self.is_initialized = call, group, memory, size, True

    @property
    def attends(self) -> bool:  # type: ignore[override]
        return self.call.blocks is not None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None,
        subset: HeadSubset | None = None,
    ) -> Tensor:  # fmt: skip
        assert self.call.blocks is not None
        heads = k.shape[1] if subset is None else len(subset.heads)
        if any(x.shape[1:] != (heads, k.shape[3]) for x in self.memory) or k.shape != v.shape:
            raise RuntimeError("Attention to keys in blocks does not support a family that keeps compressed keys.")
        if q.dtype != self.memory.k.dtype:
            raise RuntimeError(f"Attention to keys in blocks does not support {q.dtype} queries of this model.")
        tables, positions = self.call.blocks
        asked = positions, self.size, scale, softcap, window or 0, subset
        return paged_attention(q, k, v, self.memory, tables[self.group], *asked).transpose(1, 2)

    @property
    def places(self) -> Places:
        return self.call.places[self.group]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """k, v (B, G, T, D) -> (B, G, L, D)."""
        if self.attends:
            return key_states, value_states
        k, v = map(self._stored, self.memory, (key_states, value_states))
        return k, v

    def _stored(self, memory: Tensor, new: Tensor) -> Tensor:
        memory.index_copy_(0, self.places.new, new.transpose(1, 2).flatten(0, 1))
        keys = self.places.keys
        return memory.index_select(0, keys.flatten()).unflatten(0, keys.shape).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.attends else self.places.before

    def get_max_length(self) -> int:
        return -1
