#!/usr/bin/env bash
# Package: llguidance 1.9.1.
# Expected: a JSON schema with a string of maxLength 100000, which validate_grammar accepts, allows a string of 40000
#   letters, as it does without maxLength.
# What happens: with maxLength, every letter of the answer makes nine more states of the lexer. At the default limits
#   (max_lexer_states is 250000) the answer breaks off with "too many states" after fewer than 28000 letters. Without
#   maxLength, 1000 states are enough for all 40000 letters. The limit is documented, but not that maxLength spends it with
#   each letter.
set -euo pipefail
changed() {
    echo "Changed: a long string with a maxLength no longer runs out of lexer states as it did."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check llguidance==1.9.1 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" - <<'PYTHON' || changed
import json
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

tokenizer = LLTokenizer("byte")
quote, letter = (tokenizer.tokenize_str(text)[0] for text in '"a')
counts, errors = [], []
few = LLParserLimits(max_lexer_states=1000)
for schema, limits in (({"type": "string"}, few), ({"type": "string", "maxLength": 100_000}, LLParserLimits())):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    fault = LLMatcher.validate_grammar(grammar, tokenizer)
    print(f"{schema}, {limits.max_lexer_states} states; validate_grammar: {fault!r}")
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.consume_token(quote)
    count = 0
    while count < 40_000 and not matcher.is_error():
        matcher.compute_bitmask()
        count += matcher.consume_token(letter)
    counts.append(count)
    errors.append((matcher.get_error().splitlines() or ["no error"])[0])
    print(f"  {count} letters; {errors[-1]}")
sys.exit(not (counts[0] == 40_000 and counts[1] < 30_000 and "too many states" in errors[1]))
PYTHON
