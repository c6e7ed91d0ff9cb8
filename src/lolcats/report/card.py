"""The model card, README.md: what the model is, how to load it, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lolcats.config import AttentionConfig, to_yaml
from lolcats.evaluation.memory import cache_bytes, readable
from lolcats.files import write_text
from lolcats.report.curve import HEADER, curve_rows, curve_title, run_selection
from lolcats.report.table import attention_of, has_lora, loss_of, markdown, memory_rows, model_table, remarks
from lolcats.run import Run
from lolcats.selection import Selection
from lolcats.version import __version__
from lolcats.weights.base import Base

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
base_model: {base}
---
"""
LOADING = """```python
import lolcats  # registers the model type
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("DIR"{trust})
```
"""
CARD = (
    FRONT
    + """# {name}, linearized

`{base}` with its softmax attention replaced by {attention}. Made with lolcats
{version} on {date}. {growth}

"""
    + LOADING
    + """
## Perplexity on {test_rows} held-out rows of {length} tokens
{perplexity}

{remarks}

## Bytes of state per sequence
{memory}

{layers}

## One prompt, greedy
- teacher: {teacher}
- student: {student}

## Provenance
Data: `{source}`, {documents} documents, {train_rows} training rows; fingerprint {fingerprint}.
{trained}Base weights: {base_fingerprint}. Stages: `{stages}`. Versions: `{versions}`.

```yaml
{config}```
"""
)


def write_card(run: Run) -> None:
    """Write DIR/README.md from the run's record."""
    record, config, results = run.record, run.config, run.results
    data = record["data"]
    curve = curve_of(run_selection(run.directory))
    write_text(
        run.directory / "README.md",
        CARD.format(
            base=run.base.path.rsplit("/", 1)[-1] if run.base.form != "hub" else run.base.path,
            trust=CONSENT if run.needs_code else "",
            name=run.base.path.rsplit("/", 1)[-1], attention=attention_of(config.attention),
            version=record["versions"]["lolcats"], date=record["date"], test_rows=data["test_rows"],
            tags=_tags(config.attention), growth=_growth(run),
            length=config.data.sequence_length, remarks="\n\n".join(remarks(run)),
            perplexity=markdown(*model_table(run)),
            memory=markdown(("tokens", "teacher", "student"), memory_rows(run)),
            layers="\n\n".join(filter(None, (_what_stays(run.layers), curve))),
            teacher=json.dumps(results["sample_teacher"], ensure_ascii=False),
            student=json.dumps(results["sample_student"], ensure_ascii=False),
            source=data["source"].rsplit("/", 1)[-1], documents=data["documents"], train_rows=data["train_rows"],
            fingerprint=data["fingerprint"], base_fingerprint=run.base.fingerprint,
            trained=_trained(run),
            stages=json.dumps(record["stages"]), versions=json.dumps(record["versions"]), config=to_yaml(config),
        ),
    )  # fmt: skip


def _tags(attention: AttentionConfig) -> str:
    return "lolcats, linear-attention" if attention.has_linear else "lolcats"


def _growth(run: Run) -> str:
    """What memory and time of a generated token depend on, by the longest texts that were counted."""
    sizes = [student for _, student in run.results.get("cache_bytes", {}).values()]
    if len(set(sizes[-2:])) > 1:
        return "Memory and time per generated token grow with the text only in the heads that keep softmax attention."
    return "Memory and time per generated token are constant."


def _trained(run: Run) -> str:
    """A line on what stage 2 has trained."""
    if "steps" not in run.record["stages"].get("finetune", {}):
        return ""
    what = "LoRA was trained" if has_lora(run) else "In stage 2, only feature maps were trained,"
    return f"{what} on {loss_of(run.config)}.\n"


def _what_stays(layers: list[dict[str, Any]]) -> str:
    """Which layers and heads keep softmax attention, in words."""
    whole = [entry["layer"] for entry in layers if entry["kind"] == "softmax"]
    heads = {entry["layer"]: entry["softmax_heads"] for entry in layers if entry.get("softmax_heads")}
    told = [f"Layers {whole} keep softmax attention."] if whole else []
    told += [f"Key/value heads that keep softmax attention, by layer: {heads}."] if heads else []
    return " ".join(told) or "Every layer is linearized."


UNTRAINED = (
    FRONT
    + """# {name} with {kept} of {heads} key/value heads kept

`{base}`, in which {kept} key/value heads stay softmax attention and all others are replaced by {attention}. Nothing was
trained. Made with lolcats {version}.

"""
    + LOADING
    + """
{curve}

## Bytes of state per sequence
{memory}

Kept heads by layer: `{selected}`. Base weights: {fingerprint}.
"""
)
TOKENS = (1024, 8192, 65536)
CONSENT = ", trust_remote_code=True"  # for a base model that comes with code of its own


def write_untrained_card(
    directory: Path, model: Any, base: Base, attention: AttentionConfig, selection: Selection | None
) -> None:
    """Write DIR/README.md of a model that nothing was trained for."""
    layers = model.config.lolcats["layers"]
    heads = sum(entry["kv_heads"] for entry in layers)
    kept = {e["layer"]: e.get("softmax_heads") or list(range(e["kv_heads"])) for e in layers
            if e.get("softmax_heads") or e["kind"] == "softmax"}  # fmt: skip
    sizes = [(n, *cache_bytes(model, n)) for n in TOKENS]
    name = base.path.rsplit("/", 1)[-1]
    table = [(f"{n:,}", readable(teacher), readable(own)) for n, teacher, own in sizes]
    write_text(
        directory / "README.md",
        UNTRAINED.format(
            base=base.path if base.form == "hub" else name, trust=CONSENT if model.config.own_model else "",
            name=name, kept=sum(map(len, kept.values())), heads=heads,
            attention=attention_of(attention), version=__version__, curve=curve_of(selection), tags=_tags(attention),
            memory=markdown(("tokens", "teacher", "this model"), table), selected=json.dumps(kept),
            fingerprint=base.fingerprint,
        ),
    )  # fmt: skip


def curve_of(selection: Selection | None) -> str:
    """A selection's section of the card, if there is one."""
    if selection is None:
        return ""
    note = (
        "Right answers are those of prompts of the kinds that the heads were chosen on, with other words and numbers; "
        "`lolcats evaluate DIR --tasks recall` asks in other ways."
    )
    return f"## {curve_title(selection)}\n{markdown(HEADER, curve_rows(selection))}\n\n{note}"
