"""Recall prompts and loss by position, against the plain forward pass of tiny models."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tokenizers.processors import TemplateProcessing

import lolcats
from lolcats.config import AttentionConfig
from lolcats.data.prompts import DEPTHS, Answer, Prompt
from lolcats.errors import LolcatsError
from lolcats.evaluation import positions as by_position
from lolcats.evaluation import recall as by_depth
from lolcats.evaluation.kinds import KINDS
from lolcats.evaluation.positions import Predictions, buckets, positions, token_scores
from lolcats.evaluation.recall import Sight, measure, recall, sight
from lolcats.evaluation.text import encode, read_documents, special_prefix
from lolcats.modeling.layer import override

TINY = AttentionConfig(window_size=8, feature_dim=8, sinks=2)


@pytest.fixture
def haystack(tokenizer: Any) -> list[int]:
    return encode(tokenizer, "the cat sat on a warm mat while birds sing " * 40)


@pytest.fixture
def with_bos(tokenizer: Any) -> Any:
    copied = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(
        tokenizer.backend_tokenizer.to_str()), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")  # fmt: skip
    copied.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return copied


COUNTING = ("common-words", "frequent-words")  # their answers stand all over the prompt


def test_prompts_have_the_length_and_hide_the_answer_at_its_depth(tokenizer, with_bos, haystack) -> None:
    for tokens, name in [(t, n) for t in (tokenizer, with_bos) for n in KINDS]:
        prompts = KINDS[name](tokens, haystack, 600, 2, "seed")
        assert [p.ids for p in prompts] == [p.ids for p in KINDS[name](tokens, haystack, 600, 2, "seed")]
        assert prompts[0].ids != KINDS[name](tokens, haystack, 600, 2, "other")[0].ids
        depths = [0.0] if name in COUNTING else list(DEPTHS)
        assert sorted({a.depth for p in prompts for a in p.answers}) == depths
        for prompt in prompts:
            assert len(prompt.ids) == 600
            assert prompt.ids[: len(special_prefix(tokens))] == special_prefix(tokens)
            text = tokens.decode(prompt.ids)
            for answer in prompt.answers:
                value = tokens.decode(prompt.continuation[answer.start : answer.end]).strip()
                assert value in text
                assert value in tokens.decode(prompt.ids[: answer.source])
                place = text.index(value) / len(text)
                assert name in COUNTING or abs(place - answer.depth) < 0.3, (name, answer.depth, place)
    for name, length in [*((name, 20) for name in KINDS), ("common-words", 400), ("frequent-words", 130)]:
        with pytest.raises(LolcatsError, match="too few"):
            KINDS[name](tokenizer, haystack, length, 1, "seed")


@pytest.mark.parametrize(("name", "index"), [("passkey", 0), ("passkey", 9), ("multi-query", 1), ("variables", 1)])
def test_a_source_ends_right_after_the_passage(tokenizer, haystack, name: str, index: int) -> None:
    prompt = KINDS[name](tokenizer, haystack, 600, 2, "seed")[index]
    for answer in prompt.answers:
        value = tokenizer.decode(prompt.continuation[answer.start : answer.end]).strip()
        passage = tokenizer.decode(prompt.ids[: answer.source]).strip().rpartition("\n")[2]
        assert value in passage


def test_the_words_asked_for_are_the_most_frequent_ones(tokenizer, haystack) -> None:
    for name, length in [(name, length) for name in COUNTING for length in (700, 5000)]:
        for prompt in KINDS[name](tokenizer, haystack, length, 2, "seed"):
            words = tokenizer.decode(prompt.ids).rpartition("\nThe ")[0].splitlines()[1:]
            counts = Counter(words)
            answers = [w.strip() for w in tokenizer.decode(prompt.continuation).split(",")]
            assert len(answers) == len(prompt.answers) == (10 if name == "common-words" else 3)
            others = [n for word, n in counts.items() if word not in answers and word]
            if name == "common-words":
                often, seldom = (30, 3) if length >= 4096 else (6, 1)
                assert {counts[word] for word in answers} == {often}
                assert set(others) == {seldom}
                assert answers == sorted(answers, key=words.index), "as they first appear"
            else:
                assert [counts[w] for w in answers] == sorted((counts[w] for w in answers), reverse=True)
                assert len({counts[w] for w in answers} | {max(others)}) == 4, "no ties"


def test_ruler_kinds_have_its_keys_values_and_hops(tokenizer, haystack) -> None:
    def text(kind: str) -> str:
        return str(tokenizer.decode(KINDS[kind](tokenizer, haystack, 900, 1, "seed")[0].ids))

    keys = re.findall(r"The code of the (\w+ \w+) is \d{5}\.", text("multi-key"))
    assert len(keys) == len(set(keys)) == 4
    values = re.findall(r"One code of the (\w+ \w+) is \d{5}\.", text("multi-value"))
    assert (len(values), len(set(values))) == (5, 1)
    links = re.findall(r"Set (\w+) to (\w+)\.", text("variables"))
    assert len(links) == 5
    assert [name for name, _ in links[:-1]] == [before for _, before in links[1:]], "one chain"


@pytest.mark.parametrize("mode", ["teacher", "student"])
def test_recall_equals_the_plain_forward_pass(tokenizer, haystack, mode: Any) -> None:
    model = lolcats.convert(tiny_model(), TINY)
    prompts = KINDS["multi-query"](tokenizer, haystack, 400, 2, "seed")
    with override(model, mode=mode):
        forced = by_depth._force(model, prompts, by_depth._read(model, prompts))
        for prompt, found in zip(prompts, forced, strict=True):
            ids = torch.tensor([prompt.ids + prompt.continuation])
            with torch.no_grad():
                whole = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(prompt.ids) - 1 : -1]
            torch.testing.assert_close(found[: len(prompt.continuation)], whole, atol=1e-4, rtol=1e-4)
        scores = recall(model, tokenizer, haystack, [600], 10, batch_size=3, seed=0)
    assert [s.key for s in scores] == [
        (f"{kind}@600", metric) for kind in KINDS for metric in ("exact", "generated", "argmax", "nll")
    ]
    assert {s.task: s.count for s in scores} == {f"{k}@600": 12 if k == "frequent-words" else 10 for k in KINDS}
    assert all(len(s.clusters) == s.count for s in scores)
    assert all(len(s.labels) == (0 if s.task.startswith(COUNTING) else s.count) for s in scores)


@pytest.mark.parametrize(
    ("mode", "family", "heads"),
    [("teacher", "llama", {}), ("student", "llama", {}), ("student", "llama", {"1": [1]}), ("student", "gemma3", {})],
)
def test_exact_is_what_greedy_generation_gives(tokenizer, haystack, mode: Any, family: str, heads: Any) -> None:
    model = lolcats.convert(tiny_model(family), replace(TINY, softmax_heads=heads))
    prompts = KINDS["passkey"](tokenizer, haystack, 100, 1, "seed")
    with override(model, mode=mode):
        ids = torch.tensor([prompt.ids for prompt in prompts])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        generated = model.generate(ids, max_new_tokens=5, **options)[:, 100:].tolist()
        own = [Prompt(p.ids, tokens, [Answer(0, 5, 0.5)]) for p, tokens in zip(prompts, generated, strict=True)]
        other = [Prompt(p.ids, [*p.continuation[:4], p.continuation[4] + 1], p.answers) for p in own]
        for asked, exact, argmax in ((own, 1.0, 1.0), (other, 0.0, 0.8)):
            found = measure(model, tokenizer, asked, 3)
            assert {(one.exact, one.generated) for one in found} == {(exact, exact)}
            assert [one.argmax for one in found] == pytest.approx([argmax] * len(prompts))


class Adds(torch.nn.Module):
    """The most likely token is the sum of all tokens so far, modulo 300."""

    device = torch.device("cpu")

    @property
    def base_model(self) -> Adds:
        return self

    def forward(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> SimpleNamespace:
        before = torch.zeros(len(input_ids), 1) if past_key_values is None else past_key_values["sum"]
        sums = before + input_ids.cumsum(1)
        cache = {} if past_key_values is None else past_key_values
        cache["sum"] = sums[:, -1:]
        logits = torch.nn.functional.one_hot(sums.long() % 300, 300).float()
        return SimpleNamespace(logits=logits, past_key_values=cache)


def test_every_answer_counts_after_true_and_after_own_answers(tokenizer) -> None:
    """A question is given; a wrong earlier answer spoils only what is generated after it. Rows end at other places."""
    read, given, answers = [1, 2, 3], [7], [Answer(0, 2, 0.0), Answer(3, 5, 1.0)]

    def greedy(ids: list[int], count: int) -> list[int]:
        for _ in range(count):
            ids = [*ids, sum(ids) % 300]
        return ids

    first = greedy(read, 2)[3:]
    wrong = [first[0], 100]
    after_true, after_own = (greedy([*read, *start, *given], 2)[6:] for start in (wrong, first))
    prompts = [Prompt(read, [*wrong, *given, *after], answers) for after in (after_true, after_own)]
    short = Prompt(read, first, answers[:1])
    found = measure(Adds(), tokenizer, [*prompts, short], 3)
    assert [(one.prompt, one.exact, one.generated) for one in found] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (2, 1, 1),
    ]  # fmt: skip
    assert found == measure(Adds(), tokenizer, [*prompts, short], 2), "whatever the batches"


def test_a_list_may_be_generated_in_any_order(tokenizer, haystack, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lolcats.convert(tiny_model(), TINY)
    prompt = KINDS["multi-value"](tokenizer, haystack, 600, 1, "seed")[0]
    assert by_depth._is_own(prompt) == [1] * len(prompt.continuation)
    values = tokenizer.decode(prompt.continuation).split(", ")
    said = encode(tokenizer, ", ".join([values[2], values[0][:4] + "x", values[1]]))
    said = (said + [0] * len(prompt.continuation))[: len(prompt.continuation)]
    monkeypatch.setattr(by_depth, "_generate", lambda *_: torch.tensor([said]))
    assert [one.generated for one in measure(model, tokenizer, [prompt], 1)] == [0, 1, 1, 0, 0]


def test_answers_in_the_window_are_reported_apart(tokenizer, haystack) -> None:
    assert sight(TINY) == Sight(16, 2)
    assert sight(AttentionConfig(window="sliding", window_size=8, sinks=4)) == Sight(8, 4)
    assert sight(AttentionConfig(kind="linear", sinks=4)) == Sight(0, 0)
    assert sight(AttentionConfig(kind="softmax", layers={"0": "window"}, window_size=8)) == Sight(16, 4)
    assert sight(AttentionConfig(kind="softmax")) is None
    prompt = Prompt(list(range(100)), [5, 6], [])
    places = {source: Sight(16, 4).holds(prompt, Answer(0, 2, 0.5, source)) for source in (4, 5, 84, 85, None)}
    assert places == {4: True, 5: False, 84: False, 85: True, None: False}
    assert not Sight(16, 4).holds(prompt, Answer(1, 2, 0.5, 85)), "the window moves with the answer"
    model = lolcats.convert(tiny_model(), TINY)
    prompts = KINDS["passkey"](tokenizer, haystack, 600, 1, "0/passkey/600")
    near = next(p.answers[0] for p in prompts if p.answers[0].depth == 1)
    for window, inside in ((600 - near.source, 0), (601 - near.source, 1)):
        scores = {
            s.metric: s
            for s in recall(model, tokenizer, haystack, [600], 5, 8, 0, Sight(window, 2), ["passkey"])
        }  # fmt: skip
        counts = {name: scores[name].count for name in scores if name.startswith("exact")}
        beyond = {"exact": 5, "exact beyond the window": 5 - inside}
        assert counts == beyond | ({"exact in the window": 1} if inside else {})
    everywhere = recall(model, tokenizer, haystack, [600], None, 8, 0, None, ["multi-query"])
    assert [s.metric for s in everywhere] == ["exact", "generated", "argmax", "nll"]
    assert everywhere[0].count == 200, "the default"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_losses_by_position(family: str, with_bos, haystack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_position, "TOKENS", 16)
    model = lolcats.convert(tiny_model(family), TINY)
    if family == "gemma3":
        model.config.final_logit_softcapping = 0.5
    ids = torch.randint(3, 300, (2, 50))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(token_scores(Predictions(model), None, ids), {"nll": expected})
    scores = positions(model, with_bos, [haystack, haystack[:100]], 130, None)
    assert [s.metric for s in scores] == ["nll 0-63", "nll 64-127", "nll 128-129"]
    assert [s.count for s in scores] == [len(haystack) // 129] * 3
    first = token_scores(Predictions(model), None, torch.tensor([[1, *haystack[:129]]]))["nll"][0]
    assert scores[1].items[0][0] == pytest.approx(first[63:127].mean().item(), rel=1e-5)
    with pytest.raises(LolcatsError, match="No document has 5000 tokens"):
        positions(model, with_bos, [haystack], 5000, None)


def test_divergences_by_position(with_bos, haystack, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL from the teacher's distribution to the model's, of the next token at each position; zero for the teacher."""
    monkeypatch.setattr(by_position, "TOKENS", 16)
    base, model = tiny_model("llama"), lolcats.convert(tiny_model("llama"), TINY)
    ids = torch.randint(3, 300, (2, 50))
    with torch.no_grad():
        own, wanted = (m(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1] for m in (model, base))
    expected = (wanted.exp() * (wanted - own)).sum(-1)
    both = Predictions(model), Predictions(base)
    torch.testing.assert_close(token_scores(*both, ids)["kl"], expected)
    scores = positions(model, with_bos, [haystack], 130, 2, lambda: base)
    buckets_ = ("0-63", "64-127", "128-129")
    assert [s.metric for s in scores] == [f"{metric} {name}" for metric in ("nll", "kl") for name in buckets_]
    assert scores[:3] == positions(model, with_bos, [haystack], 130, 2)
    first = token_scores(*both, torch.tensor([[1, *haystack[:129]]]))["kl"][0]
    assert scores[4].items[0][0] == pytest.approx(first[63:127].mean().item(), rel=1e-5)
    with override(model, mode="teacher"):
        assert all(s.value < 1e-6 for s in positions(model, with_bos, [haystack], 130, 2, lambda: base)[3:])


