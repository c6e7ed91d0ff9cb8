"""Some key/value heads of a layer stay exact softmax attention; the others are linearized."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lolcats
from lolcats.attention import parallel_attention
from lolcats.attention.reference import expand_heads, softmax_weights
from lolcats.config import AttentionConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation.memory import cache_bytes
from lolcats.modeling.cache import SplitCacheLayer
from lolcats.modeling.interface import attention_function
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.masks import MaskRequest
from lolcats.modeling.observe import watch_layers
from lolcats.pipeline import linearize

KEPT = {"0": [1], "1": [0, 2]}
IDS = torch.randint(6, 300, (2, 60), generator=torch.Generator().manual_seed(0))


def base_of(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, num_attention_heads=8, num_key_value_heads=4, hidden_size=64, **changes).eval()


def converted(base: Any, kept: dict[str, list[int]] = KEPT, **changes: Any) -> Any:
    config = AttentionConfig(window_size=8, sinks=2, feature_dim=8, softmax_heads=kept, **changes)
    return lolcats.convert(copy.deepcopy(base), config).eval()


@torch.no_grad()
def test_all_heads_kept_is_the_base_model() -> None:
    base = base_of()
    model = converted(base, {"0": [0, 1, 2, 3], "1": [3, 2, 1, 0]})
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not linearized_layers(model)


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["rotated", "unrotated"])
def test_each_head_is_what_the_reference_says(inputs: Any) -> None:
    """Outputs of the attention function in the first layer, head by head."""
    base = base_of()
    model, plain = converted(base, feature_inputs=inputs), converted(base, {}, feature_inputs=inputs)
    layer, seen = linearized_layers(model)[0], []

    def recording(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        y = attention_function(module, q, k, v, mask, **kwargs)
        seen.append((q, k, v, kwargs["scaling"], y[0]))
        return y

    ALL_ATTENTION_FUNCTIONS.register("lolcats", recording)
    try:
        model(IDS, use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("lolcats", attention_function)
    q, k, v, scale, y = seen[0]
    exact = softmax_weights(q, k, scale) @ expand_heads(v, q.shape[1])
    kept, others = [2, 3], [0, 1, 4, 5, 6, 7]  # query heads of key/value head 1, and the others
    torch.testing.assert_close(y[:, :, kept].transpose(1, 2), exact[:, kept], atol=2e-5, rtol=1e-4)
    call: AttentionCall = watch_layers(plain, IDS, lambda _, call: call)[0]
    own_q, own_k, own_v = call.q[:, others], call.k[:, [0, 2, 3]], call.v[:, [0, 2, 3]]
    heads = 3 if layer.maps == 3 else 6
    features = layer.phi_q(own_q), layer.phi_k(own_k)
    assert features[1].shape[1] == heads
    rotated = layer.spec.rotated
    expected = parallel_attention(rotated(own_q), rotated(own_k), own_v, *features, layer.gamma, layer.spec, scale)
    torch.testing.assert_close(y[:, :, others].transpose(1, 2), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_prefill_in_pieces_and_decode_equal_one_pass(family: str, window: Any) -> None:
    base = base_of(family)
    kinds = getattr(base.config, "layer_types", None) or ["full_attention"] * 2
    kept = {str(i): [1, 2] for i, kind in enumerate(kinds) if kind == "full_attention"}
    model = converted(base, kept, window=window)
    whole, cache, parts = model(IDS, use_cache=False).logits, None, []
    for start, stop in ((0, 21), (21, 40), *((n, n + 1) for n in range(40, 60))):
        out = model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    layer = cache.layers[linearized_layers(model)[0].geometry.layer]
    assert isinstance(layer, SplitCacheLayer)
    assert layer.kept.keys.shape[1:3] == (2, 60)
    assert layer.state.ring.k.shape[1] == 2


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model, mask = converted(base_of()), torch.zeros_like(IDS)
    real = slice(13, None) if side == "left" else slice(0, 47)
    mask[0, real] = mask[1] = 1
    padded = model(IDS, attention_mask=mask).logits[0, real]
    torch.testing.assert_close(padded, model(IDS[:1, real]).logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_documents_are_apart() -> None:
    model = converted(base_of())
    positions = torch.cat([torch.arange(25), torch.arange(35)]).expand(2, -1)
    packed = model(IDS, position_ids=positions).logits
    for part in (slice(0, 25), slice(25, None)):
        torch.testing.assert_close(packed[:, part], model(IDS[:, part]).logits, atol=2e-5, rtol=1e-4)


def test_packed_documents_need_no_mask_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that keeps documents apart has T × T entries and rules out SDPA's fast kernels."""
    model = converted(base_of())
    lengths, ids = (7, 25, 3, 25), torch.cat([IDS, IDS.flip(0)])
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(4, -1)

    def gradients(*rows: tuple[Tensor, Tensor | None]) -> list[Tensor]:
        model.zero_grad()
        for part, places in rows:
            model(part, use_cache=False, **({} if places is None else {"position_ids": places})).logits.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone = gradients(*((part, None) for part in ids.split(lengths, 1)))
    monkeypatch.setattr(MaskRequest, "build", lambda *_: pytest.fail("a mask was built"))
    packed = gradients((ids, positions))
    assert len(alone) == len(packed)
    for a, b in zip(alone, packed, strict=True):
        torch.testing.assert_close(b, a, atol=2e-4 * a.abs().max().item(), rtol=1e-3)


