"""Base models: hub ids, directories, GGUF files; their identity; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import AutoTokenizer

import lolcats
from lolcats.config import AttentionConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.pipeline import linearize
from lolcats.weights import base as bases
from lolcats.weights.base import find_base, load_model, load_tokenizer

IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
}  # fmt: skip


def write_gguf(path: Path, model, tokenizer, pre: str | None = "smollm", change=lambda writer: None) -> Path:
    """The model as llama.cpp would store it: renamed tensors, q and k rows of Llama interleaved for its RoPE.

    ``pre``: what the file says of its tokenizer; ``change`` adds to the file.
    """
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    own = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.special}
    writer.add_token_types([4 if t in own else 3 if t.startswith("<") else 1 for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name and config.model_type == "llama":
                rows = tensor.view(count, 2, tensor.shape[0] // count // 2, -1)
                tensor = rows.transpose(1, 2).reshape(tensor.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.contiguous().numpy())
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


@torch.no_grad()
def test_gguf_is_a_base_like_any_other(tmp_path: Path, tokenizer, chat_file: Path, settings) -> None:
    original = tiny_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", original, tokenizer)
    base = find_base(str(path))
    assert base.form == "gguf"
    model = load_model(base, torch.float32)
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-5, rtol=1e-5)
    text = "the cat sat on a mat"
    assert load_tokenizer(base)(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    converted = lolcats.convert(model, AttentionConfig(window_size=8, sinks=2, feature_dim=8))
    converted.save_pretrained(tmp_path / "merged")
    again = lolcats.load(tmp_path / "merged")
    assert torch.equal(again(IDS).logits, converted(IDS).logits)

    text_file = tmp_path / "text.txt"
    text_file.write_text("\n\n".join(f"{i} " + "the cat sat on a mat and dogs like milk. " * 40 for i in range(60)))
    with torch.enable_grad():
        run = linearize(
            str(path), str(text_file), tmp_path / "out", load_config("paper-sinks", settings), say=lambda _: 0
        )
    assert run.base.fingerprint == base.fingerprint
    adapter, merged = lolcats.load(tmp_path / "out"), lolcats.load(tmp_path / "out" / "merged")
    assert torch.equal(adapter(IDS).logits, merged(IDS).logits)


@torch.no_grad()
def test_gguf_through_a_link(tmp_path: Path, tokenizer, settings) -> None:
    """As in the hub's cache. Older versions recorded the file that the link leads to."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    blob, link = tmp_path / "blobs" / "3f2a", tmp_path / "snapshots" / "tiny.gguf"
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tokenizer).rename(blob)
    link.symlink_to("../blobs/3f2a")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} " + "the cat sat on a mat and dogs like milk. " * 20 for i in range(60)))
    config = load_config("paper-sinks", [*settings, "transfer.max_steps=1", "finetune.max_steps=1"])
    for name, given, recorded in (("link", link, link), ("file", blob, blob)):
        with torch.enable_grad():
            linearize(str(given), str(text), tmp_path / name, config, merge=False, say=lambda _: None)
        model = lolcats.load(tmp_path / name)
        assert model.config.lolcats["base"]["path"] == str(recorded)
        assert model(IDS).logits.isfinite().all()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3f2a").write_bytes(b"PK")
    with pytest.raises(LolcatsError, match="not a GGUF file"):
        find_base(str(tmp_path / "other" / "3f2a"))


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_gguf(keep: float, tmp_path: Path, tokenizer) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tokenizer)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    base = find_base(str(path))
    with pytest.raises(LolcatsError, match="Cannot load"):  # noqa: PT012  the header may survive, the weights cannot
        load_tokenizer(base)
        load_model(base, torch.float32)


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "a")
    tiny_model().save_pretrained(tmp_path / "b")
    tiny_model(seed=1).save_pretrained(tmp_path / "c")
    a, b, c = (find_base(str(tmp_path / n)).fingerprint for n in "abc")
    assert a == b != c
    big = tiny_model("llama", intermediate_size=20_000)
    big.save_pretrained(tmp_path / "big")
    before = find_base(str(tmp_path / "big")).fingerprint
    with torch.no_grad():
        big.model.layers[0].mlp.up_proj.weight.mul_(1.01)  # one tensor in the middle of the file
    big.save_pretrained(tmp_path / "big")
    assert find_base(str(tmp_path / "big")).fingerprint != before


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    for path, message in (
        (tmp_path / "weights.bin", "not a GGUF file"),
        (tmp_path, "has no config.json"),
        (tmp_path / "no.gguf", "does not exist"),
        ("nobody/no-such-model", "on disk or on the Hugging Face hub"),
    ):
        with pytest.raises(LolcatsError, match=message):
            find_base(str(path))


def test_tokenizer_that_takes_words_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Misread:
        def get_vocab(self) -> dict[str, int]:
            return {"▁the": 506, "▁t": 259, "he": 511}

        def tokenize(self, text: str) -> list[str]:
            return text.replace(" the", " ▁t he").split()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Misread())
    monkeypatch.setattr(bases, "_check_gguf", lambda _: None)
    with pytest.raises(LolcatsError, match="splits 'the'"):
        load_tokenizer(bases.Base(str(tmp_path / "gemma.gguf"), "gguf", ""))


def test_tokenizer_without_its_vocabulary_is_refused(model_dirs, tmp_path: Path) -> None:
    """transformers makes one that turns any text into nothing."""
    shutil.copytree(model_dirs["llama"], tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    config = tmp_path / "model" / "tokenizer_config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(LolcatsError, match=r"has no vocabulary: .* missing"):
        load_tokenizer(find_base(str(tmp_path / "model")))
