"""Tables of sweeps' results for ``benchmarks/quality/``: MODEL.jsonl.gz and EXPERIMENT-MODEL.md of each experiment.

    python benchmarks/quality_data.py ...       # the data
    lolcats sweep experiments/table6.yaml experiments/controls.yaml MODEL --data DATA --out DIR ...
    python benchmarks/quality.py DIR/results.jsonl --name smollm2-135m --teacher "SmolLM2-135M-Instruct, ..."
    python benchmarks/quality.py benchmarks/quality/smollm2-135m.jsonl.gz                         # the tables again
    python benchmarks/quality.py benchmarks/quality/smollm2-135m.jsonl.gz DIR/results.jsonl       # and what is new

MODEL.jsonl.gz holds every figure, of single items too: unpacked as a sweep's results.jsonl, it is continued, on any
machine. ``--commit``: of results that know none.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

import common

from lolcats.files import write_text
from lolcats.lab.sweep.execute import with_controls
from lolcats.lab.sweep.table import ROW, UNTRAINED, render

HERE = Path(__file__).parent / "quality"
SCORES = (
    "piqa acc", "arc_easy acc", "arc_challenge acc_norm", "hellaswag acc_norm", "winogrande acc",
    "zero-shot average acc, acc_norm", "mmlu_half acc",
)  # fmt: skip
"""Scores that are shown, those of the paper; the packed results have lm-eval's other metrics too."""
ABOUT = "about"
KEYS = ("kind", "row", "evaluation", "sweep", "name")  # what tells a result


def of_experiment(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The untrained models and an experiment's rows with their controls, measured alike."""
    rows = common.alike([r for r in results if r.get("kind") == ROW and r["sweep"] == name])
    ways = {r["evaluation"] for r in rows}
    untrained = {r["name"]: r for r in results if r.get("kind") == UNTRAINED and r["evaluation"] in ways}
    return [*untrained.values(), *with_controls(rows, results)]


def merged(results: list[dict[str, Any]], about: dict[str, str], commit: str) -> list[dict[str, Any]]:
    """``results`` without folders of the machines they are from, behind a line that says what they are of."""
    known = [r for r in results if r["kind"] != ABOUT]
    said = [r for r in results if r["kind"] == ABOUT]
    head = {"kind": ABOUT, **(said[0] if said else {}), **{k: v for k, v in about.items() if v}}
    bare = [{**r, "commit": r["commit"] or commit, "command": _bare(r["command"])} for r in known]
    newest = {tuple(r.get(key) for key in KEYS): r for r in bare}
    return [head, *newest.values()]


def tables(results: list[dict[str, Any]], out: Path) -> list[Path]:
    """Write what there is of every experiment; ``results`` begin with what they are of."""
    about, written = results[0], []
    out.mkdir(parents=True, exist_ok=True)
    packed = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results)
    (out / f"{about['name']}.jsonl.gz").write_bytes(gzip.compress(packed.encode(), 9, mtime=0))
    for name, wanted in common.experiments().items():
        if found := of_experiment(results[1:], name):
            path = out / f"{name}-{about['name']}.md"
            write_text(path, report(name, wanted["title"], found, about))
            written.append(path)
    return written


def report(name: str, title: str, results: list[dict[str, Any]], about: dict[str, str]) -> str:
    rows = [r for r in results if r["kind"] == ROW]
    command = "\n".join(dict.fromkeys(r["command"] for r in rows))
    measured = [metric for r in results for system in r["systems"].values() for metric in system]
    shown = [m for m in dict.fromkeys(measured) if not m.endswith(("acc", "acc_norm")) or m in SCORES]
    order = common.row_order(name)
    results = sorted(results, key=lambda r: order.get(r["name"], -1))
    missing = [row for row in order if row not in {r["name"] for r in rows}]
    text = f"# {title}: {about['name']}\n\nTeacher: {about['teacher']}. {about.get('note', '')}".rstrip()
    if missing:
        text += f"\n\nNot run yet: {'; '.join(missing)}."
    return f"{text}\n\n{render('', results, command, shown)}"


def _bare(command: str) -> str:
    """A command whose paths have lost their folders, which are of the machine it ran on, and without its deadline."""
    return re.sub(r"(?<![^\s='\"])/[^\s'\"=]*/| --deadline \S+", "", command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl of a model, also packed (.gz)")
    parser.add_argument("--name", default="", help="the model's, for files and titles")
    parser.add_argument("--teacher", default="", help="what it is and where its weights come from")
    parser.add_argument("--note", default="", help="items a task, tokens, what else a reader must know")
    parser.add_argument("--commit", default="", help="of results that know none")
    parser.add_argument("--out", type=Path, default=HERE)
    a = parser.parse_args()
    about = {"name": a.name, "teacher": a.teacher, "note": a.note}
    results = merged([r for path in a.results for r in common.read_lines(path)], about, a.commit)
    if not all(results[0].get(key) for key in ("name", "teacher")):
        raise SystemExit("These results do not say what they are of: --name and --teacher.")
    for path in tables(results, a.out):
        print(path)


if __name__ == "__main__":
    main()
