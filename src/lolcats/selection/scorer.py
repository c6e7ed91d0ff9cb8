"""How far a model with some softmax heads is from its teacher on the answers of recall prompts.

Shapes: B prompts of a batch, T tokens, E hidden size, V vocabulary, N answer tokens, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling.heads import Trial
from lolcats.modeling.install import decoder, inputs_of
from lolcats.modeling.layer import LinearizedAttention, decoder_layers, linearized_layers, override
from lolcats.modeling.loss import Head, find_head
from lolcats.ranks import Ranks
from lolcats.selection.prompts import Scored

Heads = frozenset[tuple[int, int]]
"""(layer, key/value head) pairs."""
PIECE = 256  # answer tokens whose logits are computed at a time


@dataclass
class Batch:
    """Prompts of one length. rows, columns: (N,) where the answer tokens are predicted; truth: (N,) the tokens."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    truth: Tensor
    weights: Tensor
    """(N,) weight of each answer token in the loss; over all batches they sum to 1."""
    answers: list[tuple[str, slice]]
    """Kind and tokens of each answer, places in (N,)."""
    teacher: Tensor = field(default_factory=lambda: torch.empty(0))
    """(N, V) the teacher's log-probabilities."""
    passed: list[Any] = field(default_factory=list)
    """What each decoder layer put out with the heads that were kept at the last :meth:`Scorer.move_to`."""


