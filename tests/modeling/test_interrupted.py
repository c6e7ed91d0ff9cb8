"""Ctrl-C inside a call, after which torch runs no hook: what is left changes nothing and keeps nothing alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from support.tiny import tiny
from transformers import DynamicCache

import lolcats
from lolcats.config import AttentionConfig
from lolcats.modeling.call import current
from lolcats.modeling.install import decoders
from lolcats.modeling.layer import decoder_layers

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
IDS = torch.arange(3, 15)[None]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
PACKED = {"position_ids": POSITIONS, "use_cache": False}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama"),
    "opt, a decoder inside a decoder": lambda: tiny("opt"),
}

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def nothing_left() -> Any:
    with torch.no_grad():
        yield
    assert current() is None


def student(family: str = "llama") -> Any:
    return lolcats.convert(FAMILIES[family](), SMALL).eval()


def interrupt(model: Any, **given: Any) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = decoder_layers(model)[1].register_forward_pre_hook(stop)
    try:
        model(IDS, **given)
    except KeyboardInterrupt:  # pytest.raises would keep the frames
        pass
    else:
        pytest.fail("the call went through")
    finally:
        hook.remove()
    assert current() is not None, "nothing was left, so this shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_call_is_as_any_other(family: str) -> None:
    model = student(family)
    expected = model(IDS).logits
    for _ in range(3):
        interrupt(model)
    assert torch.equal(model(IDS).logits, expected)
    assert current() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_see_where_documents_begin(family: str) -> None:
    model, base, other = student(family), tiny_model("qwen2"), student()
    expected, own = base(IDS, **PACKED).logits, other(IDS, **PACKED).logits
    assert not torch.allclose(expected, base(IDS, use_cache=False).logits, atol=1e-3)
    interrupt(model)
    assert torch.equal(base(IDS, **PACKED).logits, expected)
    assert torch.equal(other(IDS, **PACKED).logits, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_cache_can_go(family: str) -> None:
    model, cache = student(family), DynamicCache()
    interrupt(model, past_key_values=cache, use_cache=True)
    alive = [weakref.ref(model), weakref.ref(cache), *map(weakref.ref, decoders(model))]
    del model, cache
    gc.collect()
    assert not [x for x in alive if x() is not None]
    student()(IDS)


def test_a_call_inside_another_models() -> None:
    """Only a call of a model that holds the decoder counts as around it."""
    inner, outer, seen = student(), student(), list[Any]()
    expected = inner(IDS).logits
    hook = decoder_layers(outer)[0].register_forward_pre_hook(lambda *_: seen.append(inner(IDS).logits))
    outer(IDS)
    hook.remove()
    assert torch.equal(seen[0], expected)
