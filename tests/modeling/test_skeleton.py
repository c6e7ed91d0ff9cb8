"""Layers without their model: the same numbers as in it, for every family, from every source of weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import COMMON, FAMILIES, tiny_model
from support.tiny import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling import skeleton as skeleton_module
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.modeling.layer import override
from lolcats.modeling.skeleton import Skeleton, build_skeleton, convert_empty, empty_model
from lolcats.weights.base import find_base
from lolcats.weights.shards import Loaded, Shards

CPU = torch.device("cpu")
SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
IDS = torch.randint(6, 300, (2, 24), generator=torch.Generator().manual_seed(0))
THREE: dict[str, Any] = {**COMMON, "vocab_size": 320, "num_hidden_layers": 3}
MOE = {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
OTHERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**THREE),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=3, ffn_dim=48, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**THREE, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**THREE),
    "cohere2": lambda: transformers.Cohere2Config(**THREE),
    "granite": lambda: transformers.GraniteConfig(**THREE, embedding_multiplier=3.0, residual_multiplier=0.5),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**THREE, **MOE),
    "lfm2": lambda: transformers.Lfm2Config(**THREE, layer_types=["conv", "full_attention", "full_attention"]),
}  # fmt: skip


def model_of(family: str) -> Any:
    if family in FAMILIES:
        return tiny_model(family)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHERS[family](), dtype=torch.float32).eval()


def skeleton_of(model: Any, source: Any = None) -> Skeleton:
    source = source or Loaded({name: p.detach() for name, p in model.named_parameters()})
    empty = empty_model(copy.deepcopy(model.config), torch.float32)
    return Skeleton(convert_empty(empty, SMALL), source, CPU)


def outputs_of(layers: Any, run: Callable[[], Any]) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_layers_one_by_one_are_the_model(family: str) -> None:
    model = model_of(family)
    skeleton = skeleton_of(model)
    expected = outputs_of(model.get_submodule(skeleton.path), lambda: model(IDS))
    skeleton.prepare([2], 24)
    with skeleton.brought([-1]):
        hidden = skeleton.embed(IDS)
    with override(skeleton.model, mode="teacher"):
        for index, output in enumerate(expected):
            with skeleton.brought([index]):
                hidden = skeleton.run(index, hidden, skeleton.calls(hidden))
            assert torch.equal(hidden, output), index
    base = [p for n, p in skeleton.model.named_parameters() if ".lolcats." not in n]
    assert {p.device.type for p in base} == {"meta"}, "what was brought has gone again"


@pytest.mark.parametrize("family", [*FAMILIES, *(family for family in OTHERS if family != "opt")])
@torch.no_grad()
def test_layers_one_by_one_keep_documents_apart(family: str) -> None:
    """What layers need beside hidden states comes from positions, without weights."""
    model = model_of(family)
    skeleton = skeleton_of(model)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 12, 7), (24,))])
    whole = lolcats.convert(model, SMALL)
    with override(whole, mode="transfer"):
        expected = outputs_of(
            whole.get_submodule(skeleton.path), lambda: whole(IDS, position_ids=positions, use_cache=False)
        )
    skeleton.prepare_packed(24)
    with skeleton.brought([-1]):
        hidden = skeleton.embed(IDS, positions)
    calls = skeleton.calls(hidden, positions)
    with override(skeleton.model, mode="transfer"):
        for index, output in enumerate(expected):
            with skeleton.brought([index]):
                hidden = skeleton.run(index, hidden, calls)
            assert torch.equal(hidden, output), index
    base = [p for n, p in skeleton.model.named_parameters() if ".lolcats." not in n]
    assert {p.device.type for p in base} == {"meta"}, "zeros have gone again"


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_built_from_files(family: str, tmp_path: Path) -> None:
    """Files are read directly or, if experts are stored separately, by transformers; maps are those of convert."""
    model = model_of(family)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.manual_seed(7)
    reference = lolcats.convert(AutoModelForCausalLM.from_pretrained(tmp_path), SMALL)
    skeleton = build_skeleton(find_base(str(tmp_path)), SMALL, torch.float32, CPU, seed=7)
    assert isinstance(skeleton.source, Shards if family != "qwen3_moe" else Loaded)
    maps, expected = feature_map_state(skeleton.model), feature_map_state(reference)
    assert set(maps) == set(expected)
    assert all(torch.equal(maps[n], expected[n]) for n in maps)
    own = dict(model.named_parameters())
    for index in range(-1, len(skeleton.layers)):
        skeleton.read_ahead(index)
        with skeleton.brought([index]):
            here = {
                n: p for n, p in skeleton.model.named_parameters() if p.device.type != "meta" and "lolcats" not in n
            }
            assert here
            assert all(torch.equal(p, own[n]) for n, p in here.items())
            assert skeleton.bytes(index) == sum(p.numel() * 4 for p in here.values())
    assert skeleton.model.config.lolcats == reference.config.lolcats


def test_a_model_too_large_to_be_rearranged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_of("qwen3_moe").save_pretrained(tmp_path)
    monkeypatch.setattr(skeleton_module, "free_host_memory", lambda: 1000)
    with pytest.raises(LolcatsError, match=r"gate_up_proj is not in any of its .* whole model in host memory"):
        build_skeleton(find_base(str(tmp_path)), SMALL, torch.float32, CPU, seed=0)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="30KB")
    base = find_base(str(tmp_path))

    def build() -> Skeleton:
        return build_skeleton(base, SMALL, torch.float32, CPU, seed=0)

    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-20])
    with pytest.raises(LolcatsError, match=rf"{shard.name} is damaged or truncated"):
        build()
    shard.unlink()
    with pytest.raises(LolcatsError, match=rf"{shard.name} is missing: model.safetensors.index.json lists it"):
        build()
    shard.write_bytes(content)
    skeleton = build()
    shard.unlink()  # lost after the start
    with pytest.raises(LolcatsError, match=rf"{shard.name}"), skeleton.brought([-1, 0, 1]):
        pass
    shard.write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text[:-30])
    with pytest.raises(LolcatsError, match=r"index\.json is damaged"):
        build()
    other = json.loads(text)
    index.unlink()
    with pytest.raises(LolcatsError, match=r"neither model\.safetensors\.index\.json nor"):
        build()
    index.write_text(json.dumps(other))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(LolcatsError, match=r"_proj\.weight has shape .*48.*, expected .*40"):
        build()


def test_keywords_that_depend_on_the_tokens_are_refused() -> None:
    skeleton = skeleton_of(tiny_model())
    rotary: Any = skeleton.model.model.rotary_emb
    original = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(part + x.mean() for part in original(x, position_ids))
    with pytest.raises(LolcatsError, match=r"depends on the tokens.*use transfer\.order=joint"):
        skeleton.prepare([2], 24)


def test_a_family_that_does_not_keep_documents_apart_is_refused() -> None:
    with pytest.raises(LolcatsError, match="does not separate documents"):
        skeleton_of(model_of("opt")).prepare_packed(24)


def test_keywords_that_depend_on_other_weights_are_refused_for_packed_rows() -> None:
    """They are not known where only a layer's own weights are."""
    skeleton = skeleton_of(tiny_model())
    rotary, norm = skeleton.model.model.rotary_emb, skeleton.model.model.norm
    original = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(part + norm.weight.sum() for part in original(x, position_ids))
    skeleton.prepare([2], 24)
    with pytest.raises(LolcatsError, match=r"depends on weights outside of the layers.*use transfer\.order=joint"):
        skeleton.prepare_packed(24)


def test_parameters_kept_in_fp32_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["llama"](vocab_size=320)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"})
    model = empty_model(config, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "o_proj" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "o_proj" not in n} == {torch.bfloat16}
    assert isinstance(model.model.layers, nn.ModuleList)


def test_buffers_that_files_hold_are_read(tmp_path: Path) -> None:
    """A mixture's bias of the choice of experts is a buffer, and fp32 in a model in bf16."""
    model = tiny("dots1")
    name = "mlp.gate.e_score_correction_bias"
    model.model.layers[1].get_buffer(name).copy_(torch.arange(1.0, 5.0) / 3)
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(find_base(str(tmp_path)), SMALL, torch.bfloat16, CPU, 0)
    with skeleton.brought([1]):
        assert torch.equal(skeleton.layers[1].get_buffer(name), torch.arange(1.0, 5.0) / 3)
