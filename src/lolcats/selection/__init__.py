"""Which heads stay softmax attention: chosen together, without training, by what recall prompts need."""

from lolcats.selection.result import Point, Selection, other_window, with_heads, with_selection
from lolcats.selection.select import Settings, heads_in_budget, select

__all__ = [
    "Point", "Selection", "Settings", "heads_in_budget", "other_window", "select", "with_heads", "with_selection",
]  # fmt: skip
