"""What ``lolcats info`` reports about a model, without loading its weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lolcats.modeling.checkpoint import is_linearized
from lolcats.modeling.parts import check_parts, lost_controls
from lolcats.modeling.probe import probe
from lolcats.weights.base import empty_model, find_base


def describe(model: str, trust: bool = False) -> dict[str, Any]:
    """Facts by name, from the config.json of a linearized model or from the configuration of a base model."""
    return _linearized(Path(model)) if is_linearized(model) else _base(model, trust)


def _linearized(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text())
    record = config["lolcats"]
    if record.get("form") == "adapter":
        check_parts(directory, record.get("parts"))
    facts: dict[str, Any] = {
        "form": record.get("form", "merged"),
        "family": config["base_model_type"],
        "layers": ", ".join(f"{n} {kind}" for kind, n in Counter(e["kind"] for e in record["layers"]).items()),
        **record["attention"],
    }
    if "base" in record:
        facts |= {"base model": record["base"]["path"], "base fingerprint": record["base"]["fingerprint"]}
    if (directory / "run.json").is_file():
        run = json.loads((directory / "run.json").read_text())
        facts |= {"data": run["data"]["source"], "date": run["date"]}
        facts |= {f"stage {name}": json.dumps(stage) for name, stage in run["stages"].items()}
        if lost := lost_controls(directory):
            facts["missing"] = lost
        facts |= {k: f"{v:.3f}" for k, v in run["results"].items() if k.startswith("ppl_")}
    return facts


def _base(model: str, trust: bool) -> dict[str, Any]:
    base = find_base(model, trust)
    empty = empty_model(base, trust)
    layers = probe(empty)
    first = layers[0].geometry
    return {
        "form": f"base model ({base.form})",
        "family": empty.config.model_type,
        "fingerprint": base.fingerprint,
        "parameters": f"{sum(p.numel() for p in empty.parameters()):,}",
        "attention layers": len(layers),
        "sliding already": sum(layer.sliding_window is not None for layer in layers),
        "query heads, key/value heads, head dim": f"{first.heads}, {first.kv_heads}, {first.head_dim}",
        "obstacles": next((layer.obstacle for layer in layers if layer.obstacle), None) or "none: can be linearized",
    }
