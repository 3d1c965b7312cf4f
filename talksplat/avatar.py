"""The avatar bundle: the only code that writes, reads and checks ``avatars/<id>/``.

======================== ==================================================================================
``avatar.json``          what the bundle is, its sizes, SHA-256 of every other file, provenance
``gaussians.safetensors`` ``canonical`` f32 [14, N], ``bases`` i8 [14, 21, N], ``basis_scales`` f32 [14, 21]
``adapter.safetensors``  ``adapter_in`` f32 [129, 64], ``adapter_out`` f32 [65, 20]: the personal head of the
                         deformation net; the last row of each is the bias
``plates.safetensors``   ``offsets`` i64 [P + 1] into plates.bin, ``viewmats`` f32 [P, 4, 4], ``K`` f32 [3, 3]
``plates.bin``           P recorded frames as JPEG, one after the other
``consent.*``            the recorded person's consent as it was given: a text, a PDF, a picture; may be missing
======================== ==================================================================================

The 14 attribute planes are means xyz, quats wxyz, log-scales, opacity logit, colors rgb (`ATTRIBUTES`). A frame's
planes are ``canonical + sum_k weights[k] * basis_scales[:, k] * bases[:, k]``; `WEIGHTS` are the 20 coefficients that
audio drives and, last, the blink. Nothing in a bundle is executed on reading: no pickles.

That is the profile "huma2", `Avatar`. A bundle of the profile "huma1", `Huma1Avatar`, holds other tensors:

============================ ==============================================================================
``gaussians.safetensors``    ``canonical`` f32 [14, N], ``blink`` f32 [14, N] what shut lids add to it
``triplanes.safetensors``    ``coarse`` f16 [3, 16, 64, 64], ``fine`` f16 [3, 16, 128, 128]: features over the planes
                             yz, xz and xy of the ``box`` f32 [2, 3], its least and its greatest corner
``deformation.safetensors``  `HUMA1_WEIGHTS`: the personal net from speech to each Gaussian's offsets; the last row of
                             a matrix is the bias
============================ ==============================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import simplejpeg
from safetensors import SafetensorError

from talksplat import clock

SCHEMA_VERSION = 1
FORMAT = "talksplat-avatar"

ATTRIBUTES = 14  # means 3, quats 4, log-scales 3, opacity logit 1, colors 3
FEATURES = 128  # of the audio encoder, a frame
HIDDEN = 64  # of the personal head
COEFFICIENTS = 20  # driven by audio
BLINK = COEFFICIENTS  # index of the blink's weight
WEIGHTS = COEFFICIENTS + 1

TRIPLANE_SIZES = (64, 128)  # of the coarse and the fine planes, texels a side
TRIPLANE_CHANNELS = 16
HUMA1_FEATURES = TRIPLANE_CHANNELS * len(TRIPLANE_SIZES)  # of a Gaussian, out of the triplanes
SPEECH_WIDTH = 416  # of a token: Moonshine base's encoder
WINDOW_TOKENS = 37  # of a window of `talksplat.clock`
SPEECH_TOKENS = 12  # that a frame looks at, 24 ms apart
HEADS, KEY, VALUE = 2, 32, 64  # of the attention
HUMA1_WEIGHTS = {
    "speech_in": (SPEECH_WIDTH + 1, VALUE),  # a token of speech -> what attention sees of it
    "positions": (SPEECH_TOKENS + 1, VALUE),  # of the tokens, and a token that says nothing
    "keys_values": (VALUE + 1, HEADS * (KEY + VALUE)),
    "query_base": (HUMA1_FEATURES + 1, HEADS * KEY + VALUE),  # of a Gaussian: its query, and what it adds to the answer
    "mixing": (VALUE + 1, VALUE),
    "offsets_out": (VALUE + 1, ATTRIBUTES),
}

MAX_GAUSSIANS = 200_000
MAX_PLATES = 20_000
MAX_BYTES = 1 << 30  # of all files together
MAX_MANIFEST_BYTES = 1 << 20
MAX_SIZE = 4096  # pixels a side
MAX_CONSENT_BYTES = 16 << 20
CONSENT_KINDS = (".txt", ".md", ".pdf", ".jpg", ".jpeg", ".png")

_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MANIFEST = "avatar.json"
_GAUSSIANS, _PLATES, _PACK = "gaussians.safetensors", "plates.safetensors", "plates.bin"
_ADAPTER = "adapter.safetensors"
_CONSENT = "consent"  # of the manifest, beside "files": who knows nothing of it reads the bundle as before

Float32 = npt.NDArray[np.float32]
T = TypeVar("T")


class BundleError(ValueError):
    """The bundle is damaged, foreign, too new or too large; the message says which and what was expected."""


class ProfileError(BundleError):
    """The bundle is sound, but of another profile than the one that was asked for."""


class SpeechEncoderError(BundleError):
    """The bundle is sound, but it was fitted to another speech encoder than the one that is used."""


class UnknownAvatarError(LookupError):
    """There is no avatar of that id."""


@dataclass(frozen=True)
class Consent:
    """What the recorded person has agreed to, as a file that people read.

    Raises:
        BundleError: on construction, when it is empty, too large or of an unknown kind.
    """

    kind: str  # the file's ending, one of `CONSENT_KINDS`
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _require(self.kind in CONSENT_KINDS, f"a consent file ends with {self.kind!r}, not {', '.join(CONSENT_KINDS)}")
        _require(bool(self.data.strip()), "the consent file is empty")
        _require(
            len(self.data) <= MAX_CONSENT_BYTES,
            f"the consent file is {len(self.data)} bytes, at most {MAX_CONSENT_BYTES} are kept",
        )

    @classmethod
    def load(cls, path: Path) -> Consent:
        """From any file of these kinds.

        Raises:
            BundleError: it can't be one; see the class.
            OSError: the disk refuses it.
        """
        if path.stat().st_size > MAX_CONSENT_BYTES:
            raise BundleError(f"{path} is {path.stat().st_size} bytes, at most {MAX_CONSENT_BYTES} are kept")
        return cls(path.suffix.lower(), path.read_bytes())

    @property
    def name(self) -> str:
        """Of the file in the bundle."""
        return _CONSENT + self.kind


@dataclass(frozen=True, eq=False, kw_only=True)
class AnyAvatar:
    """What the avatars of all profiles have.

    Raises:
        BundleError: on construction, when shapes, dtypes, values or plates do not fit together.
    """

    profile: ClassVar[str]
    model: ClassVar[str]  # Triton's ensemble that animates it
    tensors: ClassVar[Mapping[str, Sequence[str]]]  # the files besides the plates', and the fields that each holds

    id: str
    canonical: Float32  # [14, N]
    plates: Sequence[bytes | memoryview]  # P JPEGs of width x height
    viewmats: Float32  # [P, 4, 4] head frame -> camera, of each plate
    K: Float32  # [3, 3] pixels
    width: int
    height: int
    audio_encoder: str  # that it was fitted to: SHA-256 of its weights; of the profile "huma1", ":" and the layer
    fps: int = clock.FPS
    provenance: Mapping[str, Any] = field(default_factory=dict)
    consent: Consent | None = None

    def __post_init__(self) -> None:
        check_id(self.id, BundleError)
        _require(self.fps == clock.FPS, f"{self.fps} frames per second, expected {clock.FPS}")
        for name, side in (("width", self.width), ("height", self.height)):
            _require(
                0 < side <= MAX_SIZE and side % 8 == 0,
                f"{name} {side} is not a multiple of 8 up to {MAX_SIZE}",
            )
        _require(self.canonical.ndim == 2, f"canonical is {list(self.canonical.shape)}, expected [{ATTRIBUTES}, N]")
        n, p = self.gaussians, len(self.plates)
        _require(0 < n <= MAX_GAUSSIANS, f"{n} Gaussians, expected 1 to {MAX_GAUSSIANS}")
        _require(0 < p <= MAX_PLATES, f"{p} plates, expected 1 to {MAX_PLATES}")
        _check("canonical", self.canonical, np.float32, (ATTRIBUTES, n))
        _check("viewmats", self.viewmats, np.float32, (p, 4, 4))
        _check("K", self.K, np.float32, (3, 3))
        _require(bool(self.K[0, 0] > 0 and self.K[1, 1] > 0), "K has a focal length that is not positive")
        for index, plate in enumerate(self.plates):
            _check_plate(index, plate, self.width, self.height)

    @property
    def gaussians(self) -> int:
        """How many Gaussians, N."""
        return int(self.canonical.shape[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Avatar(AnyAvatar):
    """One avatar of the profile "huma2" as it lies in its bundle; raises as `AnyAvatar` does."""

    profile = "huma2"
    model = "animate"
    tensors: ClassVar = {_GAUSSIANS: ("canonical", "bases", "basis_scales"), _ADAPTER: ("adapter_in", "adapter_out")}

    bases: npt.NDArray[np.int8]  # [14, 21, N]
    basis_scales: Float32  # [14, 21]
    adapter_in: Float32  # [129, 64]
    adapter_out: Float32  # [65, 20]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("bases", self.bases, np.int8, (ATTRIBUTES, WEIGHTS, self.gaussians))
        _check("basis_scales", self.basis_scales, np.float32, (ATTRIBUTES, WEIGHTS))
        _check("adapter_in", self.adapter_in, np.float32, (FEATURES + 1, HIDDEN))
        _check("adapter_out", self.adapter_out, np.float32, (HIDDEN + 1, COEFFICIENTS))


@dataclass(frozen=True, eq=False, kw_only=True)
class Huma1Avatar(AnyAvatar):
    """One avatar of the profile "huma1" as it lies in its bundle; raises as `AnyAvatar` does."""

    profile = "huma1"
    model = "animate_huma1"
    tensors: ClassVar = {
        _GAUSSIANS: ("canonical", "blink"),
        "triplanes.safetensors": ("coarse", "fine", "box"),
        "deformation.safetensors": tuple(HUMA1_WEIGHTS),
    }

    blink: Float32  # [14, N]
    coarse: npt.NDArray[np.float16]  # [3, 16, 64, 64]
    fine: npt.NDArray[np.float16]  # [3, 16, 128, 128]
    box: Float32  # [2, 3] metres
    speech_in: Float32  # the shapes of these stand in `HUMA1_WEIGHTS`
    positions: Float32
    keys_values: Float32
    query_base: Float32
    mixing: Float32
    offsets_out: Float32

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("blink", self.blink, np.float32, (ATTRIBUTES, self.gaussians))
        for name, planes, side in zip(("coarse", "fine"), (self.coarse, self.fine), TRIPLANE_SIZES, strict=True):
            _check(name, planes, np.float16, (3, TRIPLANE_CHANNELS, side, side))
        _check("box", self.box, np.float32, (2, 3))
        _require(bool((self.box[0] < self.box[1]).all()), "box has no volume")
        for name, array in self.deformation.items():
            _check(name, array, np.float32, HUMA1_WEIGHTS[name])

    @property
    def deformation(self) -> dict[str, Float32]:
        """The personal net by the names of `HUMA1_WEIGHTS`."""
        return {name: getattr(self, name) for name in HUMA1_WEIGHTS}

    def require_encoder(self, used: str) -> None:
        """Raise SpeechEncoderError if the avatar is to be driven by another encoder than it was fitted to."""
        if self.audio_encoder != used:
            raise SpeechEncoderError(
                f"avatar {self.id!r} was fitted to another speech encoder, or another layer of it, than the one in "
                "use: fit it again, or export Moonshine base (`talksplat-export models --asr base`) if not"
            )


PROFILES: Mapping[str, type[AnyAvatar]] = {kind.profile: kind for kind in (Avatar, Huma1Avatar)}
A = TypeVar("A", bound=AnyAvatar)


def check_id(avatar_id: str, error: type[Exception] = ValueError) -> str:
    """Return ``avatar_id`` if it can name a bundle, else raise ``error``: an id is never a path."""
    if not _ID.fullmatch(avatar_id):
        raise error(
            f"{avatar_id!r} is no avatar id: expected 1 to 64 of a-z, 0-9, '-', '_', beginning with a letter or digit"
        )
    return avatar_id


def unknown(avatar_id: str) -> UnknownAvatarError:
    """The error that says that there is no such avatar, whether it is not there or is kept from who asks."""
    try:
        check_id(avatar_id, UnknownAvatarError)
    except UnknownAvatarError as error:
        return error
    return UnknownAvatarError(f"there is no avatar {avatar_id!r}")


def available(root: Path) -> list[str]:
    """Ids of the bundles below ``root``, sorted; that one is listed does not mean that it is sound."""
    if not root.is_dir():
        return []
    return sorted(path.parent.name for path in root.glob(f"*/{_MANIFEST}") if _ID.fullmatch(path.parent.name))


def write(avatar: AnyAvatar, root: Path) -> Path:
    """Write ``root/<id>`` in one step: a reader sees the old bundle or the new one, never a part.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: the bundle is too large.
        OSError: the disk refused; nothing is left behind.
    """
    contents = {file: _save({name: getattr(avatar, name) for name in names}) for file, names in avatar.tensors.items()}
    contents[_PLATES] = _save(
        {
            "offsets": np.cumsum([0, *map(len, avatar.plates)], dtype=np.int64),
            "viewmats": avatar.viewmats,
            "K": avatar.K,
        }
    )
    contents[_PACK] = b"".join(avatar.plates)
    recorded = {name: _entry(data) for name, data in contents.items()}
    if avatar.consent is not None:
        contents[avatar.consent.name] = avatar.consent.data
    total = sum(map(len, contents.values()))
    _require(total <= MAX_BYTES, f"the bundle would be {total} bytes, at most {MAX_BYTES} are read")
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "id": avatar.id,
        "profile": avatar.profile,
        "fps": avatar.fps,
        "width": avatar.width,
        "height": avatar.height,
        "audio_encoder": avatar.audio_encoder,
        "provenance": dict(avatar.provenance),
        "files": recorded,
    }
    if avatar.consent is not None:
        manifest[_CONSENT] = {"name": avatar.consent.name, **_entry(avatar.consent.data)}
    contents[_MANIFEST] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    _require_manifest_size(len(contents[_MANIFEST]))

    root.mkdir(parents=True, exist_ok=True)
    target = root / avatar.id
    staging = Path(tempfile.mkdtemp(prefix=f".{avatar.id}-", dir=root))
    try:
        staging.chmod(0o755)
        for name, data in contents.items():
            with (staging / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if target.exists():  # a folder can't be replaced in one call: move the old one aside first
            retired = staging.with_name(staging.name + ".old")
            target.rename(retired)
            try:
                staging.rename(target)
            except BaseException:
                retired.rename(target)
                raise
            shutil.rmtree(retired)
        else:
            staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def _entry(data: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _save(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """As safetensors, which writes memory as it lies: arrays of another order have to be laid out first."""
    return bytes(safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()}))


@overload
def read(root: Path, avatar_id: str) -> Avatar: ...


@overload
def read(root: Path, avatar_id: str, kind: type[A]) -> A: ...


def read(root: Path, avatar_id: str, kind: type[AnyAvatar] = Avatar) -> AnyAvatar:
    """Read and check ``root/<avatar_id>``.

    Args:
        root: the folder of the bundles.
        avatar_id: which.
        kind: the profile that is wanted; `AnyAvatar` takes each.

    Raises:
        UnknownAvatarError: there is none, or the id can't name one.
        ProfileError: it is of another profile.
        BundleError: it is damaged, foreign, too new or too large, or the disk refuses it.
    """
    return _whole(root, avatar_id, lambda folder, manifest: _load(folder, manifest, kind))


def read_adapter(root: Path, avatar_id: str) -> tuple[Float32, Float32]:
    """Read and check ``adapter_in`` [129, 64] and ``adapter_out`` [65, 20] alone; raises as `read` does."""
    return _whole(root, avatar_id, _load_adapter)


def read_consent(root: Path, avatar_id: str) -> Consent | None:
    """Read and check the consent alone; None where there is none. Raises as `read` does."""

    def load(folder: Path, manifest: dict[str, Any]) -> Consent | None:
        if not manifest.get(_CONSENT):
            return None
        [(name, data)] = _contents(folder, manifest, [manifest[_CONSENT]["name"]]).items()
        return Consent(Path(name).suffix, data)

    return _whole(root, avatar_id, load)


def version(root: Path, avatar_id: str) -> tuple[int, int, int]:
    """Something that changes when the bundle is written anew, at the price of one look at the disk.

    Raises:
        UnknownAvatarError: there is none, or the id can't name one.
        BundleError: the disk refuses it.
    """
    path = root / check_id(avatar_id, UnknownAvatarError) / _MANIFEST
    with _errors_name(avatar_id):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise unknown(avatar_id) from None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _errors_name(avatar_id: str) -> Iterator[None]:
    try:
        yield
    except ProfileError:
        raise
    except (BundleError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # the server's paths are nobody's business
        raise BundleError(f"avatar {avatar_id!r} can't be read: {reason}") from error


def _whole(root: Path, avatar_id: str, load: Callable[[Path, dict[str, Any]], T]) -> T:
    """What ``load`` makes of folder and manifest; once more if the bundle was replaced between two of its files."""
    while True:
        found = version(root, avatar_id)
        try:
            with _errors_name(avatar_id):
                return load(*_open(root, avatar_id))
        except BundleError:
            if version(root, avatar_id) == found:
                raise


def _open(root: Path, avatar_id: str) -> tuple[Path, dict[str, Any]]:
    folder = root / avatar_id
    path = folder / _MANIFEST
    _require_manifest_size(path.stat().st_size)
    return folder, _manifest(path.read_bytes(), avatar_id)


def _require_manifest_size(size: int) -> None:
    _require(size <= MAX_MANIFEST_BYTES, f"{_MANIFEST} is {size} bytes, at most {MAX_MANIFEST_BYTES} are read")


def _manifest(text: bytes, avatar_id: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{_MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f'{_MANIFEST} is not of format "{FORMAT}": something else wrote it')
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"schema_version is {version!r}, expected a whole number from 1")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"its schema version is {version}, this talksplat reads up to {SCHEMA_VERSION}: update talksplat"
        )
    _require(manifest.get("id") == avatar_id, f"it says it is {manifest.get('id')!r}: the folder was renamed")
    for key, kind in (
        ("width", int),
        ("height", int),
        ("fps", int),
        ("profile", str),
        ("audio_encoder", str),
    ):
        _require(isinstance(manifest.get(key), kind), f"{key!r} is missing or not of type {kind.__name__}")
    profile = manifest["profile"]
    _require(profile in PROFILES, f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    expected = [*PROFILES[profile].tensors, _PLATES, _PACK]
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(expected):
        raise BundleError(f'"files" must list exactly {", ".join(expected)}')
    consent = manifest.get(_CONSENT)
    if consent is not None:
        names = [_CONSENT + kind for kind in CONSENT_KINDS]
        _require(isinstance(consent, dict), f'"{_CONSENT}" is no object')
        _require(consent.get("name") in names, f'"{_CONSENT}" names {consent.get("name")!r}: none of {names}')
    return manifest


def _require_profile(manifest: dict[str, Any], kind: type[AnyAvatar]) -> None:
    found = PROFILES[manifest["profile"]]
    if not issubclass(found, kind):
        raise ProfileError(
            f"avatar {manifest['id']!r} is of the profile {found.profile}, not {kind.profile}: "
            f"the model {found.model} animates it"
        )


def _contents(folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    total = 0
    for name in names:
        entry = manifest["files"].get(name, manifest.get(_CONSENT))
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise BundleError(f"{name} is missing") from None
        total += size
        _require(total <= MAX_BYTES, f"it holds more than {MAX_BYTES} bytes")
        _require(isinstance(entry, dict) and size == entry.get("bytes"), f"{name} is {size} bytes, not as recorded")
        contents[name] = path.read_bytes()
        digest = hashlib.sha256(contents[name]).hexdigest()
        _require(digest == entry.get("sha256"), f"{name} is damaged: its SHA-256 differs from the recorded one")
    return contents


def _load(folder: Path, manifest: dict[str, Any], kind: type[AnyAvatar]) -> AnyAvatar:
    _require_profile(manifest, kind)
    found = PROFILES[manifest["profile"]]
    consent = [manifest[_CONSENT]["name"]] if manifest.get(_CONSENT) else []
    contents = _contents(folder, manifest, [*found.tensors, _PLATES, _PACK, *consent])
    try:
        plates = safetensors.numpy.load(contents[_PLATES])
        tensors: dict[str, Any] = {}
        for file, names in found.tensors.items():
            arrays = safetensors.numpy.load(contents[file])
            tensors |= {name: arrays[name] for name in names}
        offsets, pack = plates["offsets"], memoryview(contents[_PACK])
        _require(
            offsets.dtype == np.int64
            and offsets.ndim == 1
            and 2 <= len(offsets) <= MAX_PLATES + 1
            and offsets[0] == 0
            and offsets[-1] == len(pack)
            and bool((np.diff(offsets) > 0).all()),
            "the plates' offsets do not rise from 0 to the size of the pack",
        )
        return found(
            id=manifest["id"],
            **tensors,
            plates=[pack[a:b] for a, b in itertools.pairwise(offsets)],
            viewmats=plates["viewmats"],
            K=plates["K"],
            width=manifest["width"],
            height=manifest["height"],
            audio_encoder=manifest["audio_encoder"],
            fps=manifest["fps"],
            provenance=manifest.get("provenance") or {},
            consent=Consent(Path(consent[0]).suffix, contents[consent[0]]) if consent else None,
        )
    except SafetensorError as error:
        raise BundleError(f"a tensor file is malformed ({error})") from error
    except (KeyError, TypeError) as error:
        raise BundleError(f"a tensor file holds other tensors than expected ({error})") from error


def _load_adapter(folder: Path, manifest: dict[str, Any]) -> tuple[Float32, Float32]:
    _require_profile(manifest, Avatar)
    contents = _contents(folder, manifest, [_ADAPTER])
    try:
        tensors = safetensors.numpy.load(contents[_ADAPTER])
        adapter_in, adapter_out = tensors["adapter_in"], tensors["adapter_out"]
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{_ADAPTER} is malformed ({error})") from error
    _check("adapter_in", adapter_in, np.float32, (FEATURES + 1, HIDDEN))
    _check("adapter_out", adapter_out, np.float32, (HIDDEN + 1, COEFFICIENTS))
    return adapter_in, adapter_out


def _check_plate(index: int, plate: bytes | memoryview, width: int, height: int) -> None:
    try:
        found_height, found_width, *_ = simplejpeg.decode_jpeg_header(plate)
    except ValueError as error:
        raise BundleError(f"plate {index} is no JPEG ({error})") from error
    if (found_width, found_height) != (width, height):
        raise BundleError(f"plate {index} is {found_width}x{found_height}, expected {width}x{height}")


def _check(name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise BundleError(f"{name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {list(shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BundleError(f"{name} holds NaN or infinity")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)
