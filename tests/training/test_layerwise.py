"""Attention transfer in three orders: the same feature maps, also after a kill. Golden values: test_goldens.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import tiny_model
from support.stage_one import APART, CPU, Job, assert_same, logged, packed
from torch import Tensor
from transformers import TrainerCallback

import lolcats
from lolcats.config import TransferConfig, load_config
from lolcats.data.rows import Data, Rows
from lolcats.errors import Interrupted, LolcatsError
from lolcats.modeling.layer import AttentionCall, LinearizedAttention
from lolcats.ranks import Ranks
from lolcats.stages.transfer import orders
from lolcats.stages.transfer.hidden import Boundary, Embeddings
from lolcats.stages.transfer.loop import LayerTrainer
from lolcats.stages.transfer.loss import attention_loss
from lolcats.stages.transfer.orders import join_units
from lolcats.stages.transfer.stage import layer_errors
from lolcats.stages.transfer.units import read_progress
from lolcats.stages.transfer.visits import Visits
from lolcats.weights.base import find_base, load_model


@pytest.fixture
def data() -> Data:
    rows = torch.randint(6, 300, (33, 32), generator=torch.Generator().manual_seed(0))
    return Data(rows[11:], rows[:5], rows[5:8], "fingerprint", {})


@pytest.fixture
def job(data: Data, settings: list[str], tmp_path: Path) -> Job:
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return Job(tmp_path / "model", data, settings)


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", []), ("llama", APART), ("qwen2", ["transfer.xent_weight=0.5"]), ("gemma3", APART),
    ("llama", ["attention.feature_inputs=unrotated"]), ("llama", ["attention.layers={0: window, 2: linear}"]),
])  # fmt: skip
def test_three_orders_give_the_same(family: str, changes: list[str], model_dirs, job: Job, tmp_path: Path) -> None:
    """Gemma 3's first layer uses a sliding window: it is not trained, and only passes the states on."""
    if family != "llama":
        job = replace(job, model=model_dirs[family])
    job.train_in_every_order(tmp_path, *changes)
    assert not list((tmp_path / "blocks").rglob("*.bin"))


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", []), ("llama", APART), ("llama", ["transfer.xent_weight=0.5", "attention.feature_inputs=unrotated"]),
    ("gemma3", ["transfer.micro_batch_size=1"]), ("qwen2", ["attention.layers={0: softmax}", "transfer.block_size=1"]),
])  # fmt: skip
def test_three_orders_keep_documents_apart_alike(
    family: str, changes: list[str], model_dirs, job: Job, tmp_path: Path
) -> None:
    whole, _ = job.train(tmp_path / "whole", job.config("transfer.order=stream"))
    job = replace(job, data=packed(job.data))
    if family != "llama":
        job = replace(job, model=model_dirs[family])
    maps = job.train_in_every_order(tmp_path, *changes)
    assert set(whole) != set(maps) or any(not torch.equal(whole[name], maps[name]) for name in maps)


@pytest.mark.parametrize("order", ["joint", "stream", "blocks"])
def test_documents_of_a_row_do_not_leak(order: str, job: Job, tmp_path: Path, monkeypatch) -> None:
    """Another token in the first document changes neither targets nor outputs of the others, in any layer."""
    data = packed(job.data)
    config = job.config(f"transfer.order={order}", "transfer.max_steps=1")
    seen: list[tuple[int, Tensor]] = []

    def noted(layer: LinearizedAttention, call: AttentionCall, config: TransferConfig) -> Tensor:
        with torch.no_grad():
            output = layer(call.q, call.k, call.v, call.scale, documents=call.documents).transpose(1, 2)
        seen.append((layer.geometry.layer, torch.cat([call.target, output], -1)))
        return attention_loss(layer, call, config)

    def by_layer(rows: Tensor, out: Path) -> list[Tensor]:
        seen.clear()
        replace(job, data=replace(data, train=rows)).train(out, config)
        return [torch.cat([found for index, found in seen if index == layer]) for layer in range(3)]

    monkeypatch.setattr("lolcats.stages.transfer.loop.attention_loss", noted)
    changed = data.train.clone()
    changed[:, 1] = (changed[:, 1] + 7) % 300
    before, after = by_layer(data.train, tmp_path / "a"), by_layer(changed, tmp_path / "b")
    places = data.positions["train"][Visits.draw(len(data.train), config.transfer, config.seed).rows]
    later = (places == 0).cumsum(1) > 1
    assert later.any(1).all()
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old[later], new[later], rtol=0, atol=1e-6)
        same = (old == new).flatten(2).all(-1)
        assert not same[:, 1].any()


