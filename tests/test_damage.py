"""Damaged adapters and GGUF files: never a crash, a hang, or a silent success with other content.

10,000 cases in the slow suite, a few hundred in the quick one; each case is identified by its number. Any error other
than LolcatsError fails the test, and so does a load that returns tensors or settings that differ from the undamaged
ones.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from modeling.test_base import write_gguf
from test_cli import invoke, sets
from transformers import AutoConfig

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import (
    FEATURE_MAPS,
    LORA,
    LORA_WEIGHTS,
    save_adapter_config,
    save_feature_maps,
    save_lora,
)
from lolcats.plan import read_config, size_of
from lolcats.report.figures import read_metrics
from lolcats.stages.finetune.stage import add_lora
from lolcats.stages.metrics import replace_metrics
from lolcats.tensors import read_tensors
from lolcats.weights.base import find_base, load_model
from lolcats.weights.gguf_header import check_gguf

SECONDS = 20  # for one case
HUGE = (0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model_dirs) -> Path:
    """A complete adapter of a tiny model, with feature maps and LoRA on one projection per layer."""
    directory, base = tmp_path_factory.mktemp("adapter"), find_base(str(model_dirs["llama"]))
    model = lolcats.convert(load_model(base, torch.float32), SMALL)
    save_adapter_config(model, base, directory)
    save_feature_maps(model, directory / FEATURE_MAPS)
    save_lora(add_lora(model, FinetuneConfig(rank=2, targets=["q_proj"])), base, directory / LORA)
    return directory


def test_a_config_is_replaced_as_a_whole(model_dirs, tmp_path: Path) -> None:
    """Another rank that reads config.json meanwhile sees the old one or the new one, never a part."""
    base = find_base(str(model_dirs["llama"]))
    model = lolcats.convert(load_model(base, torch.float32), SMALL)
    save_adapter_config(model, base, tmp_path)
    before = (tmp_path / "config.json").read_text()
    with (tmp_path / "config.json").open() as reader:
        save_adapter_config(model, base, tmp_path, kind="window")
        assert reader.read() == before
    after = json.loads((tmp_path / "config.json").read_text())
    assert {layer["kind"] for layer in after["lolcats"]["layers"]} == {"window"}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama"), tokenizer)


@contextmanager
def limited(case: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"case {case} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "torn", [b'{"stage": "finetune", "lo', b'{"stage": "finetune"', b"\0" * 40, b'{"stage": "\xff', b"3"]
)
def test_an_unfinished_line_of_metrics_is_left_out(torn: bytes, tmp_path: Path, caplog) -> None:
    """A full disk or a power cut leaves it; a resumed stage and the report read what is whole and say what is not."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"stage": "transfer", "loss": 0.5, "step": 1}\n' + torn)
    first = {"stage": "transfer", "loss": 0.5, "step": 1}
    assert read_metrics(tmp_path) == [first]
    assert f"{path}: left out 1 unfinished or damaged line(s) (2); the other 1 are used." in caplog.text
    replace_metrics(path, "finetune", [{"loss": 0.25, "step": 1}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [first, {"stage": "finetune", "loss": 0.25, "step": 1}]


def test_a_gguf_file_is_planned_and_a_damaged_one_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    config = load_config("paper-sinks")
    assert size_of(read_config(str(gguf_file)), config) == size_of(tiny_model("llama").config, config)
    output = invoke("plan", gguf_file)
    assert "A GGUF file is read whole" in output
    (tmp_path / "half.gguf").write_bytes(gguf_file.read_bytes()[:400])
    assert "half.gguf" in invoke("plan", tmp_path / "half.gguf", code=2)


@pytest.mark.parametrize(
    "content", ["{", '{"model_type": "no-such-type"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_an_invalid_configuration_is_what_is_named(
    content: str, model_dirs, chat_file: Path, tmp_path: Path, settings
) -> None:
    shutil.copytree(model_dirs["llama"], tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(content)
    start = ("--data", chat_file, "--out", tmp_path / "out", *sets(settings))
    output = invoke("linearize", tmp_path / "base", *start, code=2)
    assert "Cannot load" in output
    assert "tokenizer" not in output
    assert "no-such-type" in output or "valid JSON" in output or "hidden_size" in output


def damaged(data: bytes, rng: random.Random, header: int) -> bytes:
    """Damage one thing: a bit, a byte, a cut, an insertion or removal, a wrong length; mostly in the header."""
    changed, place = bytearray(data), rng.randrange(header if rng.random() < 0.7 else len(data))
    match rng.randrange(7):
        case 0:
            changed[place] ^= 1 << rng.randrange(8)
        case 1:
            changed[place] = rng.choice((0, 1, 9, 32, 34, 48, 57, 91, 123, 125, 127, 128, 255, rng.randrange(256)))
        case 2:
            del changed[place:]
        case 3:
            changed[place:place] = rng.randbytes(rng.randint(1, 16))
        case 4:
            del changed[place : place + rng.randint(1, 16)]
        case 5:
            changed[place : place + 8] = struct.pack("<Q", rng.choice(HUGE))
        case 6:
            other = rng.randrange(len(data))
            changed[place : place + 16] = data[other : other + 16]
    return bytes(changed)


def safetensors_damage(data: bytes, rng: random.Random) -> bytes:
    """As above, or a wrong header in valid JSON: other dtypes, shapes or offsets, very deep, very long."""
    length = struct.unpack_from("<Q", data)[0]
    if rng.random() < 0.7:
        return damaged(data, rng, 8 + length)
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    match rng.randrange(7):
        case 0:
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I8", "U8", "BOOL", "I32", "F8_E4M3", "X", "", 3, None])
        case 1:
            entry["shape"] = rng.choice(
                [[], [0], [-1], [1 << 62, 4], [4, 4, 4], [2.5], "a", None, entry["shape"][::-1]]
            )
        case 2:
            entry["data_offsets"] = rng.choice([[0, 0], [0, 1 << 60], [-4, 4], [8, 4], [0], None, [1 << 64, 1 << 65]])
        case 3:
            header[name[:-1]] = header.pop(name)
        case 4:
            del header[name]
        case 5:
            header["__metadata__"] = rng.choice(
                [{}, {"lolcats_sha256": "0"}, {"lolcats_sha256": "é"}, None, [], {"a": 1}]
            )
        case 6:
            deep = b"[" * rng.choice((10, 1_000, 100_000))
            return struct.pack("<Q", len(deep)) + deep + data[8 + length :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def json_damage(data: bytes, rng: random.Random) -> bytes:
    """For a config.json: as above, or valid JSON with a value of our section changed, removed, or very deep."""
    if rng.random() < 0.5:
        return damaged(data, rng, len(data))
    tree = json.loads(data)
    parent, keys = tree, ["lolcats"]
    while True:
        key = keys[-1]
        if not isinstance(parent[key], (dict, list)) or not parent[key] or rng.random() < 0.1:
            break
        parent = parent[key]
        keys.append(rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent))))
    deep: Any = []
    for _ in range(rng.choice((1, 500))):
        deep = [deep]
    if rng.random() < 0.2:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = rng.choice([None, 0, -1, 1 << 70, 1e308, "", "hybrid", "../../x", True, {}, [], deep])
    return json.dumps(tree).encode()


def fuzz(cases: range, seed: str, damage: Callable[[random.Random], Any], load: Callable[[Any], bool]) -> int:
    """Number of cases that were refused. ``load`` returns whether it loaded the undamaged content."""
    refused = 0
    for case in cases:
        content = damage(random.Random(f"{seed} {case}"))
        try:
            with limited(case):
                same = load(content)
        except LolcatsError:
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{seed}, case {case}: {type(error).__name__}: {error}") from error
        assert same, f"{seed}, case {case}: damaged content was loaded as if nothing had happened"
    return refused


def tensors_case(path: Path, place: Path) -> tuple[Callable, Callable]:
    data, expected = path.read_bytes(), read_tensors(path)

    def load(content: bytes) -> bool:
        place.write_bytes(content)
        found = read_tensors(place)
        return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)

    return lambda rng: safetensors_damage(data, rng), load


def config_case(adapter: Path, place: Path) -> tuple[Callable, Callable]:
    place.mkdir()
    data = (adapter / "config.json").read_bytes()
    expected = AutoConfig.from_pretrained(str(adapter)).lolcats

    def load(content: bytes) -> bool:
        """As lolcats.load does before it reads weights. A file that no longer says lolcats counts as another model."""
        (place / "config.json").write_bytes(content)
        (place / FEATURE_MAPS).write_bytes(b"")
        with pytest.MonkeyPatch.context() as patch:
            found: list[Any] = []
            patch.setattr("lolcats.modeling.classes.load_adapter", lambda p, c, *_: found.append(c) or stop())
            try:
                lolcats.load(place)
            except LolcatsError:
                if not found:
                    raise
            return all(found[0].lolcats[name] == expected[name] for name in ("attention", "layers", "base", "form"))

    return lambda rng: json_damage(data, rng), load


def stop() -> Any:
    raise LolcatsError("The configuration was read.")


def header_case(gguf_file: Path, place: Path) -> tuple[Callable, Callable]:
    """A consistent file may be loaded: a GGUF file has no checksum of its own, but adapters know that of the whole
    file."""
    data, fingerprint = gguf_file.read_bytes(), find_base(str(gguf_file)).fingerprint

    def load(content: bytes) -> bool:
        place.write_bytes(content)
        check_gguf(place)
        return content == data or find_base(str(place)).fingerprint != fingerprint

    return lambda rng: damaged(data, rng, len(data) // 5), load


def model_case(gguf_file: Path, place: Path) -> tuple[Callable, Callable]:
    data, expected = gguf_file.read_bytes(), load_model(find_base(str(gguf_file)), torch.float32).state_dict()

    def load(content: bytes) -> bool:
        """Without a checksum, a load must give a complete model of the same shapes, or fail."""
        place.write_bytes(content)
        found = load_model(find_base(str(place)), torch.float32).state_dict()
        return {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in expected.items()}

    return lambda rng: damaged(data, rng, len(data) // 5), load


def adapter_case(adapter: Path, place: Path) -> tuple[Callable, Callable]:
    shutil.copytree(adapter, place)
    names = ("config.json", FEATURE_MAPS, f"{LORA}/{LORA_WEIGHTS}", f"{LORA}/adapter_config.json")
    whole = {name: (adapter / name).read_bytes() for name in names}
    expected = lolcats.load(adapter).state_dict()

    def damage(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(names)
        change = safetensors_damage if name.endswith("safetensors") else json_damage
        if name.endswith("adapter_config.json"):
            return name, damaged(whole[name], rng, len(whole[name]))
        return name, change(whole[name], rng)

    def load(content: tuple[str, bytes]) -> bool:
        for name, data in whole.items():
            (place / name).write_bytes(content[1] if name == content[0] else data)
        found = lolcats.load(place).state_dict()
        return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)

    return damage, load


def run(quick: bool, adapter: Path, gguf_file: Path, tmp_path: Path) -> dict[str, tuple[int, int]]:
    """(cases, refused) of each kind."""
    kinds: dict[str, tuple[int, tuple[Callable, Callable]]] = {
        "feature maps": (4000, tensors_case(adapter / FEATURE_MAPS, tmp_path / "maps.safetensors")),
        "lora": (2000, tensors_case(adapter / LORA / LORA_WEIGHTS, tmp_path / "lora.safetensors")),
        "config": (1000, config_case(adapter, tmp_path / "config")),
        "gguf header": (2500, header_case(gguf_file, tmp_path / "a.gguf")),
        "gguf model": (200, model_case(gguf_file, tmp_path / "b.gguf")),
        "adapter": (300, adapter_case(adapter, tmp_path / "adapter")),
    }
    assert sum(count for count, _ in kinds.values()) == 10_000
    found = {}
    for name, (count, (damage, load)) in kinds.items():
        cases = range(count // 25) if quick else range(count)
        found[name] = len(cases), fuzz(cases, name, damage, load)
    return found


def test_a_few_hundred_damaged_files(adapter: Path, gguf_file: Path, tmp_path: Path) -> None:
    for name, (cases, refused) in run(True, adapter, gguf_file, tmp_path).items():
        assert refused > cases / 8, name


@pytest.mark.slow
def test_ten_thousand_damaged_files(adapter: Path, gguf_file: Path, tmp_path: Path) -> None:
    for name, (cases, refused) in run(False, adapter, gguf_file, tmp_path).items():
        assert refused > cases / 8, name


def test_a_changed_value_is_noticed(adapter: Path, tmp_path: Path) -> None:
    """One bit of a weight, one digit of the configuration."""
    place = tmp_path / "adapter"
    shutil.copytree(adapter, place)
    data = bytearray((place / FEATURE_MAPS).read_bytes())
    data[-3] ^= 1
    (place / FEATURE_MAPS).write_bytes(data)
    with pytest.raises(LolcatsError, match="the checksum of its tensors does not match"):
        lolcats.load(place)
    shutil.copy(adapter / FEATURE_MAPS, place / FEATURE_MAPS)
    config = (place / "config.json").read_text()
    (place / "config.json").write_text(config.replace('"window_size": 8', '"window_size": 9'))
    with pytest.raises(LolcatsError, match=r"checksum does not match\. .* remove lolcats\.sha256"):
        lolcats.load(place)
    tree = json.loads((place / "config.json").read_text())
    del tree["lolcats"]["sha256"]
    (place / "config.json").write_text(json.dumps(tree))
    assert lolcats.load(place).config.lolcats["attention"]["window_size"] == 9


def test_a_changed_lora_setting_is_noticed(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / LORA / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    with pytest.raises(LolcatsError, match=r"adapter_config\.json is damaged"):
        lolcats.load(tmp_path / "adapter")


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.ones(2))


def test_a_base_model_with_a_tensor_missing_is_refused(model_dirs, tmp_path: Path) -> None:
    """transformers itself would continue with random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_dirs["llama"], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LolcatsError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_model(find_base(str(tmp_path / "base")), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.replace(b"llama.block_count", b"llama.block_hount"), "block_count is None"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 50) + d[16:], "counts"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 50) + d[24:], "counts"),
        (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
        (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "version"),
        (lambda d: d.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "occurs twice"),
        (lambda d: d.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"), "missing"),
    ],
)
def test_gguf_headers_that_lie(change: Callable, message: str, gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(change(gguf_file.read_bytes()))
    with pytest.raises(LolcatsError, match=message):
        load_model(find_base(str(tmp_path / "a.gguf")), torch.float32)
