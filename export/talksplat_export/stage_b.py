"""Stage B: the personal head from audio features to coefficients, fitted to the tracked coefficients.

Fitted as it is served: on the pretrained encoder's features, with the voice activity's gate on its output, on the
recording and on degraded versions of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from talksplat import clock
from talksplat.animator import SPEECH_EDGES, gate
from talksplat.avatar import COEFFICIENTS, FEATURES, HIDDEN
from talksplat_export import audio_encoder, augment, vad
from talksplat_export.track import Track

Float32 = npt.NDArray[np.float32]

STEPS = 1000
BATCH = 512
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1.0
DROPOUT = 0.2  # of the features
LIP_WEIGHT = 2.0  # of the lips' opening, on top of all landmarks of the mouth
CLOSURE_WEIGHT = 4.0  # of frames with closed lips within speech
DEGRADED_SECONDS = 8.0  # how long one chain of degradations lasts
NOISE_ONLY = 0.1  # share of these pieces in which nobody speaks and the face is to rest
CROWD = 4  # pieces of the recording itself that make a babble


@dataclass(frozen=True, eq=False)
class Heard:
    """What serving would hear at every frame of some audio."""

    features: Float32  # [T, 128]
    speech: Float32  # [T] probability
    resting: npt.NDArray[np.bool_] | None = None  # [T] where noise took the recorded speech's place; None is nowhere


@dataclass(frozen=True, eq=False)
class Adapter:
    """The personal head; see `talksplat_export.deformation`."""

    adapter_in: Float32  # [129, 64]
    adapter_out: Float32  # [65, 20]

    def __call__(self, heard: Heard) -> Float32:
        """Coefficients [T, 20] as served, gated."""
        hidden = np.tanh(heard.features @ self.adapter_in[:-1] + self.adapter_in[-1])
        return np.asarray((hidden @ self.adapter_out[:-1] + self.adapter_out[-1]) * gate(heard.speech)[:, None])


def hear(audio: Float32, frames: int) -> Heard:
    """Encode ``audio`` [samples] and detect speech in it, window by window as a stream is served.

    Args:
        frames: how many are wanted; silence follows where the audio is shorter.
    """
    chunks = -(-frames // clock.CHUNK_FRAMES)
    length = chunks * clock.CHUNK_SAMPLES
    audio = np.pad(audio[:length], (0, max(length - len(audio), 0)))
    features = audio_encoder.load(audio_encoder.WEIGHTS).encode(torch.from_numpy(audio)).numpy()[:frames]
    return Heard(features, vad.detect(audio, frames))


def versions(audio: Float32, frames: int, count: int, seed: int, advance: Callable[[int], object]) -> list[Heard]:
    """The recording as it is, then ``count`` degraded versions of it (noise, reverberation, microphones, codecs).

    A share `NOISE_ONLY` of a degraded version is noise alone.
    """
    heard = [hear(audio, frames)]
    advance(1)
    rng = np.random.default_rng(seed)
    audio = audio[: frames * clock.SAMPLES_PER_FRAME]
    piece = int(DEGRADED_SECONDS * clock.SAMPLE_RATE)
    quiet = np.repeat(heard[0].speech < SPEECH_EDGES[0], clock.SAMPLES_PER_FRAME)[: len(audio)]
    for number in range(count):
        degraded, resting = [], np.zeros(frames, bool)
        for at in range(0, len(audio), piece):
            clean = audio[at : at + piece]
            if rng.random() < NOISE_ONLY:
                noise = augment.noise(len(clean), [], rng)
                level = 10 ** (rng.uniform(-60, -20) / 20) / max(float(np.sqrt(np.mean(noise**2))), 1e-9)
                degraded.append((noise * level).astype(np.float32))
                resting[at // clock.SAMPLES_PER_FRAME : (at + piece) // clock.SAMPLES_PER_FRAME] = True
            else:
                others = rng.integers(0, len(audio), CROWD)
                babble = [np.take(audio, np.arange(len(clean)) + other, mode="wrap") for other in others]
                degraded.append(augment.degrade(clean, quiet[at : at + piece], babble, rng))
        heard.append(replace(hear(np.concatenate(degraded), frames), resting=resting))
        advance(number + 2)
    return heard


def fit(
    heard: list[Heard],
    targets: Float32,  # [T, 20]
    displacements: Float32,  # [20, L, 3] of the landmarks, metres a unit of coefficient
    track: Track,
    seed: int,
    advance: Callable[[int], object],
) -> Adapter:
    """Fit the adapter to ``targets`` by the error of the mouth's landmarks and of the lips' opening.

    Args:
        advance: called with the number of steps done.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = track.layout
    upper, lower = (displacements[:, list(lip)].mean(1) for lip in layout.inner_lips)
    moved = displacements[:, list(layout.mouth)].reshape(COEFFICIENTS, -1)
    metric = moved @ moved.T / len(layout.mouth) + LIP_WEIGHT * (lower - upper) @ (lower - upper).T
    metric /= np.trace(metric) / COEFFICIENTS
    metric += 0.05 * np.eye(COEFFICIENTS)
    factor = torch.from_numpy(np.linalg.cholesky(metric).astype(np.float32))  # error² = |error @ factor|²

    features = torch.from_numpy(np.stack([version.features for version in heard]))
    gates = torch.from_numpy(gate(np.stack([version.speech for version in heard])))
    goals = torch.from_numpy(
        np.stack([targets if version.resting is None else targets * ~version.resting[:, None] for version in heard])
    )
    importance = torch.where(torch.from_numpy(_closed(track)) & (gates[0] > 0.5), CLOSURE_WEIGHT, 1.0)

    first = (torch.randn(FEATURES + 1, HIDDEN, generator=generator) / FEATURES**0.5).requires_grad_()
    second = (torch.randn(HIDDEN + 1, COEFFICIENTS, generator=generator) / HIDDEN**0.5).requires_grad_()
    with torch.no_grad():
        first[-1], second[-1] = 0, 0

    def error(inputs: Tensor, gating: Tensor, goal: Tensor, index: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ first[:-1] + first[-1])
        served = (hidden @ second[:-1] + second[-1]) * gating[..., None]
        squared = (((served - goal) @ factor) ** 2).sum(-1)
        weighted: Tensor = squared * importance[index]
        return weighted.mean()

    optimizer = torch.optim.AdamW([first, second], LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        index = torch.randint(len(targets), (BATCH,), generator=generator)
        version = torch.randint(len(heard), (BATCH,), generator=generator)
        version[: BATCH // 2] = 0  # half of a batch is the recording itself
        keep = torch.rand(BATCH, FEATURES, generator=generator) >= DROPOUT
        inputs = features[version, index] * keep / (1 - DROPOUT)
        loss = error(inputs, gates[version, index], goals[version, index], index)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance(step + 1)
    return Adapter(first.detach().numpy(), second.detach().numpy())


def _closed(track: Track) -> npt.NDArray[np.bool_]:
    """Where the lips touch: within a tenth of the way from the least to the widest opening."""
    opening = track.lip_opening
    low, high = np.percentile(opening, [1, 99])
    return np.asarray(opening < low + 0.1 * (high - low))
