"""Hooks of mkdocs.

Equations become MathML while the site is built, so no page needs a script for them. Links to files outside of docs/
become plain text, after a check that the files exist; the links work where the repository is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

MATH = re.compile(r"```.*?\n *```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$]*?[^\s$])?)\$", re.S)
OUTSIDE = re.compile(
    r"\[(?P<text>[^\]]+)\]\((?P<path>(?:\.\./)+(?:src|tests|benchmarks|examples|experiments)/[^)#]*)\)"
)
LIMITS = re.compile(r"(\\sum|\\max)_")
ROLE = re.compile(r":(?:func|class|mod|meth|attr):(?=<code>)")

equations: list[str] = []


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace each equation with a placeholder that Markdown does not change."""

    def outside(match: re.Match[str]) -> str:
        if not (Path(config["docs_dir"]) / Path(page.file.src_path).parent / match["path"]).resolve().exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {match['path']}, which does not exist")
        return match["text"]

    def waiting(match: re.Match[str]) -> str:
        latex = match["block"] or match["inline"]
        if not latex:
            return match[0]
        if match["block"]:
            latex = LIMITS.sub(r"\1\\limits_", latex)
        equations.append(convert(" ".join(latex.split()), display="block" if match["block"] else "inline"))
        return f"equation{len(equations) - 1}end"

    return MATH.sub(waiting, OUTSIDE.sub(outside, markdown))


def on_page_content(html: str, **_: Any) -> str:
    html = re.sub(r"equation(\d+)end", lambda match: equations[int(match[1])], html)
    return ROLE.sub("", html)
