"""The ``lolcats`` section of a saved config.json: how the model was linearized, with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError

MODEL_TYPE = "lolcats"
REMOTE_TYPE = "lolcats_remote_code"
"""The ``model_type`` of a linearized model whose classes come with its base model (:mod:`lolcats.modeling.code`)."""
MODEL_TYPES = (MODEL_TYPE, REMOTE_TYPE)
SEAL = "sha256"


def is_linearized(path: str | Path) -> bool:
    """Whether ``path`` is a directory with a linearized model in either form."""
    file = Path(path) / "config.json"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    try:
        config = json.loads(text)
    except ValueError:  # a damaged file may still say what it was, and is then not taken for another model
        return any(f'"{kind}"' in text for kind in MODEL_TYPES)
    return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with a checksum of its contents."""
    plain = {key: value for key, value in record.items() if key != SEAL}
    return {**plain, SEAL: hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def check_record(record: Any) -> None:
    """Raise LolcatsError unless ``record`` is an intact ``lolcats`` section of a config.json."""
    if not isinstance(record, dict) or not isinstance(record.get("layers"), list):
        raise LolcatsError("config.json is damaged: it has no lolcats section that says how the model was linearized.")
    if SEAL in record and sealed(record) != record:
        raise LolcatsError(
            f"The lolcats section of config.json is damaged: its checksum does not match. If you changed it on "
            f"purpose, remove lolcats.{SEAL} from it."
        )


def read_record(directory: str | Path) -> dict[str, Any]:
    """The ``lolcats`` section of DIR/config.json."""
    path = Path(directory) / "config.json"
    try:
        record = json.loads(path.read_text())["lolcats"]
    except ValueError as error:
        raise LolcatsError(f"{path} is damaged: it is not valid JSON ({error}).") from None
    except (KeyError, TypeError):
        raise LolcatsError(f"{path} has no lolcats section: it is not a linearized model.") from None
    check_record(record)
    return dict(record)
