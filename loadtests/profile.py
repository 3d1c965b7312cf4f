"""Where the time goes: what one frame costs in each part of the path, under streams of the ensemble `animate`.

Three views, in one run:

``stage``    the work itself without a server, in one thread: nets, look-up, blend, splat, composite, JPEG. ``cpu_ms``
             alone on the machine, ``beside_ms`` while a twin process does the same on the other processor.
``process``  processor time of each process under streams, as the kernel counts it, and what Triton says of each model:
             milliseconds of an inference in queue, input, inference and output.
``rest``     the difference of the two: what the stubs, Triton's shared memory and the models' Python add to the work.

    python -m loadtests.profile --json bench/profile.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import simplejpeg

from loadtests.streams import FlatOut, Generator, Load, Paced, Triton, windows
from loadtests.usage import Model, Watch
from talksplat import avatar as bundle
from talksplat import clock, splat
from talksplat.animator import Options, gate
from talksplat.bench._report import Row, report
from talksplat.bench._server import serving
from talksplat.server import ROOT, Server

Float32 = npt.NDArray[np.float32]

NETS = ("audio_encoder", "vad", "deformation")
DRAWN = ("composite", "blend", "splat", "jpeg")  # stages in the rasterizer
KERNEL_SECONDS = 2.0
CHUNKS = 150  # through every stage, for a median
LOADS = (("paced", 1), ("paced", 8), ("flat_out", 8))


def main(argv: list[str] | None = None) -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--avatar", default="ava", help="of the profile huma2; default: %(default)s")
    parser.add_argument("--size", type=int, default=512, help="pixels a side; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load; default: %(default)s")
    arguments = parser.parse_args(argv)

    with serving(arguments.avatar) as server, Generator() as generator:
        rows = measure(server, generator, arguments.avatar, arguments.size, arguments.seconds)
    processors = second_processor(ROOT / "avatars", arguments.avatar, KERNEL_SECONDS)
    report("profile", rows, arguments.json, {"second_processor": [processors]})
    return 0


def measure(
    server: Server, generator: Generator, avatar: str, size: int, seconds: float, chunks: int = CHUNKS
) -> list[Row]:
    """All three views."""
    work = stages(server.avatars, avatar, size, chunks)
    rows: list[Row] = [{"view": "stage", "part": part, **times} for part, times in work.items()]
    for kind, streams in LOADS:
        load = Load(streams, (avatar,), size, seconds)
        assert server.pid is not None
        watch = Watch(server.pid, server.grpc_url)
        drive = generator.paced if kind == "paced" else generator.flat_out
        seen: Paced | FlatOut = drive(Triton(server.grpc_url), load, watch)
        cpu = {"generator": seen.cpu_seconds, **watch.cpu_seconds}
        rows += _of_load(f"{kind} {streams}", seen, cpu, watch.models, work)
    return rows


def _of_load(
    load: str, seen: Paced | FlatOut, cpu: dict[str, float], models: dict[str, Model], work: dict[str, Row]
) -> list[Row]:
    frames = seen.frames_per_s * seen.seconds
    total = sum(cpu.values())
    rows: list[Row] = []
    for part, seconds in cpu.items():
        row: Row = {"view": "process", "part": part, "load": load, "cpu_ms": 1e3 * seconds / frames}
        row["share_pct"] = 100 * seconds / total
        if part in models:
            model = models[part]
            row |= {"queue_ms": model.queue_ms, "input_ms": model.input_ms, "infer_ms": model.infer_ms}
            row |= {"output_ms": model.output_ms, "batch": model.batch}
        if seconds / total > 0.001:
            rows.append(row)
    busy = load != f"{LOADS[0][0]} {LOADS[0][1]}"
    for part in ("rasterizer", "avatar", *NETS):
        own = [work[name]["beside_ms" if busy else "cpu_ms"] for name in (DRAWN if part == "rasterizer" else (part,))]
        rest = 1e3 * cpu[part] / frames - sum(float(each or 0) for each in own)
        rows.append({"view": "rest", "part": part, "load": load, "cpu_ms": rest})
    whole: Row = {"view": "process", "part": "all", "load": load, "cpu_ms": 1e3 * total / frames, "share_pct": 100.0}
    return [*rows, {**whole, "frames_per_s": seen.frames_per_s, "cores_busy": total / seen.seconds}]


def stages(avatars: Path, avatar_id: str, size: int, chunks: int) -> dict[str, Row]:
    """Processor milliseconds a frame of each stage, median: alone and beside a twin."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        tasks = avatars, avatar_id, size, chunks
        alone = processes.submit(_stages, *tasks).result()
        twins = [processes.submit(_stages, *tasks) for _ in range(2)]
        beside = [twin.result() for twin in twins]
    return {
        part: {"cpu_ms": ms, "beside_ms": float(np.mean([each[part] for each in beside]))} for part, ms in alone.items()
    }


