"""Inputs of runs: a base model, its tokenizer and tokenized data, read once and shared by any number of runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lolcats.config import DataConfig
from lolcats.data.rows import Corpus, Data, split, tokenize_source
from lolcats.data.store import tokenizer_hash
from lolcats.errors import LolcatsError
from lolcats.modeling.parts import CONFIG, RUN
from lolcats.modeling.record import is_linearized
from lolcats.weights.base import Base, Quantize, find_base, load_model, load_tokenizer, saved_tokenizer

COPIES = 16  # keep a model on a GPU if more than this many copies fit there


class Inputs:
    """A base model, its tokenizer and its data.

    Args:
        keep: keep the loaded model in memory, on a GPU if it is small for that, and give every run a copy.
        trust: run Python code that comes with the model.
    """

    def __init__(self, model: str | Base, keep: bool = False, trust: bool = False) -> None:
        self.base, self.keep, self.trust = find_base(model, trust) if isinstance(model, str) else model, keep, trust
        if isinstance(model, str) and is_linearized(model):
            raise LolcatsError(f"{model} is linearized already: pass its base model instead.")
        self._models: dict[torch.dtype, PreTrainedModel] = {}
        self._documents: dict[tuple[str, DataConfig], Corpus] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base, self.trust)

    def of_run(self, directory: Path) -> Inputs:
        """These inputs with the tokenizer of the run in ``directory``, if the base model's is now read otherwise, by
        another version of lolcats or transformers."""
        if not has_tokenizer(directory):
            return self
        saved = saved_tokenizer(directory, self.trust)
        if tokenizer_hash(saved) == tokenizer_hash(self.tokenizer):
            return self
        inputs = copy.copy(self)
        inputs.tokenizer, inputs._documents = saved, {}
        return inputs

    def data(self, source: str, config: DataConfig, seed: int) -> Data:
        """The splits of ``source``. A new seed, row length or split size does not read or tokenize it again."""
        return split(self.documents(source, config), config, seed)

    def documents(self, source: str, config: DataConfig) -> Corpus:
        """The documents of ``source``, tokenized once."""
        reading = replace(
            config, sequence_length=2, validation_rows=1, test_rows=1, reset_at_documents=False,
            keep_longest_effective=1.0,
        )  # fmt: skip
        if (source, reading) not in self._documents:
            self._documents[source, reading] = tokenize_source(source, self.tokenizer, config)
        return self._documents[source, reading]

    def model(self, dtype: torch.dtype, device: torch.device, quantize: Quantize = "none") -> PreTrainedModel:
        """The unchanged base model, for the caller to modify. One in 4 bits is not kept."""
        if not self.keep or quantize != "none":
            return load_model(self.base, dtype, device, self.trust, quantize)
        if dtype not in self._models:
            model = load_model(self.base, dtype, trust=self.trust)
            self._models[dtype] = model.to(device) if _has_room(device, model) else model
        return copy.deepcopy(self._models[dtype]).to(device)


def has_tokenizer(directory: Path) -> bool:
    """Whether the run in ``directory`` has saved its tokenizer; config.json is written after it."""
    return all((directory / name).is_file() for name in (RUN, CONFIG, "tokenizer_config.json", "tokenizer.json"))


def _has_room(device: torch.device, model: PreTrainedModel) -> bool:
    """Whether an idle copy would take only little of a GPU's memory."""
    size = sum(p.nbytes for p in model.parameters())
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > COPIES * size
