import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from make_avatar import write_avatar

from loadtests import simulation
from loadtests.simulation import NoPlanError, Pair, Replicas, Service, check, compare, needed, plan
from loadtests.slo import Slo
from loadtests.streams import Load
from talksplat import edge
from talksplat.bench._report import Row

SERVICE = Service(nets_ms=6.0, raster_ms=12.0, overhead_ms=4.0, variation=0.25)
LOAD = Load(40, ("any",), seconds=4.0)

services = st.builds(
    Service,
    nets_ms=st.floats(0, 30),
    raster_ms=st.floats(0.1, 60),
    overhead_ms=st.floats(0, 20),
    variation=st.sampled_from([0.0, 0.3, 1.0]),
)
dues = st.lists(st.floats(0, 2), max_size=60)
clusters = st.builds(
    Replicas,
    service=services,
    count=st.integers(2, 5),
    cores=st.integers(1, 6),
    routing=st.sampled_from(["least_conn", "round_robin"]),
    deadline=st.sampled_from([0.05, 0.5, math.inf]),
    lost_at=st.sampled_from([0.7, math.inf]),
    seed=st.integers(0, 9),
)


@given(clusters, dues)
def test_every_chunk_is_answered_or_dropped_once_and_no_sooner_than_it_can_be(
    replicas: Replicas, dues: list[float]
) -> None:
    outcome = replicas.run(dues)
    assert outcome.answers == [1] * len(dues)
    taken = outcome.answered - np.array(dues)
    assert (taken >= replicas.service.overhead_ms / 1e3 - 1e-9).all()
    if replicas.deadline == math.inf:
        assert np.isfinite(outcome.answered).all()


@given(clusters, dues)
@example(Replicas(SERVICE, 2), [0.06, 0.5797564095242801, 0.5797564095242801])  # 0.06 + (b - 0.06) > b
def test_a_seed_decides_everything(replicas: Replicas, dues: list[float]) -> None:
    once, again = replicas.run(dues), replicas.run(dues)
    assert once.answered.tolist() == again.answered.tolist()
    assert once.worked == again.worked


@given(services, st.integers(1, 4), st.integers(1, 4), dues)
def test_cores_do_the_work_that_there_is_and_no_more(
    service: Service, count: int, cores: int, dues: list[float]
) -> None:
    steady = replace(service, variation=0.0)
    outcome = Replicas(steady, count, cores).run(dues)
    assert outcome.worked == pytest.approx(len(dues) * steady.work_ms / 1e3, abs=1e-6)
    if dues:
        span = outcome.answered.max() - min(dues)
        assert outcome.worked <= span * count * cores + 1e-6


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_one_station_waits_as_the_formula_of_md1_says(utilisation: float) -> None:
    service = Service(nets_ms=0.0, raster_ms=10.0)
    draw = np.random.default_rng(3)
    dues = np.cumsum(draw.exponential(0.01 / utilisation, 20_000))
    waits = Replicas(service, 1, cores=1).run(dues).answered - dues - 0.01
    expected = utilisation * 0.01 / (2 * (1 - utilisation))
    assert waits.mean() == pytest.approx(expected, rel=0.08)


def test_threads_share_cores_fairly() -> None:
    service = Service(nets_ms=10.0, raster_ms=10.0)
    first, second = 1e3 * Replicas(service, 1, cores=1).run([0.0, 0.0]).answered
    assert first == pytest.approx(30)  # nets alone, then its frames beside the other one's nets
    assert second == pytest.approx(40)
    alone = 1e3 * Replicas(service, 1, cores=2).run([0.0]).answered[0]
    assert alone == pytest.approx(15)  # the frames on both cores


def test_a_request_goes_where_the_fewest_are_under_way() -> None:
    service = Service(nets_ms=0.0, raster_ms=100.0)
    dues = [0.0, 0.001, 0.002, 0.102]  # the first replica's next chunk ends at 200 ms, the second's at 101
    fewest, turns = (Replicas(service, 2, 1, routing).run(dues) for routing in ("least_conn", "round_robin"))
    assert fewest.answered[3] == pytest.approx(0.202)
    assert turns.answered[3] == pytest.approx(0.202)
    dues = [0.0, 0.001, 0.102, 0.103, 0.104]
    assert Replicas(service, 2, 1).run(dues).answered.max() == pytest.approx(0.302)


def test_an_old_chunk_is_dropped() -> None:
    service = Service(nets_ms=0.0, raster_ms=100.0)
    answered = Replicas(service, 1, 1, deadline=0.15).run([0.0, 0.0, 0.0]).answered
    assert answered.tolist() == [pytest.approx(0.1), pytest.approx(0.2), math.inf]


