"""What PEFT and liger-kernel look up by ``model_type``: a linearized model is to them what its base family is.

Neither has an extension point for it, so both are changed, as soon as they are imported.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

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


class _Changing(MetaPathFinder):
    """Finds the modules of ``CHANGES`` as other finders do, and changes them once they have run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run: Any = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                CHANGES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Change the libraries, now or when they are imported: importing PEFT takes a second, liger-kernel more."""
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
    sys.meta_path.insert(0, _Changing())


register()
