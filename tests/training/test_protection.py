"""LoRA leaves queries and keys of kept heads and layers as they are, bit for bit, and trains all the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    PersimmonConfig,
    Phi3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.modeling.interface import attention_function
from lolcats.pipeline import linearize
from lolcats.stages.finetune.protection import kept_rows
from lolcats.stages.finetune.stage import add_lora, finetune, lora_targets, trained_layers
from lolcats.weights.base import find_base, load_model

IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MULTI_HEAD = {**COMMON, "num_key_value_heads": 4, "vocab_size": 320}
OWN_KEYS = {name: size for name, size in MULTI_HEAD.items() if name != "num_key_value_heads"}
BASES: dict[str, Any] = {
    "llama": lambda: tiny_model("llama"),
    "qwen2": lambda: tiny_model("qwen2"),  # with biases
    "phi3": lambda: built(Phi3Config(**COMMON, vocab_size=320)),
    "gpt2": lambda: built(GPT2Config(**GPT)),
    "gpt_bigcode, one kv head": lambda: built(GPTBigCodeConfig(**GPT, multi_query=True)),
    "gpt_bigcode": lambda: built(GPTBigCodeConfig(**GPT, multi_query=False)),
    "gpt_neox": lambda: built(GPTNeoXConfig(**OWN_KEYS)),
    "persimmon": lambda: built(PersimmonConfig(**MULTI_HEAD, qk_layernorm=False)),
}  # fmt: skip


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def kept(model: Any, layer: int = 1) -> dict[str, list[int]]:
    """The last key/value head of a layer."""
    return {str(layer): [model.config.lolcats["layers"][layer]["kv_heads"] - 1]}


def attended(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each layer."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def recording(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((q.detach(), k.detach(), v.detach()))
        return attention_function(module, q, k, v, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("lolcats", recording)
    try:
        model(IDS, use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("lolcats", attention_function)
    return seen


def weight_rows(module: Any) -> Tensor:
    """(rows, inputs), the weight with a row for each output."""
    return module.weight.detach().clone().T if isinstance(module, Conv1D) else module.weight.detach().clone()


@pytest.mark.parametrize("family", BASES)
@torch.no_grad()
def test_these_rows_are_queries_and_keys_of_kept_heads(family: str) -> None:
    """Changing only them changes queries and keys of the kept heads, and nothing else; changing all others leaves
    queries and keys of the kept heads as they are."""
    small = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
    heads = kept(lolcats.convert(BASES[family](), small), 0)
    model = lolcats.convert(BASES[family](), AttentionConfig(**{**vars(small), "softmax_heads": heads}))
    entry = model.config.lolcats["layers"][0]
    targets = lora_targets(model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    rows = kept_rows(model, model.config.lolcats["layers"], targets)
    group, (head,) = entry["heads"] // entry["kv_heads"], heads["0"]
    assert sum(int(x.sum()) for x in rows.values()) == (group + 1) * entry["head_dim"]
    queries = torch.arange(entry["heads"]) // group == head
    before = attended(model)[0]
    for changed in (True, False):
        old = {name: model.get_submodule(name).weight.detach().clone() for name in rows}
        for name, chosen in rows.items():
            weight = model.get_submodule(name).weight
            (weight.T if weight.shape[0] != len(chosen) else weight)[chosen == changed] *= 1.5
        after = attended(model)[0]
        differ = [(a - b).abs().amax((0, 2, 3)) > 1e-6 for a, b in zip(before, after, strict=True)]
        assert torch.equal(differ[0], queries == changed)
        assert torch.equal(differ[1], (torch.arange(entry["kv_heads"]) == head) == changed)
        assert not (differ[2].any() and changed)
        for name, weight in old.items():
            model.get_submodule(name).weight.copy_(weight)


def rows() -> Data:
    ids = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(ids[8:], ids[:4], ids[4:8], "", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_merged_rows_are_the_base_models(family: str, dtype: torch.dtype, settings: list[str], tmp_path: Path) -> None:
    """After training with weight decay and clipping; all other rows of the same projections have moved."""
    heads = kept(lolcats.convert(BASES[family](), AttentionConfig(window_size=8, sinks=2, feature_dim=8)))
    config = load_config("paper-sinks", [
        *settings, "finetune.protect_kept=true", "finetune.weight_decay=0.1", "finetune.learning_rate=1e-2",
        f"attention.softmax_heads={heads}",
    ])  # fmt: skip
    model = lolcats.convert(BASES[family]().to(dtype), config)
    targets = lora_targets(model, config.finetune.targets)
    protected = kept_rows(model, model.config.lolcats["layers"], targets)
    before = {name: weight_rows(model.get_submodule(name)) for name in targets}
    wrapped, _ = finetune(model, rows(), config, tmp_path)
    merged = wrapped.merge_and_unload()
    assert protected
    for name, old in before.items():
        new, same = (
            weight_rows(merged.get_submodule(name)),
            protected.get(name, torch.zeros(len(old), dtype=torch.bool)),
        )
        assert torch.equal(new[same].view(torch.int16), old[same].view(torch.int16)), name
        assert (new[~same] != old[~same]).any(1).all(), name


def test_kept_layers_get_no_lora_for_queries_and_keys(settings: list[str], tmp_path: Path) -> None:
    """The adapter has no such matrices. Gemma's layers with a window of their own are kept, too."""
    small = {"window_size": 8, "sinks": 2, "feature_dim": 8}
    model = lolcats.convert(tiny_model(), AttentionConfig(**small, layers={"1": "softmax"}))
    found = trained_layers(model, FinetuneConfig(protect_kept=True))
    every = [f"model.layers.{i}.self_attn.{name}_proj" for name in "qkvo" for i in (0, 1)]
    assert found == [name for name in every if name not in (every[1], every[3])]
    assert trained_layers(model, FinetuneConfig()) == every
    gemma = lolcats.convert(tiny_model("gemma3"), AttentionConfig(**small))
    assert "model.layers.0.self_attn.q_proj" not in trained_layers(gemma, FinetuneConfig(protect_kept=True))
    phi3 = lolcats.convert(BASES["phi3"](), AttentionConfig(**small, layers={"1": "softmax"}))
    assert "model.layers.1.self_attn.qkv_proj" in trained_layers(phi3, FinetuneConfig(protect_kept=True))
    config = load_config("paper-sinks", [*settings, "finetune.protect_kept=true", "attention.layers={1: softmax}"])
    wrapped, _ = finetune(lolcats.convert(tiny_model(), config), rows(), config, tmp_path)
    assert not [name for name, _ in wrapped.named_parameters() if "layers.1.self_attn.q_proj.lora" in name]


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_learning_rate_only_maps_are_trained(dtype, loss: str, settings: list[str], tmp_path: Path) -> None:
    """The merged weights are the base model's, bit for bit, with decay, clipping and protection."""
    config = load_config("paper-sinks", [
        *settings, "finetune.learning_rate=0", "finetune.feature_map_learning_rate=1e-2", "finetune.weight_decay=0.1",
        f"finetune.loss={loss}", "finetune.protect_kept=true", "attention.softmax_heads={1: [0]}",
    ])  # fmt: skip
    model = lolcats.convert(tiny_model().to(dtype), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped, result = finetune(model, rows(), config, tmp_path)
    assert result.steps > 0
    lora = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    assert lora
    assert not any(p.requires_grad or p.grad is not None for p in lora)
    for name, value in wrapped.merge_and_unload().state_dict().items():
        assert torch.equal(value, before[name]) != (".lolcats." in name), name


def test_a_run_of_feature_maps_only(settings: list[str], model_dirs, chat_file: Path, tmp_path: Path) -> None:
    more = ["finetune.learning_rate=0", "finetune.feature_map_learning_rate=1e-2", "finetune.loss=kl"]
    config, said = load_config("paper-sinks", [*settings, *more]), list[str]()
    linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "run", config, say=said.append)
    assert any(line.startswith("Stage 2: feature maps on the KL divergence") for line in said)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "In stage 2, only feature maps were trained, on the KL divergence from the teacher." in card
    weights = lolcats.load(tmp_path / "run").state_dict()
    base = load_model(find_base(str(model_dirs["llama"])), torch.float32)
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "learning_rate and finetune.feature_map_learning_rate are both 0"),
        (["finetune.feature_map_learning_rate=1e-3", "controls=[window_lora]"], "learning_rate=0 trains none"),
    ],
)
def test_what_would_train_nothing_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(LolcatsError, match=message):
        load_config("paper-sinks", ["finetune.learning_rate=0", *more])


