"""What Prometheus is told about the work, on Triton's own page of metrics.

A touch of a metric is a message from a model's process to Triton's, 15 us of processor time. And **Triton dies when two
threads of a Python model touch metrics at the same time** (2.51). So whoever works only counts, and one thread
publishes, twice a second, what has changed since.

Labels are bounded: tenants are those of the tenants file, or "" for everybody else.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from talksplat.avatar import BundleError, ProfileError, SpeechEncoderError, UnknownAvatarError
from talksplat.framing import RequestError
from talksplat.schedule import BusyError, DeadlineError

if TYPE_CHECKING:
    from talksplat.animator import Animator  # which the other models need not load

RESTARTS_VARIABLE = "TALKSPLAT_RESTARTS"  # how often the supervisor has started the server again
PUBLISH_SECONDS = 0.5
REFUSALS = ("request", "avatar", "bundle", "busy", "internal")

RENDER_BUCKETS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 40, 80)  # ms of one thread
CHUNK_BUCKETS = (5, 10, 20, 40, 80, 120, 160, 250, 350, 500, 750, 1000, 2000, 5000)  # ms; a chunk lasts 160

_log = logging.getLogger(__name__)


class _Family(NamedTuple):
    kind: str
    description: str
    buckets: tuple[float, ...] = ()


FAMILIES = {
    "talksplat_frames_total": _Family("COUNTER", "Frames that were drawn or, at rest, taken from the cache."),
    "talksplat_idle_frames_total": _Family("COUNTER", "Frames among them that show the face at rest."),
    "talksplat_dropped_chunks_total": _Family("COUNTER", "Chunks whose deadline was over: not rendered."),
    "talksplat_refused_total": _Family("COUNTER", "Requests that a model answered with an error, by its reason."),
    "talksplat_restarts_total": _Family("COUNTER", "Times that the supervisor has started the server again."),
    "talksplat_cache_hits_total": _Family("COUNTER", "What was wanted and lay in the cache."),
    "talksplat_cache_misses_total": _Family("COUNTER", "What was wanted and had to be read, decoded or drawn."),
    "talksplat_cache_bytes": _Family("GAUGE", "Bytes that the cache holds."),
    "talksplat_render_ms": _Family("HISTOGRAM", "Milliseconds of one thread for a frame.", RENDER_BUCKETS),
    "talksplat_wait_ms": _Family(
        "HISTOGRAM", "Milliseconds from when a chunk was due until its rendering began.", CHUNK_BUCKETS
    ),
    "talksplat_chunk_ms": _Family(
        "HISTOGRAM", "Milliseconds from when a chunk was due until its frames were there.", CHUNK_BUCKETS
    ),
}


def reason(error: BaseException) -> str:
    """Why a chunk or request got an error: "deadline" for a dropped chunk, otherwise one of `REFUSALS`."""
    for name, kinds in (
        ("request", (RequestError, ProfileError, SpeechEncoderError)),
        ("avatar", (UnknownAvatarError,)),
        ("deadline", (DeadlineError,)),
        ("busy", (BusyError,)),
        ("bundle", (BundleError,)),
    ):
        if isinstance(error, kinds):
            return name
    return "internal"


class Page:
    """The metrics of one model's process. Only one thread may use it.

    Args:
        family: Triton's ``pb_utils.MetricFamily``.
    """

    def __init__(self, family: Any) -> None:
        self._family = family
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, frozenset[tuple[str, str]]], Any] = {}

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Count up; by 0, so that the series is there before anything has happened."""
        metric = self._metric(name, labels)
        if amount:
            metric.increment(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Of a gauge."""
        self._metric(name, labels).set(value)

    def observe(self, name: str, values: Iterable[float]) -> None:
        """Into a histogram."""
        metric = self._metric(name, {})
        for value in values:
            metric.observe(value)

    def _metric(self, name: str, labels: dict[str, str]) -> Any:
        key = name, frozenset(labels.items())
        if key not in self._metrics:
            told = FAMILIES[name]
            if name not in self._families:
                kind = getattr(self._family, told.kind)
                self._families[name] = self._family(name=name, description=told.description, kind=kind)
            more = {"buckets": list(told.buckets)} if told.buckets else {}
            self._metrics[key] = self._families[name].Metric(labels=labels, **more)
        return self._metrics[key]


class Publisher:
    """Publishes what an animator does and what is refused, from a thread of its own.

    Args:
        page: nobody else may use it from now on.
        animator: counts its work.
        restarts: of the server, so far.
    """

    def __init__(self, page: Page, animator: Animator, restarts: int = 0) -> None:
        self._page = page
        self._animator = animator
        self._published: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._refused = Counter(dict.fromkeys(REFUSALS, 0))
        self._lock = threading.Lock()  # of the counter
        self._count("talksplat_restarts_total", restarts)
        self._publish()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def refused(self, error: BaseException) -> None:
        """Count a request's error, from any thread. Dropped chunks count as such, not as refused ones."""
        if (why := reason(error)) in REFUSALS:
            with self._lock:
                self._refused[why] += 1

    def close(self) -> None:
        """Publish the last numbers, and end the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        closed = False
        while not closed:
            closed = self._closed.wait(PUBLISH_SECONDS)
            try:
                self._publish()
            except Exception:  # the next round tells what this one could not
                _log.exception("metrics could not be published")

    def _publish(self) -> None:
        counts, times = self._animator.counts(), self._animator.take_times()
        for tenant in {"", *counts.frames, *counts.dropped_chunks}:
            self._count("talksplat_frames_total", counts.frames.get(tenant, 0), tenant=tenant)
            self._count("talksplat_idle_frames_total", counts.idle_frames.get(tenant, 0), tenant=tenant)
            self._count("talksplat_dropped_chunks_total", counts.dropped_chunks.get(tenant, 0), tenant=tenant)
        for cache, own in counts.caches.items():
            self._count("talksplat_cache_hits_total", own.hits, cache=cache)
            self._count("talksplat_cache_misses_total", own.misses, cache=cache)
            self._gauge("talksplat_cache_bytes", own.bytes, cache=cache)
        with self._lock:
            refused = dict(self._refused)
        for why, count in refused.items():
            self._count("talksplat_refused_total", count, reason=why)
        self._page.observe("talksplat_render_ms", times.render)
        self._page.observe("talksplat_wait_ms", times.wait)
        self._page.observe("talksplat_chunk_ms", times.chunk)

    def _count(self, name: str, total: float, **labels: str) -> None:
        key = name, frozenset(labels.items())
        if total != (published := self._published.get(key)):
            self._page.add(name, total - (published or 0), **labels)
            self._published[key] = total

    def _gauge(self, name: str, value: float, **labels: str) -> None:
        key = name, frozenset(labels.items())
        if value != self._published.get(key):
            self._page.set(name, value, **labels)
            self._published[key] = value
