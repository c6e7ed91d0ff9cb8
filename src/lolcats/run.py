"""The run directory: identity, progress and results of a run. ``run.json`` is the only record of these.

DIR/run.json                identity (base model, data, configuration), versions, stages done, results
DIR/config.yaml             all settings, as a recipe
DIR/config.json             with feature_maps.safetensors and lora/: the adapter, loaded by from_pretrained(DIR)
DIR/merged/                 the self-contained model
DIR/metrics.jsonl           losses of both stages
DIR/controls/NAME/          the controls, each an adapter with its metrics.jsonl
DIR/README.md, report.png   model card and picture
DIR/report.html             all measurements, with pictures; some are drawn from attention.safetensors
DIR/checkpoints/            working files of an unfinished stage
DIR/.lock                   while a command writes to the directory
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lolcats.config import PLACEMENT, Config, from_dict, to_dict
from lolcats.errors import LolcatsError
from lolcats.files import check_directory, is_empty, write_text
from lolcats.modeling.code import needs_code
from lolcats.modeling.parts import CONFIG, list_parts
from lolcats.modeling.record import read_record
from lolcats.ranks import is_first
from lolcats.version import __version__
from lolcats.weights.base import UNKNOWN, Base

RECORD = "run.json"
SAMPLE_PROMPT = "What is a good way to spend a rainy weekend? Explain your ideas."
STATE_TOKENS = 8192  # length of a sequence whose state is measured beside perplexity
SAMPLE_WINDOWS = 3  # maximum length of an answer in windows; its end depends on the linear term
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


class Run:
    """A run directory, new or continued. Every change is written immediately, so a kill loses nothing."""

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.directory, self.record = directory, record

    @classmethod
    def start(cls, directory: Path, base: Base, data: dict[str, Any], config: Config) -> Run:
        """Start a new run (written by its first ``save``), or continue the one in ``directory`` if it is the same."""
        identity = {"base": base.record, "data": data, "config": to_dict(config)}
        if (directory / RECORD).exists():
            run = cls.open(directory)
            asked = {
                "controls": list(dict.fromkeys([*run.config.controls, *config.controls])),  # may be added later
                "trust_remote_code": config.trust_remote_code,  # each command's own
            }
            known = {**run.record, "config": {**to_dict(run.config), **asked}}  # new settings have their defaults
            for stage, keys in PLACEMENT.items():
                known["config"][stage] |= {key: identity["config"][stage][key] for key in keys}
            for stage in PLACEMENT:  # a run keeps the number that it began with, recipes that are newer say auto
                if identity["config"][stage]["micro_batch_size"] == "auto":
                    identity["config"][stage]["micro_batch_size"] = known["config"][stage]["micro_batch_size"]
            identity["config"] |= asked
            if changed := _difference(known, identity):
                own = directory / "config.yaml"
                raise LolcatsError(
                    f"{directory} holds another run: {changed}. Choose another --out, or repeat the original command"
                    + (f" (--recipe {own} has its settings)." if own.is_file() else ".")
                )
            run.record["config"] = identity["config"]
            run.record["base"] |= {name: identity["base"][name] for name in ("path", "form")}  # where it is now
            return run
        if directory.is_dir() and not is_empty(directory):
            raise LolcatsError(f"{directory} is not empty and does not hold a lolcats run: choose another --out.")
        check_directory(directory)
        versions = {"python": platform.python_version(), "lolcats": __version__}
        versions |= {name: version(name) for name in PACKAGES}
        record = {**identity, "date": str(date.today()), "versions": versions, "stages": {}, "results": {}}
        return cls(directory, record)

    @classmethod
    def open(cls, directory: Path) -> Run:
        """The run in ``directory``."""
        try:
            record = json.loads((directory / RECORD).read_text())
            if isinstance(record, dict) and isinstance(record.get("config"), dict):
                record["config"]["trust_remote_code"] = False  # an earlier command's consent is not this one's
            return cls(directory, record)
        except FileNotFoundError:
            raise LolcatsError(f"{directory} does not hold a lolcats run: {RECORD} is missing.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LolcatsError(f"{directory / RECORD} is damaged ({error}).") from None

    @property
    def config(self) -> Config:
        return from_dict(Config, self.record["config"])

    @property
    def base(self) -> Base:
        return Base(**self.record["base"])

    @property
    def results(self) -> dict[str, Any]:
        return dict(self.record["results"])

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Kind and shapes of each attention layer, softmax layers among them, from the adapter's config.json."""
        return list(read_record(self.directory)["layers"])

    @property
    def needs_code(self) -> bool:
        """Whether the adapter only exists with Python code that comes with its base model."""
        return needs_code(json.loads((self.directory / CONFIG).read_text()))

    def stage_done(self, stage: str) -> bool:
        return stage in self.record["stages"]

    def finish_stage(self, stage: str, summary: dict[str, Any]) -> None:
        """Record that ``stage`` is done, after config.json lists the files that it left."""
        if is_first():
            list_parts(self.directory)
        self.record["stages"][stage] = summary
        self.save()

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """Return the result called ``name``; measure it now unless an earlier attempt of this run did."""
        if name not in self.record["results"]:
            self.record["results"][name] = function()
            self.save()
        return self.record["results"][name]

    def save(self) -> None:
        """Write the record, and create the directory if needed. Only the first rank writes."""
        if not is_first():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self.directory / RECORD, json.dumps(self.record, indent=2) + "\n")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How two identities differ, in words; empty if they are the same."""
    unknown = old["base"]["fingerprint"] == UNKNOWN and old["base"]["path"] == new["base"]["path"]
    if old["base"]["fingerprint"] != new["base"]["fingerprint"] and not unknown:
        return f"its base model is {old['base']['path']} ({old['base']['fingerprint']})"
    changed = [
        f"{key if key == section else f'{section}.{key}'} was {before!r} and is now {after!r}"
        for (section, key, before), (_, _, after) in zip(_flat(old["config"]), _flat(new["config"]), strict=False)
        if before != after
    ]
    if changed:
        return ", ".join(changed)
    if old["data"]["fingerprint"] != new["data"]["fingerprint"]:
        return f"its data differs ({old['data']['source']}, {old['data']['fingerprint']})"
    return ""


def _flat(config: dict[str, Any]) -> list[tuple[str, str, Any]]:
    sections = {k: v if isinstance(v, dict) else {k: v} for k, v in config.items()}
    return [(section, key, value) for section, entries in sections.items() for key, value in entries.items()]
