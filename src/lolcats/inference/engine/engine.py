"""Continuous batching over states of fixed size: a table of slots, prompts prefilled in pieces between decode steps.

Running requests occupy slots 0 .. n−1; when one ends, the last moves into its slot and a waiting one takes the place
behind. A decode step computes the smallest of ``batch_sizes`` that holds them, always with the same shapes and on the
same memory, whatever the rows' lengths: what is behind the running rows is computed and thrown away.

A request's tokens depend on its prompt, parameters and seed, and on nothing else in the engine: rows are computed
independently, and prefill pieces end at the same tokens whatever else runs. Sums are rounded differently by matrix
products of different batch sizes (in fp32 about 1e-6 of a logit); a single batch size excludes that too.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lolcats.attention import AttentionState
from lolcats.attention.dispatch import uses_decode_kernel
from lolcats.errors import LolcatsError
from lolcats.inference.engine.graphs import DecodeGraphs, Landing, capture
from lolcats.inference.engine.sampling import BatchSampler, Sampler, SamplingParams, TokenLogprob
from lolcats.inference.engine.states import PrefillCache, PrefixCache, SlotTable, Snapshot
from lolcats.inference.engine.text import Detokenizer, StopStrings
from lolcats.modeling.layer import LinearizedAttention, linearized_layers
from lolcats.modeling.liger import fused_layers

log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(slots=True)
class Delta:
    """What one step added to a request: text that can be shown, tokens, and on the last one why it ended."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None = None
    snapshot: Snapshot | None = None
    error: str = ""


