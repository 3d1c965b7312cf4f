"""``locust -f loadtests/locustfile.py``: what a load tester starts. See `loadtests/README.md`."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from dataclasses import fields
from typing import Any

import gevent
import grpc.experimental.gevent
import locust
from locust.env import Environment
from locust.exception import RPCError
from locust.runners import MasterRunner, WorkerRunner

from loadtests import report
from loadtests.gate import REPORT_SECONDS, TALLY, Figures, judge
from loadtests.shapes import SHAPES
from loadtests.slo import INTERRUPT_P95_MS, Slo
from loadtests.users import ConversationUser, FlatOutUser, IdleUser, SpeakerUser

__all__ = ["ConversationUser", "FlatOutUser", "IdleUser", "SpeakerUser"]  # locust looks for them here

grpc.experimental.gevent.init_gevent()  # before any channel is made; without it the first call stops all users

KEY = "talksplat"  # of a worker's report to its master
SPAWN_RATE = 10  # users a second that a shape starts, without --spawn-rate
FINISH, FINISHED = "talksplat finish", "talksplat finished"  # messages to a worker, and back with its last figures
FINISH_SECONDS = 10.0
FAREWELL_MS = 2000  # for a worker's last messages to be sent
WATCH_SECONDS = 0.1  # between two looks at the number of users

figures = Figures()  # of all machines; empty on a worker
workers: dict[str, bool] = {}  # that have reported; whether they have handed over their last figures
exit_code: int | None = None


class Shape(locust.LoadTestShape):
    """The one that ``--shape`` names."""

    abstract = True  # so that locust does not take it unasked

    def __init__(self, options: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._options = options

    def tick(self) -> tuple[int, float] | None:
        """Users there should be, and how many of them start or stop a second."""
        seconds: float = self.get_run_time()  # type: ignore[no-untyped-call]
        users = SHAPES[self._options.shape](seconds, self._options)
        return None if users is None else (users, self._options.spawn_rate or SPAWN_RATE)


def add_options(parser: Any) -> None:
    """Locust's own options, and these."""
    group = parser.add_argument_group("talksplat")
    group.add_argument("--avatars", type=_names, metavar="ID,ID", help="to animate; default: all that the server lists")
    group.add_argument("--size", type=int, metavar="PIXELS", help="of the frames; default: each avatar's own")
    group.add_argument("--ca", metavar="FILE", help="PEM file of whom grpcs:// believes; default: public authorities")
    group.add_argument("--shape", choices=SHAPES, help="of the load over time; default: --users for --run-time")
    group.add_argument("--step-users", type=int, default=2, metavar="N", help="more in each step; default: %(default)s")
    group.add_argument("--step-time", type=float, default=30, metavar="S", help="of a step; default: %(default)s")
    group.add_argument("--curve", metavar="FILE.png", help="draw latency against users there, and write FILE.csv")
    group.add_argument("--allow-refused", action="store_true", help="the SLO is that of the streams that were let in")
    for limit in fields(Slo):
        _add_limit(group, limit.name, limit.default)
    _add_limit(group, "interrupt_p95_ms", INTERRUPT_P95_MS)


def prepare(environment: Environment, runner: Any, **_: Any) -> None:
    """Connect the gate to whatever kind of locust process this is."""
    gevent.get_hub().loop.update_now()  # else all that the imports took, seconds on a busy machine, is off --run-time
    options: Any = environment.parsed_options
    hooks: Any = environment.events
    if not options.user_classes:
        environment.user_classes = [ConversationUser]  # flat out beside others would only break their SLO
    if isinstance(runner, WorkerRunner):
        hooks.report_to_master.add_listener(_send)
        runner.register_message(FINISH, _finish)
        hooks.quitting.add_listener(_finish)  # Ctrl-C reaches the workers of this machine; before locust's own goodbye
        atexit.register(lambda: runner.client.socket.context.destroy(linger=FAREWELL_MS))  # before `leave`
        return
    if options.shape:
        environment.shape_class = Shape(options)
        environment.shape_class.runner = runner
    if isinstance(runner, MasterRunner):
        hooks.worker_report.add_listener(_receive)
        hooks.test_stop.add_listener(_collect_the_rest)
        runner.register_message(FINISHED, _receive_last)
    gevent.spawn(_watch, runner)


