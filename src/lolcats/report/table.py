"""The tables at the end of a run, as rows of data that both terminal and model card render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.compared import COMPARED, STUDENT, TEACHER, TEACHER_LORA, TRANSFERRED, WINDOW_LORA, Compared
from lolcats.config import AttentionConfig, Config
from lolcats.evaluation.memory import readable
from lolcats.evaluation.recall import BEYOND
from lolcats.report.advice import verdict
from lolcats.run import RECORD, STATE_TOKENS, Run

ADAPTATION = (
    "The student with LoRA beats the teacher by adapting to this data, which the teacher never saw, not by better "
    "attention: compare them on other text before you conclude anything."
)
NO_CONTROLS = (
    "To see what linear attention adds, compare with window + sinks with the same LoRA and no linear term. This run "
    "has not trained that control: use lolcats finetune DIR --controls."
)

IN_4_BITS = "measured_in_4_bits"
"""In run.json: true if the base model was in 4 bits for everything measured."""
QUANTIZED = (
    "All of this is measured on the base model in 4 bits (finetune.quantize_base), whose own weights do not fit into "
    "memory."
)
STUDENT_IN_4_BITS = "student_measured_in_4_bits"
"""In run.json: true if the base model was in 4 bits only for what was measured of the student, as in sweeps."""
STUDENT_QUANTIZED = (
    "The student is measured on the base model in 4 bits that it was trained on (finetune.quantize_base), all else on "
    "the base model's own weights."
)
EMPTY = "empty_linear_term"
"""In run.json: of documents that are kept apart, the share of the training tokens whose query has no key for the linear
term."""

AGAINST_CONTROLS = {
    WINDOW_LORA: "What linear attention adds: {} perplexity against the same LoRA without it (lower is better).",
    TEACHER_LORA: "What linearizing costs: {} perplexity against the teacher with the same LoRA.",
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


def loss_of(config: Config) -> str:
    """What stage 2 makes small, in words."""
    tuned = config.finetune
    heat = "" if tuned.kl_temperature == 1 else f" at temperature {tuned.kl_temperature:g}, times its square"
    distance = f"the KL divergence from the teacher{heat}"
    kinds = {
        "cross_entropy": "the next-token loss", "kl": distance,
        "mix": f"{1 - tuned.kl_weight:g} × the next-token loss + {tuned.kl_weight:g} × {distance}",
    }  # fmt: skip
    return kinds[tuned.loss] + (", on completions only" if config.data.loss == "completion" else "")


def perplexity_rows(run: Run) -> list[tuple[str, str, str]]:
    """(model, perplexity, difference to the teacher) of everything measured so far."""
    results, attention = run.results, run.config.attention
    skipped = {name for name, stage in run.record["stages"].items() if "skipped" in stage}
    return [
        (
            model.label(attention, skipped), _number(results[model.result], 2),
            "" if model is TEACHER else _percent(results[model.result], results[TEACHER.result]),
        )
        for model in _shown(run)
    ]  # fmt: skip


def _shown(run: Run) -> list[Compared]:
    """The models measured so far. Without a linear term nothing is trained in stage 1: the model after it is one of the
    untrained ones."""
    models = [model for model in COMPARED if model.result in run.results]
    return [model for model in models if model is not TRANSFERRED or run.config.attention.has_linear]


def model_table(run: Run) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): perplexity, recall and bytes of state of everything measured so far. Recall and bytes only if a
    model has them."""
    models = _shown(run)
    columns = [(f"recall at {_recall_length(run)} tokens", [_recall(run, model) for model in models]),
               (f"state at {STATE_TOKENS:,} tokens", [_bytes(run, model) for model in models])]  # fmt: skip
    shown = [(name, cells) for name, cells in columns if any(cells)]
    header = ("model", "perplexity", "against teacher", *(name for name, _ in shown))
    return header, [(*row, *(cells[i] for _, cells in shown)) for i, row in enumerate(perplexity_rows(run))]