def test_words_that_a_teacher_rules_out_count_nothing() -> None:
    model, teacher = torch.zeros(1, 2, 3), torch.tensor([[[0.0, 0.0, -torch.inf]] * 2])
    ids = torch.zeros(1, 3, dtype=torch.long)
    found = token_scores(lambda _: iter([model]), lambda _: iter([teacher]), ids)  # type: ignore[arg-type]
    torch.testing.assert_close(found["kl"], torch.full((1, 2), math.log(3 / 2)))


@pytest.mark.parametrize("known", [True, False])
def test_positions_take_one_pass_of_each_decoder(known: bool, with_bos, haystack, monkeypatch) -> None:
    """Not one for each part of the logits, also if the family's head has no known form."""
    monkeypatch.setattr(by_position, "TOKENS", 16)
    base, model = tiny_model("llama").double(), lolcats.convert(tiny_model("llama").double(), TINY)
    expected = positions(model, with_bos, [haystack], 130, 2, lambda: base)
    if not known:
        monkeypatch.setattr(by_position, "find_head", lambda _: None)
    passes: list[int] = []
    for each in (base, model):
        each.base_model.register_forward_hook(lambda *_: passes.append(1))
    scores = positions(model, with_bos, [haystack], 130, 2, lambda: base)
    assert len(passes) == 2 * (2 + 2 * known), "two windows of each model, and two calls that look for its head"
    for score, same in zip(scores, expected, strict=True):
        assert score.value == pytest.approx(same.value, rel=1e-5, abs=1e-8)


def test_buckets_are_powers_of_two() -> None:
    assert list(buckets(300)) == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert list(buckets(32768))[-1] == (16384, 32768)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a\n\n" * 9000)
    assert read_documents(str(path)) == ["a\n\n" * 9000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "the text of record 2 is not Unicode"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', "the text of record 2 is not Unicode"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 0}\n', "the text of record 2 is not Unicode"),
    ],
)
def test_texts_that_are_not_unicode_end_in_a_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LolcatsError, match=message):
        read_documents(str(tmp_path / name))


def test_records_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"title": "b"}\n{"text": "c"}\n')
    assert read_documents(str(tmp_path / "a.jsonl")) == ["a", "c"]
