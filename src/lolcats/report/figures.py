"""Plots of a run, drawn with matplotlib on axes that the caller provides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from lolcats.files import read_json_lines

DIM = 1e-4  # smallest attention weight that is visible
PIXELS = 3  # each pixel shows PIXELS × PIXELS weights


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a directory's metrics.jsonl; empty if there is no such file."""
    return read_json_lines(directory / "metrics.jsonl")


def draw_losses(axis: Any, entries: list[dict[str, Any]], title: str) -> None:
    """Plot training and validation loss of one stage by step."""
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        _line(axis, entries, key, label)
    axis.set(title=title, xlabel="step", ylabel="loss")
    axis.grid(alpha=0.3)
    if entries:
        axis.legend()


def draw_validation(axis: Any, entries: list[dict[str, Any]], label: str) -> None:
    """Add the validation loss of another model."""
    _line(axis, entries, "eval_loss", label, linestyle="--")
    axis.legend()


def draw_errors(axis: Any, before: list[float], after: list[float]) -> None:
    """Plot each layer's error before and after transfer."""
    for values, label in ((before, "before transfer"), (after, "after transfer")):
        axis.plot(values, marker="o", markersize=3, label=label)
    axis.set(title="Error of each layer's attention output", xlabel="linearized layer", ylabel="mean squared error")
    if any(before + after):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend()


def draw_weights(axis: Any, weights: Tensor, title: str) -> Any:
    """Plot one head's attention weights (T, T) on a logarithmic scale from DIM up.

    Each pixel shows the largest weight of a block of PIXELS × PIXELS, which keeps single columns (sinks) visible.
    """
    from matplotlib.colors import LogNorm

    length = weights.shape[-1]
    largest = max_pool2d(weights.float()[None], min(PIXELS, length), ceil_mode=True)[0].clamp_min(DIM)
    future = torch.ones_like(largest, dtype=torch.bool).triu(1)
    picture = axis.imshow(
        largest.masked_fill(future, torch.nan).numpy(), norm=LogNorm(DIM, 1), cmap="magma_r", interpolation="nearest",
        extent=(0, length, length, 0),
    )  # fmt: skip
    axis.spines[:].set_visible(False)  # they would cover the first key, which often gets most of the attention
    axis.set(title=title, xlabel="key", xlim=(-0.03 * length, length))
    return picture


def draw_heads(axis: Any, values: list[list[Any]], layers: list[int], title: str, base: int = 0) -> None:
    """Plot one number per head and layer, none where it is None, with a colour bar; with a ``base``, on a logarithmic
    scale in its powers."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, MaxNLocator

    heads = max(map(len, values))
    table = torch.full((len(values), heads), torch.nan)
    for row, own in zip(table, values, strict=True):
        row[: len(own)] = torch.tensor([torch.nan if value is None else value for value in own])
    norm = LogNorm() if base else None
    picture = axis.imshow(table.numpy(), aspect="auto", cmap="viridis", interpolation="nearest", norm=norm)
    bar = {"ticks": LogLocator(base), "format": "%g"} if base else {}
    axis.figure.colorbar(picture, ax=axis, **bar).ax.minorticks_off()
    axis.set(title=title, xlabel="head", ylabel="layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = max(1, len(layers) // 8)
    axis.set_yticks(range(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])


def _line(axis: Any, entries: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    points = [(e["step"], e[key]) for e in entries if key in e]
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **style)
