"""Frames and sound into files of every format, read back."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from talksplat_client import Disclosure, Frame, InvalidRequestError, MediaError, ServerError, file_writer
from talksplat_client._audio import Samples
from talksplat_client._files import WebmWriter

SIZE = 64
RATE = 16_000
QUIET, FLASH = (30, 160, 60), (255, 40, 20)
FILMS = ("mp4", "webm")
UNLABELLED = Disclosure("kim", label=False)

Pixels = npt.NDArray[np.uint8]


def picture(index: int, color: tuple[int, int, int] = QUIET, form: Any = "jpeg") -> Frame:
    pixels = np.full((SIZE, SIZE, 3), color, np.uint8)
    data = simplejpeg.encode_jpeg(pixels, 95, colorsubsampling="420") if form == "jpeg" else pixels.tobytes()
    return Frame(index, index / 25, 1.0, form, data)


def interrupting() -> Frame:
    """A frame at which somebody presses Ctrl-C."""

    class Interrupted(bytes):
        def __len__(self) -> int:
            raise KeyboardInterrupt

    return Frame(1, 0.04, 1.0, "raw", Interrupted())


def click() -> Samples:
    """Two seconds, with a click at second 1."""
    samples = np.zeros(2 * RATE, np.float32)
    samples[RATE : RATE + 400] = 0.9
    return samples


def write(path: Path | str, *, form: Any = "jpeg", disclosure: Disclosure = UNLABELLED, **options: Any) -> None:
    """Two seconds whose picture flashes as it clicks; sound comes first, by a little."""
    step = RATE // 25
    with file_writer(path, sample_rate=RATE, disclosure=disclosure, **options) as file:
        file.write_audio(click()[: 5 * step])
        for index in range(50):
            file.write(picture(index, FLASH if index == 25 else QUIET, form))
            file.write_audio(click()[(5 + index) * step : (6 + index) * step])


def require_film(source: Any) -> None:
    """Raise unless picture and sound are those of `write`, at their times."""
    with av.open(source) as container:
        shown = [(frame.time, frame.to_ndarray(format="rgb24")[32, 32]) for frame in container.decode(video=0)]
        frame_rate = container.streams.video[0].average_rate
    assert frame_rate == 25
    assert [time for time, _ in shown] == pytest.approx(np.arange(50) / 25, abs=0.001)
    np.testing.assert_allclose(shown[25][1], FLASH, atol=20)
    np.testing.assert_allclose(shown[24][1], QUIET, atol=20)
    if hasattr(source, "seek"):
        source.seek(0)
    with av.open(source) as container:
        resampler = av.AudioResampler("fltp", "mono")
        heard = [each for frame in container.decode(audio=0) for each in resampler.resample(frame)]
    begin = heard[0].time or 0.0
    sound = np.concatenate([each.to_ndarray()[0] for each in heard])
    rate = heard[0].sample_rate
    assert begin + np.argmax(np.abs(sound) > 0.3) / rate == pytest.approx(1, abs=0.004)
    assert begin + sound.size / rate == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("form", ["jpeg", "raw"])
@pytest.mark.parametrize("ending", FILMS)
def test_lips_and_sound_stay_together_in_every_film(tmp_path: Path, ending: str, form: str) -> None:
    path = tmp_path / f"out.{ending}"
    write(path, form=form)
    assert list(tmp_path.iterdir()) == [path]
    require_film(str(path))


def test_frames_and_sound_may_come_from_two_threads(tmp_path: Path) -> None:
    path, step, seconds = tmp_path / "out.mp4", RATE // 100, 8
    with file_writer(path, sample_rate=RATE, disclosure=UNLABELLED) as file:

        def sound() -> None:
            for _ in range(100 * seconds):
                file.write_audio(np.zeros(step, np.float32))

        speaker = threading.Thread(target=sound)
        speaker.start()
        for index in range(25 * seconds):
            file.write(picture(index))
        speaker.join()
    with av.open(str(path)) as film:
        counts = {stream.type: sum(1 for _ in film.decode(stream)) for stream in film.streams.video}
        assert counts == {"video": 25 * seconds}


@pytest.mark.parametrize("ending", FILMS)
def test_a_film_says_which_colours_it_has(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out.{ending}"
    write(path)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        next(container.decode(video=0))
        assert (context.colorspace, context.color_range, context.pix_fmt) == (5, 1, "yuv420p")
        codecs = {stream.codec_context.name for stream in container.streams}
    assert codecs == {"mp4": {"h264", "aac"}, "webm": {"libvpx-vp9", "libopus"}}[ending] or codecs == {"vp9", "opus"}


@pytest.mark.parametrize("ending", FILMS)
def test_a_film_goes_into_a_pipe(tmp_path: Path, ending: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, format=ending)
    reader.join(10)
    require_film(io.BytesIO(read[0]))
    assert list(tmp_path.iterdir()) == [pipe]


def test_an_animated_webp_repeats_and_has_each_picture_at_its_time(tmp_path: Path) -> None:
    path = tmp_path / "out.webp"
    write(path)
    with WebPImageFile(path) as image:
        assert image.n_frames == 50
        seconds, colors = 0.0, {}
        for index in range(image.n_frames):
            image.seek(index)
            pixels = np.asarray(image.convert("RGB"))
            colors[round(seconds, 3)] = pixels[32, 32]
            seconds += image.info["duration"] / 1000
        assert image.info["loop"] == 0
    assert seconds == pytest.approx(2)
    np.testing.assert_allclose(colors[1.0], FLASH, atol=20)
    np.testing.assert_allclose(colors[0.0], QUIET, atol=20)


@pytest.mark.parametrize("form", ["jpeg", "raw"])
@pytest.mark.parametrize(("ending", "far"), [("png", 4), ("jpg", 8)])
def test_each_frame_becomes_a_picture(tmp_path: Path, ending: str, far: int, form: str) -> None:
    write(tmp_path / "frames" / f"%03d.{ending}", form=form)
    names = sorted(each.name for each in (tmp_path / "frames").iterdir())
    assert names == [f"{index:03}.{ending}" for index in range(50)]
    assert [each.name for each in tmp_path.iterdir()] == ["frames"]
    for index, color in ((24, QUIET), (25, FLASH)):
        with Image.open(tmp_path / "frames" / names[index]) as image:
            np.testing.assert_allclose(np.asarray(image.convert("RGB"))[32, 32], color, atol=far)


def test_a_folder_gets_pngs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", f"{tmp_path}/new/"):
        write(folder)
        assert sorted(os.listdir(folder))[::49] == ["00000.png", "00049.png"]


@pytest.mark.parametrize(("form", "codec"), [("png", "png"), ("jpeg", "mjpeg")])
def test_pictures_go_into_standard_output(form: str, codec: str) -> None:
    script = f"import test_client_files as t; t.write('-', format={form!r})"
    out = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True)
    with av.open(io.BytesIO(out.stdout), "r", format=f"{form}_pipe") as container:
        assert container.streams.video[0].codec_context.name == codec
        colors = [frame.to_ndarray(format="rgb24")[32, 32] for frame in container.decode(video=0)]
    assert len(colors) == 50
    np.testing.assert_allclose(colors[25], FLASH, atol=8)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.webp", "frames/%d.png", "frames/%d.jpg"])
def test_a_failure_leaves_what_there_was(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.parent == tmp_path:
        path.write_bytes(b"the old one")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def begin(*frames: Frame) -> None:
        with file_writer(path, sample_rate=RATE) as file:
            file.write_audio(np.zeros(100, np.float32))
            for frame in frames:
                file.write(frame)

    with pytest.raises(ServerError, match="frame 1"):
        begin(picture(0), Frame(1, 0.04, 1.0, "jpeg", b"no picture"))
    with pytest.raises(MediaError, match="no frames"):
        begin()
    with pytest.raises(KeyboardInterrupt):
        begin(picture(0), interrupting())
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("out.avi", {}, r"out\.avi does not say its format: expected one of the endings \.mp4 \.webm"),
        ("out", {}, "does not say its format"),
        ("out.srt", {}, "subtitles need somebody who hears"),
        ("out.png", {}, "no place for the frame's number"),
        ("%d%d.png", {}, "no place for the frame's number"),
        ("%s-%d.png", {}, "no place for the frame's number"),
        ("full/%d.png", {}, "is not empty"),
        ("full/", {}, "is not empty"),
        ("full", {"format": "mp4"}, "is not empty"),  # a folder stays one
        ("pipe", {"format": "webp"}, "can't be written into one"),
        ("none/out.mp4", {}, r"out\.mp4 can't be written: No such"),
        ("none/below/%d.png", {}, "can't be written: No such"),
        ("full/notes.txt/out.webm", {}, "can't be written: Not a directory"),
    ],
)
def test_what_can_not_be_written_is_said_before_the_first_frame(
    tmp_path: Path, name: str, options: dict[str, Any], reason: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    place = f"{tmp_path}/{name}"
    with pytest.raises(MediaError, match=reason), file_writer(place, sample_rate=RATE, **options):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["full", "pipe"]


@pytest.mark.parametrize("ending", ["mp4", "webm", "png", "webp"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, ending: str) -> None:
    """In a process of its own, whose files may not be larger than 20 KB: the kernel refuses what is beyond."""
    place = tmp_path / ("frames/%d.png" if ending == "png" else f"out.{ending}")
    script = f"""