def test_layers_are_trained_separately(job: Job, tmp_path: Path) -> None:
    """Layers stop at different steps, and each ends with its own best weights."""
    config = job.config(*APART)
    _, result = job.train(tmp_path / "joint", config)
    model = load_model(find_base(str(job.model)), torch.float32)
    torch.manual_seed(config.seed)
    layers = orders.layers_by_name(lolcats.convert(model, config))
    before = layer_errors(model, [job.data.validation])
    trainer = LayerTrainer(layers, job.data, config, tmp_path / "joint", Ranks(), CPU)
    assert result.errors_before == pytest.approx(before, rel=1e-4)
    assert len({unit.progress.step for unit in trainer.units}) > 1, "choose settings in which layers stop apart"
    trainer.result()
    after = layer_errors(model, [job.data.validation])
    assert result.errors_after == pytest.approx(after, rel=1e-4)
    assert result.best_loss == pytest.approx(1000 * sum(after) / len(after), rel=1e-4)
    for unit in trainer.units:
        assert unit.progress.best_loss == min(e["eval_loss"] for e in unit.progress.history if "eval_loss" in e)


def test_coupling_does_not_matter_for_one_layer(job: Job, tmp_path: Path) -> None:
    """With a single linearized layer both couplings are the same."""
    only = ["attention.layers={0-1: softmax}", "transfer.micro_batch_size=2"]
    maps, _ = job.train(tmp_path / "trainer", job.config(*only, "transfer.coupling=joint"))
    for order in ("joint", "stream"):
        assert_same(maps, job.train(tmp_path / order, job.config(*only, f"transfer.order={order}"))[0])


def test_visits_cover_each_epoch_once() -> None:
    config = load_config("paper-sinks", ["transfer.batch_size=8", "transfer.epochs=2.5"]).transfer
    visits = Visits.draw(22, config, seed=3)
    assert [len(step) for step in visits.steps] == [8, 8, 6, 8, 8, 6, 8, 8]
    assert sorted(visits.rows[:22].tolist()) == sorted(visits.rows[22:44].tolist()) == list(range(22))
    for ranks in (1, 2, 3, 5):
        seen = [b for r in range(ranks) for b in visits.batches(range(8), 2, Ranks(r, ranks))]
        assert sorted(v for batch in seen for v in batch.visits) == list(range(len(visits.rows)))
        assert sum(batch.weight for batch in seen) == pytest.approx(8)
        assert sum(batch.last for batch in seen) == 8 * ranks
    assert [list(c) for c in visits.chunks(16)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(c) for c in visits.chunks(1)] == [[i] for i in range(8)]


class Killed(BaseException):
    """Ends a run at once and leaves only files, as SIGKILL does."""


def kill_at(patch: pytest.MonkeyPatch, owner: type, name: str, call: int, after: bool) -> Callable[[], int]:
    """The ``call``-th call of a method ends the run, before or after it does its work."""
    original, count = getattr(owner, name), 0

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == call and not after:
            raise Killed
        result = original(self, *args, **kwargs)
        if count == call and after:
            raise Killed
        return result

    patch.setattr(owner, name, counted)
    return lambda: count


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("order", ["joint", "stream", "blocks"])
def test_killed_anywhere_continues_bit_for_bit(order: str, apart: bool, job: Job, tmp_path: Path, monkeypatch) -> None:
    """Killed repeatedly in the same directory, at a different place each time; ``apart``: rows of several documents."""
    job = replace(job, data=packed(job.data)) if apart else job
    config = job.config(f"transfer.order={order}", "transfer.early_stopping_patience=0")
    monkeypatch.setattr("lolcats.stages.transfer.hidden.SHARD", 20000)  # several files per boundary
    expected, result = job.train(tmp_path / "a", config)
    kills = [(LayerTrainer, "_end_step", 2, False), (LayerTrainer, "_learn", 5, True), (LayerTrainer, "_save", 1, True),
             (LayerTrainer, "_evaluate", 1, False), (LayerTrainer, "_end_step", 4, True),
             (LayerTrainer, "_evaluate", 1, True), (LayerTrainer, "_learn", 3, False)]  # fmt: skip
    if order == "blocks":
        kills = [(Boundary, "done", 3, False), (Boundary, "done", 2, True), *kills, (Boundary, "remove", 1, False)]
    for kill in kills:
        with monkeypatch.context() as patch:
            kill_at(patch, *kill)
            with pytest.raises(Killed):
                job.train(tmp_path / "b", config)
    maps, again = job.train(tmp_path / "b", config)
    assert_same(expected, maps)
    assert again == result
    assert logged(tmp_path / "b") == logged(tmp_path / "a")


