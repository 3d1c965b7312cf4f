"""From the end of what a person says to the first frame of the answer, and how often somebody is cut off.

    python -m loadtests.turns --recordings ../shared/data --json bench/conversation.json

Utterances are said to `converse` one after the other in real time, with faint noise before and after them; the answer
is scripted, so nothing waits for a language model. Where an utterance truly ends is found in its samples: after the
last 10 ms that are within 30 dB of its loud ones. Each answer is interrupted once it sounds, and that is timed too.

The curves are made offline, since speech and pauses are what they are: detection and recognition run once, and
`Turns` decides again for each setting. A text is taken to be there 160 ms after it was asked for. So are the noises:
synthetic ones, babble of the recordings, and for comparison the first words of orders, which no avatar may talk over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from talksplat import asr, clock, nets
from talksplat.bench._report import Row, commit, report
from talksplat.bench._server import serving
from talksplat.server import ROOT
from talksplat_client import AsyncClient
from talksplat_client._turns import EndOfSpeech, Turns
from talksplat_client.converse import Interrupted, Moment, Turn, TurnEnded, converse

Samples = npt.NDArray[np.float32]

AVATAR = "ava"
REPOSITORY = ROOT / "model_repository"
UTTERANCES = 100  # said in real time
CURVE_UTTERANCES = 200  # of which the former are the first
TUNED_ON = 240  # utterances, on which the values of conversation.json were chosen: they are left out here
READ_CLIPS = 15
P50_MS, P95_MS, FALSE_CUTS_PCT = 500.0, 700.0, 4.0  # targets

RATE, FPS, FRAME = clock.SAMPLE_RATE, clock.FPS, clock.SAMPLES_PER_FRAME
PACKET = RATE // 50  # 20 ms
NOISE = 3e-4  # of full scale, -70 dB
LEAD_SECONDS = 0.5  # of noise before an utterance
TAIL_SECONDS = 1.6  # after it, offline
PATIENCE = 5.0  # seconds for an answer
SPOKEN_SECONDS = 0.4  # of the answer before it is interrupted
LOUD, QUIET_DB, STEP = 0.95, 30.0, RATE // 100  # see `spoken`
TEXT_FRAMES = 4  # from asking for a text to having it, offline
SILENCES = [frames / FPS for frames in (5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 25)]  # seconds
NOISES, NOISE_PEAK = 60, 0.3  # of each kind; of full scale
STAGES = ("end_of_speech", "recognition", "reply", "voice", "first_frame")


def spoken(samples: Samples) -> tuple[int, int]:
    """First sample of what is said, and the one after the last."""
    steps = samples[: len(samples) // STEP * STEP].reshape(-1, STEP)
    level = np.sqrt(np.square(steps, dtype=np.float64).mean(axis=1))
    loud = np.flatnonzero(level > np.quantile(level, LOUD) * 10 ** (-QUIET_DB / 20))
    return int(loud[0]) * STEP, int(loud[-1] + 1) * STEP


def noise(seconds: float, seed: int = 0) -> Samples:
    """Of a quiet room."""
    return np.random.default_rng(seed).normal(scale=NOISE, size=round(seconds * RATE)).astype(np.float32)


@dataclass(frozen=True)
class Said:
    """One utterance, in ms."""

    file: str
    answer: float | None  # from its true end to the first frame of the answer; None: there was none
    stages: dict[str, float]  # of it
    false_cuts: int  # turns that ended before it did
    interruption: float | None  # from the first sound of the interruption to the last frame of speech
    late: float  # by how much a packet was given after its time, at the worst


class Person:
    """Says an utterance, waits for the answer, interrupts it. Samples come in packets, no sooner than they are said."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._answered: float | None = None  # when
        self.start = 0.0  # when the utterance's first sample was said, on the event loop's clock
        self.interrupts: float | None = None  # when the interruption's first sound is
        self.late = 0.0

    def hears_answer(self) -> None:
        """The answer has begun."""
        self._answered = asyncio.get_running_loop().time()

    async def packets(self) -> AsyncIterator[Samples]:
        """What the microphone hears."""
        now = asyncio.get_running_loop().time
        began, given = now(), 0
        self.start = began + LEAD_SECONDS
        said = np.concatenate(
            [noise(LEAD_SECONDS), self._samples + noise(len(self._samples) / RATE)[: len(self._samples)]]
        )
        while True:
            if given == len(said):
                said = np.concatenate([said, noise(PACKET / RATE, given)])
                if self.interrupts is None and self._answered is not None and now() > self._answered + SPOKEN_SECONDS:
                    self.interrupts = began + (len(said) + spoken(self._samples)[0]) / RATE
                    said = np.concatenate([said, self._samples])
            packet = said[given : given + PACKET]
            given += len(packet)
            due = began + given / RATE
            await asyncio.sleep(max(0.0, due - now()))
            self.late = max(self.late, now() - due)
            yield packet


