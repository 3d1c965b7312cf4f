"""A full /dev/shm, which tritonserver and its stubs talk through: in a mount namespace with a small one of its own."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from supervised import Up
from tritonclient.utils import InferenceServerException
from viewers import MARKED, Verdict, Viewers

from talksplat import clock

OWN_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=96m talksplat /dev/shm && exec "$@"', "sh"]
MANY = 150  # windows in one request: 9 MB, far more than the regions have


def allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*OWN_SHM, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not allowed(), reason="this user can't mount a /dev/shm of its own (unshare --mount)")
def test_a_full_shared_memory_costs_no_frame(
    marked_avatars: Path, tmp_path: Path, judge: Callable[[str, Verdict], None]
) -> None:
    with (
        Up(marked_avatars, tmp_path, prefix=OWN_SHM) as up,
        Viewers([up.probe.grpc_url]) as viewers,
        triton.InferenceServerClient(up.probe.grpc_url) as client,
    ):
        filler = Path(f"/proc/{up.process.pid}/root/dev/shm/filler")
        tritonserver = up.tritonserver()
        viewers.fault()
        fill(filler)
        for _ in range(3):
            with pytest.raises(InferenceServerException, match="shared memory"):
                ask_for_many(client)
        filler.unlink()
        ask_for_many(client)
        viewers.wait_until_all_see()
        judge("/dev/shm full", viewers.verdict())
        assert up.tritonserver() == tritonserver


def fill(file: Path) -> None:
    """Take all the room that is left."""
    try:
        with file.open("wb", buffering=0) as opened:
            while True:
                opened.write(bytes(1 << 16))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def ask_for_many(client: triton.InferenceServerClient) -> None:
    """A request that the regions have to grow for."""
    arrays = {
        "AUDIO": np.zeros((MANY, clock.WINDOW), np.float32),
        "AVATAR": np.array([[MARKED[0].encode()]] * MANY, np.object_),
        "FRAME_INDEX": np.zeros((MANY, 1), np.int64),
    }
    types = {"AUDIO": "FP32", "AVATAR": "BYTES", "FRAME_INDEX": "INT64"}
    inputs = [
        triton.InferInput(name, array.shape, types[name]).set_data_from_numpy(array) for name, array in arrays.items()
    ]
    client.infer("animate", inputs, client_timeout=60)
