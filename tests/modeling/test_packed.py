"""Documents packed into one row are sequences of their own: everything equals the same documents in separate rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from support.interpreted import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lolcats
from lolcats.attention import Documents, parallel_attention, use_backend
from lolcats.config import AttentionConfig, FinetuneConfig, TransferConfig
from lolcats.errors import LolcatsError
from lolcats.modeling import masks
from lolcats.modeling.layer import LinearizedAttention, linearized_layers, override
from lolcats.modeling.loss import find_head, language_model_loss, next_token_loss
from lolcats.stages.finetune.stage import add_lora
from lolcats.stages.transfer.stage import layer_losses

LENGTHS = ((1, 17, 40, 5, 9), (33, 8, 31))  # shorter and longer than two windows of 8, as long as a window, and 1
IDS = torch.randint(6, 300, (2, 72), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def converted(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(1)
    return lolcats.convert(tiny_model(family), AttentionConfig(window_size=8, sinks=2, feature_dim=8, **changes))


def pieces(x: Tensor) -> list[Tensor]:
    """(2, 72, ...) -> each document as a batch of one."""
    return [part[None] for row, lengths in zip(x, LENGTHS, strict=True) for part in row.split(lengths)]


def separate(model: Any) -> Tensor:
    logits = [model(ids, use_cache=False).logits[0] for ids in pieces(IDS)]
    first = len(LENGTHS[0])
    return torch.stack([torch.cat(logits[:first]), torch.cat(logits[first:])])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_those_of_separate_rows(family: str) -> None:
    """Gemma's sliding layer stays softmax: its own mask separates documents."""
    model = converted(family)
    torch.testing.assert_close(model(IDS, position_ids=POSITIONS).logits, separate(model), atol=1e-4, rtol=1e-4)
    with override(model, mode="teacher"):
        expected = separate(model)
        torch.testing.assert_close(
            model(IDS, position_ids=POSITIONS, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kept", ["teacher", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_softmax_attention_does_not_reach_into_other_documents(family: str, kept: str) -> None:
    """In teacher mode and in a model whose layers all stay softmax, whether or not the caller thinks of the cache. In
    train mode with labels, too, where transformers fills one."""
    layers = {"0-2" if family == "gemma3" else "0-1": "softmax"} if kept == "layers" else {}
    model = converted(family, layers=layers)
    with override(model, mode="teacher" if kept == "teacher" else None):
        expected = separate(model)
        torch.testing.assert_close(model(IDS, position_ids=POSITIONS).logits, expected, atol=1e-4, rtol=1e-4)
        model.train()
        out = model(IDS, position_ids=POSITIONS, labels=IDS)
        torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)
        assert out.past_key_values is None
        with pytest.raises(LolcatsError, match="do not support a cache"):
            model(IDS, position_ids=POSITIONS, use_cache=True)
        with pytest.raises(LolcatsError, match="do not support an attention_mask"):
            model(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS))


@pytest.mark.parametrize("changes", [{"window": "sliding"}, {"kind": "linear"}, {"kind": "window"},
                                     {"kind": "linear", "decay": "retnet", "normalizer": "group_norm"},
                                     {"layers": {"0": "softmax"}}, {"key_maps": "per_kv_head"}])  # fmt: skip
