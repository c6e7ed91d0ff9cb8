"""Where hidden states between layers are kept: nowhere (token ids), in host memory, or on disk in checksummed shards.

Shapes: N rows of a batch, T tokens, E hidden size.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lolcats.data.rows import Data, Item
from lolcats.errors import LolcatsError, first_line
from lolcats.files import write_text
from lolcats.modeling.skeleton import Skeleton
from lolcats.ranks import Ranks
from lolcats.stages.transfer.visits import VALIDATION, Batch, Visits

Split = Tensor | Dataset[Item]
Inputs = tuple[Tensor, Tensor | None]
"""What a group of layers receives: token ids or hidden states, and position ids if rows hold several documents."""
SHARD = 1 << 28  # bytes of hidden states per file, unless a single step needs more


class Source(Protocol):
    """Where a group of layers reads its input."""

    def read(self, batch: Batch) -> Tensor:
        """(N, T) token ids or (N, T, E) hidden states of a non-empty batch."""


class Target(Protocol):
    """Where a group of layers writes the teacher's hidden states."""

    def wants(self, step: int) -> bool:
        """Whether the rows of this step (or ``VALIDATION``) still have to be written."""

    def write(self, batch: Batch, hidden: Tensor) -> None: ...

    def done(self, step: int) -> None:
        """Called once a step has been written, and with ``VALIDATION`` once everything has."""


class Tokens:
    """Token ids, for a model that embeds them itself."""

    def __init__(self, train: Split, validation: Split) -> None:
        self.train, self.validation = train, validation

    def read(self, batch: Batch) -> Tensor:
        return token_rows(self.validation if batch.step == VALIDATION else self.train, batch.rows)


class Positions:
    """Position ids of a batch's rows, which start again with each document of a row.

    They follow from the rows, so hidden states are kept without them.
    """

    def __init__(self, data: Data) -> None:
        self.apart = bool(data.positions)
        self.splits: tuple[Any, Any] = data.dataset("train"), data.dataset("validation")

    def read(self, batch: Batch) -> Tensor | None:
        """(N, T) of a non-empty batch; None if each row is one sequence."""
        if not self.apart:
            return None
        rows = self.splits[batch.step == VALIDATION]
        return torch.stack([rows[int(row)]["position_ids"] for row in batch.rows])


class Embeddings(Tokens):
    """Embeddings of the token ids, the input of the first layer. Use inside ``skeleton.brought([-1])``."""

    def __init__(self, data: Data, skeleton: Skeleton) -> None:
        super().__init__(data.train, data.validation)
        self.skeleton, self.positions = skeleton, Positions(data)

    def read(self, batch: Batch) -> Tensor:
        positions, device = self.positions.read(batch), self.skeleton.device
        return self.skeleton.embed(super().read(batch).to(device), None if positions is None else positions.to(device))


class Nowhere:
    """For layers whose output is not needed."""

    def wants(self, step: int) -> bool:
        return False

    def write(self, batch: Batch, hidden: Tensor) -> None:
        raise AssertionError("Nowhere takes no hidden states")

    def done(self, step: int) -> None:
        pass


class HostStates:
    """One tensor per batch in host memory (pinned for a GPU), read and overwritten by one layer after another."""

    def __init__(self, device: torch.device, validation: bool) -> None:
        self.device, self.validation = device, validation
        self._tensors: dict[tuple[bool, int], Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, batch: Batch) -> Tensor:
        return self._tensors[_key(batch)]

    def wants(self, step: int) -> bool:
        return step != VALIDATION or self.validation

    def write(self, batch: Batch, hidden: Tensor) -> None:
        key = _key(batch)
        if key not in self._tensors:  # one per batch: pinned allocations are rounded up to powers of two
            self._tensors[key] = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            self._tensors[key].copy_(hidden)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._tensors[key].copy_(hidden, non_blocking=True)
        hidden.record_stream(self._stream)

    def done(self, step: int) -> None:
        if step == VALIDATION and self._stream is not None:
            self._stream.synchronize()


