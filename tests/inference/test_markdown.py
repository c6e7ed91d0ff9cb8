"""Answers as HTML: what is rendered, what hostile text cannot do, and how long the worst text takes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

pytest.importorskip("nh3")
pytest.importorskip("fastapi")
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from lolcats.inference.server import markdown, page
from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.limits import Limits
from lolcats.inference.server.markdown import render

REL = 'target="_blank" rel="noopener noreferrer nofollow"'


def test_blocks_and_emphasis() -> None:
    assert render("# A *b* **c** ~~d~~ `e<`\n") == (
        "<h1>A <em>b</em> <strong>c</strong> <s>d</s> <code>e&lt;</code></h1>\n"
    )
    assert render("3. a\n4. b\n   - c") == (
        '<ol start="3">\n<li>a</li>\n<li>b\n<ul>\n<li>c</li>\n</ul>\n</li>\n</ol>\n'
    )  # fmt: skip
    assert render("> a\n\n---") == "<blockquote>\n<p>a</p>\n</blockquote>\n<hr>\n"


def test_code_keeps_its_language_and_every_character() -> None:
    assert render("```python x\nif a < b:\n    print('<b>')\n```") == (
        "<pre><code class=\"language-python\">if a &lt; b:\n    print('&lt;b&gt;')\n</code></pre>\n"
    )
    assert render("```c++\n1\n```") == '<pre><code class="language-c++">1\n</code></pre>\n'
    assert render('```a"onclick=x\n1\n```') == "<pre><code>1\n</code></pre>\n"  # no language
    assert render("```py\nstill open") == '<pre><code class="language-py">still open</code></pre>\n'


def test_tables_are_aligned_without_styles() -> None:
    table = render("| a | b |\n|:-:|--:|\n| 1 | 2 |\n")
    assert re.findall(r"<t[hd].*?>", table.replace("<thead>", "")) == [
        '<th align="center">', '<th align="right">', '<td align="center">', '<td align="right">',
    ]  # fmt: skip


def test_links_are_absolute_and_tell_nothing() -> None:
    assert render("[a](https://b.c/?d=1&e) <http://f.g> [m](mailto:a@b.c)") == (
        f'<p><a href="https://b.c/?d=1&amp;e" {REL}>a</a> <a href="http://f.g" {REL}>http://f.g</a> '
        f'<a href="mailto:a@b.c" {REL}>m</a></p>\n'
    )


@pytest.mark.parametrize(
    "link",
    [
        "[a](javascript:alert(1))", "[a](JaVaScRiPt:alert(1))", "[a](&#106;avascript:alert(1))", "[a](java\tscript:x)",
        "[a](<java\\script:alert(1)>)", "[a](data:text/html,<script>alert(1)</script>)", "[a](data:image/png;base64,A)",
        "[a](vbscript:x)", "[a](file:///etc/passwd)", "[a](/static/x)", "[a](//evil.example)", "[a](http:x)", "[a]()",
        "<javascript:alert(1)>", "<data:text/html,x>", "![a](javascript:alert(1))", "[a]: https://b.c\n\n[a]",
        "[a](\x01javascript:alert(1))", "[a](&Tab;javascript:alert(1))", "[a](%6aavascript:alert(1))",
    ],
)  # fmt: skip
def test_other_links_stay_text(link: str) -> None:
    assert "href" not in render(link)


def test_images_become_links() -> None:
    assert render('![a *b*](https://c.d/e.png "f")') == f'<p><a href="https://c.d/e.png" {REL}>a b</a></p>\n'
    assert render("![](https://c.d)") == f'<p><a href="https://c.d" {REL}>https://c.d</a></p>\n'
    assert render("[![a](https://b.c)](https://d.e)") == f'<p><a href="https://d.e" {REL}>a</a></p>\n'
    assert render("![a ![b](https://c.d)](https://e.f)") == f'<p><a href="https://e.f" {REL}>a b</a></p>\n'


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a <b onmouseover=alert(1)>b</b>",
        "<svg/onload=alert(1)>", "<style>*{display:none}</style>", "<iframe src=https://a.b></iframe>", "<!-- a -->",
        "<a href=javascript:alert(1)>x</a>", "```\n</code></pre><script>alert(1)</script>\n```",
        "`</code><script>`", '[a](https://b.c "\\"onclick=alert(1) x=")', '[a](https://b.c/"onclick=alert(1))',
        "[a](https://b.c 'd\" onclick=\"e')", "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;img src=x onerror=a&#62;",
        "![<img src=x onerror=alert(1)>](https://a.b)", '![" onerror="alert(1)](https://a.b)',
        "|<script>|\n|-|\n|<img src=x onerror=a>|", "<form action=https://a.b><input name=x>", "<math><mtext><style>",
        "<base href=https://a.b>", "<meta http-equiv=refresh content=0>", "\x00<script\x00>", "<scr<script>ipt>",
    ],
)  # fmt: skip
def test_hostile_text_is_only_text(text: str) -> None:
    for tag, attributes in elements(render(text)):
        assert tag in markdown.TAGS
        assert set(attributes) <= {"href", "title", "rel", "target", "class", "align", "start"}
        assert (attributes.get("href") or "https://").startswith("https://")


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    found = list[tuple[str, dict[str, str | None]]]()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attrs)))

    Parser().feed(html)
    return found


def test_html_in_an_answer_is_shown_as_it_is_written() -> None:
    assert render("<b>a</b> &amp; &lt;") == "<p>&lt;b&gt;a&lt;/b&gt; &amp; &lt;</p>\n"
    assert render("<div>\n\n*a*") == "<p>&lt;div&gt;</p>\n<p><em>a</em></p>\n"


def test_texts_that_are_no_text() -> None:
    assert render("") == ""
    assert render("a\ud800b") == "<p>a?b</p>\n"
    assert render("a\x00b") == "<p>a\ufffdb</p>\n"


def test_a_text_over_the_limits_comes_back_as_it_is() -> None:
    long = "*a* <b>" * (markdown.LIMIT // 7 + 1)
    assert render(long) == "<pre>" + long.replace("<", "&lt;").replace(">", "&gt;") + "</pre>"
    assert render("> " * 50 + "deep & dark") == f"<pre>{'&gt; ' * 50}deep &amp; dark</pre>"
    assert "deep" in render("- " * 8 + "deep")


def full(piece: str) -> str:
    return piece * (markdown.LIMIT // len(piece))


def nested(start: str, end: str) -> str:
    times = markdown.LIMIT // len(start + end) - 1
    return start * times + "a" + end * times


@pytest.mark.parametrize(
    "text",
    [
        full(">"), full("> a\n"), full("> a\n\n"), "> " * 15 + full("a\n")[:-30], full("- "), full("- a\n"),
        full("".join(" " * 2 * k + "- a\n" for k in range(8))), full("1. a\n"), full("> - "), full("["),
        nested("[", "]"), nested("[", "](http://a)"), nested("![", "](http://a)"), full("[]("), full("[a](<b"),
        full("[a](http://b)"), "[a](" + full("(")[:-4], "".join("[" * k + "\n" for k in range(360)), full("`"),
        " ".join("`" * k for k in range(1, 360)), full("[` ``"), full("*"), full("*a**"), full("a**b"), full("*_"),
        nested("*a ", " a*"), full("~~a "), full("<"), full("<a@b.c>"), full("<http:"), full("&"), full("&#"),
        "|a" * 2000 + "\n" + "|-" * 2000 + full("\na")[:-8002], "|a" * 99 + "\n" + "|-" * 99 + full("\n|")[:-400],
        full("|a|b\n|:-|-:\n|a|b\n\n"), full("a\n"), full("a\n=\n"), full("```\n"), full("    a\n"), full("\n"),
        "[a]: http://b '" + "<" * 30_000 + "'\n\n" + "[a]" * 10_000, "[a](http://" + full("\u00e4.")[:-12] + ")",
    ],
    ids=lambda text: repr(text[:12] + text[2000:2006]),
)  # fmt: skip
def test_the_worst_texts_take_no_longer_than_the_limits_allow(text: str) -> None:
    began = time.thread_time()
    html = render(text)
    assert time.thread_time() - began < 1  # 0.4 s where this was written
    assert len(html) < 2_000_000


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()

    def authorize(request: Request) -> None:
        if request.headers.get("authorization") != "Bearer key":
            raise ApiError(401, "Wrong key.")

    @app.exception_handler(ApiError)
    async def failed(_: Request, error: ApiError) -> Response:
        return error.response()

    page.add_page(app, authorize, Limits(body_bytes=1000))
    with TestClient(app, headers={"Authorization": "Bearer key"}) as client:
        yield client


def test_the_page_needs_nothing_inline_and_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/", headers={"Authorization": ""})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script>|\sstyle=|\son\w+=|https?:", answer.text)
    loaded = re.findall(r'(?:src|href)="(static/[^"]+)"', answer.text)
    assert sorted(loaded) == ["static/chat.css", "static/chat.js"]
    assert [client.get(f"/{name}").headers["content-type"] for name in sorted(loaded)] == [
        "text/css; charset=utf-8", "text/javascript; charset=utf-8",
    ]  # fmt: skip


def test_files_are_checked_before_a_copy_of_them_is_used(client: TestClient) -> None:
    first = client.get("/static/chat.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/static/chat.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["x", "..%2fapp.py", "%2e%2e/app.py", "chat.html/chat.js", ""])
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_texts_are_rendered_for_those_who_have_the_key(client: TestClient) -> None:
    assert client.post("/markdown", json={"text": "*a*"}).json() == {"html": "<p><em>a</em></p>\n"}
    assert client.post("/markdown", json={"text": "*a*"}, headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    ("status", "param", "content", "kind"),
    [
        (400, None, b"{", "application/json"), (400, None, b"\xff", "application/json"),
        (400, "text", b"{}", "application/json"), (400, "text", b"[]", "application/json"),
        (400, "text", b'{"text": 1}', "application/json"), (400, None, b"[" * 900, "application/json"),
        (413, None, b'{"text": "' + b"a" * 1000 + b'"}', "application/json"),
        (415, None, b'{"text": ""}', "text/plain"),
    ],
)  # fmt: skip
def test_other_requests_are_refused(
    client: TestClient, status: int, param: str | None, content: bytes, kind: str
) -> None:
    answer = client.post("/markdown", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
