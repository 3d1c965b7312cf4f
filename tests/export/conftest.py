"""Fixtures of the export tests."""

import fcntl
from collections.abc import Callable, Sequence
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
    return _exported(models.models())


@pytest.fixture(scope="session")
def every_precision() -> Path:
    """The same; what is missing or stale beside it in other precisions, too. Some minutes, the first time."""
    return _exported(models.models(), *PRECISIONS)


@pytest.fixture(scope="session")
def exported() -> Callable[..., Path]:
    """Exports what is missing or stale of some models in some precisions."""
    return _exported


def _exported(wanted: Sequence[models.Model], *precisions: Precision) -> Path:
    folder = ROOT / "model_repository"
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "exports.lock").open("w") as lock:  # one of the processes that tests run in at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        models.export(folder, wanted, Console(quiet=True), precisions or ("fp32",))
    return folder


@pytest.fixture(scope="session")
def speech() -> npt.NDArray[np.float32]:
    """demo/speech.wav: four sentences with silence between them."""
    audio, rate = soundfile.read(ROOT / "demo" / "speech.wav", dtype="float32")
    assert rate == clock.SAMPLE_RATE
    return np.asarray(audio, np.float32)
