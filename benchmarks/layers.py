"""Errors by layer, against quality and against the teacher's entropy, from the results of a sweep.

The paper's Tables 17 and 18 (mean squared error by layer) and Figures 5 and 6 (error against quality and entropy).

    lolcats sweep experiments/table6.yaml MODEL --data DATA --out DIR ...
    python benchmarks/layers.py DIR/results.jsonl --out layers.md --picture layers.png      # needs matplotlib
    python benchmarks/layers.py benchmarks/quality/smollm2-135m.jsonl.gz --only table6

Means over seeds. Errors are of the attention outputs on validation rows: ``layer_errors``, and by head ``layers`` (see
lolcats.evaluation.layers). They are measured on the teacher's queries and keys after
transfer; where feature maps train in stage 2, after that and on the student's own. ρ is Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from lolcats.files import write_text
from lolcats.report.table import markdown


@dataclass
class Trained:
    """A row of a sweep, its seeds together. Tensors are (layers,) or (layers, H)."""

    name: str
    of: str
    """Whose queries and keys the errors are of, ``teacher`` or ``student``."""
    layers: list[int]
    before: Tensor
    error: Tensor
    heads: dict[str, Tensor]
    quality: dict[str, float]

    @property
    def relative(self) -> Tensor:
        """(layers, H) squared error of each head over its squared output."""
        return self.heads["errors"] / self.heads["sizes"]


def read_sweep(path: Path, sweep: str = "") -> list[Trained]:
    """The trained rows of a sweep's results.jsonl that have linear attention, in its order.

    sweep: name of one of several sweeps that share the file; empty: rows of all.
    """
    found = [r for r in common.read_lines(path) if r["kind"] == "row" and sweep in ("", r["sweep"])]
    newest = {(r["name"], r["seed"]): r for r in (common.alike(found) if sweep else found)}
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in newest.items():
        if result["layer_errors"]["after"] and result["layers"]:
            rows.setdefault(name, []).append({**result, "quality": result["systems"]["student"]})
    order = common.row_order(sweep)
    return [_together(name, rows[name]) for name in sorted(rows, key=lambda name: order.get(name, -1))]


def _together(name: str, runs: list[dict[str, Any]]) -> Trained:
    def mean(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).mean(0)

    heads = {key: mean([r["layers"][key] for r in runs]) for key in ("errors", "sizes", "entropies", "older")}
    metrics = [m for m, entry in runs[0]["quality"].items() if entry["value"] is not None]
    quality = {m: statistics.fmean(r["quality"][m]["value"] for r in runs) for m in metrics}
    first, before = runs[0]["layers"], mean([r["layer_errors"]["before"] for r in runs])
    error = mean([r["layer_errors"]["after"] for r in runs]) if first["of"] == "teacher" else heads["errors"].mean(1)
    return Trained(name, first["of"], first["layers"], before, error, heads, quality)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ of two tensors of equal size, ties ranked in the order they come."""
    if x.numel() < 3:
        return float("nan")
    ranks = torch.stack([v.flatten().argsort(stable=True).argsort(stable=True).double() for v in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def by_layer(rows: list[Trained]) -> str:
    """A line a layer, a column a row of the sweep: mean squared error."""
    lines = [(str(layer), *(f"{row.error[n]:.3g}" for row in rows)) for n, layer in enumerate(rows[0].layers)]
    lines.append(("mean", *(f"{row.error.mean():.3g}" for row in rows)))
    return markdown(("layer", *(row.name for row in rows)), lines)


def against_quality(rows: list[Trained]) -> str:
    """A line a row of the sweep: errors and what was measured of the student; last, ρ of the error and each of it."""
    metrics = [m for m in rows[0].quality if all(m in row.quality for row in rows)]
    lines = [
        (row.name, row.of, f"{row.before.mean():.3g}", f"{row.error.mean():.3g}", f"{row.relative.mean():.3g}",
         *(f"{row.quality[m]:.4g}" for m in metrics))
        for row in rows
    ]  # fmt: skip
    errors = torch.stack([row.error.mean() for row in rows])
    values = (rank_correlation(errors, torch.tensor([row.quality[m] for row in rows])) for m in metrics)
    lines.append(("ρ with the error", "", "", "", "", *(f"{value:.2f}" for value in values)))
    return markdown(("row", "errors of the", "untrained", "error", "relative error", *metrics), lines)


def against_entropy(rows: list[Trained]) -> str:
    """A line a row of the sweep: over all heads of all layers, ρ of errors and what the teacher's attention is like."""
    lines = [
        (row.name, f"{row.heads['entropies'].mean():.3g}", f"{row.heads['older'].mean():.3g}",
         *(f"{rank_correlation(error, row.heads[key]):.2f}"
           for error in (row.heads["errors"], row.relative) for key in ("entropies", "older")))
        for row in rows
    ]  # fmt: skip
    header = ("row", "mean entropy", "share on older keys", "ρ(error, entropy)", "ρ(error, older)",
              "ρ(relative error, entropy)", "ρ(relative error, older)")  # fmt: skip
    return markdown(header, lines)


def draw(rows: list[Trained], path: Path) -> None:
    """Error by layer of every row; of the best row, each head's relative error over its entropy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 4), layout="constrained")
    for row in rows:
        left.plot(row.layers, row.error, marker="o", markersize=3, label=row.name)
    left.set(xlabel="layer", ylabel="mean squared error", yscale="log", title="Error by layer")
    left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    best = min(rows, key=lambda row: float(row.error.mean()))
    depth = torch.tensor(best.layers)[:, None].expand_as(best.relative)
    points = right.scatter(best.heads["entropies"], best.relative, c=depth, s=8, cmap="viridis")
    right.set(xlabel="entropy of the teacher's attention, nats", ylabel="relative error", yscale="log", title=best.name)
    figure.colorbar(points, ax=right, label="layer")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


TABLES = {
    "Error by layer": by_layer,
    "Error against quality": against_quality,
    "Error against the teacher's attention, over heads": against_entropy,
}
NOTE = (
    "Mean squared errors of the attention outputs on validation rows. *Errors of the teacher*: on its queries and "
    "keys, after transfer; *of the student*: where feature maps train in stage 2, after that, on its own. Relative: "
    "over the mean square of the outputs, mean over heads. ρ: Spearman's rank correlation, over rows or over all heads."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a sweep's results.jsonl, also packed (.gz)")
    parser.add_argument("--only", default="", help="of several sweeps in the file the rows of this one")
    parser.add_argument("--out", type=Path, help="a file instead of the output")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    rows = read_sweep(arguments.results, arguments.only)
    if not rows:
        raise SystemExit(f"{arguments.results} has no trained rows with linear attention.")
    title = common.experiments().get(arguments.only, {}).get("title", arguments.results.name)
    text = f"# Errors by layer: {title}\n\n" + "\n".join(
        f"## {head}\n\n{table(rows)}\n" for head, table in TABLES.items()
    )
    command = f"python benchmarks/layers.py {arguments.results}" + f" --only {arguments.only}" * bool(arguments.only)
    text += f"\n{NOTE}\n\n```\n{command}\n```\n"
    if arguments.out:
        write_text(arguments.out, text)
    else:
        print(text)
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
