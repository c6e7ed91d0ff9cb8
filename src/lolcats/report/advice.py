"""Tells a user that a model is worse than its window and sinks with nothing trained, and what to change."""

from __future__ import annotations

from pathlib import Path

from lolcats.compared import STUDENT, TRANSFERRED, WINDOW_SINKS
from lolcats.run import RECORD, Run

ENOUGH = 4_000_000
"""Tokens of each stage that most models in docs/quality.md were trained on."""
STAGES = {"transfer": "stage 1", "finetune": "stage 2"}
UNROTATED = (
    "feature maps after RoPE only know the positions of their training rows, and these have {length:,} tokens: for "
    "longer text, train with attention.feature_inputs=unrotated or --recipe long"
)


def verdict(run: Run) -> str:
    """Says it if what the run has made so far is worse than the untrained window + sinks, and what to change; empty if
    it is not, or if one of the two has not been measured."""
    results, attention = run.results, run.config.attention
    made = next((model for model in (STUDENT, TRANSFERRED) if model.result in results), None)
    baseline = results.get(WINDOW_SINKS.result)
    if made is None or baseline is None or results[made.result] <= baseline or _linearized(run) == set():
        return ""
    name = "The student" if made is STUDENT else "The model without LoRA"
    window = WINDOW_SINKS.label(attention).removesuffix(", nothing trained") + _kept(run)
    value = results[made.result]
    difference = f"perplexity {value:,.2f} against {baseline:,.2f}, +{100 * (value / baseline - 1):,.1f} %"
    return _advice(f"{name} is worse than {window} with nothing trained ({difference}).", _changes(run))


def verdict_on(perplexities: dict[str, float], model: str, length: int) -> str:
    """The same for ``lolcats evaluate --data``: perplexities by model name on rows of ``length`` tokens."""
    value, baseline = perplexities.get(STUDENT.name), perplexities.get(WINDOW_SINKS.name)
    if value is None or baseline is None or value <= baseline:
        return ""
    text = "The student is worse than window + sinks with nothing trained."
    if not (Path(model) / RECORD).is_file():
        return text
    run = Run.open(Path(model))
    trained, rotated = run.config.data.sequence_length, run.config.attention.feature_inputs == "rotated"
    too_long = length > trained and rotated and bool(_linearized(run) & {"hybrid", "linear"})
    return _advice(text, [UNROTATED.format(length=trained)] if too_long else _changes(run))


def _advice(text: str, changes: list[str]) -> str:
    return f"{text} What to change: {'; '.join(changes)}."


def _linearized(run: Run) -> set[str]:
    """The kinds of the layers that are not softmax attention."""
    return {layer["kind"] for layer in run.layers} - {"softmax"}


def _kept(run: Run) -> str:
    if any(layer.get("softmax_heads") for layer in run.layers):
        return " and the same softmax heads"
    return " and the same softmax layers" if any(layer["kind"] == "softmax" for layer in run.layers) else ""


def _changes(run: Run) -> list[str]:
    """Settings that may make the run's model better, by what docs/quality.md has measured."""
    stages, kinds = run.record["stages"], _linearized(run)
    changes = []
    if kinds == {"linear"}:
        changes.append("give the layers a window (attention.kind=hybrid)")
    elif not run.config.attention.sinks:
        changes.append("use sinks (attention.sinks=4)")
    if kinds & {"hybrid", "linear"} and "skipped" in stages.get("transfer", {}):
        changes.append("do not skip stage 1 (transfer.max_steps=-1)")
    if "finetune" not in stages:
        changes.append("run stage 2 (lolcats finetune DIR)")
    elif "skipped" in stages["finetune"]:
        changes.append("do not skip stage 2 (finetune.max_steps=-1)")
    changes += [text for name in STAGES for text in _training(run, name)]
    return changes or ["train longer, or on more varied data"]


def _training(run: Run, name: str) -> list[str]:
    """What to change in the training of one stage."""
    stage, settings, title = run.record["stages"].get(name, {}), getattr(run.config, name), STAGES[name]
    if "steps" not in stage:
        return []
    steps, best, changes = stage["steps"], stage["best_step"], []
    tokens = steps * settings.batch_size * run.config.data.sequence_length
    if tokens < ENOUGH:
        changes.append(
            f"train {title} longer ({name}.max_steps, {name}.epochs or more data): it had {tokens:,} tokens, while the "
            "models in docs/quality.md had 4 million or more"
        )
    if best < steps:
        changes.append(f"lower {name}.learning_rate: the validation loss was lowest at step {best} of {steps}")
    return changes
