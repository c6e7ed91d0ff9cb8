#!/usr/bin/env bash
# Package: llguidance 1.9.1.
# Expected: LLMatcher.deep_copy() makes an independent matcher: what one copy reads does not matter to the others, and each
#   has the limits (LLParserLimits) that the original was made with to itself.
# What happens: copies share their lexer, and with it max_lexer_states. After one copy has used these up on a long string,
#   its siblings, and even the untouched original, end in the same error at their next step. A matcher made anew from the
#   same grammar gets as far as the first copy did.
set -euo pipefail
changed() {
    echo "Changed: copies of a matcher no longer share max_lexer_states."
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
grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "maxLength": 10_000}))


def matcher():
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(max_lexer_states=1000))


def letters(matcher, most):
    """Letters of a string that ``matcher`` takes, up to ``most``."""
    matcher.consume_tokens(tokenizer.tokenize_str('"'))
    letter, count = tokenizer.tokenize_str("a")[0], 0
    while count < most and not matcher.is_error():
        matcher.compute_bitmask()
        count += matcher.consume_token(letter)
    return count


original = matcher()
first, second = original.deep_copy(), original.deep_copy()
counts = {
    "first copy, until its limit": letters(first, 500),
    "second copy": letters(second, 50),
    "original": letters(original, 50),
    "matcher made anew": letters(matcher(), 50),
}
for name, count in counts.items():
    print(f"{name}: {count} letters")
print("error of the second copy:", second.get_error().splitlines()[0])
right = 50 < counts["first copy, until its limit"] < 500 and counts["matcher made anew"] == 50
shared = counts["second copy"] < 5 and counts["original"] < 5 and "too many states" in second.get_error()
sys.exit(not (right and shared))
PYTHON
