"""What a fit leaves to look at: ``report.md`` with figures and pictures of the frames that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from matplotlib.figure import Figure

from talksplat import clock
from talksplat.bench import _report
from talksplat_export import quality
from talksplat_export.quality import DRIVERS, Subject
from talksplat_export.recording import Image
from talksplat_export.track import Landmarker

PLOT_SECONDS = 12  # of lip opening shown


def write(
    folder: Path,
    subject: Subject,
    losses: Sequence[float],
    landmarker: Landmarker | None,
    advance: Callable[[int], object] = lambda done: None,
) -> Path:
    """Write the report and its pictures into ``folder``; returns the report's path.

    Args:
        losses: of stage A's steps.
        landmarker: measures landmarks on pixels, see `quality`.
        advance: called with how many of the test frames are done, once for each driver.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frames = len(subject.test)
    rows = [quality.measure(subject, driven_by, landmarker, advance) for driven_by in DRIVERS]
    _side_by_side(folder / "frames.jpg", subject)
    _loss_curve(folder / "loss.png", losses)
    _lip_curve(folder / "lips.png", subject)
    columns = list(rows[0])
    lines = [
        f"# The fit of {subject.avatar.id}",
        "",
        f"Fitted to the first {subject.test.start} frames of {subject.recording.path.name}, measured on the other "
        f"{frames}; `talksplat-export quality --help` says how.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows),
        "",
        "Recorded, driven by coefficients, driven by audio:",
        "",
        "![frames](frames.jpg)",
        "",
        "![lip opening](lips.png)",
        "",
        "![loss](loss.png)",
        "",
        f"- machine: {_report.machine()}",
        f"- commit: {_report.commit()}",
        f"- {', '.join(f'{name} {version}' for name, version in subject.avatar.provenance['versions'].items())}",
        f"- settings: {subject.avatar.provenance['settings']}",
        f"- {subject.avatar.gaussians} Gaussians, {len(subject.avatar.plates)} plates, track: {subject.track.source}",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _side_by_side(path: Path, subject: Subject) -> None:
    """The widest open, a closed, a half-open and a blinking frame of the test split."""
    test, track = subject.test, subject.track
    opening, blink = (values[test.start : test.stop] for values in (track.lip_opening, track.blink))
    order = np.argsort(opening)
    picked = {int(i) for i in (order[-1], order[len(order) // 2], order[0], np.argmax(blink))}
    face = subject.box((*track.layout.brows, *track.layout.jaw, *track.layout.mouth), margin=16)
    weights = [subject.weights(driver) for driver in DRIVERS]
    rows: list[Image] = []
    for index, recorded in enumerate(subject.recording.frames(test.start, test.stop)):
        if index in picked:
            images = [recorded, *(subject.draw(recorded, test.start + index, w[test.start + index]) for w in weights)]
            rows.append(np.concatenate([image[face] for image in images], 1))
    path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(np.concatenate(rows)), 92, "RGB", "444"))


def _loss_curve(path: Path, losses: Sequence[float]) -> None:
    figure = Figure((8, 3), layout="constrained")
    axes = figure.subplots()
    window = max(len(losses) // 200, 1)
    smooth = np.convolve(losses, np.ones(window) / window, "valid") if losses else np.zeros(1)
    axes.semilogy(np.arange(len(smooth)) + window, smooth)
    axes.set_xlabel("step of stage A")
    axes.set_ylabel("loss")
    figure.savefig(path, dpi=100)


def _lip_curve(path: Path, subject: Subject) -> None:
    """Lip opening over time, recorded and driven by audio, with the voice activity."""
    test = subject.test
    shown = min(len(test), PLOT_SECONDS * clock.FPS)
    recorded, driven = (quality.lip_openings(subject, driver)[:shown] for driver in DRIVERS)
    times = (test.start + np.arange(shown)) / clock.FPS
    figure = Figure((10, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(times, recorded, label="recorded")
    axes.plot(times, driven, label="driven by audio")
    speech = subject.heard.speech[test.start : test.start + shown]
    axes.fill_between(times, 0, speech * float(recorded.max()), alpha=0.12, label="voice activity")
    axes.set_xlabel("seconds")
    axes.set_ylabel("lip opening, pixels")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=100)
