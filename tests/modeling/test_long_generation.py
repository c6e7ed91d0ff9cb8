"""100,000 generated tokens: memory stays flat, and the state does not drift from a recomputation in fp64."""

from __future__ import annotations

import copy
from typing import Any

import psutil
import pytest
import torch
from support.scripts import script
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.generation import LogitsProcessor, LogitsProcessorList

import lolcats
from lolcats.attention import FeatureMap
from lolcats.config import AttentionConfig

TOKENS = 100_000
CONFIG = AttentionConfig(window_size=8, sinks=2, feature_dim=8)


class Watch(LogitsProcessor):
    """Record the process's memory every 10,000 tokens."""

    def __init__(self) -> None:
        self.resident: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 10_000 == 0:
            self.resident.append(psutil.Process().memory_info().rss)
        return scores


def one_layer() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=TOKENS + 8, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 if "wte" in name or "lm_head" in name else 0.5)
    return model


@torch.no_grad()
def queries_keys_values(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, H, T, D) of the only layer, which do not depend on its attention, in fp64."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", lambda **_: None)
    model = copy.deepcopy(model).double()
    model.config._attn_implementation = "recorded"
    model.transformer(ids, use_cache=False)
    return seen[0]


def features(phi: FeatureMap, x: Tensor) -> Tensor:
    """Hedgehog's, in fp64."""
    y = x @ phi.weight.double()
    return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1).clamp_min(1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_flat_memory_and_no_drift() -> None:
    base = one_layer()
    model, watch = lolcats.convert(copy.deepcopy(base), CONFIG), Watch()
    out = model.generate(
        torch.tensor([[5]]), max_new_tokens=TOKENS, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, logits_processor=LogitsProcessorList([watch]),
    )  # fmt: skip
    assert out.sequences.shape[1] == TOKENS + 1
    assert len(out.sequences.unique()) > 100  # no loop of a few tokens
    state, layer = out.past_key_values.layers[0].state, model.transformer.h[0].attn.lolcats
    assert state.nbytes == layer.empty_state(*state.ring).nbytes
    assert max(watch.resident[1:]) - watch.resident[1] < 8 << 20  # a softmax cache would have grown by 46 MB

    q, k, v = queries_keys_values(base, out.sequences)
    last = TOKENS  # position of the last token, which `generate` has not fed: its output is compared
    first = layer.spec.window_start(last - 1)
    fk = features(layer.phi_k, k[:, :, CONFIG.sinks : first])
    S, z = fk.mT @ v[:, :, CONFIG.sinks : first], fk.sum(2)
    assert error(state.sums.S, S) < 1e-5
    assert error(state.sums.z, z) < 1e-5

    y, _ = layer.advance(state, *(x[:, :, last:].float() for x in (q, k, v)), scale=16**-0.5)
    first = layer.spec.window_start(last)
    fk = features(layer.phi_k, k[:, :, CONFIG.sinks : first])
    soft = [*range(CONFIG.sinks), *range(first, last + 1)]
    logits = (q[:, :, last:] @ k[:, :, soft].mT) * 16**-0.5
    e = layer.gamma.double()[:, None, None] * torch.exp(logits - logits.amax(-1, keepdim=True))
    fq = features(layer.phi_q, q[:, :, last:])
    numerator = e @ v[:, :, soft] + fq @ (fk.mT @ v[:, :, CONFIG.sinks : first])
    expected = numerator / (e.sum(-1, keepdim=True) + fq @ fk.sum(2)[..., None])
    assert error(y, expected) < 1e-4


def error(actual: Tensor, expected: Tensor) -> float:
    found = ((actual.double() - expected).norm() / expected.norm()).item()
    print(f"relative error {found:.2e}")
    return found


def test_the_state_is_kept_in_a_format_that_can_hold_it() -> None:
    """benchmarks/state_precision.py, whose table is in docs/state_precision.md, on 5,000 tokens."""
    errors = {name: max(found) for _, name, *found in script("state_precision").measure([5_000])}
    assert errors["fp32"] < 1e-6 < 1e-4 < errors["fp16"] < errors["bf16"]
