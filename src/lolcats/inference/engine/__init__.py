"""Continuous batching over states of fixed size."""

from lolcats.inference.engine.engine import Engine
from lolcats.inference.engine.model import check_model
from lolcats.inference.engine.request import Delta, Request
from lolcats.inference.engine.sampling import SamplingParams, TokenLogprob
from lolcats.inference.engine.states import Snapshot

__all__ = ["Delta", "Engine", "Request", "SamplingParams", "Snapshot", "TokenLogprob", "check_model"]