@dataclass(eq=False)
class Request:
    """A prompt on its way through the engine.

    Args:
        prompt: token ids; with ``start`` those that follow its tokens.
        on_delta: called from the engine's thread.
        keep_state: the last delta carries a snapshot behind all tokens but the last sampled one.
        text: whether deltas have text; without it stop strings are not looked for.
    """

    prompt: list[int]
    params: SamplingParams
    on_delta: Callable[[Delta], None]
    start: Snapshot | None = None
    keep_state: bool = False
    text: bool = True
    generated: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Prompt tokens whose keys are in the state."""
    cached: int = 0
    """Of these, how many came from the prefix cache."""

    def begin(self, tokenizer: Any) -> None:
        history = [*(self.start.tokens if self.start else ()), *self.prompt]
        self.sampler = Sampler(self.params, history)
        self.detokenizer, self.stops = Detokenizer(tokenizer), StopStrings(self.params.stop)
        self.cache: PrefillCache | None = None

    @property
    def first(self) -> int:
        """Position of the next prompt token."""
        return self.prefilled + (len(self.start.tokens) if self.start else 0)

    @property
    def history(self) -> list[int]:
        return [*(self.start.tokens if self.start else ()), *self.prompt, *self.generated]


class Engine:
    """Generates for many requests at once with a linearized model. Not thread-safe: see :mod:`.worker`.

    On a CPU it changes how the model's weights lie in memory, not what they are.

    Args:
        slots: most requests that run at once.
        piece: most prompt tokens computed between two decode steps.
        prefix_bytes: memory for states of prompts' beginnings.
        batch_sizes: rows that a decode step computes; powers of two up to ``slots`` by default.
        stop_tokens: end a request; the model's and tokenizer's end-of-sequence tokens by default.
        state_dtype: of the sums S in the slots, fp32 or bf16.
        prefill_rows: prompts of one length, no longer than a piece, that are prefilled together.
        graphs: whether decode steps are CUDA graphs; by default on CUDA where the decode kernel takes every layer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, slots: int = 16, piece: int = 256, prefix_bytes: int = 256 << 20,
        batch_sizes: Sequence[int] | None = None, stop_tokens: Sequence[int] | None = None,
        state_dtype: torch.dtype = torch.float32, prefill_rows: int = 1, graphs: bool | None = None,
    ) -> None:  # fmt: skip
        check_model(model)
        self.model, self.tokenizer, self.piece, self.prefill_rows = model.eval(), tokenizer, piece, prefill_rows
        if model.device.type == "cpu":
            lay_out_for_vectors(model)
        self.layers = {layer.geometry.layer: layer for layer in linearized_layers(model)}
        self.table = SlotTable(self.layers, slots, model.dtype, model.device, state_dtype)
        self.batch_sizes = sorted({*(batch_sizes or (1 << i for i in range(slots.bit_length()))), slots})
        self.stop_tokens = frozenset(end_tokens(model, tokenizer) if stop_tokens is None else stop_tokens)
        self.prefixes = PrefixCache(prefix_bytes, piece)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.flying: tuple[list[Request], Landing] | None = None
        """Of a step that was launched ahead: its requests in the order of its rows, and their tokens."""
        self.sampler = BatchSampler()
        self.inputs = torch.zeros(2, slots, dtype=torch.long, pin_memory=model.device.type == "cuda")
        """Of each slot, on the host: its newest token, whose key is not in the state yet, and that token's position."""
        self.keep_logits = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self.resources = ExitStack()
        try:
            self.resources.enter_context(fused_layers(model, True))
        except LolcatsError as error:
            log.warning("Generating without liger-kernel: %s", error)
        self.graphs: DecodeGraphs | None = None
        if graphs if graphs is not None else model.device.type == "cuda" and self._has_kernels():
            with torch.inference_mode():
                self.graphs = capture(self._decode_rows, self.batch_sizes, model.device)

    def close(self) -> None:
        """Give the model back as it was before, where liger-kernel changed it."""
        self.graphs = None
        self.resources.close()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def state_bytes(self) -> int:
        """Of one request, whatever its length."""
        return self.table.nbytes // self.table.slots

    def check(self, request: Request) -> None:
        """Refuse what cannot run.

        Raises:
            LolcatsError: no tokens, tokens that the model does not have, or a state of another model.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        if not request.prompt or not all(0 <= token < vocabulary for token in request.prompt):
            raise LolcatsError(f"prompt: expected at least one token, all between 0 and {vocabulary - 1}.")
        if request.start is not None:
            self._check_start(request.start)

    def submit(self, request: Request) -> None:
        """Queue a request, if :meth:`check` passes it."""
        self.check(request)
        request.begin(self.tokenizer)
        self.waiting.append(request)

    def cancel(self, request: Request) -> bool:
        """Take a request out at once; its slot is free for the next step. False if it had ended already."""
        self._catch_up()
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._free(self.running.index(request))
        else:
            return False
        request.on_delta(Delta("", [], [], "cancelled"))
        return True

    def abort(self, message: str) -> None:
        """End everything with an error."""
        requests = [*self.running, *self.waiting]
        self.flying = None
        self.running.clear()
        self.waiting.clear()
        for request in requests:
            request.on_delta(Delta("", [], [], "error", error=message))

    @torch.inference_mode()
    def step(self) -> None:
        """At most one piece's worth of prefill, then one token for every running request."""
        if self.waiting:
            self._catch_up()
        self._prefill()
        if self.running:
            self._decode()

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while not self.idle:
            self.step()

    def _prefill(self) -> None:
        budget = self.piece
        while self.waiting and len(self.running) < self.table.slots:
            if together := self._alike():
                return self._prefill_together(together)
            request = self.waiting[0]
            if request.cache is None:
                self._start(request)
            tokens = request.prompt[request.prefilled : request.prefilled + self.piece]
            if len(tokens) > budget:
                return None
            budget -= len(tokens)
            logits = self._prefill_piece(request, tokens)
            if request.prefilled == len(request.prompt):
                self._admit([self.waiting.popleft()], logits)
        return None

    def _start(self, request: Request) -> None:
        """Begin where the request says, or behind the longest known beginning of its prompt."""
        start = request.start or self.prefixes.find(request.prompt)
        if start is not None and request.start is None:
            request.prefilled = request.cached = len(start.tokens)
        request.cache = PrefillCache(self.layers, start)

    def _prefill_piece(self, request: Request, tokens: list[int]) -> Tensor:
        """Logits (1, V) behind the piece."""
        assert request.cache is not None
        logits = self._forward_new([tokens], request.first, request.cache)
        request.prefilled += len(tokens)
        if request.start is None:
            self.prefixes.offer(request.prompt, request.prefilled, request.cache.states())
        return logits

    def _alike(self) -> list[Request]:
        """The first waiting requests that can be prefilled together; none if that is fewer than two."""
        most = min(self.prefill_rows, self.table.slots - len(self.running), len(self.waiting))
        if most < 2 or len(self.waiting[0].prompt) > self.piece:
            return []
        length = len(self.waiting[0].prompt)
        first = (self.waiting[i] for i in range(most))
        alike = list(takewhile(lambda r: len(r.prompt) == length and r.start is None and r.cache is None, first))
        return alike if len(alike) > 1 else []

    def _prefill_together(self, requests: list[Request]) -> None:
        cache = PrefillCache(self.layers)
        logits = self._forward_new([request.prompt for request in requests], 0, cache)
        for request in requests:
            self.waiting.popleft()
            request.prefilled, request.cache = len(request.prompt), cache
        self._admit(requests, logits)

    def _forward_new(self, tokens: list[list[int]], first: int, cache: PrefillCache) -> Tensor:
        """Logits (B, V) behind ``tokens`` (B, T), of which the first stand at position ``first``."""
        ids = torch.tensor(tokens, device=self.model.device)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
        return self._forward(ids, positions, cache.cache)

    def _admit(self, requests: list[Request], logits: Tensor) -> None:
        """Give requests that share a prefill the next slots, and sample their first tokens."""
        begin = len(self.running)
        assert requests[0].cache is not None
        self.table.put(begin, requests[0].cache.states())
        for slot, request in enumerate(requests, begin):
            self.inputs[1, slot] = request.first - 1  # counted up as its first token comes
            request.cache = None
        self.running += requests
        self._advance(logits, range(begin, len(self.running)))

    def _decode(self) -> None:
        count = len(self.running)
        rows = next(size for size in self.batch_sizes if size >= count)
        if self._may_overlap():
            return self._decode_ahead(count, rows)
        self._catch_up()
        if count != len(self.running):
            return None
        inputs = self.inputs[:, :rows]
        if self.graphs is not None:
            logits = self.graphs.run(rows, inputs)
        else:
            ids, positions = inputs.to(self.model.device)[:, :, None]
            known = inputs[1, :count].tolist()
            unused = known[:1] * (rows - count)  # any number that gives no row more to do
            logits = self._decode_rows(ids, positions, rows, (*known, *unused))
        self._advance(logits[:count], range(count))
        return None

    def _may_overlap(self) -> bool:
        """Whether a step may begin before the tokens of the last one are on the host: if nothing there needs them.

        A request that turns out to have ended was computed for one token more, which is thrown away.
        """
        return self.graphs is not None and all(not r.keep_state and r.params.logprobs is None for r in self.running)

    def _decode_ahead(self, count: int, rows: int) -> None:
        """Launch a step, and handle the tokens of the one before it while the device is at work."""
        assert self.graphs is not None
        before = self.flying
        logits = self.graphs.run(rows, self.inputs[:, :rows] if before is None else None)
        tokens = self.sampler.choose(logits[:count], [r.sampler for r in self.running])
        self.flying = list(self.running), self.graphs.follow(tokens)
        if before is not None:
            self._land(*before)
        if len(self.running) < count:  # rows have moved: the next step starts from the host again
            self._catch_up()

    def _catch_up(self) -> None:
        """Handle the tokens of a step that was launched ahead."""
        if self.flying is not None:
            flying, self.flying = self.flying, None
            self._land(*flying)

    def _land(self, requests: list[Request], landing: Landing) -> None:
        """Report the tokens of requests that have not ended since their step was launched."""
        tokens = landing.wait()
        if requests != self.running:
            slots = {request: slot for slot, request in enumerate(self.running)}
            alive = [(slots[r], r, token) for r, token in zip(requests, tokens, strict=True) if r in slots]
        else:
            alive = list(zip(range(len(tokens)), requests, tokens, strict=True))
        for _, request, token in alive:
            request.sampler.saw(token)
        self._report([slot for slot, _, _ in alive], [token for _, _, token in alive], [None] * len(alive))

    def _decode_rows(
        self, ids: Tensor, positions: Tensor, rows: int, counts: tuple[int, ...] | None = None
    ) -> Tensor:  # fmt: skip
        return self._forward(ids, positions, self.table.view(rows, counts))

    def _has_kernels(self) -> bool:
        def has(layer: LinearizedAttention) -> bool:
            shape = (0, 0, 1, layer.spec.channels(layer.geometry.head_dim))
            q = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
            return uses_decode_kernel(q, layer.phi_q, layer.spec)

        with torch.inference_mode():
            return all(map(has, self.layers.values()))

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """(B, T) -> logits (B, V) behind the last token."""
        out = self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **self.keep_logits
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _advance(self, logits: Tensor, slots: range) -> None:
        """Sample a token for each slot from its row of logits (B, V), and report it."""
        requests = self.running[slots.start : slots.stop]
        self._report(slots, *self.sampler.sample(logits, [r.sampler for r in requests]))

    def _report(self, slots: Sequence[int], tokens: list[int], logprobs: list[TokenLogprob | None]) -> None:
        """Hand each slot's token to its request; free the slots of those that ended."""
        requests = [self.running[slot] for slot in slots]
        where = torch.tensor(slots, dtype=torch.long)
        self.inputs[0, where] = torch.tensor(tokens, dtype=torch.long)
        self.inputs[1, where] += 1
        deltas = list(map(self._delta, requests, tokens, logprobs))
        ended = [i for i, delta in enumerate(deltas) if delta.finish_reason is not None]
        for i in sorted(ended, key=lambda i: -slots[i]):
            if requests[i].keep_state:
                deltas[i].snapshot = self.table.take(slots[i], requests[i].history[:-1])
            self._free(slots[i])
        for request, delta in zip(requests, deltas, strict=True):
            request.on_delta(delta)

    def _delta(self, request: Request, token: int, logprob: TokenLogprob | None) -> Delta:
        generated = request.generated
        generated.append(token)
        ended, full = token in self.stop_tokens, len(generated) == request.params.max_tokens
        text = self._text(request, token, ended, full) if request.text else ""
        stopped = ended or request.stops.stopped
        reason: FinishReason | None = "stop" if stopped else "length" if full else None
        return Delta(text, [token], [] if logprob is None else [logprob], reason)

    def _text(self, request: Request, token: int, ended: bool, full: bool) -> str:
        """What can be shown now."""
        text = request.stops.add("" if ended else request.detokenizer.add(token))
        if (ended or full) and not request.stops.stopped:
            text += request.stops.add(request.detokenizer.rest())
            text += request.stops.rest()
        return text

    def _free(self, slot: int) -> None:
        """End the request in a slot; the last one moves there."""
        last, end = self.running.pop(), len(self.running)
        if slot < end:
            self.table.move(end, slot)
            self.running[slot] = last
            self.inputs[:, slot] = self.inputs[:, end]
        self.inputs[:, end] = 0  # a row that is computed and thrown away: any token, and a position that exists

    def _check_start(self, start: Snapshot) -> None:
        def shapes(states: Sequence[AttentionState]) -> list[Any]:
            return [[x.shape[1:] for x in state.tensors().values()] for state in states]

        if shapes(start.layers) != shapes(self.table.states):
            raise LolcatsError("This saved state is of another model: its layers have other shapes.")


