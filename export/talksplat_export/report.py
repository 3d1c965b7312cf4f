"""What a fit leaves to look at: ``report.html``, one file with findings, figures, plots, frames and a video with sound.

Everything in it is of the frames that the avatar was not fitted to; `quality` measures them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import jinja2
import matplotlib
import numpy as np
import simplejpeg
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from talksplat import clock
from talksplat.bench import _report
from talksplat_export import quality, steps
from talksplat_export.checks import Finding
from talksplat_export.geometry import Float32
from talksplat_export.quality import DRIVERS, Subject
from talksplat_export.recording import Image
from talksplat_export.track import Landmarker

NAME = "report.html"
CLIP_SECONDS = 15.0  # of video
CLIP_SIZE = 320  # pixels a side of each of its three pictures
CURVE_SECONDS = 15.0  # of lip opening shown
FACE_MARGIN = 24  # pixels around the face in the pictures
WORST = 2  # frames shown for having the lowest PSNR

FIGURES = {  # of a row of `quality`: words, unit, how many decimals
    "face_psnr_db": ("Face, PSNR", "dB", 1),
    "mouth_psnr_db": ("Mouth, PSNR", "dB", 1),
    "full_psnr_db": ("Whole frame, PSNR", "dB", 1),
    "ssim": ("Face, SSIM", "", 3),
    "landmark_px": ("Mouth landmarks, mean distance", "px", 2),
    "truth_px": ("Mouth landmarks, distance from the truth", "px", 2),
    "lip_r": ("Lip opening, correlation", "", 3),
    "lip_lag_frames": ("Lip opening, lag", "frames", 0),
    "silence_std_pct": ("Lips in silence, standard deviation", "% of range", 1),
}
DRIVEN_BY = {"coefficients": "the recorded motion", "audio": "audio alone"}
COLOURS = {"light": ("#1c1f23", "#d3d7db", "#2a6fdb", "#d9622b"), "dark": ("#e4e7ea", "#444a50", "#75a9ff", "#f09a6a")}


@dataclass
class _Watched:
    """What is kept of the frames while they are measured."""

    subject: Subject
    clip: range  # test frames of the video
    psnr: dict[str, list[float]] = field(default_factory=dict)  # of the face, by driver
    frames: dict[str, list[Image]] = field(default_factory=dict)  # of the video: "recorded" and by driver

    def __post_init__(self) -> None:
        self._face = self.subject.box(self.subject.track.layout.face)

    def see(self, driven_by: str, index: int, recorded: Image, drawn: Image) -> None:
        """Note one test frame, in order."""
        self.psnr.setdefault(driven_by, []).append(quality.psnr(recorded[self._face], drawn[self._face]))
        if index in self.clip:
            if driven_by == DRIVERS[0]:
                self.frames.setdefault("recorded", []).append(_scaled(recorded, CLIP_SIZE))
            self.frames.setdefault(driven_by, []).append(_scaled(drawn, CLIP_SIZE))


def write(
    done: steps.Steps,
    subject: Subject,
    findings: Sequence[Finding],
    losses: Sequence[float],
    landmarker: Landmarker | None,
    advance: Callable[[int], object] = lambda done: None,
) -> Path:
    """Write the report into the folder of ``done``; returns its path.

    Args:
        findings: of `checks`.
        losses: of stage A's steps.
        landmarker: measures landmarks on pixels, see `quality`.
        advance: called with how many of the test frames are done, counting once for each driver.
    """
    watched = _Watched(subject, _clip(subject))
    frames = len(subject.test)
    rows = [
        quality.measure(
            subject,
            driver,
            landmarker,
            partial(_count, advance, number * frames),
            partial(watched.see, driver),
        )
        for number, driver in enumerate(DRIVERS)
    ]
    lips = [quality.lip_openings(subject, driver) for driver in DRIVERS]
    page = _TEMPLATE.render(
        subject=subject,
        fitted_seconds=subject.test.start / clock.FPS,
        seconds=len(subject.test) / clock.FPS,
        findings=findings,
        drivers=[DRIVEN_BY[driver] for driver in DRIVERS],
        figures=[
            (words, unit, [_figure(row[name], decimals) for row in rows])
            for name, (words, unit, decimals) in FIGURES.items()
            if rows[0].get(name) is not None
        ],
        measured_by=rows[0]["measured_by"],
        video=_data("video/mp4", _video(watched)),
        poster=_data("image/jpeg", _jpeg(_joined(watched)[0])),
        pictures=[(title, _data("image/jpeg", jpeg)) for title, jpeg in _pictures(subject, watched)],
        plots=[
            (title, {theme: _data("image/svg+xml", _plot(draw, theme)) for theme in COLOURS})
            for title, draw in (
                ("Lip opening against sound", lambda axes, colours: _lip_curve(axes, colours, subject, lips)),
                ("PSNR of the face over time", lambda axes, colours: _psnr_curve(axes, colours, subject, watched.psnr)),
                ("Loss of stage A", lambda axes, colours: _loss_curve(axes, colours, losses)),
            )
        ],
        machine=_report.machine(),
        done=done,
        provenance=subject.avatar.provenance,
        bundle_megabytes=sum(map(len, subject.avatar.plates)) / 1e6
        + (subject.avatar.canonical.nbytes + subject.avatar.bases.nbytes) / 1e6,
    )
    path = done.folder / NAME
    steps.write(path, page.encode())
    return path


def _count(advance: Callable[[int], object], before: int, frames: int) -> None:
    advance(before + frames)


def _clip(subject: Subject) -> range:
    """The test frames with the most speech."""
    test = subject.test
    length = min(round(CLIP_SECONDS * clock.FPS), len(test))
    speech = np.cumsum(np.concatenate([[0], subject.heard.speech[test.start : test.stop]]))
    first = test.start + int(np.argmax(speech[length:] - speech[:-length]))
    return range(first, first + length)


def _figure(value: str | int | float | None, decimals: int) -> str:
    return f"{value:.{decimals}f}" if isinstance(value, int | float) else "-"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- video and pictures ------------------------------------------------------------------------------------------


def _scaled(image: Image, size: int) -> Image:
    if len(image) <= size:
        return image
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return np.asarray(frame.reformat(size, size, interpolation="AREA").to_ndarray(), np.uint8)


def _video(watched: _Watched) -> bytes:
    """H.264 and AAC: recorded, driven by coefficients, driven by audio."""
    clip, file = watched.clip, io.BytesIO()
    samples = slice(clip.start * clock.SAMPLES_PER_FRAME, clip.stop * clock.SAMPLES_PER_FRAME)
    sound = watched.subject.recording.audio[samples]
    with av.open(file, "w", format="mp4") as container:
        pictures = container.add_stream("libx264", rate=clock.FPS, options={"crf": "24", "preset": "medium"})
        heard = container.add_stream("aac", rate=48_000, layout="mono")
        assert isinstance(pictures, av.VideoStream)
        assert isinstance(heard, av.AudioStream)
        pictures.height = len(watched.frames["recorded"][0])
        pictures.width, pictures.pix_fmt = 3 * pictures.height, "yuv420p"
        for joined in _joined(watched):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(joined, format="rgb24")))
        container.mux(pictures.encode(None))
        if len(sound):
            spoken = av.AudioFrame.from_ndarray(sound[None], format="flt", layout="mono")
            spoken.sample_rate, spoken.pts = clock.SAMPLE_RATE, 0
            resampler = av.AudioResampler("fltp", "mono", 48_000)
            for piece in (*resampler.resample(spoken), *resampler.resample(None)):
                container.mux(heard.encode(piece))
            container.mux(heard.encode(None))
    return file.getvalue()


def _joined(watched: _Watched) -> list[Image]:
    """The video's frames: the three pictures side by side."""
    kinds = (watched.frames[name] for name in ("recorded", *DRIVERS))
    return [np.ascontiguousarray(np.concatenate(pictures, 1)) for pictures in zip(*kinds, strict=True)]