@pytest.mark.parametrize("order", ["joint", "stream", "blocks"])
def test_completed_steps_are_not_repeated(order: str, job: Job, tmp_path: Path, monkeypatch) -> None:
    """A continued run steps each optimizer only from the step that its layer had reached."""
    config = job.config(f"transfer.order={order}", "transfer.early_stopping_patience=0", "transfer.save_steps=1")
    counts = []
    for kill in (5, 10**9):
        with monkeypatch.context() as patch:
            count = kill_at(patch, LayerTrainer, "_save", kill, True)
            steps = kill_at(patch, lolcats.stages.transfer.units.Unit, "update", 10**9, True)
            with contextlib.suppress(Killed):
                job.train(tmp_path / "out", config)
            counts.append(steps())
            assert count() > 0
    assert sum(counts) == 3 * 9


def test_ctrl_c_saves(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    config = job.config("transfer.order=stream")
    expected, _ = job.train(tmp_path / "a", config)
    original = LayerTrainer._end_step

    def interrupted(self, group, units, source, step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        original(self, group, units, source, step)

    with monkeypatch.context() as patch:
        patch.setattr(LayerTrainer, "_end_step", interrupted)
        with pytest.raises(Interrupted, match="Stopped in transfer after step 5 of layer 0"):
            job.train(tmp_path / "b", config)
    assert_same(expected, job.train(tmp_path / "b", config)[0])


def test_blocks_trained_separately_and_joined(job: Job, tmp_path: Path) -> None:
    """Each block in its own directory, without the other's hidden states; then joined."""
    config = job.config("transfer.order=blocks")
    expected, result = job.train(tmp_path / "whole", config)
    for block in (0, 1):
        maps, unfinished = job.train(tmp_path / str(block), config, only=block)
        assert unfinished is None
    assert not torch.equal(maps[next(n for n in maps if ".0." in n)], expected[next(n for n in expected if ".0." in n)])
    join_units(tmp_path / "joined", [tmp_path / "0", tmp_path / "1"])
    maps, joined = job.train(tmp_path / "joined", config)
    assert_same(expected, maps)
    assert joined == result
    with pytest.raises(LolcatsError, match="blocks 0 to 1"):
        job.train(tmp_path / "0", config, only=2)
    other = job.config("transfer.order=blocks", "transfer.learning_rate=0.1")
    job.train(tmp_path / "other", other, only=0)
    with pytest.raises(LolcatsError, match=r"transfer\.learning_rate was 0.5 and is now 0.1"):
        join_units(tmp_path / "1", [tmp_path / "other"])
    with pytest.raises(LolcatsError, match=r"no attention transfer was started"):
        join_units(tmp_path / "1", [tmp_path / "nothing"])


def test_blocks_one_after_another_by_command_share_boundaries(job: Job, tmp_path: Path, monkeypatch) -> None:
    config = job.config("transfer.order=blocks", "transfer.early_stopping_patience=0")
    expected, _ = job.train(tmp_path / "whole", config)
    job.train(tmp_path / "out", config, only=0)
    boundary = tmp_path / "out" / "checkpoints" / "transfer" / "hidden" / "002"
    assert (boundary / "validation.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Embeddings, "read", None)  # nothing starts from the token ids again
        maps, _ = job.train(tmp_path / "out", config, only=1)
    assert_same(expected, maps)


def test_another_job_in_the_same_directory_is_refused(job: Job, tmp_path: Path) -> None:
    job.train(tmp_path / "out", job.config("transfer.order=stream"))
    changes = {
        "transfer.learning_rate=0.1": r"transfer\.learning_rate was 0.5 and is now 0.1",
        "attention.feature_dim=4": r"attention\.feature_dim was 8",
        "seed=4": "seed was 1",
    }
    for change, message in changes.items():
        with pytest.raises(LolcatsError, match=message):
            job.train(tmp_path / "out", job.config("transfer.order=stream", change))
    other = replace(job, data=replace(job.data, fingerprint="others"))
    with pytest.raises(LolcatsError, match="data was 'fingerprint' and is now 'others'"):
        other.train(tmp_path / "out", job.config("transfer.order=stream"))
    path = tmp_path / "out" / "checkpoints" / "transfer" / "job.json"
    path.write_text("{")
    with pytest.raises(LolcatsError, match=r"job\.json is damaged"):
        job.train(tmp_path / "out", job.config("transfer.order=stream"))


def test_too_little_memory_or_disk_is_an_error_before_training(job: Job, tmp_path: Path, monkeypatch) -> None:
    row = 32 * 32 * 4
    with monkeypatch.context() as patch:
        patch.setattr(orders, "free_host_memory", lambda: 11 * row + 2 * 320 * 32 * 4)
        with pytest.raises(LolcatsError, match=r"needs .* GiB of host memory.*transfer.chunk_tokens=160 would fit"):
            job.train(tmp_path / "a", job.config("transfer.order=stream"))
        job.train(
            tmp_path / "b", job.config("transfer.order=stream", "transfer.chunk_tokens=160", "transfer.batch_size=4")
        )
        patch.setattr(orders, "free_host_memory", lambda: 1)
        with pytest.raises(LolcatsError, match=r"needs .* GiB of host memory.*Use a machine with more memory"):
            job.train(tmp_path / "c", job.config("transfer.order=stream"))
    with monkeypatch.context() as patch:
        free = type("Usage", (), {"free": 10})
        patch.setattr(orders.shutil, "disk_usage", lambda path: free)
        with pytest.raises(LolcatsError, match=r"writes .* GiB of hidden states under .* are free there"):
            job.train(tmp_path / "d", job.config("transfer.order=blocks"))
    assert not list(tmp_path.glob("[acd]/**/*.safetensors"))


def test_damaged_files_are_named(job: Job, tmp_path: Path) -> None:
    config = job.config("transfer.order=blocks", "transfer.block_size=1")
    expected, _ = job.train(tmp_path / "whole", config)
    out = tmp_path / "out"
    job.train(out, config, only=0)
    shard = out / "checkpoints" / "transfer" / "hidden" / "001" / "00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(LolcatsError, match=r"001/00000\.bin.*damaged.*Remove .*/001 and run again"):
        job.train(out, config)
    shard.unlink()
    with pytest.raises(LolcatsError, match=r"001/00000\.bin.*is missing"):
        job.train(out, config)
    for file in shard.parent.iterdir():
        file.unlink()
    assert_same(expected, job.train(out, config)[0])
    unit = sorted((out / "checkpoints" / "transfer" / "units").glob("*"))[1]
    unit.write_bytes(unit.read_bytes()[:-8])
    with pytest.raises(LolcatsError, match=rf"{unit.name} is damaged or truncated"):
        job.train(out, config)


def test_rows_may_be_read_on_access(job: Job, tmp_path: Path) -> None:
    config = job.config("transfer.order=stream")
    expected, _ = job.train(tmp_path / "a", config)
    lazily = replace(job, data=replace(job.data, train=Rows(job.data.train)))
    for order in ("stream", "joint"):
        maps, _ = lazily.train(tmp_path / order, job.config(f"transfer.order={order}"))
        assert_same(expected, maps)


def test_rows_of_several_documents_are_another_job(job: Job, tmp_path: Path) -> None:
    """So blocks that were trained on such rows are not joined with others."""
    config = job.config("transfer.order=blocks")
    job.train(tmp_path / "0", config, only=0)
    replace(job, data=packed(job.data)).train(tmp_path / "1", config, only=1)
    with pytest.raises(LolcatsError, match=r"data\.reset_at_documents was"):
        join_units(tmp_path / "1", [tmp_path / "0"])


class Recorder(TrainerCallback):
    """A tracker that keeps what it receives, by name, as (step, value)."""

    logs: ClassVar[dict[str, list[tuple[int, float]]]] = {}
    ended = 0

    def on_log(self, args, state, control, logs=None, **_):
        for name, value in logs.items():
            Recorder.logs.setdefault(name, []).append((state.global_step, value))

    def on_train_end(self, *_, **__):
        Recorder.ended += 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, float]]]:
    monkeypatch.setattr("lolcats.stages.trackers.get_reporting_integration_callbacks", lambda names: [Recorder])
    monkeypatch.setattr(Recorder, "logs", {})
    monkeypatch.setattr(Recorder, "ended", 0)
    return Recorder.logs


