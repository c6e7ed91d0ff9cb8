"""``response_format``: clients' schemas become grammars in a process with limits before the engine sees them.

A schema of a hundred bytes can ask for gigabytes, and for minutes, of the process that compiles it. So another process
does it first, and goes on with some random tokens, since some grammars cost only then: it is killed after some seconds,
and the system refuses it memory beyond a limit. What has passed there is compiled once more for each answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lolcats.inference.engine.grammar import GrammarError, Matcher, MatcherLimits, Vocabulary, one_line

CHILD = Path(__file__).with_name("grammar_child.py")
DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09|draft/2020-12)/schema#?")
OPTIONS = {"whitespace_pattern": r"( |\r?\n[ \t]{0,64})"}
"""One blank, or a line break and indentation: with any whitespace allowed, models can go on with it for ever."""
WHAT = "response_format.json_schema.schema"
PLAIN = {
    "oneOf constraints": "oneOf is accepted only where no two of its schemas can both be satisfied; use anyOf",
    "NoExtensionBias": "no text satisfies it",
    "Current row has": "too many properties or alternatives at the same place",
}
"""What errors of llguidance mean that speak of its insides."""


@dataclass(frozen=True)
class GrammarLimits:
    """What a client's schema may cost.

    Args:
        schema_bytes: of the schema as JSON.
        depth: objects and arrays of the schema inside of each other; an object within an object is two.
        seconds: until the child is killed.
        compile_seconds: processor time to compile; the server spends it again for each answer.
        memory_bytes: of the child, beyond what it needs for the tokenizer; the server may need it for each answer.
        start_seconds: for the child to load the tokenizer.
        steps: tokens of a random answer.
        cached: schemas whose grammars are kept.
        matcher: for what happens in the engine.
    """

    schema_bytes: int = 64 << 10
    depth: int = 64
    seconds: float = 5.0
    compile_seconds: float = 1.0
    memory_bytes: int = 256 << 20
    start_seconds: float = 60.0
    steps: int = 200
    cached: int = 64
    matcher: MatcherLimits = field(default_factory=MatcherLimits)


@dataclass(frozen=True)
class Grammar:
    """A grammar that has passed; called, it makes a matcher, of which each choice of an answer needs its own."""

    vocabulary: Vocabulary
    text: str
    limits: MatcherLimits

    def __call__(self) -> Matcher:
        """Takes as long as compiling, milliseconds for most schemas; other threads run meanwhile.

        Raises:
            GrammarError: it does not pass here, for example because the processor is slower at the moment.
        """
        return Matcher(self.vocabulary, self.text, self.limits)


class Grammars:
    """Compiles ``response_format``; every method may be called from any thread, and blocks.

    Args:
        tokenizer: a fast one of Hugging Face.
        vocabulary: size of the model's.
        stop_tokens: of the engine.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: int, stop_tokens: Iterable[int], limits: GrammarLimits | None = None
    ) -> None:
        self.tokenizer, self.size, self.stop_tokens = tokenizer, vocabulary, frozenset(stop_tokens)
        self.limits = limits or GrammarLimits()
        self.vocabulary: Vocabulary | None = None
        self.child: Child | None = None
        self.closed = False
        self.known: OrderedDict[str, Grammar | GrammarError] = OrderedDict()
        self.lock = threading.Lock()  # of everything but the child, which is busy for seconds
        self.child_lock = threading.Lock()

    def prepare(self) -> None:
        """Load the tokenizer, here and in the child; otherwise the first request does, and holds up all others.

        Raises:
            GrammarError: this system, installation or tokenizer cannot follow grammars.
        """
        with self.child_lock:
            self._start()

    def compile(self, response_format: dict[str, Any]) -> Grammar:
        """The grammar of a request's ``response_format``, whose type is json_object or json_schema.

        Raises:
            GrammarError: it cannot be used, or costs more than the limits allow.
        """
        text = self._text(response_format)
        while (grammar := self._find(text)) is None:
            with self.child_lock:
                if text not in self.known:  # another request with this schema may have been first
                    self._compile(text)
        return grammar

    def find(self, response_format: dict[str, Any]) -> Grammar | None:
        """The same for a schema that was compiled or refused before, without a wait for the child; None for others."""
        return self._find(self._text(response_format))

    def _text(self, response_format: dict[str, Any]) -> str:
        schema = schema_of(response_format)
        check_schema(schema, self.limits.depth)
        return _serialized(schema, self.limits.schema_bytes)

    def close(self) -> None:
        """End the child; a schema that it compiles is refused."""
        self.closed = True
        if (child := self.child) is not None:
            child.process.kill()  # not its pipes, from which another thread may be reading
        with self.child_lock:
            if self.child is not None:
                self.child.kill()

    def _find(self, text: str) -> Grammar | None:
        with self.lock:
            if (known := self.known.get(text)) is not None:
                self.known.move_to_end(text)
        if isinstance(known, GrammarError):
            raise GrammarError(str(known))
        return known

    def _compile(self, text: str) -> None:
        """Ask the child; what it answers, a refusal too, is the same the next time, unless a clock was the reason."""
        vocabulary, child = self._start()
        reply = child.ask({"schema": text, "options": OPTIONS}, self.limits.seconds)
        if self.closed:
            raise GrammarError("The server is shutting down.")
        if reply is None:
            raise GrammarError(f"{WHAT}: {child.why(self.limits)}; make it simpler.")
        passed, limits = reply.get("grammar"), self.limits.matcher
        with self.lock:
            self.known[text] = Grammar(vocabulary, passed, limits) if passed else _refusal(reply["error"])
            while len(self.known) > self.limits.cached:
                self.known.popitem(last=False)

    def _start(self) -> tuple[Vocabulary, Child]:
        if self.closed:
            raise GrammarError("The server is shutting down.")
        check_system()
        if self.vocabulary is None:
            self.vocabulary = Vocabulary(self.tokenizer, self.size, self.stop_tokens)
        if self.child is None or not self.child.alive:
            self.child = Child()
            if self.closed:  # meanwhile: close() did not see it
                self.child.process.kill()
            reply = self.child.ask(self._setup(self.vocabulary), self.limits.start_seconds)
            if reply != {}:
                self.child.kill()
                reason = one_line(reply["error"]) if reply else f"it ended with {self.child.process.returncode}"
                raise GrammarError(f"The process that compiles grammars did not start: {reason}.")
        return self.vocabulary, self.child

    def _setup(self, vocabulary: Vocabulary) -> dict[str, Any]:
        limits = self.limits
        return {
            "tokenizer": vocabulary.json, "vocabulary": vocabulary.tokenizer.vocab_size, "end": vocabulary.end,
            "parser": limits.matcher.parser(), "token_seconds": limits.matcher.token_seconds, "steps": limits.steps,
            "seconds": limits.seconds, "compile_seconds": limits.compile_seconds, "memory": limits.memory_bytes,
        }  # fmt: skip


