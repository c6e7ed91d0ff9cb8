"""A sweep's results as a Markdown table: a line for each row and each of its models, mean ± deviation over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from lolcats.evaluation.systems import CONTROL_NAMES, STUDENT
from lolcats.report.table import markdown

Result = dict[str, Any]
HELD_OUT, LINEAR_OFF = "held-out", "linear off"
WINDOW, WINDOW_SINKS = "window, nothing trained", "window + sinks, nothing trained"
UNTRAINED, CONTROL, ROW = "untrained", "control", "row"  # kinds of results
NOTE = (
    "Perplexities (held-out: test rows of the row's own training data, which differ by seed) and scores; mean ± "
    "standard deviation over seeds. Lines below a row are its other models: *linear off* is the student without its "
    "linear term; *window+lora* and *teacher+lora* are controls with the same data, steps, seed and LoRA. Layer error: "
    "mean squared error of the attention outputs after transfer. Seconds: training, and all measured but held-out rows."
)


def render(title: str, results: list[Result], command: str) -> str:
    """The whole text of table.md, of rows with their controls; for the same row and seed the newest result counts."""
    newest = {(r["kind"], r["name"], r.get("seed")): r for r in results if r["kind"] != CONTROL}
    references = [r for (kind, *_), r in newest.items() if kind == UNTRAINED]
    rows: dict[str, list[Result]] = {}
    for (kind, name, _), result in newest.items():
        if kind == ROW:
            rows.setdefault(name, []).append(result)
    metrics = _metrics(newest.values())
    lines = _reference_lines(references, list(rows.values()), metrics)
    beside = [WINDOW, WINDOW_SINKS] if not _common(list(rows.values()), WINDOW_SINKS) else [WINDOW]
    for name, runs in rows.items():
        lines += _row_lines(name, runs, metrics, [*beside, LINEAR_OFF, *CONTROL_NAMES])
    header = ("row", "seeds", *metrics, "layer error", "tokens (transfer + LoRA)", "seconds (training + evaluation)")
    heading = f"# {title}\n\n" if title else ""
    return f"{heading}{markdown(header, lines)}\n\n{NOTE}\n\n{_provenance(list(newest.values()), command)}\n"


def _metrics(results: Iterable[Result]) -> list[str]:
    """Every metric once, held-out perplexity first."""
    found = dict.fromkeys([HELD_OUT])
    for result in results:
        for system in result["systems"].values():
            found |= dict.fromkeys(system)
    return list(found)


def _reference_lines(references: list[Result], rows: list[list[Result]], metrics: list[str]) -> list[tuple[str, ...]]:
    """Untrained models; their held-out perplexity is that of the rows, where all rows agree on it."""
    lines = []
    for name, system in (pair for result in references for pair in result["systems"].items()):
        values = {metric: [entry["value"]] for metric, entry in system.items()}
        values[HELD_OUT] = _common(rows, name)
        if any(values.values()):
            lines.append((name, "", *(_number(values.get(metric, [])) for metric in metrics), "", "", ""))
    return lines


def _common(rows: list[list[Result]], system: str) -> list[float]:
    """The held-out perplexities by seed of a model that nothing was trained for; none where they differ by row."""
    found = {(r["seed"], *_values([r], system, HELD_OUT)) for runs in rows for r in runs}
    if len(found) > len({seed for seed, *_ in found}):
        return []
    return [value for _, *values in sorted(found) for value in values]


def _row_lines(name: str, runs: list[Result], metrics: list[str], beside: list[str]) -> list[tuple[str, ...]]:
    tokens = [r["tokens"] for r in runs]
    budget = " + ".join(_number([t[stage] / 1e6 for t in tokens]) + "M" for stage in ("transfer", "finetune"))
    stages = ("transfer", "finetune")
    spent = [(sum(r["seconds"].get(s, 0) for s in stages), r["seconds"]["evaluation"]) for r in runs]
    seconds = " + ".join(f"{statistics.mean(part):.0f}" for part in zip(*spent, strict=True))
    errors = _number([r["layer_error"] for r in runs if r["layer_error"] is not None])
    lines = [(name, str(len(runs)), *_cells(runs, STUDENT, metrics), errors, budget, seconds)]
    measured = {system for r in runs for system in r["systems"]}
    lines += [(f"– {s}", "", *_cells(runs, s, metrics), "", "", "") for s in beside if s in measured]
    return lines


def _cells(runs: list[Result], system: str, metrics: list[str]) -> list[str]:
    return [_number(_values(runs, system, metric)) for metric in metrics]


def _values(runs: list[Result], system: str, metric: str) -> list[float]:
    found = (r["systems"].get(system, {}).get(metric, {}).get("value") for r in runs)
    return [value for value in found if value is not None]


def _number(values: list[float]) -> str:
    """Mean ± deviation with two digits of the deviation; a mean alone with four."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(set(values)) == 1:
        return _digits(mean)
    spread = statistics.stdev(values)
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    if decimals > 6:
        return f"{mean:.3e} ± {spread:.1e}"
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _digits(value: float) -> str:
    """Four significant digits, without an exponent where the number is of a readable size."""
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def _provenance(results: list[Result], command: str) -> str:
    """What it was made with; several values where the rows were not made at once."""
    kept = {key: sorted({str(r[key]) for r in results if r.get(key)}) for key in ("commit", "date", "hardware")}
    facts = "; ".join(f"{key} {', '.join(values)}" for key, values in kept.items() if values)
    return f"```\n{command}\n```\n{facts[:1].upper()}{facts[1:]}."
