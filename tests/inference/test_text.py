"""Answers go on from their prompts' text, with tokenizers that strip a text's first space and without."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.serving import serving, tiny_engine
from test_engine import ask
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lolcats.inference.engine import Delta, Engine, Request, SamplingParams
from lolcats.inference.engine.text import Detokenizer, context_of, decode, spelled, unfinished

STYLES = ["bytes", "llama 2", "metaspace"]
TEXTS = ["the cat — 猫 🐈🐈‍⬛ sat", "éé the 猫猫猫", "a  cat\n\n sat ", "\ufffd the\ufffd cat \ufffd\ufffd"]


def sentencepiece(metaspace: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose words have their space in front, and bytes for characters that it does not know."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges: list[tuple[str, str]] = []
    for word in ["▁the", "▁cat", "▁sat", "▁mat"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        ends = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), *ends])
    core.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(params=STYLES)
def any_tokenizer(request: Any, tokenizer: Any) -> Any:
    return tokenizer if request.param == "bytes" else sentencepiece(request.param == "metaspace")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def answer(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join(map(detokenizer.add, tokens)) + detokenizer.rest()


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_answer_are_the_text_wherever_it_is_split(text: str, any_tokenizer: Any) -> None:
    ids = ids_of(any_tokenizer, text)
    assert decode(any_tokenizer, ids) == text
    for split in range(len(ids) + 1):
        left = unfinished(any_tokenizer, context_of(any_tokenizer, ids[:split]))
        shown = decode(any_tokenizer, ids[: split - left])
        assert shown + answer(any_tokenizer, ids[:split], ids[split:]) == text


def test_a_text_goes_on_after_a_skipped_special_token(any_tokenizer: Any) -> None:
    end, cat = any_tokenizer.eos_token_id, ids_of(any_tokenizer, "the cat")[len(ids_of(any_tokenizer, "the")) :]
    the = ids_of(any_tokenizer, "the")
    for count in (1, 2, 40):
        assert answer(any_tokenizer, [], [*the, *[end] * count, *cat]) == "the cat"


def test_an_answer_after_a_special_token_begins_anew(any_tokenizer: Any) -> None:
    """As in a conversation whose template ends with one."""
    ids, end = ids_of(any_tokenizer, "the cat"), any_tokenizer.eos_token_id
    assert answer(any_tokenizer, [*ids, end], ids) == answer(any_tokenizer, [end], ids) == "the cat"
    assert answer(any_tokenizer, [], ids) == "the cat"


def test_a_prompt_may_end_with_what_is_no_text_by_itself(any_tokenizer: Any) -> None:
    ids, beyond = ids_of(any_tokenizer, "the cat"), [len(any_tokenizer) + 5]
    first = len(ids_of(any_tokenizer, "the"))
    assert answer(any_tokenizer, [*ids[:first], *beyond], [*ids[first:], *beyond, *ids[first:]]) == " cat cat"


@pytest.mark.parametrize("style", STYLES[1:])
def test_a_long_prompt_of_bytes_is_not_cut_within_a_character(style: str) -> None:
    """Three bytes a character, none of which is in the vocabulary."""
    tokenizer, text = sentencepiece(style == "metaspace"), "ខ្ញុំសូមអរគុណអ្នកដែលបានជួយខ្ញុំ" * 5
    ids = ids_of(tokenizer, text)
    assert len(ids) > 3 * len(text) > 400
    for split in range(250, 310):
        left = unfinished(tokenizer, context_of(tokenizer, ids[:split]))
        shown = decode(tokenizer, ids[: split - left])
        assert shown + answer(tokenizer, ids[:split], ids[split:]) == text, split


def test_an_answer_in_a_chat_begins_anew(engine: Engine) -> None:
    def said(anew: bool) -> str:
        deltas: list[Delta] = []
        ids, mat = ids_of(engine.tokenizer, "the cat sat"), engine.tokenizer.convert_tokens_to_ids("▁mat")
        params = SamplingParams(max_tokens=2, logit_bias=((mat, 100.0),))
        engine.submit(Request(ids, params, deltas.append, anew=anew))
        engine.run()
        return "".join(delta.text for delta in deltas)

    assert said(False) == " mat mat"
    assert said(True) == "mat mat"


@pytest.mark.parametrize("style", STYLES[1:])
def test_tokens_that_differ_in_their_space_are_spelled_apart(style: str) -> None:
    tokenizer = sentencepiece(style == "metaspace")
    pieces = {"▁cat": " cat", "a": "a", "▁": " ", "<0x0A>": "\n", "<0xE7>": "\ufffd", "<eos>": "<eos>"}
    for piece, text in pieces.items():
        assert spelled(tokenizer, tokenizer.convert_tokens_to_ids(piece)) == text


def test_tokens_of_bytes_are_spelled_as_they_decode(tokenizer: Any) -> None:
    for token in range(len(tokenizer)):
        assert spelled(tokenizer, token) == tokenizer.decode([token])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(sentencepiece(False), stop_tokens=())


def test_the_first_token_can_be_a_stop_string(engine: Engine) -> None:
    mat = engine.tokenizer.convert_tokens_to_ids("▁mat")
    deltas = ask(engine, ids_of(engine.tokenizer, "the cat"), logit_bias=((mat, 100.0),), stop=" mat", max_tokens=4)
    engine.run()
    assert ([delta.tokens for delta in deltas], deltas[-1].text, deltas[-1].finish_reason) == ([[mat]], "", "stop")


def test_an_answer_goes_on_from_a_saved_state(engine: Engine) -> None:
    mat, cat = map(engine.tokenizer.convert_tokens_to_ids, ("▁mat", "▁cat"))
    first = ask(engine, ids_of(engine.tokenizer, "the cat"), logit_bias=((mat, 100.0),), max_tokens=2)
    engine.run()
    second = ask(engine, [mat], first[-1].snapshot, logit_bias=((cat, 100.0),), max_tokens=2)
    engine.run()
    assert ["".join(delta.text for delta in deltas) for deltas in (first, second)] == [" mat mat", " cat cat"]


def test_echo_and_log_probabilities_have_the_spaces(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    mat, a = map(tokenizer.convert_tokens_to_ids, ("▁mat", "a"))
    body = {"model": "tiny", "prompt": "the cat sat", "max_tokens": 2, "temperature": 0, "echo": True,
            "logit_bias": {str(mat): 100}, "logprobs": 20}  # fmt: skip
    with serving(engine) as (address, _):

        def post(**change: Any) -> Any:
            return httpx.post(f"{address}/v1/completions", json={**body, **change}).json()["choices"][0]

        choice = post()
        assert choice["text"] == "the cat sat mat mat"
        assert choice["logprobs"]["tokens"][-2:] == [" mat", " mat"]
        stream = httpx.post(f"{address}/v1/completions", json={**body, "stream": True}).text.split("\n\n")
        chunks = [json.loads(line[6:])["choices"][0]["text"] for line in stream if line.startswith("data: {")]
        assert "".join(chunks) == choice["text"]
        # the first byte of a character is in the prompt, the others are in the answer or never come
        cat = ids_of(tokenizer, "the cat猫")
        bias = {str(cat[-1]): 100}
        assert post(prompt=cat[:-1], logit_bias=bias, max_tokens=1)["text"] == "the cat猫"
        assert post(prompt=cat[:-1], logit_bias=bias, max_tokens=1, echo=False)["text"] == "猫"
        assert post(prompt=cat[:-1], max_tokens=0)["text"] == "the cat\ufffd\ufffd"
        assert post(prompt=cat[:-1], logit_bias={str(a): 100}, max_tokens=1)["text"] == "the cat\ufffd\ufffda"
