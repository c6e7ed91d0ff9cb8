"""The models that are compared: teacher, untrained windows, what the stages make, branches off, and controls.

Pipeline, evaluations, sweeps and reports take from one entry what they call a model, how it is made from a converted
model, what must be trained for it, and where run.json has its perplexity.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lolcats.config import AttentionConfig, from_dict
from lolcats.modeling.layer import override

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Needs = Literal["nothing", "transfer", "finetune", "control"]


def baseline_sinks(attention: AttentionConfig) -> int:
    """Sinks of the untrained window with sinks: as many as the run has; if none, 4, or all of a smaller window."""
    return attention.sinks or min(4, attention.window_size)


@dataclass(frozen=True, eq=False)
class Compared:
    """One of the models that are compared."""

    name: str
    """As in ``lolcats evaluate --baseline``."""
    title: str
    """Its line in a run's table; {sinks} and {baseline_sinks} stand for numbers."""
    change: dict[str, Any] = field(default_factory=dict)
    """Arguments of :func:`override` that turn a converted model into it; a function gives its from the attention."""
    needs: Needs = "nothing"
    """What must be trained: nothing, feature maps (``transfer``), these and LoRA (``finetune``), or LoRA of its own."""
    skipped: str = ""
    """Its line in a run's table if that stage was skipped."""
    words: str = ""
    """In messages about progress, if not its name."""
    sweep: str = ""
    """In the results and tables of sweeps, if not its name."""

    @property
    def key(self) -> str:
        """Its name as an identifier."""
        return self.name.replace("+", "_").replace("-", "_")

    @property
    def result(self) -> str:
        """The key of its held-out perplexity in run.json."""
        return f"ppl_{self.key}"

    @property
    def in_words(self) -> str:
        return self.words or self.name.replace("+", " + ").replace("-", " ")

    @property
    def in_sweeps(self) -> str:
        return self.sweep or self.name

    @property
    def with_heads(self) -> str:
        """In the results of a sweep's row with kept heads: an untrained window, which has them too."""
        return f"{self.in_sweeps}, heads kept"

    def label(self, attention: AttentionConfig, skipped: Collection[str] = ()) -> str:
        """Its line in the table of a run that has skipped these stages."""
        if self.skipped and self.needs in skipped:
            return self.skipped
        return self.title.format(sinks=attention.sinks, baseline_sinks=baseline_sinks(attention))

    def changes(self, attention: AttentionConfig) -> dict[str, Any]:
        """Arguments of :func:`override` that turn a model with this attention into it."""
        return {name: value(attention) if callable(value) else value for name, value in self.change.items()}

    def on(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """For the block's duration, turn a converted model that has the weights this one needs into it."""
        return override(model, **self.changes(from_dict(AttentionConfig, model.config.lolcats["attention"])))


TEACHER = Compared("teacher", "teacher (softmax attention)", {"mode": "teacher"})
WINDOW = Compared("window", "window only, nothing trained", {"kind": "window", "sinks": 0}, words="window only",
                  sweep="window, nothing trained")  # fmt: skip
WINDOW_SINKS = Compared("window+sinks", "window + {baseline_sinks} sinks, nothing trained",
                        {"kind": "window", "sinks": baseline_sinks},
                        sweep="window + sinks, nothing trained")  # fmt: skip
TRANSFERRED = Compared("transfer", "after stage 1 (attention transfer)", needs="transfer", skipped="stage 1 skipped",
                       words="after transfer")  # fmt: skip
STUDENT = Compared("student", "after stage 2 (LoRA)", needs="finetune", skipped="stage 2 skipped", words="after LoRA")
LINEAR_OFF = Compared("linear-off", "  the same, its linear term off", {"kind": "window"}, "finetune",
                      sweep="linear off")  # fmt: skip
WINDOW_OFF = Compared("window-off", "  the same, its window and sinks off", {"kind": "remote"}, "finetune")
WINDOW_LORA = Compared("window+lora", "window + {sinks} sinks + the same LoRA, no linear term", {"kind": "window"},
                       "control")  # fmt: skip
TEACHER_LORA = Compared("teacher+lora", "teacher + the same LoRA", {"mode": "teacher"}, "control")

WINDOWS = (WINDOW, WINDOW_SINKS)
BRANCHES = (LINEAR_OFF, WINDOW_OFF)
"""The student with one branch switched off, which leaves only the other."""
CONTROLS = {control.key: control for control in (WINDOW_LORA, TEACHER_LORA)}
"""By their names in ``config.controls``. Neither uses feature maps or gates."""
BASELINES = {model.name: model for model in (*WINDOWS, *CONTROLS.values(), *BRANCHES)}
"""What ``--baseline`` names, in the order in which an evaluation compares them."""
COMPARED = (TEACHER, *WINDOWS, TRANSFERRED, STUDENT, *BRANCHES, *CONTROLS.values())
"""In the order of a run's table."""
