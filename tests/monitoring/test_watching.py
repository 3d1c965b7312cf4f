"""Real traffic, seen by the real Prometheus."""

import contextlib
import urllib.request

import pytest
from prometheus import Prometheus
from tritonclient.utils import InferenceServerException
from waiting import wait_for
from watched import RESTARTS, Watched

from talksplat import clock, metrics


def page(watched: Watched) -> str:
    with urllib.request.urlopen(watched.server.metrics_url) as answer:
        return str(answer.read().decode())


def total(prometheus: Prometheus, name: str, **labels: str) -> float:
    told = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return prometheus.value(f"sum({name}{{{told}}})")


def test_every_metric_is_there_before_anything_happens(watched: Watched) -> None:
    text = page(watched)
    for name, family in metrics.FAMILIES.items():
        assert f"# TYPE {name} {family.kind.lower()}\n" in text
    for reason in metrics.REFUSALS:
        assert f'talksplat_refused_total{{reason="{reason}"}}' in text


def test_frames_are_counted_by_tenant(watched: Watched, quiet: Prometheus) -> None:
    def frames() -> list[float]:
        names = ("talksplat_frames_total", "talksplat_idle_frames_total")
        return [total(quiet, name, tenant=tenant) for name in names for tenant in ("acme", "bolt")]

    before = frames()
    for index in range(5):
        watched.speak(index=4 * index)
    for index in range(3):
        watched.speak("green", 4 * index, tenant="bolt")
    for index in range(2):
        watched.idle(index=4 * index)
        watched.chunk(index=4 * index)
    more = [count * clock.CHUNK_FRAMES for count in (5 + 4, 3, 4, 0)]
    wait_for(lambda: frames() == [old + new for old, new in zip(before, more, strict=True)])


def test_each_frame_and_chunk_has_its_times(watched: Watched, quiet: Prometheus) -> None:
    def counts() -> list[float]:
        return [total(quiet, f"talksplat_{name}_ms_count") for name in ("render", "wait", "chunk")]

    before = counts()
    for index in range(6):
        watched.chunk(index=4 * index)
    more = [6 * clock.CHUNK_FRAMES, 6, 6]
    wait_for(lambda: counts() == [old + new for old, new in zip(before, more, strict=True)])
    waits, chunks = (total(quiet, f"talksplat_{name}_ms_sum") for name in ("wait", "chunk"))
    assert 0 < waits < chunks


def test_caches_tell_hits_misses_and_bytes(watched: Watched, quiet: Prometheus) -> None:
    def cache(what: str) -> float:
        return total(quiet, f"talksplat_cache_{what}", cache="avatars")

    watched.operate("unload", "red")
    watched.operate("unload", "green", tenant="bolt")
    wait_for(lambda: cache("bytes") == 0)
    misses = cache("misses_total")
    watched.operate("preload", "red")
    wait_for(lambda: cache("bytes") > 0 and cache("misses_total") == misses + 1)
    hits = cache("hits_total")
    watched.chunk("red")
    wait_for(lambda: cache("hits_total") > hits)
    assert cache("misses_total") == misses + 1


def test_refusals_are_counted_by_their_reason(watched: Watched, quiet: Prometheus) -> None:
    def refused() -> list[float]:
        return [total(quiet, "talksplat_refused_total", reason=reason) for reason in ("avatar", "request", "internal")]

    before = refused()
    assert "NOT_FOUND" in watched.refused(avatar="nobody")
    assert "NOT_FOUND" in watched.refused(avatar="red", tenant="bolt")  # counted by the model avatar
    assert "INVALID_ARGUMENT" in watched.refused(parameters={"quality": 0})  # and by the rasterizer
    wait_for(lambda: refused() == [before[0] + 2, before[1] + 1, before[2]])


def test_restarts_are_those_that_the_supervisor_counted(prometheus: Prometheus) -> None:
    assert prometheus.value("talksplat_restarts_total") == RESTARTS


def test_metrics_bear_traffic_and_operations_at_the_same_time(watched: Watched, quiet: Prometheus) -> None:
    """Triton dies of metrics from two threads; ours come while other threads answer and ask other models."""
    before = total(quiet, "talksplat_frames_total", tenant="acme")
    for index in range(60):
        watched.operate("preload" if index % 2 else "unload", "green", tenant="bolt")
        watched.chunk(index=4 * index)
    wait_for(lambda: total(quiet, "talksplat_frames_total", tenant="acme") == before + 240)
    assert watched.server.dead_processes() is None


def test_dropped_chunks_raise_the_alarm(watched: Watched, prometheus: Prometheus) -> None:
    dropped = 0

    def alarm() -> bool:
        nonlocal dropped
        for index in range(10):
            with contextlib.suppress(InferenceServerException):  # what is younger than that is drawn
                watched.chunk(index=4 * index, parameters={"deadline_ms": 1})
                continue
            dropped += 1
        return bool(firing(prometheus, "TalksplatDroppingChunks"))

    wait_for(alarm)
    wait_for(lambda: total(prometheus, "talksplat_dropped_chunks_total", tenant="acme") == dropped)
    assert total(prometheus, "talksplat_dropped_chunks_total", tenant="bolt") == 0


def test_a_replica_that_is_gone_raises_the_alarm(prometheus: Prometheus) -> None:
    wait_for(lambda: firing(prometheus, "TalksplatDown"))
    assert len(firing(prometheus, "TalksplatDown")) == 1  # the other one is there


def firing(prometheus: Prometheus, alert: str) -> list[dict[str, str]]:
    return [labels for labels, _ in prometheus.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')]


def test_every_rule_can_be_computed(watched: Watched, prometheus: Prometheus) -> None:
    def rules() -> list[tuple[str, str]]:
        groups = prometheus.get("/api/v1/rules").get("groups", [])
        return [(rule["name"], rule["health"]) for group in groups for rule in group["rules"]]

    wait_for(lambda: rules() and "unknown" not in dict(rules()).values())
    assert [rule for rule in rules() if rule[1] != "ok"] == []


@pytest.mark.parametrize(
    "record", ["frames:rate1m", "chunks:rate1m", "chunk_ms:p95", "queue_to_compute:ratio", "cache_misses:ratio5m"]
)
def test_a_recorded_rule_has_a_value_under_traffic(record: str, watched: Watched, prometheus: Prometheus) -> None:
    watched.chunk()
    wait_for(lambda: any(value > 0 for _, value in prometheus.query(f"talksplat:{record}")))