class Child:
    """The process; one question at a time. It ends when this one does."""

    def __init__(self) -> None:
        # -P: the folder of the file, which has a schema.py, is not searched for modules. A session of its own: Ctrl-C
        # ends the server, which ends it. One arena: others would count as memory of the schema.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8", start_new_session=True,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        self.late = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Its answer; None if it has not come in time or the process has ended, which it has then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self._too_late)
        timer.start()
        line = ""
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        timer.cancel()
        timer.join()  # it may have been about to kill the process
        if self.late:
            self.kill()
        if not line.endswith("\n"):
            self.kill()
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def why(self, limits: GrammarLimits) -> str:
        """Why the process has ended while it compiled."""
        if self.late:
            return f"compiling it takes more than {limits.seconds:g} s"
        if self.process.returncode == -11:
            return "it is nested too deeply"
        return f"compiling it takes more than {limits.memory_bytes >> 20} MiB of memory"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not written yet
                if pipe is not None:
                    pipe.close()

    def _too_late(self) -> None:
        self.late = True
        self.process.kill()


def schema_of(response_format: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema that a ``response_format`` stands for."""
    if response_format.get("type") == "json_object":
        return {"type": "object"}
    if response_format.get("type") != "json_schema":
        raise GrammarError("response_format.type: expected text, json_object or json_schema.")
    description = response_format.get("json_schema")
    schema = description.get("schema") if isinstance(description, dict) else None
    if not isinstance(schema, dict):
        raise GrammarError(f"{WHAT}: expected a JSON Schema, which is an object.")
    return schema


def check_schema(schema: dict[str, Any], depth: int) -> None:
    """Refuse what is nested too deeply, refers to another document, or has options for llguidance."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, level = waiting.pop()
        if level > depth:
            raise GrammarError(f"{WHAT}: nested more than {depth} levels deep.")
        if isinstance(value, dict):
            for key, inner in value.items():
                _check_keyword(key, inner)
        inside = value.values() if isinstance(value, dict) else value
        waiting += [(inner, level + 1) for inner in inside if isinstance(inner, dict | list)]


def _check_keyword(key: str, value: Any) -> None:
    if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str) and not value.startswith("#"):
        raise GrammarError(f"{WHAT}: {key} {one_line(value, 80)!r} refers to another document; only '#…' can be used.")
    if key == "$schema" and isinstance(value, str) and not DRAFTS.fullmatch(value):
        raise GrammarError(f"{WHAT}: $schema {one_line(value, 80)!r} is not a draft of json-schema.org.")
    if key == "x-guidance":
        raise GrammarError(f"{WHAT}: x-guidance is not a keyword of JSON Schema.")


def check_system() -> None:
    """Refuse systems on which a process cannot be given limits."""
    try:
        import resource  # noqa: F401
    except ImportError:
        raise GrammarError("response_format: this system cannot limit the memory of a process; use Linux.") from None
    if not Path("/proc/self/statm").exists():
        raise GrammarError("response_format: this system does not report a process's memory; use Linux.")


def _serialized(schema: dict[str, Any], most: int) -> str:
    try:
        text = json.dumps(schema, allow_nan=False)  # the order of properties is that of the answer: it stays
    except (ValueError, TypeError) as error:
        raise GrammarError(f"{WHAT}: not JSON: {one_line(str(error))}.") from None
    if len(text) > most:
        raise GrammarError(f"{WHAT}: {len(text)} bytes; at most {most} are allowed.")
    return text


def _refusal(reason: str) -> GrammarError:
    plain = next((plain for words, plain in PLAIN.items() if words in reason), "")
    return GrammarError(f"{WHAT}: {plain or 'it cannot be used: ' + one_line(reason).rstrip('.')}.")