import resource, signal, sys, numpy as np, simplejpeg
from talksplat_client import Frame, MediaError, file_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
rng = np.random.default_rng(0)
try:
    with file_writer({str(place)!r}, sample_rate=16000) as f:
        for i in range(12):
            f.write(Frame(i, i / 25, 1.0, "raw", rng.integers(0, 255, (256, 256, 3), dtype=np.uint8).tobytes()))
except MediaError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"can't be written: {os.strerror(errno.EFBIG)}" in out.stdout
    assert not any(tmp_path.iterdir())


def test_a_film_whose_encoder_is_missing_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(WebmWriter, "audio", ("libnone", 48_000, 64_000))
    with pytest.raises(MediaError, match="no encoder libnone"):
        write(tmp_path / "out.webm")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_disk_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        write(f"/proc/self/fd/{writing}", format="jpeg")
    os.close(writing)


def test_frames_that_are_not_signed_formats_are_refused_before_work(tmp_path: Path) -> None:
    from talksplat_client import Credentials

    signed = Disclosure("kim", credentials=Credentials("c.pem", "k.pem"))
    with pytest.raises(InvalidRequestError, match="webm files take no content credentials"):
        file_writer(tmp_path / "out.webm", sample_rate=RATE, disclosure=signed)
    with pytest.raises(MediaError, match="signing needs a whole file"):
        file_writer("-", format="mp4", sample_rate=RATE, disclosure=signed)
