"""Both stages: what is trained, what the loss is, and that resuming changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, interrupt_at, tiny_model

import lolcats
from lolcats.config import Config, TransferConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.modeling.layer import AttentionCall, override
from lolcats.stages.finetune.stage import add_lora, finetune
from lolcats.stages.finetune.trainer import StageTrainer, newest_checkpoint
from lolcats.stages.transfer.stage import attention_loss, layer_errors, layer_losses, transfer


@pytest.fixture
def config(settings: list[str]) -> Config:
    return load_config("paper-sinks", settings)


@pytest.fixture
def data() -> Data:
    rows = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(rows[8:], rows[:4], rows[4:8], "", {})


def converted(config: Config, family: str = "llama"):
    model = tiny_model(family)
    torch.manual_seed(1)
    return lolcats.convert(model, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_trains(family: str, config: Config, data: Data, tmp_path: Path) -> None:
    model = converted(config, family)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    transfer(model, data, config, tmp_path)
    maps = set(feature_map_state(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == maps
    assert {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])} == maps
    before = {n: p.clone() for n, p in model.state_dict().items()}
    wrapped, _ = finetune(model, data, config, tmp_path)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    layers = range(model.config.num_hidden_layers)
    assert trained == {
        f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{m}.default.weight"
        for i in layers for p in "qkvo" for m in "AB"
    }  # fmt: skip
    after = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in wrapped.state_dict().items()}
    assert all(torch.equal(after[n], p) for n, p in before.items())


MAPS, GATE, NORM = ("phi_q.weight", "phi_k.weight"), ("gate",), ("norm.weight", "norm.bias")
TRAINED: list[tuple[list[str], dict[int, tuple[str, ...]]]] = [
    (["attention.kind=hybrid"], {0: (*MAPS, *GATE), 1: (*MAPS, *GATE)}),
    (["attention.kind=linear"], {0: MAPS, 1: MAPS}),
    (["attention.kind=linear", "attention.normalizer=group_norm"], {0: (*MAPS, *NORM), 1: (*MAPS, *NORM)}),
    (["attention.kind=window"], {0: (), 1: ()}),
    (["attention.layers={0: linear}"], {0: MAPS, 1: (*MAPS, *GATE)}),
    (["attention.layers={0: window}"], {0: (), 1: (*MAPS, *GATE)}),
    (["attention.layers={0: window, 1: linear}"], {0: (), 1: MAPS}),
    (["attention.layers={1: softmax}"], {0: (*MAPS, *GATE)}),
]  # fmt: skip


@pytest.mark.parametrize("coupling", ["joint", "per_layer"])
@pytest.mark.parametrize(("kind", "used"), TRAINED, ids=lambda x: str(x) if isinstance(x, list) else "")
def test_parameters_that_a_layers_kind_does_not_use_are_not_trained(
    kind: list[str], used: dict[int, tuple[str, ...]], coupling: str, settings: list[str], data: Data, tmp_path: Path
) -> None:
    """In no stage: DDP waits for the gradient of every parameter that is."""
    more = [f"transfer.coupling={coupling}", "finetune.feature_map_learning_rate=1e-3", "transfer.weight_decay=0.1"]
    config = load_config("paper-sinks", [*settings, *kind, *more])
    model = converted(config)
    names = {f"model.layers.{i}.self_attn.lolcats.{own}" for i, parts in used.items() for own in parts}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    transfer(model, data, config, tmp_path)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])} == names
    wrapped = add_lora(model, config.finetune)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert {n.removeprefix("base_model.model.") for n in trained if "lora_" not in n} == names
    wrapped(data.train[:2], labels=data.train[:2], use_cache=False).loss.backward()
    assert {n for n, p in trained.items() if p.grad is None} == set()


def test_layer_local_backward_equals_one_backward(config: Config) -> None:
    model = converted(config)
    ids = torch.randint(6, 300, (3, 40))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lolcats." in name)
    losses = layer_losses(model, ids, config.transfer, backward_scale=0.5)
    local = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    whole = []
    with override(model, mode="transfer", observer=lambda layer, call: whole.append((layer, call))):
        model(ids, use_cache=False)
    total = torch.stack([attention_loss(layer, call, config.transfer) for layer, call in whole]).mean()
    (0.5 * total).backward()
    torch.testing.assert_close(losses.mean(), total.detach())
    for name, gradient in local.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_a_layer_reads_nothing_back_from_the_device(padded: bool, config: Config) -> None:
    """On meta tensors, where reading one on the host is an error."""
    layer = converted(config).to("meta").model.layers[0].self_attn.lolcats
    q, k, v = (torch.empty(2, heads, 40, 8, device="meta") for heads in (4, 2, 2))
    padding = torch.empty(2, 40, dtype=torch.bool, device="meta") if padded else None
    call = AttentionCall(q, k, v, q.transpose(1, 2), 0.3, None, padding)
    attention_loss(layer, call, config.transfer).backward()
    assert layer.gate.grad is not None


@torch.no_grad()
def test_transfer_loss_is_that_of_the_paper(config: Config) -> None:
    """1000 · MSE between per-head outputs before o_proj, of the same q, k, v; layers see the teacher's states."""
    model = converted(config)
    ids = torch.randint(6, 300, (2, 40))
    inputs, outputs = [], []
    hooks = [a.o_proj.register_forward_pre_hook(lambda m, x: outputs.append(x[0])) for a in attentions(model)]
    hooks += [l.register_forward_pre_hook(lambda m, x: inputs.append(x[0])) for l in model.model.layers]  # noqa: E741
    with override(model, mode="teacher"):
        model(ids, use_cache=False)
    teacher_inputs, targets = list(inputs), list(outputs)
    losses = layer_losses(model, ids, TransferConfig())
    assert all(torch.equal(a, b) for a, b in zip(inputs[-2:], teacher_inputs, strict=True))
    for hook in hooks:
        hook.remove()
    # The first layer's input does not depend on the attention, so the student's own output is comparable there.
    hook = attentions(model)[0].o_proj.register_forward_pre_hook(lambda m, x: outputs.append(x[0]))
    model(ids, use_cache=False)
    hook.remove()
    torch.testing.assert_close(losses[0], 1000 * (outputs[-1] - targets[0]).square().mean())


