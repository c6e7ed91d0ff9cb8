"""Tensor parallel over gloo processes, and layers spread over devices: the same logits as in one place."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS, tiny_model
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.parallel import tensor_parallel

MAPS = {"query": [], "kv": ["attention.key_maps=per_kv_head"], "t2r": ["attention.feature_map=t2r"],
        "elu": ["attention.feature_map=elu"]}  # fmt: skip
# Of 4 heads: both ranks keep one; only the first does; the first has only kept ones; of 2, one rank has the kept one.
KEPT: dict[str, tuple[list[str], dict[str, Any]]] = {
    "each": (["attention.softmax_heads={0: [0, 3], 1: [2]}"], {"num_key_value_heads": 4}),
    "first": (["attention.softmax_heads={0: [0, 1], 1: [1]}", "attention.key_maps=per_kv_head"],
              {"num_key_value_heads": 4}),
    "one of two": (["attention.softmax_heads={0: [1], 1: [0]}", "attention.feature_map=t2r"], {}),
    "layer": (["attention.softmax_heads={0: [0, 1], 1: [0]}"], {}),
}  # fmt: skip


def student(family: str = "llama", settings: list[str] | None = None, **changes: Any) -> Any:
    model = lolcats.convert(tiny_model(family, **changes), load_config("paper-sinks", [*SETTINGS, *(settings or [])]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in linearized_layers(model):
            for parameter in layer.parameters():  # different in every head
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs() -> dict[str, Tensor]:
    """Two rows, the first padded on the left, longer than several windows."""
    ids = torch.randint(6, 300, (2, 45), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answers(model: Any) -> dict[str, Tensor]:
    """Logits at real tokens of a forward pass; of prefill and decoding; and greedy tokens."""
    x = inputs()
    real = x["attention_mask"].bool()
    whole = model(**x, use_cache=False).logits[real]
    first = model(input_ids=x["input_ids"][:, :30], attention_mask=x["attention_mask"][:, :30], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for end in range(31, 46):
        part = {"input_ids": x["input_ids"][:, end - 1 : end], "attention_mask": x["attention_mask"][:, :end]}
        position = part["attention_mask"].sum(1, keepdim=True) - 1
        steps.append(model(**part, position_ids=position, past_key_values=cache, use_cache=True).logits)
    tokens = model.generate(**x, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return {"whole": whole, "decoded": torch.cat(steps, 1)[real], "tokens": tokens}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def on_two_ranks(root: Path) -> None:
    for name in MAPS:
        model = AutoModelForCausalLM.from_pretrained(root / name, tp_plan="auto")
        assert isinstance(model.model.layers[0].self_attn.k_proj.weight, DTensor)
        for layer in linearized_layers(model):
            assert layer.gate.shape == (2,)
            assert not [p for p in layer.parameters() if isinstance(p, DTensor)]
        assert_same(answers(model), torch.load(root / f"{name}.pt"))
    with pytest.raises(LolcatsError, match="only some of the model's heads"):
        model.save_pretrained(root / "saved")
    for family in ("mistral", "qwen2", "gemma3"):
        model = AutoModelForCausalLM.from_pretrained(root / family, tp_plan="auto")
        assert {layer.ranks for layer in linearized_layers(model)} == {2}
        assert_same(answers(model), torch.load(root / f"{family}.pt"))
    for name in ("query", "kv"):  # a model in memory
        model = tensor_parallel(student(settings=MAPS[name]), init_device_mesh("cpu", (2,)))
        assert_same(answers(model), torch.load(root / f"{name}.pt"))
    for name, (settings, changes) in KEPT.items():
        model = AutoModelForCausalLM.from_pretrained(root / name, tp_plan="auto")
        assert_same(answers(model), torch.load(root / f"{name}.pt"))
        model = tensor_parallel(student(settings=settings, **changes), init_device_mesh("cpu", (2,)))
        assert_same(answers(model), torch.load(root / f"{name}.pt"))
    linearized = [layer.gate.shape[0] for layer in linearized_layers(model)]
    assert linearized == [2 * dist.get_rank()]  # the first rank has the kept head of the layer that is not kept whole
    with pytest.raises(LolcatsError, match="Layer 0 has 3 key/value heads, which 2 ranks cannot share"):
        tensor_parallel(student(settings=["attention.softmax_heads={0: [1]}"], hidden_size=48, num_attention_heads=6,
                                num_key_value_heads=3), init_device_mesh("cpu", (2,)))  # fmt: skip
    assert_wrappers_are_for_gradients()
    with pytest.raises(LolcatsError, match="1 key/value heads, which 2 ranks cannot share"):
        tensor_parallel(student(num_key_value_heads=1), init_device_mesh("cpu", (2,)))
    dist.barrier()


def assert_wrappers_are_for_gradients() -> None:
    """Split layers use transformers' wrapper only with gradients; logits are equal either way, and biases count
    once."""
    model = student(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    expected = answers(model)["whole"]
    model = tensor_parallel(model, init_device_mesh("cpu", (2,)))
    used: list[str] = []
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and isinstance(m.forward, partial)]
    assert len(layers) == 2 * 7
    for layer in layers:
        linear, wrapped, group = layer.forward.args

        def noting(x: Tensor, wrapped: Any = wrapped) -> Tensor:
            used.append("wrapper")
            return wrapped(x)

        layer.forward = partial(layer.forward.func, linear, noting, group)
    x = inputs()
    with torch.no_grad():
        plain = model(**x, use_cache=False).logits
    assert not used
    with_gradients = model(**x, use_cache=False).logits
    assert len(used) == len(layers)
    real = x["attention_mask"].bool()
    torch.testing.assert_close(plain[real], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_gradients[real].detach(), expected, rtol=1e-4, atol=1e-4)


def test_two_ranks_give_the_same_logits(tmp_path: Path) -> None:
    students = {name: student(settings=settings) for name, settings in MAPS.items()}
    students |= {name: student(settings=settings, **changes) for name, (settings, changes) in KEPT.items()}
    for name, model in {**students, **{f: student(f) for f in ("mistral", "qwen2", "gemma3")}}.items():
        model.save_pretrained(tmp_path / name)
        torch.save(answers(model), tmp_path / f"{name}.pt")
    run_ranks(2, on_two_ranks, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_on_several_devices_and_disk(family: str, tmp_path: Path) -> None:
    model = student(family)
    expected = answers(model)
    model.save_pretrained(tmp_path / "merged")
    last = model.config.num_hidden_layers - 1
    places = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == last else "cpu" for i in range(last + 1)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert next(spread.model.layers[last].mlp.parameters()).is_meta
    assert not [p for layer in linearized_layers(spread) for p in layer.parameters() if p.is_meta]
    assert_same(answers(spread), expected)
    for device_map in ("auto", {"": "cpu"}):
        assert_same(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map=device_map)), expected)


def test_an_adapter_spreads_too_but_is_not_split(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    from lolcats.modeling.checkpoint import FEATURE_MAPS, save_adapter_config, save_feature_maps
    from lolcats.weights.base import find_base

    shutil.copytree(model_dirs["llama"], tmp_path / "base")
    model, base = student(), find_base(str(tmp_path / "base"))
    save_adapter_config(model, base, tmp_path)
    save_feature_maps(model, tmp_path / FEATURE_MAPS)
    assert_same(answers(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")), answers(model))
    with pytest.raises(LolcatsError, match="is an adapter; only merged models"):
        AutoModelForCausalLM.from_pretrained(tmp_path, tp_plan="auto")
