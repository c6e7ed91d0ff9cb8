"""Continuous batching: a table of slots, prompts prefilled in pieces between decode steps.

Running requests occupy slots 0 .. n−1; when one ends, the last moves into its slot and a waiting one takes the place
after them. A decode step computes the smallest of ``batch_sizes`` that holds them, always with the same shapes and on
the same memory, whatever the rows' lengths: rows after the running ones are computed and thrown away.

A request's tokens depend on its prompt, parameters and seed, and on nothing else in the engine: rows are computed
independently, and prefill pieces end at the same tokens whatever else runs. Sums are rounded differently by matrix
products of different batch sizes (in fp32 about 1e-6 of a logit); a single batch size excludes that too.

If the model keeps heads or layers, their keys lie in blocks that sequences take as they grow (:mod:`.kept`). A prompt
begins when there are blocks for all of it. If running requests find too few for their next token, cached prefixes go
first, then prompts that are partly prefilled begin anew, and then the newest running request is paused: its state and
keys move to the host's memory and come back, bit for bit, before any other prompt begins.

An error ends the requests whose work it was: one request for its sampling, text or delivery, one batch for a forward
pass. The others go on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.inference.engine.graphs import DecodeGraphs, Landing, capture
from lolcats.inference.engine.kept import BLOCK, PagedCache, keeps_keys
from lolcats.inference.engine.model import (
    broke_the_device,
    check_model,
    end_tokens,
    has_kernels,
    lay_out_for_vectors,
    prepare,
)
from lolcats.inference.engine.prompts import Prompts
from lolcats.inference.engine.request import Delta, Request, failure
from lolcats.inference.engine.room import Room, newest
from lolcats.inference.engine.sampling import BatchSampler, TokenLogprob, sequence_logprobs
from lolcats.inference.engine.slots import Slots
from lolcats.inference.engine.states import PrefillCache, PrefixCache, SlotTable
from lolcats.modeling.layer import linearized_layers

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
        refill: slots that must be free before prompts are prefilled, if so many wait and others run.
        graphs: whether decode steps are CUDA graphs; by default on CUDA where the decode kernel takes every layer.
        context, kept_bytes, block: tokens of a sequence, memory for kept keys, and tokens of a block, where the model
            keeps heads or layers (see :class:`.room.Room`).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, slots: int = 16, piece: int = 256, prefix_bytes: int = 256 << 20,
        batch_sizes: Sequence[int] | None = None, stop_tokens: Sequence[int] | None = None,
        state_dtype: torch.dtype = torch.float32, prefill_rows: int = 1, refill: int = 1, graphs: bool | None = None,
        context: int = 0, kept_bytes: int | None = None, block: int = BLOCK,
    ) -> None:  # fmt: skip
        check_model(model)
        self.model, self.tokenizer, self.piece, self.refill = model.eval(), tokenizer, piece, refill
        self.prefill_rows = prefill_rows
        if model.device.type == "cpu":
            lay_out_for_vectors(model)
        self.layers = {layer.geometry.layer: layer for layer in linearized_layers(model)}
        self.prefixes, self.room = PrefixCache(prefix_bytes, piece), None
        if keeps_keys(model):
            self.room = Room(model, slots, context, kept_bytes, self.prefixes, block)
        self.kept = self.room.kept if self.room else None
        self.table = SlotTable(self.layers, slots, model.dtype, model.device, state_dtype, self.kept)
        self.batch_sizes = sorted({*(batch_sizes or (1 << i for i in range(slots.bit_length()))), slots})
        self.stop_tokens = frozenset(end_tokens(model, tokenizer) if stop_tokens is None else stop_tokens)
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.waiting, self.sampler = Prompts(slots), BatchSampler()
        self.slots = Slots(self.table, model.device.type == "cuda")
        self.running, self.inputs = self.slots.running, self.slots.inputs
        self.broken = ""
        """What made the device unusable, if anything did: nothing runs any more."""
        self.flying: tuple[list[Request], Landing] | None = None
        """A step that was launched ahead: its requests in the order of its rows, and their tokens."""
        self.keep_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.resources = prepare(self, model, self.layers.values())
        self.graphs: DecodeGraphs | None = None
        if graphs if graphs is not None else model.device.type == "cuda" and has_kernels(model, self.layers.values()):
            with torch.inference_mode():
                self.graphs = capture(self._decode_rows, self.batch_sizes, model.device)

    def close(self) -> None:
        """Give the model back as it was before, where liger-kernel changed it."""
        self.graphs = None
        self.resources.close()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self.slots.paused

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's state, whatever its length; without kept keys."""
        return self.table.nbytes // self.table.slots

    def check(self, request: Request) -> None:
        """Refuse what cannot run.

        Raises:
            LolcatsError: no tokens, tokens that the model does not have, a state of another model, or more tokens than
                a sequence may have.
        """
        last = self.vocabulary - 1
        if not request.prompt or min(request.prompt) < 0 or max(request.prompt) > last:
            raise LolcatsError(f"prompt: expected at least one token, all between 0 and {last}.")
        if any(not 0 <= token <= last for token, _ in request.params.logit_bias):
            raise LolcatsError(f"logit_bias: expected token ids between 0 and {last}.")
        if request.start is not None:
            self.table.check_start(request.start)
        if self.room is not None:
            self.room.check(request)

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
        requests = self._all()
        try:
            self._reset()
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"
        for request in requests:
            self._tell(request, Delta(finish_reason="error", error=message))

    @torch.inference_mode()
    def step(self) -> None:
        """At most one piece's worth of prefill, then one token for every running request."""
        if self.waiting or self.slots.paused:
            self._catch_up()
        if self.room is not None:
            self._resume(self.room)
        self._prefill()
        if self.room is not None:
            self._make_room(self.room)
        if self.running:
            self._decode()

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while not self.idle:
            self.step()

    # Prefill

    def _prefill(self) -> None:
        budget = self.piece
        if self.running and self.table.slots - len(self.running) < min(self.refill, len(self.waiting)):
            return None
        while self.waiting and len(self.running) < self.table.slots:
            request = self.waiting.next(self._may_begin if self.room else None)
            if request is None:
                return self._check_stuck()
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
        if self.room is not None and request.cache is None:
            free = self.room.alike(request, free)
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
            self.prefixes.offer(request.prompt, request.prefilled, request.cache)
        if not request.left:
            self._admit([request], logits[:, -1])

    def _start(self, request: Request) -> None:
        """Begin where the request says, or after the longest known beginning of its prompt."""
        start = request.start
        if start is None and request.params.prompt_logprobs is None:  # these need logits of every token
            start = self.prefixes.find(request.prompt)
            request.prefilled = request.cached = len(start.tokens) if start else 0
        tables = [self.room.begin(start, request.left)] if self.room else []
        request.cache = PrefillCache(self.layers, start, self.kept, tables)

    def _prefill_together(self, requests: list[Request]) -> None:
        start = requests[0].start
        tables = [self.room.begin(start, len(request.prompt)) for request in requests] if self.room else []
        cache = PrefillCache(self.layers, start, self.kept, tables, len(requests))
        logits = self._forward_new([request.prompt for request in requests], requests[0].first, cache)
        for request in requests:
            request.prefilled, request.cache = len(request.prompt), cache
        self._admit(requests, logits[:, -1])

    def _forward_new(self, tokens: list[list[int]], first: int, cache: PrefillCache, every: bool = False) -> Tensor:
        """Logits (B, 1 or T, V) after the last or ``every`` token of (B, T), the first at position ``first``."""
        ids = torch.tensor(tokens, device=self.model.device)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
        return self._forward(ids, positions, cache.extended(ids.shape[1]), every)

    def _admit(self, requests: list[Request], logits: Tensor) -> None:
        """Give requests that share a prefill the next slots, and sample their first tokens from logits (B, V)."""
        for request in requests:
            self.waiting.remove(request)
        if requests[0].params.max_tokens == 0:
            return self._tell(requests[0], requests[0].prompt_only())
        assert requests[0].cache is not None
        return self._advance(logits, self.slots.add(requests, requests[0].cache))

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
            self.table.launch(count)
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
            self.table.launch(count)
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
        return self._forward(ids, positions, self.table.view(rows, positions[:, 0], counts))[:, -1]

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any, every: bool = False) -> Tensor:
        """(B, T) -> logits (B, 1 or T, V) after the last or ``every`` token."""
        more: dict[str, Any] = {"logits_to_keep": 0 if every else 1} if self.keep_logits else {}
        more |= cache.padding if isinstance(cache, PagedCache) else {}
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **more)
        logits: Tensor = out.logits if every else out.logits[:, -1:]
        return logits

    # Blocks of kept keys

    def _may_begin(self, request: Request) -> bool:
        return self.room is not None and not self.slots.paused and self.room.fits(request, len(self.running))

    def _check_stuck(self) -> None:
        """No waiting prompt has blocks. If nothing can give any back, the oldest ends."""
        if self.room is not None and not self.running and not self.slots.paused:
            self._fail([next(iter(self.waiting))], self.room.taken())

    def _make_room(self, room: Room) -> None:
        """A place for the next key of every running request."""
        if not room.has(self.table.lacking(len(self.running))):
            self._catch_up()
            while not room.has(self.table.lacking(len(self.running))):
                self._take_back(room)
        self.table.reserve(len(self.running))

    def _take_back(self, room: Room) -> None:
        """Free the blocks of one request, which goes on later."""
        if begun := [request for request in self.waiting if request.cache is not None]:
            newest(begun).restart()
        elif len(self.running) > 1:
            self.slots.pause(newest(self.running))
        else:
            self._fail([*self.running], room.taken())

    def _resume(self, room: Room) -> None:
        """Let paused requests go on, the oldest first."""
        while (paused := self.slots.paused) and not self.slots.full:
            if room.fits(paused[0], len(self.running)):
                self.slots.resume(room.begin(paused[0].paused, 0))
            elif self.running or any(request.cache is not None for request in self.waiting):
                return
            else:
                self._fail([paused[0]], room.taken())

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
            self.slots.free(slots[i])
        for request, delta in zip(requests, deltas, strict=True):
            self._tell(request, delta)

    def _delta(self, request: Request, token: int, logprob: TokenLogprob | None) -> Delta:
        try:
            return request.delta(token, logprob, token in self.stop_tokens)
        except Exception as error:
            _log("A token could not be taken; its request ends", error)
            return failure(error)

    def _tell(self, request: Request, delta: Delta) -> None:
        """Deliver a delta; a request that cannot be told anything ends."""
        try:
            request.on_delta(delta)
        except Exception:
            log.exception("A token could not be delivered; its request ends.")
            self._take_out(request)

    # Ends

    def _take_out(self, request: Request) -> bool:
        if request in self.waiting:
            self.waiting.remove(request)
            request.cache = None
        elif request in self.slots.paused:
            self.slots.paused.remove(request)
            request.paused = None
        elif request in self.running:
            self.slots.free(self.running.index(request))
        else:
            return False
        return True

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End these requests with an error."""
        _log(f"Failed requests: {len(requests)}", error)
        if self._breaks(error):
            return
        for request in requests:
            self._take_out(request)
            self._tell(request, failure(error))

    def _fail_batch(self, error: Exception) -> None:
        """A forward pass or its tokens failed: end what was running, and empty the slots."""
        _log(f"Failed requests: {len(self.running)}", error)
        if self._breaks(error):
            return
        requests = list(self.running)
        self._reset()
        for request in requests:
            self._tell(request, failure(error))

    def _breaks(self, error: Exception) -> bool:
        """End everything if the device cannot be used any more."""
        if broke_the_device(error):
            self.broken = f"{type(error).__name__}: {error}"
            self.flying = None
            for request in self._all():
                self._tell(request, failure(error))
        return bool(self.broken)

    def _all(self) -> list[Request]:
        """Take all requests out."""
        requests = [*self.running, *self.slots.paused, *self.waiting]
        for request in requests:
            request.cache = request.paused = None
        self.slots.paused, self.waiting = [], Prompts(self.table.slots)
        self.running.clear()
        return requests

    def _reset(self) -> None:
        """Empty all slots."""
        self.flying, self.sampler = None, BatchSampler()
        self.slots.clear()


def _log(what: str, error: Exception) -> None:
    """With a traceback only where the fault is ours."""
    if isinstance(error, LolcatsError):
        log.warning("%s: %s", what, error)
    else:
        log.error("%s.", what, exc_info=error)
