"""GGUF files with arrays in arrays for transformers: the format permits them, its readers raise ValueError.

No configuration, tokenizer or weight is in such an array, so they are left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lolcats.weights.gguf_header import ARRAY, Header, skip_array


@contextmanager
def nested_arrays_left_out(header: Header | None) -> Iterator[None]:
    """For the block's duration, transformers reads past the arrays in arrays that ``header`` has."""
    if header is None or not header.nested:
        yield
        return
    import gguf
    from transformers.integrations.gguf import reader

    places = [(reader, "_read_value", _reading_past(reader._read_value)), (gguf, "GGUFReader", _flat(gguf.GGUFReader))]
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, replacement in places:
            setattr(module, name, replacement)
        yield
    finally:
        for (module, name, _), original in zip(places, before, strict=True):
            setattr(module, name, original)


def _reading_past(read_value: Any) -> Any:
    def read(blob: Any, place: int, kind: int, *rest: Any) -> Any:
        if kind == ARRAY and struct.unpack_from("<I", blob, place)[0] == ARRAY:
            return None, skip_array(blob, place)
        return read_value(blob, place, kind, *rest)

    return read


def _flat(reader: Any) -> Any:
    class Flat(reader):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name in [name for name, field in self.fields.items() if field.types[:2] == [ARRAY, ARRAY]]:
                del self.fields[name]

    return Flat
