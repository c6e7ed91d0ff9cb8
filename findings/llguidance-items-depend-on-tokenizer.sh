#!/usr/bin/env bash
# Package: llguidance 1.9.1 (tokenizers 0.23.3).
# Expected: whether an answer can follow a JSON schema depends on the schema and on the limits of LLParserLimits, not on how
#   the tokenizer cuts the text; or validate_grammar(grammar, tokenizer) tells beforehand.
# What happens: an object with 450 optional strings can be written with a tokenizer of single bytes, at the default limits.
#   Give the same tokenizer 186 more tokens like `a"`, `a",` and `a"}`, as tokenizers trained on JSON have them, and the
#   same answer fails within its first string: "Too many items (limit 50000; mask)". Each token that ends the string and
#   goes on costs items for all the properties that may follow. validate_grammar finds no fault with either.
set -euo pipefail
changed() {
    echo "Changed: the same schema now fares alike with both tokenizers."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" - <<'PYTHON' || changed
import json
import string
import sys

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(words):
    """Single bytes, and ``words`` of ASCII."""
    vocabulary = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<end>"))


schema = {
    "type": "object",
    "properties": {f"field{number}": {"type": "string"} for number in range(450)},
    "additionalProperties": False,
}
grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
answer = '{"field3":"yes","field440":"no"}'
endings = [letter + ending for letter in string.ascii_letters + string.digits for ending in ('",', '"}')]
results = []
for words in ([], endings):
    tokenizer = byte_tokenizer(words)
    tokens = tokenizer.tokenize_str(answer)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    count = 0
    for token in tokens:
        matcher.compute_bitmask()
        if not matcher.consume_token(token):
            break
        count += 1
    error = (matcher.get_error().splitlines() or ["no error"])[0]
    results.append((LLMatcher.validate_grammar(grammar, tokenizer), count == len(tokens), error))
    print(f"{tokenizer.vocab_size} tokens: {count} of {len(tokens)} tokens of the answer; {error}")
(valid, whole, _), (also_valid, also_whole, error) = results
sys.exit(not (valid == also_valid == "" and whole and not also_whole and "Too many items" in error))
PYTHON
