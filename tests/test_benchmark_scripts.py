"""The training benchmark runs, at a size that measures nothing."""

from __future__ import annotations

import importlib.util
import json
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
