"""What the baselines share: what they are fitted to, the window of a frame that they draw, and how they are trained."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talksplat.avatar import FEATURES
from talksplat.files import replacing
from talksplat_export import geometry, stage_a
from talksplat_export.geometry import Float32, Region
from talksplat_export.recording import Image, Recording
from talksplat_export.stage_b import Heard
from talksplat_export.steps import Steps
from talksplat_export.track import Track

HEARD_FRAMES = (-2, -1, 0)  # relative to the one drawn: no more look-ahead than the audio encoder's own
CODE = 32  # what is left of the sound of a frame
DROPOUT = 0.1  # of the features
MARGIN = 8  # pixels around the mask
FINAL_RATE = 0.05  # of the learning rate at the end
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Scene:
    """A recording as a baseline is fitted to it: the same track, sound and region as the Gaussians get."""

    recording: Recording
    track: Track
    heard: Heard
    training: int  # frames to fit to; those that follow are for testing
    region: Region  # of the face, in the reference view
    nose_line: float  # pixels from the top of the reference view to the nose's lower end
    unit: float  # pixels between the eyes in the reference view

    @classmethod
    def of(cls, recording: Recording, track: Track, heard: Heard, training: int) -> Scene:
        """Lay out the region from the frames to fit to."""
        every = geometry.thinned(training)
        basis = geometry.coefficient_basis(track[:training].expression)
        weights = geometry.frame_weights(track, basis)[every]
        weights = weights[:, weights.any(0)]
        landmarks, _ = geometry.triangulate(track[every], weights)
        region = geometry.region(track[every], landmarks, weights, recording.size)
        rest = geometry.project(landmarks[0], region.viewmat, region.K)[:, :2]
        left, right = (rest[list(eye)].mean(0) for eye in track.layout.eyes)
        nose = rest[list(track.layout.nose), 1].max()
        return cls(recording, track, heard, training, region, float(nose), float(np.linalg.norm(right - left)))


class Window:
    """The square of a frame around a mask of the reference view; it moves with the head.

    Args:
        mask: [S, S] 0..1 of the reference view; what is drawn is pasted with it.
        size: pixels a side that the square is reduced to.
    """

    def __init__(self, scene: Scene, mask: Float32, size: int) -> None:
        self.scene, self.size = scene, size
        rows, columns = np.nonzero(mask > 0)
        self._anchor = self._seen(scene.region.viewmat)
        extent = max(int(np.ptp(rows)), int(np.ptp(columns))) + 2 * MARGIN
        self.side = min(extent, scene.recording.size)
        middle = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
        self._corner = middle - self.side / 2
        every = np.argmin(np.linalg.norm(scene.track.viewmats - scene.region.viewmat, axis=(1, 2)))
        self.reference = self.place(int(every))  # in the reference view
        self.mask = mask[self.reference][..., None]  # [side, side, 1]; the head turns too little to change it

    def _seen(self, viewmat: Float32) -> npt.NDArray[np.float64]:
        region = self.scene.region
        return geometry.project(region.centre, viewmat, region.K)[1::-1]

    def place(self, index: int) -> tuple[slice, slice]:
        """Rows and columns in a frame."""
        moved = self._corner + self._seen(self.scene.track.viewmats[index]) - self._anchor
        row, column = np.rint(moved).astype(int).clip(0, self.scene.recording.size - self.side)
        return slice(row, row + self.side), slice(column, column + self.side)

    def camera(self, index: int) -> Float32:
        """[3, 3] of the reduced window."""
        rows, columns = self.place(index)
        moved = self.scene.track.K.copy()
        moved[:2, 2] -= [columns.start, rows.start]
        moved[:2] *= self.size / self.side
        return moved

    def reduced_mask(self) -> Tensor:
        """[1, size, size] 0..1."""
        return _resized(torch.from_numpy(self.mask).permute(2, 0, 1), self.size)

    def cut(self, image: Image, index: int) -> Tensor:
        """A frame's window, reduced: [3, size, size] 0..1."""
        return _resized(_planes(image[self.place(index)]), self.size)

    def paste(self, drawn: Tensor, recorded: Image, index: int) -> Image:
        """Lay what was drawn [3, size, size] over a frame, by the mask."""
        place = self.place(index)
        over = _resized(drawn, self.side).permute(1, 2, 0).numpy() * 255
        frame = recorded.copy()
        frame[place] = np.rint(self.mask * over + (1 - self.mask) * recorded[place]).clip(0, 255).astype(np.uint8)
        return frame


@dataclass(frozen=True, eq=False)
class Crops:
    """The windows of the frames to fit to, reduced."""

    pixels: npt.NDArray[np.uint8]  # [F, 3, size, size]
    emphasis: Tensor  # [size, size] weight in the loss, of mean 1

    @classmethod
    def read(cls, window: Window, advance: Callable[[int], object]) -> Crops:
        """Read the recording once."""
        frames, size = window.scene.training, window.size
        pixels = np.empty((frames, 3, size, size), np.uint8)
        for index, image in enumerate(window.scene.recording.frames(0, frames)):
            pixels[index] = _bytes(window.cut(image, index))
            advance(index + 1)
        emphasis = torch.from_numpy(window.scene.region.emphasis[window.reference])
        emphasis = _resized(emphasis[None], size)[0]
        return cls(pixels, emphasis / emphasis.mean())

    def targets(self, frames: npt.NDArray[np.int64]) -> Tensor:
        """Colours [B, 3, size, size], 0..1."""
        return torch.from_numpy(self.pixels[frames]).float() / 255


