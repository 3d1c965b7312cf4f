"""`talksplat-export compare`: both generations and two baselines of other families, on one recording, in one table.

Huma 1 and Huma 2 are fitted as `fit` does, or read with ``--huma1`` and ``--huma2``; a small 2D generator and a small
radiance field (`talksplat_export.families`) are trained on the same frames. All are driven by the sound and judged on
the same frames, which none of them was fitted to. What is finished in the work folder is used again.

=========================== ===========================================================================================
``train_minutes``           of all steps of the fit, on the machine that fitted it
``encoder_params``          weights of the speech encoder, which all avatars share, and
``encoder_mflop``           what it computes for a frame, in millions of multiplications and additions
``net_params``              weights of the person's own network, and what it computes for a frame; ``net_mflop`` of
``net_mflop``               Huma 2 includes the blend of its bases, that of the radiance field all its rays. Counted by
                            PyTorch: products of matrices and convolutions; neither look-ups nor rasterizers
``table_params``            what else is the person's own: Gaussians, bases, triplanes
``bundle_mb``               on the disk, recorded plates included (for baselines, the plates of Huma 2)
``preload_cold_ms``         until an avatar can be drawn that is not in memory (the worst of several), and
``preload_warm_ms``         when it is. Generations: in the server, through gRPC. Baselines: reading the weights and
                            drawing once, in a process of its own
``first_frame_ms``          of a new stream through gRPC, median; baselines are not served
``frame_ms``                from a window of sound to a raw frame, median, networks and drawing: one thread, and as
``frame_ms_all_threads``    many as there are cores. In this process, without gRPC and JPEG
``memory_mb``               that the avatar and a stream of it add to a fresh server's processes, or to one that has
                            PyTorch
``face_psnr_db`` and others as `quality` has them
``flip``                    mean error of NVIDIA's FLIP (https://doi.org/10.1145/3406183) in the mouth's crop, every 8th
                            frame: what differs when the two pictures alternate. It stands in for LPIPS, whose networks
                            have to be downloaded: its package carries their last layers alone
``r_...``                   of the generations: lip opening driven by degraded sound of the test frames, correlated
                            with that by the clean one, as `robustness` has it: with white noise and with a babble of
                            the speaker's own voice at 10 dB SNR, in a room of 0.5 s RT60, 20 dB too quiet, sampled at
                            8 kHz. Baselines: not measured
=========================== ===========================================================================================

What is trained and what is measured of a contender is kept in the work folder until it, the recording, the machine or
the code changes, so an interrupted comparison goes on from there.

The 2D generator leaves everything above the nose as it was recorded, so its face crop is partly the recording: the
mouth's crop compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import flip_evaluator
import numpy as np
import numpy.typing as npt
import psutil
import simplejpeg
import torch
import tritonclient.grpc as triton
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from talksplat import avatar as bundle
from talksplat import clock, triplanes
from talksplat.animator import Animator, Chunk, Options
from talksplat.avatar import FEATURES, AnyAvatar, Avatar, BundleError, Huma1Avatar, UnknownAvatarError
from talksplat.bench import _ask, _report, preload
from talksplat.bench._report import Row
from talksplat.files import replacing, sha256
from talksplat.server import ROOT, Ports, Server, ServerError
from talksplat_export import (
    audio_encoder,
    bars,
    deformation,
    feeds,
    fit,
    huma1,
    huma1_drive,
    huma1_fit,
    models,
    moonshine,
    plates,
    quality,
    robustness,
    stage_b,
    track,
)
from talksplat_export._npz import Npz
from talksplat_export.families.baseline import Baseline, Scene, fitted
from talksplat_export.families.inpainting import Inpainting
from talksplat_export.families.radiance_field import RadianceField
from talksplat_export.fit import Settings
from talksplat_export.quality import MOUTH_MARGIN, Comparison, Subject
from talksplat_export.recording import Image, Recording, RecordingError
from talksplat_export.steps import Steps
from talksplat_export.track import Landmarker, Track, TrackError

GENERATIONS: Mapping[str, tuple[str, Settings]] = {"Huma 1": ("huma1", fit.HUMA1), "Huma 2": ("huma2", Settings())}
BASELINES: Sequence[type[Baseline]] = (Inpainting, RadianceField)
FLIP_EVERY = 8  # frames
TIMED_CHUNKS = 24
TIMED_SPAN = 4  # chunks apart
STREAM_SECONDS = 6.0
ROBUSTNESS_SECONDS = 16.0
ROBUSTNESS = {
    "r_noise_10_db": ("white_noise", 10),
    "r_babble_10_db": ("babble", 10),
    "r_reverb_0_5_s": ("reverb", 0.5),
    "r_gain_minus_20_db": ("gain", -20),
    "r_sampled_at_8_khz": ("band_limit", 4000),
}
FOLLOWED = 500  # Gaussians of a Huma 1 whose displacement is followed
SOURCES = (".py", ".cpp", ".h", ".pbtxt", ".safetensors")  # suffixes of what a figure depends on
MEASURING_SECONDS = 100.0  # of a contender, about
PICTURE_WIDTH = 176  # pixels of one face in the picture
PICTURE_BYTES = 300_000

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cost:
    """What a family computes and stores."""

    encoder_params: int
    encoder_mflop: float  # a frame
    net_params: int
    net_mflop: float  # a frame
    table_params: int

    def row(self) -> Row:
        """As columns."""
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in vars(self).items()}
        return dict(rounded)


class Contender(ABC):
    """One line of the table."""

    name: str
    subject: Comparison

    @property
    @abstractmethod
    def train_minutes(self) -> float | None:
        """That the fit took, where it is known."""

    @abstractmethod
    def cost(self) -> Cost:
        """Counted on the networks themselves."""

    @abstractmethod
    def animates(self, threads: int) -> Callable[[Float32, int], object]:
        """Draws the frames of a window [WINDOW] whose first one has an index, in this process."""

    @abstractmethod
    def resources(self) -> Row:
        """Size, preload, first frame and memory."""

    @abstractmethod
    def robust(self, clean: Float32, degraded: Mapping[str, Float32]) -> Row:
        """Correlations of what degraded versions of some speech [samples] do with what the speech does."""

    @abstractmethod
    def digest(self) -> str:
        """Changes with what was fitted."""


def mflop(compute: Callable[[], object]) -> float:
    """Millions of multiplications and additions in products of matrices and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops()) / 1e6


