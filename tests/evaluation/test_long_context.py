"""Recall prompts and loss by position, against the plain forward pass of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tokenizers.processors import TemplateProcessing

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation import positions as by_position
from lolcats.evaluation import recall as by_depth
from lolcats.evaluation.positions import buckets, positions, token_losses
from lolcats.evaluation.recall import DEPTHS, TASKS, Answer, Prompt, recall
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


def test_prompts_have_the_length_and_hide_the_answer_at_its_depth(tokenizer, with_bos, haystack) -> None:
    for tokens, name in [(t, n) for t in (tokenizer, with_bos) for n in TASKS]:
        prompts = TASKS[name](tokens, haystack, 600, 2, "seed")
        assert [p.ids for p in prompts] == [p.ids for p in TASKS[name](tokens, haystack, 600, 2, "seed")]
        assert prompts[0].ids != TASKS[name](tokens, haystack, 600, 2, "other")[0].ids
        assert sorted({a.depth for p in prompts for a in p.answers}) == list(DEPTHS)
        for prompt in prompts:
            assert len(prompt.ids) == 600
            assert prompt.ids[: len(special_prefix(tokens))] == special_prefix(tokens)
            text = tokens.decode(prompt.ids)
            for answer in prompt.answers:
                value = tokens.decode(prompt.continuation[answer.start : answer.end]).strip()
                assert value in text
                place = text.index(value) / len(text)
                assert abs(place - answer.depth) < 0.3, (name, answer.depth, place)
    with pytest.raises(LolcatsError, match="too few"):
        TASKS["passkey"](tokenizer, haystack, 20, 1, "seed")


@pytest.mark.parametrize("mode", ["teacher", "student"])
def test_recall_equals_the_plain_forward_pass(tokenizer, haystack, mode: Any) -> None:
    model = lolcats.convert(tiny_model(), TINY)
    prompts = TASKS["multi-query"](tokenizer, haystack, 400, 2, "seed")
    with override(model, mode=mode):
        for prompt, found in zip(prompts, by_depth._read_and_answer(model, prompts), strict=True):
            ids = torch.tensor([prompt.ids + prompt.continuation])
            with torch.no_grad():
                whole = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(prompt.ids) - 1 : -1]
            torch.testing.assert_close(found[: len(prompt.continuation)], whole, atol=1e-4, rtol=1e-4)
        scores = recall(model, tokenizer, haystack, [400], 2, batch_size=3, seed=0)
    assert [s.key for s in scores] == [
        (f"{task}@400", metric) for task in TASKS for metric in ("exact", "argmax", "nll")
    ]
    assert [s.count for s in scores] == [10, 10, 10, 10, 10, 10, 2, 10, 10]
    assert all(len(s.labels) == s.count for s in scores)


@pytest.mark.parametrize("mode", ["teacher", "student"])
def test_exact_is_what_greedy_generation_gives(tokenizer, haystack, mode: Any) -> None:
    model = lolcats.convert(tiny_model(), TINY)
    prompts = TASKS["passkey"](tokenizer, haystack, 100, 1, "seed")
    with override(model, mode=mode):
        ids = torch.tensor([prompt.ids for prompt in prompts])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        generated = model.generate(ids, max_new_tokens=5, **options)[:, 100:].tolist()
        own = [Prompt(p.ids, tokens, [Answer(0, 5, 0.5)]) for p, tokens in zip(prompts, generated, strict=True)]
        other = [Prompt(p.ids, [*p.continuation[:4], p.continuation[4] + 1], p.answers) for p in own]
        for asked, exact, argmax in ((own, 1.0, 1.0), (other, 0.0, 0.8)):
            found = {score.metric: score.value for score in by_depth._measure(model, asked, "passkey", 3)}
            assert found["exact"] == exact
            assert found["argmax"] == pytest.approx(argmax)


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
    torch.testing.assert_close(token_losses(model, ids), expected)
    scores = positions(model, with_bos, [haystack, haystack[:100]], 130, None)
    assert [s.metric for s in scores] == ["nll 0-63", "nll 64-127", "nll 128-129"]
    assert [s.count for s in scores] == [len(haystack) // 129] * 3
    first = token_losses(model, torch.tensor([[1, *haystack[:129]]]))[0]
    assert scores[1].items[0][0] == pytest.approx(first[63:127].mean().item(), rel=1e-5)
    with pytest.raises(LolcatsError, match="No document has 5000 tokens"):
        positions(model, with_bos, [haystack], 5000, None)


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
    ],
)
def test_texts_that_are_not_unicode_end_in_a_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LolcatsError, match=message):
        read_documents(str(tmp_path / name))


def test_records_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"title": "b"}\n{"text": "c"}\n')
    assert read_documents(str(tmp_path / "a.jsonl")) == ["a", "c"]
