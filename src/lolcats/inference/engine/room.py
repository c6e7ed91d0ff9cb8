"""Room for kept keys: how many blocks there are, who may begin, and who can give some back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.inference.engine.blocks import Blocks, OutOfBlocks, Tables
from lolcats.inference.engine.kept import Held, KeptKeys, KeptLayer, by_window, kept_layers, token_bytes
from lolcats.inference.engine.request import Request
from lolcats.inference.engine.states import PrefixCache, Snapshot
from lolcats.memory import free_host_memory
from lolcats.modeling.layer import linearized_layers

SHARE = 0.85
"""Of a GPU's free memory that blocks may take; the rest is for activations and graphs."""
HOST_SHARE = 0.5
TAKEN = (
    "The keys of this request do not fit into memory: saved states or cached prefixes that are still in use hold "
    "{held} of {count} blocks{of}."
)


class Room:
    """The blocks of an engine, and how many tokens a sequence may have.

    Args:
        context: tokens of prompt and answer together; 0 for the model's own limit, or fewer if they do not fit.
        memory: bytes for kept keys; by default as many as ``slots`` sequences of ``context`` tokens take, or as the
            free memory allows.
        block: tokens of a block.
    """

    def __init__(
        self, model: PreTrainedModel, slots: int, context: int, memory: int | None, prefixes: PrefixCache, block: int
    ) -> None:
        layers = kept_layers(model)
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 8192
        shares = [Share.of(x, model.dtype, context or own, block, prefixes.piece) for x in by_window(layers).values()]
        most = _free(model, slots) if memory is None else memory
        one = sum(share.nbytes for share in shares)
        if memory is None:
            most = min(most, slots * one + prefixes.limit)
        counts = split(shares, most, slots)
        least = [share.wanted if context else min(2, share.wanted) for share in shares]
        if any(count < few for count, few in zip(counts, least, strict=True)):
            needed = sum(few * share.block_bytes for few, share in zip(least, shares, strict=True)) >> 20
            raise LolcatsError(
                f"A sequence of {context or block} tokens takes {needed} MiB for the keys of kept heads, and there "
                f"is room for {most >> 20} MiB. Allow fewer tokens (--max-context) or more memory."
            )
        fits = (count if count < share.wanted else share.whole for count, share in zip(counts, shares, strict=True))
        self.context = context or min(own, (min(fits) - 1) * block)
        width = -(-self.context // block)
        self.kept = KeptKeys(layers, counts, model.dtype, model.device, block, prefixes.piece, width)
        self.prefixes, self.short = prefixes, False
        """``short``: whether the last request that asked found too few blocks."""

    def check(self, request: Request) -> None:
        """Refuse what would exceed the context."""
        before = len(request.start.tokens) if request.start else 0
        tokens, new = before + len(request.prompt), request.params.max_tokens
        if tokens + new > self.context:
            raise LolcatsError(
                f"prompt: a prompt of {tokens} tokens and {new} tokens to generate exceed the context of "
                f"{self.context} tokens, which is what memory for kept keys allows."
            )

    def has(self, counts: Sequence[int]) -> bool:
        """Whether so many blocks of each group are free, if need be after cached prefixes were dropped."""
        if not self._lack(counts):
            return True
        after = [free + cached for free, cached in zip(self.kept.free, self._cached(), strict=True)]
        if any(count > most for count, most in zip(counts, after, strict=True)):
            return False
        while self._lack(counts):
            self.prefixes.evict()
        return True

    def _lack(self, counts: Sequence[int]) -> bool:
        return any(count > group.blocks.free for count, group in zip(counts, self.kept.groups, strict=False))

    def fits(self, request: Request, running: int) -> bool:
        """Whether there are blocks for all tokens that a request has so far, and one for each running one."""
        self.short = not self.has([count + running for count in self._lacking(request)])
        return not self.short

    def _lacking(self, request: Request, more: int = 1) -> list[int]:
        """Blocks for the tokens so far and ``more``, without those that it shares with the state it goes on from."""
        start = request.paused or request.start
        before = len(start.tokens) if start else 0
        shared = start is not None and isinstance(start.kept, Held) and start.kept.memory is self.kept
        return self.kept.lacking(before, shared, len(request.history) + more - before)

    def alike(self, request: Request, most: int) -> int:
        """How many prompts of this one's length, at most ``most``, may begin together."""
        each = zip(self.kept.free, self._lacking(request, 0), strict=True)
        return max(1, min([most, *(free // count for free, count in each if count)]))

    def begin(self, start: Snapshot | None, tokens: int) -> Tables:
        """Blocks for a prompt of ``tokens`` tokens that goes on from ``start``."""
        if start is None or start.kept is None:
            tables = self.kept.empty()
        else:
            tables = self.kept.tables_of(start.kept, len(start.tokens))
        self.kept.reserve(tables, tokens)
        return tables

    def taken(self) -> OutOfBlocks:
        """The error of a request that found too few blocks, although nothing else runs."""
        pool = max((group.blocks for group in self.kept.groups), key=lambda x: x.held / max(1, x.count))
        seen = f"a window of {pool.window} tokens" if pool.window else "all tokens"
        of = f" of the layers that see {seen}" if len(self.kept.groups) > 1 else ""
        return OutOfBlocks(TAKEN.format(held=pool.held, count=pool.count, of=of))

    def _cached(self) -> list[int]:
        """Blocks of each group that nothing but cached prefixes hold."""
        held = [Counter[int]() for _ in self.kept.groups]
        for entry in self.prefixes.entries.values():
            if isinstance(entry.kept, Held):
                for counter, table in zip(held, entry.kept.tables.each, strict=True):
                    counter.update(table.blocks)
        return [
            sum(group.blocks.holders[block] == count for block, count in counter.items())
            for group, counter in zip(self.kept.groups, held, strict=True)
        ]


@dataclass(frozen=True)
class Share:
    """What a sequence takes of a group's memory.

    wanted: maximum number of its blocks at a time, and one more, since a sequence that forks copies a block; whole: the
    blocks for all its tokens, and one more; block_bytes: of one block.
    """

    wanted: int
    whole: int
    block_bytes: int

    @classmethod
    def of(cls, layers: list[KeptLayer], dtype: torch.dtype, context: int, block: int, piece: int) -> Share:
        pool = Blocks(0, block, layers[0].window, piece)
        return cls(pool.most(context), pool.needed(context) + 1, token_bytes(layers, dtype) * block)

    @property
    def nbytes(self) -> int:
        return self.wanted * self.block_bytes


def sequence_bytes(layers: list[KeptLayer], dtype: torch.dtype, context: int, block: int, piece: int) -> int:
    """Bytes of kept keys for each slot, if a sequence may have ``context`` tokens."""
    return sum(Share.of(x, dtype, context, block, piece).nbytes for x in by_window(layers).values())


def split(shares: Sequence[Share], memory: int, slots: int) -> list[int]:
    """Blocks of each group in ``memory`` bytes.

    If there is memory for several sequences, those of windows, which do not grow, come first: enough for all slots, if
    they take at most half. The first group, which may be of layers that see all keys, gets what is left.
    """
    one, counts = sum(share.nbytes for share in shares), list[int]()
    for share in shares[1:]:
        equal = share.wanted * memory // one
        counts.append(max(equal, min(slots * share.wanted, memory // 2 // len(shares[1:]) // share.block_bytes)))
    left = memory - sum(count * share.block_bytes for count, share in zip(counts, shares[1:], strict=True))
    return [left // shares[0].block_bytes, *counts]


def newest(requests: Sequence[Request]) -> Request:
    """The one that came last."""
    return max(requests, key=lambda request: request.number)


def _free(model: PreTrainedModel, slots: int) -> int:
    """Bytes that blocks may take beside the states of all slots."""
    if model.device.type != "cuda":
        return int(free_host_memory() * HOST_SHARE)
    torch.cuda.empty_cache()
    return int((torch.cuda.mem_get_info(model.device)[0] - slots * state_bytes(model)) * SHARE)


def state_bytes(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one sequence's state, whatever its length, with sums in ``dtype``."""
    total = 0
    for layer in linearized_layers(model):
        g = layer.geometry
        k = torch.empty(1, g.kv_heads, 0, layer.spec.channels(g.head_dim), dtype=model.dtype, device="meta")
        total += layer.empty_state(k, k[..., : g.value_dim], dtype).nbytes
    return total
