"""Benchmark scores of several models side by side, as table rows and as plain data for a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lolcats.compared import STUDENT, TEACHER
from lolcats.evaluation.scores import Estimate, Score, difference, share_closed
from lolcats.evaluation.suite import Options
from lolcats.files import write_text
from lolcats.version import __version__

Scores = dict[str, list[Score]]
"""Scores by model name; every list has the same tasks in the same order."""
NONE = "n/a"


def comparison_rows(scores: Scores) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) with every task and metric: the score of each model, the difference of the student to each other
    model, and the share of the gap between each baseline and the teacher that the student closes.

    Values are ± one standard error; ↓ marks metrics where lower is better.
    """
    return entry_rows(comparison(scores))


def entry_rows(entries: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Same as :func:`comparison_rows`, from the entries of :func:`comparison` or of its JSON file."""
    models = list(entries[0]["models"])
    header = ["task", "items", *models]
    pair, baselines = {STUDENT.name, TEACHER.name} <= set(models), _baselines(models)
    header += ["student − teacher"] * pair
    for name in baselines if pair else ():
        header += [f"student − {name}", "gap closed" if len(baselines) == 1 else f"gap to {name} closed"]
    rows = []
    for entry in entries:
        name = f"{entry['task']} {entry['metric']}" + ("" if entry["higher_is_better"] else " ↓")
        row = [name, f"{entry['items']:,}" if entry["items"] else ""]
        row += [_readable(entry["models"][name]) for name in models]
        if pair:
            row.append(_readable(entry["difference"], sign=True))
        for name in baselines if pair else ():
            found = entry["baselines"][name]
            row += [_readable(found["difference"], sign=True), _readable(found["gap_closed"], percent=True)]
        rows.append(tuple(row))
    return tuple(header), rows


def comparison(scores: Scores) -> list[dict[str, Any]]:
    """One entry per task and metric; ``gap_closed`` is None if teacher and baseline are equal within noise."""
    entries = []
    for aligned in zip(*scores.values(), strict=True):
        by_name = dict(zip(scores, aligned, strict=True))
        first, student, teacher = aligned[0], by_name.get(STUDENT.name), by_name.get(TEACHER.name)
        entry: dict[str, Any] = {"task": first.task, "metric": first.metric, "items": first.count,
                                 "higher_is_better": first.higher_is_better}  # fmt: skip
        entry["models"] = {name: _plain(Estimate(s.value, s.stderr)) for name, s in by_name.items()}
        if student and teacher:
            entry["difference"] = _plain(difference(student, teacher))
            entry["baselines"] = {name: _against(student, teacher, by_name[name]) for name in _baselines(scores)}
        entry["results"] = {name: score.items for name, score in by_name.items()}
        if first.labels:
            entry["depths"] = first.labels
        if first.clusters:
            entry["prompts"] = first.clusters
        entries.append(entry)
    return entries


def write_comparison(path: Path, scores: Scores, model: str, tasks: list[str], baselines: list[str],
                     place: tuple[torch.device, torch.dtype], options: Options,
                     quantize: str = "none") -> None:  # fmt: skip
    """Write all scores, including the result of each item, and how they were measured to one JSON file."""
    packages = (p for name in ("torch", "transformers", "lm-eval") for p in metadata.distributions(name=name))
    versions = {package.name: package.version for package in packages}
    record = {
        "model": model, "tasks": tasks, "baselines": baselines, "date": str(date.today()),
        "versions": {"lolcats": __version__, **versions}, "device": str(place[0]),
        "dtype": str(place[1]).removeprefix("torch."), "quantize": quantize, "options": asdict(options),
        "scores": comparison(scores),
    }  # fmt: skip
    write_text(path, json.dumps(record, default=str) + "\n")


def depth_rows(scores: Scores, metric: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) of a metric by task, model and depth; no rows if no score has depths."""
    labelled = [s for s in next(iter(scores.values())) if s.labels and s.metric == metric]
    depths = sorted({label for score in labelled for label in score.labels}, key=float)
    rows = []
    for wanted in labelled:
        for name, own in scores.items():
            score = next(s for s in own if s.key == wanted.key)
            rows.append((wanted.task, name, *(_at(score, depth) for depth in depths)))
    return ("task", "model", *(f"depth {depth}" for depth in depths)), rows


def _at(score: Score, depth: str) -> str:
    items = [x for x, label in zip(score.items[0], score.labels, strict=True) if label == depth]
    return f"{sum(items) / len(items):.2f}" if items else ""


def _baselines(models: Iterable[str]) -> list[str]:
    return [name for name in models if name not in (TEACHER.name, STUDENT.name)]


def _against(student: Score, teacher: Score, baseline: Score) -> dict[str, Any]:
    share = share_closed(student, teacher, baseline)
    return {"difference": _plain(difference(student, baseline)), "gap_closed": _plain(share) if share else None}


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "stderr": estimate.stderr}


def _readable(estimate: dict[str, float | None] | None, sign: bool = False, percent: bool = False) -> str:
    if estimate is None or estimate["value"] is None:
        return NONE
    number = f"{'+' if sign else ''}.{'0%' if percent else '3f'}"
    error = f" ± {estimate['stderr']:{number.lstrip('+')}}" if estimate["stderr"] is not None else ""
    return f"{estimate['value']:{number}}{error}"
