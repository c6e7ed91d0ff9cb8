"""The models beside a sweep's student: its controls, and its window and sinks with nothing trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SETTINGS

from lolcats.config import load_config
from lolcats.lab.sweep.execute import run_sweep
from lolcats.lab.sweep.plan import Row, Sweep, plan, read_sweep
from lolcats.pipeline import linearize
from lolcats.run import Run
from lolcats.tensors import read_tensors

FEW = ["transfer.max_steps=2", "finetune.max_steps=2", "transfer.eval_steps=2"]
WINDOW = "window + sinks, nothing trained"


def sweep_of(folder: Path, model: Path, data: Path, rows: dict[str, list[str]], **evaluate: Any) -> Sweep:
    tree = {"base": {"recipe": "paper-sinks", "model": str(model), "data": str(data), "set": [*SETTINGS, *FEW]},
            "rows": rows, "evaluate": evaluate}  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_sweep(path)


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", []), ("llama", ["finetune.loss=kl"]), ("llama", ["finetune.protect_kept=true"]),
    ("llama", ["finetune.protect_kept=true", 'attention.softmax_heads={"0": [1]}']),
    ("llama", ["finetune.protect_kept=true", 'attention.layers={"1": "softmax"}', "finetune.loss=mix"]),
    ("gemma3", ["finetune.protect_kept=true", 'attention.softmax_heads={"1": [0]}']),
])  # fmt: skip
def test_a_control_is_what_linearize_trains_beside_a_run(family: str, settings: list[str], chat_file: Path, model_dirs,
                                                         tmp_path: Path) -> None:  # fmt: skip
    """Gemma 3's first layer has a sliding window and stays as it is."""
    rows = {"hybrid": ["controls=[window_lora, teacher_lora]", *settings]}
    sweep = sweep_of(tmp_path, model_dirs[family], chat_file, rows)
    results = run_sweep(sweep, tmp_path / "out", "", lambda _: None)
    (only,) = plan(sweep)
    linearize(str(model_dirs[family]), str(chat_file), tmp_path / "run", only.config, merge=False, say=lambda _: None)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    for name in ("window_lora", "teacher_lora"):
        own = results[-1]["systems"][name.replace("_", "+")]["held-out"]["value"]
        assert own == pytest.approx(record[f"ppl_{name}"], rel=1e-6)
        lora = Path("lora", "adapter_model.safetensors")
        (found,) = (tmp_path / "out").glob(f"{name.replace('_', '-')}-*")
        trained = [trained_rows(folder / lora) for folder in (found, tmp_path / "run" / "controls" / name)]
        assert trained[0] == trained[1]
        assert any(any(rows) for matrix, rows in trained[0].items() if "q_proj.lora_B" in matrix)


def trained_rows(path: Path) -> dict[str, list[bool]]:
    """By the name of each matrix of an adapter, whether its rows have been trained: B begins as zeros."""
    return {name: (matrix != 0).any(1).tolist() for name, matrix in read_tensors(path).items()}


def test_keys_of_controls_that_were_right() -> None:
    """Rows that keep heads share the adapted teacher with those that keep none, unless LoRA leaves them out."""
    base = [*SETTINGS, "attention.window_size=8"]

    def teacher(*settings: str) -> Any:
        row = Row("a", [], load_config("paper-sinks", [*base, *settings]), "")
        return row.controls["teacher_lora"].config

    kept = 'attention.softmax_heads={"0": [1]}'
    assert teacher() == teacher(kept) == teacher("attention.sinks=0")
    assert teacher("finetune.protect_kept=true") == teacher()
    assert teacher("finetune.protect_kept=true", kept) != teacher()


def test_the_untrained_window_is_one_whatever_the_first_row_is(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """Also if that is the teacher with LoRA, as a row: no layer of it has a window."""
    rows = {
        "hybrid": ["transfer.max_steps=0"],
        "teacher": ["attention.kind=softmax"],
        "linear": ["attention.kind=linear"],
    }
    files = {"perplexity": {"chat": str(chat_file)}}
    found = {}
    for first in rows:
        sweep = sweep_of(tmp_path, model_dirs["llama"], chat_file, {first: rows[first]}, **files)
        found[first] = run_sweep(sweep, tmp_path / first, "", lambda _: None)
    values = {name: results[1]["systems"][WINDOW]["chat"]["value"] for name, results in found.items()}
    assert values["teacher"] == pytest.approx(values["hybrid"], rel=1e-6)
    assert values["linear"] == pytest.approx(values["hybrid"], rel=1e-6)
    assert abs(values["teacher"] / found["teacher"][0]["systems"]["teacher"]["chat"]["value"] - 1) > 1e-5
    assert found["teacher"][1]["row"] != found["hybrid"][1]["row"], "earlier versions measured the teacher there"
    assert set(found["teacher"][2]["systems"]) == {"teacher", "student"}


def test_a_run_that_cannot_be_read_stops_no_row(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """One with a setting that was removed, and one with a damaged record."""
    sweep = sweep_of(tmp_path, model_dirs["llama"], chat_file, {"first": [], "second": ["finetune.rank=2"]})
    out = tmp_path / "out"
    results = run_sweep(sweep, out, "", lambda _: None)
    directory = out / results[2]["directory"]
    record = Run.open(directory).record
    for name, text in (
        ("a-removed", json.dumps({**record, "config": {**record["config"], "transfer": {"window_dropout": 0.1}}})),
        ("a-damaged", "{"),
    ):
        (out / name).mkdir()
        (out / name / "run.json").write_text(text)
    (out / "results.jsonl").unlink()
    shutil.rmtree(out / results[3]["directory"])
    again = run_sweep(sweep, out, "", lambda _: None)
    assert [r["systems"]["student"] for r in again[2:]] == [r["systems"]["student"] for r in results[2:]]
    assert again[3]["transfer_of"] == directory.name