def attentions(model) -> list:
    return [layer.self_attn for layer in model.model.layers]


def test_cross_entropy_of_attention_weights(config: Config) -> None:
    model = converted(config)
    ids = torch.randint(6, 300, (2, 40))
    plain = layer_losses(model, ids, TransferConfig(mse_weight=0))
    both = layer_losses(model, ids, TransferConfig(mse_weight=0, xent_weight=1.0))
    assert (plain == 0).all()
    assert (both > 0).all()
    layer_losses(model, ids, TransferConfig(mse_weight=0, xent_weight=1.0), backward_scale=1.0)
    assert model.model.layers[0].self_attn.lolcats.phi_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("apart", [False, True])
def test_layer_errors_do_not_depend_on_the_batches(apart: bool, config: Config) -> None:
    """A last batch with fewer rows does not count as much as the others."""
    model, ids = converted(config), torch.randint(6, 300, (9, 40), generator=torch.Generator().manual_seed(0))
    ids[8] = 7  # unlike the others
    places = torch.arange(40).repeat(9, 1)
    places[:, 25:] -= 25
    positions = places if apart else None
    whole = layer_errors(model, [ids], [positions])
    one_by_one = [layer_errors(model, [ids[i : i + 1]], [places[i : i + 1] if apart else None]) for i in range(9)]
    assert whole == pytest.approx(torch.tensor(one_by_one).mean(0).tolist(), rel=1e-4)
    split = layer_errors(model, ids.split(8), places.split(8) if apart else [None, None])
    assert split == pytest.approx(whole, rel=1e-4)


def test_transfer_learns_and_keeps_the_best(config: Config, data: Data, tmp_path: Path) -> None:
    model = converted(config)
    before = layer_errors(model, [data.validation])
    result = transfer(model, data, config, tmp_path)
    after = layer_errors(model, [data.validation])
    assert sum(after) < sum(before)
    assert result.best_loss == pytest.approx(1000 * sum(after) / len(after), rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in lines if "eval_loss" in e] == [3, 6]