def forget(**_: Any) -> None:
    """A new test begins, in the web interface perhaps after another one."""
    global figures
    TALLY.reset()
    figures = Figures()
    workers.clear()


def give_verdict(environment: Environment, **_: Any) -> None:
    """Print what was measured, draw the curve, and settle the exit code."""
    if isinstance(environment.runner, WorkerRunner) or environment.runner is None:
        return
    if environment.runner.state in ("spawning", "running"):  # Ctrl-C: users have not been stopped yet
        environment.runner.quit()
    _take_own(environment.runner)
    options: Any = environment.parsed_options
    limits = Slo(**{limit.name: getattr(options, f"slo_{limit.name}") for limit in fields(Slo)})
    verdict = judge(figures, limits, options.slo_interrupt_p95_ms, refusals_allowed=options.allow_refused)
    if unfinished := [worker for worker, finished in workers.items() if not finished]:
        verdict.doubts.append(f"{len(unfinished)} workers have not handed over their last figures")
    verdict.broken.extend(
        f"the load test itself failed: {each['msg']}" for each in environment.runner.exceptions.values()
    )
    report.print_tables(figures, limits)
    if options.curve:
        report.write_curve(figures, limits, options.curve)
    logging.getLogger(__name__).log(logging.ERROR if verdict.exit_code else logging.INFO, "%s", verdict)
    environment.process_exit_code = verdict.exit_code


def note_exit_code(exit_code: int, **_: Any) -> None:
    """Locust has two files to close yet, then it goes."""
    globals()["exit_code"] = exit_code


def leave() -> None:
    """Skip the interpreter's teardown: gRPC's channels can deadlock in it under gevent."""
    if exit_code is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _add_limit(group: Any, name: str, default: Any) -> None:
    option = f"--slo-{name.replace('_', '-')}"
    group.add_argument(option, type=float, default=default, metavar="X", help="limit of the SLO; default: %(default)s")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _finish(environment: Environment, **_: Any) -> None:
    """The worker's part of the end: stop, and hand over what is left."""
    assert isinstance(environment.runner, WorkerRunner)
    environment.runner.stop()
    environment.runner.send_message(FINISHED, TALLY.drain())


def _receive_last(msg: Any, **_: Any) -> None:
    figures.add(msg.node_id, msg.data, time.perf_counter())
    workers[msg.node_id] = True


def _collect_the_rest(environment: Environment, **_: Any) -> None:
    """The master's part: locust itself gives workers half a second for their last report, however busy they are."""
    runner: Any = environment.runner
    for worker in list(workers):
        with contextlib.suppress(RPCError):  # it is gone
            runner.send_message(FINISH, None, worker)
    with gevent.Timeout(FINISH_SECONDS, False):
        while not all(workers.values()):
            gevent.sleep(WATCH_SECONDS)


def _send(client_id: str, data: dict[str, Any]) -> None:
    data[KEY] = TALLY.drain()


def _receive(client_id: str, data: dict[str, Any]) -> None:
    if KEY in data:
        workers.setdefault(client_id, False)
        figures.add(client_id, data[KEY], time.perf_counter())


def _take_own(runner: Any) -> None:
    if not isinstance(runner, MasterRunner):
        figures.add("this process", TALLY.drain(), time.perf_counter())


def _watch(runner: Any) -> None:
    """Note how many users there are, and without workers take the figures of this process as often as theirs."""
    next_report = time.perf_counter()
    while True:
        now = time.perf_counter()
        figures.watch(runner.target_user_count if runner.state == "running" else None, now)
        if now >= next_report:
            _take_own(runner)
            next_report = now + REPORT_SECONDS
        gevent.sleep(WATCH_SECONDS)


HOOKS: Any = locust.events
HOOKS.init_command_line_parser.add_listener(add_options)
HOOKS.init.add_listener(prepare)
HOOKS.test_start.add_listener(forget)
HOOKS.quitting.add_listener(give_verdict)
HOOKS.quit.add_listener(note_exit_code)
atexit.register(leave)  # runs after locust's own, which is registered later
