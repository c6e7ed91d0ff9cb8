"""Safe HTML of a model's answer: CommonMark with tables and strikethrough, rendered and then sanitized.

Reference links (``[a]: https://...``) stay text: a few kilobytes of them can repeat one long address thousands of
times.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterable, Iterator

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

LIMIT = 64 << 10  # characters
SECONDS = 0.2  # of the thread's own time for parsing; ordinary answers take a tenth of it, or less
NESTING = 20  # of quotes and lists (two each), and of brackets
ADDRESSES = ("http://", "https://", "mailto:")
TAGS = {
    *("p", "br", "hr", "blockquote", "pre", "code", "em", "strong", "s", "a"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "th": {"align"}, "td": {"align"}}
LANGUAGE = re.compile(r"language-[\w+#.-]{1,40}")


class _TooMuch(Exception):
    """The text is over one of the limits."""


def render(text: str) -> str:
    """HTML that a page may insert as it is.

    It has no scripts, styles or identifiers, loads nothing, and links only to http, https and mailto addresses. A text
    that is too long, too deeply nested or too slow to parse comes back unformatted, in one ``pre``.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs, which JSON may hold
    try:
        if len(text) > LIMIT:
            raise _TooMuch
        rendered = PARSER.render(text, {"end": time.thread_time() + SECONDS})
    except _TooMuch:
        return f"<pre>{html.escape(text)}</pre>"
    return SANITIZER.clean(rendered)


class _Parser(MarkdownIt):
    """Takes a link to anywhere else as text."""

    def validateLink(self, url: str) -> bool:
        return url.lower().startswith(ADDRESSES)


def _in_time(state: StateBlock | StateInline, *_: object) -> bool:
    """A rule that matches nothing: the parser tries it first at every line and every piece of a line."""
    if time.thread_time() > state.env["end"]:
        raise _TooMuch
    return False


def _not_too_deep(state: StateCore) -> None:
    if any(token.level >= NESTING - 1 for token in state.tokens):  # the parser drops what is deeper
        raise _TooMuch


def _harmless(state: StateCore) -> None:
    """Replaces what the page would load or refuse: images by links, and the inline styles of cells by ``align``."""
    for token in state.tokens:
        if token.children:
            token.children = list(_without_images(token.children))
        if token.type in ("th_open", "td_open") and (style := token.attrs.pop("style", None)):
            token.attrSet("align", str(style).removeprefix("text-align:"))


def _without_images(tokens: Iterable[Token]) -> Iterator[Token]:
    linked = False
    for token in tokens:
        if token.type in ("link_open", "link_close"):
            linked = token.type == "link_open"
        if token.type != "image":
            yield token
            continue
        address = str(token.attrs["src"])
        text = Token("text", "", 0, content=_alternative(token) or address)
        link = Token("link_open", "a", 1, attrs={"href": address}), text, Token("link_close", "a", -1)
        yield from (text,) if linked or not address else link


def _alternative(image: Token) -> str:
    """The text in the brackets of an image."""
    inner = image.children or []
    return "".join(_alternative(t) if t.type == "image" else t.content or " " * (t.tag == "br") for t in inner)


def _keep(_: str, attribute: str, value: str) -> str | None:
    return value if attribute != "class" or LANGUAGE.fullmatch(value) else None


def _parser() -> MarkdownIt:
    parser = _Parser("commonmark", {"html": False, "maxNesting": NESTING})
    parser.enable(["table", "strikethrough"]).disable("reference")
    parser.block.ruler.before("table", "in_time", _in_time, {"alt": ["paragraph", "blockquote", "list", "table"]})
    parser.inline.ruler.before("text", "in_time", _in_time)
    parser.core.ruler.after("block", "not_too_deep", _not_too_deep)
    parser.core.ruler.after("inline", "harmless", _harmless)
    return parser


PARSER = _parser()
SANITIZER = nh3.Cleaner(
    tags=TAGS,
    attributes=ATTRIBUTES,
    attribute_filter=_keep,
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)
