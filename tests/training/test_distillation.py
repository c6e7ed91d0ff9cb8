"""Distillation from the teacher equals the plain computation with all logits, and goes through all of stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupt_at, tiny_model
from test_loss import EXPECTED, MODELS, Largest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import lolcats
from lolcats.attention import use_backend
from lolcats.attention.path import choose_loss_path
from lolcats.config import AttentionConfig, FinetuneConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.modeling.layer import override
from lolcats.modeling.loss import find_head
from lolcats.stages.finetune import distillation
from lolcats.stages.finetune.controls import train_control
from lolcats.stages.finetune.distillation import Distillation, as_teacher, distillation_loss
from lolcats.stages.finetune.stage import add_lora, finetune
from lolcats.tensors import read_tensors
from lolcats.weights.base import Base

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(6, 300, (2, 45), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((1, 25, 19), (30, 15))])
SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)
KINDS = [Distillation(), Distillation(1.0, 2.5), Distillation(0.3), Distillation(0.7, 0.5), Distillation(0.0)]


def with_lora(model: Any, attention: AttentionConfig = SMALL, **settings: Any) -> Any:
    torch.manual_seed(1)
    wrapped = add_lora(lolcats.convert(model, attention), FinetuneConfig(rank=2, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


def naive(wrapped: Any, ids: Tensor, kind: Distillation, positions: Any = None, labels: Any = None) -> Tensor:
    """In fp32, from all logits of both models, with a teacher that is called as a user would."""
    call = {"input_ids": ids, "use_cache": False} | ({} if positions is None else {"position_ids": positions})
    with torch.no_grad(), override(wrapped, mode="teacher"), wrapped.disable_adapter():
        teacher = wrapped(**call).logits[:, :-1].float()
    student = wrapped(**call).logits[:, :-1].float()
    targets = (ids if labels is None else labels)[:, 1:].clone()
    if positions is not None:
        targets[positions[:, 1:] == 0] = -100
    predicted = targets >= 0
    t = kind.temperature
    q, p = ((x / t).log_softmax(-1)[predicted] for x in (student, teacher))
    divergence = kl_div(q, p, reduction="batchmean", log_target=True)
    hard = cross_entropy(student[predicted], targets[predicted])
    return (1 - kind.weight) * hard + kind.weight * t * t * divergence


def assert_equal(wrapped: Any, kind: Distillation, head: Any = ..., **call: Any) -> None:
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    head = find_head(wrapped.get_base_model()) if head is ... else head
    expected, actual = naive(wrapped, IDS, kind, **call), distillation_loss(wrapped, head, IDS, kind, **call)
    assert expected > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(loss, trained) for loss in (expected, actual)), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_equals_the_naive_loss(family: str, kind: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients, for heads that scale or cap their logits, too."""
    monkeypatch.setattr(distillation, "TOKENS", 32)
    wrapped = with_lora(MODELS[family]())
    head = find_head(wrapped.get_base_model())
    assert head is not None
    assert (head.softcap is not None) == (EXPECTED.get(family, (1, None))[1] is not None)
    assert_equal(wrapped, kind, head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [64, 4096])
