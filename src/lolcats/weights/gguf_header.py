"""Read a GGUF file's header without trusting it: every length is checked against the file before it is used.

A damaged header could make the reader that transformers uses allocate too much memory, loop or crash. The layout, in
little-endian order:

    "GGUF", version u32, tensors u64, pairs u64
    pair:    key string, type u32, value;   string: length u64, bytes;   array: type u32, count u64, values (or arrays)
    tensor:  name string, dimensions u32, sizes u64 ..., type u32, offset u64
    padding to general.alignment, then the tensors' bytes
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SIZES = ("embedding_length", "feed_forward_length", "vocab_size", "expert_count", "expert_feed_forward_length",
         "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
         "rope.dimension_count")  # fmt: skip
"""Sizes of a model, none larger than the largest dimension of its tensors."""
MOST = 1 << 16  # maximum number of tensors or pairs; the largest models have a few thousand
LONGEST = 1 << 24  # maximum length of a list that is read; the largest vocabularies have a few hundred thousand tokens
DEEPEST = 8  # maximum depth of arrays in arrays


@dataclass
class Header:
    """Pairs by key (None for an array), where each array begins, and the shape of each tensor."""

    pairs: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)
    nested: bool = False
    """Whether some array holds arrays."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Cursor:
    """The read position; reading past the end of the file is an error."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size, self.place = data, size, 0

    def take(self, count: int) -> int:
        """Advance by ``count`` bytes; returns where they begin."""
        if count > self.size - self.place:
            raise LolcatsError(f"its header asks for {count} bytes at {self.place}, but the file has {self.size}")
        self.place += count
        return self.place - count

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        return bytes(self.data[start : start + length]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Read a number or string."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        raise LolcatsError(f"its header has a value of unknown type {kind}")

    def skip_array(self) -> int:
        """Skip an array and those in it; returns its depth."""
        left, depth = [1], 1  # how many arrays are still to be skipped in each one that is open
        while left:
            if not left[-1]:
                left.pop()
                continue
            left[-1] -= 1
            inner, count = self.number("I"), self.number("Q")
            if inner != ARRAY:
                self._skip(inner, count)
                continue
            if count > (self.size - self.place) // 12:
                raise LolcatsError(f"its header claims a list of {count} arrays, more than the file can hold")
            left.append(count)
            depth = max(depth, len(left))
            if depth > DEEPEST:
                raise LolcatsError(f"its header has arrays in arrays, more than {DEEPEST} deep")
        return depth

    def _skip(self, kind: int, count: int) -> None:
        if kind in SCALARS:
            self.take(count * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            if count > self.size:
                raise LolcatsError(f"its header claims a list of {count} strings, more than the file can hold")
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise LolcatsError(f"its header has a list of unknown type {kind}")


def check_gguf(path: Path) -> Header:
    """Read the header of a GGUF file and check that its lengths, offsets and sizes fit the file and each other.

    Raises:
        LolcatsError: if they do not; the message says what is wrong.
    """
    size = path.stat().st_size
    try:
        with _mapped(path) as cursor:
            header, sizes, end = _read(cursor)
        _check_tensors(sizes, end, size)
        _check_model(header)
    except LolcatsError as error:
        raise LolcatsError(f"Cannot load {path}: it is damaged or not a GGUF file ({error}).") from None
    except ValueError:  # an empty file cannot be mapped
        raise LolcatsError(f"Cannot load {path}: it is empty.") from None
    return header


def read_array(path: Path, header: Header, key: str) -> list[Any]:
    """The numbers or strings of an array in a header that ``check_gguf`` has read; empty if it has no such array."""
    if key not in header.arrays:
        return []
    with _mapped(path) as cursor:
        cursor.place = header.arrays[key]
        kind, count = cursor.number("I"), cursor.number("Q")
        if kind == ARRAY or count > LONGEST:
            raise LolcatsError(f"Cannot load {path}: {key} in its header is not a list of at most {LONGEST} values.")
        return [cursor.value(kind) for _ in range(count)]


def skip_array(data: Any, place: int) -> int:
    """Where an array ends that begins at ``place`` in a file's bytes."""
    cursor = _Cursor(data, len(data))
    cursor.place = place
    cursor.skip_array()
    return cursor.place


@contextmanager
def _mapped(path: Path) -> Iterator[_Cursor]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield _Cursor(data, len(data))


Tensors = dict[str, tuple[tuple[int, ...], int, int]]  # name: sizes, type, offset


def _read(cursor: _Cursor) -> tuple[Header, Tensors, int]:
    """Header, tensors, and the offset of their bytes."""
    if cursor.data[:4] != b"GGUF":
        raise LolcatsError("it does not begin with GGUF")
    cursor.take(4)
    version, tensors, pairs = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise LolcatsError(f"it has version {version}, expected 2 or 3 (little-endian)")
    if tensors > MOST or pairs > MOST:
        raise LolcatsError(f"its header counts {tensors} tensors and {pairs} values")
    header, found = Header(), {}
    for _ in range(pairs):
        key, kind = cursor.string(), cursor.number("I")
        if key in header.pairs:
            raise LolcatsError(f"its header has {key} twice")
        if kind == ARRAY:
            header.pairs[key], header.arrays[key] = None, cursor.place
            header.nested |= cursor.skip_array() > 1
        else:
            header.pairs[key] = cursor.value(kind)
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > 4 or name in found:
            raise LolcatsError(f"tensor {name!r} has {dimensions} dimensions, or occurs twice")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        found[name] = shape, cursor.number("I"), cursor.number("Q")
        header.shapes[name] = shape
    alignment = header.pairs.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20:
        raise LolcatsError(f"general.alignment is {alignment}, expected 1 to 1,048,576")
    return header, found, -(-cursor.place // alignment) * alignment


def _check_tensors(tensors: Tensors, begin: int, size: int) -> None:
    """Check that all tensors lie in the file and do not overlap."""
    import gguf

    spans = []
    for name, (shape, kind, offset) in tensors.items():
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise LolcatsError(f"tensor {name!r} has unknown type {kind}") from None
        if prod(shape) == 0 or (*shape, 1)[0] % block:  # without dimensions, it is one number
            raise LolcatsError(f"tensor {name!r} has invalid sizes {shape}")
        stop = begin + offset + prod(shape) // block * width
        if stop > size:
            raise LolcatsError(f"tensor {name!r} of sizes {shape} ends at byte {stop}, but the file has {size}")
        spans.append((begin + offset, stop, name))
    spans.sort()
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise LolcatsError(f"tensors {name!r} and {other!r} overlap")


def _check_model(header: Header) -> None:
    """Check the model's sizes against its tensors: a reader would allocate or loop over a wrong one."""
    architecture = header.pairs.get("general.architecture")
    if not isinstance(architecture, str) or not header.shapes:
        raise LolcatsError("it names no architecture, or has no tensors")
    blocks = header.pairs.get(f"{architecture}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks <= len(header.shapes):
        raise LolcatsError(f"{architecture}.block_count is {blocks} with {len(header.shapes)} tensors")
    largest = max(1, *(size for shape in header.shapes.values() for size in shape))
    for name in SIZES:
        value = header.pairs.get(f"{architecture}.{name}", 1)
        if isinstance(value, int) and not 0 <= value <= largest:
            raise LolcatsError(f"{architecture}.{name} is {value}, but the largest tensor dimension is {largest}")