def test_a_model_without_maps_needs_a_learning_rate() -> None:
    config = load_config("paper-sinks", ["finetune.learning_rate=0", "finetune.feature_map_learning_rate=1e-3"])
    with pytest.raises(LolcatsError, match="leaves nothing to train"):
        add_lora(lolcats.convert(tiny_model(), AttentionConfig(kind="window", window_size=8)), config.finetune)


def test_without_protection_all_rows_move(settings: list[str], tmp_path: Path) -> None:
    config = load_config("paper-sinks", [*settings, "attention.softmax_heads={1: [0]}"])
    wrapped, _ = finetune(lolcats.convert(tiny_model(), config), rows(), config, tmp_path)
    matrices = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
    assert all((matrix != 0).any(1).all() for matrix in matrices)


def test_what_cannot_be_protected_is_refused() -> None:
    with pytest.raises(LolcatsError, match="protect_kept does not work with"):
        load_config("paper-sinks", ["finetune.protect_kept=true", "finetune.use_dora=true"])
    model = lolcats.convert(
        tiny_model(), AttentionConfig(window_size=8, sinks=2, feature_dim=8, layers={"1": "softmax"})
    )
    model.model.layers[1].self_attn.mixed = torch.nn.Linear(32, 32)
    with pytest.raises(LolcatsError, match=r"cannot tell which of the 32 outputs of model.layers.1.self_attn.mixed"):
        trained_layers(model, FinetuneConfig(protect_kept=True, targets=["mixed"]))
    softmax = lolcats.convert(tiny_model(), AttentionConfig(kind="softmax"))
    with pytest.raises(LolcatsError, match="leaves nothing of"):
        trained_layers(softmax, FinetuneConfig(protect_kept=True, targets=["q_proj", "k_proj"]))


@pytest.mark.parametrize(("family", "names"), [
    ("llama", ["gate_proj", "up_proj", "down_proj"]), ("phi3", ["gate_up_proj", "down_proj"]),
    ("gpt2", ["c_fc", "c_proj"]), ("gpt_neox", ["dense_h_to_4h", "dense_4h_to_h"]),
])  # fmt: skip
def test_mlp_as_a_target(family: str, names: list[str]) -> None:
    """Whatever its layers are called; nothing of the attention."""
    model = lolcats.convert(BASES[family](), AttentionConfig(window_size=8, sinks=2, feature_dim=8))
    found = lora_targets(model, ["mlp"])
    assert sorted(name.rpartition(".")[2] for name in found) == sorted(2 * names)
    assert not [name for name in found if "attn" in name or "attention" in name]
    wrapped = add_lora(model, FinetuneConfig(rank=2, targets=["q_proj", "mlp"]))
    wrapped(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in wrapped.named_parameters() if "lora_B" in n)