def recall_note(run: Run) -> str:
    """What the recall in a run's table is; empty if none was measured."""
    found = _recall_of(run, TEACHER)
    if not found:
        return ""
    return (
        f"Recall: the share of {found['answers']} numbers, hidden in text beyond the student's window, that the model "
        "gives when asked, ± one standard error. For more, run lolcats evaluate DIR --tasks recall --data TEXT"
    )


def _recall_of(run: Run, model: Compared) -> dict[str, Any]:
    found: dict[str, Any] = run.results.get(f"recall_{model.key}") or {}
    return found.get(BEYOND, {})


def _recall_length(run: Run) -> str:
    return f"{int(_recall_of(run, TEACHER).get('task', '@0').partition('@')[2]):,}"


def _recall(run: Run, model: Compared) -> str:
    if not (found := _recall_of(run, model)):
        return ""
    error = "" if found["stderr"] is None else f" ± {100 * found['stderr']:.0f}"
    return f"{100 * found['value']:.0f}{error} %"


def _bytes(run: Run, model: Compared) -> str:
    size = run.results.get(f"bytes_{model.key}")
    return "" if size is None else readable(size)


def memory_rows(run: Run) -> list[tuple[str, str, str]]:
    """(tokens, teacher, student): bytes of state per sequence."""
    sizes: dict[str, Any] = run.results.get("cache_bytes", {})
    return [(f"{int(tokens):,}", readable(pair[0]), readable(pair[1])) for tokens, pair in sizes.items()]


def remarks(run: Run) -> list[str]:
    """Notes on how to read the table. The last one says it if the model is worse than with nothing trained."""
    share = run.record.get("data", {}).get(EMPTY)
    texts = [
        QUANTIZED if run.results.get(IN_4_BITS) else "",
        STUDENT_QUANTIZED if run.results.get(STUDENT_IN_4_BITS) else "",
        recall_note(run),
        "" if share is None else empty_term(share),
    ]
    return [*filter(None, texts), *_of_lora(run), *filter(None, [verdict(run)])]


def _of_lora(run: Run) -> list[str]:
    """What the perplexity of a student with LoRA does and does not show."""
    results, student, texts = run.results, run.results.get(STUDENT.result), list[str]()
    if student is None or not has_lora(run):
        return texts
    for control, text in AGAINST_CONTROLS.items():
        if control.result in results:
            texts.append(text.format(_percent(student, results[control.result])))
    if _lacks_control(run):
        texts.append(NO_CONTROLS)
    better = _percent(student, results[TEACHER.result]).startswith("-")  # not only by what the table does not show
    if better and run.config.finetune.loss != "kl":  # which only learns to predict as the teacher does
        texts.append(ADAPTATION)
    return texts


def empty_term(share: float) -> str:
    return (
        f"{share:.1%} of the training tokens have an empty linear term: sinks and window cover all that comes before "
        "them in their document (data.reset_at_documents)."
    )


def controls_hint(model: str) -> str:
    """How to train the controls of a run that lacks them; empty if nothing is missing."""
    is_run = (Path(model) / RECORD).is_file()
    return NO_CONTROLS if is_run and _lacks_control(Run.open(Path(model))) else ""


def _number(value: float, places: int, sign: str = "") -> str:
    """Format a number; from 1,000 up without decimals."""
    return f"{value:{sign}z,.{places if abs(value) < 1000 else 0}f}"


def _percent(value: float, other: float) -> str:
    """How far ``value`` is above ``other``, in %."""
    return f"{_number(100 * (value / other - 1), 1, '+')} %"


def has_lora(run: Run) -> bool:
    """Whether stage 2 has trained LoRA."""
    return "steps" in run.record["stages"].get("finetune", {}) and run.config.finetune.learning_rate > 0


def _lacks_control(run: Run) -> bool:
    """Whether a run with LoRA and a linear term lacks the control that would show what the linear term adds."""
    return has_lora(run) and run.config.attention.has_linear and WINDOW_LORA.result not in run.results


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
