"""No schema of a client costs the server memory or time; the process that compiles them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from support.grammars import EOS, LIMITS, PATTERN, SCALAR, TREE, VOCABULARY, compiling, options, schema, walk

pytest.importorskip("llguidance")

from lolcats.inference.engine.grammar import GrammarError, Matcher, MatcherLimits, Vocabulary
from lolcats.inference.server import grammar as module
from lolcats.inference.server.grammar import CHILD, Grammars

MULTIPLES = {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967)]}
"""Takes more than 6 GiB where nothing limits it."""
SLOW = {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}
"""Takes minutes, and 80 MB more each second."""


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Iterator[Grammars]:
    with compiling(tokenizer) as made:
        yield made


def rss() -> int:
    return psutil.Process().memory_info().rss


def test_memory_of_a_hostile_schema_is_limited(tokenizer) -> None:
    """It takes gigabytes of its own; the server's process does not grow, and the child is there again afterwards."""
    grammars = Grammars(tokenizer, VOCABULARY, {EOS}, replace(LIMITS, memory_bytes=64 << 20, seconds=60))
    try:
        grammars.compile(schema(SCALAR))
        child, before = grammars.child, rss()
        with pytest.raises(GrammarError, match="takes more than 64 MiB of memory"):
            grammars.compile(schema(MULTIPLES))
        assert rss() - before < 16 << 20
        assert child is not None
        assert not child.alive
        assert walk(grammars.compile(schema(PATTERN))(), random.Random(0))
    finally:
        grammars.close()


def test_time_of_a_hostile_schema_is_limited_and_known_ones_do_not_wait(tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCABULARY, {EOS}, replace(LIMITS, seconds=2, memory_bytes=4 << 30))
    try:
        grammars.compile(schema(SCALAR))
        refused: list[float] = []

        def attack() -> None:
            with pytest.raises(GrammarError, match="takes more than 2 s"):
                grammars.compile(schema(SLOW))
            refused.append(time.monotonic())

        begin = time.monotonic()
        thread = threading.Thread(target=attack)
        thread.start()
        time.sleep(0.3)
        walk(grammars.compile(schema(SCALAR))(), random.Random(0))
        assert not refused, "a known schema did not wait for the hostile one"
        walk(grammars.compile(schema(PATTERN))(), random.Random(0))
        thread.join()
        assert refused[0] - begin < 10
    finally:
        grammars.close()


@pytest.mark.parametrize(
    "hostile",
    [
        {"type": "string", "pattern": "^" + ".?" * 3000 + "$"},
        {"type": "string", "pattern": "(?i)^" + "(k|s|é){0,1000}" * 200 + "$"},
        {"type": "string", "pattern": "^(((a|b){0,1000}){0,1000}){0,1000}c$"},
        {"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}} for j in range(10)]} for i in range(20)]},
        {"allOf": [{"type": "string", "pattern": f"^({'.' * n})*$"} for n in (100, 102, 106, 108, 112)]},
    ],
    ids=["optional", "case", "counted", "product", "intersection"],
)
def test_limits_of_llguidance_refuse_the_rest(grammars: Grammars, hostile: Any) -> None:
    before, begin = rss(), time.monotonic()
    with pytest.raises(GrammarError, match="cannot be used"):
        grammars.compile(schema(hostile))
    assert time.monotonic() - begin < 10
    assert rss() - before < 16 << 20


def test_slow_tokens_are_refused(tokenizer) -> None:
    """Each token of a constant of 60,000 characters takes milliseconds."""
    limits = replace(LIMITS, seconds=60, steps=30, matcher=MatcherLimits(token_seconds=0.001, spare_seconds=0.01))
    grammars = Grammars(tokenizer, VOCABULARY, {EOS}, limits)
    try:
        with pytest.raises(GrammarError, match="a token takes too much time"):
            grammars.compile(schema({"const": "ab" * 30_000}))
    finally:
        grammars.close()


def test_limits_are_kept_in_the_engine_too(grammars: Grammars, tokenizer) -> None:
    text = grammars.compile(schema({"type": "string", "pattern": "^(.*a.{20}|.*b.{19})*$"})).text
    vocabulary = Vocabulary(tokenizer, VOCABULARY, {EOS})
    for limits, reason in [
        (MatcherLimits(lexer_states=50), "too many states"),
        (MatcherLimits(token_seconds=0, spare_seconds=0.002), "too much processor time per token"),
    ]:
        rng = random.Random(0)
        with pytest.raises(GrammarError, match=reason):  # noqa: PT012
            matcher = Matcher(vocabulary, text, limits)
            while True:
                tokens = options(matcher)
                matcher.accept(rng.choice([t for t in tokens if '"' not in tokenizer.decode([t])] or tokens))


def test_the_child_is_started_late_and_again_after_a_kill_and_ends(tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCABULARY, {EOS}, LIMITS)
    assert grammars.child is None
    grammars.prepare()
    assert grammars.child is not None
    first = grammars.child.process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    grammars.compile(schema(SCALAR))
    second = grammars.child.process
    assert second.pid != first.pid
    grammars.compile(schema(PATTERN))
    assert grammars.child.process is second
    grammars.close()
    assert second.returncode is not None
    with pytest.raises(GrammarError, match="shutting down"):
        grammars.compile(schema(TREE))


def test_closing_does_not_wait_for_a_hostile_schema(tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCABULARY, {EOS}, replace(LIMITS, seconds=60))
    grammars.prepare()
    errors: list[str] = []

    def attack() -> None:
        with pytest.raises(GrammarError) as refused:
            grammars.compile(schema(SLOW))
        errors.append(str(refused.value))

    thread = threading.Thread(target=attack)
    thread.start()
    time.sleep(0.5)
    begin = time.monotonic()
    grammars.close()
    thread.join()
    assert time.monotonic() - begin < 5
    assert errors == ["The server is shutting down."]


def test_known_schemas_are_not_compiled_again(tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCABULARY, {EOS}, replace(LIMITS, cached=2))
    try:
        grammars.prepare()
        assert grammars.child is not None
        asked: list[str] = []
        ask = grammars.child.ask

        def counted(question: dict[str, Any], seconds: float) -> Any:
            asked.append(question["schema"])
            return ask(question, seconds)

        grammars.child.ask = counted  # type: ignore[method-assign]
        for value in (SCALAR, SCALAR, PATTERN, SCALAR, TREE, SCALAR, PATTERN):
            grammars.compile(schema(value))
        assert asked == [json.dumps(value) for value in (SCALAR, PATTERN, TREE, PATTERN)]
    finally:
        grammars.close()


def test_a_child_that_does_not_start_is_a_sentence(tokenizer, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(module, "CHILD", broken)
    with pytest.raises(GrammarError, match="did not start: it ended with"):
        Grammars(tokenizer, VOCABULARY, {EOS}, LIMITS).prepare()


def test_the_child_imports_little_and_opens_nothing() -> None:
    code = (
        "import sys, runpy; names = runpy.run_path(sys.argv[1]); import llguidance;"
        "assert not {'torch', 'transformers', 'lolcats', 'numpy'} & set(sys.modules), sys.modules\n"
        "import os, socket; c = object.__new__(names['Compiler']); c.setup = {'seconds': 5, 'memory': 1 << 28};"
        "c.size = os.open('/proc/self/statm', os.O_RDONLY); c.limit(); c.limit()\n"
        "for f in (lambda: socket.socket(), lambda: open('/etc/passwd'), lambda: bytearray(1 << 29)):\n"
        "    try: f()\n"
        "    except (OSError, MemoryError): continue\n"
        "    sys.exit('not limited')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(CHILD)], check=True, timeout=60)
