"""The old place of lolcats.inference.engine.sampling; kept for one release."""

from lolcats.inference.engine.sampling import SamplingParams, TokenLogprob

__all__ = ["SamplingParams", "TokenLogprob"]
