"""The three orders of the work in attention transfer: ``joint``, ``stream`` and ``blocks`` (see docs/scale.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lolcats.config import Config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.memory import free_host_memory
from lolcats.modeling.install import decoder, inputs_of
from lolcats.modeling.layer import LinearizedAttention
from lolcats.modeling.liger import fused_layers
from lolcats.modeling.skeleton import Skeleton
from lolcats.ranks import Ranks
from lolcats.stages.cuda_graph import Asked, by_kernels, can_capture, in_one_place
from lolcats.stages.transfer.hidden import (
    Boundary,
    Embeddings,
    HostStates,
    Nowhere,
    Source,
    Target,
    Tokens,
    token_rows,
)
from lolcats.stages.transfer.loop import JOB, STAGE, Group, LayerTrainer, LayerwiseResult, compare_jobs, read_job
from lolcats.stages.transfer.units import Unit, read_progress
from lolcats.stages.transfer.visits import VALIDATION, batch_shapes, pieces

Say = Callable[[str], None]
CPU = torch.device("cpu")


def layers_by_name(model: PreTrainedModel) -> dict[str, LinearizedAttention]:
    """The linearized layers by the name of their attention module, in order."""
    return {
        name.removesuffix(".lolcats"): module
        for name, module in model.named_modules()
        if isinstance(module, LinearizedAttention)
    }


def train_joint(
    model: PreTrainedModel, data: Data, config: Config, directory: Path, ranks: Ranks, base: str = ""
) -> LayerwiseResult:  # fmt: skip
    """Steps → layers, with the whole model on the device. Works with either coupling."""
    layers = layers_by_name(model)
    trainer = LayerTrainer(layers, data, config, directory, ranks, model.device, base)
    total = len(trainer.visits.steps)
    first = min((unit.progress.step for unit in trainer.units if not unit.finished), default=total)

    def run(ids: Tensor, positions: Tensor | None) -> Tensor:
        return decoder(model)(**inputs_of(ids, positions))[0]

    model.eval()
    trainer.graphs.asked = graph_for(config.transfer.cuda_graph, model, data, ranks)
    trainer.track(model)
    source = Tokens(data.train, data.validation)
    group = Group(list(layers.values()), run, trainer.units)
    with fused_layers(model, config.transfer.liger), _progress(trainer, total, first) as bar:

        def tick(step: int) -> None:
            bar.update()
            if step % config.transfer.log_steps == 0 or step % config.transfer.eval_steps == 0:
                trainer.write_metrics()
                bar.set_postfix(trainer.last_losses())

        trainer.tick = tick
        if not trainer.finished:
            trainer.pass_rows(group, source, Nowhere(), range(first, total))
    return trainer.result()


def graph_for(asked: Asked, model: PreTrainedModel, data: Data, ranks: Ranks) -> Asked:
    """``transfer.cuda_graph`` for this run. ``auto`` becomes False where no graph has been measured: several ranks
    or devices, documents in rows, kept heads, experts, and layers that the kernels do not compute (in fp32, say)."""
    if not asked or not can_capture(model.device):
        return False
    if asked != "auto":
        return asked
    plain = in_one_place(model, ranks) and not data.positions
    measured = (layer.kept is None and by_kernels(layer, model) for layer in layers_by_name(model).values())
    return "auto" if plain and all(measured) else False


class LayerByLayer:
    """The orders that load one layer or block after another onto the device. ``coupling`` must be ``per_layer``.

    Args:
        skeleton: its linearized layers are trained in place, and kept in host memory between turns.
        directory: run directory.
    """

    def __init__(
        self, skeleton: Skeleton, data: Data, config: Config, directory: Path, ranks: Ranks, base: str = "",
        say: Say = lambda text: None,
    ) -> None:  # fmt: skip
        self.skeleton, self.data, self.config, self.ranks, self.say = skeleton, data, config.transfer, ranks, say
        self.device, self.count = skeleton.device, len(skeleton.layers)
        layers = layers_by_name(skeleton.model)
        self.trainer = LayerTrainer(layers, data, config, directory, ranks, self.device, base)
        self.visits, self.steps = self.trainer.visits, range(len(self.trainer.visits.steps))
        self.units: dict[int, Unit] = {
            i: self.trainer.unit_of(layer) for i in range(self.count) if (layer := skeleton.attention(i)) is not None
        }
        self.length = token_rows(data.train, torch.tensor([0])).shape[1]

    def unfinished(self, steps: range, layers: range) -> list[int]:
        """The indices in ``layers`` of layers that still have to learn from ``steps``."""
        units = self.units
        return [
            i for i in layers if i in units and not units[i].finished and units[i].progress.step < steps.stop
        ]  # fmt: skip

    def stream(self) -> LayerwiseResult:
        """Chunks of tokens → layers → steps, with the hidden states of a chunk in host memory."""
        chunks = self.visits.chunks(max(1, self.config.chunk_tokens // self.length))
        self._prepare()
        self._check_memory(max(len(self._visits_of(steps)) for steps in chunks))
        self.trainer.track(self.skeleton.model, one_by_one=True)
        done = sum(unit.progress.step for unit in self.units.values())
        with self._fused(), _progress(self.trainer, len(self.units) * len(self.steps), done) as bar:
            for number, steps in enumerate(chunks, 1):
                bar.set_description(f"transfer, chunk {number} of {len(chunks)}")
                if waiting := self.unfinished(steps, range(self.count)):
                    self._chunk(steps, waiting[-1])
                    self.trainer.write_metrics()
                    self.say(f"  chunk {number} of {len(chunks)}: {self._state()}")
        return self.trainer.result()

    def _chunk(self, steps: range, last: int) -> None:
        """Pass the rows of some steps through all layers up to ``last``."""
        states = HostStates(self.device, self._evaluates_in(steps))
        self.skeleton.read_ahead(0)
        with self.skeleton.brought([-1]), torch.no_grad():
            source = Embeddings(self.data, self.skeleton)
            for batch in [*self.visits.batches(steps, self.config.rows_at_once, self.ranks), *self._validation]:
                if batch.visits and states.wants(batch.step):
                    states.write(batch, source.read(batch))
            states.done(VALIDATION)
        for index in range(last + 1):
            with self._group(range(index, index + 1)) as group:
                if index < last:
                    self.skeleton.read_ahead(index + 1)
                self.trainer.pass_rows(group, states, states if index < last else Nowhere(), steps)

    def blocks(self, only: int | None = None) -> LayerwiseResult | None:
        """Blocks of layers → steps → layers, with the hidden states between two blocks on disk.

        Args:
            only: train only this block.

        Returns:
            None while layers of other blocks are untrained.
        """
        blocks = list(pieces(range(self.count), self.config.block_size))
        if only is not None and not 0 <= only < len(blocks):
            raise LolcatsError(
                f"--block {only} does not exist: with transfer.block_size={self.config.block_size}, this model of "
                f"{self.count} layers has the blocks 0 to {len(blocks) - 1}."
            )
        wanted = [n for n, block in enumerate(blocks) if only in (None, n) and self.unfinished(self.steps, block)]
        if wanted:
            self._run_blocks(blocks, wanted, only)
        if self.trainer.finished:
            return self.trainer.result()
        self.trainer.close()
        return None

    def _run_blocks(self, blocks: list[range], wanted: list[int], only: int | None) -> None:
        self._prepare()
        boundaries = {n: self._boundary(block.start) for n, block in enumerate(blocks) if n}
        start = max(n for n in range(wanted[0] + 1) if n == 0 or boundaries[n].complete)
        last = wanted[-1] if only is None else min(wanted[-1] + 1, len(blocks) - 1)  # last boundary to write
        self._check_disk([boundaries[n] for n in range(max(start, 1), last + 1)])
        self.trainer.track(self.skeleton.model, one_by_one=True)
        total = sum(len(self.steps) for n in wanted for i in blocks[n] if i in self.units)
        with self._fused(), _progress(self.trainer, total, 0) as bar:
            for number in range(start, wanted[-1] + 1):
                bar.set_description(f"transfer, block {number} (of 0 to {len(blocks) - 1})")
                target: Target = boundaries[number + 1] if number < last else Nowhere()
                with ExitStack() as stack:
                    source: Source = boundaries[number] if number else self._embeddings(stack)
                    group = stack.enter_context(self._group(blocks[number]))
                    self.trainer.pass_rows(group, source, target, self.steps, learn=number in wanted)
                if number and (only is None or number > start):
                    boundaries[number].remove()
                self.trainer.write_metrics()
                self.say(f"  block {number} (of 0 to {len(blocks) - 1}): {self._state()}")

    def _embeddings(self, stack: ExitStack) -> Embeddings:
        stack.enter_context(self.skeleton.brought([-1]))
        return Embeddings(self.data, self.skeleton)

    def _boundary(self, layer: int) -> Boundary:
        shape = (self.length, self.skeleton.width)
        place = self.trainer.directory / "hidden" / f"{layer:03d}"
        rows = len(self.data.validation)
        return Boundary(place, self.visits, rows, shape, self.skeleton.dtype, self.ranks)

    @contextmanager
    def _group(self, indices: range) -> Iterator[Group]:
        units = [self.units[i] for i in indices if i in self.units]

        def run(hidden: Tensor, positions: Tensor | None) -> Tensor:
            calls = self.skeleton.calls(hidden, positions)
            for index in indices:
                hidden = self.skeleton.run(index, hidden, calls)
            return hidden

        with self.skeleton.brought(indices):
            try:
                for unit in units:
                    unit.to(self.device)
                yield Group([layer for unit in units for layer in unit.layers], run, units)
            finally:
                for unit in units:
                    unit.to(CPU)

    @property
    def _validation(self) -> list[Any]:
        return self.trainer.validation

    def _prepare(self) -> None:
        if self.data.positions:
            return self.skeleton.prepare_packed(self.length)
        batches = self.visits.batches(self.steps, self.config.rows_at_once, self.ranks)
        self.skeleton.prepare(sorted(batch_shapes(batches) | batch_shapes(self._validation)), self.length)

    def _fused(self) -> Any:
        return fused_layers(self.skeleton.model, self.config.liger, self.device)

    def _evaluates_in(self, steps: range) -> bool:
        every, total = self.config.eval_steps, len(self.steps)
        return steps.start == 0 or steps.stop == total or steps.stop // every > steps.start // every

    def _visits_of(self, steps: range) -> range:
        return range(self.visits.steps[steps[0]].start, self.visits.steps[steps[-1]].stop)

    def _state(self) -> str:
        done = sum(unit.finished for unit in self.units.values())
        steps = min(unit.progress.step for unit in self.units.values())
        return f"{done} of {len(self.units)} layers finished, all trained for at least {steps} steps"

    def _check_memory(self, rows: int) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        row = self.length * self.skeleton.width * self.skeleton.dtype.itemsize
        fixed = 2 * max(map(self.skeleton.bytes, range(-1, self.count))) * here + len(self.data.validation) * row
        needed, free = fixed + rows * row * here // self.ranks.size, free_host_memory()
        if needed > free:
            fits = max(0, free - fixed) * self.ranks.size // here // row * self.length
            raise LolcatsError(
                f"transfer.order=stream needs {needed / 2**30:.1f} GiB of host memory ({fixed / 2**30:.1f} for weights "
                f"and validation rows, the rest for hidden states of {rows * self.length:,} tokens), but only "
                f"{free / 2**30:.1f} GiB are free. "
                + (f"transfer.chunk_tokens={fits} would fit." if fits else "Use a machine with more memory.")
            )

    def _check_disk(self, boundaries: Sequence[Boundary]) -> None:
        """Check that the disk has room for two boundaries, the most that exist at a time."""
        needed = max((sum(b.missing_bytes for b in boundaries[n : n + 2]) for n in range(len(boundaries))), default=0)
        place = next(p for p in (self.trainer.directory, *self.trainer.directory.parents) if p.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise LolcatsError(
                f"transfer.order=blocks writes {needed / 2**30:.1f} GiB of hidden states under "
                f"{self.trainer.directory}, but only {free / 2**30:.1f} GiB are free there. Free some space, train on "
                "fewer tokens, or use transfer.order=stream, which writes none."
            )


def join_units(directory: Path, others: Sequence[Path]) -> None:
    """Copy the units that other run directories have trained further than ``directory``. All must do the same job."""
    here = directory / "checkpoints" / STAGE
    known = own = read_job(here)
    for other in others:
        there = other / "checkpoints" / STAGE
        job = read_job(there)
        if job is None:
            raise LolcatsError(f"--join {other}: no attention transfer was started ({there / JOB} is missing).")
        if known is not None:
            compare_jobs(known, job, there)
        known = job
        (here / "units").mkdir(parents=True, exist_ok=True)
        for path in sorted((there / "units").glob("*.safetensors")):
            ours, steps = here / "units" / path.name, read_progress(path).step
            if not ours.exists() or read_progress(ours).step < steps:
                partial = ours.with_name(ours.name + ".partial")
                shutil.copyfile(path, partial)
                partial.replace(ours)
    if own is None and known is not None:
        write_text(here / JOB, json.dumps(known, indent=1) + "\n")


@contextmanager
def _progress(trainer: LayerTrainer, total: int, done: int) -> Iterator[Any]:
    """Show a progress bar of optimizer steps (of layers), in a terminal."""
    with tqdm(total=total, initial=done, desc=STAGE, disable=None if trainer.ranks.is_first else True) as bar:
        trainer.tick = lambda step: bar.update()
        yield bar
