"""What a server and its processes cost: processor time and memory, by the name of each Triton model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import psutil
import tritonclient.grpc as triton

from talksplat.bench._report import Row
from talksplat.server import STUB

BATCHED = ("audio_encoder", "rasterizer")  # the first and the last step, whose batches are reported


@dataclass(frozen=True)
class Usage:
    """Of a process and its children until now."""

    cpu_seconds: Mapping[str, float]  # by process: the root's name, or the model that a stub of Triton serves
    rss: Mapping[str, int]  # bytes, likewise; memory that several share counts in each

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Look at a process and all below it; those that end meanwhile are left out.

        Raises:
            psutil.NoSuchProcess: there is none.
        """
        root = psutil.Process(pid)
        cpu: dict[str, float] = {}
        rss: dict[str, int] = {}
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                with process.oneshot():
                    name, times, memory = _name(process), process.cpu_times(), process.memory_info().rss
                cpu[name] = cpu.get(name, 0.0) + times.user + times.system
                rss[name] = rss.get(name, 0) + memory
        return cls(cpu, rss)

    @property
    def total(self) -> float:
        """Processor seconds of all together."""
        return sum(self.cpu_seconds.values())

    @property
    def rss_bytes(self) -> int:
        """Of all together."""
        return sum(self.rss.values())

    def since(self, before: Usage) -> dict[str, float]:
        """Processor seconds by process since then."""
        return {name: seconds - before.cpu_seconds.get(name, 0.0) for name, seconds in self.cpu_seconds.items()}


def _name(process: psutil.Process) -> str:
    command = process.cmdline()
    if command and command[0].endswith(STUB):
        for argument in command:
            if found := re.fullmatch(r"(\w+)_\d+_\d+", argument):  # the instance: model, group, number
                return found[1]
    return str(process.name())


@dataclass(frozen=True)
class Model:
    """What Triton's statistics say about a model between two moments; milliseconds are those of an inference."""

    inferences: int
    executions: int
    queue_ms: float
    input_ms: float
    infer_ms: float
    output_ms: float

    @property
    def batch(self) -> float:
        """Inferences an execution."""
        return self.inferences / self.executions if self.executions else 0.0


Statistics: TypeAlias = Mapping[str, tuple[int, ...]]


def statistics(url: str) -> Statistics:
    """Triton's counters by model, to be compared by `batching`."""
    with triton.InferenceServerClient(url) as client:
        found = client.get_inference_statistics().model_stats
    return {
        each.name: (
            each.inference_count,
            each.execution_count,
            each.inference_stats.success.count,
            *(
                getattr(each.inference_stats, part).ns
                for part in ("queue", "compute_input", "compute_infer", "compute_output")
            ),
        )
        for each in found
    }


def batching(before: Statistics, after: Statistics) -> dict[str, Model]:
    """By model, of those that were asked meanwhile."""
    found = {}
    for name, counters in after.items():
        inferences, executions, requests, *ns = (
            b - a for a, b in zip(before.get(name, (0,) * len(counters)), counters, strict=True)
        )
        if requests > 0:
            found[name] = Model(inferences, executions, *(each / requests / 1e6 for each in ns))
    return found


class Watch:
    """Looks at a server each time it is called: first as something begins, last as it ends.

    Args:
        pid: of its process, which may have children.
        url: of Triton's gRPC; None where there are no such statistics.
    """

    def __init__(self, pid: int, url: str | None = None) -> None:
        self._pid, self._url = pid, url
        self._moments: list[tuple[Usage, Statistics]] = []

    def __call__(self) -> None:
        """Look."""
        self._moments.append((Usage.of(self._pid), {} if self._url is None else statistics(self._url)))

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """Of each process in between."""
        return self._moments[-1][0].since(self._moments[0][0])

    @property
    def rss_bytes(self) -> int:
        """At the end."""
        return self._moments[-1][0].rss_bytes

    @property
    def models(self) -> dict[str, Model]:
        """Of each model in between."""
        return batching(self._moments[0][1], self._moments[-1][1])

    @property
    def batches(self) -> Row:
        """Of `BATCHED`, inferences an execution in between, as columns."""
        models = self.models
        return {f"batch_{name}": models[name].batch for name in BATCHED if name in models}
