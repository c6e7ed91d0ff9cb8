"""Turn pretrained softmax-attention language models into linear-attention ones.

    import lolcats
    model = lolcats.convert(model, lolcats.load_config("default"))

Importing this package registers ``model_type: lolcats`` with transformers, so
``AutoModelForCausalLM.from_pretrained(DIR)`` loads linearized models. Everything else is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.modeling import auto as _auto  # noqa: F401  registers the model type

__version__ = "0.1.0"

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
__all__ = ["LolcatsError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lolcats' has no attribute {name!r}")
