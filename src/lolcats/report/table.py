"""The tables that end a run, as rows of data; terminal and model card render the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.evaluation.memory import readable
from lolcats.run import RECORD, Run

ADAPTATION = (
    "LoRA below the teacher is domain adaptation (the teacher never saw these data), not better attention: "
    "compare with the teacher on other text before you conclude."
)
NO_CONTROLS = (
    "What linear attention adds is the difference to window + sinks with the same LoRA and no linear term, which this "
    "run has not trained: lolcats finetune DIR --controls."
)


def perplexity_rows(run: Run) -> list[tuple[str, str, str]]:
    """(model, perplexity, against the teacher) for everything measured so far."""
    results = run.results
    labels = {
        "ppl_teacher": "teacher (softmax attention)",
        "ppl_window": "window only, nothing trained",
        "ppl_window_sinks": f"window + {results.get('baseline_sinks')} sinks, nothing trained",
        "ppl_transfer": "after stage 1 (attention transfer)",
        "ppl_student": "after stage 2 (LoRA)",
        "ppl_linear_off": "  the same, its linear term off",
        "ppl_window_off": "  the same, its window and sinks off",
        "ppl_window_lora": f"window + {run.config.attention.sinks} sinks + the same LoRA, no linear term",
        "ppl_teacher_lora": "teacher + the same LoRA",
    }
    teacher = results.get("ppl_teacher")
    return [
        (label, f"{results[key]:.2f}", f"{100 * (results[key] / teacher - 1):+.1f} %")
        for key, label in labels.items()
        if key in results
    ]


def memory_rows(run: Run) -> list[tuple[str, str, str]]:
    """(tokens, teacher, student) bytes of state a sequence."""
    sizes: dict[str, Any] = run.results.get("cache_bytes", {})
    return [(f"{int(tokens):,}", readable(pair[0]), readable(pair[1])) for tokens, pair in sizes.items()]


def remarks(run: Run) -> list[str]:
    """What the reader must know to read the perplexities right."""
    results, texts = run.results, []
    if "ppl_student" not in results or "lora" not in _trained(run):
        return []
    if results["ppl_student"] < results["ppl_teacher"]:
        texts.append(ADAPTATION)
    if "ppl_window_lora" in results:
        change = results["ppl_student"] / results["ppl_window_lora"] - 1
        texts.append(f"What linear attention adds: {100 * change:+.1f} % perplexity against the same LoRA without it.")
    elif "linear" in _trained(run):
        texts.append(NO_CONTROLS)
    return texts


def controls_hint(model: str) -> str:
    """How to get the controls of a run's directory that has none; empty for anything else."""
    if not (Path(model) / RECORD).is_file():
        return ""
    run = Run.open(Path(model))
    return NO_CONTROLS if {"linear", "lora"} == _trained(run) and "ppl_window_lora" not in run.results else ""


def _trained(run: Run) -> set[str]:
    """What this run has trained by now: ``linear`` (a linear term, in either stage) and ``lora``."""
    kinds = {run.config.attention.kind, *run.config.attention.layers.values()}
    stages = {"lora"} if "steps" in run.record["stages"].get("finetune", {}) else set()
    return stages | ({"linear"} if kinds & {"hybrid", "linear"} else set())


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
