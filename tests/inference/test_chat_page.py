"""The chat page in a real browser: Debian's chromium, headless."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import serving, tiny_engine, wait_until
from test_server import slow_down

from lolcats.inference.engine import Engine

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt install chromium")
SHOTS = os.environ.get("LOLCATS_SCREENSHOTS", "")  # a directory for pictures to look at
ANSWER = """## Sorting

Use **`sorted`**, which leaves its argument *as it is* ([docs](https://docs.python.org/3/)):

```python
def by_length(words: list[str]) -> list[str]:
    return sorted(words, key=lambda word: (len(word), word))  # <b>not bold</b>, and a line that has to scroll
```

1. first
   - inner one
2. second, and ~~third~~

> A quote.

| Method | Stable | n log n |
|:-------|:------:|--------:|
| merge  | yes    | 1024    |
| heap   | no     | 2048    |

<img src=x onerror="document.title='hacked'"><script>document.title='hacked'</script>
[no](javascript:alert(1)) ![picture](https://elsewhere.example/p.png)
"""


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> Engine:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=())
    slow_down(engine)
    return engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1100, 760), (390, 780)], ids=["desktop", "phone"])
def page(request: Any, browser: Any, engine: Engine) -> Iterator[Any]:
    width, height = request.param
    with serving(engine) as (address, _):
        page = browser.new_page(viewport={"width": width, "height": height}, bypass_csp=True)  # evaluate() needs it
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda r: page.problems.append(r.url) if not r.url.startswith(address) else None)
        page.goto(address)
        yield page
        assert page.problems == []
        page.close()


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def done(page: Any) -> None:
    sync_api.expect(page.locator("#send")).to_have_text("Send", timeout=15_000)
    sync_api.expect(page.locator("[aria-busy]")).to_have_count(0)


def shot(page: Any, name: str) -> None:
    for scheme in ("light", "dark") if SHOTS else ():
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=str(Path(SHOTS) / f"{name}-{page.viewport_size['width']}-{scheme}.png"))


def answering(page: Any, text: str) -> list[Any]:
    """Answers the page's requests with this text, in pieces, in the server's place; the requests come here."""
    requests = list[Any]()
    events = [{"choices": [{"delta": {"content": text[i : i + 9]}}]} for i in range(0, len(text), 9)]
    events.append({"choices": [], "usage": {"completion_tokens": 7, "total_tokens": 12}})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def answer(route: Any) -> None:
        requests.append(route.request.post_data_json)
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    return requests


def test_a_memory_that_grows_is_not_called_fixed(page: Any, engine: Engine) -> None:
    """With kept heads; the server's side is in test_kept_server.py."""
    assert page.locator("#hint").inner_text().endswith("has a fixed size.")
    state = httpx.get(f"{page.url}health").json()
    page.route("**/health", lambda route: route.fulfill(json={**state, "token_bytes": 16 << 10}))
    page.reload()
    sync_api.expect(page.locator("#state")).to_have_text(re.compile(r"state [\d.]+ KiB \+ 16.0 KiB a token"))
    assert page.locator("#hint").inner_text().strip() == "Say something."


def test_chat_stop_regenerate_and_settings(page: Any, engine: Engine) -> None:
    sync_api.expect(page.locator("#name")).to_have_text("tiny")
    shot(page, "empty")
    size = page.inner_text("#state")
    assert re.fullmatch(r"state [\d.]+ KiB, fixed", size)
    page.click("#toggle")
    for name, value in (("max_tokens", "40"), ("temperature", "0"), ("system", "sing")):
        page.fill(f"#{name}", value)
    assert "Max tokens" in page.locator("#settings label").all_inner_texts()[5]
    shot(page, "settings")
    page.click("#toggle")
    say(page, "the cat <b>sat</b>\n on a mat")
    done(page)
    assert page.locator(".user").inner_text() == "the cat <b>sat</b>\n on a mat"
    first = page.locator(".assistant").inner_text()
    assert first
    tokens = int(page.inner_text("#context").split()[0].replace(",", ""))
    assert tokens > 40
    assert re.fullmatch(r"[\d.]+ tokens/s", page.inner_text("#speed"))
    page.click("#again")
    done(page)
    assert page.locator(".assistant").all_inner_texts() == [first]  # greedy: the same again

    page.click("#toggle")
    page.fill("#max_tokens", "4000")
    page.click("#toggle")
    say(page, "dogs")
    page.wait_for_function("document.querySelectorAll('.assistant')[1]?.textContent.length > 30")
    assert page.inner_text("#send") == "Stop"
    shot(page, "running")
    page.click("#send")
    done(page)
    wait_until(lambda: engine.idle)
    stopped = page.locator(".assistant").nth(1).inner_text()
    assert len(stopped) > 20
    assert page.inner_text("#state") == size
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(page, "stopped")
    page.click("#new")
    assert page.locator(".message").count() == 0


def test_errors_are_shown_and_a_new_conversation_forgets_a_running_one(page: Any, engine: Engine) -> None:
    page.click("#toggle")
    page.fill("#temperature", "9")
    say(page, "cat")
    sync_api.expect(page.locator(".error")).to_contain_text("temperature")
    shot(page, "error")
    page.fill("#temperature", "1")
    page.fill("#max_tokens", "4000")
    page.click("#again")
    page.wait_for_function("document.querySelector('.assistant')?.textContent.length > 10")
    page.click("#new")
    wait_until(lambda: engine.idle)
    page.wait_for_timeout(100)
    assert page.evaluate("messages.length") == 0
    assert page.locator(".message").count() == 0


def test_an_answer_is_rendered_and_nothing_in_it_runs(page: Any) -> None:
    requests = answering(page, ANSWER)
    say(page, "*sort* <i>it</i>")
    done(page)
    answer = page.locator(".assistant")
    assert answer.locator("h2").inner_text() == "Sorting"
    assert answer.locator("strong code").inner_text() == "sorted"
    assert "<b>not bold</b>" in answer.locator("pre > code.language-python").inner_text()
    assert answer.locator("ol > li > ul > li").inner_text() == "inner one"
    assert answer.locator("td").all_inner_texts() == ["merge", "yes", "1024", "heap", "no", "2048"]
    assert answer.locator("a").evaluate_all("links => links.map(link => [link.textContent, link.href, link.rel])") == [
        ["docs", "https://docs.python.org/3/", "noopener noreferrer nofollow"],
        ["picture", "https://elsewhere.example/p.png", "noopener noreferrer nofollow"],
    ]
    assert answer.locator("img, script, [onerror]").count() == 0
    assert "<img src=x onerror=" in answer.inner_text()
    assert page.title() == "tiny"
    assert page.locator(".user").inner_text() == "*sort* <i>it</i>"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(page, "answer-end")
    page.locator("#talk").evaluate("talk => { talk.scrollTop = 0; }")
    shot(page, "answer")

    say(page, "again")
    done(page)
    assert requests[1]["messages"][1] == {"role": "assistant", "content": ANSWER}  # as the model wrote it
    assert answer.locator(".tail").all_inner_texts() == ["", ""]


@pytest.mark.parametrize("secure", [True, False], ids=["clipboard", "no clipboard"])
def test_code_is_copied(page: Any, secure: bool) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("(window.clipboard = navigator.clipboard).writeText('before')")
    if not secure:  # as on a page of plain HTTP from another machine
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    answering(page, "```\nfirst\n```\nand\n```sh\nls  -l\ncd\n```\n")
    say(page, "code")
    done(page)
    page.locator(".assistant button").nth(1).click()
    sync_api.expect(page.locator(".assistant button").nth(1)).to_have_text("Copied")
    assert page.evaluate("clipboard.readText()") == "ls  -l\ncd"
    sync_api.expect(page.locator(".assistant button").nth(1)).to_have_text("Copy")
    assert page.locator("textarea").count() == 1


def test_text_that_cannot_be_rendered_stays_as_it_is(page: Any) -> None:
    page.route("**/markdown", lambda route: route.fulfill(status=500, json={"error": {"message": "no"}}))
    answering(page, "*a* <b>b</b>\n\n- c")
    say(page, "text")
    done(page)
    assert page.locator(".assistant").inner_text() == "*a* <b>b</b>\n\n- c"
    assert page.locator(".error").count() == 0


def test_an_answer_is_rendered_as_it_grows_one_rendering_at_a_time(page: Any, engine: Engine) -> None:
    begun, running, most = list[str](), list[Any](), list[int]()

    def began(request: Any) -> None:
        if request.url.endswith("/markdown"):
            begun.append(request.post_data_json["text"])
            running.append(request)
            most.append(len(running))

    page.on("request", began)
    page.on("requestfinished", lambda request: running.remove(request) if request in running else None)
    page.click("#toggle")
    page.fill("#max_tokens", "4000")
    page.click("#toggle")
    say(page, "the cat")
    start = time.monotonic()
    while len(begun) < 4:
        assert page.inner_text("#send") == "Stop"
        page.wait_for_timeout(100)
    page.click("#send")
    done(page)
    wait_until(lambda: engine.idle)
    assert set(most) == {1}
    assert len(begun) <= 4 * (time.monotonic() - start) + 2  # the first and the last come at once
    assert all(later.startswith(earlier) for earlier, later in pairwise(begun))
    assert begun[-1] == page.evaluate("messages[1].content")


def test_answers_are_rendered_with_the_key(browser: Any, engine: Engine) -> None:
    with serving(engine, api_key="secret") as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.click("#toggle")
        page.fill("#key", "secret")
        page.fill("#max_tokens", "5")
        say(page, "the cat")
        done(page)
        sync_api.expect(page.locator(".assistant .rich")).not_to_be_empty()
        page.close()


def test_the_page_runs_under_its_own_content_security_policy(browser: Any, engine: Engine) -> None:
    with serving(engine) as (address, _):
        page, said = browser.new_page(), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.goto(address)
        sync_api.expect(page.locator("#name")).to_have_text("tiny")
        say(page, "the cat")
        sync_api.expect(page.locator(".assistant .rich")).not_to_be_empty()
        page.click("#send")
        done(page)
        answering(page, ANSWER)
        say(page, "sort")
        done(page)
        sync_api.expect(page.locator(".assistant table")).to_be_visible()
        assert page.title() == "tiny"
        page.close()
    assert [text for text in said if "Content Security Policy" in text] == []