def parameters(net: nn.Module) -> int:
    """Numbers that training sets."""
    return sum(parameter.numel() for parameter in net.parameters())


def _encoder_cost(net: nn.Module) -> tuple[int, float]:
    """Weights, and MFLOP a frame in windows as they are served."""
    return parameters(net), mflop(lambda: net(torch.zeros(1, clock.WINDOW))) / clock.CHUNK_FRAMES


# --- the generations ---------------------------------------------------------------------------------------------


class Generation(Contender):
    """An avatar as it is served.

    Args:
        folder: its bundle.
        repository: the model repository, with the exported models in it.
    """

    def __init__(self, name: str, folder: Path, subject: Comparison, repository: Path) -> None:
        self.name, self.folder, self.subject, self.repository = name, folder, subject, repository
        self.avatar = subject.avatar

    @property
    def train_minutes(self) -> float | None:  # noqa: D102
        seconds = self.avatar.provenance.get("seconds")
        return sum(seconds.values()) / 60 if seconds else None

    def cost(self) -> Cost:  # noqa: D102
        if isinstance(self.avatar, Huma1Avatar):
            return _huma1_cost(self.avatar)
        assert isinstance(self.avatar, Avatar)
        return _huma2_cost(self.avatar)

    def animates(self, threads: int) -> Callable[[Float32, int], object]:  # noqa: D102
        animator = Animator(self.folder.parent, threads=threads)
        animator.preload(self.avatar.id)
        run = _networks(self.avatar, self.repository, threads)

        def animate(window: Float32, index: int) -> object:
            motion, speech = run(window)
            drawn = animator.render([Chunk(self.avatar.id, motion, speech, index, Options("raw"))])[0]
            if isinstance(drawn, Exception):
                raise drawn
            return drawn

        return animate

    def resources(self) -> Row:  # noqa: D102
        with self._served() as server, triton.InferenceServerClient(server.grpc_url) as client:
            before = _server_memory(server)
            (server.avatars / self.avatar.id).symlink_to(self.folder.resolve(), target_is_directory=True)
            cold = [_ask.operate(client, "preload", self.avatar.id)]
            first_frame_ms = _stream(server, self.avatar)
            memory = _server_memory(server) - before
            warm = [_ask.operate(client, "preload", self.avatar.id) for _ in range(preload.WARM)]
            for _ in range(preload.COLD - 1):
                _ask.operate(client, "unload", self.avatar.id)
                cold.append(_ask.operate(client, "preload", self.avatar.id))
        return {
            "bundle_mb": _folder_mb(self.folder),
            "preload_cold_ms": round(max(cold), 1),
            "preload_warm_ms": round(float(np.median(warm)), 2),
            "first_frame_ms": round(float(np.median(first_frame_ms)), 1),
            "memory_mb": round(memory / 1e6, 1),
        }

    @contextmanager
    def _served(self) -> Iterator[Server]:
        """A fresh server without avatars: the first canary would load one."""
        with (
            tempfile.TemporaryDirectory() as root,
            Server(repository=self.repository, avatars=Path(root), ports=Ports.free()) as server,
        ):
            yield server

    def robust(self, clean: Float32, degraded: Mapping[str, Float32]) -> Row:  # noqa: D102
        follow = _displacement(self.avatar)
        moved = follow(clean)
        opening = robustness.Opening.of(moved)
        return {
            name: round(float(np.corrcoef(opening(moved), opening(follow(audio)))[0, 1]), 3)
            for name, audio in degraded.items()
        }

    def digest(self) -> str:  # noqa: D102
        return "".join(sha256(path) for path in sorted(self.folder.iterdir()) if path.suffix != ".json")


