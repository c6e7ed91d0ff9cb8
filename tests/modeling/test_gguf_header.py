"""GGUF files with arrays in arrays, and with a tensor without dimensions: the format permits both."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from modeling.test_base import IDS, write_gguf

from lolcats.errors import LolcatsError
from lolcats.plan.size import read_config as planned_config
from lolcats.weights.base import find_base, load_model, load_tokenizer, read_config
from lolcats.weights.gguf_header import DEEPEST, check_gguf, read_array

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
NAME = "test.array"


def written(directory: Path, tokenizer: Any, change: Any) -> Path:
    return write_gguf(directory / "tiny.gguf", tiny_model("llama"), tokenizer, change=change)


def nested(depth: int, inner: Any = (1, 2, 3)) -> list[Any]:
    """Arrays in arrays; the innermost of ``depth``."""
    return list(inner) if depth == 1 else [nested(depth - 1, inner), nested(depth - 1, inner[:1])]


def array(depth: int, values: Any = (1, 2, 3)) -> Any:
    return lambda writer: writer.add_array(NAME, nested(depth, values))


def scalar(writer: Any) -> None:
    writer.add_tensor("test.scalar", np.array(1.5, dtype=np.float32))


@torch.no_grad()
def check_loads(path: Path, tokenizer: Any) -> None:
    base, original = find_base(str(path)), tiny_model("llama")
    torch.testing.assert_close(load_model(base, torch.float32)(IDS).logits, original(IDS).logits, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(base).tokenize("the cat sat") == tokenizer.tokenize("the cat sat")
    assert read_config(base).num_hidden_layers == original.config.num_hidden_layers
    assert planned_config(str(path)).hidden_size == original.config.hidden_size


@pytest.mark.parametrize(("depth", "values"), [(2, (1, 2, 3)), (2, ("a", "bc")), (DEEPEST, (True,))])
def test_arrays_in_arrays(depth: int, values: Any, tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, tokenizer, array(depth, values))
    assert check_gguf(path).nested
    check_loads(path, tokenizer)
    assert gguf.GGUFReader(path).fields[NAME]  # gguf's own reader is as it was


def test_a_tensor_without_dimensions_is_one_number(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, tokenizer, scalar)
    assert check_gguf(path).shapes["test.scalar"] == ()
    check_loads(path, tokenizer)


def test_arrays_are_read(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, tokenizer, array(1, (4, 5, 6)))
    header = check_gguf(path)
    assert not header.nested
    assert read_array(path, header, NAME) == [4, 5, 6]
    assert read_array(path, header, "tokenizer.ggml.tokens")[:2] == ["<pad>", "<bos>"]
    assert read_array(path, header, "no.such.array") == []


def with_array(data: bytes, new: Any) -> bytes:
    """The header's array of int32 1, 2, 3 in two arrays, with other bytes for the type and count of the outer one."""
    key = NAME.encode() + struct.pack("<I", 9)
    assert data.count(key) == 1
    return data.replace(key + struct.pack("<IQ", 9, 2), key + new)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (struct.pack("<IQ", 9, 1 << 60), "list of 1152921504606846976 arrays"),
        (struct.pack("<IQ", 9, 3), "damaged"),  # takes the next pair for an array
        (struct.pack("<IQ", 13, 2), "unknown type 13"),
    ],
)
def test_damaged_arrays_are_refused(new: bytes, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, tokenizer, array(2))
    path.write_bytes(with_array(path.read_bytes(), new))
    with pytest.raises(LolcatsError, match=message):
        check_gguf(path)


def test_too_deep(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, tokenizer, array(DEEPEST + 1))
    with pytest.raises(LolcatsError, match="more than 8 deep"):
        check_gguf(path)
    bottomless = struct.pack("<IQ", 9, 1) * 100_000
    data = written(tmp_path, tokenizer, array(2)).read_bytes()
    path.write_bytes(with_array(data, bottomless))
    with pytest.raises(LolcatsError, match="more than 8 deep"):
        check_gguf(path)


def test_a_tensor_of_the_model_without_dimensions_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_model("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.tensor(1.5), requires_grad=False)
    base = find_base(str(write_gguf(tmp_path / "norm.gguf", model, tokenizer)))
    with pytest.raises(LolcatsError, match="Cannot load"):
        load_model(base, torch.float32)


def test_a_quantized_tensor_has_dimensions(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, tokenizer, scalar)
    data = path.read_bytes()
    at = data.index(b"test.scalar") + len("test.scalar")
    assert data[at : at + 8] == struct.pack("<II", 0, 0)  # dimensions, type F32
    path.write_bytes(data[: at + 4] + struct.pack("<I", 8) + data[at + 8 :])
    with pytest.raises(LolcatsError, match=r"'test.scalar' has invalid sizes \(\)"):
        check_gguf(path)