OF_LAYER = {"loss": "layer_{}_loss", "grad_norm": "layer_{}_grad_norm", "learning_rate": "layer_{}_learning_rate",
            "eval_loss": "eval_layer_{}_loss"}  # fmt: skip


@pytest.mark.parametrize("order", ["stream", "blocks"])
def test_trackers(order: str, job: Job, tmp_path: Path, recorded) -> None:
    """They receive metrics.jsonl, under the names that a joint run has, and each layer's own log."""
    config = job.config(*APART, f"transfer.order={order}", "report_to=[all]", "transfer.log_steps=2")
    job.train(tmp_path / "out", config)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    for name in {name for line in lines for name in line} - {"stage", "step"}:
        assert recorded.pop(name) == [(line["step"], line[name]) for line in lines if name in line], name
    units = [read_progress(path) for path in sorted((tmp_path / "out").rglob("units/*"))]
    for layer, progress in enumerate(units):
        for name, own in OF_LAYER.items():
            expected = [(entry["step"], entry[name]) for entry in progress.history if name in entry]
            assert recorded.pop(own.format(layer)) == expected
    assert not recorded
    assert Recorder.ended == 1


def test_trackers_of_one_block(job: Job, tmp_path: Path, recorded) -> None:
    """Only what its layers learn: no mean is known."""
    job.train(tmp_path / "out", job.config("transfer.order=blocks", "report_to=[all]"), only=1)
    assert set(recorded) == {name.format(2) for name in OF_LAYER.values()}
    assert Recorder.ended == 1


