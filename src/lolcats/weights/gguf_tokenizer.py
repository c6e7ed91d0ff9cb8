"""The tokenizer of a GGUF file, as the model had it in training.

The header has the vocabulary and the merges of byte-level BPE in full, but only a name for how text is split into words
before them: ``tokenizer.ggml.pre``. transformers knows some of these names (5.23) or none (5.17), and splits text as
GPT-2 does for the others. It also loses added tokens or numbers them past the end of the vocabulary, and what it
returns may change once more when it is saved and loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lolcats.files import warn_once
from lolcats.weights.gguf_header import Header, read_array

ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters with upper and lower case, as DeepSeek LLM lists them."""
CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
QWEN35 = (
    rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
)
GPT4O = rf"{CAPITALS[0]}{ENDINGS}?|{CAPITALS[1]}{ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
TEKKEN = rf"{CAPITALS[0]}|{CAPITALS[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)
SEED = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
BLOOM = r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"

LIKE_LLAMA3 = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2 phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling": (GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (DIGIT, GPT2),
    f"{LIKE_LLAMA3} dbrx smaug-bpe glm4 chatglm-bpe": (LLAMA3,),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2": (QWEN2,),
    "qwen35": (QWEN35,),
    "gpt-4o llama4 kanana2 talkie minimax-m2": (GPT4O,),
    "tekken": (TEKKEN,),
    "seed-coder": (SEED,),
    "falcon": (r"[\p{P}$+<=>^`|~]+", GPT2, "[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{CASED}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
        CHINESE, DIGIT,
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, DIGIT),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3),
    "bloom poro-chat gpt3-finnish": (BLOOM,),
    "viking": (BLOOM, DIGIT),
}  # fmt: skip
"""Values of ``tokenizer.ggml.pre``, and the expressions that split text for them. What the first one matches becomes a
word, what is between matches another, and the next expression splits all of these further."""
PATTERNS = {name: patterns for names, patterns in SPLITS.items() for name in names.split()}
NFC = {"qwen2", "qwen35", "deepseek-r1-qwen", "f2llmv2", "command-r", "mpt", "olmo"}
"""Values whose models were trained on composed letters: a letter and its accent become one character first."""
WHOLE = {*LIKE_LLAMA3.split(), "tekken"}
"""Values whose models take a word of the vocabulary as one token, even if no merges lead to it."""
UNKNOWN, CONTROL, OWN = 2, 3, 4  # tokenizer.ggml.token_type: <unk>, special tokens, other added tokens
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def mend_tokenizer(tokenizer: Any, path: Path, header: Header) -> PreTrainedTokenizerFast:
    """What transformers made of a GGUF file, with the file's own words, added and special tokens.

    It is saved and loaded as it is, whatever the model's family, so that a run's tokenizer equals its base's.
    """
    core: Tokenizer = tokenizer.backend_tokenizer
    special = {n: str(t) for n, t in tokenizer.special_tokens_map.items() if core.token_to_id(str(t)) is not None}
    if header.pairs.get("tokenizer.ggml.model") == "gpt2":
        core, special = _byte_level(core, path, header), {}
    for name, key in NAMED.items():
        number = header.pairs.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and (token := core.id_to_token(number)) is not None:
            special[name] = token
    begins_or_ends = {name: header.pairs.get(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "add_eos_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=tokenizer.chat_template, model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side, truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=False, **special,
        **{name: value for name, value in begins_or_ends.items() if isinstance(value, bool)},
    )  # fmt: skip


def _byte_level(read: Tokenizer, path: Path, header: Header) -> Tokenizer:
    """Byte-level BPE of the header's tokens and merges; ``read``: the same file as transformers reads it."""
    tokens, kinds, merges = (
        read_array(path, header, f"tokenizer.ggml.{n}") for n in ("tokens", "token_type", "merges")
    )
    name = header.pairs.get("tokenizer.ggml.pre", "")
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, pairs, ignore_merges=name in WHOLE))
    core.decoder = decoders.ByteLevel()
    if name in PATTERNS:
        core.normalizer, core.pre_tokenizer = normalizers.NFC() if name in NFC else None, splitting(name)
    else:
        core.normalizer, core.pre_tokenizer = read.normalizer, read.pre_tokenizer
        if isinstance(read.pre_tokenizer, pre_tokenizers.ByteLevel):
            _warn(path, name)
    added = [
        (AddedToken(token, normalized=False, special=kind != OWN), kind)
        for token, kind in zip(tokens, kinds, strict=False)
        if token and kind in (UNKNOWN, CONTROL, OWN)
    ]
    core.add_special_tokens([token for token, kind in added if kind != OWN])
    core.add_tokens([token for token, kind in added if kind == OWN])
    return core


def splitting(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is split into words, in GPT-2's letters for bytes, for a known value of ``tokenizer.ggml.pre``."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _warn(path: Path, name: Any) -> None:
    says = f"splits text in a way that lolcats does not know ({name!r})" if name else "does not say how it splits text"
    warn_once(
        f"The tokenizer of {path} {says} before BPE (tokenizer.ggml.pre). It is split as GPT-2 does. If the model was "
        "trained with another splitting, it gets unusual tokens for numbers and white space, and does worse on them. "
        "Give the model as a directory or hub id if you can."
    )
