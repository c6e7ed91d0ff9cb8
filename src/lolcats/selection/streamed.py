"""Scores of sets of heads for a model of which one decoder layer at a time is on the device.

What is asked for together is computed in one pass over the weights, since sets differ only in which heads are kept: a
layer comes to the device once, and every set goes through it. Only embeddings, last norm and output layer stay.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lolcats.memory import device_room, free_host_memory
from lolcats.modeling.heads import Trial
from lolcats.modeling.layer import decoder_layers, override
from lolcats.modeling.loss import Head
from lolcats.modeling.skeleton import Skeleton
from lolcats.selection.prompts import Scored
from lolcats.selection.scorer import Batch, Heads, Scorer, moved, replaced_forward
from lolcats.weights.shards import WeightSource

AT_ONCE = 32
"""Most sets that go through a layer together."""
SHARE = 0.25
"""Of the free memory of a GPU, what the hidden states of sets may take."""
SPARE = 8 << 30
"""Bytes of host memory that weights which are kept leave free, besides what the scorer records."""


class StreamedScorer(Scorer):
    """A :class:`~lolcats.selection.scorer.Scorer` that reads weights layer by layer.

    Args:
        skeleton: of a model as ``Scorer`` takes it. Its weights outside of the layers stay on the device from now on.
        record_on: default: host memory.
    """

    def __init__(
        self, skeleton: Skeleton, prompts: Sequence[Scored], batch_tokens: int, record_on: torch.device | None = None
    ) -> None:
        self.skeleton = skeleton
        self.streams = 0.0
        """Passes over the weights so far: 1.0 brings every layer to the device once."""
        self.known: dict[Heads, float] = {}
        skeleton.bring_rest()
        skeleton.embed(torch.zeros(1, 4, dtype=torch.long, device=skeleton.device))  # tells what layers take and return
        if not isinstance(skeleton.source, Kept):
            tokens = sum(len(prompt.ids) for prompt in prompts)
            recorded = len(skeleton.layers) * tokens * skeleton.width * skeleton.dtype.itemsize
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this host, each with records of its own
            skeleton.source = Kept(skeleton.source, SPARE + recorded * processes)
        super().__init__(skeleton.model, prompts, batch_tokens, record_on or torch.device("cpu"))

    def loss(self, heads: Collection[tuple[int, int]]) -> float:
        return self.losses([heads])[0]

    def losses(self, sets: Sequence[Collection[tuple[int, int]]]) -> list[float]:
        """The loss of each set of heads, in one pass over the weights. A set that is scored without others is moved to,
        since a search goes on from there."""
        chosen = [frozenset(heads) for heads in sets]
        if len(chosen) == 1:
            return [self.ranks.shared(self.move_to(chosen[0]))]
        return self._spread(self._losses, chosen)

    @torch.no_grad()
    def move_to(self, heads: Collection[tuple[int, int]]) -> float:
        chosen = frozenset(heads)
        if chosen == self.at and chosen in self.known:
            return self.known[chosen]
        first = self._first_change(chosen)
        for batch in self.batches:
            del batch.passed[first:]
        self.at = chosen  # what is recorded below ``first`` is that of both
        (hidden,) = self._through([chosen], first, record=True)
        self.known = {chosen: self._total(hidden)}
        return self.known[chosen]

    def slopes(
        self, shares: Mapping[tuple[int, int], float], batches: Sequence[int] | None = None
    ) -> tuple[float, dict[tuple[int, int], float]]:
        """As :meth:`Scorer.slopes`, of whole heads only. Layers come in the opposite order, each with what went into it
        when the scorer moved to these heads."""
        if set(shares.values()) - {1.0}:
            raise ValueError("streamed slopes are those of sets of heads")
        self.move_to(list(shares))
        asked = list(batches or range(len(self.batches)))
        parts = self._spread(lambda numbers: [self._slopes(numbers)] * len(numbers), asked)
        each = parts[: self.ranks.size]  # a rank's sum comes once for each of its batches
        total, slopes = (sum(part) for part in zip(*((loss, torch.tensor(s)) for loss, s in each), strict=True))
        return total, dict(zip(self.heads, slopes.tolist(), strict=True))

    @torch.no_grad()
    def exact(self, heads: Collection[tuple[int, int]] | None) -> dict[str, float]:
        return self.exacts([heads])[0]

    def exacts(self, sets: Sequence[Collection[tuple[int, int]] | None]) -> list[dict[str, float]]:
        return self._spread(self._exacts, [None if heads is None else frozenset(heads) for heads in sets])

    def try_memory(self) -> None:
        """The backward pass of the last layer on the largest batch."""
        batch = self.batches[-1]
        with self._brought(len(self.blocks) - 1):
            hidden = self._input(batch, 0)
            self._back(len(self.blocks) - 1, frozenset(), hidden, torch.ones_like(hidden))

    def _spread(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """The results of ``function`` of many items, of which each rank computes every ``size``-th in one call."""
        size = self.ranks.size
        parts = self.ranks.spread(lambda rank: function(items[rank::size]), range(size))
        return [parts[i % size][i // size] for i in range(len(items))]

    @torch.no_grad()
    def _losses(self, sets: Sequence[Heads]) -> list[float]:
        return [self._total(hidden) for some in self._together(sets) for hidden in self._through(some)]

    @torch.no_grad()
    def _exacts(self, sets: Sequence[Heads | None]) -> list[dict[str, float]]:
        streamed = (
            hidden
            for some in self._together([heads for heads in sets if heads is not None])
            for hidden in self._through(some)
        )
        teacher = [batch.teacher for batch in self.batches]
        return [self._right(teacher if heads is None else self._predicted(next(streamed))) for heads in sets]

    def _predicted(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(self.batches, hidden, strict=True)
        return [self._predictions(self._answers(batch, last)) for batch, last in parts]

    @torch.no_grad()
    def _ask_teacher(self) -> None:
        with override(self.model, mode="teacher"):
            (hidden,) = self._through([None], first=0)
        for batch, known in zip(self.batches, self._predicted(hidden), strict=True):
            batch.teacher = known

    def _together(self, sets: Sequence[Heads]) -> Iterator[Sequence[Heads]]:
        """As many sets at a time as the device has room for, those alike in their first change together."""
        most = AT_ONCE
        if self.skeleton.device.type == "cuda":
            size = self.tokens * self.skeleton.width * self.skeleton.dtype.itemsize
            most = max(1, min(most, int(SHARE * device_room(self.skeleton.device) / size)))
        return (sets[i : i + most] for i in range(0, len(sets), most))

    def _through(
        self, sets: Sequence[Heads | None], first: int | None = None, record: bool = False
    ) -> list[list[Tensor]]:
        """What the last layer puts out for each set and batch. Each set starts at its first change from :attr:`at`, or
        at ``first``. None: without a trial."""
        starts = [self._first_change(heads or frozenset()) if first is None else first for heads in sets]
        hidden: list[list[Tensor]] = [[] for _ in sets]
        for index in range(min(starts), len(self.blocks)):
            with self._brought(index, index + 1):
                for heads, start, states in zip(sets, starts, hidden, strict=True):
                    if start == index:
                        states += [self._input(batch, index) for batch in self.batches]
                    if start <= index:
                        with nullcontext() if heads is None else self._trying(heads):
                            self._one_layer(index, states, record)
        for start in starts:
            self.passes += 1 - start / len(self.blocks)
        return hidden

    def _one_layer(self, index: int, states: list[Tensor], record: bool) -> None:
        for number, batch in enumerate(self.batches):
            states[number] = self.skeleton.run(index, states[number], self.skeleton.calls(states[number]))
            if record:
                batch.passed.append(moved(states[number], self.record_on))

    def _slopes(self, numbers: Sequence[int]) -> tuple[float, list[float]]:
        """The loss of some batches, and its derivatives by the share of each head."""
        total, slopes = 0.0, dict.fromkeys(self.heads, 0.0)
        gradients: dict[int, Tensor] = {}
        for number in numbers:
            batch = self.batches[number]
            last = moved(batch.passed[-1], self.skeleton.device).detach().requires_grad_()
            loss = self._divergence(batch, self._answers(batch, last))
            (gradients[number],) = torch.autograd.grad(loss, [last])
            total += loss.item()
        for index in reversed(range(len(self.blocks))):
            with self._brought(index, index - 1):
                for number in numbers:
                    hidden = self._input(self.batches[number], index)
                    gradients[number], own = self._back(index, self.at, hidden, gradients[number])
                    for head, slope in own.items():
                        slopes[head] += slope
        self.passes += 2 * sum(self.batches[number].ids.numel() for number in numbers) / self.tokens
        return total, list(slopes.values())

    def _back(
        self, index: int, heads: Heads, hidden: Tensor, gradient: Tensor
    ) -> tuple[Tensor, dict[tuple[int, int], float]]:  # fmt: skip
        """The gradient of a layer's input, and of the share of softmax attention in each of its heads."""
        layer = self.skeleton.attention(index)
        leaf = torch.zeros(0, device=self.skeleton.device)
        number = -1 if layer is None else layer.geometry.layer
        if layer is not None:
            shares = [float((number, head) in heads) for head in range(layer.geometry.kv_heads)]
            leaf = torch.tensor(shares, device=self.skeleton.device, requires_grad=True)
        hidden = hidden.detach().requires_grad_()
        with self._using({} if layer is None else {number: Trial(shares=leaf)}):
            out = self.skeleton.run(index, hidden, self.skeleton.calls(hidden))
        wanted = [hidden] if layer is None else [hidden, leaf]
        found = torch.autograd.grad(out, wanted, gradient)
        return found[0], {(number, head): slope for head, slope in enumerate(found[1].tolist())} if layer else {}

    def _input(self, batch: Batch, index: int) -> Tensor:
        """What goes into layer ``index`` with the heads of :attr:`at`."""
        if index:
            return moved(batch.passed[index - 1], self.skeleton.device)
        return self.skeleton.embed(batch.ids)

    def _answers(self, batch: Batch, last: Tensor) -> Tensor:
        """(N, E) hidden states that predict the answer tokens, from what the last layer put out."""
        return self._answering(batch, len(self.blocks), (last,) if self.skeleton.tuples else last)

    def _total(self, hidden: Sequence[Tensor]) -> float:
        parts = zip(self.batches, hidden, strict=True)
        return sum(self._divergence(batch, self._answers(batch, last)).item() for batch, last in parts)

    @contextmanager
    def _brought(self, index: int, coming: int = -1) -> Iterator[None]:
        """A layer on the device, while the next one is read."""
        with self.skeleton.brought([index]):
            if 0 <= coming < len(self.blocks):
                self.skeleton.read_ahead(coming)
            yield
        self.streams += 1 / len(self.blocks)

    def _find_head(self) -> Head:
        """In a call in which layers pass their input on."""

        def passed_on(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return (hidden,) if self.skeleton.tuples else hidden

        blocks = list(decoder_layers(self.model))
        with replaced_forward(blocks, [passed_on] * len(blocks)):
            return super()._find_head()


class Kept:
    """A source of weights that keeps what it has read in host memory, as long as there is room: what comes first."""

    def __init__(self, source: WeightSource, spare: float) -> None:
        self.source, self.spare, self.ahead = source, spare, source.ahead
        self.kept: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        self.source.check(wanted)

    def read(self, wanted: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        key = tuple(wanted)
        if key in self.kept:
            return dict(self.kept[key])
        found = self.source.read(wanted, device)
        if self.ahead and free_host_memory() - sum(t.nbytes for t in found.values()) > self.spare:
            self.kept[key] = dict(found)
        return found
