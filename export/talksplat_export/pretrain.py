"""Pretraining of the audio encoder: what is said, and what the lips do about it, at several instants around each
frame.

The encoder never sees a face. Its features are asked, through linear heads, for the phonemes and the articulation
from 80 ms before to 80 ms after the frame's instant, so that a person-specific head without memory finds
coarticulation in them. Each segment is seen twice, as recorded and degraded, and both have to give the same features.

The committed weights took four runs, each of which needs the checkpoint of the one before::

    talksplat-export pretrain --minutes 240 --steps 2000
    talksplat-export pretrain --minutes 240 --steps 2000 --real FOLDER CHECKPOINT
    talksplat-export pretrain --steps 1600 --real FOLDER CHECKPOINT --start CHECKPOINT
    talksplat-export pretrain --steps 1100 --real FOLDER CHECKPOINT --start CHECKPOINT

The second aligned real clips with their transcripts by what the first had learned, and began from nothing. These two
are older than this file: words of the VITS voice had pauses between them, the text no invented words, and the encoder
not the layers ``deepen``, which the fourth run added. Only the fourth had all of `Config` as it is now. flite's voices
need the system package of that name.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor, nn

from talksplat.avatar import FEATURES
from talksplat.bench._report import commit
from talksplat.clock import FPS, LEFT_CONTEXT, SAMPLE_RATE, SAMPLES_PER_FRAME
from talksplat.files import replacing, sha256

from . import alignment, augment, phonemes, synthesis
from ._onnx import write
from .audio_encoder import HOP, RECEPTIVE_FIELD, WEIGHTS, AudioEncoder
from .synthesis import LABEL_RATE, Recording

OFFSETS = (-8, -4, 0, 4, 8)  # labels (10 ms) around the instant that the heads are asked for, and how much each counts
_OFFSET_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5])
_LABELS_PER_FRAME = LABEL_RATE // FPS
_SMOOTHING = np.hanning(11)[1:-1] / np.hanning(11).sum()  # the lips take about 50 ms from one phoneme to the next
_CONTEXT_LABELS = LEFT_CONTEXT // HOP
_AFTER_LABELS = -(-(RECEPTIVE_FIELD - LEFT_CONTEXT) // HOP)
PHONEMES, ARTICULATIONS = phonemes.articulation().shape


@dataclass(frozen=True)
class Config:
    """Everything that decides the result."""

    minutes: float = 220.0  # of synthetic speech
    steps: int = 1100
    batch: int = 32  # segments, each seen as recorded and degraded
    frames: int = 48  # a segment's frames: 2 s
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    articulation_weight: float = 60.0  # what the lips do counts for more than what is said
    consistency_weight: float = 1.0
    real_repeats: int = 0  # how often real recordings count, which are fewer; 0 is none
    noise_only: float = 0.06  # share of segments whose degraded version is noise without speech
    resampled: float = 0.5  # share of segments played faster or slower, which makes other speakers
    start: str = ""  # hash of the checkpoint that the run began with
    seed: int = 0

    @property
    def digest(self) -> str:
        """A short hash of all values."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:12]


