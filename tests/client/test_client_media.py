"""The extra `media`: sound in, MP4 out."""

from __future__ import annotations

import io
import sys
import types
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import simplejpeg

from talksplat_client import Frame, MediaError, MissingExtraError, Mp4Writer, ServerError, microphone, read_audio
from talksplat_client._audio import Samples

SIZE = 64
QUIET, FLASH = (30, 160, 60), (255, 40, 20)


def picture(index: int, color: tuple[int, int, int] = QUIET, form: Any = "jpeg") -> Frame:
    pixels = np.full((SIZE, SIZE, 3), color, np.uint8)
    data = simplejpeg.encode_jpeg(pixels, 95) if form == "jpeg" else pixels.tobytes()
    return Frame(index, index / 25, 1.0, form, data)


def tone(rate: int, seconds: float, channels: int = 1) -> Samples:
    wave_form = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)
    return np.repeat(wave_form[:, None], channels, axis=1).astype(np.float32)


def wav(rate: int, samples: Samples) -> io.BytesIO:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    out.seek(0)
    return out


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_a_frame_shows_its_pixels(form: str) -> None:
    pixels = picture(0, FLASH, form).to_array()
    assert pixels.shape == (SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[10, 10], FLASH, atol=4)


@pytest.mark.parametrize("frame", [Frame(0, 0, 0, "raw", b"abcd"), Frame(0, 0, 0, "jpeg", b"no picture")])
def test_a_frame_that_is_no_picture_says_so(frame: Frame) -> None:
    with pytest.raises(ServerError, match="frame 0"):
        frame.to_array()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_a_wav_is_read_as_it_is(rate: int, channels: int) -> None:
    samples = tone(rate, 0.5, channels)
    recording = read_audio(wav(rate, samples))
    heard = np.concatenate(list(recording.packets))
    assert (recording.sample_rate, recording.seconds) == (rate, 0.5)
    np.testing.assert_allclose(heard, samples[:, 0], atol=1e-3)


def test_what_can_t_be_read_is_said_with_its_name(tmp_path: Path) -> None:
    text = tmp_path / "notes.wav"
    text.write_text("no sound at all")
    silent = tmp_path / "silent.mp4"
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = SIZE
        container.mux(stream.encode(av.VideoFrame(SIZE, SIZE, "yuv420p")))
        container.mux(stream.encode(None))
    for path, reason in ((tmp_path / "none.wav", "No such file"), (text, "notes.wav"), (silent, "has no sound")):
        with pytest.raises(MediaError, match=reason):
            read_audio(path)


@pytest.mark.parametrize("form", ["jpeg", "raw"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_lips_and_sound_stay_together_in_an_mp4(tmp_path: Path, rate: int, form: str) -> None:
    path = tmp_path / "out.mp4"
    click = np.zeros(rate * 2, np.float32)
    click[rate : rate + 400] = 0.9  # at second 1, as the picture flashes
    step = rate // 25
    with Mp4Writer(path, sample_rate=rate) as file:
        file.write_audio(click[: 5 * step])  # sound comes first, by a little
        for index in range(50):
            file.write(picture(index, FLASH if index == 25 else QUIET, form))
            file.write_audio(click[(5 + index) * step : (6 + index) * step])
    assert [each.name for each in tmp_path.iterdir()] == ["out.mp4"]
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")  # plays before it is loaded
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec.name, video.pix_fmt, video.frames) == ("h264", "yuv420p", 50)
        assert video.average_rate == 25
        assert audio.codec.name == "aac"
        for stream in (video, audio):
            assert stream.time_base is not None
            assert stream.duration is not None
            assert float(stream.duration * stream.time_base) == pytest.approx(2, abs=0.03)
        shown = [(frame.time, frame.to_ndarray(format="rgb24")[32, 32]) for frame in container.decode(video=0)]
    assert [time for time, _ in shown] == pytest.approx(np.arange(50) / 25)
    np.testing.assert_allclose(shown[25][1], FLASH, atol=16)
    np.testing.assert_allclose(shown[24][1], QUIET, atol=16)
    recording = read_audio(path)
    heard = np.concatenate(list(recording.packets))
    assert np.argmax(np.abs(heard) > 0.3) / recording.sample_rate == pytest.approx(1, abs=0.002)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the old one")

    def write(*frames: Frame) -> None:
        with Mp4Writer(path, sample_rate=16_000) as file:
            file.write_audio(np.zeros(100, np.float32))
            for frame in frames:
                file.write(frame)

    with pytest.raises(ServerError, match="frame 1"):
        write(picture(0), Frame(1, 0.04, 1.0, "jpeg", b"no picture"))
    with pytest.raises(MediaError, match="no frames"):
        write()
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"out.mp4": b"the old one"}


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(MediaError, match=r"out\.mp4 can't be written: No such"),
        Mp4Writer(tmp_path / "none" / "out.mp4", sample_rate=16_000),
    ):
        pass


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("av", lambda: read_audio("x.wav")),
        ("av", lambda: Mp4Writer("x.mp4", sample_rate=16_000)),
        ("av", lambda: picture(0).to_array()),
        ("sounddevice", lambda: next(microphone())),
    ],
)
def test_without_the_extra_it_is_said_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, package: str, use: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}: pip install 'talksplat-client\[media\]'"):
        use()


class ScriptedSoundCard(types.ModuleType):
    """Stands in for the module sounddevice: there is no sound card where tests run."""

    class PortAudioError(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__("sounddevice")
        self.broken = broken
        self.closed = False

    def InputStream(self, rate: int, block: int, *, channels: int, dtype: str, callback: Any) -> Any:  # noqa: N802
        if self.broken:
            raise self.PortAudioError("Error querying device -1")
        self.asked = (rate, block, channels, dtype)
        buffer = np.zeros((block, channels), np.float32)
        for value in (0.1, 0.2):  # a sound card reuses its buffer
            buffer[:] = value
            callback(buffer, block, None, None)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.closed = True


def test_a_microphone_gives_packets_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = ScriptedSoundCard()
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    packets: Any = microphone(48_000, 0.02)
    for value in (0.1, 0.2):
        np.testing.assert_array_equal(next(packets), np.full(960, value, np.float32))
    packets.close()
    assert card.asked == (48_000, 960, 1, "float32")
    assert card.closed


def test_no_microphone_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", ScriptedSoundCard(broken=True))
    with pytest.raises(MediaError, match="microphone can't be opened: Error querying device"):
        next(microphone())


def test_a_missing_sound_library_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MediaError, match="libportaudio2"):
        next(microphone())
