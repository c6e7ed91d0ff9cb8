"""report.html: everything that a run measured, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from lolcats.config import to_yaml
from lolcats.evaluation.attention_maps import FILE
from lolcats.files import read_tensors, write_text
from lolcats.report import figures
from lolcats.report.comparison import entry_rows
from lolcats.report.picture import has_matplotlib
from lolcats.report.table import memory_rows, perplexity_rows, remarks
from lolcats.run import SAMPLE_PROMPT, Run
from lolcats.training.controls import CONTROLS, control_directory

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 54rem; margin: 0 auto;
  padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #ddd; }}
p {{ margin: .5rem 0; overflow-wrap: anywhere; }}
.note {{ color: #555; font-size: .92rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #eee; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; white-space: pre-wrap; }}
img {{ display: block; width: 100%; max-width: 44rem; margin: .6rem auto; }}
blockquote {{ margin: .5rem 0; padding: .1rem .9rem; border-left: 3px solid #ccc; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
pre {{ font-size: .8rem; overflow-x: auto; background: #f6f6f6; padding: .7rem; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "figure.constrained_layout.use": True, "svg.hashsalt": "lolcats",
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def write_html(run: Run) -> None:
    """Write DIR/report.html; without matplotlib installed, say so and go on."""
    if not has_matplotlib("report.html"):
        return
    import matplotlib

    with matplotlib.rc_context(STYLE):
        sections = [(title, "\n".join(make(run))) for title, make in SECTIONS]
    name = run.base.path.rstrip("/").rsplit("/", 1)[-1]
    body = [f"<h1>{escape(name)}, linearized</h1>", _paragraph(_summary(run))]
    body += [f"<h2>{title}</h2>\n{content}" for title, content in sections if content]
    page = PAGE.format(title=escape(f"{name}, linearized"), body="\n".join(body))
    write_text(run.directory / "report.html", page)


def _summary(run: Run) -> str:
    attention, data, versions = run.config.attention, run.record["data"], run.record["versions"]
    return (
        f"{attention.kind.capitalize()} attention, {attention.window} window of {attention.window_size}, "
        f"{attention.sinks} sinks, {attention.feature_map} feature maps. Trained on "
        f"{data['source'].rsplit('/', 1)[-1]} ({data['train_rows']:,} rows of {run.config.data.sequence_length} "
        f"tokens) with lolcats {versions['lolcats']}, {run.record['date']}."
    )


def _perplexity(run: Run) -> Iterator[str]:
    rows, length = run.record["data"]["test_rows"], run.config.data.sequence_length
    yield _paragraph(f"On {rows} × {length} held-out tokens of the same data.")
    yield _table(("model", "perplexity", "against the teacher"), perplexity_rows(run))
    for text in remarks(run):
        yield _paragraph(text)


def _benchmarks(run: Run) -> Iterator[str]:
    """Of files that ``lolcats evaluate --tasks ... --output DIR/evaluation*.json`` left in the run's directory."""
    for path in sorted(run.directory.glob("evaluation*.json")):
        record = json.loads(path.read_text())
        yield _paragraph(f"{path.name}, {record['date']}: score ± standard error.")
        yield _table(*entry_rows(record["scores"]))


def _curves(run: Run) -> Iterator[str]:
    history = figures.read_metrics(run.directory)
    for stage, title in (("transfer", "Attention transfer"), ("finetune", "LoRA")):
        entries = [entry for entry in history if entry["stage"] == stage]
        if not entries:
            continue
        with _figure(5.6, 3.3) as (axis, embed):
            figures.draw_losses(axis, entries, title)
            if stage == "transfer":
                axis.set_yscale("log")
            else:
                for name in CONTROLS:
                    if own := figures.read_metrics(control_directory(run.directory, name)):
                        figures.draw_validation(axis, own, f"{name.replace('_', ' + ')}, validation")
            yield embed(f"Losses of {title} by step")


def _layer_errors(run: Run) -> Iterator[str]:
    if after := run.results.get("layer_errors_after"):
        with _figure(5.6, 3.3) as (axis, embed):
            figures.draw_errors(axis, run.results.get("layer_errors_before", []), after)
            yield embed("Error of each layer before and after transfer")
        if heads := run.results.get("layers"):
            yield from _heads(heads)


def _heads(found: dict[str, Any]) -> Iterator[str]:
    """``found``: by ``evaluation.layers.measure_layers``."""
    pairs = zip(found["errors"], found["sizes"], strict=True)
    relative = [[error / max(size, 1e-30) for error, size in zip(*pair, strict=True)] for pair in pairs]
    yield _paragraph(
        f"Of each head, on {found['rows']} validation rows: the squared error of its output against the output itself, "
        f"and the entropy of the {found['of']}'s softmax weights (log of how many keys a head spreads over).", "note",
    )  # fmt: skip
    with _figure(5.6, 3.6, columns=2) as (axes, embed):
        figures.draw_heads(axes[0], relative, found["layers"], "relative error", logarithmic=True)
        figures.draw_heads(axes[1], found["entropies"], found["layers"], "entropy, nats")
        yield embed("Relative error and entropy by layer and head")


