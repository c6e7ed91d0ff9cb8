"""The engine in a thread of its own: others hand in requests and cancellations, it steps while there is work."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial

from lolcats.inference.engine.engine import Engine
from lolcats.inference.engine.request import Delta, Request

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class EngineBroken(Exception):
    """The engine cannot run anything any more."""


class Worker:
    """Runs an engine; every method may be called from any thread.

    Args:
        max_waiting: requests that may wait for a slot, or for blocks.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.open = 0  # requests handed in that have not ended
        self.lock = threading.Lock()
        self.commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        return max(0, self.open - len(self.engine.running))

    @property
    def _places(self) -> int:
        """How many more requests would run at once, as far as is known: none while one waits for blocks."""
        engine = self.engine
        short = engine.room is not None and (engine.slots.paused or (engine.room.short and len(engine.waiting)))
        return 0 if short else engine.table.slots - len(engine.running)

    @property
    def failure(self) -> str:
        """Why nothing runs any more; empty while all is well."""
        return self.engine.broken or ("" if self.thread.is_alive() else "The engine's thread has ended.")

    def submit(self, requests: list[Request]) -> None:
        """Hand in requests, all or none; their deltas come from the engine's thread.

        Raises:
            QueueFull: too many are waiting.
            EngineBroken: the device failed.
            LolcatsError: the engine does not take one of them.
        """
        if self.failure:
            raise EngineBroken(self.failure)
        for request in requests:
            self.engine.check(request)
        with self.lock:
            if self.waiting + len(requests) > self.max_waiting + self._places:
                raise QueueFull
            self.open += len(requests)
        for request in requests:
            request.on_delta = self._counted(request.on_delta)
            self.commands.put(partial(self.engine.submit, request))

    def cancel(self, requests: list[Request]) -> None:
        """Free the requests' slots before the next step; those that have ended already are left as they are."""
        for request in requests:
            self.commands.put(partial(self.engine.cancel, request))

    def close(self) -> None:
        """End the thread after the step it is in."""
        self.commands.put(None)
        self.thread.join()

    def _counted(self, report: Callable[[Delta], None]) -> Callable[[Delta], None]:
        is_open = True

        def close() -> None:
            nonlocal is_open
            with self.lock:
                self.open -= is_open
                is_open = False

        def on_delta(delta: Delta) -> None:
            if delta.finish_reason is not None:
                close()
            try:
                report(delta)
            except Exception:  # nobody can be told: the engine takes the request out
                close()
                raise

        return on_delta

    def _loop(self) -> None:
        while True:
            try:
                while not self.commands.empty() or self.engine.idle:
                    command = self.commands.get()
                    if command is None:
                        return
                    command()
                self.engine.step()
            except Exception as error:
                log.exception("A step of the engine failed; all its requests end with an error.")
                self.engine.abort(f"{type(error).__name__}: {error}")
