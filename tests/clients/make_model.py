"""A tiny linearized model with a tokenizer, in DIR: run by the project's own Python, not by that of the clients."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import tiny_model
from conftest import tokenizer as tokenizer_fixture

import lolcats
from lolcats.config import AttentionConfig


def main(directory: Path) -> None:
    model = lolcats.convert(tiny_model(), AttentionConfig(window_size=8, sinks=2, feature_dim=8))
    model.save_pretrained(directory)
    tokenizer_fixture.__wrapped__().save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
