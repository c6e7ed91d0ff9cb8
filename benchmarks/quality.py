"""Tables of a sweep's results for ``benchmarks/quality/``: NAME.md and NAME.json for each experiment.

    lolcats sweep experiments/table6.yaml experiments/controls.yaml MODEL --data DATA --out DIR ...
    python benchmarks/quality.py DIR/results.jsonl --name smollm2-135m --teacher "SmolLM2-135M-Instruct, ..."

The JSON has everything that is in the results but single items: settings, figures with standard errors, errors by
layer, γ, tokens, seconds, and of each row what the linear term adds. ``--commit``: of results that know none.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lolcats.evaluation.systems import STUDENT
from lolcats.files import write_text
from lolcats.sweep.execute import with_controls
from lolcats.sweep.table import ROW, UNTRAINED, WINDOW_LORA, difference, render

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HERE = Path(__file__).parent / "quality"
SCORES = (
    "piqa acc", "arc_easy acc", "arc_challenge acc_norm", "hellaswag acc_norm", "winogrande acc",
    "zero-shot average acc, acc_norm", "mmlu_half acc",
)  # fmt: skip
"""Scores that are shown, those of the paper; the JSON has lm-eval's other metrics too."""
TITLES = {path.stem: path.read_text().partition("title: ")[2].splitlines()[0] for path in EXPERIMENTS.glob("*.yaml")}


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Lines of results.jsonl, packed or not; of several files together."""
    texts = [(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()).decode() for p in paths]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def of_experiment(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The untrained models and an experiment's rows with their controls; measured alike: as its newest row was."""
    rows = [r for r in results if r.get("kind") == ROW and r["sweep"] == name]
    if not rows:
        return []
    rows = [r for r in rows if r["evaluation"] == rows[-1]["evaluation"]]
    untrained = {
        r["name"]: r for r in results if r.get("kind") == UNTRAINED and r["evaluation"] == rows[-1]["evaluation"]
    }
    return [*untrained.values(), *with_controls(rows, results)]


def tables(
    results: list[dict[str, Any]], model: str, teacher: str, note: str, out: Path, commit: str = ""
) -> list[Path]:  # fmt: skip
    """Write what there is of every experiment."""
    written = []
    for name, title in sorted(TITLES.items()):
        if found := of_experiment(results, name):
            found = [{**r, "commit": r["commit"] or commit, "command": _bare(r["command"])} for r in found]
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{name}-{model}"
            write_text(path.with_suffix(".md"), report(title, found, model, teacher, note))
            record = {"title": title, "model": model, "teacher": teacher, "note": note, "results": packed(found)}
            write_text(path.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            written.append(path.with_suffix(".md"))
    return written


def report(title: str, results: list[dict[str, Any]], model: str, teacher: str, note: str) -> str:
    command = "\n".join(dict.fromkeys(r["command"] for r in results if r["kind"] == ROW))
    measured = [name for r in results for system in r["systems"].values() for name in system]
    shown = [m for m in dict.fromkeys(measured) if not m.endswith(("acc", "acc_norm")) or m in SCORES]
    head = f"# {title}: {model}\n\nTeacher: {teacher}. {note}\n\n"
    return head + render("", results, command, shown)


def packed(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results without single items; rows with what the linear term adds, and its standard error."""
    return [{**r, "adds": adds(r), "systems": _without_items(r["systems"])} for r in results]


def adds(result: dict[str, Any]) -> dict[str, Any]:
    """Student against the same LoRA without a linear term: change of perplexities in %, of scores in points."""
    student, control = (result["systems"].get(name, {}) for name in (STUDENT, WINDOW_LORA))
    both = [metric for metric in student if metric in control]
    found = {metric: difference(student[metric], control[metric], metric) for metric in both}
    return {metric: dict(zip(("value", "stderr"), pair, strict=True)) for metric, pair in found.items() if pair}


def _bare(command: str) -> str:
    """A command whose paths have lost their folders, which are of the machine it ran on."""
    return re.sub(r"(?<![^\s='\"])/[^\s'\"=]*/", "", command)


def _without_items(systems: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {metric: {k: v for k, v in entry.items() if k != "items"} for metric, entry in system.items()}
        for name, system in systems.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl of a model, also packed (.gz)")
    parser.add_argument("--name", required=True, help="the model's, for files and titles")
    parser.add_argument("--teacher", required=True, help="what it is and where its weights come from")
    parser.add_argument("--note", default="", help="items a task, tokens, what else a reader must know")
    parser.add_argument("--commit", default="", help="of results that know none")
    parser.add_argument("--out", type=Path, default=HERE)
    a = parser.parse_args()
    for path in tables(read_results(a.results), a.name, a.teacher, a.note, a.out, a.commit):
        print(path)


if __name__ == "__main__":
    main()
