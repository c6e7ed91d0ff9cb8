"""The requests that run, each in a slot of the table, and those that had to leave it for a while."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lolcats.inference.engine.blocks import Tables
from lolcats.inference.engine.request import Request
from lolcats.inference.engine.states import PrefillCache, SlotTable


class Slots:
    """Running requests are slots 0 .. n−1: when one leaves, the last takes its place.

    inputs: (2, slots), on the host: each slot's newest token, whose key is not in the state yet, and its position.
    paused: requests that gave their blocks of kept keys back, the oldest first.
    """

    def __init__(self, table: SlotTable, pinned: bool) -> None:
        self.table = table
        self.running: list[Request] = []
        self.paused: list[Request] = []
        self.inputs = torch.zeros(2, table.slots, dtype=torch.long, pin_memory=pinned)

    @property
    def full(self) -> bool:
        return len(self.running) == self.table.slots

    def add(self, requests: Sequence[Request], cache: PrefillCache) -> range:
        """Give requests that share a prefill the next slots; their first tokens are still to come."""
        begin = len(self.running)
        self.running += requests
        self.table.put(begin, cache.states())
        self.table.tables[begin : begin + len(cache.tables)] = cache.tables
        for slot, request in enumerate(requests, begin):
            self.inputs[1, slot] = request.first - 1  # counted up as its first token comes
            request.cache = None
        return range(begin, len(self.running))

    def free(self, slot: int) -> None:
        """Nothing is in this slot any more; the last request moves there."""
        last, end = self.running.pop(), len(self.running)
        if slot < end:
            self.table.move(end, slot)
            self.running[slot] = last
            self.inputs[:, slot] = self.inputs[:, end]
        self.table.leave(end)
        self.inputs[:, end] = 0  # a row that is computed and thrown away: any token, and a position that exists

    def pause(self, request: Request) -> None:
        """Move what a running request remembers to the host."""
        slot = self.running.index(request)
        request.paused = self.table.take(slot, request.history[:-1]).to_host()
        self.free(slot)
        self.paused = sorted([*self.paused, request], key=lambda request: request.number)

    def resume(self, tables: Tables) -> None:
        """Let the oldest paused request go on, with its keys in the blocks of ``tables``."""
        request, slot = self.paused.pop(0), len(self.running)
        assert request.paused is not None
        self.table.put(slot, request.paused.layers)
        self.table.tables[slot] = tables
        self.running.append(request)
        self.inputs[:, slot] = torch.tensor([request.history[-1], len(request.history) - 1])
        request.paused = None

    def clear(self) -> None:
        """Empty all slots; paused requests stay."""
        self.running.clear()
        self.inputs.zero_()
        self.table.clear()
