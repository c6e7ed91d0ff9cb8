"""Base models with Python code of their own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

RAN = "code of a file was run"
CONFIGURATION = """
print({ran!r})
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = {kind!r}
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def with_code(model: Path, base: Path, ran: str = RAN, kind: str = "own-llama") -> Path:
    """A copy of a Llama that the code beside it defines: it halves the logits. The code prints ``ran`` when it runs.

    kind: its model type, which only that code defines unless it is ``llama``.
    """
    shutil.copytree(model, base)
    (base / "configuration_own.py").write_text(CONFIGURATION.format(ran=ran, kind=kind))
    (base / "modeling_own.py").write_text(MODELING)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": AUTO_MAP}))
    return base


def forget_code() -> None:
    """Let code that comes with models run anew, in this process."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]