async def say(client: AsyncClient, file: str, samples: Samples) -> Said:
    """One conversation: an utterance, its answer, an interruption."""
    person = Person(samples)
    now = asyncio.get_running_loop().time
    end = spoken(samples)[1] / RATE
    cuts, answer, stopped = 0, None, None
    stages: dict[str, float] = {}
    ended = spoke = 0.0
    events = converse(client, person.packets(), avatar=AVATAR)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TurnEnded):
                ended = now() - person.start
                cuts += ended < end
            elif isinstance(event, Moment) and event.sound is not None:
                spoke = now()
            elif isinstance(event, Turn) and ended >= end and answer is None:
                answer = 1e3 * (spoke - person.start - end)
                stages = {name: 1e3 * getattr(event, name) for name in STAGES[1:]}
                stages["end_of_speech"] = answer - sum(stages.values())  # from the true end on
                person.hears_answer()
            elif isinstance(event, Interrupted) and person.interrupts is not None:
                stopped = 1e3 * (spoke - person.interrupts)
                break
            if now() > person.start + len(samples) / RATE + PATIENCE:
                break
    return Said(file, answer, stages, cuts, stopped, 1e3 * person.late)


async def converse_with(url: str, clips: Sequence[tuple[str, Samples]], kept: Path) -> list[Said]:
    """Say all that was not said before by this commit; what was is in ``kept``, a JSON object a line."""
    done = {}
    if kept.is_file():
        for line in kept.read_text().splitlines():
            entry = json.loads(line)
            if entry.pop("commit") == commit():
                done[entry["file"]] = Said(**entry)
    kept.parent.mkdir(parents=True, exist_ok=True)
    async with AsyncClient(url) as client:
        if any(file not in done for file, _ in clips):
            await say(client, *clips[0])  # warms everything up
        for file, samples in track(clips, "utterances"):
            if file not in done:
                done[file] = await say(client, file, samples)
                with kept.open("a") as lines:
                    lines.write(json.dumps({"commit": commit(), **asdict(done[file])}) + "\n")
    return [done[file] for file, _ in clips]


