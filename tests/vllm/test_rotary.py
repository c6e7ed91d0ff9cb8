"""RoPE of vLLM's own rotary modules is undone, and attention modules where that is not possible are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.testing import assert_close

HEADS, KV_HEADS, DIM, CHANNELS = 4, 2, 16, 24
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", **SCALED, "short_factor": [1.0] * 7 + [2.0], "long_factor": [2.0] * 7 + [8.0]}
ROPES: dict[str, tuple[bool, dict[str, Any]]] = {
    "usual": (True, {}),
    "neighbours": (False, {}),
    "half of the channels": (True, {"partial_rotary_factor": 0.5}),
    "neighbours, half of the channels": (False, {"partial_rotary_factor": 0.5}),
    "yarn": (True, {"rope_type": "yarn", **SCALED}),
    "yarn, neighbours": (False, {"rope_type": "yarn", **SCALED}),
    "llama3": (True, {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "linear": (True, {"rope_type": "linear", **SCALED}),
    "dynamic": (True, {"rope_type": "dynamic", **SCALED}),
    "proportional": (True, {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
    "longrope": (True, LONG),
}


@pytest.fixture(autouse=True)
def config() -> Any:
    """vLLM's modules ask for its configuration when they are made."""
    from vllm.config import VllmConfig, set_current_vllm_config

    made = VllmConfig()
    made.model_config = SimpleNamespace(  # type: ignore[assignment]
        max_model_len=256, get_hidden_size=lambda: CHANNELS, dtype=torch.float32
    )
    with set_current_vllm_config(made):
        yield made


def rope(name: str = "usual", head_dim: int = DIM, dtype: torch.dtype = torch.float32) -> Any:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    halves, parameters = ROPES[name]
    return get_rope(head_dim, 256, halves, {"rope_theta": 1e4, **parameters}, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROPES)
def test_queries_and_keys_come_back(name: str, dtype: torch.dtype) -> None:
    from lolcats.vllm.rotary import Rotation

    rotary, positions = rope(name, dtype=dtype), torch.tensor([0, 3, 7, 100, 200, 7])
    rotation = Rotation(nn.Module(), rotary, CHANNELS, dtype)
    before = [torch.randn(6, heads, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS)]
    turned = [x.view(6, -1, DIM) for x in rotary(positions, *(x.flatten(1).clone() for x in before))]
    assert (turned[0] - before[0]).abs().max() > 0.5
    both = rotation.beside(*turned, *rotation.cos_sin(positions, dtype))
    for x, there, here in zip(both, turned, before, strict=True):
        assert torch.equal(x[..., :DIM], there)
        assert_close(x[..., DIM:], here, **({} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}))


class Decoder(nn.Module):
    """An attention module like vLLM's."""

    def __init__(self, *rotaries: Any) -> None:
        super().__init__()
        self.rotaries = nn.ModuleList(rotaries)
        torch.manual_seed(0)
        self.q, self.k = (nn.Linear(CHANNELS, heads * DIM) for heads in (HEADS, KV_HEADS))
        self.norm = nn.RMSNorm(DIM)
        nn.init.normal_(self.norm.weight)
        self.attention: Any = None

    def forward(self, positions: Tensor, hidden_states: Tensor) -> None:
        q, k = self.rotate(positions, self.q(hidden_states), self.k(hidden_states))
        self.attention.observed += [x.view(len(positions), -1, DIM) for x in (q, k)]

    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = self.rotaries[0](positions, q, k)
        return turned


class NormBefore(Decoder):
    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotate(positions, *(self.norm(x.unflatten(-1, (-1, DIM))).flatten(-2) for x in (q, k)))


class NormAfter(Decoder):
    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (self.norm(x.view(len(x), -1, DIM)).flatten(-2) for x in super().rotate(positions, q, k))
        return q, k


class NotRotated(Decoder):
    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class Grows(Decoder):
    def rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotate(positions, q, k)
        return q * (1 + 0.1 * positions[:, None]), k


class CalledOtherwise(Decoder):
    def forward(self, position_ids: Tensor, hidden_states: Tensor) -> None:  # type: ignore[override]
        super().forward(position_ids, hidden_states)


def rotation_of(module: Decoder, config: Any) -> Any:
    from lolcats.vllm.rotary import find_rotations

    module.attention = find_rotations({"a": module}, DIM, config)["a"]
    return module.attention


@pytest.mark.parametrize("kind", [Decoder, NormBefore])
def test_modules_that_pass_the_check(kind: type[Decoder], config: Any) -> None:
    rotation = rotation_of(kind(rope("yarn")), config)
    rotation.check(torch.device("cpu"))
    assert rotation.observed is None


@pytest.mark.parametrize("kind", [NormAfter, NotRotated, Grows])
def test_modules_that_do_more_than_rope_are_refused(kind: type[Decoder], config: Any) -> None:
    from lolcats.errors import LolcatsError

    rotation = rotation_of(kind(rope()), config)
    with pytest.raises(LolcatsError, match=f"cannot undo RoPE in vLLM's {kind.__name__}: use lolcats serve"):
        rotation.check(torch.device("cpu"))


UNKNOWN: dict[str, Any] = {
    "none": lambda: Decoder(),
    "two": lambda: Decoder(rope(), rope("yarn")),
    "other heads": lambda: Decoder(rope(head_dim=2 * DIM)),
    "called otherwise": lambda: CalledOtherwise(rope()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_modules_without_a_rotary_module_that_we_know_are_refused(name: str, config: Any) -> None:
    from lolcats.errors import LolcatsError

    with pytest.raises(LolcatsError, match=r"feature_inputs=unrotated\), and lolcats cannot undo RoPE"):
        rotation_of(UNKNOWN[name](), config)


def test_modules_that_rotate_alike_are_checked_once(config: Any) -> None:
    from lolcats.vllm.rotary import find_rotations

    shared = rope()
    made = find_rotations({"0": Decoder(shared), "1": Decoder(shared), "2": NormBefore(shared)}, DIM, config)
    assert made["0"] is made["1"]
    assert made["2"] is not made["0"]


def test_a_layer_checks_as_soon_as_it_gets_its_memory(config: Any) -> None:
    """Before vLLM says that it is ready."""
    from lolcats.config import AttentionConfig
    from lolcats.errors import LolcatsError
    from lolcats.modeling.layer import Geometry, LinearizedAttention, layer_spec
    from lolcats.vllm.layer import StateAttention
    from lolcats.vllm.pool import Layout

    settings = AttentionConfig(feature_inputs="unrotated", window_size=4, feature_dim=4)
    geometry, spec = Geometry(0, HEADS, KV_HEADS, DIM, DIM), layer_spec(settings, "hybrid")
    layer = LinearizedAttention(geometry, settings, spec, "vllm")
    k, v = (torch.empty(1, KV_HEADS, 0, channels) for channels in (2 * DIM, DIM))
    layout = Layout.of(layer.empty_state(k, v))
    attention: Any = SimpleNamespace(
        layer_name="model.layers.0.self_attn.attn", num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=DIM,
        head_size_v=DIM, impl=SimpleNamespace(scale=1.0),
    )  # fmt: skip
    memory = torch.zeros(3, 1, 1, layout.nbytes, dtype=torch.int8)
    StateAttention(attention, layer, layout, rotation_of(Decoder(rope()), config)).bind_kv_cache(memory)
    with pytest.raises(LolcatsError, match="cannot undo RoPE in vLLM's NotRotated"):
        StateAttention(attention, layer, layout, rotation_of(NotRotated(rope()), config)).bind_kv_cache(memory)
