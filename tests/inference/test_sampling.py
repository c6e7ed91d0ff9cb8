"""Sampling against transformers' own processors, and text that comes in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import sentence
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lolcats.inference.engine.sampling import BatchSampler, Sampler, SamplingParams, filtered, token_logprobs
from lolcats.inference.engine.text import Detokenizer, StopStrings

LOGITS = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.5, "top_k": 7}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(7)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "top_k": 9, "top_p": 0.7}, [TopKLogitsWarper(9), TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 1.0, "repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    ],
)
def test_frequencies_are_those_of_transformers(params: dict[str, Any], processors: list[Any]) -> None:
    seen = [3, 4, int(LOGITS.argmax())]
    expected = LogitsProcessorList(processors)(torch.tensor([seen]), LOGITS.clone()).softmax(-1)[0]
    draws = 20_000
    rows = []
    for start in range(0, draws, 1000):
        samplers = [Sampler(SamplingParams(seed=start + i, **params), seen) for i in range(1000)]
        rows += BatchSampler().sample(LOGITS.expand(1000, -1), samplers)[0]
    counts = torch.bincount(torch.tensor(rows), minlength=50) / draws
    assert (counts[expected == 0] == 0).all()
    assert (counts - expected).abs().max() < 5 * (0.25 / draws) ** 0.5


def test_filters_keep_at_least_the_likeliest() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    ones = torch.ones(1, 1)
    kept = filtered(probs, ones.long() * 0, ones * 1e-9, ones * 0)
    assert (kept > 0).tolist() == [[True, False, False, False]]
    assert filtered(probs, ones.long() * 3, ones, ones * 0.6)[0].tolist() == pytest.approx([0.4, 0.3, 0, 0])


def test_a_seed_repeats_itself_and_rows_are_independent() -> None:
    def tokens(mates: int) -> list[int]:
        own = Sampler(SamplingParams(temperature=4.0, seed=5, top_p=0.9), [])
        others = [Sampler(SamplingParams(temperature=i % 2, repetition_penalty=1.2), [1]) for i in range(mates)]
        batch = BatchSampler()
        return [batch.sample(LOGITS.repeat(1 + mates, 1), [own, *others])[0][0] for _ in range(20)]

    assert tokens(0) == tokens(0) == tokens(7)
    assert len(set(tokens(0))) > 1


@pytest.mark.parametrize("mate", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}, {}])
def test_a_mate_with_filters_changes_no_token(mate: dict[str, Any]) -> None:
    def tokens(*others: Sampler) -> list[int]:
        own, batch = Sampler(SamplingParams(temperature=3.0, seed=1), []), BatchSampler()
        return [batch.sample(LOGITS.repeat(1 + len(others), 1), [own, *others])[0][0] for _ in range(40)]

    assert tokens() == tokens(Sampler(SamplingParams(**{"temperature": 1.0, **mate}), []))


def test_penalties_follow_a_batch_whose_requests_come_and_go() -> None:
    """What rows have seen stays right when the batch changes: a token at a time alone gives the same."""

    def sampler(i: int) -> Sampler:
        return Sampler(SamplingParams(temperature=i % 2, seed=i, repetition_penalty=1 + i % 3, logprobs=1), [i])

    batch, together, alone = BatchSampler(), [sampler(i) for i in range(6)], [sampler(i) for i in range(6)]
    for step in range(20):
        present = [i for i in range(6) if (step // 4) % (i + 2) != 1]
        tokens, logprobs = batch.sample(LOGITS.repeat(len(present), 1), [together[i] for i in present])
        assert tokens == [BatchSampler().sample(LOGITS, [alone[i]])[0][0] for i in present]
        assert [entry.token for entry in logprobs if entry] == tokens


def test_penalties_and_biases_are_those_of_openai() -> None:
    """mu[j] + bias[j], then repetition, then − count[j] · frequency − (count[j] > 0) · presence."""
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4}
    bias, prompt, said = {3: 5.0, 7: -100.0}, [3, 4], []
    own = Sampler(SamplingParams(logit_bias=tuple(bias.items()), logprobs=0, **params), prompt)
    mates = [Sampler(SamplingParams(frequency_penalty=float(i % 2)), [1]) for i in range(3)]
    batch = BatchSampler()
    for step in range(30):
        expected = LOGITS[0].clone()
        for token, value in bias.items():
            expected[token] += value
        for token in {*prompt, *said}:
            expected[token] *= 1 / 1.3 if expected[token] > 0 else 1.3
        for token in set(said):
            expected[token] -= said.count(token) * 0.7 + 0.4
        present = mates[: step % 4]
        tokens, logprobs = batch.sample(LOGITS.repeat(1 + len(present), 1), [own, *present])
        assert tokens[0] == int(expected.argmax())
        assert logprobs[0] is not None
        assert logprobs[0].logprob == pytest.approx(float(LOGITS[0].log_softmax(-1)[tokens[0]]))
        said.append(tokens[0])
    assert 10 < len(set(said)) < 30
    assert 7 not in said


def test_logprobs_are_of_the_model_itself() -> None:
    expected = LOGITS[0].log_softmax(-1)
    for token, count, entry in zip((4, 7), (3, 0), token_logprobs(LOGITS.repeat(2, 1), torch.tensor([4, 7]), [3, 0]),
                                   strict=True):  # fmt: skip
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(expected[token]))
        assert [token for token, _ in entry.top] == expected.topk(count).indices.tolist()


@pytest.mark.parametrize("text", ["the cat — 猫 🐈‍⬛ sat", "ééé", "  spaces  and\nlines\n", "🐈" * 20])
def test_text_in_pieces_is_the_text(text: str, tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokenizer.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_characters_come_at_the_end(tokenizer: Any) -> None:
    detokenizer, ids = Detokenizer(tokenizer), tokenizer("🐈")["input_ids"]
    assert [detokenizer.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert set(detokenizer.rest()) == {"\ufffd"}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (("END",), "a EN ENEND b", "a EN EN"),
        (("aab",), "aaaab", "aa"),
        (("xyz",), "abc xy", "abc xy"),
        (("later", "cat"), "the cat later", "the "),
        ((), "all of it", "all of it"),
    ],
)
def test_stop_strings(size: int, stop: tuple[str, ...], text: str, expected: str) -> None:
    stops, shown = StopStrings(stop), ""
    for start in range(0, len(text), size):
        if stops.stopped:
            break
        shown += stops.add(text[start : start + size])
        assert expected.startswith(shown)
    assert shown + stops.rest() == expected
    assert stops.stopped == (expected != text)


def test_sentences_of_the_tokenizer(tokenizer: Any) -> None:
    import random

    text = sentence(random.Random(3), 30)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.add(token) for token in tokenizer(text)["input_ids"]) == text