def _stream(server: Server, avatar: AnyAvatar) -> list[float]:
    """Milliseconds to the first frame, connecting included, of streams of ten chunks, one after the other."""
    first_frame_ms = []
    end = time.perf_counter() + STREAM_SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        with triton.InferenceServerClient(
            server.grpc_url, channel_args=[("grpc.use_local_subchannel_pool", 1)]
        ) as client:
            for chunk in range(10):
                _ask.animate(client, avatar.id, chunk, avatar.width, avatar.model)
                if chunk == 0:
                    first_frame_ms.append(1e3 * (time.perf_counter() - began))
    return first_frame_ms


def _huma1_cost(avatar: Huma1Avatar) -> Cost:
    encoder = moonshine.load_wheel("base")[0].model.encoder
    table = torch.from_numpy(triplanes.bake(avatar))[None]
    net = {name: torch.from_numpy(tensor)[None] for name, tensor in avatar.deformation.items()}
    tokens = torch.zeros(1, clock.CHUNK_FRAMES, bundle.SPEECH_TOKENS, bundle.SPEECH_WIDTH)
    tables = (avatar.canonical, avatar.blink, avatar.coarse, avatar.fine)
    return Cost(
        *_encoder_cost(encoder),
        sum(tensor.numel() for tensor in net.values()),
        mflop(lambda: huma1.offsets(tokens, table, net)) / clock.CHUNK_FRAMES,
        sum(array.size for array in tables),
    )


def _huma2_cost(avatar: Avatar) -> Cost:
    adapter = [torch.from_numpy(matrix)[None] for matrix in (avatar.adapter_in, avatar.adapter_out)]
    features = torch.zeros(1, clock.CHUNK_FRAMES, FEATURES)
    rest = torch.from_numpy(avatar.canonical).reshape(1, -1)
    bases = torch.from_numpy(avatar.bases).float().transpose(0, 1).flatten(1)  # [21, 14 N]

    def frames() -> None:
        deformation.Deformation()(features, *adapter)
        torch.addmm(rest, torch.zeros(clock.CHUNK_FRAMES, len(bases)), bases)

    return Cost(
        *_encoder_cost(audio_encoder.load()),
        sum(matrix.numel() for matrix in adapter),
        mflop(frames) / clock.CHUNK_FRAMES,
        avatar.canonical.size + avatar.bases.size + avatar.basis_scales.size,
    )


