"""The merged model that is written file by file is the one that is merged in memory, and takes a file's memory."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from support.adapters import SMALL, adapter, peak
from support.families import FAMILIES, Family
from support.tiny import tiny
from torch import Tensor
from transformers import CONFIG_MAPPING

import lolcats
from lolcats.errors import LolcatsError
from lolcats.modeling import merge
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, load, save_adapter_config, save_feature_maps
from lolcats.modeling.merge import merge_adapter, save_whole
from lolcats.modeling.parts import find_parts
from lolcats.modeling.record import sealed
from lolcats.weights import shards
from lolcats.weights.base import find_base, load_model
from lolcats.weights.shards import INDEX


class Tokenizer:
    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def files(directory: Path) -> dict[str, Any]:
    """Everything that was written: tensors by name, other files as text. Which tensors share a file does not matter."""
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                places |= dict.fromkeys(opened.keys(), path.name)
        elif path.name == INDEX:
            index = json.loads(path.read_text())
            found[INDEX] = index["metadata"]["total_parameters"]
        else:  # transformers leaves the path of the adapter in configurations within configurations
            lines = path.read_text().splitlines()
            found[path.name] = [line for line in lines if "_name_or_path" not in line]
    if INDEX in found:
        assert index["weight_map"] == places
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def in_memory(directory: Path, out: Path, file_bytes: int, **how: Any) -> dict[str, Any]:
    save_whole(load(directory, **how), Tokenizer(), out, file_bytes)
    return files(out)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "load", lambda *_, **__: pytest.fail("merged in memory"))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f.quick else pytest.mark.slow, id=name) for name, f in FAMILIES.items()]
)
def test_every_family_is_merged_as_in_memory(family: Family, tmp_path: Path) -> None:
    """Tied embeddings, fused projections and experts that files hold one by one are among them."""
    if family.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family.model_type}")
    directory = adapter(tmp_path, tiny(family.model_type, **family.changes))
    expected = in_memory(directory, tmp_path / "expected", 60_000)
    merge_adapter(directory, tmp_path / "merged", Tokenizer(), file_bytes=60_000)
    found = files(tmp_path / "merged")
    assert_same(found, expected)
    total = json.loads((tmp_path / "merged" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(value.nbytes for value in found.values() if isinstance(value, Tensor))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("how", [
    {"attention": replace(SMALL, softmax_heads={"0": [1], "1": [0, 1]})}, {"use_dora": True}, {"use_rslora": True},
    {"targets": ["q_proj", "gate_proj", "lm_head"]}, {"dtype": torch.float32},
    {"attention": replace(SMALL, kind="window")},
], ids=["kept-heads", "dora", "rslora", "other-targets", "fp32", "no-maps"])  # fmt: skip
def test_every_kind_of_adapter_is_merged_as_in_memory(how: dict[str, Any], tmp_path: Path) -> None:
    directory = adapter(tmp_path, tiny_model(tie_word_embeddings=False), **how)
    expected = in_memory(directory, tmp_path / "expected", 1 << 30)
    merge_adapter(directory, tmp_path / "merged", Tokenizer())
    assert_same(files(tmp_path / "merged"), expected)
    assert lolcats.load(tmp_path / "merged").dtype == how.get("dtype", torch.bfloat16)


@pytest.mark.usefixtures("streamed")
def test_another_dtype_a_moved_base_and_no_lora(tmp_path: Path) -> None:
    directory = adapter(tmp_path, tiny_model())
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(LolcatsError, match=r"The base model of .* is missing"):
        merge_adapter(directory, tmp_path / "merged", Tokenizer())
    how = {"dtype": "float32", "base": str(tmp_path / "elsewhere")}
    expected = in_memory(directory, tmp_path / "expected", 1 << 30, **how)
    merge_adapter(directory, tmp_path / "merged", Tokenizer(), **how)
    assert_same(files(tmp_path / "merged"), expected)
    shutil.rmtree(directory / LORA)
    with pytest.raises(LolcatsError, match="is incomplete: lora/"):
        merge_adapter(directory, tmp_path / "merged", Tokenizer(), **how)
    model = load_model(find_base(str(tmp_path / "elsewhere")), torch.float32)
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    save_feature_maps(lolcats.convert(model, SMALL), untrained / FEATURE_MAPS)
    save_adapter_config(model, find_base(how["base"]), untrained, parts=find_parts(untrained))
    expected = in_memory(untrained, tmp_path / "expected", 1 << 30)
    merge_adapter(untrained, tmp_path / "merged", Tokenizer())
    assert_same(files(tmp_path / "merged"), expected)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_tied_weights_with_lora_are_merged_in_memory(tmp_path: Path) -> None:
    """LoRA of an output layer that is tied to the embedding changes both."""
    tied = adapter(tmp_path / "tied", tiny_model(tie_word_embeddings=True), targets=["lm_head"])
    expected = in_memory(tied, tmp_path / "expected", 1 << 30)
    merge_adapter(tied, tmp_path / "merged", Tokenizer())
    assert_same(files(tmp_path / "merged"), expected)


def test_weights_that_are_not_in_safetensors_are_merged_in_memory(tmp_path: Path) -> None:
    model, place = tiny_model(), tmp_path / "base"
    directory = adapter(tmp_path, model)
    (place / "model.safetensors").unlink()
    torch.save(model.state_dict(), place / "pytorch_model.bin")
    config = json.loads((directory / "config.json").read_text())
    config["lolcats"] = sealed({**config["lolcats"], "base": find_base(str(place)).record})
    (directory / "config.json").write_text(json.dumps(config))
    expected = in_memory(directory, tmp_path / "expected", 1 << 30)
    merge_adapter(directory, tmp_path / "merged", Tokenizer())
    assert_same(files(tmp_path / "merged"), expected)


def written(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[str]:
    """The names of the files that are written from now on; writing number ``stop_at`` is interrupted midway."""
    names: list[str] = []

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        names.append(path.name.partition(".partial")[0])
        if len(names) == stop_at:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(merge, "save_file", save)
    return names


def test_a_killed_merge_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, out = adapter(tmp_path, tiny_model()), tmp_path / "merged"
    expected = in_memory(directory, tmp_path / "expected", 20_000)
    first = written(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(directory, out, Tokenizer(), file_bytes=20_000)
    assert not out.exists()
    then = written(monkeypatch)
    merge_adapter(directory, out, Tokenizer(), file_bytes=20_000)
    assert then[0] == first[-1]
    assert not set(first[:-1]) & set(then)
    assert len(set(first) | set(then)) == 4
    assert_same(files(out), expected)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_full_disk_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    directory = adapter(tmp_path, tiny_model())
    monkeypatch.setattr(merge, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(directory, tmp_path / "merged", Tokenizer())


@pytest.mark.parametrize("change", ["lora", "dtype", "size"])
def test_what_was_begun_of_another_merge_is_thrown_away(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, out = adapter(tmp_path / "one", tiny_model()), tmp_path / "merged"
    written(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(directory, out, Tokenizer(), file_bytes=20_000)
    how: dict[str, Any] = {"file_bytes": 20_000}
    if change == "lora":
        directory = adapter(tmp_path / "two", tiny_model(), use_rslora=True)
    else:
        how |= {"dtype": "float32"} if change == "dtype" else {"file_bytes": 30_000}
    names = written(monkeypatch)
    merge_adapter(directory, out, Tokenizer(), **how)
    dtype = how.get("dtype", "auto")
    assert_same(files(out), in_memory(directory, tmp_path / "expected", how["file_bytes"], dtype=dtype))
    assert len(names) == len(list(out.glob("*.safetensors")))


class Serial:
    """In place of a pool of threads, which the profiler does not see."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


def test_host_memory_holds_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch allocates on the CPU at once: the tensors of a file, and what PEFT needs for one more."""
    monkeypatch.setattr(shards, "ThreadPoolExecutor", Serial)
    model = tiny_model(hidden_size=128, intermediate_size=512, num_hidden_layers=6, vocab_size=1024)
    directory = adapter(tmp_path, model)
    total = sum(p.nbytes for p in model.parameters()) // 2
    del model
    largest, file_bytes = 1024 * 128 * 2, 400_000
    ours = sum((directory / name).stat().st_size for name in (FEATURE_MAPS, f"{LORA}/adapter_model.safetensors"))
    mapped = {path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    allowed = file_bytes + 2 * ours + 2 * largest
    assert allowed < total / 2, "else the test shows nothing"
    out = tmp_path / "merged"
    assert peak(lambda: merge_adapter(directory, out, Tokenizer(), file_bytes=file_bytes), mapped) < allowed
    assert peak(lambda: merge_adapter(directory, out, Tokenizer(), file_bytes=10 * total), mapped) > total
