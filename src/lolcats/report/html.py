"""report.html: everything that a run measured, in one self-contained file."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from lolcats.compared import CONTROLS
from lolcats.config import to_yaml
from lolcats.evaluation.attention_maps import FILE
from lolcats.evaluation.suite import LONG, Options
from lolcats.files import write_text
from lolcats.modeling.parts import lost_controls
from lolcats.report import figures
from lolcats.report.comparison import entry_rows
from lolcats.report.curve import HEADER, curve_rows, curve_title, run_selection
from lolcats.report.picture import has_matplotlib
from lolcats.report.table import attention_of, loss_of, memory_rows, model_table, remarks
from lolcats.run import SAMPLE_PROMPT, SAMPLE_WINDOWS, Run
from lolcats.stages.finetune.controls import control_config, control_directory
from lolcats.tensors import read_tensors

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 0 auto;
  padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #8886; }}
h3 {{ font-size: 1rem; margin: 1rem 0 .3rem; }}
p {{ margin: .5rem 0; overflow-wrap: anywhere; }}
.note {{ opacity: .8; font-size: .92rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .25rem 0 .25rem 1rem; border-bottom: 1px solid #8884; text-align: right; }}
td {{ white-space: nowrap; }}
td:first-child, th:first-child {{ padding-left: 0; min-width: 8.5rem; text-align: left; white-space: pre-wrap; }}
img {{ display: block; width: 100%; max-width: 44rem; margin: .6rem auto; }}
blockquote {{ margin: .5rem 0; padding: .1rem .9rem; border-left: 3px solid #8886; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
pre {{ font-size: .8rem; overflow-x: auto; background: #8882; padding: .7rem; }}
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
RECALL_TERMS = (
    " Recall counts every answer of a prompt. With the true earlier answers before it, exact means that every token of "
    "an answer was the most likely one, argmax is the share of such tokens, and nll is their mean −log p in nats. "
    "Generated means that greedy generation gives the answer after the model's own earlier ones. Task names end in "
    "@tokens of context."
)
CONTROL_NAMES = {key: control.in_words.replace("lora", "LoRA") for key, control in CONTROLS.items()}
STAGES = {
    "transfer": "attention transfer", "finetune": "LoRA",
    **{key: f"control: {name}" for key, name in CONTROL_NAMES.items()},
}  # fmt: skip


def write_html(run: Run) -> None:
    """Write DIR/report.html; if matplotlib is not installed, warn and write nothing."""
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
    trained = [
        f"{stage['steps'] * math.prod(_batch(run, name)):,} tokens of {STAGES[name]}"
        for name, stage in run.record["stages"].items() if name not in CONTROLS and "steps" in stage
    ]  # fmt: skip
    return (
        f"The teacher is the base model with softmax attention. The student replaces it with "
        f"{attention_of(run.config.attention)}. Trained on {_name(run.record['data']['source'])} with lolcats "
        f"{run.record['versions']['lolcats']}, {run.record['date']}: {', '.join(trained) or 'nothing yet'}."
    )


def _batch(run: Run, stage: str) -> tuple[int, int]:
    """Rows per step and tokens per row."""
    config = run.config
    return (config.transfer if stage == "transfer" else config.finetune).batch_size, config.data.sequence_length


def _name(path: str) -> str:
    """A hub id or relative path unchanged; only the last part of an absolute path, which is private."""
    return Path(path).name if path.startswith("/") else path


def _perplexity(run: Run) -> Iterator[str]:
    rows, length = run.record["data"]["test_rows"], run.config.data.sequence_length
    yield _paragraph(f"On {rows} × {length} held-out tokens of the same data, never used to train or select anything.")
    yield _table(*model_table(run))
    for text in remarks(run):
        yield _paragraph(text)


def _benchmarks(run: Run) -> Iterator[str]:
    """Results that ``lolcats evaluate --tasks ... --output DIR/evaluation*.json`` left in the run directory."""
    for path in sorted(run.directory.glob("evaluation*.json")):
        record = json.loads(path.read_text())
        yield _code(_evaluation(record))
        terms = RECALL_TERMS if LONG & set(record["tasks"]) else ""
        yield _paragraph(
            f"{record['date']}, {record['device']}, {_weights(record)}: score ± standard error (↓: lower is better); "
            f"the student's differences are paired by item.{terms}", "note",
        )  # fmt: skip
        header, rows = entry_rows(record["scores"])
        end = 2 + len(record["scores"][0]["models"]) if record["baselines"] else len(header)
        yield _table(header[:end], [row[:end] for row in rows])
        if header[end:]:
            yield _table((header[0], *header[end:]), [(row[0], *row[end:]) for row in rows])


def _weights(record: dict[str, Any]) -> str:
    """What the models of an evaluation were loaded in. Older versions could not load them in 4 bits."""
    in_4_bits = record.get("quantize", "none") != "none"
    return f"base model in 4 bits ({record['quantize']}), {record['dtype']}" if in_4_bits else str(record["dtype"])


def _evaluation(record: dict[str, Any]) -> str:
    """The command that produced a file of ``report.comparison.write_comparison``."""
    options = record["options"]
    given = {
        "--tasks": ",".join(record["tasks"]), "--baseline": ",".join(map(_name, record["baselines"])),
        "--data-dir": _name(options["data_dir"] or ""), "--data": _name(options["text"]),
        "--lengths": ",".join(map(str, options["lengths"])), "--limit": str(options["limit"] or ""),
        "--seed": str(options["seed"]) if options["seed"] != Options.seed else "",
        "--quantize": record.get("quantize", "none").replace("none", ""),
    }  # fmt: skip
    words = [word for name, value in given.items() if value for word in (name, value)]
    return shlex.join(["lolcats", "evaluate", _name(record["model"]), *words])


def _training(run: Run) -> Iterator[str]:
    rows = [
        (STAGES[name], " × ".join(map(str, (stage["steps"], *_batch(run, name)))), str(stage["best_step"]),
         f"{stage['best_loss']:.4g}", f"{stage['seconds']:,.0f}")
        for name, stage in run.record["stages"].items() if "steps" in stage
    ]  # fmt: skip
    if lost := lost_controls(run.directory):
        yield _paragraph(lost.replace(f"{run.directory}/", ""))
    if rows:
        yield _table(("stage", "steps × rows × tokens", "best step", "its validation loss", "seconds"), rows)
    history, transfer = figures.read_metrics(run.directory), run.config.transfer
    loss = f"Attention transfer: {transfer.mse_weight:g} × squared error"
    loss += f" + {transfer.xent_weight:g} × cross-entropy" if transfer.xent_weight else ""
    for stage, title in (("transfer", loss), ("finetune", f"LoRA: {loss_of(run.config)}, nats")):
        entries = [entry for entry in history if entry["stage"] == stage]
        if not entries:
            continue
        with _figure(5.6, 3.3) as (axis, embed):
            figures.draw_losses(axis, entries, title)
            if stage == "transfer":
                axis.set_yscale("log")
            else:
                for key, name in CONTROL_NAMES.items():
                    if control_config(run.config, key).finetune.loss != run.config.finetune.loss:
                        continue
                    if own := figures.read_metrics(control_directory(run.directory, key)):
                        figures.draw_validation(axis, own, f"{name}, validation")
            yield embed(f"Losses by step. {title}")


def _layer_errors(run: Run) -> Iterator[str]:
    if after := run.results.get("layer_errors_after"):
        yield _paragraph(
            "Error of each layer's attention output against softmax attention on the same input, over all validation "
            "rows: with untrained feature maps, and after attention transfer.", "note",
        )  # fmt: skip
        with _figure(5.6, 3.3) as (axis, embed):
            figures.draw_errors(axis, run.results.get("layer_errors_before", []), after)
            yield embed("Error of each layer before and after transfer")
        if heads := run.results.get("layers"):
            yield from _heads(heads)


def _heads(found: dict[str, Any]) -> Iterator[str]:
    """``found`` is the result of ``evaluation.layers.measure_layers``."""
    pairs = zip(found["errors"], found["sizes"], strict=True)
    relative = [
        [None if error is None else error / max(size, 1e-30) for error, size in zip(*pair, strict=True)]
        for pair in pairs
    ]
    yield _paragraph(
        f"For each head, on {found['rows']} validation rows after training: the squared error of its output as a share "
        f"of the squared softmax output, and the entropy of the {found['of']}'s softmax weights (the log of the "
        "effective number of keys).", "note",
    )  # fmt: skip
    with _figure(5.6, 3.6, columns=2) as (axes, embed):
        figures.draw_heads(axes[0], relative, found["layers"], "relative error", base=10)
        figures.draw_heads(axes[1], found["entropies"], found["layers"], "entropy, nats")
        yield embed("Relative error and entropy by layer and head")


def _maps(run: Run) -> Iterator[str]:
    """Teacher and student side by side."""
    attention = run.results.get("attention")
    if not attention or not (run.directory / FILE).exists():
        return
    maps = read_tensors(run.directory / FILE)
    whose = "the base model" if attention["of"] == "teacher" else "the student with its LoRA"
    hybrid = run.config.attention.kind == "hybrid"
    yield _paragraph(
        f"Attention weights on the first {attention['tokens']} tokens of a validation row, logarithmic, for the heads "
        "with the lowest, median and highest squared error of their output and the quartiles between. On the left: "
        "softmax. On the right: its replacement"
        f"{', with the window near the diagonal and the linear term further left' if hybrid else ''}. Both use the "
        f"queries and keys of {whose}. A dark line at the left edge is the first token, to which many heads attend.",
        "note",
    )  # fmt: skip
    for number, head in enumerate(attention["heads"]):
        error = attention["errors"][attention["layers"].index(head["layer"])][head["head"]]
        with _figure(5.6, 2.9, columns=2) as (axes, embed):
            figures.draw_weights(axes[0], maps["teacher"][number], "softmax")
            picture = figures.draw_weights(axes[1], maps["student"][number], "linearized")
            axes[0].set_ylabel("query")
            axes[0].figure.colorbar(picture, ax=axes, shrink=0.8, extend="min", label="attention weight")
            title = f"layer {head['layer']}, head {head['head']}: squared error {error:.2g}, {head['rank']} of all"
            axes[0].figure.suptitle(title, fontsize=10)
            yield embed(f"Attention maps of {title}", "png")


def _lengths(run: Run) -> Iterator[str]:
    attention = run.results.get("attention")
    if not attention:
        return
    values = sorted(value for layer in attention["lengths"] for value in layer if value is not None)
    beyond = sum(value > run.config.attention.window_size for value in values) / len(values)
    yield _paragraph(
        f"How far back the teacher's heads look on those {attention['tokens']} tokens: the mean over queries n of "
        f"Σᵢ aₙᵢ (n − i + 1). The median head looks back {values[len(values) // 2]:.0f} tokens (uniform attention: "
        f"{attention['tokens'] / 4:.0f}). {100 * beyond:.0f} % of all heads look further back than the window of "
        f"{run.config.attention.window_size}, some of them because they attend to the first token.", "note",
    )  # fmt: skip
    with _figure(5.6, 4) as (axis, embed):
        title = "Effective sequence length, tokens"
        figures.draw_heads(axis, attention["lengths"], attention["layers"], title, base=2)
        yield embed("Effective sequence length by layer and head")


def _selected(run: Run) -> Iterator[str]:
    selection = run_selection(run.directory)
    if selection is None:
        return
    yield _paragraph("The heads that stay softmax attention were chosen together, without training, on recall prompts.")
    yield _table(HEADER, curve_rows(selection))
    yield _paragraph(f"{curve_title(selection)}. KL: the divergence from the teacher on the answers, in nats.", "note")


def _gamma(run: Run) -> Iterator[str]:
    values, attention = run.results.get("gamma"), run.results.get("attention")
    if not values or not attention or run.config.attention.kind != "hybrid":
        return
    start = 1 / (1 + math.exp(-run.config.attention.gate_init))
    every = [value for layer in values for value in layer if value is not None]
    yield _paragraph(
        f"The weight γ of the window's softmax terms relative to the linear term: {start:.3g} at the start, "
        f"{min(every):.3g} to {max(every):.3g} after training.", "note",
    )  # fmt: skip
    with _figure(5.6, 4) as (axis, embed):
        figures.draw_heads(axis, values, attention["layers"], "γ of each head")
        yield embed("Learned gamma by layer and head")


def _memory(run: Run) -> Iterator[str]:
    if rows := memory_rows(run):
        yield _paragraph("Memory of one sequence during generation.")
        yield _table(("tokens in context", "teacher", "student"), rows)


def _samples(run: Run) -> Iterator[str]:
    tokens = SAMPLE_WINDOWS * run.config.attention.window_size
    yield _paragraph(f"Greedy answers of at most {tokens} tokens to: {SAMPLE_PROMPT}")
    for who in ("teacher", "student"):
        if f"sample_{who}" in run.results:
            yield f"<h3>{who}</h3>\n<blockquote>{escape(run.results[f'sample_{who}'])}</blockquote>"


def _provenance(run: Run) -> Iterator[str]:
    record = run.record
    facts = {
        "base model": f"{_name(run.base.path)}, {run.base.fingerprint}",
        "data": f"{_name(record['data']['source'])}, {record['data']['fingerprint']}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    for name, value in facts.items():
        yield _paragraph(f"{name}: {value}")
    yield _paragraph("This command, or its stages one by one, made everything here except the benchmarks:")
    again = [_name(run.base.path), "--data", _name(record["data"]["source"]), "--recipe", "config.yaml", "--out", "DIR"]
    yield _code(shlex.join(["lolcats", "linearize", *again]))
    yield f"<details><summary>config.yaml</summary>\n{_code(to_yaml(run.config))}</details>"


SECTIONS: tuple[tuple[str, Callable[[Run], Iterator[str]]], ...] = (
    ("Perplexity", _perplexity), ("Benchmarks", _benchmarks), ("State per sequence", _memory),
    ("Kept heads", _selected), ("Samples", _samples), ("Training", _training), ("Error by layer", _layer_errors),
    ("Attention maps", _maps),
    ("Effective sequence lengths", _lengths), ("Learned gamma", _gamma), ("Provenance", _provenance),
)  # fmt: skip


def _paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def _code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Any, Callable[..., str]]]:
    """Axes to draw on, and a function that turns the drawing into an <img> with the picture embedded."""
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
