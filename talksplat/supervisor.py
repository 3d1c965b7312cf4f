"""Keeps an embedded server serving: starts it again when one of its processes dies or hangs.

Triton can't be asked how it is: when a backend stub is killed, the server stays "ready" and never starts it again. So
the processes themselves are looked at, which finds one that died or was stopped at once, and a canary request goes from
audio to frames, which finds what only looks alive.

What is broken is started again as a whole, in some 2 s. Loading one dead model anew would take 0.2 to 0.7 s, but opens
Triton's model control to all who reach the server, and leaves the question what else is broken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from talksplat.server import NotServingError, Server, ServerError

LOOK_SECONDS = 0.1  # between two looks at the processes
CANARY_SECONDS = 1.0  # between two canaries, each some 20 ms of work
CANARY_DEADLINE = 1.0  # for a canary's answer; two in a row must fail
BUSY = 0.2  # cores: a server that uses more while a canary waits is at work, not hung,
PATIENCE = 60.0  # for so many seconds
STABLE_SECONDS = 3.0  # a server that broke later did not break by starting: it is started again at once
LONGEST_DELAY = 30.0  # between two starts


class Supervisor:
    """Runs one server until it is interrupted, or stopped by another thread.

    Args:
        server: not started yet.
        say: is told what happens, in sentences.
    """

    def __init__(self, server: Server, say: Callable[[str], None]) -> None:
        self._server = server
        self._say = say
        self._broken = 0  # times in a row
        self._unanswered_since: float | None = None  # a canary, while the server is busy
        self._stopped = threading.Event()

    def run(self, serving: Callable[[], None]) -> None:
        """Start the server and keep it up; returns by an exception or after `stop`, and leaves nothing running then.

        Args:
            serving: is called each time the server has begun to serve.

        Raises:
            ServerError, OSError: the first start failed: that is a matter of configuration, not of bad luck.
        """
        try:
            self._server.start()
            while not self._stopped.is_set():
                began = time.monotonic()
                serving()
                reason = self._watch()
                if self._stopped.is_set():
                    return
                self._server.kill()
                if time.monotonic() - began > STABLE_SECONDS:
                    self._broken = 0
                self._say(f"The server stopped serving: {reason}.")
                self._start_again()
        finally:
            self._server.stop()

    def stop(self) -> None:
        """Have `run` return soon, from any thread."""
        self._stopped.set()

    def _start_again(self) -> None:
        while not self._stopped.is_set():
            self._broken += 1
            delay = min(LONGEST_DELAY, 2.0 ** (self._broken - 3)) if self._broken > 2 else 0.0
            self._server.restarts += 1
            self._say(f"Starting it again{f' in {delay:g} s: it broke {self._broken} times' if delay else ''}.")
            if self._stopped.wait(delay):
                return
            try:
                self._server.start()
            except (ServerError, OSError) as error:  # a full disk, too, may be mended
                self._say(str(error))
            else:
                return

    def _watch(self) -> str:
        """Return once the server no longer serves, with the reason."""
        failures, next_canary = 0, time.monotonic() + CANARY_SECONDS
        self._unanswered_since = None
        while not self._stopped.wait(LOOK_SECONDS):
            if (reason := self._server.dead_processes()) is not None:
                return reason
            if time.monotonic() >= next_canary:
                problem = self._try_canary()
                failures = failures + 1 if problem else 0
                if failures > 1:
                    return str(problem).rstrip(".")
                next_canary = time.monotonic() + (0 if problem else CANARY_SECONDS)
        return "it was stopped"

    def _try_canary(self) -> NotServingError | None:
        """What is wrong, if anything; a server that is merely busy gets time."""
        began, used = time.monotonic(), self._server.processor_seconds()
        try:
            self._server.canary(CANARY_DEADLINE)
        except NotServingError as error:
            now = time.monotonic()
            since = self._unanswered_since = self._unanswered_since or began
            busy = self._server.processor_seconds() - used > BUSY * (now - began)
            unanswered = now - began >= CANARY_DEADLINE
            return None if unanswered and busy and now - since < PATIENCE else error
        self._unanswered_since = None
        return None
