"""Huma 1 outside the server: what audio makes of an avatar, compared with a recording, and reduced to a Huma 2.

`derive` makes a Huma 2 of a Huma 1: the offsets that the large net gives in the frames of a recording become 20 bases
and their coefficients in every frame, by a singular value decomposition, and a small head learns these coefficients
from the small encoder's features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from talksplat import clock, splat, triplanes
from talksplat.animator import gate, posed
from talksplat.avatar import ATTRIBUTES, BLINK, COEFFICIENTS, WEIGHTS, AnyAvatar, Avatar, Huma1Avatar, ProfileError
from talksplat.files import sha256
from talksplat_export import audio_encoder, geometry, huma1, huma1_fit, stage_a, stage_b
from talksplat_export.huma1_fit import OFFSET_UNITS, Heard
from talksplat_export.quality import Comparison, psnr
from talksplat_export.recording import Image, Recording
from talksplat_export.track import Track

Float32 = npt.NDArray[np.float32]


@torch.inference_mode()
def drive(avatar: Huma1Avatar, heard: Heard, frames: Sequence[int]) -> Iterator[Float32]:  # [14, N] each
    """The offsets of every Gaussian in some frames of the first recording that was heard, gated as served."""
    table = torch.from_numpy(triplanes.bake(avatar))[None]
    weights = {name: torch.from_numpy(tensor)[None] for name, tensor in avatar.deformation.items()}
    opening = gate(heard.speech[0])
    for start in range(0, len(frames), clock.CHUNK_FRAMES):
        some = np.array(frames[start : start + clock.CHUNK_FRAMES])
        speech = heard.tokens(np.zeros(len(some), np.int64), some)
        for frame, offsets in zip(some, huma1.offsets(speech[None], table, weights)[0].numpy(), strict=True):
            yield offsets * opening[frame]


@dataclass(frozen=True, eq=False)
class Huma1Subject(Comparison):
    """An avatar of the profile huma1 with the recording that it is compared with; it is driven by audio alone."""

    drivers: ClassVar[Sequence[str]] = ("audio",)
    avatar: Huma1Avatar
    heard: Heard

    @property
    def speech(self) -> Float32:
        """As served."""
        return np.asarray(self.heard.speech[0])

    def drawer(self, driven_by: str) -> Callable[[Image, int], Image]:
        """Frames in any order; those of one chunk after each other are cheapest.

        Raises:
            ValueError: ``driven_by`` is not "audio".
        """
        if driven_by != "audio":
            raise ValueError(f"a Huma 1 can't be driven by {driven_by}")
        offsets: dict[int, Float32] = {}

        def draw(recorded: Image, index: int) -> Image:
            if index not in offsets:
                chunk = range(index, min(index + clock.CHUNK_FRAMES, len(self.track)))
                offsets.clear()
                offsets.update(zip(chunk, drive(self.avatar, self.heard, chunk), strict=True))
            return self.draw(recorded, index, offsets[index])

        return draw

    def draw(self, recorded: Image, index: int, offsets: Float32) -> Image:
        """Draw onto a recorded frame with its own pose and blink; gated offsets [14, N]."""
        shapes = posed(self.avatar, offsets, float(self.track.blink[index]))
        job = splat.Job(shapes, _NO_WEIGHTS, self.track.viewmats[index], self.avatar.K, recorded)
        return splat.render_onto([job], threads=1)[0]


def subject(avatar: AnyAvatar, recording: Recording, track: Track) -> Huma1Subject:
    """Listen to the recording, for the comparison.

    Raises:
        ProfileError: the avatar is of another profile.
        SpeechEncoderError: it was fitted to another speech encoder.
    """
    if not isinstance(avatar, Huma1Avatar):
        raise ProfileError(f"avatar {avatar.id!r} is of the profile {avatar.profile}, not {Huma1Avatar.profile}")
    avatar.require_encoder(huma1_fit.SPEECH_ENCODER)
    return Huma1Subject(avatar, recording, track, huma1_fit.hear([recording.audio], len(track), lambda _: None))


_NO_WEIGHTS = np.zeros(0, np.float32)


DECOMPOSED = 450  # frames, about


@dataclass(frozen=True, eq=False)
class Reduction:
    """Offsets as sums of few bases."""

    bases: Float32  # [K, 14, N]
    coefficients: Float32  # [T, K] of the frames that were reduced, of unit root mean square
    energy: float  # share of the squared offsets that is kept, in units of `OFFSET_UNITS`

    def offsets(self, coefficients: Float32) -> Float32:  # [K] -> [14, N]
        """What coefficients stand for."""
        return np.asarray(np.tensordot(coefficients, self.bases, 1))

    def project(self, offsets: Float32) -> Float32:  # [14, N] -> [K]
        """The coefficients that come nearest to a frame's offsets."""
        scaled = (self.bases / OFFSET_UNITS[:, None]).reshape(len(self.bases), -1)  # orthogonal
        seen = scaled @ (offsets / OFFSET_UNITS[:, None]).reshape(-1)
        return np.asarray(seen / np.square(scaled).sum(1), np.float32)


