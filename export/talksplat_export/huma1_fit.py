"""Fit the profile "huma1": canonical Gaussians first, then the net that deforms them, both through the rasterizer.

1. *Static*: 20,000 Gaussians are fitted to the frames in which the face rests.
2. *Warm start*: the deformation net learns the displacements that the track's landmarks suggest for each Gaussian,
   which is cheap (no pixels) and spares the second step the search for which Gaussian belongs to which lip.
3. *Deformation*: net, triplanes, blink and canonical Gaussians together are fitted to all frames, from speech alone.

The net is fitted as it is served: on what the recogniser's encoder hears in the windows of `animate_huma1`, at every
place that a frame can have in its chunk, on the recording and on degraded versions of it, with the voice activity's
gate on its output. So silence is the canonical face.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from talksplat import clock
from talksplat.animator import SPEECH_EDGES, gate
from talksplat.avatar import (
    BLINK,
    HUMA1_WEIGHTS,
    SPEECH_WIDTH,
    TRIPLANE_CHANNELS,
    TRIPLANE_SIZES,
    WINDOW_TOKENS,
)
from talksplat.files import replacing
from talksplat_export import augment, huma1, moonshine, stage_a, stage_b, vad
from talksplat_export._npz import Npz
from talksplat_export.stage_a import Crops, Gaussians
from talksplat_export.steps import Steps
from talksplat_export.track import Track

Float32 = npt.NDArray[np.float32]

GAUSSIANS = 20_000  # of the profile: avatars of equal size share a batch
BOX_MARGIN = 0.005  # metres around the canonical means

# Learning rates; the canonical attributes and the blink's have stage A's, the latter those of a basis.
RATES = {"triplanes": 4e-3, "net": 1e-3}
WARM_RATES = {"triplanes": 1e-2, "net": 3e-3}
CANONICAL_SHARE = 0.5  # of the canonical rates, once the net moves
# What the net calls 1, by attribute: about as much as is seen alike.
OFFSET_UNITS = np.repeat([0.005, 0.05, 0.1, 0.5, 0.1], [3, 4, 3, 1, 3]).astype(np.float32)

BATCH = 4  # frames a step
WARM_BATCH, WARM_GAUSSIANS = 24, 2048
HALF_SIZE_SHARE = 0.6  # of the steps on pixels, at half resolution
REST_PERCENTILE = 12.0  # of the frames count as rest, by their expression
DROPOUT = 0.1  # of the speech's channels
HEAR_BATCH = 16  # windows
DEGRADED = 3  # versions of the audio, besides the recorded one
HEARD = "heard.npz"
SPEECH_ENCODER = moonshine.encoder_id(moonshine.WHEELS["base"].encoder)


# --- the sound ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Heard(Npz):
    """What serving would hear: V versions of a recording, each cut into chunks that begin at another frame."""

    hidden: npt.NDArray[np.float16]  # [V, C, WINDOW_TOKENS, 416] of the windows
    speech: Float32  # [V, T] probability

    def tokens(self, version: npt.NDArray[np.int64], frames: npt.NDArray[np.int64]) -> Tensor:
        """[F, SPEECH_TOKENS, 416] around each frame, of a version each."""
        chunk, slot = np.divmod(frames + version % clock.CHUNK_FRAMES, clock.CHUNK_FRAMES)
        mixture = huma1.split(huma1.token_mixture(), 0, clock.CHUNK_FRAMES)[torch.from_numpy(slot)]
        return mixture @ torch.from_numpy(self.hidden[version, chunk].astype(np.float32))


def hear(audios: Sequence[Float32], frames: int, advance: Callable[[int], object]) -> Heard:
    """Listen to recordings [samples] of ``frames`` frames; number v of them in chunks that begin v % 4 frames early.

    Args:
        advance: called with the number of recordings done.
    """
    encoder, detector = _speech_encoder(), vad.load()
    chunks = -(-(frames + clock.CHUNK_FRAMES - 1) // clock.CHUNK_FRAMES)
    hidden = np.empty((len(audios), chunks, WINDOW_TOKENS, SPEECH_WIDTH), np.float16)
    speech = np.empty((len(audios), frames), np.float32)
    for version, audio in enumerate(audios):
        early = version % clock.CHUNK_FRAMES
        before = clock.LEFT_CONTEXT + early * clock.SAMPLES_PER_FRAME
        padded = np.zeros((chunks - 1) * clock.CHUNK_SAMPLES + clock.WINDOW, np.float32)
        part = audio[: len(padded) - before]
        padded[before : before + len(part)] = part
        windows = np.lib.stride_tricks.sliding_window_view(padded, clock.WINDOW)[:: clock.CHUNK_SAMPLES]
        probabilities = []
        with torch.inference_mode():
            for start in range(0, chunks, HEAR_BATCH):
                batch = torch.from_numpy(windows[start : start + HEAR_BATCH].copy())
                hidden[version, start : start + HEAR_BATCH] = encoder(batch)[1].numpy()
                probabilities.append(detector(batch)[0])
        speech[version] = torch.cat(probabilities).reshape(-1).numpy()[early : early + frames]
        advance(version + 1)
    return Heard(hidden, speech)


@functools.cache
def _speech_encoder() -> moonshine.Encoder:
    return moonshine.load_wheel("base")[0].model.encoder


def degraded(audio: Float32, quiet: npt.NDArray[np.bool_], seed: int) -> Float32:
    """The recording [samples] through noise, rooms, microphones and codecs, another chain every 8 seconds.

    Args:
        quiet: [samples] where nobody speaks.
    """
    rng, piece = np.random.default_rng(seed), int(stage_b.DEGRADED_SECONDS * clock.SAMPLE_RATE)
    return np.concatenate(
        [augment.degrade(audio[at : at + piece], quiet[at : at + piece], [], rng) for at in range(0, len(audio), piece)]
    )


# --- the model ---------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Canonical Gaussians, what a blink adds to them, and the net that deforms them."""

    box: Tensor
    units: Tensor

    def __init__(self, canonical: Float32, blink_motion: Float32, seed: int) -> None:  # [14, N], [3, N]
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.count = canonical.shape[1]
        self.canonical, self.blink = nn.ParameterDict(), nn.ParameterDict()
        for name, (planes, _, _) in stage_a.GROUPS.items():
            rest = torch.from_numpy(canonical[planes].copy())
            self.canonical[name] = nn.Parameter(rest)
            self.blink[name] = nn.Parameter(
                torch.from_numpy(blink_motion.copy()) if name == "means" else torch.zeros_like(rest)
            )
        # Around 1, since the features of the three planes are multiplied.
        self.triplanes = nn.ParameterList(
            1 + 0.3 * torch.randn(3, TRIPLANE_CHANNELS, side, side, generator=generator) for side in TRIPLANE_SIZES
        )
        self.net = nn.ParameterDict()
        for name, shape in HUMA1_WEIGHTS.items():
            weights = torch.randn(shape, generator=generator) / shape[0] ** 0.5
            if name != "positions":
                weights[-1] = 0
            self.net[name] = nn.Parameter(weights)
        means = torch.from_numpy(canonical[:3])
        margin = torch.tensor([[-BOX_MARGIN], [BOX_MARGIN]])
        self.register_buffer("box", torch.stack([means.amin(1), means.amax(1)]) + margin)
        self.register_buffer("units", torch.from_numpy(OFFSET_UNITS))

    def groups(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Parameters and their learning rates, as optimizers take them; what has no rate stands still."""
        parameters = {
            **{name: [parameter] for name, parameter in self.canonical.items()},
            **{f"blink {name}": [parameter] for name, parameter in self.blink.items()},
            "triplanes": list(self.triplanes),
            "net": list(self.net.values()),
        }
        return [{"params": parameters[name], "lr": rate} for name, rate in rates.items()]

    def table(self, chosen: Tensor | slice = slice(None)) -> Tensor:  # [32, N]
        """Features of the Gaussians at their canonical means."""
        low, high = self.box
        places = 2 * (self.canonical["means"].detach().T[chosen] - low) / (high - low) - 1
        return torch.cat([huma1.sample(planes, places) for planes in self.triplanes])

    def weights(self) -> dict[str, Tensor]:
        """The net's weights as a bundle holds them."""
        weights = dict(self.net.items())
        return weights | {"offsets_out": weights["offsets_out"] * self.units}

    def offsets(self, speech: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:  # [F, T, W] -> [F, 14, N]
        """What the net adds to all or to the chosen Gaussians."""
        weights = {name: tensor[None] for name, tensor in self.weights().items()}
        return huma1.offsets(speech[None], self.table(chosen)[None], weights)[0]

    def forward(self, offsets: Tensor | None, blink: Tensor) -> Gaussians:  # [F, 14, N] gated, [F]
        """Means, quats, scales, opacities, colors of each frame, as the rasterizer takes them."""
        planes = {
            name: self.canonical[name] + blink[:, None, None] * self.blink[name]
            + (0 if offsets is None else offsets[:, of])
            for name, (of, _, _) in stage_a.GROUPS.items()
        }  # fmt: skip
        return stage_a.activated(planes)

    @torch.no_grad()
    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The fields of a `Huma1Avatar` that are fitted."""
        coarse, fine = (planes.numpy().astype(np.float16) for planes in self.triplanes)
        return {
            "canonical": np.concatenate([self.canonical[name].numpy() for name in stage_a.GROUPS]),
            "blink": np.concatenate([self.blink[name].numpy() for name in stage_a.GROUPS]),
            "coarse": coarse,
            "fine": fine,
            "box": self.box.numpy().copy(),
            **{name: np.ascontiguousarray(tensor.numpy()) for name, tensor in self.weights().items()},
        }


# --- the fit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """How many iterations of each kind."""

    static: int = 1000
    warm: int = 500
    deformation: int = 3000

    @classmethod
    def of(cls, deformation: int) -> Self:
        """As many of the first two as usual for a number of the third."""
        share = deformation / cls.deformation
        return cls(max(round(cls.static * share), 1), max(round(cls.warm * share), 1), deformation)

    def plan(self) -> dict[str, float]:
        """Seconds that each step takes on two cores."""
        return {"static": 0.1 * self.static, "warm start": 0.15 * self.warm, "deformation": 0.25 * self.deformation}


def make(
    head: Head,
    audio: Float32,  # [samples] of the track's frames
    track: Track,
    weights: Float32,  # [T, 21] of the track's frames
    crops: Crops,
    motion: Float32,  # [21, 3, N] of the Gaussians, from `geometry.seed`
    counts: Counts,
    seed: int,
    done: Steps,
    key: str,
) -> tuple[dict[str, npt.NDArray[Any]], list[float]]:
    """Listen to the recording and fit ``head``: its `Head.tensors`, and the losses of the last step.

    Args:
        done: keeps what each step leaves.
        key: of the other arguments.
    """
    frames = len(track)
    key = done.key(key, SPEECH_ENCODER, DEGRADED)
    if done.is_done("hear", key):
        done.skipped("hear")
    else:
        with done.running("hear", key, DEGRADED + 1, [HEARD]) as advance:
            speech = hear([audio], frames, lambda _: None).speech[0]
            quiet = np.repeat(speech < SPEECH_EDGES[0], clock.SAMPLES_PER_FRAME)[: len(audio)]
            versions = [audio, *(degraded(audio, quiet, seed + number) for number in range(DEGRADED))]
            hear(versions, frames, advance).save(done.folder / HEARD)
    heard = Heard.load(done.folder / HEARD)
    losses = fit(head, crops, track, heard, weights[:, :BLINK], motion[:BLINK], counts, seed, done, key)
    return head.tensors(), losses


def tidy(folder: Path) -> None:
    """Remove what the steps left, once the result is kept: a tenth of a gigabyte that a few minutes make anew."""
    for path in (folder / HEARD, *(folder / f"{name.replace(' ', '-')}.pt" for name in Counts().plan())):
        path.unlink(missing_ok=True)


def fit(
    head: Head,
    crops: Crops,
    track: Track,
    heard: Heard,
    targets: Float32,  # [T, 20] tracked coefficients
    motion: Float32,  # [20, 3, N] metres a unit of coefficient, from `geometry.seed`
    counts: Counts,
    seed: int,
    done: Steps,
    key: str,
) -> list[float]:
    """Fit ``head`` in place; returns the losses of the third step.

    Args:
        done: keeps what each step leaves, so that an interrupted fit goes on.
        key: of all the other arguments.
    """
    emphasis = crops.even_emphasis()
    gates = torch.from_numpy(gate(heard.speech))
    blinks = torch.from_numpy(track.blink)
    versions = len(heard.hidden)

    def draw(rng: np.random.Generator, frames: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Speech tokens [F, T, W] and gates [F, 1, 1], half of them of the recording itself."""
        version = np.where(rng.random(len(frames)) < 0.5, 0, rng.integers(versions, size=len(frames)))
        keep = torch.from_numpy(rng.random((len(frames), 1, SPEECH_WIDTH)) >= DROPOUT) / (1 - DROPOUT)
        return heard.tokens(version, frames) * keep.float(), gates[version, frames][:, None, None]

    def pixels(picked: npt.NDArray[np.int64], offsets: Tensor | None, shrink: int) -> Tensor:
        frames = crops.frames[picked]
        gaussians = head(offsets, blinks[torch.from_numpy(frames)])
        return stage_a.photometric(gaussians, crops, picked, track, emphasis, shrink)

    def static(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 0, step])
        picked = rng.choice(len(crops.frames), BATCH, p=resting)
        return pixels(picked, None, 2 if step < HALF_SIZE_SHARE * counts.static else 1)

    def warm(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 1, step])
        frames = rng.choice(crops.frames, WARM_BATCH, p=often)
        chosen = torch.from_numpy(rng.choice(head.count, min(WARM_GAUSSIANS, head.count), replace=False))
        speech, opening = draw(rng, frames)
        goal = torch.einsum("fk,kcn->fcn", torch.from_numpy(targets[frames]), torch.from_numpy(motion)[:, :, chosen])
        found = opening * head.offsets(speech, chosen)[:, :3]
        return ((found - goal) / head.units[0]).square().mean()

    def deformation(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 2, step])
        picked = rng.choice(len(crops.frames), BATCH, p=often)
        speech, opening = draw(rng, crops.frames[picked])
        return pixels(picked, opening * head.offsets(speech), 2 if step < HALF_SIZE_SHARE * counts.deformation else 1)

    often, resting = stage_a.sampling(track), _resting(track, targets)
    canonical = {name: rest for name, (_, rest, _) in stage_a.GROUPS.items()}
    blink = {f"blink {name}": rate for name, (_, _, rate) in stage_a.GROUPS.items()}
    slower = {name: CANONICAL_SHARE * rate for name, rate in canonical.items()}
    plan: list[tuple[str, int, Mapping[str, float], Callable[[int], Tensor]]] = [
        ("static", counts.static, canonical, static),
        ("warm start", counts.warm, WARM_RATES, warm),
        ("deformation", counts.deformation, slower | blink | RATES, deformation),
    ]
    losses: list[float] = []
    for name, count, rates, loss in plan:
        key = done.key(key, name, count)
        left, kept = (done.folder / f"{name.replace(' ', '-')}{suffix}.pt" for suffix in ("", "-checkpoint"))
        if done.is_done(name, key):
            done.skipped(name)
        else:
            with done.running(name, key, count, [left.name], kept=kept.name) as advance:
                losses = stage_a.descend(head, head.groups(rates), count, loss, kept, advance)
                with replacing(left) as partial:
                    torch.save({"head": head.state_dict(), "losses": losses}, partial)
        state = torch.load(left, weights_only=True)
        head.load_state_dict(state["head"])
        losses = state["losses"]
    return losses


def _resting(track: Track, targets: Float32) -> npt.NDArray[np.float64]:
    """The probability of each frame in the static fit: those nearest to rest, alike; never one without a face."""
    away = np.linalg.norm(targets, axis=1) + 10 * track.blink
    rest = (away <= np.percentile(away[track.seen], REST_PERCENTILE)) & track.seen
    return np.asarray(rest / rest.sum(), np.float64)
