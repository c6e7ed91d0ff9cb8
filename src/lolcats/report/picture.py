"""report.png: loss curves of both stages, and each layer's error before and after attention transfer."""

from __future__ import annotations

import json
import logging
from typing import Any

from lolcats.run import Run


def draw_report(run: Run) -> None:
    """Write DIR/report.png; without matplotlib installed, say so and go on."""
    try:
        import matplotlib
    except ImportError:
        logging.getLogger(__name__).warning(
            "No report.png: matplotlib is not installed (pip install 'lolcats[plots]')."
        )
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    history = [json.loads(line) for line in _lines(run)]
    for axis, stage, title in zip(axes, ("transfer", "finetune"), ("Attention transfer", "LoRA"), strict=False):
        _curve(axis, [h for h in history if h["stage"] == stage], title)
    axes[0].set_yscale("log")
    _errors(axes[2], run.results.get("layer_errors_before", []), run.results.get("layer_errors_after", []))
    figure.savefig(run.directory / "report.png", dpi=120)
    pyplot.close(figure)


def _lines(run: Run) -> list[str]:
    path = run.directory / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _curve(axis: Any, entries: list[dict[str, float]], title: str) -> None:
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axis.set(title=title, xlabel="step", ylabel="loss")
    axis.grid(alpha=0.3)
    if entries:
        axis.legend()


def _errors(axis: Any, before: list[float], after: list[float]) -> None:
    for values, label in ((before, "before transfer"), (after, "after transfer")):
        axis.plot(values, marker="o", markersize=3, label=label)
    axis.set(title="Error of each layer's attention output", xlabel="linearized layer", ylabel="mean squared error")
    if any(before + after):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend()
