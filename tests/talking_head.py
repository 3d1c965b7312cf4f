"""A drawn face that talks for a few seconds: a recording with exact ground truth, made by the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, ImageDraw

from talksplat import clock
from talksplat_export import geometry
from talksplat_export.track import (
    SUBJECT_DISTANCE,
    SUBJECT_FOV_DEG,
    SUBJECT_HEIGHT,
    SUBJECT_PIVOT,
    Track,
    rotation_zyx,
)

Float32 = npt.NDArray[np.float32]
SIZE = 96  # pixels a side


def landmarks_3d() -> npt.NDArray[np.float64]:
    """68 points in centimetres, +y up, +z towards the camera, of a face at rest."""
    angles = np.linspace(np.pi, 2 * np.pi, 17)
    jaw = [(7 * np.cos(a), 1 + 8 * np.sin(a)) for a in angles]
    brows = [(side * x, 5.5) for side, xs in ((-1, (5, 4, 3, 2, 1)), (1, (1, 2, 3, 4, 5))) for x in xs]
    nose = [(0, y) for y in (3, 2, 1, 0)] + [(x, -0.8) for x in (-1.2, -0.6, 0, 0.6, 1.2)]
    eye = [(-1, 0), (-0.5, 0.5), (0.5, 0.5), (1, 0), (0.5, -0.4), (-0.5, -0.4)]
    eyes = [(centre + x, 3.5 + y) for centre in (-3, 3) for x, y in eye]
    outer = [(-2, 0), (-1.2, 0.5), (-0.5, 0.7), (0, 0.6), (0.5, 0.7), (1.2, 0.5), (2, 0)]
    outer += [(1.2, -0.6), (0.5, -0.8), (0, -0.8), (-0.5, -0.8), (-1.2, -0.6)]
    inner = [(-1.7, 0), (-0.6, 0.05), (0, 0.05), (0.6, 0.05), (1.7, 0), (0.6, -0.05), (0, -0.05), (-0.6, -0.05)]
    mouth = [(x, -3 + y) for x, y in outer + inner]
    flat = np.array(jaw + brows + nose + eyes + mouth, np.float64)
    depth = 9 - 0.06 * (flat**2).sum(1)
    depth[27:31] += 1.5
    return np.concatenate([flat, depth[:, None]], 1)


LOWER_LIP = [55, 56, 57, 58, 59, 65, 66, 67]
CHIN = [5, 6, 7, 8, 9, 10, 11]


def make(folder: Path, speech: Float32, frames: int, size: int = SIZE) -> dict[str, Path]:
    """Write ``head.mp4``, ``head.wav`` and ``head.npz``; returns their paths as video, audio and track.

    The mouth opens and shuts 2.5 times a second between two pauses, whatever the ``speech`` [samples] says.
    """
    seconds = frames / clock.FPS
    time = np.arange(frames) / clock.FPS
    talking = (time > 0.6) & (time < seconds - 0.4)
    jaw = np.where(talking, 0.5 - 0.5 * np.cos(2 * np.pi * 2.5 * (time - 0.6)), 0)
    blink = ((np.arange(frames) % 40) // 3 == 6).astype(np.float64)
    pose = np.stack([3 * np.sin(1.1 * time), 6 * np.sin(1.7 * time), 2 * np.sin(0.9 * time)], 1)
    rest = landmarks_3d()
    moved = np.tile(rest, (frames, 1, 1))
    moved[:, LOWER_LIP, 1] -= 1.8 * jaw[:, None]
    moved[:, CHIN, 1] -= 1.5 * jaw[:, None]
    pivot = np.array(SUBJECT_PIVOT)
    turned = np.einsum("tij,tlj->tli", rotation_zyx(np.radians(pose)), moved - pivot) + pivot
    focal = size / (2 * np.tan(np.radians(SUBJECT_FOV_DEG / 2)))
    depth = SUBJECT_DISTANCE - turned[..., 2]
    u = size / 2 + focal * turned[..., 0] / depth
    v = size / 2 - focal * (turned[..., 1] - SUBJECT_HEIGHT) / depth
    points = np.stack([u, v], -1)

    paths = {name: folder / f"head.{suffix}" for name, suffix in (("video", "mp4"), ("audio", "wav"), ("track", "npz"))}
    write_video(paths["video"], [_draw(points[i], blink[i], size) for i in range(frames)])
    soundfile.write(paths["audio"], speech[: frames * clock.SAMPLES_PER_FRAME], clock.SAMPLE_RATE)
    np.savez(
        paths["track"],
        blendshapes=np.stack([jaw, 0.3 * jaw**2], 1).astype(np.float32),
        eye_blink=blink.astype(np.float32),
        head_pose_deg=pose.astype(np.float32),
        landmarks68_px=points.astype(np.float32),
    )
    return paths


def make_track(frames: int = 120, seed: int = 0) -> tuple[Track, Float32]:
    """A track of the tests' head with noiseless landmarks, and its points [1 + 1, 68, 3] in metres."""
    rng = np.random.default_rng(seed)
    rest = landmarks_3d() / 100
    drop = np.zeros_like(rest)
    drop[LOWER_LIP, 1] = -0.018
    drop[CHIN, 1] = -0.015
    jaw = rng.uniform(0, 1, frames)
    viewmats = np.tile(np.eye(4), (frames, 1, 1))
    camera = np.diag([1.0, -1.0, -1.0])
    viewmats[:, :3, :3] = camera @ rotation_zyx(rng.uniform(-0.15, 0.15, (frames, 3)))
    viewmats[:, :3, 3] = [0, 0, 1]
    intrinsics = np.array([[300, 0, SIZE / 2], [0, 300, SIZE / 2], [0, 0, 1]], np.float32)
    points = rest + jaw[:, None, None] * drop
    pixels = np.stack([geometry.project(p, v, intrinsics)[:, :2] for p, v in zip(points, viewmats, strict=True)])
    track = Track(
        expression=jaw[:, None].astype(np.float32),
        blink=np.zeros(frames, np.float32),
        viewmats=viewmats.astype(np.float32),
        K=intrinsics,
        landmarks=pixels.astype(np.float32),
        seen=np.ones(frames, bool),
        source="test",
    )
    return track, np.stack([rest, drop]).astype(np.float32)


