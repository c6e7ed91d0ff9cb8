"""Stage 2 on gloo processes, with and without sharding: losses, checkpoints and adapter equal those of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS, tiny_model
from support.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import profile

import lolcats
from lolcats.config import Config, load_config
from lolcats.data.inputs import Inputs
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.modeling.checkpoint import load, save_lora
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import decoder_layers, linearized_layers
from lolcats.modeling.loss import gathered
from lolcats.pipeline import finish, measure, resume, run_finetune, run_transfer, start
from lolcats.stages.arguments import training_arguments
from lolcats.stages.distributed import all_reduce_gradients, is_sharded, own_device, shard
from lolcats.stages.finetune.fits import shards
from lolcats.stages.finetune.stage import add_lora, finetune, load_over_ranks
from lolcats.stages.finetune.trainer import BestKeeper, newest_checkpoint
from lolcats.tensors import read_tensors
from lolcats.weights.base import Base, find_base

STOP = 2  # steps after which runs are interrupted
PLAIN = [*SETTINGS, "attention.key_maps=per_kv_head"]
TRAINED_MAPS = [*PLAIN, "finetune.feature_map_learning_rate=1e-2", "finetune.gradient_checkpointing=true",
                "finetune.schedule=reduce_on_plateau"]  # fmt: skip
KEPT = [*SETTINGS, "attention.softmax_heads={0: [1]}"]
TAUGHT = [*KEPT, "finetune.loss=mix", "finetune.kl_temperature=2", "finetune.protect_kept=true",
          "finetune.micro_batch_size=1"]  # fmt: skip
SHARDED, WHOLE = "finetune.sharding=always", "finetune.sharding=never"
FORMS = {"": SHARDED, "_whole": WHOLE}


def data(answers: bool = False) -> Data:
    """``answers``: only some tokens are to be predicted, in some rows none."""
    rows = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    labels = rows.where(torch.arange(32) < torch.arange(40)[:, None] % 4 * 8, -100)
    parts = {"train": labels[7:], "validation": labels[:3]} if answers else {}
    return Data(rows[7:], rows[:3], rows[3:7], "", {}, labels=parts)  # three validation rows: not a multiple of ranks


def tune(
    directory: Path, settings: list[str], stop: bool = False, tied: bool = False, answers: bool = False
) -> Any:  # fmt: skip
    """Stage 2 of a tiny model, saved as LoRA; ``stop``: interrupted on the last rank after ``STOP`` steps."""
    directory.mkdir(exist_ok=True)
    config = load_config("paper-sinks", settings)
    model = tiny_model(tie_word_embeddings=tied)
    torch.manual_seed(1)
    model = lolcats.convert(model, config)
    with pytest.MonkeyPatch.context() as patch:
        if stop:
            patch.setattr(BestKeeper, "on_step_end", interrupt(BestKeeper.on_step_end))
        wrapped, result = finetune(model, data(answers), config, directory)
    save_lora(wrapped, Base("base", "hub", ""), directory / "lora")
    return wrapped, result


def interrupt(on_step_end: Any) -> Any:
    def stopping(self: BestKeeper, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        self.interrupted = last and state.global_step == STOP
        on_step_end(self, args, state, control, **kwargs)

    return stopping


def losses(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k in ("step", "loss", "eval_loss", "grad_norm")} for x in lines]


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = losses(one), losses(other)
    assert len(ours) == len(theirs) > 5
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    ours, theirs = (read_tensors(path / "lora" / "adapter_model.safetensors") for path in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def finetune_run(directory: Path, sharding: str = "") -> None:
    """``lolcats finetune DIR``, twice: the second time there is nothing left to train."""
    for _ in range(2):
        job = resume(directory, say=lambda text: None, sharding=sharding)
        run_finetune(job)
        measure(job)
        finish(job, pictures=False)
        assert is_sharded(job.models.student()) == (sharding == "always")


def on_two_ranks(root: Path) -> None:
    finetune_run(root / "run_two", "always")
    finetune_run(root / "run_two_whole", "never")
    for form, setting in FORMS.items():
        wrapped, _ = tune(root / f"two{form}", [*PLAIN, setting])
        if setting == SHARDED:
            assert_sharded(wrapped)
        else:
            assert not is_sharded(wrapped)
            assert_same_everywhere(wrapped)
        tune(root / f"two_maps{form}", [*TRAINED_MAPS, setting])
        tune(root / f"two_tied{form}", [*PLAIN, setting], tied=True)
        tune(root / f"two_kept{form}", [*KEPT, setting])
        tune(root / f"two_taught{form}", [*TAUGHT, setting], answers=True)
        tune(root / f"two_taught_tied{form}", [*TAUGHT, setting], tied=True)
        with pytest.raises(Interrupted):
            tune(root / f"two_then_one{form}", [*PLAIN, setting], stop=True)
        tune(root / f"one_then_two{form}", [*PLAIN, setting])  # started by one process
    for name, first, then in (("sharded_then_whole", SHARDED, WHOLE), ("whole_then_sharded", WHOLE, SHARDED)):
        with pytest.raises(Interrupted):
            tune(root / name, [*PLAIN, first], stop=True)
        tune(root / name, [*PLAIN, then])
    with pytest.raises(Interrupted):
        tune(root / "two_then_four", [*PLAIN, SHARDED], stop=True)
    assert_gradients()
    for recompute in (False, True):
        assert_units(recompute)
    assert_who_shards(root)
    with pytest.raises(LolcatsError, match="cannot be shared by 2 ranks"):
        training_arguments(load_config("paper-sinks", ["finetune.micro_batch_size=8"]).finetune, root, 0,
                           torch.device("cpu"), [])  # fmt: skip


def assert_sharded(wrapped: Any) -> None:
    """Frozen weights are DTensors, of which each rank has a part; feature maps and LoRA are plain tensors."""
    model = wrapped.get_base_model()
    forward_and_backward(model)  # after which every weight is sharded again
    assert_gathers(model)
    kept = {p for layer in linearized_layers(model) for p in layer.parameters()}
    kept |= {p for name, p in model.named_parameters() if "lora_" in name}
    assert len(kept) == 2 * 3 + 2 * 8  # per layer: maps and gate, LoRA of q, k, v and o
    assert not [p for p in kept if isinstance(p, DTensor)]
    assert all(isinstance(p, DTensor) for p in model.parameters() if p not in kept)
    large = decoder_layers(model)[0].mlp.up_proj.weight
    assert large.to_local().numel() * 2 == large.numel()
    head = model.get_output_embeddings()
    with gathered(head):
        assert not isinstance(head.weight, DTensor)
        assert head.weight.shape == (320, 32)
    assert isinstance(head.weight, DTensor)
    assert_same_everywhere(wrapped)


def forward_and_backward(model: Any) -> None:
    model.get_output_embeddings()(decoder(model)(input_ids=data().test)[0]).sum().backward()
    model.zero_grad()


def assert_gathers(model: Any) -> None:
    """Forward gathers norm, embedding, two layers and head; backward gathers only the first layer. Neither sums
    gradients: those of LoRA are summed at the end of the step."""
    with profile() as profiler:
        forward_and_backward(model)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["c10d::_allgather_base_"] == 6
    assert "c10d::_reduce_scatter_base_" not in counts


def assert_same_everywhere(wrapped: Any) -> None:
    """Check that every rank made exactly the same updates."""
    own = torch.cat([p.detach().flatten() for p in wrapped.parameters() if p.requires_grad])
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own, first)


def assert_gradients() -> None:
    """Means of gradients over ranks."""
    torch.manual_seed(0)
    layer, single = nn.Linear(6, 4), nn.Linear(6, 4)
    single.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 6)
    layer(x[dist.get_rank()]).pow(2).mean().backward()
    single(x).pow(2).mean().backward()
    all_reduce_gradients(layer.parameters())
    for ours, theirs in zip(layer.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def assert_units(recompute: bool) -> None:
    """Units of any number of layers: the outputs and gradients of a whole model, with fewer gathers for larger ones."""
    found, gathers = [], []
    for layers_per_unit in (0, 1, 2, 3):
        config = load_config("paper-sinks", PLAIN)
        model = tiny_model(num_hidden_layers=3)
        torch.manual_seed(1)
        wrapped = add_lora(lolcats.convert(model, config), config.finetune)
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
        if layers_per_unit:
            shard(model, torch.device("cpu"), layers_per_unit=layers_per_unit)
        if recompute:
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with profile() as profiler:
            out = model.get_output_embeddings()(decoder(model)(input_ids=data().test)[0]).pow(2).mean()
            out.backward()
        gathers.append({e.key: e.count for e in profiler.key_averages()}.get("c10d::_allgather_base_", 0))
        found.append([out.detach(), *(p.grad for p in wrapped.parameters() if p.requires_grad)])
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0])
    assert 0 == gathers[0] < gathers[3] < gathers[2] < gathers[1]


def assert_who_shards(root: Path) -> None:
    """With ``auto``, the model is sharded if it does not fit; if one rank must shard, all do."""
    base, cpu = find_base(str(root / "model")), torch.device("cpu")

    def answer(sharding: str, memory: list[int], source: Base = base) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lolcats.stages.finetune.fits.free_host_memory", lambda: memory[dist.get_rank()])
            return shards(
                source, load_config("paper-sinks", [*SETTINGS, f"finetune.sharding={sharding}"]), cpu, torch.float32
            )

    much, little = 16 * 2**30, 2**20
    assert not answer("auto", [much, much])
    assert answer("auto", [little, little])
    assert answer("auto", [much, little])
    assert answer("always", [much, much])
    assert not answer("never", [little, little])
    assert answer("auto", [much, much], Base(str(root / "nothing"), "directory", ""))  # its memory is unknown


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path], chat_file: Path) -> Path:
    """Runs of one process, and of two."""
    root = tmp_path_factory.mktemp("ranks")
    config = load_config("paper-sinks", SETTINGS)
    job = start(Inputs(str(model_dirs["llama"])), str(chat_file), root / "run_one", config, lambda text: None)
    run_transfer(job)
    for form in FORMS:
        shutil.copytree(root / "run_one", root / f"run_two{form}")
    (root / "model").symlink_to(model_dirs["llama"])
    finetune_run(root / "run_one")
    tune(root / "one", PLAIN)
    tune(root / "one_maps", TRAINED_MAPS)
    tune(root / "one_tied", PLAIN, tied=True)
    tune(root / "one_kept", KEPT)
    tune(root / "one_taught", TAUGHT, answers=True)
    tune(root / "one_taught_tied", TAUGHT, tied=True)
    for form in FORMS:
        with pytest.raises(Interrupted):
            tune(root / f"one_then_two{form}", PLAIN, stop=True)
    run_ranks(2, on_two_ranks, root)
    return root


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["", "_maps", "_tied", "_kept", "_taught", "_taught_tied"])
def test_two_ranks_equal_one_process(kind: str, form: str, root: Path) -> None:
    assert_same_run(root / f"one{kind}", root / f"two{kind}{form}")


@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_finetuned_by_two_ranks(form: str, root: Path) -> None:
    """LoRA, losses and measurements equal those of one process; without sharding, all files do."""
    one, two = root / "run_one", root / f"run_two{form}"
    assert_same_run(one, two)
    ours, theirs = (json.loads((path / "run.json").read_text()) for path in (one, two))
    assert theirs["config"]["finetune"]["sharding"] == ("never" if form else "always")
    ours, theirs = ours["results"], theirs["results"]
    assert ours.keys() == theirs.keys()
    for name in ("ppl_teacher", "ppl_student", "ppl_linear_off"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert (one / "merged").is_dir()
    assert (two / "merged").is_dir(), "the merged model is made from the files of a sharded base, too"
    assert not list(two.glob("*.partial*"))
    ids, places = data().test, [one, two, two / "merged"]
    logits = [load(path)(ids).logits for path in places]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_of_two_ranks_continues_in_one_process(form: str, root: Path) -> None:
    """It equals that of one process: all trained tensors, once."""
    directory = root / f"two_then_one{form}"
    checkpoint = newest_checkpoint(directory / "checkpoints" / "finetune")
    assert checkpoint is not None
    assert len(list(checkpoint.glob("*.safetensors"))) == 1
    assert not [path for path in checkpoint.iterdir() if path.is_dir()]
    tune(directory, PLAIN)
    assert_same_run(root / "one", directory)


@pytest.mark.slow
def test_checkpoint_of_two_ranks_continues_on_four(root: Path) -> None:
    run_ranks(4, tune, root / "two_then_four", [*PLAIN, SHARDED, "finetune.micro_batch_size=1"])
    assert_same_run(root / "one", root / "two_then_four")


@pytest.mark.parametrize("name", ["one_then_two", "one_then_two_whole", "sharded_then_whole", "whole_then_sharded"])
def test_checkpoints_continue_on_two_ranks_in_either_form(name: str, root: Path) -> None:
    assert_same_run(root / "one", root / name)


def test_dora_is_not_sharded() -> None:
    config = load_config("paper-sinks", ["finetune.use_dora=true", SHARDED])
    with pytest.raises(LolcatsError, match="does not work with a sharded base model"):
        load_over_ranks(Base("base", "directory", ""), config, torch.float32, torch.device("cpu"))


def test_one_process_needs_no_process_group(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.grad.clone()
    all_reduce_gradients(layer.parameters())
    torch.testing.assert_close(layer.weight.grad, before)
    assert isinstance(load_config("paper-sinks"), Config)