def test_the_kernel_equals_plain_pytorch(kind: Distillation, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in one block and in several, not predicted ones, and words that cannot come."""
    kernel = pytest.importorskip("lolcats.stages.finetune.kernel")
    monkeypatch.setattr(kernel, "BLOCK", block)
    torch.manual_seed(0)
    logits, teacher = (3 * torch.randn(9, 301, device=DEVICE) for _ in range(2))
    logits[4, 7] = teacher[4, 7] = torch.finfo(torch.float32).min / 4
    targets = torch.randint(8, 301, (9,), device=DEVICE)
    targets[3], targets[5] = -100, 300
    known = teacher if kind.weight > 0 else None
    expected, slope = kind.summed_with_gradient(logits.clone(), None if known is None else known.clone(), targets)
    loss = kernel.loss_and_gradient(logits, known, targets, kind.weight, kind.temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is the path of 16-bit models")
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_kernel_equals_the_naive_loss(kind: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, seen = pytest.importorskip("lolcats.stages.finetune.kernel"), list[int]()
    own = kernel.loss_and_gradient
    monkeypatch.setattr(distillation, "PIECE", 40)
    monkeypatch.setattr(kernel, "loss_and_gradient", lambda *given: seen.append(len(given[0])) or own(*given))
    wrapped, labels = with_lora(tiny_model()), IDS.masked_fill(torch.arange(IDS.shape[1]) < 5, -100)
    with use_backend("triton"):
        assert choose_loss_path(torch.empty(2, 3)) == "kernels"
        monkeypatch.setattr(distillation, "choose_loss_path", lambda _: "kernels")
    assert_equal(wrapped, kind, labels=labels)
    assert seen == [40, 40, 10]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora on the head", "trained head", "unknown head"])
def test_heads_that_are_more_than_a_frozen_product(form: str, kind: Distillation) -> None:
    targets = ["q_proj", "lm_head"] if form == "lora on the head" else ["q_proj", "o_proj"]
    wrapped = with_lora(tiny_model(), targets=targets)
    if form == "trained head":
        wrapped.get_base_model().lm_head.weight.requires_grad_(True)
    assert_equal(wrapped, kind, None if form == "unknown head" else ...)


@pytest.mark.parametrize("kind", KINDS[1:3])
@pytest.mark.parametrize("attention", [{}, {"softmax_heads": {"0": [1]}}, {"layers": {"1": "softmax"}}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_and_completions(kind: Distillation, attention: Any, checkpointing: bool) -> None:
    """With kept heads and layers. Neither teacher nor student sees one document from another."""
    wrapped = with_lora(tiny_model(), AttentionConfig(window_size=8, sinks=2, feature_dim=8, **attention))
    if checkpointing:
        wrapped.train()
        wrapped.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal(wrapped, kind, positions=POSITIONS)
    labels = IDS.where(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    assert_equal(wrapped, kind, positions=POSITIONS, labels=labels)
    assert_equal(wrapped, kind, labels=labels)


def test_words_that_cannot_come_have_no_part() -> None:
    """Logits of −inf in both models: KL and gradients of the others are as without these words."""
    logits, teacher = torch.randn(2, 5, 12)
    targets = torch.tensor([3, -100, 0, 7, 1])
    for kind in KINDS:
        few, shut = logits[:, :9].clone().requires_grad_(), logits.index_fill(1, torch.arange(9, 12), -torch.inf)
        expected = kind.summed(few, teacher[:, :9], targets)
        found = kind.summed(shut.requires_grad_(), teacher.index_fill(1, torch.arange(9, 12), -torch.inf), targets)
        torch.testing.assert_close(found, expected)
        (right,), (gradient,) = torch.autograd.grad(expected, few), torch.autograd.grad(found, shut)
        torch.testing.assert_close(gradient[:, :9], right)
        assert not gradient[:, 9:].any()


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in forward nor in backward: the largest are the logits of one part."""
    monkeypatch.setattr(distillation, "TOKENS", 16)
    wrapped = with_lora(tiny_model(vocab_size=5120))
    head = find_head(wrapped.get_base_model())
    for kind in KINDS:
        largest = Largest()
        with largest:
            distillation_loss(wrapped, head, IDS, kind).backward()
        assert largest.elements == max(16 * 5120, 5120 * 32)
        assert largest.elements < IDS.numel() * 5120 / 2


def test_in_bf16_the_gradient_is_that_of_fp32_logits() -> None:
    wrapped = with_lora(tiny_model().bfloat16())
    exact = naive(wrapped, IDS, KINDS[1])
    found = distillation_loss(wrapped, find_head(wrapped.get_base_model()), IDS, KINDS[1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0, rtol=2e-2)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    ours, theirs = (torch.cat([g.flatten() for g in torch.autograd.grad(x, trained)]) for x in (found, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_the_teacher_is_the_base_model() -> None:
    """Without dropout and adapter, whatever the student does; afterwards all is as before."""
    plain = tiny_model(attention_dropout=0.5)
    expected = plain(IDS).logits
    wrapped = with_lora(plain, dropout=0.5)
    wrapped.train()
    wrapped.get_base_model().model.layers[1].eval()
    before = {name: (module.training) for name, module in wrapped.named_modules()}
    learns = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    with as_teacher(wrapped):
        found = wrapped(input_ids=IDS, use_cache=False).logits
        assert not found.requires_grad
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state), "the student's dropout is that of a run without a teacher"
    assert {name: (module.training) for name, module in wrapped.named_modules()} == before
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == learns
    with pytest.raises(ZeroDivisionError), as_teacher(wrapped):
        raise ZeroDivisionError
    assert {name: (module.training) for name, module in wrapped.named_modules()} == before
    assert not torch.allclose(wrapped(input_ids=IDS, use_cache=False).logits, expected)


def rows() -> Data:
    ids = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(ids[8:], ids[:4], ids[4:8], "", {})


def run(directory: Path, settings: list[str], data: Data | None = None) -> tuple[Any, Any]:
    config = load_config("paper-sinks", settings)
    torch.manual_seed(1)
    return finetune(lolcats.convert(tiny_model(), config), data or rows(), config, directory)


LOSSES = [["finetune.loss=kl"], ["finetune.loss=mix", "finetune.kl_weight=0.4", "finetune.kl_temperature=2"]]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_validation_loss_is_that_which_is_trained(loss: list[str], settings: list[str], tmp_path: Path) -> None:
    """And with KL, the student comes closer to the teacher."""
    wrapped, result = run(tmp_path, [*settings, *loss, "finetune.max_steps=12", "finetune.learning_rate=1e-2"])
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert len(losses) > 3
    kind = Distillation(1.0) if loss == LOSSES[0] else Distillation(0.4, 2)
    assert losses[-1] < 0.95 * losses[0] or loss != LOSSES[0]
    with torch.no_grad():
        assert result.best_loss == pytest.approx(naive(wrapped.eval(), rows().validation, kind).item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_and_checkpointing_change_nothing(loss: list[str], settings: list[str], tmp_path: Path) -> None:
    changes = [
        ["finetune.micro_batch_size=4"],
        ["finetune.micro_batch_size=1"],
        ["finetune.gradient_checkpointing=true"],
    ]
    found = [run(tmp_path / str(i), [*settings, *loss, *change])[0] for i, change in enumerate(changes)]
    first, *others = ({n: p for n, p in x.named_parameters() if p.requires_grad} for x in found)
    for name, parameter in first.items():
        for other in others:
            torch.testing.assert_close(other[name], parameter, atol=1e-6, rtol=1e-4)


def test_continues_bit_for_bit(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [*settings, *LOSSES[1], "finetune.dropout=0.3", "finetune.protect_kept=true", "finetune.weight_decay=0.1",
               "attention.softmax_heads={0: [1]}"]  # fmt: skip
    expected, _ = run(tmp_path / "a", changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            run(tmp_path / "b", changes)
    resumed, _ = run(tmp_path / "b", changes)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("place", ["student", "teacher"])
def test_a_loss_of_nan_names_the_layer(place: str, settings: list[str], tmp_path: Path) -> None:
    config = load_config("paper-sinks", [*settings, "finetune.loss=kl"])
    model = lolcats.convert(tiny_model(), config)
    with torch.no_grad():
        if place == "teacher":
            model.model.layers[1].self_attn.v_proj.weight[3, 3] = float("inf")
        else:
            model.model.layers[1].self_attn.lolcats.gate.fill_(float("nan"))
    with pytest.raises(LolcatsError, match="In step 1 of finetune the loss became NaN or infinite in layer 1"):
        finetune(model, rows(), config, tmp_path)


@pytest.mark.parametrize("name", ["window_lora", "teacher_lora"])
def test_controls(name: str, settings: list[str], tmp_path: Path) -> None:
    """The window learns from the teacher. The teacher, which has nothing to learn from itself, learns the data."""
    config = load_config("paper-sinks", [*settings, "finetune.loss=kl"])
    model = lolcats.convert(tiny_model(), config)
    train_control(model, name, rows(), config, Base("base", "hub", ""), tmp_path)
    lora = read_tensors(tmp_path / "controls" / name / "lora" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in lora.values())
    lines = [json.loads(x) for x in (tmp_path / "controls" / name / "metrics.jsonl").read_text().splitlines()]
    loss = next(e["eval_loss"] for e in lines if "eval_loss" in e)
    assert loss > 4 if name == "teacher_lora" else 0 < loss < 4


@pytest.mark.parametrize(("setting", "message"), [
    ("finetune.loss=KL", "expected one of cross_entropy, kl, mix"),
    ("finetune.kl_weight=1", "kl_weight must be strictly between 0 and 1, not 1. For one loss only, set finetune.loss"),
    ("finetune.kl_weight=0", "kl_weight must be strictly between 0 and 1, not 0"),
    ("finetune.kl_temperature=0", "kl_temperature must be positive, not 0"),
])  # fmt: skip
def test_unsuitable_values(setting: str, message: str) -> None:
    with pytest.raises(LolcatsError, match=message):
        load_config("paper-sinks", [setting])
