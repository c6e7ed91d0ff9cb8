"""Keys and values of kept heads and kept layers, in blocks that sequences take as they grow.

One memory for the whole engine, allocated once: for each layer keys and values (places, G, D), where a place is a
token of a block. A call of the model sees it through :class:`PagedCache`, which has a cache layer on this memory
wherever the model keeps keys. The base model's own attention then gets what it would get from transformers' cache:
all keys of each row, padded on the left, so masks, windows, scales and caps are the family's.

Shapes: B rows, G kept key/value heads of a layer, T new tokens, L keys of the longest row, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lolcats.attention.paged import paged_attention
from lolcats.attention.state import KeyValues
from lolcats.inference.engine.blocks import Blocks, Table
from lolcats.modeling.cache import AttendingLayer, SplitCacheLayer

BLOCK = 64
"""Tokens of a block."""


class KeptLayer(NamedTuple):
    """A layer that keeps keys, and of how many key/value heads; head_dim is D of keys, value_dim that of values."""

    layer: int
    kv_heads: int
    head_dim: int
    value_dim: int


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
            found.append(KeptLayer(index, own.keys.shape[1], own.keys.shape[3], own.values.shape[3]))
    return found


def token_bytes(layers: Sequence[KeptLayer], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values."""
    return sum(x.kv_heads * (x.head_dim + x.value_dim) for x in layers) * dtype.itemsize


@dataclass(frozen=True)
class Copied:
    """A sequence's kept keys and values by layer, (tokens, G, D), apart from any engine."""

    layers: dict[int, KeyValues]

    @property
    def shapes(self) -> list[KeptLayer]:
        return [KeptLayer(i, x.k.shape[1], x.k.shape[2], x.v.shape[2]) for i, x in sorted(self.layers.items())]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    def copied(self, device: Any = None) -> Copied:
        return Copied({i: KeyValues(*(x.to(device) for x in pair)) for i, pair in self.layers.items()})


@dataclass(frozen=True)
class Held:
    """The same in blocks of an engine's memory, which stay as they are as long as this lives."""

    memory: KeptKeys
    table: Table

    @property
    def shapes(self) -> list[KeptLayer]:
        return self.memory.layers

    @property
    def nbytes(self) -> int:
        return len(self.table.blocks) * self.memory.block_bytes

    def copied(self, device: Any = None) -> Copied:
        """A copy of the keys; ``device``: where to, by default where they are."""
        places = self.memory.places_of(self.table)

        def copy(x: Tensor) -> Tensor:
            return x.index_select(0, places).to(device)

        return Copied({i: KeyValues(*map(copy, pair)) for i, pair in self.memory.tensors.items()})


Kept = Held | Copied


class KeptKeys:
    """The memory of ``count`` blocks, of which a sequence takes at most ``width``.

    Two more belong to nobody: one holds zeros, the other what is thrown away.
    """

    def __init__(
        self, layers: list[KeptLayer], count: int, dtype: torch.dtype, device: torch.device, size: int = BLOCK,
        width: int = 0,
    ) -> None:  # fmt: skip
        self.layers, self.blocks, self.device, self.width = layers, Blocks(count, size), device, width
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

    @property
    def nbytes(self) -> int:
        """Of all blocks, free or not."""
        return self.block_bytes * self.blocks.count

    @property
    def held_bytes(self) -> int:
        """Of the blocks in use."""
        return self.block_bytes * self.blocks.held

    def reserve(self, table: Table, tokens: int) -> None:
        """Make room for ``tokens`` more."""
        if copy := table.reserve(tokens):
            source, target = (slice(block * self.blocks.size, (block + 1) * self.blocks.size) for block in copy)
            for pair in self.tensors.values():
                for x in pair:
                    x[target] = x[source]

    def table_of(self, kept: Kept) -> Table:
        """A table of its own for a sequence that goes on from ``kept``.

        Raises:
            OutOfBlocks: too few are free for a copy.
        """
        if isinstance(kept, Held) and kept.memory is self:
            return kept.table.fork()
        copied, table = kept.copied(self.device), Table(self.blocks)
        table.reserve(length := len(next(iter(copied.layers.values())).k))
        table.length = length
        places = self.places_of(table)
        for i, pair in copied.layers.items():
            for x, new in zip(self.tensors[i], pair, strict=True):
                x.index_copy_(0, places, new.to(x.dtype))
        return table

    def places_of(self, table: Table) -> Tensor:
        """(tokens,) places of all tokens of a sequence."""
        return self._places(table, table.length).to(self.device)

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
        blocks = torch.tensor(table.blocks[: self.blocks.needed(tokens)], dtype=torch.long)
        return (blocks[:, None] * self.blocks.size + self.offsets).flatten()[:tokens]


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


class PagedCache(DynamicCache):
    """transformers' cache, with keys of kept heads in blocks; ``places`` says which of them a call sees."""

    def __init__(self, memory: KeptKeys) -> None:
        super().__init__()
        self.memory = memory
        self.places: Places | None = None
        self.blocks: tuple[Tensor, Tensor] | None = None

    @property
    def padding(self) -> dict[str, Tensor]:
        """What the model has to be told of padding among the keys."""
        return {} if self.places is None or self.places.mask is None else {"attention_mask": self.places.mask}

    def install(self) -> None:
        """Put a layer on the memory wherever the model keeps keys, once the others are there."""
        for layer in self.memory.layers:
            while len(self.layers) <= layer.layer:
                self.layers.append(DynamicLayer())
            paged, own = PagedLayer(self, self.memory.tensors[layer.layer]), self.layers[layer.layer]
            if isinstance(own, SplitCacheLayer):
                own.kept = paged
            else:
                self.layers[layer.layer] = paged

    def see_blocks(self, tables: Tensor, positions: Tensor) -> None:
        """Prepare for a call with one new token in each row, about which only the device knows: tables (B, W) and
        positions (B,) are read there, so the call can be a CUDA graph."""
        self.places, self.blocks = None, (tables, positions)

    def see(self, tables: Sequence[Table | None], tokens: int) -> int:
        """Prepare for a call with ``tokens`` new ones in each row; returns how many keys the longest has already."""
        self.places, self.blocks = self.memory.places(tables, tokens), None
        for table in filter(None, tables):
            table.length += tokens
        return self.places.before


class PagedLayer(AttendingLayer):
    """transformers' view of one layer's kept keys: ``update`` stores new ones, and gives back those of all tokens.

    If only the device knows where they are, this layer attends itself, straight to the blocks.
    """

    is_sliding = False

    def __init__(self, cache: PagedCache, memory: KeyValues) -> None:
        super().__init__()
        self.cache, self.memory, self.is_initialized = cache, memory, True

    @property
    def attends(self) -> bool:  # type: ignore[override]
        return self.cache.blocks is not None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None
    ) -> Tensor:
        assert self.cache.blocks is not None
        if any(x.shape[1::2] != y.shape[1:] for x, y in zip((k, v), self.memory, strict=True)) or k.shape != v.shape:
            raise RuntimeError("Attention to keys in blocks does not support a family that keeps compressed keys.")
        if q.dtype != self.memory.k.dtype:
            raise RuntimeError(f"Attention to keys in blocks does not support {q.dtype} queries of this model.")
        tables, positions = self.cache.blocks
        size = self.cache.memory.blocks.size
        y = paged_attention(q, k, v, self.memory, tables, positions, size, scale, softcap, window or 0)
        return y.transpose(1, 2)

    @property
    def places(self) -> Places:
        assert self.cache.places is not None
        return self.cache.places

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