@torch.no_grad()
def test_variants(changes: dict[str, Any]) -> None:
    model = converted(**changes)
    torch.testing.assert_close(model(IDS, position_ids=POSITIONS).logits, separate(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("backend", "lengths"), [("chunked", LENGTHS), ("triton", ((1, 17), (8, 10)))])
def test_layer_equals_the_reference_document_by_document(backend: str, lengths: Any) -> None:
    """Outputs and all gradients, against the naive fp32 form of each document alone."""
    if backend == "triton":
        pytest.importorskip("triton")
    layer = linearized_layers(converted())[0].to(DEVICE)
    shapes = ((2, sum(lengths[0]), heads, 8) for heads in (4, 2, 2))
    tensors = [torch.randn(shape, device=DEVICE).transpose(1, 2).requires_grad_() for shape in shapes]
    documents = Documents(lengths, torch.device(DEVICE))
    expected = by_reference(layer, tensors, lengths)
    with use_backend(backend):
        y = layer(*tensors, 0.3, None, None, documents)
        probe = torch.randn_like(expected)
        ours = torch.autograd.grad((y * probe).sum(), [*tensors, *layer.parameters()])
    theirs = torch.autograd.grad((expected * probe).sum(), [*tensors, *layer.parameters()])
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def by_reference(layer: LinearizedAttention, tensors: list[Tensor], lengths: Any) -> Tensor:
    rows = []
    for row, documents in enumerate(lengths):
        parts = zip(*(x[row : row + 1].split(documents, 2) for x in tensors), strict=True)
        common = (layer.gamma, layer.spec, 0.3)
        y = [parallel_attention(q, k, v, layer.phi_q(q), layer.phi_k(k), *common) for q, k, v in parts]
        rows.append(torch.cat(y, 2))
    return torch.cat(rows)


@pytest.mark.parametrize("xent", [0.0, 1.0])
def test_stage_one_equals_separate_rows(xent: float) -> None:
    """The loss is a mean over tokens, so it is that of separate documents weighted by length; likewise gradients."""
    model, config = converted(), TransferConfig(xent_weight=xent)
    packed = layer_losses(model, IDS, config, 1.0, POSITIONS)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if ".lolcats." in n}
    model.zero_grad()
    total = torch.zeros_like(packed)
    for ids in pieces(IDS):
        total += layer_losses(model, ids, config, ids.numel() / IDS.numel()) * (ids.numel() / IDS.numel())
    torch.testing.assert_close(packed, total, atol=1e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-3)
    alone = layer_losses(model, IDS, config)
    assert not torch.allclose(alone, packed, rtol=1e-2), "without a reset it is another loss"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_stage_two_equals_separate_rows(head: bool, checkpointing: bool) -> None:
    model = converted()
    wrapped = add_lora(model, FinetuneConfig(rank=2))
    if checkpointing:
        wrapped.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    lora = [p for p in wrapped.parameters() if p.requires_grad]
    base = wrapped.get_base_model()
    packed = language_model_loss(base, find_head(base) if head else None, IDS, False, POSITIONS)
    ours = torch.autograd.grad(packed, lora)
    parts = [ids for ids in pieces(IDS) if ids.shape[1] > 1]
    count = sum(ids.shape[1] - 1 for ids in parts)
    alone = sum(next_token_loss(base(ids, use_cache=False).logits, ids) * ((ids.shape[1] - 1) / count) for ids in parts)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours, torch.autograd.grad(alone, lora), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_one_document_a_row_is_nothing_special() -> None:
    model = converted()
    positions = torch.arange(72).expand(2, -1)
    assert torch.equal(model(IDS, position_ids=positions).logits, model(IDS).logits)


def test_what_cannot_be_packed_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    with pytest.raises(LolcatsError, match="do not support a cache"):
        model(IDS, position_ids=POSITIONS, use_cache=True)
    with pytest.raises(LolcatsError, match="do not support an attention_mask"):
        model(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS))
    padded = torch.ones_like(IDS)
    padded[0, :10] = 0
    model(IDS, attention_mask=padded, position_ids=(padded.cumsum(1) - 1).clamp_min(0))
    linearized_layers(model)[1].base_implementation = "flash_attention_2"
    with pytest.raises(LolcatsError, match="sdpa or eager"):
        model(IDS, position_ids=POSITIONS)
    linearized_layers(model)[1].base_implementation = "sdpa"
    monkeypatch.setattr(masks.MaskRequest, "_check_documents", lambda self, documents: self.arguments.update(
        mask_function=lambda batch, head, query, key: key <= query) or checked(self, documents))  # fmt: skip
    with pytest.raises(LolcatsError, match="does not separate documents"):
        model(IDS, position_ids=POSITIONS)
    with override(model, mode="teacher"), pytest.raises(LolcatsError, match="does not separate documents"):
        model(IDS, position_ids=POSITIONS)


checked = masks.MaskRequest._check_documents


def test_generation_is_as_before(tmp_path: Path) -> None:
    model = converted()
    out = model.generate(IDS[:, :20], attention_mask=torch.ones(2, 20, dtype=torch.long), max_new_tokens=5)
    assert out.shape == (2, 25)


class Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is read on the host, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_a_call_without_positions_reads_nothing_back(family: str, mode: Any) -> None:
    model = converted(family)
    with override(model, mode=mode), Reads() as reads:
        model(IDS, use_cache=False)
    assert reads.count == 0
    with override(model, mode=mode), Reads() as reads:
        model(IDS, position_ids=POSITIONS, use_cache=False)
    assert reads.count > 0


def test_training_reads_nothing_back() -> None:
    model = converted()
    with Reads() as reads:
        layer_losses(model, IDS, TransferConfig())
    assert reads.count == 0
    add_lora(model, FinetuneConfig())
    head = find_head(model)
    with Reads() as reads:
        language_model_loss(model, head, IDS).backward()
    assert reads.count == 0


def test_other_models_still_find_packed_rows() -> None:
    """Also after a call of ours, in which they are not looked for."""
    converted()(IDS, use_cache=False)
    base = tiny_model()
    torch.testing.assert_close(
        base(IDS, position_ids=POSITIONS, use_cache=False).logits, separate(base), atol=1e-4, rtol=1e-4
    )
