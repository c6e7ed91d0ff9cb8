"""Stage 1 layer by layer, as users run it: commands, stage 2 after it, torchrun, a real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, tiny_model
from safetensors.torch import load_file
from test_cli import invoke, sets

import lolcats
from lolcats.config import load_config
from lolcats.data.rows import Data
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.modeling.skeleton import build_skeleton
from lolcats.stages.transfer.stage import transfer, transfer_in_turn
from lolcats.weights.base import find_base, load_model

MAPS = "feature_maps.safetensors"
GGUF = os.environ.get("LOLCATS_TEST_GGUF", "")  # SmolLM2-135M as a GGUF file


@pytest.fixture(scope="module")
def finished(model_dirs, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole job with per-layer coupling and the model in memory."""
    out = tmp_path_factory.mktemp("run") / "out"
    uncoupled = sets([*SETTINGS, "transfer.coupling=per_layer"])
    invoke("linearize", model_dirs["llama"], "--data", chat_file, "--out", out, *uncoupled)
    return out


def same(a: Path, b: Path, *names: str) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_streamed_then_stage_two(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "out"
    common = (model_dirs["llama"], "--data", chat_file, "--out", out, "--schedule", "stream", *sets(settings))
    output = invoke("transfer", *common, "--set", "transfer.chunk_tokens=300")
    assert "layer by layer" in output
    assert "Next: lolcats finetune" in output
    assert same(out, finished, MAPS)
    results = json.loads((out / "run.json").read_text())["results"]
    expected = json.loads((finished / "run.json").read_text())["results"]
    assert "ppl_teacher" not in results
    for name in ("layer_errors_before", "layer_errors_after"):
        assert results[name] == pytest.approx(expected[name], rel=1e-5)
    assert not (out / "checkpoints" / "transfer").exists()
    assert "after stage 2" in invoke("finetune", out)
    assert same(out, finished, MAPS, "lora/adapter_model.safetensors", "merged/model.safetensors")
    results = json.loads((out / "run.json").read_text())["results"]
    assert set(results) == set(expected)


def test_the_whole_job_in_blocks(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    blocks = sets([*settings, "transfer.order=blocks", "transfer.coupling=per_layer"])
    invoke("linearize", model_dirs["llama"], "--data", chat_file, "--out", tmp_path / "out", *blocks)
    assert same(tmp_path / "out", finished, MAPS, "lora/adapter_model.safetensors", "merged/model.safetensors")


def test_documents_apart_in_every_order(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    apart = sets([*settings, "data.reset_at_documents=true", "transfer.coupling=per_layer"])
    for schedule in ("joint", "stream", "blocks"):
        invoke("transfer", model_dirs["llama"], "--data", chat_file, "--out", tmp_path / schedule, *apart,
               "--schedule", schedule)  # fmt: skip
        assert same(tmp_path / schedule, tmp_path / "joint", MAPS)
    assert not same(tmp_path / "joint", finished, MAPS)


def test_blocks_of_two_machines(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    def transfer(out: str, *more: object, code: int = 0) -> str:
        return invoke("transfer", model_dirs["llama"], "--data", chat_file, "--out", tmp_path / out, *sets(settings),
                      "--schedule", "blocks", "--block-size", 1, *more, code=code)  # fmt: skip

    for block in (0, 1):
        assert "Other blocks are still untrained" in transfer(f"machine{block}", "--block", block)
        assert not (tmp_path / f"machine{block}" / MAPS).exists()
    assert "run attention transfer first" in invoke("finetune", tmp_path / "machine0", code=2)
    assert "Next: lolcats finetune" in transfer("machine0", "--join", tmp_path / "machine1")
    assert same(tmp_path / "machine0", finished, MAPS)
    assert "has the blocks 0 to 1" in transfer("machine1", "--block", 2, code=2)
    assert "no attention transfer was started" in transfer("machine1", "--join", tmp_path / "nowhere", code=2)


def test_mistakes_end_in_a_sentence(tokenizer, chat_file: Path, settings, tmp_path: Path, monkeypatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "model")

    def fails(expected: str, *changes: object, schedule: str = "stream") -> None:
        common = (tmp_path / "model", "--data", chat_file, "--out", tmp_path / "out", *sets(settings))
        output = invoke("transfer", *common, "--schedule", schedule, *changes, code=2)
        assert expected in " ".join(output.split()), output

    fails("transfer.order: expected one of joint, stream, blocks, got 'layers'", schedule="layers")
    fails("needs transfer.coupling=per_layer", "--set", "transfer.coupling=joint")
    fails("needs the whole model in memory", "--set", "data.keep_longest_effective=0.5")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    fails(f"{shard.name} is missing")
    shard.write_bytes(content[:-30])
    fails(f"{shard.name} is damaged or truncated")
    shard.write_bytes(content)
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing behind"
    with monkeypatch.context() as patch:
        patch.setattr("lolcats.stages.transfer.orders.free_host_memory", lambda: 150_000)
        fails("GiB of host memory")
        small = ("--schedule", "stream", "--set", "transfer.chunk_tokens=300")
        common = (tmp_path / "model", "--data", chat_file, "--out", tmp_path / "out", *sets(settings))
        fails("transfer.max_steps was 6 and is now 7", "--set", "transfer.max_steps=7")
        assert "Next: lolcats finetune" in invoke("transfer", *common, *small)


@pytest.mark.parametrize("schedule", ["joint", "stream"])
def test_block_without_blocks_is_refused_before_anything_is_read(schedule: str, tmp_path: Path) -> None:
    nothing = ("no-model", "--data", "no-data", "--out", tmp_path / "out")
    assert "this run has no blocks" in invoke("transfer", *nothing, "--schedule", schedule, "--block", 0, code=2)


@pytest.mark.slow
def test_torchrun(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    """The command on two ranks leaves one complete directory, in which stage 2 continues."""
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command = [*torchrun, "lolcats.cli", "transfer", model_dirs["llama"], "--data", chat_file, "--out", out,
               "--recipe", "paper-sinks", "--schedule", "stream", *sets(settings)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: lolcats finetune") == 1
    maps, expected = load_file(out / MAPS), load_file(finished / MAPS)
    for name, tensor in expected.items():
        torch.testing.assert_close(maps[name], tensor, atol=1e-5, rtol=1e-5)
    assert "after stage 2" in invoke("finetune", out)


@pytest.mark.slow
@pytest.mark.skipif(not Path(GGUF).is_file(), reason="LOLCATS_TEST_GGUF names no GGUF file of SmolLM2-135M")
def test_a_real_model_within_rounding(tmp_path: Path) -> None:
    """SmolLM2-135M in bf16: all orders, from sharded files and from the GGUF file itself."""
    changes = ["transfer.coupling=per_layer", "transfer.max_steps=2", "transfer.batch_size=1",
               "transfer.micro_batch_size=1", "transfer.chunk_tokens=64", "transfer.block_size=13",
               "data.sequence_length=64", "attention.window_size=16"]  # fmt: skip
    whole = load_model(find_base(GGUF), torch.bfloat16)
    whole.save_pretrained(tmp_path / "model", max_shard_size="60MB")
    rows = torch.randint(100, 40000, (6, 64), generator=torch.Generator().manual_seed(0))
    data, seed = Data(rows[:4], rows[4:5], rows[5:], "", {}), 0
    config = load_config("paper-sinks", changes)
    torch.manual_seed(seed)
    transfer(lolcats.convert(whole, config), data, config, tmp_path / "joint")
    expected = feature_map_state(whole)
    for order, path in (("stream", tmp_path / "model"), ("blocks", tmp_path / "model"), ("stream", GGUF)):
        config = load_config("paper-sinks", [*changes, f"transfer.order={order}"])
        skeleton = build_skeleton(find_base(str(path)), config.attention, torch.bfloat16, torch.device("cpu"), seed)
        transfer_in_turn(skeleton, data, config, tmp_path / f"{order} {Path(path).name}")
        for name, tensor in feature_map_state(skeleton.model).items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=2**-8)