class Offline:
    """A recording whose frames were looked at once, as a client looks at them: nothing that comes later is known."""

    def __init__(
        self,
        samples: Samples,
        detect: Callable[[Samples], Samples],  # windows -> `LATEST` of the model `vad`
        transcribe: Callable[[Samples], str],
    ) -> None:
        self.begin, self.end = (each / RATE for each in spoken(samples))
        self._samples = np.concatenate([noise(LEAD_SECONDS), samples, noise(TAIL_SECONDS)])
        self.begin += LEAD_SECONDS
        self.end += LEAD_SECONDS
        self._transcribe = transcribe
        self._texts: dict[int, str] = {}  # by the frame of silence up to which it was said
        padded = np.pad(self._samples, (clock.WINDOW, 0))
        windows = np.lib.stride_tricks.sliding_window_view(padded, clock.WINDOW)[FRAME::FRAME]
        self.speech = np.concatenate([detect(part)[:, -1] for part in np.array_split(windows, len(windows) // 64 + 1)])

    def text(self, frame: int) -> str:
        """What is recognised of all up to there."""
        if frame not in self._texts:
            longest = clock.MAX_UTTERANCE_SECONDS * RATE
            self._texts[frame] = self._transcribe(self._samples[: frame * FRAME][-longest:])
        return self._texts[frame]

    @property
    def texts(self) -> list[str]:
        """All that was recognised so far."""
        return list(self._texts.values())

    def ends(self, settings: EndOfSpeech) -> Iterator[float]:
        """When turns end, in seconds."""
        turns, asked = Turns(settings, FPS, clock.MAX_UTTERANCE_SECONDS), None
        for frame, probability in enumerate(self.speech.tolist(), 1):
            event = turns.push(probability)
            asked = frame if event == "recognise" else None if event == "resume" else asked
            if event != "end" and asked is not None and frame == asked + TEXT_FRAMES:
                event = turns.recognised(self.text(asked) or "\u2026.")  # who was not understood has spoken, too
            if event == "end":
                asked = None
                yield frame / FPS


def curve(name: str, recordings: Sequence[Offline], settings: EndOfSpeech) -> list[Row]:
    """How soon turns end, and how many too soon, by how much silence ends them."""
    rows: list[Row] = []
    further = settings.unfinished_seconds - settings.finished_seconds
    minutes = sum(each.end - each.begin for each in recordings) / 60
    for decided_by, more in (("silence", 0.0), ("silence and text", further)):
        for silence in SILENCES:
            tried = replace(settings, finished_seconds=silence, unfinished_seconds=silence + more)
            cuts, delays = [], []
            for each in recordings:
                ends = list(each.ends(tried))
                cuts.append(sum(end < each.end for end in ends))
                delays += [1e3 * (end - each.end) for end in ends[-1:] if end >= each.end]
            rows.append(
                {
                    "recordings": name,
                    "decided_by": decided_by,
                    "silence_ms": 1e3 * silence,
                    "unfinished_ms": 1e3 * (silence + more),
                    "false_cuts_pct": 100 * float(np.mean([count > 0 for count in cuts])),
                    "false_cuts_per_minute": sum(cuts) / minutes,
                    "delay_p50_ms": float(np.quantile(delays, 0.5)) if delays else None,
                    "delay_p95_ms": float(np.quantile(delays, 0.95)) if delays else None,
                    "used": "yes" if more and abs(silence - settings.finished_seconds) < 1e-6 else "",
                }
            )
    return rows


def hum(rng: np.random.Generator) -> Samples:
    """A hummed tone."""
    time = np.arange(round(rng.uniform(0.3, 1.0) * RATE)) / RATE
    phase = 2 * np.pi * rng.uniform(90, 250) * time + 0.25 * np.sin(10 * np.pi * time)
    tone = np.sum([np.sin(number * phase) / number**2 for number in range(1, 8)], axis=0)
    return np.asarray(tone * np.clip(20 * np.minimum(time, time[-1] - time), 0, 1), np.float32)


def cough(rng: np.random.Generator) -> Samples:
    """One to three bursts of voice and breath through the resonances of a throat."""
    bursts = []
    for seconds in rng.uniform(0.15, 0.35, rng.integers(1, 4)):
        time = np.arange(round(seconds * RATE)) / RATE
        pitch = rng.uniform(110, 260) * (1 - 0.4 * time / seconds)
        source = np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / RATE))
        source = np.fft.rfft(source + rng.normal(scale=rng.uniform(0.5, 2), size=time.size))
        hertz = np.fft.rfftfreq(time.size, 1 / RATE)
        throat = [
            gain / (1 + np.square((hertz - rng.uniform(*around)) / width))
            for around, width, gain in (((500, 850), 120, 1), ((1000, 1700), 150, 0.6), ((2300, 2900), 200, 0.3))
        ]
        burst = np.fft.irfft(source * np.sum(throat, axis=0), time.size)
        burst *= np.minimum(1, 100 * time) * np.exp(-rng.uniform(6, 14) * time)
        bursts += [burst / np.abs(burst).max(), np.zeros(round(rng.uniform(0.05, 0.15) * RATE))]
    return np.asarray(np.concatenate(bursts), np.float32)


def beginning(rng: np.random.Generator, clips: Sequence[tuple[str, Samples]]) -> Samples:
    """The first word or two of an order, cut off."""
    _, samples = clips[rng.integers(len(clips))]
    begin = spoken(samples)[0]
    return samples[begin : begin + round(rng.uniform(0.24, 0.5) * RATE)]


def babble(rng: np.random.Generator, clips: Sequence[tuple[str, Samples]]) -> Samples:
    """Six people at once."""
    length = round(rng.uniform(0.3, 1.0) * RATE)
    said = [clips[index][1][spoken(clips[index][1])[0] :][:length] for index in rng.integers(len(clips), size=6)]
    return np.asarray(np.sum([np.pad(each, (0, length - each.size)) for each in said], axis=0), np.float32)


def interruptions(
    clips: Sequence[tuple[str, Samples]], offline: Callable[[Samples], Offline], settings: EndOfSpeech
) -> list[Row]:
    """How often a noise, or the beginning of an order, silences the avatar, and how often it then goes on."""
    rows: list[Row] = []
    makers: dict[str, Callable[[np.random.Generator], Samples]] = {
        "hum": hum,
        "cough": cough,
        "babble": partial(babble, clips=clips),
        "words": partial(beginning, clips=clips),
    }
    for what, make in makers.items():
        rng, silenced, goes_on = np.random.default_rng(2), 0, 0
        for _ in range(NOISES):
            sound = make(rng)
            recording = offline(NOISE_PEAK * sound / np.abs(sound).max())
            ends = list(recording.ends(settings))
            silenced += bool(ends)
            goes_on += bool(ends) and not any(recording.texts)
        rows.append({"what": what, "tried": NOISES, "silenced": silenced, "goes_on": goes_on})
    return rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """False cuts over the delay; the setting in use is marked."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(str(row["recordings"]) for row in rows))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        measure = "false_cuts_pct" if name == names[0] else "false_cuts_per_minute"
        for decided_by in dict.fromkeys(str(row["decided_by"]) for row in rows):
            line = [row for row in rows if (row["recordings"], row["decided_by"]) == (name, decided_by)]
            axes.plot(
                [row["delay_p50_ms"] for row in line], [row[measure] for row in line], "o-", ms=3, label=decided_by
            )
            for row in line:
                if row["used"]:
                    axes.plot(row["delay_p50_ms"], row[measure], "k*", ms=12, label="in use")
        if measure == "false_cuts_pct":
            axes.axhline(FALSE_CUTS_PCT, color="grey", lw=0.8, ls="--")
        axes.set(title=name, xlabel="end of speech noticed after, ms (median)", ylim=(0, None))
        axes.set_ylabel("utterances cut off, %" if measure == "false_cuts_pct" else "cuts a minute of speech")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def summary(said: Sequence[Said]) -> list[Row]:
    """What the live conversations took, stage by stage."""
    answered = [each for each in said if each.answer is not None]
    answers = np.array([each.answer for each in answered], np.float64)
    rows: list[Row] = []
    for stage in STAGES:
        values = np.array([each.stages[stage] for each in answered])
        rows.append({"what": stage, **_quantiles(values), "share_pct": 100 * float(values.sum() / answers.sum())})
    rows.append({"what": "answer", **_quantiles(answers), "share_pct": 100.0})
    stops = np.array([each.interruption for each in said if each.interruption is not None])
    rows.append({"what": "interruption", **_quantiles(stops), "share_pct": None})
    return rows


def _quantiles(values: npt.NDArray[np.float64]) -> Row:
    if not values.size:
        return {"p50_ms": None, "p95_ms": None, "worst_ms": None}
    p50, p95 = (float(np.quantile(values, share)) for share in (0.5, 0.95))
    return {"p50_ms": p50, "p95_ms": p95, "worst_ms": float(values.max())}


def load(paths: Sequence[Path]) -> list[tuple[str, Samples]]:
    """Names and samples [T] at `clock.SAMPLE_RATE`."""
    clips = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        clips.append((path.stem, soxr.resample(samples.mean(axis=1), rate, RATE)))
    return clips


def main(arguments: Sequence[str] | None = None) -> int:
    """Converse, sweep, report; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.turns", description=__doc__)
    parser.add_argument("--recordings", type=Path, required=True, metavar="FOLDER", help="with speech/ and faces/")
    parser.add_argument("--limit", type=int, default=UTTERANCES, metavar="N", help="utterances; default: %(default)s")
    parser.add_argument("--no-curve", action="store_true", help="leave the offline part out")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything there, and a plot beside it as .png"
    )
    options = parser.parse_args(arguments)
    files = sorted((options.recordings / "speech/train/picovoice").glob("*.flac"))
    if not files:
        print(f"There are no recordings in {options.recordings}/speech/train/picovoice.", file=sys.stderr)
        return 2
    order = np.random.default_rng(1).permutation(len(files))[TUNED_ON:]
    chosen = [files[index] for index in order[:CURVE_UTTERANCES]]
    console, began = Console(stderr=True), time.monotonic()
    curves: list[Row] = []
    noises: list[Row] = []
    if not options.no_curve:
        detector = nets.session(REPOSITORY / "vad/1/model.onnx", threads=1)
        transcribe = asr.Transcriber(
            asr.in_process(REPOSITORY), asr.Tokenizer((REPOSITORY / "asr/1/tokenizer.bin").read_bytes())
        )
        read = sorted((options.recordings / "speech/eval/lj").glob("*.flac"))[:READ_CLIPS]

        def offline(samples: Samples) -> Offline:
            return Offline(samples, lambda windows: detector.run(["LATEST"], {"AUDIO": windows})[0], transcribe)

        sets = {
            "orders": chosen[: 2 * options.limit],
            "read sentences": [*read, options.recordings / "faces/subject_a.flac"],
        }
        for name, paths in sets.items():
            recordings = [offline(samples) for _, samples in track(load(paths), name, console=console)]
            curves += curve(name, recordings, EndOfSpeech.load())
        noises = interruptions(load(chosen[: options.limit]), offline, EndOfSpeech.load())
    with serving(AVATAR) as server:
        said = asyncio.run(converse_with(server.grpc_url, load(chosen[: options.limit]), ROOT / "runs/turns.jsonl"))
    rows = summary(said)
    answer = next(row for row in rows if row["what"] == "answer")
    cut = 100 * float(np.mean([each.false_cuts > 0 for each in said]))
    totals: Row = {
        "utterances": len(said),
        "unanswered": sum(each.answer is None for each in said),
        "false_cuts_pct": cut,
        "false_cuts_target_pct": FALSE_CUTS_PCT,
        "p50_target_ms": P50_MS,
        "p95_target_ms": P95_MS,
        "packets_late_worst_ms": max(each.late for each in said),
    }
    report(
        "conversation",
        rows,
        options.json,
        {"totals": [totals], **({"curves": curves, "noises": noises} if curves else {})},
    )
    if options.json and curves:
        plot(curves, options.json.with_suffix(".png"))
    console.print(f"{time.monotonic() - began:.0f} s")
    p50, p95 = answer["p50_ms"], answer["p95_ms"]
    met = (
        isinstance(p50, float) and isinstance(p95, float) and p50 <= P50_MS and p95 <= P95_MS and cut <= FALSE_CUTS_PCT
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
