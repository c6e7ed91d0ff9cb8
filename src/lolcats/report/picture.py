"""report.png: loss curves of both stages, and each layer's error before and after attention transfer."""

from __future__ import annotations

import logging

from lolcats.report.figures import draw_errors, draw_losses, read_metrics
from lolcats.run import Run


def has_matplotlib(file: str) -> bool:
    """Whether plots can be drawn; if not, warn that ``file`` is not written."""
    try:
        import matplotlib
    except ImportError:
        logging.getLogger(__name__).warning(f"No {file}: matplotlib is not installed (pip install 'lolcats[plots]').")
        return False
    matplotlib.use("Agg")
    return True


def draw_report(run: Run) -> None:
    """Write DIR/report.png; if matplotlib is not installed, warn and write nothing."""
    if not has_matplotlib("report.png"):
        return
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    history = read_metrics(run.directory)
    for axis, stage, title in zip(axes, ("transfer", "finetune"), ("Attention transfer", "LoRA"), strict=False):
        draw_losses(axis, [h for h in history if h["stage"] == stage], title)
    axes[0].set_yscale("log")
    draw_errors(axes[2], run.results.get("layer_errors_before", []), run.results.get("layer_errors_after", []))
    figure.savefig(run.directory / "report.png", dpi=120)
    pyplot.close(figure)