class Boundary:
    """The hidden states that enter one layer, for all visits, in files that each hold whole optimizer steps.

    Args:
        shape: (T, E); dtype: bfloat16, or float32 for fp32 models.
        validation: number of validation rows.
    """

    def __init__(
        self, directory: Path, visits: Visits, validation: int, shape: tuple[int, int], dtype: torch.dtype, ranks: Ranks
    ) -> None:  # fmt: skip
        self.directory, self.shape, self.dtype, self.ranks = directory, shape, dtype, ranks
        chunks = visits.chunks(max(1, SHARD // self._row_bytes))
        self._shard_of = {step: number for number, steps in enumerate(chunks) for step in steps}
        self._shard_of[VALIDATION] = VALIDATION
        self._rows = {n: range(visits.steps[c[0]].start, visits.steps[c[-1]].stop) for n, c in enumerate(chunks)}
        self._rows[VALIDATION] = range(validation)
        self._ends = {steps[-1] for steps in chunks} | {VALIDATION}
        self._written = set(ranks.shared([n for n in self._rows if self._record(n).exists()]))
        self._reading: tuple[int, Tensor] | None = None
        self._writing: tuple[int, Tensor] | None = None

    @property
    def complete(self) -> bool:
        return self._written == set(self._rows)

    @property
    def missing_bytes(self) -> int:
        return sum(len(self._rows[n]) * self._row_bytes for n in self._rows if n not in self._written)

    @property
    def _row_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def wants(self, step: int) -> bool:
        return self._shard_of[step] not in self._written

    def read(self, batch: Batch) -> Tensor:
        number = self._shard_of[batch.step]
        if self._reading is None or self._reading[0] != number:
            self._reading = (number, self._verified(number))
        return self._reading[1][self._place(number, batch)]

    def write(self, batch: Batch, hidden: Tensor) -> None:
        number = self._shard_of[batch.step]
        if self._writing is None or self._writing[0] != number:
            self.directory.mkdir(parents=True, exist_ok=True)
            _allocate(self._partial(number), len(self._rows[number]) * self._row_bytes)
            self._writing = (number, self._map(self._partial(number), number, shared=True))
        self._writing[1][self._place(number, batch)].copy_(hidden)

    def done(self, step: int) -> None:
        if step not in self._ends or not self.wants(step):
            return
        number, self._writing = self._shard_of[step], None
        self.ranks.wait()
        if self.ranks.is_first:
            partial = self._partial(number)
            descriptor = os.open(partial, os.O_RDWR)
            os.fsync(descriptor)
            os.close(descriptor)
            checksum = zlib.crc32(_bytes(self._map(partial, number, shared=False)))
            partial.replace(self._file(number))
            write_text(self._record(number), json.dumps({**self._description(number), "crc32": checksum}))
        self.ranks.wait()
        self._written.add(number)

    def remove(self) -> None:
        self._reading = self._writing = None
        if self.ranks.is_first:
            for record in self.directory.glob("*.json"):  # first: files without a record are ignored
                record.unlink()
            shutil.rmtree(self.directory, ignore_errors=True)
        self._written.clear()
        self.ranks.wait()

    def _verified(self, number: int) -> Tensor:
        path = self._file(number)
        again = f"Remove {self.directory} and run again to recompute the hidden states."
        try:
            record = json.loads(self._record(number).read_text())
            size = path.stat().st_size
        except (OSError, ValueError):
            raise LolcatsError(f"{path} (hidden states) is missing, or its record is. {again}") from None
        if {k: v for k, v in record.items() if k != "crc32"} != self._description(number):
            raise LolcatsError(f"{path} holds hidden states of another run. {again}")
        if size == len(self._rows[number]) * self._row_bytes:
            tensor = self._map(path, number, shared=False)
            if zlib.crc32(_bytes(tensor)) == record["crc32"]:
                return tensor
        raise LolcatsError(f"{path} (hidden states) is damaged: its size or checksum is wrong. {again}")

    def _map(self, path: Path, number: int, shared: bool) -> Tensor:
        shape = (len(self._rows[number]), *self.shape)
        size = shape[0] * shape[1] * shape[2]
        try:
            return torch.from_file(str(path), shared=shared, size=size, dtype=self.dtype).view(shape)
        except RuntimeError as error:
            raise LolcatsError(f"Cannot map {path} into memory ({first_line(error)}).") from None

    def _place(self, number: int, batch: Batch) -> slice:
        start = self._rows[number].start
        return slice(batch.visits.start - start, batch.visits.stop - start)

    def _description(self, number: int) -> dict[str, object]:
        return {"rows": len(self._rows[number]), "shape": list(self.shape), "dtype": str(self.dtype)}

    def _file(self, number: int) -> Path:
        return self.directory / ("validation.bin" if number == VALIDATION else f"{number:05d}.bin")

    def _partial(self, number: int) -> Path:
        return self._file(number).with_suffix(".partial")

    def _record(self, number: int) -> Path:
        return self._file(number).with_suffix(".json")


def feed(
    source: Source, positions: Positions, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Batch, Inputs | None]]:
    """Yield batches with their inputs, on the device; None for an empty batch.

    On a GPU, the next batch is copied from pinned memory while the caller works on the current one.
    """

    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(batch: Batch) -> tuple[Batch, Inputs | None]:
        if not batch.visits:
            return batch, None
        x, places = source.read(batch), positions.read(batch)
        with nullcontext() if side is None else torch.cuda.stream(side):
            x = x.to(device, non_blocking=side is not None)
            places = None if places is None else places.to(device, non_blocking=side is not None)
        return batch, (x, places)

    if side is None:
        yield from map(begin, batches)
        return
    main = torch.cuda.current_stream(device)
    coming = None
    for batch in batches:
        here, coming = coming, begin(batch)
        if here is not None:
            yield here
        main.wait_stream(side)
        for tensor in coming[1] or ():
            if tensor is not None:
                tensor.record_stream(main)
    if coming is not None:
        yield coming


def token_rows(split: Split, rows: Tensor) -> Tensor:
    """(N, T) token ids of some rows of a tensor, or of a data set that reads them on access."""
    if isinstance(split, Tensor):
        return split[rows]
    return torch.stack([split[int(row)]["input_ids"] for row in rows])


def _allocate(path: Path, size: int) -> None:
    """Reserve the disk space now: on a disk that is full, writing to a mapped file kills the process by a signal."""
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _key(batch: Batch) -> tuple[bool, int]:
    return batch.step == VALIDATION, batch.visits.start


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
