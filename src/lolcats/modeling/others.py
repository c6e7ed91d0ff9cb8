"""What PEFT and liger-kernel look up by ``model_type``: a linearized model is to them what its base family is.

Neither has an extension point for it, so both are changed, as soon as they are imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from wrapt import register_post_import_hook

from lolcats.modeling.record import MODEL_TYPES

MAMBA_CHECK = "_check_lora_target_modules_mamba"  # private: another version of PEFT may not have it


def family_of(config: Any) -> Any:
    """The base family's ``model_type`` of a linearized model's configuration; any other configuration's own."""
    return getattr(config, "base_model_type", None) or getattr(config, "model_type", None)


def _change_peft(tuners: Any) -> None:
    """For ``peft.tuners.tuners_utils``: default target modules, and modules of Mamba blocks that LoRA cannot take."""
    describe: Any = tuners.BaseTuner.get_model_config
    check: Any = getattr(tuners, MAMBA_CHECK, None)

    @functools.wraps(describe)
    def get_model_config(model: Any) -> Any:
        config = describe(model)
        linearized = isinstance(config, dict) and config.get("model_type") in MODEL_TYPES
        return {**config, "model_type": config["base_model_type"]} if linearized else config

    def check_target_modules(peft_config: Any, model: Any, target_name: str) -> None:
        base = SimpleNamespace(config=SimpleNamespace(model_type=family_of(getattr(model, "config", None))))
        check(peft_config, base, target_name)

    tuners.BaseTuner.get_model_config = staticmethod(get_model_config)
    if check is not None:
        setattr(tuners, MAMBA_CHECK, functools.wraps(check)(check_target_modules))


def _change_liger(patches: Any) -> None:
    """For ``liger_kernel.transformers.monkey_patch``: an entry of our own, which applies the base family's patch."""
    table = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    options = {name: option for patch in table.values() for name, option in inspect.signature(patch).parameters.items()}

    def apply_liger_kernel_to_lolcats(model: Any = None, **kwargs: Any) -> None:
        patch = table.get(family_of(model.config)) if model is not None else None
        if patch is not None:
            patch(model=model, **{k: v for k, v in kwargs.items() if k in inspect.signature(patch).parameters})

    # Liger passes only options that the signature names.
    keywords = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options.values()]
    apply_liger_kernel_to_lolcats.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    table.update(dict.fromkeys(MODEL_TYPES, apply_liger_kernel_to_lolcats))


CHANGES: dict[str, Callable[[Any], None]] = {
    "peft.tuners.tuners_utils": _change_peft,
    "liger_kernel.transformers.monkey_patch": _change_liger,
}


def register() -> None:
    """Change the libraries, now or when they are imported: importing PEFT takes a second, liger-kernel more."""
    for name, change in CHANGES.items():
        register_post_import_hook(change, name)


register()
