"""Room for kept keys: how many blocks there are, who may begin, and who can give some back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.inference.engine.blocks import OutOfBlocks, Table
from lolcats.inference.engine.kept import Held, KeptKeys, kept_layers
from lolcats.inference.engine.request import Request
from lolcats.inference.engine.states import PrefixCache, Snapshot
from lolcats.memory import free_host_memory
from lolcats.modeling.layer import linearized_layers

SHARE = 0.85
"""Of a GPU's free memory that blocks may take; the rest is for activations and graphs."""
HOST_SHARE = 0.5
TAKEN = (
    "The keys of this request do not fit into memory: saved states or cached prefixes that are still in use hold "
    "{held} of {count} blocks."
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
        wanted = -(-(context or own) // block) + 1  # one more, since a sequence that forks copies a block
        one = KeptKeys(layers, 0, model.dtype, torch.device("meta"), block).block_bytes
        most = (_free(model, slots) if memory is None else memory) // one
        count = min(most, slots * wanted + prefixes.limit // one) if memory is None else most
        if count < (wanted if context else 2):
            raise LolcatsError(
                f"A sequence of {context or block} tokens takes {max(wanted if context else 2, 2) * one >> 20} MiB for "
                f"the keys of kept heads, and there is room for {count * one >> 20} MiB. Allow fewer tokens "
                "(--max-context) or more memory."
            )
        self.context = context or min(own, (count - 1) * block)
        self.kept = KeptKeys(layers, count, model.dtype, model.device, block, -(-self.context // block))
        self.prefixes, self.short = prefixes, False
        """``short``: whether the last request that asked found too few blocks."""

    def check(self, request: Request) -> None:
        """Refuse what would exceed the context."""
        before = len(request.start.tokens) if request.start else 0
        tokens, new = before + len(request.prompt), request.params.max_tokens
        if tokens + new > self.context:
            raise LolcatsError(
                f"prompt: {tokens} tokens of prompt and {new} to generate are more than the context of {self.context} "
                "tokens that this model's keys have room for."
            )

    def has(self, count: int) -> bool:
        """Whether ``count`` blocks are free, if need be after cached prefixes were dropped."""
        free = self.kept.blocks.free
        if count > free and count > free + self._cached():
            return False
        while count > self.kept.blocks.free:
            self.prefixes.evict()
        return True

    def fits(self, request: Request, running: int) -> bool:
        """Whether there are blocks for all tokens that a request has so far, and one for each running one."""
        self.short = not self.has(self._lacking(request) + running)
        return not self.short

    def _lacking(self, request: Request) -> int:
        """Blocks for the tokens so far and one more, without those that it shares with the state it goes on from."""
        start, shared = request.start.kept if request.start else None, 0
        if isinstance(start, Held) and start.memory is self.kept and request.paused is None:
            shared = start.table.length // self.kept.blocks.size
        return self.kept.blocks.needed(len(request.history) + 1) - shared

    def alike(self, request: Request, most: int) -> int:
        """How many prompts of this one's length, at most ``most``, may begin together."""
        return max(1, min(most, self.kept.blocks.free // self.kept.blocks.needed(len(request.prompt))))

    def begin(self, start: Snapshot | None, tokens: int) -> Table:
        """Blocks for a prompt of ``tokens`` tokens that goes on from ``start``."""
        table = Table(self.kept.blocks) if start is None or start.kept is None else self.kept.table_of(start.kept)
        self.kept.reserve(table, tokens)
        return table

    def taken(self) -> OutOfBlocks:
        """The error of a request that found too few blocks, although nothing else runs."""
        return OutOfBlocks(TAKEN.format(held=self.kept.blocks.held, count=self.kept.blocks.count))

    def _cached(self) -> int:
        """Blocks that nothing but cached prefixes hold."""
        held: Counter[int] = Counter()
        for entry in self.prefixes.entries.values():
            if isinstance(entry.kept, Held):
                held.update(entry.kept.table.blocks)
        return sum(self.kept.blocks.holders[block] == count for block, count in held.items())


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
