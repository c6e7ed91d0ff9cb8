"""The tables that end a run, as rows of data; terminal and model card render the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.config import AttentionConfig
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
        place = "behind" if config.feature_inputs == "rotated" else "in front of"
        parts.append(f"{config.feature_map} feature maps {place} RoPE")
    parts += [f"in layers {layers} {kind}" for layers, kind in config.layers.items()]
    return ", ".join(parts)


def perplexity_rows(run: Run) -> list[tuple[str, str, str]]:
    """(model, perplexity, against the teacher) for everything measured so far."""
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
    """(tokens, teacher, student) bytes of state a sequence."""
    sizes: dict[str, Any] = run.results.get("cache_bytes", {})
    return [(f"{int(tokens):,}", readable(pair[0]), readable(pair[1])) for tokens, pair in sizes.items()]


def remarks(run: Run) -> list[str]:
    """What the reader must know to read the perplexities right."""
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
    """How to get the controls of a run's directory that has none; empty for anything else."""
    if not (Path(model) / RECORD).is_file():
        return ""
    run = Run.open(Path(model))
    return NO_CONTROLS if {"linear", "lora"} == _trained(run) and "ppl_window_lora" not in run.results else ""


def _number(value: float, places: int, sign: str = "") -> str:
    """Without decimals from 1,000 up."""
    return f"{value:{sign}z,.{places if abs(value) < 1000 else 0}f}"


def _percent(value: float, other: float) -> str:
    """How much ``value`` is above ``other``."""
    return f"{_number(100 * (value / other - 1), 1, '+')} %"


def _trained(run: Run) -> set[str]:
    """What this run has trained by now: ``linear`` (a linear term, in either stage) and ``lora``."""
    kinds = {run.config.attention.kind, *run.config.attention.layers.values()}
    stages = {"lora"} if "steps" in run.record["stages"].get("finetune", {}) else set()
    return stages | ({"linear"} if kinds & {"hybrid", "linear"} else set())


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