def test_early_stopping_and_plateau(settings: list[str], data: Data, tmp_path: Path) -> None:
    changes = ["transfer.max_steps=40", "transfer.eval_steps=1", "transfer.learning_rate=5.0",
               "transfer.early_stopping_patience=3", "transfer.schedule=reduce_on_plateau",
               "transfer.plateau_patience=0"]  # fmt: skip
    config = load_config("paper-sinks", [*settings, *changes])
    result = transfer(converted(config), data, config, tmp_path)
    assert result.steps < 40
    assert result.best_step == result.steps - 3
    rates = [e["learning_rate"] for e in result.history if "learning_rate" in e]
    assert rates[-1] < rates[0]
    # Killed after the stage's last checkpoint: running again trains no further.
    again = transfer(converted(config), data, config, tmp_path)
    assert (again.steps, again.best_step, again.best_loss) == (result.steps, result.best_step, result.best_loss)


def test_gradient_accumulation_changes_nothing(settings: list[str], data: Data, tmp_path: Path) -> None:
    states = []
    for micro in (4, 2, 1):
        config = load_config("paper-sinks", [*settings, f"transfer.micro_batch_size={micro}"])
        model = converted(config)
        transfer(model, data, config, tmp_path / str(micro))
        states.append(feature_map_state(model))
    for name, tensor in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_interrupted_stage_continues_bit_for_bit(
    stage: str, step: int, config: Config, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(directory: Path):
        model = converted(config)
        if stage == "transfer":
            return transfer(model, data, config, directory), model
        wrapped, result = finetune(model, data, config, directory)
        return result, wrapped

    expected, undisturbed = run(tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted, match=f"Stopped in {stage} after step {step}"):
            run(tmp_path / "b")
    result, resumed = run(tmp_path / "b")
    assert result.best_loss == expected.best_loss
    assert result.best_step == expected.best_step
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    keys = ("step", "loss", "eval_loss")
    logs = [
        [tuple(json.loads(line).get(k) for k in keys) for line in (tmp_path / d / "metrics.jsonl").open()] for d in "ab"
    ]
    assert [e for e in logs[1] if e[1:] != (None, None)] == [e for e in logs[0] if e[1:] != (None, None)]


def logged(directory: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times and speeds."""
    entries = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    return [{k: v for k, v in e.items() if not k.endswith(("_runtime", "_per_second"))} for e in entries]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_metrics_of_an_interrupted_stage_2_are_those_of_an_uninterrupted_one(
    step: int, settings: list[str], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops, between logged steps too: running means and the mean of the whole training go on."""
    changes = ["finetune.max_steps=6", "finetune.log_steps=4", "finetune.save_steps=3", "finetune.eval_steps=3"]
    config = load_config("paper-sinks", [*settings, *changes])
    finetune(converted(config), data, config, tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted):
            finetune(converted(config), data, config, tmp_path / "b")
    finetune(converted(config), data, config, tmp_path / "b")
    expected = logged(tmp_path / "a")
    assert [("loss" in e, "eval_loss" in e, "train_loss" in e, e["step"]) for e in expected] == [
        (False, True, False, 3), (True, False, False, 4), (False, True, False, 6), (False, False, True, 6),
    ]  # fmt: skip
    assert logged(tmp_path / "b") == expected


@pytest.mark.parametrize("at", [2, 4, 6])
def test_metrics_after_a_kill_just_after_a_checkpoint(
    at: int, settings: list[str], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves lines that the checkpoint does not have, or lacks the last one."""
    config = load_config("paper-sinks", [*settings, "finetune.max_steps=6", "finetune.log_steps=3"])
    finetune(converted(config), data, config, tmp_path / "a")
    original = StageTrainer._save_checkpoint

    def killed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.state.global_step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(converted(config), data, config, tmp_path / "b")
    for _ in range(2):  # also when it is finished
        finetune(converted(config), data, config, tmp_path / "b")
        assert logged(tmp_path / "b") == logged(tmp_path / "a")


def test_unfinished_checkpoint_is_not_used(config: Config, data: Data, tmp_path: Path, monkeypatch) -> None:
    """A kill between writing a checkpoint of stage 2 and marking it complete falls back to the one before."""
    reference, expected = finetune(converted(config), data, config, tmp_path / "a")
    original = StageTrainer._save_checkpoint

    def killed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.state.global_step == 4:
            (self.directory / "checkpoint-4" / "complete").unlink()
            (self.directory / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(converted(config), data, config, tmp_path / "b")
    assert newest_checkpoint(tmp_path / "b" / "checkpoints" / "finetune").name == "checkpoint-2"
    resumed, result = finetune(converted(config), data, config, tmp_path / "b")
    assert result.best_loss == expected.best_loss
    for name, tensor in reference.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_checkpoints_of_an_older_version_are_refused(config: Config, data: Data, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "transfer" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(LolcatsError, match="left unfinished by an older version"):
        transfer(converted(config), data, config, tmp_path)


def test_nan_stops_with_the_last_good_checkpoint(settings: list[str], data: Data, tmp_path: Path) -> None:
    config = load_config("paper-sinks", [*settings, "finetune.learning_rate=1e30", "finetune.max_grad_norm=0"])
    with pytest.raises(LolcatsError, match="loss became"):
        finetune(converted(config), data, config, tmp_path)


def test_merging_lora_changes_nothing(config: Config, data: Data, tmp_path: Path) -> None:
    wrapped, _ = finetune(converted(config), data, config, tmp_path)
    ids = torch.randint(6, 300, (2, 40))
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(ids).logits
        merged = wrapped.merge_and_unload().eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert type(merged).__name__ == "LolcatsLlamaForCausalLM"


def test_feature_maps_may_train_in_stage_two_at_their_own_rate(settings: list[str], data: Data, tmp_path: Path) -> None:
    config = load_config("paper-sinks", [*settings, "finetune.feature_map_learning_rate=1e-1"])
    model = converted(config)
    before = {n: p.clone() for n, p in feature_map_state(model).items()}
    wrapped, _ = finetune(model, data, config, tmp_path)
    after = feature_map_state(wrapped)
    assert set(after) == set(before)
    assert all((after[n] - p).abs().max() > 0.05 for n, p in before.items() if "weight" in n)


def test_trackers(settings: list[str], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    config = load_config("paper-sinks", [*settings, "report_to=[no_such_tracker]"])
    with pytest.raises(LolcatsError, match="report_to no_such_tracker"):
        transfer(converted(config), data, config, tmp_path)
    pytest.importorskip("tensorboard")
    for coupling in ("joint", "per_layer"):
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        more = [f"transfer.coupling={coupling}", "report_to=[tensorboard]"]
        config = load_config("paper-sinks", [*settings, *more])
        transfer(converted(config), data, config, tmp_path / coupling)
        tags = scalars(tmp_path / coupling / "tensorboard")
        assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "eval/loss", "eval/runtime",
                "train/train_loss", "train/train_runtime"} <= set(tags)  # fmt: skip
        logged = [json.loads(line) for line in (tmp_path / coupling / "metrics.jsonl").open()]
        expected = [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
        assert tags["train/loss"] == [(step, pytest.approx(loss)) for step, loss in expected]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_targets_that_do_not_exist(config: Config) -> None:
    from dataclasses import replace

    with pytest.raises(LolcatsError, match="do not fit this model"):
        add_lora(converted(config), replace(config.finetune, targets=["query_key_value"]))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_micro_batches_change_no_step(
    loss: str, apart: bool, settings: list[str], data: Data, tmp_path: Path
) -> None:  # fmt: skip
    """Steps of 4 and 3 rows: also if the last micro-batch has fewer rows, or documents that begin in rows make some of
    them predict fewer tokens than others."""
    data, histories = replace(data, train=data.train[:7], validation=data.validation[:3]), []
    if apart:
        rows = {"train": data.train, "validation": data.validation, "test": data.test}
        places = {name: torch.arange(x.shape[1]) % (5 + 6 * torch.arange(len(x))[:, None]) for name, x in rows.items()}
        data = replace(data, positions=places)
    for size in (1, 2, 4):
        config = load_config("paper-sinks", [*settings, f"finetune.loss={loss}", f"finetune.micro_batch_size={size}"])
        model = converted(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # logits in which student and teacher differ
        _, result = finetune(model, data, config, tmp_path / str(size))
        histories.append([[e[key] for e in result.history if key in e] for key in ("loss", "grad_norm", "eval_loss")])
    assert [len(part) for part in histories[0]] == [4, 4, 2]
    for other in histories[1:]:
        for found, expected in zip(other, histories[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
