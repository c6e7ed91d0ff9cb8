"""``lolcats generate``: through the chat template, or the text as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from support.serving import CONFIG
from test_cli import invoke
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.errors import LolcatsError
from lolcats.inference.generate import encode


def test_raw_text_is_not_a_question(tokenizer: Any) -> None:
    raw, asked = encode(tokenizer, "the cat", raw=True), encode(tokenizer, "the cat")
    assert raw["input_ids"][0].tolist() == tokenizer("the cat")["input_ids"]
    assert "<|user|>" in tokenizer.decode(asked["input_ids"][0])
    with pytest.raises(LolcatsError, match="give a text to complete"):
        encode(tokenizer, [{"role": "user", "content": "the cat"}], raw=True)


@pytest.mark.parametrize("raw", [False, True])
def test_half_a_surrogate_pair_is_a_sentence(raw: bool, tokenizer: Any) -> None:
    with pytest.raises(LolcatsError, match="not valid UTF-8"):
        encode(tokenizer, "a\ud83d", raw=raw)
    for role in ("system", "user"):
        with pytest.raises(LolcatsError, match="not valid UTF-8"):
            encode(tokenizer, [{"role": role, "content": "a\ud83d"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not\n supported') }}{% endif %}a",
            "System role not",
        ),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 // 0 }}", "by zero"),
    ],
)  # fmt: skip
def test_a_template_that_refuses_ends_in_a_sentence(template: str, reason: str, tokenizer: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    model = lolcats.convert(tiny_model(), CONFIG)
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    output = invoke("chat", tmp_path, "--system", "Be brief.", stdin="the cat\n", code=2)
    assert "The model's chat template refuses these messages" in output
    assert reason in output
    assert "try without one" in output
    assert len(output.replace(">", "").strip().splitlines()) == 1
    if "system" not in template:
        assert reason in invoke("generate", tmp_path, "--prompt", "the cat", code=2)
    invoke("generate", tmp_path, "--prompt", "the cat", "--raw", "--max-new-tokens", 2)


def test_the_option_continues_the_text(tokenizer: Any, tmp_path: Path) -> None:
    model = lolcats.convert(tiny_model(), CONFIG)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["generate", str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "12"]
    shown = {}
    for raw in (False, True):
        done = CliRunner().invoke(app, [*command, *(["--raw"] if raw else [])])
        assert done.exit_code == 0, done.output
        shown[raw] = done.stdout
        ids = encode(tokenizer, "the cat", raw)["input_ids"]
        said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() in done.stdout
    assert shown[False] != shown[True]
    sampled = [*command, "--temperature", "5"]
    said = [CliRunner().invoke(app, [*sampled, "--seed", seed]).stdout for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]