def _networks(avatar: AnyAvatar, repository: Path, threads: int) -> Callable[[Float32], tuple[Float32, Float32]]:
    """The networks of the avatar's ensemble in this process: a window [WINDOW] -> motion and speech of its frames."""

    def session(model: str) -> Callable[[str, Mapping[str, Float32]], Float32]:
        graph = feeds.session(repository / model / "1" / "model.onnx", threads=threads)
        return lambda output, inputs: np.asarray(graph.run([output], inputs)[0])

    detector = session("vad")
    if isinstance(avatar, Huma1Avatar):
        hear, heard, move, moved = session("asr_encoder"), "HIDDEN", session("deformation_huma1"), "OFFSETS"
        own = {"TABLE": triplanes.bake(avatar)} | {name.upper(): each for name, each in avatar.deformation.items()}
    else:
        assert isinstance(avatar, Avatar)
        hear, heard, move, moved = session("audio_encoder"), "FEATURES", session("deformation"), "COEFFICIENTS"
        own = {"ADAPTER_IN": avatar.adapter_in, "ADAPTER_OUT": avatar.adapter_out}
    own = {name: tensor[None] for name, tensor in own.items()}

    def run(window: Float32) -> tuple[Float32, Float32]:
        sound = {"AUDIO": window[None]}
        speech = detector("SPEECH", sound)[0]
        return move(moved, {heard: hear(heard, sound), **own})[0], speech

    return run


