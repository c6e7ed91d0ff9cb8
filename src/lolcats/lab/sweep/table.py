"""A sweep's results as a Markdown table with a line per row and model: mean ± standard deviation over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from lolcats.compared import CONTROLS, LINEAR_OFF, STUDENT, WINDOW_LORA, WINDOWS
from lolcats.evaluation.scores import estimate_of
from lolcats.report.table import markdown

Result = dict[str, Any]
HELD_OUT = "held-out"
UNTRAINED, CONTROL, ROW = "untrained", "control", "row"  # kinds of results
BESIDE = [
    *(window.in_sweeps for window in WINDOWS), *(window.with_heads for window in WINDOWS),
    *(model.in_sweeps for model in (LINEAR_OFF, *CONTROLS.values())),
]  # fmt: skip
ADDS, GAINS, NLL = "what the linear term adds", ("acc", "acc_norm", "exact_match"), " nll"
NOTE = (
    "Perplexities (held-out: test rows of the row's own training data, which differ by seed), nll in nats a "
    "token, scores in %; of several seeds mean ± standard deviation over them, of one its value and (standard "
    "error over rows or items). Lines below a row are its other models; those shared by all rows are listed at the "
    "top: *linear off* is the student without its linear term; *window+lora* and *teacher+lora* are controls with the "
    f"same data, steps, seed and LoRA. *{ADDS.capitalize()}*: student against window+lora, item by item: change of "
    "the perplexity in % (of an nll, of its exponential), of scores in points. Layer error: mean squared error of "
    "the attention outputs after transfer. Seconds: training, and all measured but held-out rows."
)


def render(title: str, results: list[Result], command: str, chosen: Sequence[str] = ()) -> str:
    """The text of table.md, from rows with their controls. The newest result of each row and seed is used.

    chosen: the metrics to show; all if empty.
    """
    newest = {(r["kind"], r["name"], r.get("seed")): r for r in results if r["kind"] != CONTROL}
    references = [r for (kind, *_), r in newest.items() if kind == UNTRAINED]
    by_name: dict[str, list[Result]] = {}
    for (kind, name, _), result in newest.items():
        if kind == ROW:
            by_name.setdefault(name, []).append(result)
    rows = list(by_name.values())
    metrics = [m for m in _metrics(newest.values()) if not chosen or m in chosen]
    lines = _reference_lines(references, rows, metrics)
    known = {name for name, *_ in lines}
    beside = [s for s in BESIDE if s not in known or not _common(rows, s)]
    shared = [s for s in beside if _is_shared(rows, s, metrics)]
    lines += [(s, "", *_cells(_with(rows, s)[0], s, metrics), "", "", "") for s in shared]
    for name, runs in by_name.items():
        lines += _row_lines(name, runs, metrics, [s for s in beside if s not in shared])
    shown = (f"{metric}, %" if _is_score(metric) else metric for metric in metrics)
    header = ("row", "seeds", *shown, "layer error", "tokens (transfer + LoRA)", "seconds (training + evaluation)")
    heading = f"# {title}\n\n" if title else ""
    return f"{heading}{markdown(header, lines)}\n\n{NOTE}\n\n{_provenance(list(newest.values()), command)}\n"


def _metrics(results: Iterable[Result]) -> list[str]:
    """All metrics, held-out perplexity first."""
    measured = (metric for result in results for system in result["systems"].values() for metric in system)
    return list(dict.fromkeys([HELD_OUT, *measured]))


def _reference_lines(references: list[Result], rows: list[list[Result]], metrics: list[str]) -> list[tuple[str, ...]]:
    """Lines of the untrained models; their held-out perplexity comes from the rows, if all rows agree on it."""
    lines = []
    for name, system in (pair for result in references for pair in result["systems"].items()):
        common = _common(rows, name)
        entries = {**system, **({HELD_OUT: {"value": statistics.mean(common)}} if common else {})}
        cells = [_cell([entries[metric]], metric) if metric in entries else "" for metric in metrics]
        if any(cells):
            lines.append((name, "", *cells, "", "", ""))
    return lines


def _common(rows: list[list[Result]], system: str) -> list[float]:
    """The held-out perplexities of an untrained model, one per seed; empty if they differ between rows."""
    found = {(r["seed"], r["systems"].get(system, {}).get(HELD_OUT, {}).get("value")) for runs in rows for r in runs}
    by_seed = dict(found)
    if len(found) > len(by_seed):
        return []
    return [by_seed[seed] for seed in sorted(by_seed) if by_seed[seed] is not None]


def _with(rows: list[list[Result]], system: str) -> list[list[Result]]:
    """The rows that measured ``system``."""
    return [runs for runs in rows if any(system in r["systems"] for r in runs)]


def _is_shared(rows: list[list[Result]], system: str, metrics: list[str]) -> bool:
    """Whether several rows with the same seeds have the same results for ``system``."""
    own = _with(rows, system)
    lines = {(tuple(sorted(r["seed"] for r in runs)), *_cells(runs, system, metrics)) for runs in own}
    return len(own) > 1 and len(lines) == 1


def _row_lines(name: str, runs: list[Result], metrics: list[str], beside: list[str]) -> list[tuple[str, ...]]:
    stages = ("transfer", "finetune")
    budget = " + ".join(_number([r["tokens"][stage] / 1e6 for r in runs]) + "M" for stage in stages)
    spent = [(sum(r["seconds"].get(s, 0) for s in stages), r["seconds"]["evaluation"]) for r in runs]
    seconds = " + ".join(f"{statistics.mean(part):.0f}" for part in zip(*spent, strict=True))
    errors = _number([r["layer_error"] for r in runs if r["layer_error"] is not None])
    lines = [(name, str(len(runs)), *_cells(runs, STUDENT.in_sweeps, metrics), errors, budget, seconds)]
    measured = {system for r in runs for system in r["systems"]}
    lines += [(f"– {s}", "", *_cells(runs, s, metrics), "", "", "") for s in beside if s in measured]
    added = [_added(runs, metric) for metric in metrics]
    if any(added):
        lines.append((f"– *{ADDS}*", "", *added, "", "", ""))
    return lines


def _cells(runs: list[Result], system: str, metrics: list[str]) -> list[str]:
    measured = [r["systems"].get(system, {}) for r in runs]
    return [_cell([entries[metric] for entries in measured if metric in entries], metric) for metric in metrics]


def _cell(entries: list[dict[str, Any]], metric: str) -> str:
    """For one seed, value (standard error); for several, mean ± standard deviation."""
    factor = 100 if _is_score(metric) else 1
    known = [entry for entry in entries if entry["value"] is not None]
    text = _number([factor * entry["value"] for entry in known])
    error = known[0].get("stderr") if len(known) == 1 else None
    return f"{text} ({_two_digits(factor * error)})" if error else text


def _is_score(metric: str) -> bool:
    return metric.rpartition(" ")[2] in GAINS


def _added(runs: list[Result], metric: str) -> str:
    """Difference of the student to the control with the same LoRA and no linear term.

    The error is the standard error for one seed, the deviation over seeds for several. Empty for metrics other than
    perplexity, nll and scores.
    """
    student, control = STUDENT.in_sweeps, WINDOW_LORA.in_sweeps
    pairs = [(r["systems"][student].get(metric), r["systems"].get(control, {}).get(metric)) for r in runs]
    found = [difference(*pair, metric) for pair in pairs if pair[0] and pair[1]]
    known = [pair for pair in found if pair is not None]
    if not known:
        return ""
    values, (_, error) = [value for value, _ in known], known[0]
    if len(known) > 1:
        return f"{_signed(statistics.mean(values))} ± {_signed(statistics.stdev(values))[1:]}"
    return _signed(values[0]) + (f" ({_two_digits(error)})" if error else "")


def difference(entry: dict[str, Any], other: dict[str, Any], metric: str) -> tuple[float, float | None] | None:
    """Difference between two values of a metric, and its standard error, paired by item.

    In points for scores, in % for perplexities (for an nll, of its exponential); None for other metrics.
    """
    value, against = entry["value"], other["value"]
    if value is None or against is None:
        return None
    if _is_score(metric):
        return 100 * (value - against), _error(entry, other, 100)
    if not (NLL in metric or isinstance(entry.get("items"), list) or metric == HELD_OUT):
        return None
    ratio = math.exp(value - against) if NLL in metric else value / against
    return 100 * (ratio - 1), _error(entry, other, 100 * ratio)


def _error(entry: dict[str, Any], other: dict[str, Any], factor: float) -> float | None:
    """``factor`` times the standard error of the mean difference between items, by their strata and clusters.

    Results of earlier versions name neither: their items count as one sample of independent ones.
    """
    items, others = entry.get("items"), other.get("items")
    if not items or not others or len(items) != len(others):
        return None
    gaps = (float(a) - float(b) for a, b in zip(items, others, strict=True))
    groups = {**other, **entry}
    strata = tuple(tuple(islice(gaps, size)) for size in groups.get("strata", [len(items)]))
    error = estimate_of(strata, groups.get("clusters", ())).stderr
    return None if error is None else factor * error


def _number(values: list[float]) -> str:
    """Mean ± deviation, with two digits of the deviation; four digits if all values are equal."""
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
    """Four significant digits, with an exponent only for very small or large numbers."""
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) < 100 else f"{value:+,.0f}"


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _provenance(results: list[Result], command: str) -> str:
    """The command, commit, date and hardware; several values if the rows were not run together."""
    kept = {key: sorted({str(r[key]) for r in results if r.get(key)}) for key in ("commit", "date", "hardware")}
    facts = "; ".join(f"{key} {', '.join(values)}" for key, values in kept.items() if values)
    return f"```\n{command}\n```\n{facts[:1].upper()}{facts[1:]}."
