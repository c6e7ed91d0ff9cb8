"""metrics.jsonl of a run: one JSON object per line, for both stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lolcats.files import read_json_lines, write_text


def replace_metrics(path: Path, stage: str, history: list[dict[str, Any]]) -> None:
    """Replace the entries of a stage in a metrics file by ``history``."""
    others = [json.dumps(entry) for entry in read_json_lines(path) if entry.get("stage") != stage]
    ours = [json.dumps({"stage": stage, **entry}) for entry in history]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(line + "\n" for line in others + ours))
