"""What must hold for a linearized model of any family, and what is known about every decoder class."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lolcats
from lolcats.attention import AttentionSpec
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.probe import probe
from support.tiny import tiny

IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(IDS)
PADDING[1, :13] = 0
HYBRID = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
TOLERANCE = 1e-4
NOTABLE = 1e-3  # an error of the base model's own that docs/families.md mentions


def forward(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def converted(model: PreTrainedModel, config: AttentionConfig = HYBRID) -> Any:
    """A linearized copy; the same feature maps each time."""
    torch.manual_seed(1)
    return lolcats.convert(copy.deepcopy(model), config)


@torch.no_grad()
def check_teacher(model: PreTrainedModel) -> None:
    """With all layers softmax, and with the teacher switched on, logits equal the original's exactly."""
    expected = forward(model)
    assert torch.equal(forward(converted(model, AttentionConfig(kind="softmax"))), expected)
    student = converted(model)
    with lolcats.override(student, mode="teacher"):
        assert torch.equal(forward(student), expected)
    assert (forward(student) - expected).abs().max() > 1e-3


@torch.no_grad()
def check_kept(model: PreTrainedModel) -> None:
    """If not all layers can be linearized, keeping them all as softmax changes nothing, or is refused too."""
    try:
        logits = forward(converted(model, AttentionConfig(kind="softmax")))
    except LolcatsError:
        return
    assert torch.equal(logits, forward(model))


@torch.no_grad()
def check_window(model: PreTrainedModel) -> None:
    """A window as wide as the base model's is the base model: masks, scales, caps and positions are the family's."""
    student = converted(model, AttentionConfig(kind="window", sinks=0))
    slides = {layer.geometry.layer: layer.sliding_window for layer in probe(model)}
    for layer in linearized_layers(student):
        layer.spec = AttentionSpec("window", "sliding", slides[layer.geometry.layer] or IDS.shape[1], 0)
    torch.testing.assert_close(forward(student), forward(model), atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def check_cache(student: PreTrainedModel) -> None:
    """A call without a cache argument gets states of fixed size for linearized layers."""
    cache = getattr(student(IDS), "past_key_values", None)  # RecurrentGemma returns none
    for layer in linearized_layers(student) if cache is not None else ():
        state = cache.layers[layer.geometry.layer].state
        assert state.seen.rows.tolist() == [IDS.shape[1]] * len(IDS)
        assert state.ring.k.shape[2] == layer.spec.span


@torch.no_grad()
def decode_error(model: PreTrainedModel, *cuts: int) -> float:
    """Largest difference of logits between a whole forward pass and prefill in pieces up to ``cuts``, then decoding."""
    cache, outputs = DynamicCache(config=model.config.get_text_config(decoder=True)), []
    for start, stop in pairwise([0, *cuts, *range(cuts[-1] + 1, IDS.shape[1] + 1)]):
        outputs.append(model(IDS[:, start:stop], past_key_values=cache, use_cache=True).logits)
    return (torch.cat(outputs, 1) - forward(model)).abs().max().item()


@torch.no_grad()
def padding_error(model: PreTrainedModel, **positions: Tensor) -> float:
    """Largest difference of logits between a row with padding on the left, in a batch, and the row alone."""
    together = model(IDS, attention_mask=PADDING, use_cache=False, **positions).logits
    return (together[1, 13:] - model(IDS[1:, 13:], use_cache=False).logits[0]).abs().max().item()


@torch.no_grad()
def generated_alike(model: PreTrainedModel) -> bool:
    """Whether greedy answers to a padded batch equal those to its rows separately."""
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, mask = IDS[:, :20], PADDING[:, :20]
    together = model.generate(prompt, attention_mask=mask, **greedy)
    alone = model.generate(prompt[1:, 13:], attention_mask=mask[1:, 13:], **greedy)
    return torch.equal(together[1, 13:], alone[0])


@dataclass(frozen=True)
class Outcome:
    """What is known about a decoder class. ``refused``: why it cannot be linearized; empty if all checks passed."""

    model_type: str
    refused: str = ""
    kept: bool = False
    """Attention layers that slide (or attend in chunks) stay as they are."""
    recurrent: bool = False
    """It has other layers than attention."""
    own_cache: bool = False
    """The base model's own cache changes its logits; ours must not add to that."""
    own_padding: bool = False
    """The base model itself gives a left-padded row other logits (its positions count the padding)."""


@functools.cache
def outcome(model_type: str) -> Outcome:
    """Linearize a tiny model of the class and assert everything above, or return why it is refused."""
    model = tiny(model_type)
    with torch.no_grad():
        forward(model)
    try:
        student = converted(model)
    except LolcatsError as error:
        check_kept(model)
        return Outcome(model_type, str(error))
    check_teacher(model)
    check_window(model)
    check_cache(student)
    positions = {"position_ids": (PADDING.cumsum(1) - 1).clamp_min(0)}
    own_decode, own_padding = decode_error(model, 21), padding_error(model, **positions)
    assert decode_error(student, 21) < max(TOLERANCE, 2 * own_decode)
    assert decode_error(student, 19, 22) < max(TOLERANCE, 2 * decode_error(model, 19, 22))
    assert padding_error(student) < max(TOLERANCE, 2 * own_padding)
    if own_padding < TOLERANCE:
        assert generated_alike(student)
    kinds = [entry["kind"] for entry in student.config.lolcats["layers"]]
    layers = student.config.get_text_config(decoder=True).num_hidden_layers
    return Outcome(model_type, "", "softmax" in kinds, len(kinds) < layers, own_decode > NOTABLE, own_padding > NOTABLE)