def _draw(points: npt.NDArray[np.float64], blink: float, size: int) -> npt.NDArray[np.uint8]:
    scale = 3  # drawn larger, for smooth edges
    image = Image.new("RGB", (size * scale, size * scale), (90, 110, 130))
    draw = ImageDraw.Draw(image)

    def polygon(indices: list[int], colour: tuple[int, int, int]) -> None:
        draw.polygon([tuple(points[i] * scale) for i in indices], fill=colour)

    chin = points[8] * scale
    draw.rectangle([chin[0] - 60, chin[1] - 40, chin[0] + 60, size * scale], fill=(190, 140, 120))
    top = [tuple(points[i] * scale - [0, 40]) for i in (26, 17)]
    draw.polygon([*(tuple(points[i] * scale) for i in range(17)), *top], fill=(220, 170, 150))
    for eye in (list(range(36, 42)), list(range(42, 48))):
        polygon(eye, (200, 150, 130) if blink > 0.5 else (240, 240, 240))
    polygon(list(range(48, 60)), (180, 70, 80))
    polygon(list(range(60, 68)), (60, 10, 20))
    for start in (17, 22):
        draw.line([tuple(points[i] * scale) for i in range(start, start + 5)], fill=(60, 40, 30), width=4)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def write_video(
    path: Path,
    frames: Sequence[npt.NDArray[np.uint8]],
    fps: int = clock.FPS,
    *,
    times: Sequence[float] | None = None,  # seconds of each frame; default: ``fps``
    audio: Float32 | None = None,  # [samples] at 16 kHz
    audio_begins: float = 0.0,  # seconds
    rotation: int = 0,  # degrees by which a player turns the picture counterclockwise
    codecs: tuple[str, str] = ("libx264", "aac"),
    options: Mapping[str, str] = MappingProxyType({"crf": "12"}),
    container_options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A video of good quality; without audio unless there is some."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", container_options=dict(container_options)) as container:
        stream: Any = container.add_stream(codecs[0], rate=fps, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90_000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound: Any = None if audio is None else container.add_stream(codecs[1], rate=48_000, layout="mono")
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None and audio is not None:
            samples = av.AudioFrame.from_ndarray(audio[None], format="flt", layout="mono")
            samples.sample_rate, samples.time_base = clock.SAMPLE_RATE, Fraction(1, clock.SAMPLE_RATE)
            samples.pts = round(audio_begins * clock.SAMPLE_RATE)
            resampler = av.AudioResampler(sound.codec_context.format, "mono", 48_000)
            for piece in (*resampler.resample(samples), *resampler.resample(None)):
                container.mux(sound.encode(piece))
            container.mux(sound.encode(None))
