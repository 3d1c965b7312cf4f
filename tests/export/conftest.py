"""Fixtures of the export tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from rich.console import Console

from talksplat import clock
from talksplat.server import ROOT
from talksplat_export import models


@pytest.fixture(scope="session")
def repository() -> Path:
    """The model repository; what is missing or stale in it is exported first."""
    repository = ROOT / "model_repository"
    models.export(repository, models.models(), Console(quiet=True))
    return repository


@pytest.fixture(scope="session")
def speech() -> npt.NDArray[np.float32]:
    """demo/speech.wav: four sentences with silence between them."""
    audio, rate = soundfile.read(ROOT / "demo" / "speech.wav", dtype="float32")
    assert rate == clock.SAMPLE_RATE
    return np.asarray(audio, np.float32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the commands run: small products are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