def _jpeg(image: Image) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), 88, "RGB", "444"))


def _pictures(subject: Subject, watched: _Watched) -> Iterator[tuple[str, bytes]]:
    """Titles and JPEGs of test frames: recorded, driven by coefficients, driven by audio."""
    test, track = subject.test, subject.track
    opening, blink = (values[test.start : test.stop] for values in (track.lip_opening, track.blink))
    awake = np.flatnonzero(blink <= max(0.1, float(blink.min())))
    order = awake[np.argsort(opening[awake])]
    picked = [
        ("Wide open", int(order[-1])),
        ("Half open", int(order[len(order) // 2])),
        ("Closed", int(order[0])),
        ("Blink", int(np.argmax(blink))),
    ]
    worst = np.argsort(watched.psnr["audio"])
    apart: list[int] = []  # a second or more, so that they are different moments
    for index in map(int, worst):
        if len(apart) < WORST and all(abs(index - other) >= clock.FPS for other in apart):
            apart.append(index)
    picked += [(f"Worst frame, driven by audio: {watched.psnr['audio'][i]:.1f} dB", i) for i in apart]
    face = subject.box(track.layout.face, margin=FACE_MARGIN)
    drawers = [subject.drawer(driver) for driver in DRIVERS]
    for title, offset in picked:
        index = test.start + offset
        recorded = next(subject.recording.frames(index, index + 1))
        images = [recorded, *(draw(recorded, index) for draw in drawers)]
        yield f"{title} ({index / clock.FPS:.1f} s)", _jpeg(np.concatenate([image[face] for image in images], 1))


# --- plots -------------------------------------------------------------------------------------------------------

Draw = Callable[[Axes, tuple[str, str]], None]  # onto axes, in the colours of the two drivers


def _plot(draw: Draw, theme: str) -> bytes:
    """As SVG, on nothing."""
    text, grid, *drivers = COLOURS[theme]
    style: Any = {
        "text.color": text,
        "axes.labelcolor": text,
        "axes.edgecolor": grid,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.alpha": 0.5,
        "xtick.color": text,
        "ytick.color": text,
        "legend.frameon": False,
        "lines.linewidth": 1.3,
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure((9, 2.8), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes, (drivers[0], drivers[1]))
        file = io.BytesIO()
        figure.savefig(file, format="svg")
    return file.getvalue()


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)


def _loss_curve(axes: Axes, colours: tuple[str, str], losses: Sequence[float]) -> None:
    window = max(len(losses) // 200, 1)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")[:: max(len(losses) // 1000, 1)]
    axes.semilogy(np.linspace(window, len(losses), len(smooth)), smooth, color=colours[0])
    axes.set_xlabel("step")


def _psnr_curve(axes: Axes, colours: tuple[str, str], subject: Subject, psnr: dict[str, list[float]]) -> None:
    times = np.array(subject.test) / clock.FPS
    for colour, (driver, values) in zip(colours, psnr.items(), strict=True):
        axes.plot(times, values, color=colour, label=f"driven by {DRIVEN_BY[driver]}")
    axes.set_xlabel("seconds")
    axes.set_ylabel("dB")
    _legend(axes)


def _lip_curve(axes: Axes, colours: tuple[str, str], subject: Subject, lips: Sequence[Float32]) -> None:
    """Recorded and driven by audio, over the sound's level."""
    test = subject.test
    shown = min(len(test), round(CURVE_SECONDS * clock.FPS))
    times = (test.start + np.arange(shown)) / clock.FPS
    sound = subject.recording.audio[test.start * clock.SAMPLES_PER_FRAME :][: shown * clock.SAMPLES_PER_FRAME]
    sound = np.pad(sound, (0, shown * clock.SAMPLES_PER_FRAME - len(sound)))
    level = np.sqrt(np.mean(sound.reshape(shown, -1) ** 2, 1))
    top = float(max(np.max(opening) for opening in lips))
    axes.fill_between(
        times, 0, level / max(float(level.max()), 1e-9) * top, color="#8a9199", alpha=0.3, lw=0, label="sound"
    )
    for colour, opening, label in zip(colours, lips, ("recorded", "driven by audio"), strict=True):
        axes.plot(times, opening[:shown], color=colour, label=label)
    axes.set_xlabel("seconds")
    axes.set_ylabel("lips apart, pixels")
    _legend(axes)


_TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("report.html.j2")
