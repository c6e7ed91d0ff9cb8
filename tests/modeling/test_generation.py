"""Our fixed-size cache is used on every default path, and changes nothing."""

from __future__ import annotations

from itertools import pairwise
from threading import Thread

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import GenerationConfig, StaticCache, TextIteratorStreamer, pipeline

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.cache import LinearizedCacheLayer

VARIANTS = [
    AttentionConfig(window_size=8, sinks=2, feature_dim=8),
    AttentionConfig(window_size=8, sinks=0, feature_dim=8, window="sliding", key_maps="per_kv_head"),
    AttentionConfig(kind="linear", feature_dim=8),
    AttentionConfig(kind="linear", feature_map="t2r", decay="retnet", normalizer="group_norm"),
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
        assert layer.state.ring.k.shape[2] == 16
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=lambda a: "-".join(a),
)
@torch.no_grad()
def test_sampling_and_beams_equal_whole_forward_passes(arguments: dict) -> None:
    """Two prompts of different lengths; the same random numbers with our cache (reordered by beams) and without."""
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    arguments = {**GREEDY, **arguments, "attention_mask": mask, "max_new_tokens": 16}
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(model.generate(IDS[:, :20], use_cache=use_cache, **arguments))
    assert torch.equal(*answers)
    assert len(answers[0]) == 2 * arguments.get("num_return_sequences", 1)


@torch.no_grad()
def test_batch_of_prompts_of_different_lengths() -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    lengths = (1, 7, 16, 17, 30)
    prompts = [IDS[0, start : start + length] for start, length in enumerate(lengths)]
    ids = torch.stack([torch.nn.functional.pad(p, (30 - len(p), 0)) for p in prompts])
    mask = torch.arange(30) >= 30 - torch.tensor(lengths)[:, None]
    together = model.generate(ids, attention_mask=mask.long(), max_new_tokens=25, **GREEDY)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=25, **GREEDY)
        assert torch.equal(row[30 - len(prompt) :], alone[0])


def test_streaming(tokenizer) -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    inputs = tokenizer("the cat sat on a mat", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = {**inputs, **GREEDY, "max_new_tokens": 30}
    thread = Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = model.generate(**arguments)[0, inputs["input_ids"].shape[1] :]
    assert len(pieces) > 3
    assert "".join(pieces) == tokenizer.decode(whole)


def test_what_a_fixed_state_cannot_do_is_refused_at_once() -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    assisted = {"assistant_model": tiny_model("llama", seed=1)}, {"prompt_lookup_num_tokens": 3}
    for arguments in (*assisted, {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}):
        with pytest.raises(LolcatsError, match="assisted decoding discards tokens"):
            model.generate(IDS, max_new_tokens=5, **arguments)
    with pytest.raises(LolcatsError, match="cannot use another cache"):
        model.generate(IDS, max_new_tokens=5, cache_implementation="static")
    with pytest.raises(LolcatsError, match=r"^Tokens cannot be removed"):  # and as the assistant of another model
        tiny_model("llama", seed=1).generate(IDS[:1], max_new_tokens=5, assistant_model=model, **GREEDY)


def test_cache_that_a_checkpoint_asks_for_is_ignored() -> None:
    """Gemma 2's generation settings name a cache implementation."""
    model = tiny_model("llama")
    model.generation_config.cache_implementation = "static"
    lolcats.convert(model, VARIANTS[0])
    assert model.generate(IDS, max_new_tokens=5, **GREEDY).shape == (2, 65)


@torch.no_grad()
def test_wrong_caches_are_refused() -> None:
    model = lolcats.convert(tiny_model("llama"), VARIANTS[0])
    with pytest.raises(LolcatsError, match="StaticCache"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=100))
    foreign = tiny_model("llama")(IDS).past_key_values
    with pytest.raises(LolcatsError, match="another model"):
        model(IDS[:, :1], past_key_values=foreign)
    with pytest.raises(LolcatsError, match=r"^Tokens cannot be removed"):
        model(IDS).past_key_values.layers[0].crop(-1)
