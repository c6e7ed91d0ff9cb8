#!/usr/bin/env bash
# Package: markdown-it-py 4.3.0.
# Expected: MarkdownIt() follows CommonMark, which sets no limit for nested lists; and where a program has one, text beyond
#   it stays in the page in some form, or there is an error.
# What happens: with MarkdownIt(), whose preset "commonmark" has maxNesting=20, the text of a list's tenth level is missing
#   from the page: an empty bullet stands there, without an error or a warning. A level of a list counts twice. The preset
#   "js-default" (maxNesting=100) keeps the text.
set -euo pipefail
changed() {
    echo "Changed: the text of the tenth level of a list is no longer lost."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check markdown-it-py==4.3.0 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" -W error - <<'PYTHON' || changed
import sys

from markdown_it import MarkdownIt

source = "\n".join("  " * level + f"- level {level + 1}" for level in range(10))
print(source)
texts = {}
for name, parser in (("MarkdownIt()", MarkdownIt()), ('MarkdownIt("js-default")', MarkdownIt("js-default"))):
    page = parser.render(source)
    texts[name] = [f"level {level + 1}" in page for level in range(10)]
    print(f"{name}: {sum(texts[name])} of 10 texts are in the page, {page.count('<li>')} bullets")
sys.exit(texts != {"MarkdownIt()": [True] * 9 + [False], 'MarkdownIt("js-default")': [True] * 10})
PYTHON