def test_trackers_receive_nothing_twice(job: Job, tmp_path: Path, recorded, monkeypatch) -> None:
    """A continued run reports the steps that it does."""
    config = job.config("transfer.order=stream", "report_to=[all]", "transfer.save_steps=1",
                        "transfer.early_stopping_patience=0")  # fmt: skip
    with monkeypatch.context() as patch:
        kill_at(patch, LayerTrainer, "_save", 5, True)
        with pytest.raises(Killed):
            job.train(tmp_path / "out", config)
    job.train(tmp_path / "out", config)
    for name in ("loss", *(f"layer_{layer}_loss" for layer in range(3))):
        assert [step for step, _ in recorded[name]] == list(range(1, 10)), name


def test_a_disk_that_fills_up(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that the command line handles, not a signal; with more space, the same command continues."""
    config = job.config("transfer.order=blocks")
    expected, _ = job.train(tmp_path / "a", config)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lolcats.stages.transfer.hidden.os.posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            job.train(tmp_path / "b", config)
    assert_same(expected, job.train(tmp_path / "b", config)[0])


def test_a_loss_that_is_nan(job: Job, tmp_path: Path) -> None:
    config = job.config("transfer.order=stream", "transfer.learning_rate=1e38", "transfer.max_grad_norm=0",
                        "transfer.early_stopping_patience=0")  # fmt: skip
    with pytest.raises(LolcatsError, match="In step 2 of transfer the loss became NaN or infinite in layer 0"):
        job.train(tmp_path / "out", config)


def test_stream_and_blocks_need_per_layer_coupling(settings: list[str]) -> None:
    for order in ("stream", "blocks"):
        with pytest.raises(LolcatsError, match=r"needs transfer\.coupling=per_layer"):
            load_config("paper-sinks", [*settings, f"transfer.order={order}"])
    with pytest.raises(LolcatsError, match=r"transfer\.block_size must be at least 1"):
        load_config("paper-sinks", [*settings, "transfer.block_size=0"])


def test_metrics_keep_other_stages(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"stage": "finetune", "loss": 1.0, "step": 1}\n')
    _, result = job.train(tmp_path / "out", job.config("transfer.order=stream"))
    lines = logged(tmp_path / "out")
    assert lines[0] == {"stage": "finetune", "loss": 1.0, "step": 1}
    assert [{k: v for k, v in line.items() if k != "stage"} for line in lines[1:-1]] == result.history
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert lines[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert [e["step"] for e in result.history if "loss" in e] == list(range(1, result.steps + 1))


@pytest.mark.parametrize("log_steps", [1, 4, 50])
def test_mean_loss_of_layers_that_stop_apart(log_steps: int, job: Job, tmp_path: Path) -> None:
    """Each layer's losses are divided by its own steps, however often they are logged."""
    job.train(tmp_path / "each", config := job.config(*APART))
    layers = orders.layers_by_name(lolcats.convert(load_model(find_base(str(job.model)), torch.float32), config))
    trainer = LayerTrainer(layers, job.data, config, tmp_path / "each", Ranks(), CPU)
    losses = [[e["loss"] for e in unit.progress.history if "loss" in e] for unit in trainer.units]
    assert len({len(own) for own in losses}) > 1
    expected = sum(sum(own) / len(own) for own in losses) / len(losses)
    job.train(tmp_path / "out", job.config(*APART, f"transfer.log_steps={log_steps}"))
    last = logged(tmp_path / "out")[-1]
    assert last["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert last["step"] == max(map(len, losses))
