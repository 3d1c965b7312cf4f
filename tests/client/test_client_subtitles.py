"""What is said and when, as SRT and WebVTT."""

from __future__ import annotations

import itertools
import re
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from talksplat.server import ROOT, Server
from talksplat_client import Frame, MediaError, cli
from talksplat_client._audio import Samples
from talksplat_client._subtitles import AROUND, LINE, LINES, SubtitleWriter, cues

RATE, FPS = 16_000, 25


def subtitles(path: Path, spoken: list[tuple[float, float]], seconds: float, said: str = "Hello.") -> SubtitleWriter:
    """Of sound whose samples say at which second they are, with speech between these times."""
    heard: list[Samples] = []

    def transcribe(samples: Samples) -> str:
        heard.append(samples)
        return f"{said} {len(heard)}"

    sound = np.arange(round(seconds * RATE), dtype=np.float32) / (RATE * seconds)
    options = {"sample_rate": RATE, "fps": FPS}
    with SubtitleWriter(path, format=path.suffix[1:], transcribe=transcribe, **options) as file:
        for index in range(round(seconds * FPS)):
            file.write_audio(sound[index * RATE // FPS : (index + 1) * RATE // FPS])
            speech = any(begin <= index / FPS < end for begin, end in spoken)
            file.write(Frame(index, index / FPS, 0.99 if speech else 0.01, "jpeg", b""))
    for samples, cue in zip(heard, file.cues, strict=True):
        begin, end = samples[samples > 0][[0, -1]] * seconds  # what was not there yet is silence
        assert begin == pytest.approx(max(cue.begin - AROUND, 0), abs=0.05)
        assert cue.end - 0.01 <= end <= cue.end + AROUND + 0.05
    return file


def test_each_stretch_of_speech_becomes_a_cue_at_its_time(tmp_path: Path) -> None:
    path = tmp_path / "out.srt"
    file = subtitles(path, [(0.2, 1.0), (2.0, 3.4)], 4.0)
    assert [(cue.begin, cue.end) for cue in file.cues] == [(0.2, 1.0), (2.0, 3.4)]
    assert path.read_text() == (
        "1\n00:00:00,200 --> 00:00:01,000\nHello. 1\n\n2\n00:00:02,000 --> 00:00:03,400\nHello. 2\n"
    )
    assert list(tmp_path.iterdir()) == [path]


def test_vtt_says_what_it_is_of_and_escapes_markup(tmp_path: Path) -> None:
    path = tmp_path / "out.vtt"
    subtitles(path, [(0.4, 1.2)], 2.0, "a <b> & c")
    text = path.read_text()
    assert text.startswith("WEBVTT\n\nNOTE\nAI-generated: an avatar, animated by talksplat ")
    assert text.endswith("\n\n00:00:00.400 --> 00:00:01.200\na &lt;b&gt; &amp; c 1\n")


def test_breath_is_no_pause_and_a_long_stretch_ends_at_a_short_one(tmp_path: Path) -> None:
    short = [(0.4, 1.0), (1.2, 2.0)]  # 0.2 s between them
    assert len(subtitles(tmp_path / "a.srt", short, 3.0).cues) == 1
    long = [(0.4, 6.0), (6.2, 7.0)]
    assert [cue.end for cue in subtitles(tmp_path / "b.srt", long, 8.0).cues] == [6.0, 7.0]


def test_speech_until_the_very_end_is_not_lost(tmp_path: Path) -> None:
    assert [cue.end for cue in subtitles(tmp_path / "out.srt", [(0.4, 2.0)], 2.0).cues] == [2.0]


def test_silence_has_no_cue(tmp_path: Path) -> None:
    assert subtitles(tmp_path / "out.srt", [], 1.0).cues == []
    assert (tmp_path / "out.srt").read_text() == ""


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.srt"
    path.write_text("the old one")
    with (
        pytest.raises(MediaError, match="no frames"),
        SubtitleWriter(path, format="srt", transcribe=lambda _: "", sample_rate=RATE),
    ):
        pass
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"out.srt": "the old one"}


@given(
    words=st.lists(st.text("abcdefghij", min_size=1, max_size=60), max_size=80),
    begin=st.floats(0, 1e5),
    seconds=st.floats(0.04, 100),
)
def test_cues_hold_all_words_in_lines_that_can_be_read(words: list[str], begin: float, seconds: float) -> None:
    found = cues("  ".join(words), begin, begin + seconds)
    assert "".join(cue.text for cue in found).translate({32: None, 10: None}) == "".join(words)
    for cue in found:
        assert len(cue.text.splitlines()) <= LINES
        assert max(map(len, cue.text.splitlines())) <= LINE
    if found:
        assert found[0].begin == begin
        assert found[-1].end == pytest.approx(begin + seconds)
    assert all(before.end == after.begin for before, after in itertools.pairwise(found))


def test_long_text_is_shared_out_by_its_letters() -> None:
    text = " ".join(["word"] * 40)
    found = cues(text, 10, 20)
    assert len(found) == 3
    share = len(found[0].text) / sum(len(cue.text) for cue in found)
    assert found[1].begin == pytest.approx(10 + 10 * share)


def test_real_speech_gets_its_words_when_they_are_said(server: Server, tmp_path: Path) -> None:
    """The film and both kinds of subtitles from one run; FFmpeg reads them back."""
    speech = ROOT / "demo" / "speech.wav"
    names = ("out.mp4", "out.srt", "out.vtt")
    outs = [argument for name in names for argument in ("--out", str(tmp_path / name))]
    assert cli.main(["animate", str(speech), "--url", server.grpc_url, "--avatar", "red", *outs]) == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names)
    for name in names[1:]:
        with av.open(str(tmp_path / name)) as container:
            packets = [packet for packet in container.demux() if packet.size]
        texts = [bytes(packet).decode() for packet in packets]
        assert re.match("Hello", texts[0])
        assert re.search(r"[Pp]lease remember", texts[-1])
        assert len(texts) >= 4
        times = [(float((packet.pts or 0) * packet.time_base), float(packet.duration or 0)) for packet in packets]
        spans = [(begin, begin + length * float(packets[0].time_base)) for begin, length in times]
        assert spans == sorted(spans)
    with wave.open(str(speech)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
        rate = file.getframerate()
    for begin, end in spans:  # there is sound where it says so, as loud as speech
        said = samples[round(begin * rate) : round(end * rate)]
        assert np.sqrt(np.mean(said**2)) > 0.5 * np.sqrt(np.mean(samples**2))
