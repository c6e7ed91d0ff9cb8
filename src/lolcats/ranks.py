"""Training of one model by several processes, which torchrun starts; only rank 0 writes files.

The model is not wrapped: sums over ranks are explicit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lolcats.errors import LolcatsError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among the ``size`` processes of a run."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the shared files."""
        return self.rank == 0

    def share(self, whole: range) -> range:
        """This rank's contiguous part; if ``whole`` does not divide evenly, the first ranks get one more."""
        least, more = divmod(len(whole), self.size)
        start = whole.start + self.rank * least + min(self.rank, more)
        return range(start, start + least + (self.rank < more))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype and device over all ranks, in place and in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _together():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with _together():
                dist.barrier()

    def shared(self, value: Any) -> Any:
        """The ``value`` of rank 0, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with _together():
            dist.broadcast_object_list(values)
        return values[0]

    def spread(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``function`` of every item, on every rank: each rank computes every ``size``-th, and the results, which must
        be plain values, are exchanged."""
        own = [function(item) for item in items[self.rank :: self.size]]
        if self.size == 1:
            return own
        everyone: list[list[Result]] = [[] for _ in range(self.size)]
        with _together():
            dist.all_gather_object(everyone, own)
        return [everyone[i % self.size][i // self.size] for i in range(len(items))]

    def agree(self, identity: dict[str, Any]) -> None:
        """Raise LolcatsError on every rank if their ``identity`` differs."""
        if self.size == 1:
            return
        everyone: list[dict[str, Any]] = [{} for _ in range(self.size)]
        with _together():
            dist.all_gather_object(everyone, identity)
        for rank, other in enumerate(everyone):
            for key in everyone[0].keys() | other.keys():
                first, here = everyone[0].get(key), other.get(key)
                if first != here:
                    raise LolcatsError(
                        f"The ranks disagree: {key} is {first!r} on rank 0 and {here!r} on rank {rank}. Start all of "
                        "them with the same command, files and versions."
                    )


def ranks() -> Ranks:
    """This process's rank; the first call under torchrun creates the process group."""
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        with _together():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def is_first() -> bool:
    """Whether this process writes the shared files."""
    return ranks().is_first


@contextmanager
def _together() -> Iterator[None]:
    """Turn the errors that a lost rank causes into a LolcatsError."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise LolcatsError(
            f"Another rank was lost ({first_line(error)}). Saved progress is kept: run the same command "
            "again, with any number of ranks."
        ) from error