def test_what_a_lost_replica_had_under_way_is_done_by_another() -> None:
    service = Service(nets_ms=0.0, raster_ms=100.0)
    answered = Replicas(service, 2, 1, lost_at=0.05).run([0.0, 0.0]).answered
    assert sorted(answered) == [pytest.approx(0.1), pytest.approx(0.2)]


@pytest.mark.parametrize("routing", ["least_conn", "round_robin"])
def test_more_replicas_are_no_worse(routing: simulation.Routing) -> None:
    replicas = Replicas(SERVICE, 1, cores=2, routing=routing)
    seen = [replace(replicas, count=count).play(LOAD) for count in range(1, 6)]
    for fewer, more in itertools.pairwise(seen):
        assert more.chunk_p95_ms <= fewer.chunk_p95_ms * 1.02
        assert more.deadline_miss_pct <= fewer.deadline_miss_pct + 0.05
    assert not seen[0].ok()
    assert seen[-1].ok()


def test_what_is_needed_holds_and_one_less_does_not() -> None:
    enough, summary = needed(Replicas(SERVICE, 1, cores=2), LOAD)
    assert summary.ok(Slo())
    assert enough.count > 1
    assert not replace(enough, count=enough.count - 1).play(LOAD).ok(Slo())


def test_replicas_that_are_too_slow_for_one_stream_are_never_enough() -> None:
    slow = Service(nets_ms=1.0, raster_ms=600.0)
    with pytest.raises(NoPlanError, match="too slow for a stream of its own: first_frame_p95_ms"):
        needed(Replicas(slow, 1, cores=1), replace(LOAD, streams=2))


def test_a_loss_needs_a_replica_more() -> None:
    (row,) = plan(Replicas(SERVICE, 1, cores=2), [40], seconds=4.0)
    assert int(row["replicas_for_a_loss"] or 0) == int(row["replicas"] or 0) + 1
    assert 0 < float(row["utilisation_pct"] or 0) < 100


def test_a_plan_is_printed_and_written(tmp_path: Path) -> None:
    times = {"cpu_ms": 0.5, "queue_ms": 1.0, "input_ms": 0.5, "output_ms": 0.5}
    rows = [
        {"view": "process", "load": load, "part": part, **times}
        for load in ("flat_out 8", "paced 1")
        for part in (*simulation.NETS, "rasterizer")
    ]
    profile, out = tmp_path / "profile.json", tmp_path / "simulation.json"
    profile.write_text(json.dumps({"rows": rows}))
    assert Service.of_profile(profile) == Service(10.0, 2.0, 8.0, simulation.VARIATION)
    arguments = ["--profile", str(profile), "--streams", "10", "--seconds", "1", "--json", str(out)]
    assert simulation.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["streams"], row["replicas"]) == (10, 1)


def test_prediction_and_measurement_are_compared_where_both_held() -> None:
    def row(streams: int, what: str, p50: float | None, slo_ok: int) -> Row:
        return {"streams": streams, "what": what, "chunk_p50_ms": p50, "chunk_p95_ms": 50.0, "slo_ok": slo_ok}

    rows = [row(2, "predicted", 12.0, 1), row(2, "measured", 10.0, 1), row(4, "predicted", 30.0, 1)]
    rows += [row(4, "measured", 20.0, 1), row(8, "predicted", 40.0, 1), row(8, "measured", None, 0)]
    expected = {"largest_predicted": 8, "largest_measured": 4, "chunk_p50_ratio": 1.35, "chunk_p95_ratio": 1.0}
    assert compare(rows) == pytest.approx(expected)
    assert compare(rows[4:])["chunk_p50_ratio"] is None


@pytest.mark.usefixtures("hurried")
def test_two_real_replicas_behind_the_edge_are_measured_and_predicted(tmp_path: Path) -> None:
    try:
        edge.find_nginx()
    except edge.MissingNginxError as error:
        pytest.skip(str(error))
    write_avatar(tmp_path, "red")
    with Pair(tmp_path / "red", size=64, chunks=3) as pair:
        pinned = [psutil.Process(server.pid).cpu_affinity() for server in pair.servers]
        rows, further = check(pair, (1,), 0.5)
    assert all(len(each) == 1 for each in pinned)
    predicted, measured = rows
    assert (predicted["what"], measured["what"], measured["failed_requests"]) == ("predicted", "measured", 0)
    for service in further["service"]:
        assert float(service["nets_ms"] or 0) > 0
        assert float(service["raster_ms"] or 0) > 0
    assert float(measured["chunk_p50_ms"] or 0) > 0


@pytest.mark.parametrize("text", [None, "{}", '{"rows": [{"view": "stage"}]}', "no JSON"])
def test_without_measured_times_there_is_no_plan(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    if text is not None:
        profile.write_text(text)
    with pytest.raises(NoPlanError):
        Service.of_profile(profile)
    assert simulation.main(["--profile", str(profile)]) == 1
    assert "loadtests.profile" in capsys.readouterr().err
