"""One process of a distributed test: trains stage 1 of a tiny model with several settings, one after another."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import lolcats
from lolcats.config import load_config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.modeling.skeleton import build_skeleton
from lolcats.ranks import ranks
from lolcats.stages.transfer.loop import LayerTrainer
from lolcats.stages.transfer.stage import transfer, transfer_in_turn
from lolcats.tensors import write_tensors
from lolcats.weights.base import find_base, load_model
from support.ranks import as_torchrun


@dataclass
class Task:
    """One run into ``out``; the first rank saves its feature maps there.

    apart: rows hold several documents.
    different: a setting that only the last rank has.
    die: (rank, optimizer step of a layer before whose end it dies).
    """

    out: Path
    settings: Sequence[str]
    apart: bool = False
    different: str = ""
    die: tuple[int, int] | None = None


def train(model_path: Path, task: Task) -> dict[str, torch.Tensor]:
    """The feature maps that this process ends with."""
    here = ranks()
    changed = [task.different] if task.different and here.rank == here.size - 1 else []
    config = load_config("paper-sinks", [*task.settings, *changed])
    rows = torch.randint(6, 300, (33, 32), generator=torch.Generator().manual_seed(0))
    places = torch.arange(32) % (18 + torch.arange(33)[:, None] % 14)  # longer than two windows
    positions = {"train": places[11:], "validation": places[:5], "test": places[5:8]} if task.apart else {}
    data, base = Data(rows[11:], rows[:5], rows[5:8], "fingerprint", {}, positions), find_base(str(model_path))
    if config.transfer.order == "joint":
        model = load_model(base, torch.float32)
        torch.manual_seed(config.seed)
        transfer(lolcats.convert(model, config), data, config, task.out)
    else:
        skeleton = build_skeleton(base, config.attention, torch.float32, torch.device("cpu"), config.seed)
        model = skeleton.model
        transfer_in_turn(skeleton, data, config, task.out)
    return feature_map_state(model)


def work(rank: int, size: int, port: int, model_path: Path, tasks: Sequence[Task]) -> None:
    """Run a whole process; errors are written to OUT/RANK.txt."""
    as_torchrun(rank, size, port)
    for task in tasks:
        if task.die and task.die[0] == rank:
            _die_at(task.die[1])
        try:
            maps = train(model_path, task)
        except LolcatsError as error:
            task.out.mkdir(parents=True, exist_ok=True)
            (task.out / f"{rank}.txt").write_text(str(error))
            if task.die:
                sys.exit(1)
        else:
            if rank == 0:
                write_tensors(maps, task.out / "maps.safetensors")


def _die_at(step: int) -> None:
    original, count = LayerTrainer._end_step, 0

    def counted(self, *rest):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *rest)

    LayerTrainer._end_step = counted
