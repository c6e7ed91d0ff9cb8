"""The tables at the end of a run, as rows of data that both terminal and model card render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.config import AttentionConfig
from lolcats.evaluation.memory import readable
from lolcats.run import RECORD, Run

ADAPTATION = (
    "The student with LoRA beats the teacher by adapting to this data, which the teacher never saw, not by better "
    "attention: compare them on other text before you conclude anything."
)
NO_CONTROLS = (
    "To see what linear attention adds, compare with window + sinks with the same LoRA and no linear term. This run "
    "has not trained that control: use lolcats finetune DIR --controls."
)

AGAINST_CONTROLS = {
    "ppl_window_lora": "What linear attention adds: {} perplexity against the same LoRA without it (lower is better).",
    "ppl_teacher_lora": "What linearizing costs: {} perplexity against the teacher with the same LoRA.",
}


def attention_of(config: AttentionConfig) -> str:
    """What replaces softmax attention, in words."""
    parts = [f"{config.kind} attention"]
    if config.kind in ("hybrid", "window"):
        parts.append(f"{config.window} window of {config.window_size} tokens, {config.sinks} sinks")
    if config.kind in ("hybrid", "linear"):
        place = "after" if config.feature_inputs == "rotated" else "before"
        parts.append(f"{config.feature_map} feature maps {place} RoPE")
    parts += [f"in layers {layers} {kind}" for layers, kind in config.layers.items()]
    return ", ".join(parts)


def perplexity_rows(run: Run) -> list[tuple[str, str, str]]:
    """(model, perplexity, difference to the teacher) of everything measured so far."""
    results = run.results
    skipped = {name for name, stage in run.record["stages"].items() if "skipped" in stage}
    labels = {
        "ppl_teacher": "teacher (softmax attention)",
        "ppl_window": "window only, nothing trained",
        "ppl_window_sinks": f"window + {results.get('baseline_sinks')} sinks, nothing trained",
        "ppl_transfer": "stage 1 skipped" if "transfer" in skipped else "after stage 1 (attention transfer)",
        "ppl_student": "stage 2 skipped" if "finetune" in skipped else "after stage 2 (LoRA)",
        "ppl_linear_off": "  the same, its linear term off",
        "ppl_window_off": "  the same, its window and sinks off",
        "ppl_window_lora": f"window + {run.config.attention.sinks} sinks + the same LoRA, no linear term",
        "ppl_teacher_lora": "teacher + the same LoRA",
    }
    base = "ppl_teacher"
    return [
        (label, _number(results[key], 2), "" if key == base else _percent(results[key], results[base]))
        for key, label in labels.items()
        if key in results
    ]


def memory_rows(run: Run) -> list[tuple[str, str, str]]:
    """(tokens, teacher, student): bytes of state per sequence."""
    sizes: dict[str, Any] = run.results.get("cache_bytes", {})
    return [(f"{int(tokens):,}", readable(pair[0]), readable(pair[1])) for tokens, pair in sizes.items()]


def remarks(run: Run) -> list[str]:
    """Notes on how to read the perplexities."""
    results, student, texts = run.results, run.results.get("ppl_student"), []
    if student is None or "lora" not in _trained(run):
        return []
    for control, text in AGAINST_CONTROLS.items():
        if control in results:
            texts.append(text.format(_percent(student, results[control])))
    if "linear" in _trained(run) and "ppl_window_lora" not in results:
        texts.append(NO_CONTROLS)
    if student < results["ppl_teacher"]:
        texts.append(ADAPTATION)
    return texts


def controls_hint(model: str) -> str:
    """How to train the controls of a run that lacks them; empty if nothing is missing."""
    if not (Path(model) / RECORD).is_file():
        return ""
    run = Run.open(Path(model))
    return NO_CONTROLS if {"linear", "lora"} == _trained(run) and "ppl_window_lora" not in run.results else ""


def _number(value: float, places: int, sign: str = "") -> str:
    """Format a number; from 1,000 up without decimals."""
    return f"{value:{sign}z,.{places if abs(value) < 1000 else 0}f}"


def _percent(value: float, other: float) -> str:
    """How far ``value`` is above ``other``, in %."""
    return f"{_number(100 * (value / other - 1), 1, '+')} %"


def _trained(run: Run) -> set[str]:
    """What this run has trained so far: ``linear`` (a linear term, in either stage), ``lora``, or both."""
    kinds = {run.config.attention.kind, *run.config.attention.layers.values()}
    stages = {"lora"} if "steps" in run.record["stages"].get("finetune", {}) else set()
    return stages | ({"linear"} if kinds & {"hybrid", "linear"} else set())


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
