#!/usr/bin/env bash
# Package: transformers 5.23.0 (gguf 0.19.0, torch 2.13.0).
# Expected: the special tokens of a GGUF file with byte-level BPE (tokenizer.ggml.model gpt2) have the ids that the file
#   gives them, whatever characters they are written with.
# What happens: a special token with a character outside the letters that GPT-2 writes bytes with, such as DeepSeek's
#   "<｜end▁of▁sentence｜>", gets a new id past the end of the vocabulary, without a word. Encoding a text with it, or
#   appending eos_token_id, then reads past the model's embedding. The same token with ASCII bars gets its own id.
set -euo pipefail
changed() {
    echo "Changed: special tokens outside GPT-2's letters have the ids of the file."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 ||
    { echo "The packages could not be installed."; exit 2; }
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' || changed
import sys

import gguf
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = 3
letters = sorted(pre_tokenizers.ByteLevel.alphabet())


def read(end):
    """The tokenizer of a GGUF file whose last token is the special token ``end``; and how many tokens the file has."""
    tokens = [*letters, "ab", "cd", end]
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token == end else 1 for token in tokens])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return PreTrainedTokenizerFast.from_pretrained(".", gguf_file="model.gguf"), len(tokens)


seen = {}
for end in ("<|end|>", "<｜end▁of▁sentence｜>"):
    tokenizer, count = read(end)
    ids = tokenizer(f"ab{end}")["input_ids"]
    seen[end] = (tokenizer.eos_token_id, ids[-1])
    print(f"{end}: the file has {count} tokens and eos_token_id {count - 1}; eos_token_id is {tokenizer.eos_token_id}, "
          f"and the text 'ab{end}' is {ids}")
right, wrong = seen.values()
sys.exit(not (right == (count - 1, count - 1) and wrong[0] >= count and wrong[1] >= count))
PYTHON