class Scorer:
    """Scores sets of heads that stay softmax attention; all other heads see only window and sinks.

    Args:
        model: a converted model whose linearized layers have kind ``window`` and all their heads.
        batch_tokens: maximum number of tokens per forward pass.
        record_on: where :meth:`move_to` keeps what decoder layers put out; default: where the model is.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Scored], batch_tokens: int,
        record_on: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.record_on = record_on or model.device
        self.model, self.batch_tokens = model.eval(), batch_tokens
        self.head = self._find_head()
        self.layers = {layer.geometry.layer: layer for layer in linearized_layers(model)}
        self.blocks = list(decoder_layers(model))
        self.depth = {i: self._block_of(layer) for i, layer in self.layers.items()}
        self.at: Heads = frozenset()
        self.passes = 0.0
        """Forward passes of this process so far: 1.0 is one through all layers with all prompts."""
        self.ranks = Ranks()
        """The processes that share the work of :meth:`losses` and :meth:`slopes`, each with a scorer like this one."""
        self.batches = [self._batch(part) for part in _alike(prompts, batch_tokens)]
        for batch in self.batches:
            batch.weights = _weights(batch, prompts).to(batch.ids.device)
        self._ask_teacher()

    @property
    def heads(self) -> list[tuple[int, int]]:
        """All heads that can be kept."""
        return [(i, head) for i, layer in self.layers.items() for head in range(layer.geometry.kv_heads)]

    @torch.no_grad()
    def loss(self, heads: Collection[tuple[int, int]]) -> float:
        """Mean KL from the teacher on answer tokens, in nats; every kind of prompt counts alike.

        Decoder layers below the first one that differs from the last :meth:`move_to` are not computed again.
        """
        chosen = frozenset(heads)
        first = self._first_change(chosen)
        with self._trying(chosen):
            return sum(self._loss(batch, first).item() for batch in self.batches)

    def losses(self, sets: Sequence[Collection[tuple[int, int]]]) -> list[float]:
        """The loss of each set of heads. Ranks get sets of which as many layers have to be computed."""
        order = sorted(range(len(sets)), key=lambda i: self._first_change(frozenset(sets[i])))
        found = dict(zip(order, self.ranks.spread(self.loss, [sets[i] for i in order]), strict=True))
        return [found[i] for i in range(len(sets))]

    def try_memory(self) -> None:
        """Compute what needs the most memory."""
        self.slopes({}, [len(self.batches) - 1])

    @torch.no_grad()
    def move_to(self, heads: Collection[tuple[int, int]]) -> float:
        """Score ``heads``, and keep what every decoder layer puts out: sets near them are then cheaper to score."""
        chosen = frozenset(heads)
        first = self._first_change(chosen)
        self.at, total = chosen, 0.0
        with self._trying(chosen):
            for batch in self.batches:
                del batch.passed[first:]  # before the new ones, since both may not fit
                with _recording(self.blocks[first:], batch.passed, self.record_on):
                    total += self._loss(batch, first).item()
        return total

    def slopes(
        self, shares: Mapping[tuple[int, int], float], batches: Sequence[int] | None = None
    ) -> tuple[float, dict[tuple[int, int], float]]:
        """The loss where each head's output is softmax attention in its share (0 to 1), and its derivatives by the
        shares; negative: more softmax attention lowers the loss.

        Args:
            batches: only these of :attr:`batches`.
        """
        device = self.model.device
        leaves = {
            i: torch.tensor([shares.get((i, g), 0.0) for g in range(layer.geometry.kv_heads)], device=device)
            for i, layer in self.layers.items()
        }
        for leaf in leaves.values():
            leaf.requires_grad_()

        def of_batch(number: int) -> tuple[float, list[float]]:
            batch = self.batches[number]
            loss = self._loss(batch)
            slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            self.passes += 2 * len(batch.ids) * batch.ids.shape[1] / self.tokens
            return loss.item(), torch.cat(slopes).tolist()

        with self._using({i: Trial(shares=leaf) for i, leaf in leaves.items()}), _checkpointed(self.blocks):
            each = self.ranks.spread(of_batch, list(batches or range(len(self.batches))))
        total, slopes = (
            sum(parts) for parts in zip(*((loss, torch.tensor(found)) for loss, found in each), strict=True)
        )
        heads = [(i, g) for i, leaf in leaves.items() for g in range(len(leaf))]
        return total, dict(zip(heads, slopes.tolist(), strict=True))

    @torch.no_grad()
    def exact(self, heads: Collection[tuple[int, int]] | None) -> dict[str, float]:
        """By kind, the share of answers all of whose tokens are the most likely ones. None: the teacher's."""
        if heads is None:
            return self._right([batch.teacher for batch in self.batches])
        with self._trying(frozenset(heads)):
            return self._right([self._predictions(self._hidden(batch)) for batch in self.batches])

    def exacts(self, sets: Sequence[Collection[tuple[int, int]] | None]) -> list[dict[str, float]]:
        """:meth:`exact` of each set of heads."""
        return self.ranks.spread(self.exact, sets)

    def _right(self, predictions: Sequence[Tensor]) -> dict[str, float]:
        right: dict[str, list[bool]] = {}
        for batch, logits in zip(self.batches, predictions, strict=True):
            predicted = logits.argmax(-1)
            for kind, span in batch.answers:
                right.setdefault(kind, []).append(bool((predicted[span] == batch.truth[span]).all()))
        return {kind: sum(values) / len(values) for kind, values in right.items()}

    def _find_head(self) -> Head:
        """
        Raises:
            LolcatsError: the model's output layer has another form.
        """
        if (head := find_head(self.model)) is None:
            name = type(self.model).__name__
            raise LolcatsError(f"{name} has an output layer of a form that selection cannot use.")
        return head

    @torch.no_grad()
    def _ask_teacher(self) -> None:
        with override(self.model, mode="teacher"):
            for batch in self.batches:
                batch.teacher = self._predictions(self._hidden(batch))

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(batch.ids.numel() for batch in self.batches)

    def _first_change(self, heads: Heads) -> int:
        """The first decoder layer that has to be computed for these heads."""
        if not all(batch.passed for batch in self.batches):
            return 0
        return min((self.depth[layer] for layer, _ in heads ^ self.at), default=len(self.blocks) - 1)

    def _trying(self, heads: Heads) -> Any:
        trials = {i: Trial(tuple(sorted(g for layer, g in heads if layer == i))) for i in self.layers}
        return self._using(trials)

    @contextmanager
    def _using(self, trials: Mapping[int, Trial]) -> Iterator[None]:
        for i, trial in trials.items():
            self.layers[i].trial = trial
        try:
            yield
        finally:
            for i in trials:
                self.layers[i].trial = None

    def _loss(self, batch: Batch, first: int = 0) -> Tensor:
        return self._divergence(batch, self._hidden(batch, first))

    def _divergence(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The batch's part of the loss, of hidden states (N, E)."""
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in torch.arange(len(hidden), device=hidden.device).split(PIECE):
            student, teacher = self.head(hidden[part]).log_softmax(-1), batch.teacher[part]
            total = total + (batch.weights[part] * (teacher.exp() * (teacher - student)).sum(-1)).sum()
        return total

    def _predictions(self, hidden: Tensor) -> Tensor:
        """(N, V) log-probabilities of the answer tokens."""
        return torch.cat([self.head(part).log_softmax(-1) for part in hidden.split(PIECE)])

    def _hidden(self, batch: Batch, first: int = 0) -> Tensor:
        """(N, E) hidden states that predict the answer tokens; decoder layers before ``first`` as recorded."""
        self.passes += (1 - first / len(self.blocks)) * batch.ids.numel() / self.tokens
        known = moved(batch.passed[first - 1], batch.ids.device) if first else None  # the last one is all that matters
        return self._answering(batch, first, known)

    def _answering(self, batch: Batch, first: int, known: Any) -> Tensor:
        """Like :meth:`_hidden`, with what the decoder layers before ``first`` put out."""
        with replaced_forward(self.blocks[:first], [lambda *_, **__: known] * first):
            return decoder(self.model)(**inputs_of(batch.ids))[0][batch.rows, batch.columns]

    def _block_of(self, layer: LinearizedAttention) -> int:
        return next(i for i, block in enumerate(self.blocks) if any(m is layer for m in block.modules()))

    def _batch(self, prompts: Sequence[Scored]) -> Batch:
        device = self.model.device
        ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
        rows, columns, answers = list[int](), list[int](), list[tuple[str, slice]]()
        for row, prompt in enumerate(prompts):
            for start, stop in prompt.answers:
                answers.append((prompt.kind, slice(len(rows), len(rows) + stop - start)))
                rows += [row] * (stop - start)
                columns += range(start - 1, stop - 1)
        where = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        return Batch(ids[:, :-1], *where, ids[where[0], where[1] + 1], torch.empty(0), answers)


def _alike(prompts: Sequence[Scored], batch_tokens: int) -> Iterator[list[Scored]]:
    """Prompts of one length together, at most ``batch_tokens`` tokens at a time."""
    lengths = sorted({len(prompt.ids) for prompt in prompts})
    for length in lengths:
        same = [prompt for prompt in prompts if len(prompt.ids) == length]
        size = max(1, batch_tokens // length)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _weights(batch: Batch, prompts: Sequence[Scored]) -> Tensor:
    """(N,) weights of a batch's answer tokens: kinds count alike, and so do the answer tokens of a kind."""
    tokens: dict[str, int] = {}
    for prompt in prompts:
        tokens[prompt.kind] = tokens.get(prompt.kind, 0) + sum(stop - start for start, stop in prompt.answers)
    weights = torch.empty(len(batch.rows))
    for kind, span in batch.answers:
        weights[span] = 1 / (len(tokens) * tokens[kind])
    return weights


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute something else for the duration of the block."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _checkpointed(blocks: Sequence[nn.Module]) -> Any:
    """Keep only what goes into each decoder layer for backward."""

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return replaced_forward(blocks, [again(block.forward) for block in blocks])


def moved(output: Any, place: torch.device) -> Any:
    """What a decoder layer put out, a tensor or a tuple with tensors, on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(place), output)


@contextmanager
def _recording(blocks: Sequence[nn.Module], into: list[Any], place: torch.device) -> Iterator[None]:
    """Append what each decoder layer puts out, moved to ``place``."""
    hooks = [block.register_forward_hook(lambda _, __, output: into.append(moved(output, place))) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
