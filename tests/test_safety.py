"""Code in a model, an adapter or data is never run; running out of memory is an error with advice."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from support.own_code import RAN, forget_code, with_code
from test_cli import invoke, sets

import lolcats
from lolcats import pipeline
from lolcats.config import load_config
from lolcats.data import store
from lolcats.data.rows import load_data
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import LORA, LORA_WEIGHTS
from lolcats.stages.finetune.trainer import BestKeeper
from lolcats.weights.base import find_base, load_model


class Evil:
    def __reduce__(self) -> Any:
        return (print, (RAN,))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Records every call of torch.load and its weights_only; pickle's own readers must not be called at all."""
    calls: list[tuple[str, Any]] = []
    real = torch.load

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((str(getattr(file, "name", file)), kwargs.get("weights_only")))
        return real(file, *args, **kwargs)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was asked to read something")

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    return calls


def test_a_whole_run_unpickles_nothing(
    loaded: list, model_dirs, chat_file: Path, tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run that is resumed: the Trainer's checkpoints are read from the run's own folder, as tensors
    only."""
    out, config, original = tmp_path / "out", load_config("paper-sinks", settings), BestKeeper.on_step_end

    def stopping(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == 3
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BestKeeper, "on_step_end", stopping)
        with pytest.raises(lolcats.errors.Interrupted):
            pipeline.linearize(str(model_dirs["llama"]), str(chat_file), out, config)
    assert not loaded
    pipeline.linearize(str(model_dirs["llama"]), str(chat_file), out, config)
    assert loaded, "the checkpoint's optimizer was read"
    for path, weights_only in loaded:
        assert Path(path).is_relative_to(out / "checkpoints"), path
        assert weights_only is True, path
    loaded.clear()
    for directory in (out, out / "merged"):
        lolcats.load(directory)
    assert not loaded


def test_what_the_pages_say_of_pickles(loaded: list, model_dirs, tmp_path: Path) -> None:
    """A base model's .bin weights go through torch's restricted unpickler."""
    shutil.copytree(model_dirs["llama"], tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), tmp_path / "base" / "pytorch_model.bin")
    load_model(find_base(str(tmp_path / "base")), torch.float32)
    assert [(Path(path).name, weights_only) for path, weights_only in loaded] == [("pytorch_model.bin", True)]
    root = Path(__file__).parents[1]
    pages = {page: " ".join((root / page).read_text().split()) for page in ("README.md", "docs/commands.md")}
    for page, text in pages.items():
        assert "`.bin` weights" in text, page
        assert "torch's restricted unpickler" in text, page
    assert not [page for page in root.glob("docs/**/*.md") if "in a model is unpickled" in page.read_text()]


def test_pickles_in_a_base_model_are_not_run(model_dirs, tmp_path: Path, capfd) -> None:
    shutil.copytree(model_dirs["llama"], tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(LolcatsError, match="Cannot load"):
        load_model(find_base(str(tmp_path / "base")), torch.float32)
    torch.save(tiny_model().state_dict(), tmp_path / "base" / "pytorch_model.bin")
    load_model(find_base(str(tmp_path / "base")), torch.float32)  # only tensors may be stored this way
    assert RAN not in capfd.readouterr().out


def test_pickles_in_an_adapter_are_not_run(model_dirs, chat_file, tmp_path: Path, settings, capfd) -> None:
    changes = [*settings, "transfer.max_steps=0", "finetune.max_steps=1"]
    out = tmp_path / "out"
    said = invoke("linearize", model_dirs["llama"], "--data", chat_file, "--out", out, "--no-merge", *sets(changes))
    assert f"Adapter: {out}   card: {out / 'README.md'}" in said, "no merged model is named that was not written"
    (out / LORA / LORA_WEIGHTS).unlink()
    torch.save({"x": Evil()}, out / LORA / "adapter_model.bin")
    with pytest.raises(LolcatsError, match="is missing"):
        lolcats.load(out)
    assert RAN not in capfd.readouterr().out


def test_pickles_in_cached_data_are_not_run(tmp_path: Path, chat_file, tokenizer, monkeypatch, capfd) -> None:
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path))
    config = load_config("paper-sinks", ["data.sequence_length=128"]).data
    load_data(str(chat_file), tokenizer, config)
    (path,) = tmp_path.glob("*/lengths.npy")
    np.save(path, np.array([Evil()], dtype=object))
    with pytest.raises(LolcatsError, match="damaged"):
        load_data(str(chat_file), tokenizer, config)
    assert RAN not in capfd.readouterr().out


def test_each_command_needs_consent_to_run_the_code_of_a_base_model(
    model_dirs, chat_file: Path, tmp_path: Path, settings, capfd
) -> None:
    """What an earlier command was allowed is recorded nowhere as consent; with it, an adapter can be used."""

    def run(*arguments: object, code: int = 0) -> str:
        forget_code()
        return invoke(*arguments, code=code) + capfd.readouterr().out

    base, out = with_code(model_dirs["llama"], tmp_path / "base"), tmp_path / "out"
    start = ("--data", chat_file, "--out", out, "--no-merge", *sets([*settings, "finetune.max_steps=1"]))
    assert RAN in run("transfer", base, *start[:4], *start[5:], "--trust-remote-code")
    record = json.loads((out / "run.json").read_text())
    record["config"]["trust_remote_code"] = True  # as older versions wrote it
    (out / "run.json").write_text(json.dumps(record))
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace("trust_remote_code: false", "trust_remote_code: true"))
    use: tuple[tuple[object, ...], ...] = (
        ("finetune", out, "--no-merge"), ("generate", out, "--prompt", "the cat", "--max-new-tokens", 2),
        ("evaluate", out, "--data", chat_file, "--rows", 4), ("export", out, "--merge", "--out", tmp_path / "merged"),
    )  # fmt: skip
    for command in use:
        said = run(*command, code=2)
        assert "--trust-remote-code" in said
        assert RAN not in said
    for command in use:
        assert RAN in run(*command, "--trust-remote-code")
    moved = base.rename(tmp_path / "moved")
    assert RAN in run(*use[1], "--base", moved, "--trust-remote-code")


def test_code_of_a_base_model_runs_only_when_asked(model_dirs, tmp_path: Path, capfd) -> None:
    forget_code()
    base = with_code(model_dirs["llama"], tmp_path / "base")
    with pytest.raises(LolcatsError, match="--trust-remote-code"):
        load_model(find_base(str(base)), torch.float32)
    assert "--trust-remote-code" in invoke("generate", base, "--prompt", "the cat", code=2)
    setting = ("--set", "trust_remote_code=true")
    for command in (
        ("generate", base, "--prompt", "the cat"),
        ("linearize", base, "--data", "x", "--out", tmp_path / "o"),
    ):
        assert "allow it for each command with --trust-remote-code" in invoke(*command, *setting, code=2)
    assert RAN not in capfd.readouterr().out
    asked = ("--trust-remote-code", "--max-new-tokens", 2)
    assert RAN in invoke("generate", base, "--prompt", "the cat", *asked) + capfd.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_out_of_memory_says_what_to_lower(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def linearize(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "linearize", linearize)
    output = invoke("linearize", "model", "--data", "data.jsonl", "--out", tmp_path / "out", code=2)
    for name in ("transfer.micro_batch_size", "data.sequence_length", "finetune.gradient_checkpointing"):
        assert name in output


def test_a_real_allocation_that_fails_is_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert lolcats.errors.out_of_memory(caught.value)
    assert not lolcats.errors.out_of_memory(RuntimeError("shapes do not fit"))
