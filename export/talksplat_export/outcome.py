"""What a precision does to what people see and hear: the frames of ava, and the words that are recognised.

Both come from the half of `demo/speech.wav` that nothing was calibrated on, and are compared with the fp32 graphs'.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from talksplat import asr, avatar, framing
from talksplat.animator import Animator, Chunk, Options
from talksplat.bench._report import Row
from talksplat.server import ROOT

from . import feeds, models, registry
from .registry import Precision

THREADS = 2
AVATAR = "ava"

Float32 = npt.NDArray[np.float32]


class OutcomeError(RuntimeError):
    """The frames can't be drawn; the message says why."""


def frames(precision: Precision, repository: Path) -> Row:
    """PSNR of the frames, and the correlation of what they are drawn from, in ``precision`` against fp32.

    Raises:
        OutcomeError: a chunk can't be drawn.
        FeedsError: a graph is missing.
    """
    _, unheard = feeds.halves()
    windows = framing.windows(unheard)
    (motion, speech), (expected_motion, expected_speech) = (
        _driven(windows, each, repository) for each in (precision, _fp32())
    )
    animator = Animator(ROOT / "avatars", threads=THREADS)
    try:
        animator.preload(AVATAR)
        worst, total = np.inf, []
        for index, chunks in enumerate(zip(motion, speech, expected_motion, expected_speech, strict=True)):
            mine, theirs = (_drawn(animator, index, *each) for each in (chunks[:2], chunks[2:]))
            errors = ((mine - theirs) ** 2).mean(axis=1)  # of each frame
            psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-3))
            worst = min(worst, float(psnr.min()))
            total += psnr.tolist()
    finally:
        animator.close()
    return {
        "frames": len(total),
        "psnr_db": float(np.mean(total)),
        "worst_psnr_db": worst,
        "coefficients_r": float(np.corrcoef(motion.ravel(), expected_motion.ravel())[0, 1]),
        "speech_r": float(np.corrcoef(speech.ravel(), expected_speech.ravel())[0, 1]),
    }


def words(precision: Precision, repository: Path) -> Row:
    """What the recogniser hears in ``precision`` and in fp32.

    Raises:
        FeedsError: a graph is missing.
    """
    _, unheard = feeds.halves()
    tokenizer = asr.Tokenizer((repository / "asr" / "1" / "tokenizer.bin").read_bytes())
    texts = [asr.Transcriber(_networks(each, repository), tokenizer)(unheard) for each in (precision, _fp32())]
    return {"words": texts[0], "same_as_fp32": str(texts[0] == texts[1]).lower()}


def _fp32() -> Precision:
    return "fp32"


def _session(name: str, precision: Precision, repository: Path) -> ort.InferenceSession:
    """Of the graph in this precision, in fp32 where it is not offered."""
    used = precision if precision in registry.graph(name).tolerances else _fp32()
    return feeds.session(models.path(name, used, repository), used, THREADS)


def _driven(windows: Float32, precision: Precision, repository: Path) -> tuple[Float32, Float32]:
    """[N, 4, 20] coefficients and [N, 4] probabilities of speech."""
    vad, encoder, deformation = (
        _session(name, precision, repository) for name in ("vad", "audio_encoder", "deformation")
    )
    (speech,) = vad.run(["SPEECH"], {"AUDIO": windows})
    (features,) = encoder.run(["FEATURES"], {"AUDIO": windows})
    adapter_in, adapter_out = (
        np.repeat(adapter[None], len(windows), 0) for adapter in avatar.read_adapter(ROOT / "avatars", AVATAR)
    )
    inputs = {"FEATURES": features, "ADAPTER_IN": adapter_in, "ADAPTER_OUT": adapter_out}
    return deformation.run(None, inputs)[0], speech


def _drawn(animator: Animator, index: int, motion: Float32, speech: Float32) -> npt.NDArray[np.float64]:  # [4, pixels]
    (drawn,) = animator.render([Chunk(AVATAR, motion, speech, index * len(motion), Options("raw"))])
    if isinstance(drawn, Exception):
        raise OutcomeError(str(drawn)) from drawn
    return np.stack([np.frombuffer(frame, np.uint8) for frame in drawn]).astype(np.float64)


def _networks(precision: Precision, repository: Path) -> asr.Networks:
    vad, encoder, decoder = (_session(name, precision, repository) for name in ("vad", "asr_encoder", "asr_decoder"))

    def step(token: asr.Array, cross: asr.Array, past: asr.Array) -> tuple[asr.Array, asr.Array]:
        logits, present = decoder.run(None, {"TOKEN": token, "CROSS_KV": cross, "PAST_KV": past})
        return logits, present

    return asr.Networks(
        vad=lambda windows: vad.run(["SPEECH"], {"AUDIO": windows})[0],
        encoder=lambda audio: encoder.run(["CROSS_KV"], {"AUDIO": audio})[0],
        decoder=step,
    )