class Sound(nn.Module):
    """What is heard at a frame and just before it -> a code [B, CODE]."""

    inputs: Tensor

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        every = np.concatenate([heard.features, heard.speech[:, None]], 1)
        indices = (np.arange(len(every))[:, None] + HEARD_FRAMES).clip(0)
        self.register_buffer("inputs", torch.from_numpy(every[indices].reshape(len(every), -1)), persistent=False)
        self.net = nn.Sequential(
            nn.Dropout(DROPOUT),
            nn.Linear((FEATURES + 1) * len(HEARD_FRAMES), 64),
            nn.ReLU(),
            nn.Linear(64, CODE),
        )

    def forward(self, frames: Tensor) -> Tensor:  # [B]
        """Of frames of the recording."""
        code: Tensor = self.net(self.inputs[frames])
        return code


class Baseline(nn.Module, ABC):
    """One family's way to draw the face: fitted to a scene, driven by its sound."""

    name: ClassVar[str]
    size: ClassVar[int]  # pixels a side of the window as it is drawn
    batch: ClassVar[int]  # frames a step
    rate: ClassVar[float]  # of learning
    steps: ClassVar[int]  # that a whole fit takes, about ten minutes of a core to itself
    file: ClassVar[str]  # that a fit leaves in its work folder

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.window = Window(scene, self.mask(scene), self.size)
        self.sound = Sound(scene.heard)

    @staticmethod
    @abstractmethod
    def mask(scene: Scene) -> Float32:
        """Where the baseline draws, [S, S] 0..1 of the reference view."""

    @abstractmethod
    def loss(self, crops: Crops, frames: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Of a batch of frames to fit to."""

    @abstractmethod
    def predict(self, recorded: Image, index: int) -> Tensor:
        """The window [3, size, size] of one frame, 0..1."""

    def groups(self) -> list[dict[str, Any]]:
        """The parameters and their rates of learning, as optimizers take them."""
        return [{"params": list(self.parameters()), "lr": self.rate}]

    def tables(self) -> int:
        """How many of the parameters are looked up by place, and no weights of a network."""
        return 0

    @torch.inference_mode()
    def draw(self, recorded: Image, index: int) -> Image:
        """Draw onto a recorded frame, in its pose and driven by the sound."""
        return self.window.paste(self.predict(recorded, index), recorded, index)

    def fit(
        self,
        crops: Crops,
        seed: int,
        minutes: float,
        checkpoint: Path,
        advance: Callable[[int], object],
        steps: int | None = None,
    ) -> list[float]:
        """Train in place, from ``checkpoint`` where there is one; returns the loss of every step.

        The learning rate falls with the share of steps, or of ``minutes`` where more of them is used up; the fit ends
        with either. As long as time does not end it, a resumed fit takes the steps of one that ran through.
        """
        steps = self.steps if steps is None else steps
        optimizer = torch.optim.Adam(self.groups(), betas=(0.9, 0.99), eps=1e-10)
        rates = [group["lr"] for group in optimizer.param_groups]
        losses: list[float] = []
        seconds = 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            losses, seconds = state["losses"], state["seconds"]
        began = saved = time.monotonic()

        def spent() -> float:
            return seconds + time.monotonic() - began

        def save() -> None:
            state = {"net": self.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            with replacing(checkpoint) as partial:
                torch.save({**state, "seconds": spent()}, partial)

        often = stage_a.sampling(self.scene.track[: self.scene.training])
        self.train()
        try:
            for step in range(len(losses), steps):
                timed = spent() / (60 * minutes)
                if timed >= 1:
                    break
                share = timed if timed > (step + 1) / steps else step / steps
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * FINAL_RATE**share
                rng = np.random.default_rng([seed, step])
                torch.manual_seed(int(rng.integers(2**31)))  # of dropout
                loss = self.loss(crops, rng.choice(len(often), self.batch, p=often), rng)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.item())
                advance(max(step + 1, round(steps * timed)))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
        self.eval()
        return losses


def _planes(image: Image) -> Tensor:  # [H, W, 3] -> [3, H, W]
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


def _resized(image: Tensor, size: int) -> Tensor:  # [C, H, W] -> [C, size, size]
    options = {"mode": "bilinear", "align_corners": False, "antialias": size < image.shape[-1]}
    resized: Tensor = F.interpolate(image[None], (size, size), **options)[0]  # type: ignore[arg-type]
    return resized


def _bytes(image: Tensor) -> npt.NDArray[np.uint8]:
    return np.asarray((image * 255).round().clamp(0, 255).to(torch.uint8).numpy())


Kind = TypeVar("Kind", bound=Baseline)


def fitted(kind: type[Kind], scene: Scene, seed: int, minutes: float, done: Steps) -> Kind:
    """A baseline fitted to a scene: read from a work folder that has it, else trained there.

    Args:
        done: keeps what is fitted; interrupted, the next call goes on.
    """
    torch.manual_seed(seed)
    baseline = kind(scene)
    arrays = (scene.track.landmarks, scene.track.viewmats, scene.track.blink, scene.heard.features)
    digests = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
    key = done.key(kind.name, scene.recording.sha256, *digests, scene.training, kind.steps, minutes, seed)
    if done.is_done(kind.name, key):
        done.skipped(kind.name)
    else:
        with done.running(f"{kind.name}: windows", key, scene.training, []) as advance:
            crops = Crops.read(baseline.window, advance)
        kept = f"checkpoint-{kind.file}"
        with done.running(kind.name, key, kind.steps, [kind.file], kept=kept) as advance:
            losses = baseline.fit(crops, seed, minutes, done.folder / kept, advance)
            with replacing(done.folder / kind.file) as partial:
                torch.save({"net": baseline.state_dict(), "losses": losses}, partial)
    baseline.load_state_dict(torch.load(done.folder / kind.file, weights_only=True)["net"])
    return baseline.eval()
