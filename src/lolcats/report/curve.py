"""The curve of a selection of heads: kept heads against loss, recall and bytes, as table and picture."""

from __future__ import annotations

from pathlib import Path

from lolcats.evaluation.memory import readable
from lolcats.report.picture import has_matplotlib
from lolcats.selection import Selection

HEADER = ("kept heads", "of all", "KL", "right answers", "kept bytes a token")


def run_selection(directory: Path) -> Selection | None:
    """The selection of a run directory, if it has one."""
    path = directory / "selection.yaml"
    return Selection.read(path) if path.exists() else None


def curve_rows(selection: Selection) -> list[tuple[str, ...]]:
    """Rows under ``HEADER``; the chosen number of heads is marked, and the last row is the teacher."""
    chosen = sum(map(len, selection.heads.values()))
    *points, teacher = selection.curve
    rows = []
    for point in points:
        kinds = " / ".join(f"{100 * share:.0f}" for share in point.exact.values())
        rows.append((
            f"{point.count}{' (chosen)' if point.count == chosen else ''}", f"{point.count / teacher.count:.1%}",
            f"{point.loss:.3f}", f"{100 * point.recall:.0f} % ({kinds})", readable(point.bytes_per_token),
        ))  # fmt: skip
    kinds = " / ".join(f"{100 * share:.0f}" for share in teacher.exact.values())
    right = f"{100 * teacher.recall:.0f} % ({kinds})"
    return [*rows, (f"{teacher.count}, the teacher", "100.0%", "0.000", right, readable(teacher.bytes_per_token))]


def curve_title(selection: Selection) -> str:
    kinds, lengths = " / ".join(selection.curve[-1].exact), selection.search["lengths"]
    return f"Kept key/value heads, prompts of {', '.join(f'{n:,}' for n in lengths)} tokens ({kinds})"


def draw_curve(selection: Selection, path: Path) -> bool:
    """Write a PNG of loss and right answers by kept heads; False, with a warning, if matplotlib is not installed."""
    if not has_matplotlib(path.name):
        return False
    from matplotlib import pyplot

    *points, teacher = selection.curve
    counts = [point.count for point in points]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(counts, [point.loss for point in points], marker="o", color="tab:blue")
    axis.set(xlabel=f"kept key/value heads of {teacher.count}", ylabel="KL from the teacher on answers (nats)")
    axis.axvline(sum(map(len, selection.heads.values())), color="gray", linestyle=":")
    right = axis.twinx()
    right.plot(counts, [100 * point.recall for point in points], marker="s", color="tab:orange")
    right.axhline(100 * teacher.recall, color="tab:orange", linestyle="--", linewidth=1)
    right.set(ylabel="right answers (%), dashed: teacher", ylim=(0, 105))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