def _displacement(avatar: AnyAvatar) -> Callable[[Float32], Float32]:
    """How the Gaussians move to some audio [samples]: [T, D], in units in which squares add up alike."""
    if isinstance(avatar, Avatar):
        return robustness.Driven(avatar)
    assert isinstance(avatar, Huma1Avatar)

    def follow(audio: Float32) -> Float32:
        frames = len(audio) // clock.SAMPLES_PER_FRAME
        heard = huma1_fit.hear([audio], frames, lambda _: None)
        some = slice(None, None, max(avatar.gaussians // FOLLOWED, 1))
        return np.stack([offsets[:3, some].ravel() for offsets in huma1_drive.drive(avatar, heard, range(frames))])

    return follow


def _server_memory(server: Server) -> int:
    """Bytes that the server's processes have to themselves."""
    assert server.pid is not None
    main = psutil.Process(server.pid)
    return sum(process.memory_full_info().uss for process in (main, *main.children(recursive=True)))


def _folder_mb(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 2)


# --- the baselines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drawn(Comparison):
    """A baseline as `quality` measures it; ``avatar`` only says which frames it was fitted to."""

    baseline: Baseline

    @property
    def speech(self) -> Float32:
        """As the encoder's windows have it."""
        return self.baseline.scene.heard.speech

    def drawer(self, driven_by: str) -> Callable[[Image, int], Image]:
        """By the sound, whatever is asked for."""
        return self.baseline.draw


class Other(Contender):
    """A baseline.

    Args:
        weights: the file that its fit left.
    """

    def __init__(self, subject: Drawn, weights: Path, train_minutes: float, plates_mb: float, repository: Path) -> None:
        self.subject, self.baseline, self.name = subject, subject.baseline, subject.baseline.name
        self.weights, self._minutes, self._plates_mb = weights, train_minutes, plates_mb
        self.repository = repository
        test = subject.test
        self._frame = test.start, next(subject.recording.frames(test.start, test.start + 1))

    @property
    def train_minutes(self) -> float | None:  # noqa: D102
        return self._minutes

    def cost(self) -> Cost:  # noqa: D102
        index, recorded = self._frame
        tables = self.baseline.tables()
        own = parameters(self.baseline)
        return Cost(
            *_encoder_cost(audio_encoder.load()),
            own - tables,
            mflop(lambda: self.baseline.predict(recorded, index)),
            tables,
        )

    def animates(self, threads: int) -> Callable[[Float32, int], object]:  # noqa: D102
        encoder = feeds.session(self.repository / "audio_encoder" / "1" / "model.onnx", threads=threads)
        detector = feeds.session(self.repository / "vad" / "1" / "model.onnx", threads=threads)
        start, recorded = self._frame

        def animate(window: Float32, index: int) -> object:
            sound = {"AUDIO": window[None]}
            encoder.run(["FEATURES"], sound)
            detector.run(["SPEECH"], sound)
            return [self.baseline.draw(recorded, start) for _ in range(clock.CHUNK_FRAMES)]

        return animate

    def resources(self) -> Row:  # noqa: D102
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            cold, memory = process.submit(_loaded, self.baseline, self.weights, *self._frame).result()
        return {
            "bundle_mb": round(self.weights.stat().st_size / 1e6 + self._plates_mb, 2),
            "preload_cold_ms": round(cold, 1),
            "preload_warm_ms": None,
            "first_frame_ms": None,
            "memory_mb": round(memory / 1e6, 1),
        }

    def robust(self, clean: Float32, degraded: Mapping[str, Float32]) -> Row:  # noqa: D102
        return dict.fromkeys(degraded)

    def digest(self) -> str:  # noqa: D102
        return sha256(self.weights)


def _loaded(baseline: Baseline, weights: Path, index: int, recorded: Image) -> tuple[float, int]:
    """In a process of its own: milliseconds until the weights are read and a frame is drawn, and bytes."""
    torch.set_num_threads(1)
    before = psutil.Process().memory_full_info().uss
    began = time.perf_counter()
    baseline.load_state_dict(torch.load(weights, weights_only=True)["net"])
    baseline.draw(recorded, index)
    cold = time.perf_counter()
    after = psutil.Process().memory_full_info().uss
    own = sum(tensor.nbytes for tensor in baseline.state_dict().values())  # these came with the baseline
    return 1e3 * (cold - began), max(after - before, 0) + own


# --- the table ---------------------------------------------------------------------------------------------------


class Perception:
    """FLIP's mean error in a box, of some frames."""

    def __init__(self, box: tuple[slice, slice]) -> None:
        self._box = box
        self._errors: list[float] = []

    def __call__(self, recorded: Image, drawn: Image) -> None:
        """Look at a pair of frames."""
        pair = (image[self._box].astype(np.float32) / 255 for image in (recorded, drawn))
        self._errors.append(float(flip_evaluator.evaluate(*pair, "LDR", applyMagma=False)[1]))

    @property
    def mean(self) -> float:
        """Over all pairs: 0 for none that differs, to 1."""
        return float(np.mean(self._errors))


@dataclass(frozen=True, eq=False)
class Measured(Npz):
    """A contender's figures, and the faces of the frames that are shown."""

    row: str  # JSON
    recorded: npt.NDArray[np.uint8]  # [F, H, W, 3]
    drawn: npt.NDArray[np.uint8]


def table(
    contenders: Sequence[Contender], landmarker: Landmarker, picture: Path | None, done: Steps, code: str
) -> list[Row]:
    """All figures of all contenders, and the picture of some frames.

    Args:
        done: keeps what is measured.
        code: a digest of what measures.
    """
    every = [_measured(contender, landmarker, done, code) for contender in contenders]
    if picture is not None:
        columns = [every[0].recorded, *(each.drawn for each in every)]
        with replacing(picture) as unfinished:
            unfinished.write_bytes(side_by_side(list(zip(*columns, strict=True))))
    rows: list[Row] = []
    for contender, each in zip(contenders, every, strict=True):
        minutes = contender.train_minutes
        rows.append({"family": contender.name, "train_minutes": None if minutes is None else round(minutes, 1)})
        rows[-1] |= json.loads(each.row)
    return rows


def _measured(contender: Contender, landmarker: Landmarker, done: Steps, code: str) -> Measured:
    subject = contender.subject
    name, test = f"measure {contender.name}", subject.test
    path = done.folder / f"{name.replace(' ', '-')}.npz"
    arrays = (subject.track.landmarks, subject.track.viewmats)
    tracked = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
    key = done.key(code, _report.machine(), contender.digest(), subject.recording.sha256, tracked, test)
    if done.is_done(name, key):
        done.skipped(name)
    else:
        with done.running(name, key, len(test), [path.name]) as advance:
            _measure(contender, landmarker, advance).save(path)
    return Measured.load(path)


def _measure(contender: Contender, landmarker: Landmarker, advance: Callable[[int], object]) -> Measured:
    subject = contender.subject
    picked, layout = notable(subject), subject.track.layout
    face = subject.box(layout.face, margin=12)
    perceived = Perception(subject.box(layout.mouth, MOUTH_MARGIN))
    shown: dict[int, tuple[Image, Image]] = {}

    def observe(index: int, recorded: Image, drawn: Image) -> None:
        if (index - subject.test.start) % FLIP_EVERY == 0:
            perceived(recorded, drawn)
        if index in picked:
            shown[index] = recorded[face].copy(), drawn[face].copy()

    row = contender.cost().row() | contender.resources() | frame_times(contender)
    row |= quality.measure(subject, "audio", landmarker, advance, observe)
    row["flip"] = round(perceived.mean, 4)
    audio, start = subject.recording.audio, subject.test.start * clock.SAMPLES_PER_FRAME
    clean = audio[start:][: int(ROBUSTNESS_SECONDS * clock.SAMPLE_RATE)]
    row |= contender.robust(clean, degraded(clean, audio[:start]))
    recorded, drawn = (np.stack(side) for side in zip(*(shown[index] for index in picked), strict=True))
    return Measured(json.dumps(row), recorded, drawn)


def degraded(clean: Float32, other: Float32) -> dict[str, Float32]:
    """Some speech [samples] in the ways of `ROBUSTNESS`, by column.

    Args:
        other: speech that a babble is made of.
    """
    known = {(each.name, each.level): each for each in robustness.DEGRADATIONS}
    rng = np.random.default_rng(0)
    crowd = robustness.babble([other], clean, rng)
    return {column: known[wanted].apply(clean, crowd, rng) for column, wanted in ROBUSTNESS.items()}


def sources() -> str:
    """A digest of the code that draws and measures."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, ROOT / "talksplat", ROOT / "model_repository", ROOT / "backends"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCES:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def notable(subject: Comparison) -> list[int]:
    """Test frames to look at: lips widest open, firmly closed amid speech, half open, lids shut, head turned most."""
    test, tracked = subject.test, subject.track
    opening, blink = (values[test.start : test.stop] for values in (tracked.lip_opening, tracked.blink))
    speaking = subject.speech[test.start : test.stop] > 0.5
    awake = blink < 0.1
    looks = tracked.viewmats[test.start : test.stop, 2, :3]  # the head's axes along the line of sight
    turned = np.linalg.norm(looks - np.median(looks, axis=0), axis=1)

    def best(score: npt.NDArray[np.float32], where: npt.NDArray[np.bool_]) -> int:
        return test.start + int(np.argmax(np.where(where, score, -np.inf)))

    middle = -np.abs(opening - np.percentile(opening, 75))
    frames = (
        best(opening, awake),
        best(-opening, awake & speaking),
        best(middle, awake & speaking),
        best(blink, blink >= blink.max()),
        best(turned, awake & speaking),
    )
    return list(dict.fromkeys(frames))


def side_by_side(rows: Sequence[Sequence[Image]]) -> bytes:
    """A JPEG of rows of pictures, all of one size."""
    height, width = rows[0][0].shape[:2]
    size = (round(height * PICTURE_WIDTH / width), PICTURE_WIDTH)

    def small(image: Image) -> Image:
        planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        reduced = nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)[0]
        return np.asarray(reduced.round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy())

    whole = np.concatenate([np.concatenate([small(image) for image in row], 1) for row in rows])
    for compression in range(92, 40, -4):
        encoded = bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(whole), compression, "RGB", "444"))
        if len(encoded) <= PICTURE_BYTES:
            break
    return encoded


def frame_times(contender: Contender) -> Row:
    """Milliseconds a frame, one thread and all; medians over chunks of the test frames' sound."""
    audio, start = contender.subject.recording.audio, contender.subject.test.start
    padded = np.pad(audio, (clock.LEFT_CONTEXT, clock.WINDOW))
    row: Row = {}
    for column, threads in (("frame_ms", 1), ("frame_ms_all_threads", len(os.sched_getaffinity(0)))):
        with _torch_threads(threads):
            animate, times = contender.animates(threads), []
            for chunk in range(TIMED_CHUNKS + 1):
                index = start + chunk * TIMED_SPAN * clock.CHUNK_FRAMES % max(len(contender.subject.test), 1)
                at = index * clock.SAMPLES_PER_FRAME
                window = np.ascontiguousarray(padded[at : at + clock.WINDOW])
                began = time.perf_counter()
                animate(window, index)
                times.append(1e3 * (time.perf_counter() - began) / clock.CHUNK_FRAMES)
        row[column] = round(float(np.median(times[1:])), 2)  # the first one warms up
    return row


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the command -------------------------------------------------------------------------------------------------


def contenders(
    folders: Mapping[str, Path],  # bundles of the generations by name
    video: Path,
    audio: Path | None,
    source: Path | None,
    landmarker: Path | None,
    minutes: float,
    seed: int,
    done: Steps,
) -> list[Contender]:
    """The generations from their bundles and the baselines, trained where they are not yet.

    Args:
        done: keeps what is trained.

    Raises:
        RecordingError: a bundle was fitted to another recording or to other frames, or to all of them.
    """
    found: list[Contender] = []
    repository = ROOT / "model_repository"
    models.export(repository, models.models(), done.console)
    huma2: Subject | None = None
    avatars = {name: bundle.read(folder.parent, folder.name, AnyAvatar) for name, folder in folders.items()}
    split = {int(avatar.provenance["train_frames"]) for avatar in avatars.values()}
    if len(split) > 1:
        raise RecordingError(f"The avatars were fitted to different numbers of frames: {sorted(split)}.")
    for name, avatar in avatars.items():
        if avatar.profile != GENERATIONS[name][0]:
            raise RecordingError(f"{folders[name]} is of the profile {avatar.profile}, not {GENERATIONS[name][0]}.")
        recording = Recording.as_fitted(video, audio, avatar.width, avatar.provenance)
        if avatar.provenance.get("recording_sha256") != recording.sha256:
            raise RecordingError(f"{folders[name]} was fitted to another recording than {video}.")
        tracked = _tracked(recording, source, landmarker, done)
        if avatar.provenance["train_frames"] >= len(tracked):
            raise RecordingError(f"{folders[name]} was fitted to all frames of {video}: nothing is left to test with.")
        subject: Comparison
        if isinstance(avatar, Avatar):
            huma2 = Subject(avatar, recording, tracked, stage_b.hear(recording.audio, len(tracked)))
            subject = huma2 if source is not None else huma2.refined()  # as `quality` does
        else:
            subject = huma1_drive.subject(avatar, recording, tracked)
        found.append(Generation(name, folders[name], subject, repository))
    assert huma2 is not None
    scene = Scene.of(huma2.recording, huma2.track, huma2.heard, split.pop())
    plates_mb = sum(map(len, huma2.avatar.plates)) / 1e6
    for kind in BASELINES:
        baseline = fitted(kind, scene, seed, minutes, done)  # on one thread: two that share a core take longer
        drawn = Drawn(huma2.avatar, huma2.recording, huma2.track, baseline)
        weights = done.folder / baseline.file
        found.append(Other(drawn, weights, done.seconds[kind.name] / 60, plates_mb, repository))
    return found


def _plan(minutes: float) -> dict[str, float]:
    """Seconds that the steps take once there are bundles of the generations."""
    training = {kind.name: 60 * minutes for kind in BASELINES}
    names = [*GENERATIONS, *training]
    return training | {f"measure {name}": MEASURING_SECONDS for name in names}


def _tracked(recording: Recording, source: Path | None, model: Path | None, done: Steps) -> Track:
    with bars.shown(done.console, "track", recording.length) if source is None else nullcontext() as advance:
        return track.find(recording, source, model, advance or (lambda frames: None), done.folder / fit.DETECTIONS)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "compare", help="the generations and other families in one table", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("video", type=Path, help="a recording of one face speaking")
    track.add_arguments(parser)
    for name, (profile, _) in GENERATIONS.items():
        parser.add_argument(f"--{profile}", type=Path, metavar="avatars/ID", help=f"a {name} of it; else fitted")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument("--train-seconds", type=float, help="that are fitted to (default: as of `fit`)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training a baseline (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, metavar="JPEG", help="write some frames of all side by side")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    console = Console(highlight=False)
    try:
        model = track.landmarker_file(args.landmarker)
        folders = {}
        for name, (profile, settings) in GENERATIONS.items():
            folder: Path | None = getattr(args, profile)
            if folder is None:
                folder = fit.fit(
                    Recording(args.video, args.audio),
                    args.work / "avatars" / profile,
                    args.track,
                    args.landmarker,
                    args.work / profile,
                    replace(settings, train_seconds=args.train_seconds),
                    "",
                    None,
                    console,
                )
            folders[name] = folder
        done = Steps(args.work, _plan(args.minutes), console)
        found = contenders(folders, args.video, args.audio, args.track, model, args.minutes, args.seed, done)
        with Landmarker(model) as landmarker:
            rows = table(found, landmarker, args.picture, done, sources())
    except (
        BundleError,
        UnknownAvatarError,
        RecordingError,
        TrackError,
        ServerError,
        plates.PlatesError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    _report.report("compare", rows, args.json)
    return 0
