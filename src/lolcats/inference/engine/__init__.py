"""Continuous batching over states of fixed size."""

from lolcats.inference.engine.answers import Answered, answer_all
from lolcats.inference.engine.engine import Engine
from lolcats.inference.engine.model import check_model
from lolcats.inference.engine.request import Delta, Request
from lolcats.inference.engine.sampling import SamplingParams, TokenLogprob
from lolcats.inference.engine.states import Snapshot

__all__ = [
    "Answered", "Delta", "Engine", "Request", "SamplingParams", "Snapshot", "TokenLogprob", "answer_all", "check_model",
]  # fmt: skip