def reduce(offsets: Float32, rank: int = COEFFICIENTS) -> Reduction:  # [T, 14, N]
    """The ``rank`` bases that keep most of the offsets, uncentred, so that rest stays 0.

    By the eigenvectors of the frames' inner products, since there are fewer frames than offsets.
    """
    frames = len(offsets)
    scaled = (offsets / OFFSET_UNITS[:, None]).reshape(frames, -1)
    energies, vectors = np.linalg.eigh((scaled @ scaled.T).astype(np.float64))
    kept = slice(frames - 1, max(frames - 1 - rank, -1) if frames > rank else None, -1)
    energies, vectors = energies.clip(0)[kept], vectors[:, kept]
    positive = energies > 1e-12 * max(float(energies.max(initial=0.0)), 1e-30)
    energies, vectors = energies[positive], vectors[:, positive]
    coefficients = vectors * np.sqrt(frames)
    bases = (coefficients.T / frames).astype(np.float32) @ offsets.reshape(frames, -1)
    total = float(np.square(scaled, dtype=np.float64).sum())
    return Reduction(
        bases=bases.reshape(-1, ATTRIBUTES, offsets.shape[2]),
        coefficients=coefficients.astype(np.float32),
        energy=float(energies.sum()) / max(total, 1e-30),
    )


def kept_psnr(subject: Huma1Subject, reduction: Reduction, frames: Sequence[int]) -> list[float]:
    """PSNR [dB] between frames drawn with all of their offsets and with what the bases keep, in the face's box."""
    box = subject.box(subject.track.layout.face)
    grey: Image = np.full((subject.avatar.height, subject.avatar.width, 3), 128, np.uint8)
    return [
        psnr(
            subject.draw(grey, frame, offsets)[box],
            subject.draw(grey, frame, reduction.offsets(reduction.project(offsets)))[box],
        )
        for frame, offsets in zip(frames, drive(subject.avatar, subject.heard, frames), strict=True)
    ]


def derive(
    subject: Huma1Subject,
    heard: list[stage_b.Heard],  # versions of the recording, of the frames fitted to
    seed: int,
) -> tuple[Avatar, Reduction]:
    """A Huma 2 that moves as the Huma 1 does in the frames that it was fitted to; and the bases before quantisation."""
    whole, fitted = subject.avatar, range(subject.test.start)
    train = subject.track[: len(fitted)]
    some = fitted[:: max(len(fitted) // DECOMPOSED, 1)]
    reduction = reduce(np.stack(list(drive(whole, subject.heard, some))))
    rank = len(reduction.bases)
    weights = np.zeros((len(fitted), WEIGHTS), np.float32)
    weights[:, BLINK] = train.blink
    for frame, offsets in zip(fitted, drive(whole, subject.heard, fitted), strict=True):
        weights[frame, :rank] = reduction.project(offsets)
    used = geometry.thinned(len(fitted))
    landmarks, _ = geometry.triangulate(train[used], weights[used])
    adapter = stage_b.fit(heard, weights[:, :BLINK], landmarks[1 : BLINK + 1], train, seed, lambda _: None)

    full = np.zeros((ATTRIBUTES, WEIGHTS, whole.gaussians), np.float32)
    full[:, :rank], full[:, BLINK] = reduction.bases.transpose(1, 0, 2), whole.blink
    bases, scales = stage_a.quantise(full)
    basis = np.linalg.lstsq(train.expression, weights[:, :BLINK], rcond=None)[0]  # for what is driven by the track
    common = {field.name: getattr(whole, field.name) for field in fields(AnyAvatar)}
    derived = Avatar(
        **common
        | {"audio_encoder": sha256(audio_encoder.WEIGHTS)}
        | {"provenance": {**whole.provenance, "derived_from": whole.profile, "coefficient_basis": basis.tolist()}},
        bases=bases,
        basis_scales=scales,
        adapter_in=adapter.adapter_in,
        adapter_out=adapter.adapter_out,
    )
    return derived, reduction
