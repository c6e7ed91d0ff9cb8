"""Our fixed-size cache is used on every default path, and changes nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import StaticCache, pipeline

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.interface import LinearizedCacheLayer

VARIANTS = [
    AttentionConfig(window_size=8, sinks=2, feature_dim=8),
    AttentionConfig(window_size=8, sinks=0, feature_dim=8, window="sliding", key_maps="per_kv_head"),
    AttentionConfig(kind="linear", feature_dim=8),
    AttentionConfig(window_size=8, sinks=2, feature_dim=8, layers={"1": "softmax"}),
]
IDS = torch.randint(6, 300, (2, 60), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def uncached_greedy(model, ids, steps, mask=None):
    """Greedy decoding by whole forward passes."""
    for _ in range(steps):
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_and_decode_equal_full_forward(family: str, config: AttentionConfig) -> None:
    model = lolcats.convert(tiny_model(family), config)
    full = model(IDS, use_cache=False).logits
    for cuts in ([0, 60], [0, 21, 60], [0, 5, *range(6, 61)]):
        cache, outputs = None, []
        for start, stop in pairwise(cuts):
            out = model(IDS[:, start:stop], past_key_values=cache)
            cache = out.past_key_values
            outputs.append(out.logits)
        torch.testing.assert_close(torch.cat(outputs, 1), full, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == 60


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_uses_our_cache(family: str) -> None:
    model = lolcats.convert(tiny_model(family), VARIANTS[0])
    out = model.generate(IDS[:, :20], max_new_tokens=40, return_dict_in_generate=True, **GREEDY)
    linearized = [e["layer"] for e in model.config.lolcats["layers"] if e["kind"] != "softmax"]
    assert linearized
    for index in linearized:
        layer = out.past_key_values.layers[index]
        assert isinstance(layer, LinearizedCacheLayer)
        assert layer.state.ring_k.shape[2] == 16
    assert torch.equal(out.sequences, uncached_greedy(model, IDS[:, :20], 40))


@torch.no_grad()
def test_forward_and_pipeline_use_our_cache(tokenizer) -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    assert all(isinstance(layer, LinearizedCacheLayer) for layer in model(IDS).past_key_values.layers)
    assert all(isinstance(layer, LinearizedCacheLayer) for layer in model.model(IDS).past_key_values.layers)
    seen = []
    model.model.register_forward_hook(lambda module, args, out: seen.append(out.past_key_values))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipe("the cat sat on a mat and saw", max_new_tokens=30, do_sample=False)[0]["generated_text"]
    assert text.startswith("the cat")
    assert seen
    assert all(isinstance(layer, LinearizedCacheLayer) for cache in seen for layer in cache.layers)


@pytest.mark.parametrize("config", VARIANTS)
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(config: AttentionConfig) -> None:
    model = lolcats.convert(tiny_model("llama"), config)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :13] = 0
    together = model.generate(IDS[:, :30], attention_mask=mask, max_new_tokens=40, **GREEDY)
    for row, start in ((0, 0), (1, 13)):
        alone = model.generate(IDS[row : row + 1, start:30], max_new_tokens=40, **GREEDY)
        assert torch.equal(together[row, start:], alone[0])
    logits = model(IDS[:, :30], attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[1:, 13:], model(IDS[1:, 13:30], use_cache=False).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_beam_search_and_return_sequences() -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    beams = model.generate(IDS[:, :20], max_new_tokens=12, num_beams=3, **GREEDY)
    assert torch.equal(beams, model.generate(IDS[:, :20], max_new_tokens=12, num_beams=3, use_cache=False, **GREEDY))
    torch.manual_seed(0)
    many = model.generate(IDS[:, :20], max_new_tokens=5, do_sample=True, num_return_sequences=3, pad_token_id=0)
    assert many.shape[0] == 6


@torch.no_grad()
def test_wrong_caches_are_refused() -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    with pytest.raises(LolcatsError, match="StaticCache"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=100))
    foreign = tiny_model("llama")(IDS).past_key_values
    with pytest.raises(LolcatsError, match="another model"):
        model(IDS[:, :1], past_key_values=foreign)
    with pytest.raises(LolcatsError, match="cannot be taken back"):
        model(IDS).past_key_values.layers[0].crop(-1)
