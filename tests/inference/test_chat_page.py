"""The chat page in a real browser: Debian's chromium, headless."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import serving, tiny_engine, wait_until
from test_server import slow_down

from lolcats.inference.engine import Engine

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt install chromium")
SHOTS = os.environ.get("LOLCATS_SCREENSHOTS", "")  # a directory for pictures to look at


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
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'", timeout=15_000)


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}-{page.viewport_size['width']}.png"))


def test_chat_stop_regenerate_and_settings(page: Any, engine: Engine) -> None:
    sync_api.expect(page.locator("#name")).to_have_text("tiny")
    shot(page, "empty")
    size = page.inner_text("#state")
    assert re.fullmatch(r"state [\d.]+ KiB, fixed", size)
    page.click("#toggle")
    for name, value in (("max_tokens", "40"), ("temperature", "0"), ("system", "sing")):
        page.fill(f"#{name}", value)
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


def test_the_page_runs_under_its_own_content_security_policy(browser: Any, engine: Engine) -> None:
    with serving(engine) as (address, _):
        page, said = browser.new_page(), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.goto(address)
        sync_api.expect(page.locator("#name")).to_have_text("tiny")
        say(page, "the cat")
        sync_api.expect(page.locator(".assistant")).not_to_be_empty()
        page.click("#send")
        page.close()
    assert [text for text in said if "Content Security Policy" in text] == []
