"""Tokenizers of GGUF files: tokens as in training, the same in every run, and kept by the run."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from modeling.test_base import write_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lolcats
from lolcats.config import AttentionConfig, load_config
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.pipeline import resume, start
from lolcats.weights import base as bases
from lolcats.weights.base import find_base, load_tokenizer
from lolcats.weights.gguf_tokenizer import PATTERNS, splitting

pytest.importorskip("gguf", reason="gguf is not installed")
FILES = os.environ.get("LOLCATS_TEST_GGUF_DIR", "")  # a directory with GGUF files of real models
END, TURN, THINK = "<｜end▁of▁sentence｜>", "<|turn|>", "[think]"
TEXT = (
    f"\n\n1. the cat  23\n    x = 100\n| 4 | 55 |\n\tcafe\u0301 A\u030a caf\u00e9{TURN}the cat{END}\n{THINK}{{}}"
    "\r\n\r\n    12345.6 the mat's 7\u00bd \u4f60\u597d\n"
)
LINES = [
    "\n\n1. the cat\n\n  x = 100\n",
    "12. the mat  sat\n\n    y = 23\n\n",
    "caf\u00e9 the the mat's\n\n3. the",
] * 20
DIGITS = pre_tokenizers.Digits(individual_digits=True)
WORDS = {
    "gpt-2": ("\n\n1. b 23", "\n|\n|1|.| b| 23"),
    "olmo": (" a\n 45", " a|\n| 45"),
    "smollm": ("\n\n1. b 23", "\n\n|1|.| b| |2|3"),
    "starcoder": ("x =  10", "x| =|  |1|0"),
    "llama-bpe": ("\n\n1. b 2345", "\n\n|1|.| b| |234|5"),
    "qwen2": ("I'Ve 23\n\n a", "I|'Ve| |2|3|\n\n| a"),
    "qwen35": ("e\u0301e 12", "e\u0301e| |1|2"),
    "gpt-4o": ("HelloWorld's 2345 a/\n", "Hello|World's| |234|5| a|/\n"),
    "tekken": ("HelloWorld's 23", "Hello|World|'s| |2|3"),
    "seed-coder": ("a;\nb 23", "a|;|\n|b| |2|3"),
    "falcon": ("a+b (12345)", "a|+|b| |(|123|45|)"),
    "deepseek-llm": ("a\n b \u4f60\u597d 23", "a|\n| b| |\u4f60\u597d| |2|3"),
    "deepseek-coder": ("a\n b, 23", "a|\n| b|,| |2|3"),
    "deepseek-v3": ("a.b 2345\n\n\u4f60 x", "a|.b| |234|5|\n\n|\u4f60| x"),
    "bloom": (" the cat, 23", " the| cat|,| 23"),
    "viking": (" the cat, 23", " the| cat|,| |2|3"),
}


def trained(*splits: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges were learned with a splitting: the model's own, from which a GGUF file is made."""
    core = Tokenizer(models.BPE())
    core.normalizer, core.decoder = normalizer, decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<pad>", "<bos>", END, TURN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(LINES, trainer)
    core.add_tokens([AddedToken(THINK, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token=END)


def written(directory: Path, tokenizer: Any, pre: str | None, family: str = "llama") -> Path:
    return write_gguf(directory / f"{family}-{pre}.gguf", tiny_model(family, vocab_size=len(tokenizer)), tokenizer, pre)


def read(path: Path) -> Any:
    return load_tokenizer(find_base(str(path)))


def ids(tokenizer: Any, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("pre", "original"),
    [
        ("smollm", lambda: trained(DIGITS)),
        ("gpt-2", lambda: trained()),
        ("command-r", lambda: trained(DIGITS, normalizer=normalizers.NFC())),
        ("olmo", lambda: trained(normalizer=normalizers.NFC())),
    ],
)
def test_text_has_the_tokens_of_training(pre: str, original: Any, tmp_path: Path) -> None:
    tokenizer = original()
    found = read(written(tmp_path, tokenizer, pre))
    assert found.tokenize(TEXT) == tokenizer.tokenize(TEXT)
    assert ids(found) == ids(tokenizer)
    assert found.decode(ids(found)) == tokenizer.decode(ids(tokenizer))


def test_readme_example(tmp_path: Path) -> None:
    """A numbered list read by SmolLM2's splitting, and by GPT-2's, which transformers takes for it."""
    path = written(tmp_path, trained(DIGITS), "smollm")
    assert read(path).tokenize("\n\n1. the")[:3] == ["ĊĊ", "1", "."]
    taken = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert taken.tokenize("\n\n1. the")[:3] == ["Ċ", "Ċ", "1"], (
        "transformers knows smollm now: update docs and findings"
    )


@pytest.mark.parametrize("pre", WORDS)
def test_words(pre: str) -> None:
    """What llama.cpp makes of these texts too."""
    text, words = WORDS[pre]
    found = splitting(pre).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == words.split("|")


def test_names_that_transformers_knows_mean_the_same() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    known = getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
    assert {name: PATTERNS[name] for name in known} == {name: (pattern,) for name, pattern in known.items()}


def test_special_tokens(tmp_path: Path) -> None:
    """transformers numbers those outside GPT-2's alphabet past the vocabulary (5.23), or takes bos for eos (5.17)."""
    tokenizer = trained(DIGITS)
    found = read(written(tmp_path, tokenizer, "smollm"))
    assert len(found) == len(tokenizer)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (1, 2, 0, None)
    assert ids(found, f"a{END}b{TURN}{THINK}")[1::2] == [2, 3]
    assert ids(found, THINK) == [len(tokenizer) - 1]
    assert found.decode([2, 3, *ids(found, THINK)], skip_special_tokens=True) == THINK
    assert found.convert_ids_to_tokens([2, 3]) == [END, TURN]


def test_words_that_no_merge_leads_to(tmp_path: Path) -> None:
    """Llama 3's vocabulary has some hundred: taken whole if a word is one of them."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE({**letters, "vi": 256, "et": 257, "Ġviet": 258}, [("v", "i"), ("e", "t")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokens = {pre: read(written(tmp_path, tokenizer, pre)).tokenize(" viet") for pre in ("llama-bpe", "smollm")}
    assert tokens == {"llama-bpe": ["Ġviet"], "smollm": ["Ġ", "vi", "et"]}


@pytest.mark.parametrize(("pre", "says"), [("klingon", "'klingon'"), ("default", "'default'"), (None, "does not say")])
def test_an_unknown_splitting_is_a_warning(pre: str, says: str, tmp_path: Path, caplog: Any) -> None:
    found = read(written(tmp_path, trained(), pre))
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert says in message
    assert "numbers and white space" in message
    assert ids(found) == ids(trained())


def test_known_splittings_are_silent(tmp_path: Path, caplog: Any) -> None:
    for pre in ("smollm", "qwen2", "gpt-2"):
        read(written(tmp_path, trained(), pre))
    assert not [record for record in caplog.records if record.name.startswith("lolcats")]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("pre", ["smollm", "qwen2", "klingon"])
def test_a_run_has_the_tokenizer_of_its_base(family: str, pre: str, tmp_path: Path) -> None:
    """Also where the class of the base's family would put in its own splitting and normalizer."""
    found = read(written(tmp_path, trained(), pre, family))
    check_saved(found, family, tmp_path)


def check_saved(tokenizer: Any, family: str, directory: Path) -> None:
    """The same tokens after saving beside a linearized model."""
    lolcats.convert(tiny_model(family), AttentionConfig(window_size=8, sinks=2, feature_dim=8)).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    for again in (AutoTokenizer.from_pretrained(directory), read(directory)):
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.skipif(not FILES, reason="LOLCATS_TEST_GGUF_DIR names no directory with GGUF files of real models")
def test_real_files(tmp_path: Path) -> None:
    paths = sorted(Path(FILES).glob("*.gguf"))
    assert paths
    for path in paths:
        with suppressed("misreads the tokenizer"):  # Gemma 3 with transformers 5.17
            tokenizer = read(path)
            assert len(tokenizer) == len(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
            check_saved(tokenizer, "llama", tmp_path / path.stem)


@contextmanager
def suppressed(message: str) -> Iterator[None]:
    try:
        yield
    except LolcatsError as error:
        if message not in str(error):
            raise


@pytest.mark.parametrize(("family", "pre"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_a_run_keeps_its_tokenizer(
    family: str, pre: str, tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun when the base's tokenizer was read otherwise continues with the tokens that it began with."""
    path, text = written(tmp_path, trained(DIGITS), pre, family), tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n}. the cat 12{n} cafe\u0301 A\u030a the mat's" * 4 for n in range(150)))
    config, said = load_config("paper-sinks", settings), list[str]()

    def begin(name: str) -> list[int]:
        job = start(Inputs(str(path)), str(text), tmp_path / name, config, said.append)
        return ids(job.inputs.tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(bases, "mend_tokenizer", lambda tokenizer, *_: tokenizer)
        began = begin("old")
    saved = (tmp_path / "old" / "tokenizer.json").read_bytes()
    assert ids(resume(tmp_path / "old", said.append).inputs.tokenizer) == began
    assert begin("old") == began
    assert (tmp_path / "old" / "tokenizer.json").read_bytes() == saved
    assert len([line for line in said if "keeps the tokenizer" in line]) == 2
    said.clear()
    assert begin("new") == begin("new") == ids(read(path)) == ids(read(tmp_path / "new")) != began
    assert not [line for line in said if "keeps the tokenizer" in line]


def test_a_run_without_a_whole_tokenizer_gets_its_base_s(tmp_path: Path, settings: list[str]) -> None:
    """One that was killed while it wrote its first files."""
    path, text, out = written(tmp_path, trained(DIGITS), "smollm"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(f"{n}. the cat sat on the mat" * 4 for n in range(400)))
    start(Inputs(str(path)), str(text), out, load_config("paper-sinks", settings), lambda _: None)
    whole = (out / "tokenizer.json").read_bytes()
    (out / "tokenizer.json").write_bytes(whole[:1000])
    (out / "config.json").unlink()
    resume(out, lambda _: None)
    assert (out / "tokenizer.json").read_bytes() == whole


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_run_of_a_directory_has_its_tokenizer(
    kind: str, model_dirs: Any, chat_file: Path, tmp_path: Path, settings: list[str]
) -> None:
    shutil.copytree(model_dirs["qwen2"], tmp_path / "base")
    known = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        json.dumps({**known, "tokenizer_class": kind, "unk_token": "<pad>"})
    )
    config, said, inputs = load_config("paper-sinks", settings), list[str](), Inputs(str(tmp_path / "base"))
    for _ in range(2):
        job = start(inputs, str(chat_file), tmp_path / "out", config, said.append)
        assert job.inputs is inputs  # with what it has read before
    assert not [line for line in said if "keeps the tokenizer" in line]
    (tmp_path / "out" / "tokenizer.json").write_text("{")
    with pytest.raises(LolcatsError, match="tokenizer files are damaged"):
        start(inputs, str(chat_file), tmp_path / "out", config, said.append)
