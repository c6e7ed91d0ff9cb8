"""Stage 2 sharded over gloo processes: the same losses, checkpoints and adapter as in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SETTINGS, tiny_model
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lolcats
from lolcats.config import Config, load_config
from lolcats.errors import Interrupted, LolcatsError
from lolcats.files import read_tensors, whole
from lolcats.inputs import Inputs
from lolcats.modeling.base import Base
from lolcats.modeling.checkpoint import load, save_lora
from lolcats.modeling.layer import decoder_layers, linearized_layers
from lolcats.modeling.loss import gathered
from lolcats.pipeline import finish, resume, run_finetune, run_transfer, start
from lolcats.training.data import Data
from lolcats.training.distributed import (
    SHARDED,
    all_reduce_gradients,
    clip_gradients,
    is_sharded,
    load_sharded,
    own_device,
    save_sharded,
)
from lolcats.training.finetune import finetune
from lolcats.training.trainer import BestKeeper, newest_checkpoint, training_arguments

STOP = 2  # steps after which runs are interrupted
PLAIN = [*SETTINGS, "attention.key_maps=per_kv_head"]
TRAINED_MAPS = [*PLAIN, "finetune.feature_map_learning_rate=1e-2", "finetune.gradient_checkpointing=true",
                "finetune.schedule=reduce_on_plateau"]  # fmt: skip


def data() -> Data:
    rows = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(rows[7:], rows[:3], rows[3:7], "", {})  # three rows of validation: not a multiple of the ranks'


def tune(directory: Path, settings: list[str], stop: bool = False, tied: bool = False) -> Any:
    """Stage 2 of a tiny model, saved as LoRA; ``stop``: interrupted on the last rank after ``STOP`` steps."""
    directory.mkdir(exist_ok=True)
    config = load_config("default", settings)
    model = tiny_model(tie_word_embeddings=tied)
    torch.manual_seed(1)
    model = lolcats.convert(model, config)
    with pytest.MonkeyPatch.context() as patch:
        if stop:
            patch.setattr(BestKeeper, "on_step_end", interrupt(BestKeeper.on_step_end))
        wrapped, result = finetune(model, data(), config, directory)
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


def finetune_run(directory: Path) -> None:
    """``lolcats finetune DIR``, twice: the second time there is nothing left to train."""
    for _ in range(2):
        session = resume(directory, say=lambda text: None)
        run_finetune(session)
        finish(session, pictures=False)
        assert is_sharded(session.model) == dist.is_initialized()


def on_two_ranks(root: Path) -> None:
    finetune_run(root / "run_two")
    wrapped, _ = tune(root / "two", PLAIN)
    assert_sharded(wrapped)
    tune(root / "two_maps", TRAINED_MAPS)
    tune(root / "two_tied", PLAIN, tied=True)
    for name in ("two_then_one", "two_then_four"):
        with pytest.raises(Interrupted):
            tune(root / name, PLAIN, stop=True)
    tune(root / "one_then_two", PLAIN)  # begun by one process
    assert_gradients_and_clip()
    assert_round_trip(root / "round_trip")
    with pytest.raises(LolcatsError, match="cannot be shared by 2 ranks"):
        training_arguments(load_config("default", ["finetune.micro_batch_size=8"]).finetune, root, 0,
                           torch.device("cpu"), [])  # fmt: skip


def assert_sharded(wrapped: Any) -> None:
    """Base and LoRA are DTensors of which each rank has a part, feature maps are not."""
    model = wrapped.get_base_model()
    maps = {p for layer in linearized_layers(model) for p in layer.parameters()}
    assert maps
    assert not [p for p in maps if isinstance(p, DTensor)]
    others = [p for p in model.parameters() if p not in maps]
    assert all(isinstance(p, DTensor) for p in others)
    large = decoder_layers(model)[0].mlp.up_proj.weight
    assert large.to_local().numel() * 2 == large.numel()
    head = model.get_output_embeddings()
    with gathered(head):
        assert not isinstance(head.weight, DTensor)
        assert head.weight.shape == (320, 32)
    assert isinstance(head.weight, DTensor)


def assert_gradients_and_clip() -> None:
    """Sharded and whole parameters: one norm over all, and means of gradients over ranks."""
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 3)])
    single = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 3)])
    single.load_state_dict(parts.state_dict())
    fully_shard(parts[0], mesh=init_device_mesh("cpu", (2,)))
    x = torch.randn(2, 5, 6)
    parts[1](parts[0](x[dist.get_rank()])).pow(2).mean().backward()
    single[1](single[0](x)).pow(2).mean().backward()
    all_reduce_gradients(parts.parameters())
    norm = clip_gradients(parts.parameters(), 0.01)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(single.parameters(), 0.01))
    for ours, theirs in zip(parts.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad)


def assert_round_trip(directory: Path) -> None:
    """A checkpoint gives the optimizer back what it had; a damaged one is a sentence."""
    model = fully_shard(nn.Linear(6, 4), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    save_sharded(directory, model, optimizer)
    optimizer.step()
    load_sharded(directory, model, optimizer)
    for parameter, state in before.items():
        for name, value in state.items():
            torch.testing.assert_close(whole(optimizer.state[parameter][name]), whole(value))
    dist.barrier()
    if dist.get_rank() == 0:
        next(directory.glob("*.distcp")).write_bytes(b"")
    dist.barrier()
    with pytest.raises(LolcatsError, match="is damaged, or not of this model"):
        load_sharded(directory, model, optimizer)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path], chat_file: Path) -> Path:
    """Runs of one process, and of two."""
    root = tmp_path_factory.mktemp("ranks")
    config = load_config("default", SETTINGS)
    session = start(Inputs(str(model_dirs["llama"])), str(chat_file), root / "run_one", config, lambda text: None)
    run_transfer(session)
    shutil.copytree(root / "run_one", root / "run_two")
    finetune_run(root / "run_one")
    tune(root / "one", PLAIN)
    tune(root / "one_maps", TRAINED_MAPS)
    tune(root / "one_tied", PLAIN, tied=True)
    with pytest.raises(Interrupted):
        tune(root / "one_then_two", PLAIN, stop=True)
    run_ranks(2, on_two_ranks, root)
    return root


@pytest.mark.parametrize("kind", ["", "_maps", "_tied"])
def test_two_ranks_are_one_process(kind: str, root: Path) -> None:
    assert_same_run(root / f"one{kind}", root / f"two{kind}")


def test_a_run_is_finetuned_by_two_ranks(root: Path) -> None:
    """The base model is read in parts; LoRA, losses and measurements are those of one process."""
    one, two = root / "run_one", root / "run_two"
    assert_same_run(one, two)
    ours, theirs = (json.loads((path / "run.json").read_text())["results"] for path in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ("ppl_teacher", "ppl_student", "ppl_linear_off"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert (one / "merged").is_dir()
    assert not (two / "merged").exists()
    assert not list(two.glob("*.partial*"))
    ids = data().test
    logits = [load(path)(ids).logits for path in (one, two)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_checkpoint_of_two_ranks_continues_in_one_process(root: Path) -> None:
    directory = root / "two_then_one"
    checkpoint = newest_checkpoint(directory / "checkpoints" / "finetune")
    assert checkpoint is not None
    assert len(list((checkpoint / SHARDED).glob("*.distcp"))) == 2
    assert not list(checkpoint.glob("*.safetensors"))
    tune(directory, PLAIN)
    assert_same_run(root / "one", directory)


@pytest.mark.slow
def test_checkpoint_of_two_ranks_continues_on_four(root: Path) -> None:
    run_ranks(4, tune, root / "two_then_four", [*PLAIN, "finetune.micro_batch_size=1"])
    assert_same_run(root / "one", root / "two_then_four")


def test_checkpoint_of_one_process_continues_on_two_ranks(root: Path) -> None:
    assert_same_run(root / "one", root / "one_then_two")


def test_one_process_needs_no_process_group(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.grad.clone()
    all_reduce_gradients(layer.parameters())
    torch.testing.assert_close(layer.weight.grad, before)
    assert isinstance(load_config("default"), Config)
