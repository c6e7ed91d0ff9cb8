"""The model card, README.md: what the model is, how to load it, and what was measured."""

from __future__ import annotations

import json

from lolcats.config import to_yaml
from lolcats.files import write_text
from lolcats.report.table import attention_of, markdown, memory_rows, perplexity_rows, remarks
from lolcats.run import Run

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [lolcats, linear-attention]
base_model: {base}
---
# {name}, linearized

`{base}` with its softmax attention replaced by {attention}. Made with lolcats
{version} on {date}: constant memory and time per generated token.

```python
import lolcats  # registers the model type
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("DIR"{trust})
```

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
Base weights: {base_fingerprint}. Stages: `{stages}`. Versions: `{versions}`.

```yaml
{config}```
"""


def write_card(run: Run) -> None:
    """Write DIR/README.md from the run's record."""
    record, config, results = run.record, run.config, run.results
    data = record["data"]
    kept = [e["layer"] for e in run.layers if e["kind"] == "softmax"]
    write_text(
        run.directory / "README.md",
        CARD.format(
            base=run.base.path.rsplit("/", 1)[-1] if run.base.form != "hub" else run.base.path,
            trust=", trust_remote_code=True" if run.needs_code else "",
            name=run.base.path.rsplit("/", 1)[-1], attention=attention_of(config.attention),
            version=record["versions"]["lolcats"], date=record["date"], test_rows=data["test_rows"],
            length=config.data.sequence_length, remarks="\n\n".join(remarks(run)),
            perplexity=markdown(("model", "perplexity", "against teacher"), perplexity_rows(run)),
            memory=markdown(("tokens", "teacher", "student"), memory_rows(run)),
            layers=f"Layers {kept} keep softmax attention." if kept else "Every layer is linearized.",
            teacher=json.dumps(results["sample_teacher"], ensure_ascii=False),
            student=json.dumps(results["sample_student"], ensure_ascii=False),
            source=data["source"].rsplit("/", 1)[-1], documents=data["documents"], train_rows=data["train_rows"],
            fingerprint=data["fingerprint"], base_fingerprint=run.base.fingerprint,
            stages=json.dumps(record["stages"]), versions=json.dumps(record["versions"]), config=to_yaml(config),
        ),
    )  # fmt: skip