def _stages(avatars: Path, avatar_id: str, size: int, chunks: int) -> dict[str, float]:
    voice = [np.frombuffer(window, np.float32)[None] for window in windows()]
    avatar = bundle.read(avatars, avatar_id)
    nets = {name: _net(name) for name in NETS}
    adapter_in, adapter_out = (tensor[None] for tensor in bundle.read_adapter(avatars, avatar_id))

    times: dict[str, list[float]] = {}

    def timed(part: str, frames: int, call: Callable[..., object], *arguments: object) -> None:
        began = time.thread_time()
        call(*arguments)
        times.setdefault(part, []).append(1e3 * (time.thread_time() - began) / frames)

    shapes = splat.Blendshapes(avatar.canonical, avatar.bases, avatar.basis_scales)
    hidden = avatar.canonical.copy()
    hidden[10] = -20.0  # the opacity's logit: blended and composited, but not drawn
    unseen = splat.Blendshapes(hidden, avatar.bases, avatar.basis_scales)
    first, bases = (np.ascontiguousarray(array[..., :1]) for array in (hidden, avatar.bases))
    one = splat.Blendshapes(first, bases, avatar.basis_scales)
    scale = np.array([size / avatar.width, size / avatar.height, 1], np.float32)
    intrinsics = avatar.K * scale[:, None]
    out = np.empty((size, size, 3), np.uint8)
    plates = [
        simplejpeg.decode_jpeg(plate, "RGB", min_height=size, min_width=size)[:size, :size]
        for plate in avatar.plates[: clock.FPS]
    ]

    def draw(each: splat.Blendshapes, weights: Float32, plate: int) -> None:
        splat.render_onto([splat.Job(each, weights, avatar.viewmats[plate], intrinsics, plates[plate], out)], threads=1)

    def encode() -> None:
        simplejpeg.encode_jpeg(out, Options().quality, "RGB", "420", fastdct=True)

    for chunk in range(chunks):
        window = voice[chunk % len(voice)]
        plate, frames = chunk % len(plates), clock.CHUNK_FRAMES
        features, copied = nets["audio_encoder"].run(["FEATURES", "WINDOW"], {"AUDIO": window})
        feeds = {"FEATURES": features, "ADAPTER_IN": adapter_in, "ADAPTER_OUT": adapter_out}
        speech: Float32 = nets["vad"].run(["SPEECH"], {"AUDIO": copied})[0][0]
        motion: Float32 = nets["deformation"].run(["COEFFICIENTS"], feeds)[0][0]
        weights = np.append(motion[0] * gate(speech)[0], np.float32(0)).astype(np.float32)
        timed("audio_encoder", frames, nets["audio_encoder"].run, None, {"AUDIO": window})
        timed("vad", frames, nets["vad"].run, None, {"AUDIO": copied})
        timed("avatar", frames, lambda: (np.stack([adapter_in[0]]), np.stack([adapter_out[0]])))
        timed("deformation", frames, nets["deformation"].run, None, feeds)
        timed("composite", 1, draw, one, weights, plate)
        timed("composite, blend", 1, draw, unseen, weights, plate)
        timed("composite, blend, splat", 1, draw, shapes, weights, plate)
        timed("jpeg", 1, encode)
    found = {part: float(np.median(each)) for part, each in times.items()}
    found["splat"] = found.pop("composite, blend, splat") - found["composite, blend"]
    found["blend"] = found.pop("composite, blend") - found["composite"]
    return found


def _net(name: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(ROOT / "model_repository" / name / "1" / "model.onnx"), options)


def second_processor(avatars: Path, avatar_id: str, seconds: float) -> Row:
    """Frames a second of the rasterizer and the JPEG encoder: in one process, and in as many as there are processors.

    Nothing is shared between them, so what is missing to twice as much is the machine's.
    """
    count = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as processes:
        list(
            processes.map(
                _frames_per_s, [avatars] * count, [avatar_id] * count, [time.monotonic() + 1] * count, [0.0] * count
            )
        )
        one = processes.submit(_frames_per_s, avatars, avatar_id, time.monotonic(), seconds).result()
        begin = time.monotonic() + 0.5
        runs = [processes.submit(_frames_per_s, avatars, avatar_id, begin, seconds) for _ in range(count)]
        together = sum(run.result() for run in runs)
    return {
        "processors": count,
        "one_process_frames_per_s": one,
        "all_together_frames_per_s": together,
        "worth_of_processors": together / one,
    }


def _frames_per_s(avatars: Path, avatar_id: str, begin: float, seconds: float) -> float:
    avatar = bundle.read(avatars, avatar_id)
    shapes = splat.Blendshapes(avatar.canonical, avatar.bases, avatar.basis_scales)
    weights = np.random.default_rng(0).normal(0, 0.5, (clock.FPS, shapes.rank)).astype(np.float32)
    plate = simplejpeg.decode_jpeg(avatar.plates[0], "RGB")
    out = np.empty_like(plate)
    time.sleep(max(0.0, begin - time.monotonic()))
    frames, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        job = splat.Job(shapes, weights[frames % clock.FPS], avatar.viewmats[0], avatar.K, plate, out)
        splat.render_onto([job], threads=1)
        simplejpeg.encode_jpeg(out, Options().quality, "RGB", "420", fastdct=True)
        frames += 1
    return frames / seconds if seconds else 0.0


if __name__ == "__main__":
    sys.exit(main())
