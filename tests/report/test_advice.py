"""What is said of a model that is worse than its window and sinks with nothing trained, where, and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS
from test_cli import invoke, sets

from lolcats.compared import STUDENT, TRANSFERRED, WINDOW_SINKS
from lolcats.config import load_config, to_dict
from lolcats.pipeline import linearize
from lolcats.report import html
from lolcats.report.advice import verdict, verdict_on
from lolcats.report.table import ADAPTATION, remarks
from lolcats.run import Run

WORSE = "The student is worse than window + 4 sinks with nothing trained (perplexity 12.50 against 10.00, +25.0 %)."
LENGTH = 1024
LONG = {"steps": 1000, "best_step": 1000}  # of 8 rows: 8M tokens


def a_run(
    directory: Path, changes: list[str], stages: dict[str, Any], results: dict[str, float], **layer: Any
) -> Run:  # fmt: skip
    config = load_config("paper-sinks", changes)
    kind = layer.pop("kind", config.attention.kind)
    record = {"layers": [{"layer": 0, "kind": kind, **layer}, {"layer": 1, "kind": config.attention.kind}]}
    (directory / "config.json").write_text(json.dumps({"lolcats": record}))
    run = Run(directory, {"config": to_dict(config), "stages": stages, "results": {"ppl_teacher": 8.0, **results}})
    run.save()
    return run


def worse(made: str = STUDENT.result) -> dict[str, float]:
    return {WINDOW_SINKS.result: 10.0, made: 12.5}


@pytest.mark.parametrize(("changes", "stages", "expected"), [
    ([], {"transfer": {"steps": 6, "best_step": 6}, "finetune": LONG},
     "train stage 1 longer (transfer.max_steps, transfer.epochs or more data): it had 49,152 tokens, while the models "
     "in docs/quality.md had 4 million or more"),
    ([], {"transfer": LONG, "finetune": {"steps": 1000, "best_step": 300}},
     "lower finetune.learning_rate: the validation loss was lowest at step 300 of 1000"),
    ([], {"transfer": LONG, "finetune": {"skipped": True}}, "do not skip stage 2 (finetune.max_steps=-1)"),
    ([], {"transfer": {"skipped": True}, "finetune": LONG}, "do not skip stage 1 (transfer.max_steps=-1)"),
    (["attention.kind=window"], {"transfer": {"skipped": True}, "finetune": LONG},
     "train longer, or on more varied data"),
    (["attention.kind=linear"], {"transfer": LONG, "finetune": LONG},
     "give the layers a window (attention.kind=hybrid)"),
    ([], {"transfer": LONG, "finetune": LONG}, "train longer, or on more varied data"),
])  # fmt: skip
def test_what_to_change(changes: list[str], stages: dict[str, Any], expected: str, tmp_path: Path) -> None:
    run = a_run(tmp_path, changes, stages, worse())
    assert verdict(run) == f"{WORSE} What to change: {expected}."
    assert remarks(run)[-1] == verdict(run)


def test_several_things_to_change(tmp_path: Path) -> None:
    stages = {"transfer": {"steps": 6, "best_step": 3}}
    text = verdict(a_run(tmp_path, ["attention.sinks=0"], stages, worse(TRANSFERRED.result)))
    assert text.startswith("The model without LoRA is worse than window + 4 sinks with nothing trained")
    for change in ("attention.sinks=4", "lolcats finetune DIR", "train stage 1 longer", "lower transfer.learning_rate"):
        assert change in text


@pytest.mark.parametrize("results", [
    {}, {WINDOW_SINKS.result: 10.0}, {STUDENT.result: 12.5}, {WINDOW_SINKS.result: 10.0, STUDENT.result: 10.0},
    {**worse(TRANSFERRED.result), STUDENT.result: 9.0},
])  # fmt: skip
def test_nothing_is_said_of_better_or_unmeasured_models(results: dict[str, float], tmp_path: Path) -> None:
    run = a_run(tmp_path, [], {"transfer": LONG, "finetune": LONG}, results)
    assert verdict(run) == ""
    assert "" not in remarks(run)


def test_softmax_that_the_baseline_keeps_too(tmp_path: Path) -> None:
    stages = {"transfer": LONG, "finetune": LONG}
    assert "sinks and the same softmax heads with" in verdict(a_run(tmp_path, [], stages, worse(), softmax_heads=[1]))
    assert "sinks and the same softmax layers with" in verdict(a_run(tmp_path, [], stages, worse(), kind="softmax"))
    assert verdict(a_run(tmp_path, ["attention.kind=softmax"], stages, worse())) == "", "nothing was linearized"


def test_text_that_is_longer_than_the_training_rows(tmp_path: Path) -> None:
    found = {"teacher": 8.0, "window+sinks": 10.0, "student": 12.5}
    stages = {"transfer": {"steps": 6, "best_step": 6}, "finetune": LONG}
    run = a_run(tmp_path, [], stages, worse())
    assert "train stage 1 longer" in verdict_on(found, str(tmp_path), LENGTH)
    text = verdict_on(found, str(tmp_path), 4 * LENGTH)
    assert text.startswith(
        "The student is worse than window + sinks with nothing trained. What to change: feature maps"
    )
    assert "1,024 tokens: for longer text, train with attention.feature_inputs=unrotated" in text
    a_run(tmp_path, ["attention.feature_inputs=unrotated"], run.record["stages"], worse())
    assert "unrotated" not in verdict_on(found, str(tmp_path), 4 * LENGTH)
    assert verdict_on({**found, "student": 9.0}, str(tmp_path), LENGTH) == ""
    (tmp_path / "run.json").unlink()
    assert "What to change" not in verdict_on(found, str(tmp_path), LENGTH), "an adapter without its run"


def test_where_it_is_said(model_dirs, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the log, after the table, in the model card, the report, and after the table of ``evaluate --data``."""
    monkeypatch.setenv("COLUMNS", "1000")
    said: list[str] = []
    out, changes = tmp_path / "out", [*SETTINGS, "finetune.learning_rate=10"]
    config = load_config("paper-sinks", changes)
    run = linearize(str(model_dirs["llama"]), str(chat_file), out, config, merge=False, say=said.append)
    text = verdict(run)
    assert text.startswith("The student is worse than window + 2 sinks with nothing trained")
    assert said.count(text) == 1
    assert text in (out / "README.md").read_text()
    assert text in "".join(dict(html.SECTIONS)["Perplexity"](run))
    shown = invoke("linearize", model_dirs["llama"], "--data", chat_file, "--out", out, "--no-merge", *sets(changes))
    lines = [line.strip() for line in shown.splitlines()]
    table = lines[: next(i for i, line in enumerate(lines) if "State per sequence" in line)]
    assert [line for line in table if line][-1] == text
    assert "window + sinks with nothing trained" in invoke("evaluate", out, "--data", chat_file)


def test_a_stage_1_by_itself(model_dirs, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    changes = [*SETTINGS, "transfer.max_steps=0", "attention.kind=linear"]
    shown = invoke("transfer", model_dirs["llama"], "--data", chat_file, "--out", tmp_path / "out", *sets(changes))
    assert shown.count("The model without LoRA is worse than window + 2 sinks with nothing trained") == 2, "log, table"
    for change in ("attention.kind=hybrid", "do not skip stage 1", "run stage 2 (lolcats finetune DIR)"):
        assert change in shown


@pytest.mark.parametrize(("student", "loss", "said"), [
    (7.5, "cross_entropy", True), (7.999, "cross_entropy", False), (7.5, "kl", False), (8.5, "mix", False)
])  # fmt: skip
def test_a_student_better_than_its_teacher_has_adapted(student: float, loss: str, said: bool, tmp_path: Path) -> None:
    """Not by what rounds to nothing, nor where it only learns to predict as the teacher does."""
    run = a_run(tmp_path, [f"finetune.loss={loss}"], {"transfer": LONG, "finetune": LONG}, {STUDENT.result: student})
    assert (ADAPTATION in remarks(run)) == said
