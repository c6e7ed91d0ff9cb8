"""The table of docs/families.md: ``python tests/support/table.py`` rewrites it from a tiny model of each family."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.checks import Outcome, outcome

NOT_BUILT = {
    "blt": "reads bytes and patches through four models that must fit each other",
    "dots3_note": "lists its layers by index; its decoder is dots3_note_text",
    "gemma3n": "its vision part needs timm; its decoder is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys it reads",
    "musicgen": "makes audio; AutoModelForCausalLM does not build it from its own configuration",
    "musicgen_melody": "makes audio; AutoModelForCausalLM does not build it from its own configuration",
}
"""Decoder classes for which no tiny model is made, and why."""
WORKS = "**works**"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- families, written by tests/support/table.py -->\n", "<!-- end of families -->"


def model_types() -> list[str]:
    """Every decoder class that transformers lists, by model type."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def render(outcomes: Iterable[Outcome]) -> str:
    """The table in Markdown: one row per kind of outcome."""
    rows: dict[str, list[str]] = {}
    for found in outcomes:
        rows.setdefault(kind(found), []).append(found.model_type)
    for model_type, reason in NOT_BUILT.items():
        rows.setdefault(f"not tried: {reason}", []).append(model_type)
    order = sorted(rows, key=lambda text: (not text.startswith(WORKS), text.startswith("not tried"), -len(rows[text])))
    lines = [f"| transformers {transformers.__version__} | model types |", "|---|---|"]
    return "\n".join([*lines, *(f"| {text} ({len(rows[text])}) | {', '.join(rows[text])} |" for text in order)]) + "\n"


def kind(found: Outcome) -> str:
    """The table's text for an outcome."""
    if found.refused:
        reason = re.sub(r"^(Layer \d+ of )?\w+ ", "", found.refused.rstrip("."))
        reason = re.sub(r" \(\d+ and \d+\)|, so its? .*$| Families such as .*$|, a keyword .*$", "", reason).rstrip(".")
        return f"refused: {reason}"
    notes = {
        "layers that slide or attend in chunks stay as they are": found.kept,
        "so do recurrent and convolutional layers": found.kept and found.recurrent,
        "recurrent and convolutional layers stay as they are": found.recurrent and not found.kept,
        "its own cache is not exact": found.own_cache,
        "no padding on the left, as in the base model": found.own_padding,
    }
    return "; ".join([WORKS, *(note for note, holds in notes.items() if holds)])


def written() -> str:
    """The table that the page has."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table = render(outcome(t) for t in model_types() if t not in NOT_BUILT)
    PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
