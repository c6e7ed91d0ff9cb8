"""Turn pretrained softmax-attention language models into linear-attention ones.

    import lolcats
    model = lolcats.convert(model, lolcats.load_config("paper-sinks"))

Importing this package registers ``model_type: lolcats`` with transformers, so
``AutoModelForCausalLM.from_pretrained(DIR)`` loads linearized models. It imports neither transformers nor torch: the
registration waits until the program imports AutoConfig, and everything else is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from lolcats.errors import LolcatsError
from lolcats.version import __version__

if TYPE_CHECKING:
    from lolcats.attention import use_backend
    from lolcats.config import Config, load_config
    from lolcats.evaluation.perplexity import perplexity
    from lolcats.modeling.checkpoint import load
    from lolcats.modeling.convert import convert
    from lolcats.modeling.layer import override
    from lolcats.stages.finetune.stage import finetune
    from lolcats.stages.transfer.stage import transfer

_LAZY = {
    "Config": "lolcats.config",
    "load_config": "lolcats.config",
    "convert": "lolcats.modeling.convert",
    "load": "lolcats.modeling.checkpoint",
    "override": "lolcats.modeling.layer",
    "use_backend": "lolcats.attention",
    "transfer": "lolcats.stages.transfer.stage",
    "finetune": "lolcats.stages.finetune.stage",
    "perplexity": "lolcats.evaluation.perplexity",
}
__all__ = [
    "Config", "LolcatsError", "__version__", "convert", "finetune", "load", "load_config", "override", "perplexity",
    "transfer", "use_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lolcats' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(_auto_config: object) -> None:
    importlib.import_module("lolcats.modeling.auto")  # registers the model type


register_post_import_hook(_register, "transformers.models.auto.configuration_auto")  # now, if it is imported already
