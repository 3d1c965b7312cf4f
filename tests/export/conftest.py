"""Fixtures of the export tests."""

import fcntl
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from rich.console import Console

from talksplat import clock
from talksplat.server import ROOT
from talksplat_export import models
from talksplat_export.registry import PRECISIONS, Precision


@pytest.fixture(scope="session")
def repository() -> Path:
    """The model repository; what is missing or stale in it is exported first."""
    return _exported("fp32")


@pytest.fixture(scope="session")
def every_precision() -> Path:
    """The same; what is missing or stale beside it in other precisions, too. Some minutes, the first time."""
    return _exported(*PRECISIONS)


def _exported(*precisions: Precision) -> Path:
    repository = ROOT / "model_repository"
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "exports.lock").open("w") as lock:  # one of the processes that tests run in at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        models.export(repository, models.models(), Console(quiet=True), precisions)
    return repository


@pytest.fixture(scope="session")
def speech() -> npt.NDArray[np.float32]:
    """demo/speech.wav: four sentences with silence between them."""
    audio, rate = soundfile.read(ROOT / "demo" / "speech.wav", dtype="float32")
    assert rate == clock.SAMPLE_RATE
    return np.asarray(audio, np.float32)
