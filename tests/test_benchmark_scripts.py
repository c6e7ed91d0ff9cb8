"""The training benchmark runs, at a size that measures nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def training() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_part(training: ModuleType, tmp_path: Path) -> None:
    results = training.run(training.TINY, torch.device("cpu"), 100, tmp_path)
    training.draw(results, tmp_path)
    assert json.loads((tmp_path / "training.json").read_text()) == results
    assert not [name for name, part in results["parts"].items() if "missing" in part]
    assert len(results["parts"]) == (tmp_path / "training.md").read_text().count(" | 256 | ")


def test_nothing_begins_behind_the_deadline(training: ModuleType, tmp_path: Path) -> None:
    results = training.run(training.TINY, torch.device("cpu"), 0, tmp_path)
    assert {part["missing"] for part in results["parts"].values()} == {"no time left"}
    assert "no time left" in (tmp_path / "training.md").read_text()


def test_needs_a_gpu_and_says_so(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["training.py"])
    with pytest.raises(SystemExit, match="needs a CUDA"):
        training.main()
    monkeypatch.setattr(sys, "argv", ["training.py", "--tiny"])
    with pytest.raises(SystemExit, match="--out"):
        training.main()


@pytest.mark.slow
def test_several_gpus(tmp_path: Path) -> None:
    """Both stages and generation on one and two processes, from the same weights: the same losses and tokens."""
    script = Path(__file__).parent.parent / "benchmarks" / "multi_gpu.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path, "--deadline", "400"], check=True)
    results = json.loads((tmp_path / "multi_gpu.json").read_text())
    assert not results["failures"]
    assert set(results["parts"]) == {"stage 1", "stage 2", "large stage 2", "generation"}
    for name, part in results["parts"].items():
        assert set(part) == {"1", "2"}, name
        if name != "generation":
            losses = part["2"]["losses"]
            assert losses[-1] < losses[0] - 1e-4
            assert part["2"]["loss_difference"] < 1e-4
    for rows, batch in results["parts"]["generation"]["2"]["batches"].items():
        assert batch["first_row"] == results["parts"]["generation"]["1"]["batches"][rows]["first_row"]
    assert (tmp_path / "multi_gpu.md").read_text().count("| 2 |") >= 4


def test_several_gpus_need_an_output(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "multi_gpu.py"
    done = subprocess.run([sys.executable, script, "--tiny"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "choose another --out" in done.stderr
