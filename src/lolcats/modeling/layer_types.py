"""What config.json says of each layer in transformers' terms: engines like vLLM choose memory for a layer by it.

A saved ``layer_types`` says ``linear_attention`` for each linearized layer, ``base_layer_types`` what the base family
has there. A configuration that was read has both, until it becomes a model's: the family's own code must see its own.
"""

from __future__ import annotations

import copy
from typing import Any

LINEAR, FULL = "linear_attention", "full_attention"
BASE = "base_layer_types"


def saved_layer_types(config: Any) -> dict[str, Any]:
    """The two fields for config.json, of a configuration with a ``lolcats`` section; nothing where they do not fit.

    They do not fit a configuration in parts (text and images), nor one that computes its layer types.
    """
    if BASE in vars(config):  # it was read
        return {"layer_types": config.layer_types, BASE: vars(config)[BASE]}
    record = getattr(config, "lolcats", None)
    if not record or config.get_text_config(decoder=True) is not config:
        return {}
    name = type(config).attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(type(config), name, None), property):
        return {}
    base = getattr(config, "layer_types", None)
    types = list(base or [FULL] * config.num_hidden_layers)
    linear = [entry["layer"] for entry in record["layers"] if entry["kind"] != "softmax"]
    if any(layer >= len(types) for layer in linear):
        return {}
    for layer in linear:
        types[layer] = LINEAR
    return {"layer_types": types, BASE: base}


def as_the_base_has_them(config: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration as the family's own class reads it."""
    if BASE not in config:
        return config
    config = dict(config)
    config["layer_types"] = config.pop(BASE)
    if config["layer_types"] is None:
        del config["layer_types"]
    return config


def show_engines(config: Any) -> None:
    """Give a configuration that was just read the two fields."""
    for name, value in saved_layer_types(config).items():
        setattr(config, name, value)


def for_a_model(config: Any) -> Any:
    """The configuration for the family's own code: a copy if it has the two fields."""
    if BASE not in vars(config):
        return config
    config = copy.deepcopy(config)
    base = vars(config).pop(BASE)
    if base is None:
        vars(config).pop("layer_types", None)
    else:
        config.layer_types = base
    return config
