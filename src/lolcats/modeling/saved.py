"""What `lolcats info` reports about a saved linearized model, from its JSON files: neither torch nor transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lolcats.modeling.parts import check_parts, lost_controls


def describe_saved(directory: Path) -> dict[str, Any]:
    """Facts by name about the linearized model in ``directory``, adapter or merged."""
    config = json.loads((directory / "config.json").read_text())
    record = config["lolcats"]
    if record.get("form") == "adapter":
        check_parts(directory, record.get("parts"))
    facts: dict[str, Any] = {
        "form": record.get("form", "merged"),
        "family": config["base_model_type"],
        "layers": ", ".join(f"{n} {kind}" for kind, n in Counter(e["kind"] for e in record["layers"]).items()),
        **_kept_heads(record["layers"]),
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


def _kept_heads(layers: list[dict[str, Any]]) -> dict[str, str]:
    """How many key/value heads stay softmax attention, if some do in layers that are linearized."""
    if not any(entry.get("softmax_heads") for entry in layers):
        return {}
    whole = sum(entry["kv_heads"] for entry in layers if entry["kind"] == "softmax")
    count = whole + sum(len(entry.get("softmax_heads", ())) for entry in layers)
    return {"softmax key/value heads": f"{count} of {sum(entry['kv_heads'] for entry in layers)}"}
