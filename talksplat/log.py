"""What a model's process says about its requests: a line of JSON an event, on standard error, where Triton's log goes.

    {"time": "2026-11-22T21:00:00.123Z", "level": "warning", "event": "dropped", "request_id": "s1-8", "age_ms": 812}

It is Python's logging, with `Fields` for what is said besides the event:

    logging.getLogger("rasterizer").warning("dropped", extra=Fields(request_id="s1-8", age_ms=812))

A line holds these fields and nothing else: no audio, no text, no key can get into it by an oversight.

`TALKSPLAT_LOG` in the environment names the lowest level that is written, "info" by default; at "debug" each answered
request has its line.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any, TypedDict

LEVEL_VARIABLE = "TALKSPLAT_LOG"
LEVELS = ("debug", "info", "warning", "error")
LINES_PER_SECOND = 20  # of one event: a flood must not take the cores from the work
SLOW_MS = 500  # a chunk whose frames come later than that after it was due is worth a line: the SLO's limit
LONGEST = 256  # characters of a field: clients choose ids, and anybody's bytes may pose as an avatar's


class Fields(TypedDict, total=False):
    """What may be said of an event, as the argument ``extra`` of Python's logging."""

    request_id: str  # as the client gave it
    tenant: str
    avatar: str
    frames: int
    milliseconds: float  # that it took
    age_ms: float  # since the request arrived
    error: str  # its kind, see `talksplat.metrics.reason`, or its type


_FIELDS = tuple(Fields.__annotations__)


def configure() -> None:
    """Have this process's whole logging write such lines; once, when a model begins.

    Raises:
        ValueError: `TALKSPLAT_LOG` is no level.
    """
    level = os.environ.get(LEVEL_VARIABLE, "info").lower()
    if level not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} is {level!r}, expected one of {', '.join(LEVELS)}")
    handler = _Handler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(_Limit())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Handler(logging.Handler):
    """Standard error, past Python's buffer: a line is one write, which no other process's can split.

    It begins with the end of a line, since Triton writes a line and its end apart. Empty lines are nobody's.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(2, f"\n{self.format(record)}\n".encode())
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Its `Fields` alone; of an exception the type and the place, since its words may be a client's."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update((name, vars(record)[name]) for name in _FIELDS if name in vars(record))
        if record.exc_info and record.exc_info[0]:
            kind, _, trace = record.exc_info
            while trace and trace.tb_next:
                trace = trace.tb_next
            line["error"] = kind.__name__
            if trace:
                line["where"] = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        if skipped := getattr(record, "skipped", 0):
            line["skipped"] = skipped
        return json.dumps({name: _short(value) for name, value in line.items()})


class _Limit(logging.Filter):
    """Lets `LINES_PER_SECOND` of an event through; the next one then says how many were skipped. Debug is for all."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds: dict[str, tuple[int, int]] = {}  # of an event: which second, how many lines
        self._skipped: dict[str, int] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        event, second = str(record.msg), int(time.monotonic())
        with self._lock:
            began, lines = self._seconds.get(event, (second, 0))
            if began != second:
                lines = 0
            self._seconds[event] = second, lines + 1
            if lines >= LINES_PER_SECOND:
                self._skipped[event] = self._skipped.get(event, 0) + 1
                return False
            if skipped := self._skipped.pop(event, 0):
                record.skipped = skipped
            return True


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 2)
    return value[:LONGEST] if isinstance(value, str) else value
