"""Run directories, adapters, merged models and sweeps written by commit b5a2d0a still load, go on and say the same.

What each file is, and how to write them again: tests/fixtures/make.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.make import (
    COMMANDS,
    EXPECTED,
    FROM_BASE,
    RECIPE,
    STOPPED_AFTER,
    SWEEP_COMMAND,
    WRITTEN,
    command_values,
    invoke,
    model_values,
    numbers,
    run_values,
    unpack,
)
from safetensors.torch import load_file
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

RECORDED = json.loads((WRITTEN / EXPECTED).read_text())
TOLERANCE = 1e-6
PRINTED = 1.1e-3  # tables have three places, of which another processor may round the last otherwise


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything, in which the recorded paths are right: they are relative to the working directory."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


@pytest.mark.parametrize("name", ["run", "adapter", "merged"])
def test_models_load_and_generate(name: str) -> None:
    found, expected = model_values(name), RECORDED["models"][name]
    assert found["tokens"] == expected["tokens"]
    for key in ("logits", "through the cache"):
        assert_close(found[key], expected[key])
    assert_close(expected["logits"], expected["through the cache"], 1e-5)


def test_merged_is_the_run_exported(place: Path) -> None:
    assert "merged" in invoke("export", "run", "--merge", "--out", "exported").lower()
    ours, theirs = (load_file(place / name / "model.safetensors") for name in ("exported", "merged"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=TOLERANCE, atol=TOLERANCE * tensor.abs().max().item())
    assert_close(model_values("exported")["logits"], RECORDED["models"]["merged"]["logits"])


def test_commands_print_the_same() -> None:
    found, expected = command_values(), RECORDED["commands"]
    assert found["generate"] == expected["generate"]
    for command in ("info", "evaluate"):
        for name, values in expected[command].items():
            assert found[command][name] == pytest.approx(values, rel=TOLERANCE, abs=PRINTED), (command, name)


def test_a_finished_run_is_not_done_again(place: Path) -> None:
    names = ("feature_maps.safetensors", "lora/adapter_model.safetensors", "metrics.jsonl")
    before = [(place / "run" / name).read_bytes() for name in names]
    results = json.loads((place / "run" / "run.json").read_text())["results"]
    invoke("linearize", *FROM_BASE, "--no-merge", "--out", "run")
    assert [(place / "run" / name).read_bytes() for name in names] == before
    assert json.loads((place / "run" / "run.json").read_text())["results"] == results
    assert_same_run(run_values("run"), RECORDED["unfinished"])


@pytest.mark.parametrize("name", COMMANDS)
def test_unfinished_runs_go_on(name: str, place: Path) -> None:
    """To the same weights as if they had never been stopped, without a step done twice.

    The stage 1 of ``unfinished`` was one of transformers' Trainer, whose checkpoints are refused with a sentence.
    """
    unpack(place / name)
    if name == "unfinished":
        assert "left unfinished by an older version" in invoke(*COMMANDS[name], name, code=2)
        return
    with counted_steps() as steps:
        invoke(*COMMANDS[name], name)
    assert_same_run(run_values(name), RECORDED[name])
    left = RECIPE["transfer"]["max_steps"] - STOPPED_AFTER
    assert len(steps) == 2 * left
    assert not list((place / name).rglob("checkpoint*/*"))


def test_results_of_a_sweep_count(place: Path) -> None:
    """All rows are known by their keys: nothing is trained, and the table has the same numbers."""
    results, table = (place / "sweep" / name for name in ("results.jsonl", "table.md"))
    before, shown = results.read_bytes(), numbers(table.read_text())
    table.unlink()
    invoke(*SWEEP_COMMAND)
    assert results.read_bytes() == before
    assert numbers(table.read_text()) == shown
    assert len(shown) > 20
    assert not list((place / "sweep").glob("*/run.json"))


def test_nothing_of_a_machine_is_in_the_files() -> None:
    for path in WRITTEN.rglob("*"):
        if path.is_file():
            text = path.read_bytes().decode(errors="replace")
            assert not [word for word in ("/tmp", "/work", "/home", "/root", "/usr") if word in text], path
    assert not [path for ending in ("pt", "pth", "bin", "pkl") for path in WRITTEN.rglob(f"*.{ending}")]
    assert sum(path.stat().st_size for path in WRITTEN.rglob("*") if path.is_file()) < 300_000


@contextmanager
def counted_steps() -> Iterator[list[Optimizer]]:
    """Optimizers, one entry for each step that any of them takes."""
    steps: list[Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(optimizer))
    try:
        yield steps
    finally:
        handle.remove()


def assert_close(found: list[float], expected: list[float], tolerance: float = TOLERANCE) -> None:
    """Relative to the largest: a small logit is the difference of large terms."""
    scale = max(map(abs, expected))
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance * scale)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("loss", "eval_loss"):
        assert [step for step, _ in found[name]] == [step for step, _ in expected[name]]
        assert [value for _, value in found[name]] == pytest.approx([v for _, v in expected[name]], rel=TOLERANCE)
    for part in ("stages", "results"):
        assert list(found[part]) == list(expected[part])
        for name, values in expected[part].items():
            assert found[part][name] == pytest.approx(values, rel=TOLERANCE), name
    assert list(found["tensors"]) == list(expected["tensors"])
    for name, (norm, projection) in expected["tensors"].items():
        assert found["tensors"][name] == pytest.approx([norm, projection], rel=0, abs=TOLERANCE * norm), name