def check_model(model: PreTrainedModel) -> None:
    """Refuse what the engine cannot run, in a sentence."""
    if not hasattr(model.config, "lolcats"):
        raise LolcatsError("The engine runs linearized models; convert this one first: lolcats linearize.")
    kept = [entry["layer"] for entry in model.config.lolcats["layers"] if entry["kind"] == "softmax"]
    if kept:
        raise LolcatsError(
            f"Layers {', '.join(map(str, kept))} kept softmax attention, whose cache grows with every token: "
            "the engine holds states of fixed size only. Use lolcats generate for this model."
        )
    cache = DynamicCache(config=model.config).layers
    if others := [str(i) for i, layer in enumerate(cache) if isinstance(layer, LinearAttentionCacheLayerMixin)]:
        raise LolcatsError(
            f"Layers {', '.join(others)} have a recurrence or convolution of the base model's own, whose state the "
            "engine does not hold. Use lolcats generate for this model."
        )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise LolcatsError(f"{type(model).__name__} takes no position_ids, which rows of different lengths need.")


def lay_out_for_vectors(model: PreTrainedModel) -> None:
    """Store the weights of linear layers column by column: values and shapes stay.

    For a single row BLAS then adds columns on all cores, where dot products with rows ran on one: a third less time for
    batch 1 and 2 on two cores, up to 12 % more for batch 16 (benchmarks/LOG.md).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The end-of-sequence tokens of the model's generation settings and of the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}