class Targets(nn.Module):
    """FEATURES [B, F, 128] -> what they say about the OFFSETS; only for training.

    Returns:
        Phoneme logits [B, F, offsets, 40] and articulation [B, F, offsets, 6].
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(OFFSETS) * n) for n in (PHONEMES, ARTICULATIONS))

    def forward(self, features: Tensor) -> list[Tensor]:  # noqa: D102
        return [head(features).unflatten(-1, (len(OFFSETS), -1)) for head in self.heads]


@dataclass
class Batch:
    """Segments and their targets."""

    audio: Tensor  # [B, T]
    posteriors: Tensor  # [B, F, offsets, phonemes]: shares of the phonemes in the 90 ms around
    articulation: Tensor  # [B, F, offsets, 6]
    labels: Tensor  # [B, F], phoneme at the instant itself


def _smooth(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[labels] -> [labels, phonemes]: shares of the phonemes around each label."""
    one_hot = np.zeros((len(labels), PHONEMES), np.float32)
    one_hot[np.arange(len(labels)), labels] = 1.0
    padded = np.pad(one_hot, ((len(_SMOOTHING) // 2,) * 2, (0, 0)), mode="edge")
    out = np.zeros_like(one_hot)
    for shift, weight in enumerate(_SMOOTHING):
        out += np.float32(weight) * padded[shift : shift + len(labels)]
    return out


class Corpus:
    """Recordings in memory, cut into random segments."""

    def __init__(self, recordings: Sequence[Recording], config: Config, resampled: float = 0.0) -> None:
        needed = _CONTEXT_LABELS + config.frames * _LABELS_PER_FRAME + _AFTER_LABELS + max(OFFSETS)
        self._recordings = [r for r in recordings if len(r.labels) > needed]
        if not self._recordings:
            raise ValueError(f"no recording is longer than {needed / LABEL_RATE:.1f} s")
        self._length, self._config, self._resampled = needed, config, resampled
        seconds = np.array([len(r.labels) - needed + 1 for r in self._recordings], float)
        self._chances = seconds / seconds.sum()
        self._instants = _CONTEXT_LABELS + np.arange(config.frames) * _LABELS_PER_FRAME

    def _segment(self, rng: np.random.Generator) -> tuple[augment.Audio, npt.NDArray[np.uint8]]:
        recording = self._recordings[int(rng.choice(len(self._recordings), p=self._chances))]
        speed = rng.uniform(0.85, 1.15) if rng.random() < self._resampled else 1.0
        taken = int(np.ceil(self._length * speed)) + 1
        if speed == 1.0 or taken > len(recording.labels):
            speed, taken = 1.0, self._length
        first = int(rng.integers(0, len(recording.labels) - taken + 1))
        audio = recording.audio[first * HOP : (first + taken) * HOP].astype(np.float32) / 32768
        labels = recording.labels[first : first + taken]
        if speed != 1.0:
            audio = soxr.resample(audio, SAMPLE_RATE * speed, SAMPLE_RATE, "LQ")[: self._length * HOP]
            labels = labels[((np.arange(self._length) + 0.5) * speed).astype(int)]
        return audio, labels

    def batch(self, segments: int, rng: np.random.Generator) -> Batch:
        """``segments`` segments as recorded, then the same ones degraded."""
        chosen = [self._segment(rng) for _ in range(segments)]
        light, heavy, light_labels, heavy_labels = [], [], [], []
        for index, (audio, labels) in enumerate(chosen):
            light.append(np.clip(augment.gain(audio, rng.uniform(-24, 6)), -1, 1))
            light_labels.append(labels)
            babble = [chosen[(index + n) % segments][0] for n in range(1, 5)]
            if rng.random() < self._config.noise_only:
                noise = augment.noise(len(audio), [], rng)
                noise *= 10 ** (rng.uniform(-70, -15) / 20) / max(float(np.sqrt(np.mean(noise**2))), 1e-9)
                heavy.append(noise.astype(np.float32))
                heavy_labels.append(np.full_like(labels, phonemes.SILENCE))
            else:
                quiet = np.repeat(labels == phonemes.SILENCE, HOP)
                heavy.append(augment.degrade(audio, quiet, babble, rng))
                heavy_labels.append(labels)
        return self._with_targets(light + heavy, light_labels + heavy_labels)

    def _with_targets(self, audio: list[augment.Audio], labels: list[npt.NDArray[np.uint8]]) -> Batch:
        at = self._instants[:, None] + np.array(OFFSETS)
        posteriors = np.stack([_smooth(one)[at] for one in labels])
        used = RECEPTIVE_FIELD + (self._config.frames - 1) * SAMPLES_PER_FRAME
        return Batch(
            audio=torch.from_numpy(np.stack([one[:used] for one in audio])),
            posteriors=torch.from_numpy(posteriors),
            articulation=torch.from_numpy(posteriors @ phonemes.articulation()),
            labels=torch.from_numpy(np.stack([one[self._instants] for one in labels]).astype(np.int64)),
        )


def _losses(features: Tensor, targets: Targets, batch: Batch, config: Config) -> tuple[Tensor, dict[str, float]]:
    logits, articulation = targets(features)
    phoneme = -(batch.posteriors * F.log_softmax(logits, dim=-1)).sum(dim=-1)
    lips = ((articulation - batch.articulation) ** 2).mean(dim=-1)
    phoneme, lips = ((loss * _OFFSET_WEIGHTS).mean() / _OFFSET_WEIGHTS.mean() for loss in (phoneme, lips))
    light, heavy = features.chunk(2)
    same = (batch.labels.chunk(2)[0] == batch.labels.chunk(2)[1]).unsqueeze(-1)
    consistency = (same * (light.detach() - heavy) ** 2).sum() / (same.sum() * FEATURES)
    loss = phoneme + config.articulation_weight * lips
    loss = loss + config.consistency_weight * consistency
    parts = {"phoneme": phoneme, "articulation": lips, "consistency": consistency}
    return loss, {name: part.item() for name, part in parts.items()}


@torch.inference_mode()
def validate(
    encoder: AudioEncoder, targets: Targets, held_out: Mapping[str, Corpus], batches: int = 6
) -> dict[str, float]:
    """Accuracy of the phoneme at the frame's instant, and r of the articulation, clean and degraded.

    Args:
        encoder: is put into evaluation mode.
        targets: its heads.
        held_out: what was not trained on; the figures of each corpus start with its name.
        batches: how many batches of 12 segments a corpus.
    """
    encoder.eval()
    middle = OFFSETS.index(0)
    figures: dict[str, float] = {}
    for corpus, recordings in held_out.items():
        rng = np.random.default_rng(99)
        correct, speech, lips = ([] for _ in range(3))
        for _ in range(batches):
            batch = recordings.batch(12, rng)
            logits, articulation = targets(encoder(batch.audio))
            correct.append(logits[:, :, middle].argmax(dim=-1) == batch.labels)
            speech.append(batch.labels != phonemes.SILENCE)
            lips.append(torch.stack([articulation[:, :, middle], batch.articulation[:, :, middle]]))
        for name, half in (("clean", slice(0, 12)), ("degraded", slice(12, 24))):
            right, spoken = (torch.cat([one[half] for one in mine]) for mine in (correct, speech))
            mine, true = torch.cat([pair[:, half] for pair in lips], dim=1).flatten(1, 2).transpose(1, 2)
            r = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(mine, true, strict=True)]
            figures[f"{corpus}_accuracy_{name}"] = float(right.float().mean())
            figures[f"{corpus}_accuracy_{name}_speech"] = float(right[spoken].float().mean())
            figures[f"{corpus}_articulation_r_{name}"] = float(torch.stack(r).mean())
    return figures


def posteriors(encoder: AudioEncoder, targets: Targets) -> alignment.Posteriors:
    """The phonemes' log-probabilities every 10 ms, from four passes over audio that starts 10 ms later each time."""

    @torch.inference_mode()
    def compute(audio: synthesis.Audio) -> npt.NDArray[np.float32]:
        samples = torch.from_numpy(audio)
        middle = OFFSETS.index(0)
        logits = [
            targets(encoder.encode(F.pad(samples, (0, SAMPLES_PER_FRAME))[n * HOP :])[None])[0][0, :, middle]
            for n in range(_LABELS_PER_FRAME)
        ]
        frames = len(audio) // SAMPLES_PER_FRAME + 1
        interleaved = torch.stack([one[:frames] for one in logits], dim=1).flatten(0, 1)
        return F.log_softmax(interleaved[: len(audio) // HOP], dim=-1).numpy()

    return compute


def publish(encoder: AudioEncoder, config: Config, figures: dict[str, float], path: Path) -> None:
    """Write the weights, whole or not at all, with how they came about in the file's metadata."""
    metadata = {
        "version": "1",
        "config": json.dumps(dataclasses.asdict(config)),
        "config_digest": config.digest,
        "commit": commit(),
        **{name: f"{value:.4f}" for name, value in figures.items()},
    }
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    write(path, save(state, metadata))


def _from_checkpoint(path: Path) -> tuple[AudioEncoder, Targets]:
    kept = torch.load(path, weights_only=True)
    encoder, targets = AudioEncoder(), Targets()
    fresh = encoder.load_state_dict(kept["encoder"], strict=False)
    if fresh.unexpected_keys or any(not key.startswith("deepen") for key in fresh.missing_keys):
        raise ValueError(f"{path} holds another encoder")
    targets.load_state_dict(kept["targets"])
    return encoder.eval(), targets


def pretrain(
    config: Config,
    train: Corpus,
    held_out: Mapping[str, Corpus],
    folder: Path,
    weights: Path,
    start: tuple[AudioEncoder, Targets] | None = None,
    every: int = 200,
) -> dict[str, float]:
    """Train, with a checkpoint in ``folder`` every ``every`` steps; a later call goes on from it.

    Args:
        config: also names the checkpoint.
        train: what to learn from.
        held_out: what to measure on, see `validate`.
        folder: of the checkpoint.
        weights: the file to write at the end.
        start: what to begin with, in place of random weights.
        every: steps between checkpoints.

    Returns:
        The figures of the last validation.
    """
    torch.manual_seed(config.seed)
    encoder, targets = start or (AudioEncoder(), Targets())
    parameters = [*encoder.parameters(), *targets.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    parts: dict[str, Any] = {"encoder": encoder, "targets": targets, "optimizer": optimizer, "schedule": schedule}
    checkpoint = folder / f"checkpoint-{config.digest}.pt"
    done, figures = 0, {}
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        done, figures = kept["steps"], kept["figures"]
        for name, part in parts.items():
            part.load_state_dict(kept[name])

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def prepare(step: int) -> Batch:
        return train.batch(config.batch, np.random.default_rng((config.seed, step)))

    with Progress(*columns) as progress, ThreadPoolExecutor(1) as ahead:
        task = progress.add_task("pretraining", total=config.steps, completed=done)
        following = ahead.submit(prepare, done)
        for step in range(done, config.steps):
            encoder.train()
            batch, following = following.result(), ahead.submit(prepare, step + 1)
            loss, shown = _losses(encoder(batch.audio), targets, batch, config)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(task)
            if step % 20 == 0:
                values = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
                progress.update(task, description=f"pretraining  {values}")
            if (step + 1) % every == 0 or step + 1 == config.steps:
                figures = validate(encoder, targets, held_out)
                values = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
                progress.console.print(f"step {step + 1}: {values}")
                states = {name: part.state_dict() for name, part in parts.items()}
                with replacing(checkpoint) as partial:
                    torch.save({"steps": step + 1, "figures": figures, **states}, partial)
        progress.console.print(f"checkpoint: {checkpoint}")
    publish(encoder, config, figures, weights)
    return figures


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``talksplat-export pretrain``."""
    parser = subparsers.add_parser("pretrain", help="pretrain the audio encoder on synthetic speech")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrain"), help="corpus and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the result goes")
    parser.add_argument("--minutes", type=float, default=Config.minutes, help="of synthetic speech")
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument(
        "--real",
        type=Path,
        nargs=2,
        metavar=("FOLDER", "CHECKPOINT"),
        help="add real speech: a folder whose manifest.csv has the columns file and transcript, "
        "and an earlier run's checkpoint that tells when its phonemes are said",
    )
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="begin with an earlier run's result")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the corpus if need be, train, write the weights; the exit status."""
    torch.set_num_threads(args.threads)
    config = Config(
        minutes=args.minutes,
        steps=args.steps,
        real_repeats=3 if args.real else 0,
        start=sha256(args.start)[:12] if args.start else "",
    )
    plan = synthesis.voices(config.minutes, config.seed)
    try:
        with Progress() as progress:
            task = progress.add_task("synthetic speech", total=len(plan))
            made = list(synthesis.corpus(plan, args.runs / "corpus", lambda _: progress.advance(task)))
    except synthesis.SynthesisError as error:
        print(f"talksplat-export pretrain: {error}", file=sys.stderr)
        return 1
    train = [recording for voice, recording in zip(plan, made, strict=True) if not voice.held_out]
    held_out = {"synthetic": [recording for voice, recording in zip(plan, made, strict=True) if voice.held_out]}
    if args.real:
        folder, checkpoint = args.real
        first, *others = alignment.recordings(folder, posteriors(*_from_checkpoint(checkpoint)))
        train += others * config.real_repeats
        held_out["real"] = [first]
    corpora = {name: Corpus(recordings, config) for name, recordings in held_out.items()}
    start = _from_checkpoint(args.start) if args.start else None
    pretrain(config, Corpus(train, config, config.resampled), corpora, args.runs, args.weights, start)
    return 0
