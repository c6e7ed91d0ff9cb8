"""Models whose classes come with the base model as Python code of its own, which runs only if the user allows it.

An adapter takes that code from its base model. Merged weights have a copy beside them. Both say so by their
``model_type``, which no program knows without that code, so that none loads them with other classes instead.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from lolcats.errors import LolcatsError, first_line
from lolcats.modeling.record import REMOTE_TYPE

CODE = "code"
"""In the ``lolcats`` section of config.json: file and class of the base model, as in transformers' ``auto_map``."""
HUB = ("revision", "token", "cache_dir", "local_files_only")


class CodeError(LolcatsError, ValueError):
    """Code that cannot be used. A ValueError, too: AutoTokenizer, which needs no such code, goes on without it."""


def came_with_model(cls: type) -> bool:
    """Whether transformers took a class from the files of a model, not from an installed package."""
    return cls.__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def needs_code(config: dict[str, Any]) -> bool:
    """Whether the model of a config.json only exists with code that comes with its base model.

    Older versions did not record it; of these models, transformers does not know the base model's type.
    """
    return config.get("model_type") == REMOTE_TYPE or config.get("base_model_type") not in CONFIG_MAPPING


def may_run_code(directory: str | Path, trust: bool) -> bool:
    """Whether to run the code that a linearized model needs, if it needs any. ``trust``: the user allows it.

    Raises:
        LolcatsError: it needs code that the user has not allowed.
    """
    config = json.loads((Path(directory) / "config.json").read_text())
    if config.get("model_type") == REMOTE_TYPE and not trust:
        raise LolcatsError(
            f"{directory} was linearized from a model that comes with its own Python code, which runs only if you "
            "allow it: --trust-remote-code, or lolcats.load(DIR, trust=True) in Python."
        )
    return trust and needs_code(config)


def own_model_class(path: str | Path, config: dict[str, Any], moved: str | Path = "", **hub: Any) -> Any:
    """The base model's class, defined by its own code. This runs the code: call it only if the user allowed that.

    Args:
        path: a linearized model, a directory or on the hub, whose config.json contains ``config``.
        moved: where the base model of an adapter is now, if not at its recorded place.
        hub: transformers' options for files on the hub.
    """
    record = config.get("lolcats") or {}
    base = record.get("base")
    if base is None and CODE not in record:
        raise CodeError(
            f"{path} lacks the code of its base model ({config.get('base_model_type')}), which older versions did not "
            "copy. Merge the adapter again: lolcats export DIR --merge --out MERGED --trust-remote-code."
        )
    place = str(path if base is None else moved or base["path"])
    try:
        if base is None:
            reference = record[CODE]
        else:
            hub = {name: value for name, value in hub.items() if name != "revision"}  # which is the adapter's
            known = AutoConfig.from_pretrained(place, trust_remote_code=True, **hub)
            reference = known.auto_map["AutoModelForCausalLM"]
        return add_generation_mixin_to_remote_model(get_class_from_dynamic_module(reference, place, **hub))
    except Exception as error:  # the code may raise anything
        raise CodeError(f"The code of {place} cannot be used: {first_line(error)}.") from error


def reference_to(cls: type) -> str:
    """The value of :data:`CODE` for a class that came with a model."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def copy_code(cls: type, folder: Path) -> None:
    """Copy the file that defines ``cls``, which came with a model, and the files that it imports from beside it."""
    file = Path(str(sys.modules[cls.__module__].__file__))
    for source in (file, *map(Path, get_relative_import_files(file))):
        if source.is_relative_to(file.parent) and source.is_file():
            target = folder / source.relative_to(file.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
