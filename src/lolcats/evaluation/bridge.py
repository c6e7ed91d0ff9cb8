"""lm-eval's Hugging Face class with our own likelihoods: requests are batched once and reused for every model. On a GPU
the engine generates.

A batch is filled up to a fixed number of tokens. Requests that differ only in their last token (the letters of a
question's answers) share a row, and logits are computed only for the tokens of continuations.

Shapes: B rows of a batch, T tokens, N continuation tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.evaluation.generation import generate, uses_engine
from lolcats.evaluation.text import ROW
from lolcats.inference.engine import SamplingParams
from lolcats.modeling.install import decoder
from lolcats.modeling.loss import find_head

MULTIPLE = 16  # rows are padded to a multiple of this, so kernels compile for few lengths
GREEDY = {"do_sample", "temperature", "until", "max_gen_toks"}  # settings that the engine understands as lm-eval does
PIECE = 1024  # tokens whose logits are in memory at a time

Encoded = tuple[list[int], list[int]]
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T), padded on the right, and the tokens to score: four tensors (N,).

    ``targets[i]`` is predicted by row ``rows[i]`` at position ``places[i]`` and counts toward request ``requests[i]``.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor
    requests: Tensor


class Bridge(HFLM):
    """lm-eval's model interface. ``known`` caches the batches of a set of texts; the bridges of all models share it."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int, known: dict[Any, list[Batch]]) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
                         softmax_dtype="float32")  # fmt: skip
        self.known = known
        self.encodings: dict[str, list[int]] = {}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Answer]:
        """For each request, the log-probability of the continuation and whether greedy decoding would produce it."""
        texts = tuple(request.args for request in requests)
        if texts not in self.known:
            self._encode_together(texts)
            self.known[texts] = self._batches([self._encoded(*text) for text in texts])
            self.encodings = {}
        return answers(self.model, self.known[texts], len(texts))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Answer]:
        """The same for requests that are already tokenized: windows of whole texts."""
        return answers(self.model, self._batches([pair for _, *pair in requests]), len(requests))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, up to the string that ends it: by the engine where it runs the model and all
        answers are greedy, otherwise as lm-eval does."""
        found = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        if uses_engine(self.model) and not any(one["do_sample"] or set(one) - GREEDY for one in found):
            contexts = [request.args[0] for request in requests]
            return self._generated([self._asked(*one) for one in zip(contexts, found, strict=True)])
        return super().generate_until(requests, disable_tqdm)  # type: ignore[no-any-return]

    def _asked(self, context: str, settings: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        """A request as lm-eval understands it: the prompt is truncated on the left to leave room for the answer."""
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        most, stop = settings["max_gen_toks"], handle_stop_sequences(settings["until"], end)
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        return prompt, SamplingParams(most, stop=tuple(filter(None, stop)))

    def _generated(self, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[str]:
        answers = generate(self.model, self.tokenizer, asked)
        return [
            postprocess_generated_text(self.tok_decode(tokens), list(params.stop), None)
            for tokens, (_, params) in zip(answers, asked, strict=True)
        ]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string in self.encodings:
            return self.encodings[string]
        return super().tok_encode(string, add_special_tokens, *args, **kwargs)

    def _encode_together(self, texts: Sequence[tuple[str, str]]) -> None:
        """Tokenize contexts, alone and with their continuations, in one call: a tokenizer then uses all cores."""
        start = self.tokenizer.decode(self.prefix_token_id)
        strings = list(dict.fromkeys(s for context, rest in texts for s in (context.rstrip(), context + rest)))
        plain = [string for string in strings if not string.startswith(start)]  # lm-eval tokenizes the others itself
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        self.encodings = dict(zip(plain, self.tokenizer(plain, **special)["input_ids"], strict=True))

    def _encoded(self, context: str, continuation: str) -> Encoded:
        """Encode a request as lm-eval does; an empty context becomes the token that starts a text."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        start = self.prefix_token_id
        return (ids[:1], ids[1:]) if ids[0] == start else ([start], ids)

    def _batches(self, requests: Sequence[Any]) -> list[Batch]:
        return list(make_batches(requests, self.max_length, self.batch_size * ROW))


def make_batches(requests: Sequence[Encoded], longest: int, tokens: int) -> Iterator[Batch]:
    """Batches of at most ``tokens`` tokens (or one row), longest rows first.

    Args:
        requests: token ids of contexts and continuations.
        longest: maximum row length; contexts are truncated on the left.
    """
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        asked.setdefault(tuple((context + continuation)[-(longest + 1) : -1]), []).append(number)
    rows = sorted(asked, key=lambda row: (-len(row), row))
    while rows:
        width = -(-len(rows[0]) // MULTIPLE) * MULTIPLE
        chosen, rows = rows[: max(1, tokens // width)], rows[max(1, tokens // width) :]
        yield _batch(chosen, width, asked, requests)


def _batch(
    rows: list[tuple[int, ...]], width: int, asked: dict[tuple[int, ...], list[int]], requests: Sequence[Encoded]
) -> Batch:  # fmt: skip
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
    entries = [
        (number, len(row) - len(requests[request][1]) + place, target, request)
        for number, row in enumerate(rows)
        for request in asked[row]
        for place, target in enumerate(requests[request][1])
    ]
    return Batch(ids, *torch.tensor(entries).T.contiguous())


@torch.no_grad()
def answers(model: PreTrainedModel, batches: Sequence[Batch], count: int) -> list[Answer]:
    """The fp32 log-probability of each request's continuation, and whether all its tokens are the most likely ones."""
    model.eval()
    head, device = find_head(model), model.device
    total = torch.zeros(count, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    missed = torch.zeros(count, dtype=torch.int32, device=device)  # number of tokens that are not the most likely ones
    for batch in batches:
        call = {"input_ids": batch.ids.to(device), "use_cache": False}
        at = batch.rows.to(device), batch.places.to(device)
        given = model(**call).logits[at] if head is None else decoder(model)(**call)[0][at]
        pieces = (x.to(device).split(PIECE) for x in (batch.targets, batch.requests))
        for part, target, request in zip(given.split(PIECE), *pieces, strict=True):
            logits = part.float() if head is None else head(part)
            chosen = logits.gather(1, target[:, None])[:, 0]
            total.index_add_(0, request, (chosen - logits.logsumexp(1)).to(total.dtype))
            missed.index_add_(0, request, (chosen < logits.amax(1)).int())
    return list(zip(total.tolist(), (missed == 0).tolist(), strict=True))