@torch.no_grad()
def test_beams_reorder_the_kept_keys() -> None:
    model = converted(base_of())
    asked: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    prompt = IDS[:, :20], torch.ones_like(IDS[:, :20])
    cached, plain = (model.generate(prompt[0], attention_mask=prompt[1], use_cache=c, **asked) for c in (True, False))
    assert torch.equal(cached, plain)


def test_teacher_is_the_base_model_and_stage_1_sees_the_other_heads() -> None:
    base = base_of()
    model = converted(base)
    with torch.no_grad(), lolcats.override(model, mode="teacher"):
        assert torch.equal(model(IDS).logits, base(IDS).logits)

    def shapes(layer: LinearizedAttention, call: AttentionCall) -> tuple[int, ...]:
        return call.q.shape[1], call.k.shape[1], call.target.shape[2], layer.phi_q.weight.shape[0], len(layer.gate)

    assert watch_layers(model, IDS, shapes) == [(6, 3, 6, 6, 6), (4, 2, 4, 4, 4)]


def test_gradients_reach_kept_and_linearized_heads() -> None:
    model = converted(base_of()).train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    for block in model.model.layers:
        heads = block.self_attn.k_proj.weight.grad.unflatten(0, (4, -1))
        assert heads.abs().sum((1, 2)).gt(0).all()


def test_memory_counts_kept_heads() -> None:
    base, head = base_of(), 2 * 8 * 4  # bytes of a token's key and value of 8 channels, in fp32
    model = converted(base)
    (teacher, student), (_, later) = cache_bytes(model, 1000), cache_bytes(model, 3000)
    assert teacher == 1000 * 8 * head
    assert later - student == 2000 * 3 * head
    assert cache_bytes(converted(base, {}), 3000)[1] == cache_bytes(converted(base, {}), 1000)[1]


@pytest.mark.parametrize(
    ("kept", "reason"),
    [({"7": [0]}, "no attention layer 7"), ({"0": [4]}, "no key/value head 4"), ({"0": [-1]}, "no key/value head -1")],
)
def test_what_the_model_does_not_have_is_refused(kept: dict[str, list[int]], reason: str) -> None:
    with pytest.raises(LolcatsError, match=reason):
        converted(base_of(), kept)


@pytest.mark.parametrize("order", ["joint", "stream"])
def test_a_run(order: str, model_dirs: dict[str, Path], chat_file: Path, settings: list[str], tmp_path: Path) -> None:
    """Trained, measured, saved as adapter and merged model, loaded again; other heads are another run."""
    more = ["transfer.order=stream", "transfer.coupling=per_layer"] if order == "stream" else []
    source = str(model_dirs["llama"]), str(chat_file), tmp_path / "out"

    def run(kept: str) -> Any:
        config = load_config("paper-sinks", [*settings, f"attention.softmax_heads={kept}", *more])
        return linearize(*source, config, say=lambda _: None)

    results = run("{0: [1]}").results
    record = json.loads((tmp_path / "out" / "config.json").read_text())["lolcats"]["layers"]
    assert record[0]["softmax_heads"] == [1]
    assert "softmax_heads" not in record[1]
    adapter, merged = lolcats.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    with torch.no_grad():
        assert torch.equal(adapter(IDS).logits, merged(IDS).logits)
    for values in (results["layers"]["errors"], results["attention"]["lengths"], results["gamma"]):
        assert values[0][2:] == [None, None]
        assert None not in [*values[0][:2], *values[1]]
    with pytest.raises(LolcatsError, match=r"softmax_heads"):
        run("{0: [0]}")