def _maps(run: Run) -> Iterator[str]:
    """Teacher and student side by side."""
    attention = run.results.get("attention")
    if not attention or not (run.directory / FILE).exists():
        return
    maps = read_tensors(run.directory / FILE)
    whose = "the base model" if attention["of"] == "teacher" else "the student with its LoRA"
    yield _paragraph(
        f"Attention weights on the first {attention['tokens']} tokens of a validation row, logarithmic, for the heads "
        "with the lowest, median and highest error of their output and the quartiles between. Left softmax, right what "
        f"replaces it; both have the queries and keys of {whose}. A dark line at the left edge is the first token, on "
        "which many heads rest.", "note",
    )  # fmt: skip
    for number, head in enumerate(attention["heads"]):
        error = attention["errors"][attention["layers"].index(head["layer"])][head["head"]]
        with _figure(5.6, 2.9, columns=2) as (axes, embed):
            figures.draw_weights(axes[0], maps["teacher"][number], "softmax")
            picture = figures.draw_weights(axes[1], maps["student"][number], "linearized")
            axes[0].set_ylabel("query")
            axes[0].figure.colorbar(picture, ax=axes, shrink=0.8, extend="min")
            title = f"layer {head['layer']}, head {head['head']}: {head['rank']} error, {error:.2g}"
            axes[0].figure.suptitle(title, fontsize=10)
            yield embed(f"Attention maps of {title}", "png")


def _lengths(run: Run) -> Iterator[str]:
    attention = run.results.get("attention")
    if not attention:
        return
    values = sorted(value for layer in attention["lengths"] for value in layer)
    beyond = sum(value > run.config.attention.window_size for value in values) / len(values)
    yield _paragraph(
        f"How far back the teacher's heads look on those {attention['tokens']} tokens: the mean over queries n of "
        f"Σᵢ aₙᵢ (n − i + 1). The median head has {values[len(values) // 2]:.0f} tokens; {100 * beyond:.0f} % of all "
        f"heads look further than the window of {run.config.attention.window_size}.", "note",
    )  # fmt: skip
    with _figure(5.6, 4) as (axis, embed):
        title = "Effective sequence length, tokens"
        figures.draw_heads(axis, attention["lengths"], attention["layers"], title, logarithmic=True)
        yield embed("Effective sequence length by layer and head")


def _gamma(run: Run) -> Iterator[str]:
    values, attention = run.results.get("gamma"), run.results.get("attention")
    if not values or not attention or run.config.attention.kind != "hybrid":
        return
    start = 1 / (1 + math.exp(-run.config.attention.gate_init))
    every = [value for layer in values for value in layer]
    yield _paragraph(
        f"The weight γ of the window's softmax terms against the linear term: {start:.2g} at the start, now "
        f"{min(every):.2g} to {max(every):.2g}.", "note",
    )  # fmt: skip
    with _figure(5.6, 4) as (axis, embed):
        figures.draw_heads(axis, values, attention["layers"], "γ")
        yield embed("Learned gamma by layer and head")


def _memory(run: Run) -> Iterator[str]:
    if rows := memory_rows(run):
        yield _table(("tokens in context", "teacher", "student"), rows)


def _samples(run: Run) -> Iterator[str]:
    yield _paragraph(f"Greedy answers to: {SAMPLE_PROMPT}")
    for who in ("teacher", "student"):
        if f"sample_{who}" in run.results:
            yield f"<h3>{who}</h3>\n<blockquote>{escape(run.results[f'sample_{who}'])}</blockquote>"


def _provenance(run: Run) -> Iterator[str]:
    record = run.record
    facts = {
        "base model": f"{run.base.path.rsplit('/', 1)[-1]}, {run.base.fingerprint}",
        "data": f"{record['data']['source'].rsplit('/', 1)[-1]}, {record['data']['fingerprint']}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    for name, value in facts.items():
        yield _paragraph(f"{name}: {value}")
    rows = [
        (name, str(stage.get("steps", "skipped")), str(stage.get("best_step", "")), f"{stage.get('best_loss', 0):.4g}",
         f"{stage.get('seconds', 0):.0f}")
        for name, stage in record["stages"].items()
    ]  # fmt: skip
    yield _table(("stage", "steps", "best step", "its validation loss", "seconds"), rows)
    yield f"<details><summary>Configuration</summary>\n<pre>{escape(to_yaml(run.config))}</pre></details>"


SECTIONS: tuple[tuple[str, Callable[[Run], Iterator[str]]], ...] = (
    ("Perplexity", _perplexity), ("Benchmarks", _benchmarks), ("Training", _curves), ("Error by layer", _layer_errors),
    ("Attention maps", _maps), ("Effective sequence lengths", _lengths), ("Learned gamma", _gamma),
    ("State per sequence", _memory), ("Samples", _samples), ("Provenance", _provenance),
)  # fmt: skip


def _paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Any, Callable[..., str]]]:
    """Axes to draw on, and a function that turns what was drawn into an <img> with the picture inside."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height))

    def embed(description: str, form: str = "svg") -> str:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
        kind = {"svg": "image/svg+xml", "png": "image/png"}[form]
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="{escape(description)}" src="data:{kind};base64,{data}">'

    try:
        yield axes, embed
    finally:
        pyplot.close(figure)
