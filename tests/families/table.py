"""The README's table of families: ``python tests/families/table.py`` linearizes a tiny model of each and writes it."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from checks import Outcome, outcome
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NOT_BUILT = {
    "blt": "its four parts have to fit each other; attends to bytes and patches",
    "dots3_note": "lists its layers by index; its decoder is dots3_note_text",
    "gemma3n": "its vision part needs timm; its decoder is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys it reads",
    "musicgen": "AutoModelForCausalLM cannot build it from its own configuration; makes audio",
    "musicgen_melody": "AutoModelForCausalLM cannot build it from its own configuration; makes audio",
}
"""Classes of which no tiny model is built, and why."""


def model_types() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
