"""Continuous batching over states of fixed size: a table of slots, prompts prefilled in pieces between decode steps.

Running requests occupy slots 0 .. n−1; when one ends, the last moves into its slot and a waiting one takes the place
after them. A decode step computes the smallest of ``batch_sizes`` that holds them, always with the same shapes and on
the same memory, whatever the rows' lengths: rows after the running ones are computed and thrown away.

A request's tokens depend on its prompt, parameters and seed, and on nothing else in the engine: rows are computed
independently, and prefill pieces end at the same tokens whatever else runs. Sums are rounded differently by matrix
products of different batch sizes (in fp32 about 1e-6 of a logit); a single batch size excludes that too.

An error ends the requests whose work it was: one request for its sampling, text or delivery, one batch for a forward
pass. The others go on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.attention import AttentionState
from lolcats.attention.path import choose_decode_path
from lolcats.errors import LolcatsError
from lolcats.inference.engine.graphs import DecodeGraphs, Landing, capture
from lolcats.inference.engine.model import broke_the_device, check_model, end_tokens, lay_out_for_vectors
from lolcats.inference.engine.prompts import Prompts
from lolcats.inference.engine.request import Delta, Request
from lolcats.inference.engine.sampling import BatchSampler, TokenLogprob, sequence_logprobs
from lolcats.inference.engine.states import PrefillCache, PrefixCache, SlotTable, Snapshot
from lolcats.modeling.layer import LinearizedAttention, linearized_layers
from lolcats.modeling.liger import fused_layers

log = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once with a linearized model. Not thread-safe: see :mod:`.worker`.

    On a CPU it changes how the model's weights lie in memory, not what they are.

    Args:
        slots: maximum number of requests that run at once.
        piece: maximum number of prompt tokens computed between two decode steps.
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
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.prefixes = PrefixCache(prefix_bytes, piece)
        self.waiting = Prompts(slots)
        self.running: list[Request] = []
        self.broken = ""
        """What made the device unusable, if anything did: nothing runs any more."""
        self.flying: tuple[list[Request], Landing] | None = None
        """A step that was launched ahead: its requests in the order of its rows, and their tokens."""
        self.sampler = BatchSampler()
        self.inputs = torch.zeros(2, slots, dtype=torch.long, pin_memory=model.device.type == "cuda")
        """For each slot, on the host: its newest token, whose key is not in the state yet, and its position."""
        self.keep_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
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
        """Bytes of one request's state, whatever its length."""
        return self.table.nbytes // self.table.slots

    def check(self, request: Request) -> None:
        """Refuse what cannot run.

        Raises:
            LolcatsError: no tokens, tokens that the model does not have, or a state of another model.
        """
        last = self.vocabulary - 1
        if not request.prompt or min(request.prompt) < 0 or max(request.prompt) > last:
            raise LolcatsError(f"prompt: expected at least one token, all between 0 and {last}.")
        if any(not 0 <= token <= last for token, _ in request.params.logit_bias):
            raise LolcatsError(f"logit_bias: expected token ids between 0 and {last}.")
        if request.start is not None:
            self._check_start(request.start)

    def submit(self, request: Request) -> None:
        """Queue a request, if :meth:`check` passes it."""
        self.check(request)
        if self.broken:
            return self._tell(request, Delta(finish_reason="error", error=self.broken))
        try:
            request.begin(self.tokenizer)
        except Exception as error:
            return self._fail([request], error)
        return self.waiting.add(request)

    def cancel(self, request: Request) -> bool:
        """Take a request out at once; its slot is free for the next step. False if it had ended already."""
        self._catch_up()
        if not self._take_out(request):
            return False
        request.on_delta(Delta(finish_reason="cancelled"))
        return True

    def abort(self, message: str) -> None:
        """End everything with an error."""
        requests = [*self.running, *self.waiting]
        self.waiting = Prompts(self.table.slots)
        try:
            self._reset()
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"
        for request in requests:
            self._tell(request, Delta(finish_reason="error", error=message))

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

    # Prefill

    def _prefill(self) -> None:
        budget = self.piece
        while self.waiting and len(self.running) < self.table.slots:
            request = self.waiting.next()
            alike = self._alike(request)
            try:
                if len(alike) > 1:
                    self.waiting.served(request)
                    return self._prefill_together(alike)
                if request.cache is None:
                    self._start(request)
                budget -= min(request.left, self.piece)
                if budget < 0:
                    return None
                self.waiting.served(request)
                self._prefill_piece(request)
            except Exception as error:
                self._fail(alike, error)
        return None

    def _alike(self, request: Request) -> list[Request]:
        """The request and others that can be prefilled with it."""
        free = min(self.prefill_rows, self.table.slots - len(self.running))
        return self.waiting.alike(request, free) if len(request.prompt) <= self.piece else [request]

    def _prefill_piece(self, request: Request) -> None:
        assert request.cache is not None
        tokens = request.prompt[request.prefilled : request.prefilled + self.piece]
        wanted = request.params.prompt_logprobs
        logits = self._forward_new([tokens], request.first, request.cache, wanted is not None)
        if wanted is not None:
            known = request.prompt[request.prefilled + 1 : request.prefilled + 1 + len(tokens)]
            request.prompt_logprobs += sequence_logprobs(logits[0, : len(known)], known, wanted)
        request.prefilled += len(tokens)
        if request.start is None:
            self.prefixes.offer(request.prompt, request.prefilled, request.cache.states())
        if not request.left:
            self._admit([request], logits[:, -1])

    def _start(self, request: Request) -> None:
        """Begin where the request says, or after the longest known beginning of its prompt."""
        start = request.start
        if start is None and request.params.prompt_logprobs is None:  # these need logits of every token
            start = self.prefixes.find(request.prompt)
            request.prefilled = request.cached = len(start.tokens) if start else 0
        request.cache = PrefillCache(self.layers, start)

    def _prefill_together(self, requests: list[Request]) -> None:
        cache = PrefillCache(self.layers)
        logits = self._forward_new([request.prompt for request in requests], 0, cache)
        for request in requests:
            request.prefilled, request.cache = len(request.prompt), cache
        self._admit(requests, logits[:, -1])

    def _forward_new(self, tokens: list[list[int]], first: int, cache: PrefillCache, every: bool = False) -> Tensor:
        """Logits (B, 1 or T, V) after the last or ``every`` token of (B, T), the first at position ``first``."""
        ids = torch.tensor(tokens, device=self.model.device)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
        return self._forward(ids, positions, cache.cache, every)

    def _admit(self, requests: list[Request], logits: Tensor) -> None:
        """Give requests that share a prefill the next slots, and sample their first tokens from logits (B, V)."""
        for request in requests:
            self.waiting.remove(request)
        if requests[0].params.max_tokens == 0:  # only its prompt was to be scored
            return self._tell(requests[0], Delta(finish_reason="length"))
        begin = len(self.running)
        self.running += requests
        assert requests[0].cache is not None
        self.table.put(begin, requests[0].cache.states())
        for slot, request in enumerate(requests, begin):
            self.inputs[1, slot] = request.first - 1  # counted up as its first token comes
            request.cache = None
        return self._advance(logits, range(begin, len(self.running)))

    # Decode

    def _decode(self) -> None:
        count = len(self.running)
        rows = next(size for size in self.batch_sizes if size >= count)
        if self.graphs is not None and all(request.overlaps for request in self.running):
            return self._decode_ahead(self.graphs, count, rows)
        self._catch_up()
        if count != len(self.running):
            return None
        try:
            logits = self._decode_now(count, rows)
        except Exception as error:
            return self._fail_batch(error)
        return self._advance(logits[:count], range(count))

    def _decode_now(self, count: int, rows: int) -> Tensor:
        inputs = self.inputs[:, :rows]
        if self.graphs is not None:
            return self.graphs.run(rows, inputs)
        ids, positions = inputs.to(self.model.device)[:, :, None]
        known = inputs[1, :count].tolist()
        unused = known[:1] * (rows - count)  # any number that gives no row more to do
        return self._decode_rows(ids, positions, rows, (*known, *unused))

    def _decode_ahead(self, graphs: DecodeGraphs, count: int, rows: int) -> None:
        """Launch a step before the tokens of the last one are on the host, and handle those while the device works.

        A request that turns out to have ended was computed for one token more, which is thrown away.
        """
        before, requests = self.flying, list(self.running)
        try:
            logits = graphs.run(rows, self.inputs[:, :rows] if before is None else None)
        except Exception as error:
            return self._fail_batch(error)
        try:
            tokens = self.sampler.choose(logits[:count], [request.sampler for request in requests])
            self.flying = requests, graphs.follow(tokens)
        except Exception as error:
            log.warning("Sampling a batch failed (%s); each request is sampled by itself.", error)
            self._catch_up()
            alive = [row for row, request in enumerate(requests) if request in self.running]
            return self._advance(logits[alive], [self.running.index(requests[row]) for row in alive])
        if before is not None:
            self._land(*before)
        if len(self.running) < count:  # rows have moved: the next step starts from the host again
            self._catch_up()
        return None

    def _catch_up(self) -> None:
        """Handle the tokens of a step that was launched ahead."""
        if self.flying is not None:
            flying, self.flying = self.flying, None
            try:
                self._land(*flying)
            except Exception as error:
                self._fail_batch(error)

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

    def _decode_rows(self, ids: Tensor, positions: Tensor, rows: int, counts: tuple[int, ...] | None = None) -> Tensor:
        return self._forward(ids, positions, self.table.view(rows, counts))[:, -1]

    def _has_kernels(self) -> bool:
        def has(layer: LinearizedAttention) -> bool:
            shape = (0, 0, 1, layer.spec.channels(layer.geometry.head_dim))
            q = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
            return choose_decode_path(q, layer.mixer(1.0)) == "kernels"

        with torch.inference_mode():
            return all(map(has, self.layers.values()))

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any, every: bool = False) -> Tensor:
        """(B, T) -> logits (B, 1 or T, V) after the last or ``every`` token."""
        keep = {"logits_to_keep": 0 if every else 1} if self.keep_logits else {}
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **keep)
        logits: Tensor = out.logits if every else out.logits[:, -1:]
        return logits

    # Tokens

    def _advance(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Sample a token for each slot from its row of logits (B, V), and report it."""
        requests = [self.running[slot] for slot in slots]
        try:
            tokens, logprobs = self.sampler.sample(logits, [request.sampler for request in requests])
        except Exception as error:
            log.warning("Sampling a batch failed (%s); each request is sampled by itself.", error)
            return self._advance_each(logits, requests)
        return self._report(slots, tokens, logprobs)

    def _advance_each(self, logits: Tensor, requests: list[Request]) -> None:
        """Sample row by row; a request whose row fails ends."""
        self.sampler = BatchSampler()
        for row, request in zip(logits, requests, strict=True):
            try:
                tokens, logprobs = BatchSampler().sample(row[None], [request.sampler])
            except Exception as error:
                self._fail([request], error)
            else:
                self._report([self.running.index(request)], tokens, logprobs)

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
            self._tell(request, delta)

    def _delta(self, request: Request, token: int, logprob: TokenLogprob | None) -> Delta:
        try:
            return request.delta(token, logprob, token in self.stop_tokens)
        except Exception as error:
            _log("A token could not be taken; its request ends", error)
            return _failure(error)

    def _tell(self, request: Request, delta: Delta) -> None:
        """Deliver a delta; a request that cannot be told anything ends."""
        try:
            request.on_delta(delta)
        except Exception:
            log.exception("A token could not be delivered; its request ends.")
            self._take_out(request)

    # Slots

    def _free(self, slot: int) -> None:
        """End the request in a slot; the last one moves there."""
        last, end = self.running.pop(), len(self.running)
        if slot < end:
            self.table.move(end, slot)
            self.running[slot] = last
            self.inputs[:, slot] = self.inputs[:, end]
        self.inputs[:, end] = 0  # a row that is computed and thrown away: any token, and a position that exists

    def _take_out(self, request: Request) -> bool:
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._free(self.running.index(request))
        else:
            return False
        return True

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End these requests with an error."""
        _log(f"{len(requests)} requests end with an error", error)
        if self._breaks(error):
            return
        for request in requests:
            self._take_out(request)
            self._tell(request, _failure(error))

    def _fail_batch(self, error: Exception) -> None:
        """A forward pass or its tokens failed: end what was running, and empty the slots."""
        _log(f"A step of {len(self.running)} requests failed", error)
        if self._breaks(error):
            return
        requests = list(self.running)
        self._reset()
        for request in requests:
            self._tell(request, _failure(error))

    def _breaks(self, error: Exception) -> bool:
        """End everything if the device cannot be used any more."""
        if broke_the_device(error):
            self.broken = f"{type(error).__name__}: {error}"
            requests, self.running, self.waiting = [*self.running, *self.waiting], [], Prompts(self.table.slots)
            self.flying = None
            for request in requests:
                self._tell(request, _failure(error))
        return bool(self.broken)

    def _reset(self) -> None:
        """Empty all slots."""
        self.flying, self.sampler = None, BatchSampler()
        self.running.clear()
        self.inputs.zero_()
        self.table.clear()

    def _check_start(self, start: Snapshot) -> None:
        def shapes(states: Sequence[AttentionState]) -> list[Any]:
            return [[x.shape[1:] for x in state.tensors().values()] for state in states]

        if shapes(start.layers) != shapes(self.table.states):
            raise LolcatsError("This saved state is of another model: its layers have other shapes.")


def _failure(error: Exception) -> Delta:
    if isinstance(error, LolcatsError):
        return Delta(finish_reason="error", error=str(error), refused=True)
    return Delta(finish_reason="error", error=f"{type(error).__name__}: {error}")


def _log(what: str, error: Exception) -> None:
    """With a traceback only where the fault is ours."""
    if isinstance(error, LolcatsError):
        log.warning("%s: %s", what, error)
    else:
        log.error("%s.", what, exc_info=error)
