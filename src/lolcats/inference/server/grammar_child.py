"""Compiles clients' schemas, in a process of its own with limits: started by :mod:`.grammar` as a file, not imported.

Reads lines of JSON from its input and answers each with one: first a tokenizer and the limits, then schemas. Imports
neither torch nor lolcats.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import sys
import threading
import time
from typing import Any

STACK = 2 << 20  # less than that of the server's threads: what would overflow theirs overflows this one first


class DeadEnd(Exception):
    """No token is allowed where the text may not end either."""


class Compiler:
    def __init__(self, setup: dict[str, Any]) -> None:
        import llguidance

        self.lib, self.setup = llguidance, setup
        self.tokenizer = llguidance.LLTokenizer(setup["tokenizer"], n_vocab=setup["vocabulary"], eos_token=setup["end"])
        self.limits = llguidance.LLParserLimits(**setup["parser"])
        self.size = os.open("/proc/self/statm", os.O_RDONLY)

    def limit(self) -> None:
        """Set limits for the next schema: memory and time beyond what is used now, and no more files or sockets."""
        pages = int(os.pread(self.size, 100, 0).split()[0])
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = math.ceil(usage.ru_utime + usage.ru_stime + self.setup["seconds"]) + 1  # where nobody is left to kill it
        for kind, most in (
            (resource.RLIMIT_AS, pages * resource.getpagesize() + self.setup["memory"]),
            (resource.RLIMIT_CPU, cpu),
            (resource.RLIMIT_NOFILE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    def compile(self, schema: str, options: Any) -> dict[str, Any]:
        try:
            grammar = self.lib.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            return {"error": str(error)}
        begin = time.thread_time()
        matcher = self.lib.LLMatcher(self.tokenizer, grammar, log_level=0, limits=self.limits)
        if not matcher.is_error() and time.thread_time() - begin > self.setup["compile_seconds"]:
            return {"error": f"compiling takes more than {self.setup['compile_seconds']:g} s"}
        for seed in range(2):
            seconds = 0.0 if matcher.is_error() else self.walk(matcher, random.Random(seed), seed == 0)
            if seconds > self.setup["token_seconds"]:
                return {"error": "a token takes too much time"}
            if matcher.is_error():
                return {"error": matcher.get_error()}
            matcher.reset()
        return {"grammar": grammar}

    def walk(self, matcher: Any, rng: random.Random, deep: bool) -> float:
        """Go on with random tokens; processor time of a token, on average over at least 20."""
        seconds, steps = 0.0, 0
        for _ in range(self.setup["steps"]):
            begin = time.thread_time()
            mask = matcher.compute_bitmask()
            seconds += time.thread_time() - begin
            token = self.draw(mask, rng, deep)
            if token is None and not matcher.is_accepting() and not matcher.is_error():
                raise DeadEnd
            if matcher.is_stopped() or token is None:
                break
            steps += 1
            begin = time.thread_time()
            matcher.consume_token(token)
            seconds += time.thread_time() - begin
        return seconds / max(steps, 20)

    def draw(self, mask: bytes, rng: random.Random, deep: bool) -> int | None:
        """An allowed token other than the end; with ``deep`` rather one that closes nothing."""
        found = None
        for _ in range(8):
            start = rng.randrange(len(mask))
            match = re.search(rb"[^\0]", mask[start:] + mask[:start])
            if match is None:
                return None
            place = (start + match.start()) % len(mask)
            token = place * 8 + rng.choice([bit for bit in range(8) if mask[place] >> bit & 1])
            if token != self.setup["end"]:
                found = token
                if not deep or self.tokenizer.decode_bytes([token])[:1] not in (b'"', b"}", b"]"):
                    break
        return found


def answer(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def serve(compiler: Compiler) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            compiler.limit()
            reply = compiler.compile(request["schema"], request["options"])
        except DeadEnd:
            reply = {"error": "it reaches a point where no token can follow"}
        except MemoryError:
            os._exit(1)
        except BaseException as error:  # a panic in Rust does not derive from Exception
            reply = {"error": f"llguidance failed with {type(error).__name__}"}
        answer(reply)


def main() -> None:
    try:
        compiler = Compiler(json.loads(sys.stdin.readline()))
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({})
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve, args=(compiler,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
