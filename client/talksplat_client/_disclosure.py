"""What tells people and programs that a picture is an avatar's: a label in the corner, metadata, signed credentials.

Written files carry it. Frames that are streamed live are not marked here: who shows them, such as the page, marks them.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from ._audio import Samples
from ._exceptions import InvalidRequestError
from ._extras import import_package

SOURCE_TYPE = "compositeWithTrainedAlgorithmicMedia"  # recorded plates and sound, animated by a trained net
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"  # of IPTC; XMP, C2PA and containers all name it so

LABEL_HEIGHT, LABEL_LEAST = 0.06, 12  # of the picture's height, pixels
LABEL_WIDTH, LABEL_MARGIN, LABEL_RADIUS = 1.35, 0.35, 0.25  # of the label's height
BOX_LUMA, BOX_OPACITY, LETTER_LUMA = 16, 0.7, 255
STROKE = 0.055  # half of a stroke's width
# "AI" is straight strokes from (x, y) to (x, y), in heights of the label: no font is needed.
STROKES = (
    ((0.24, 0.77), (0.48, 0.23)),
    ((0.48, 0.23), (0.72, 0.77)),
    ((0.335, 0.59), (0.625, 0.59)),
    ((1.03, 0.23), (1.03, 0.77)),
)

XMP_UUID = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")  # of XMP's box in MP4 (XMP specification, part 3)
XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
SIGNABLE = {"mp4": "video/mp4", "webp": "image/webp", "png": "image/png", "jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Credentials:
    """Who signs written files as C2PA content credentials, which needs the extra ``c2pa``.

    Args:
        certificate: PEM file: the signer's certificate, then those up to the authority.
        key: PEM file of its private key: EC (P-256, P-384, P-521), RSA or Ed25519.
    """

    certificate: Path | str
    key: Path | str

    def check(self) -> None:
        """Raise now what `sign` would raise, as far as certificate and key show it."""
        with self._signer():
            pass

    def sign(self, source: Path, target: Path, form: str, title: str, description: str) -> None:
        """Write ``source`` with credentials to ``target``.

        Raises:
            MissingExtraError: c2pa-python is not installed.
            InvalidRequestError: certificate and key can't sign, or there are no credentials in this format.
        """
        c2pa = _c2pa()
        require_signable(form)
        manifest = {
            "claim_generator_info": [{"name": "talksplat", "version": version("talksplat-client")}],
            "title": title,
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {
                        "actions": [
                            {
                                "action": "c2pa.created",
                                "digitalSourceType": SOURCE_TYPES + SOURCE_TYPE,
                                "description": description,
                            }
                        ]
                    },
                }
            ],
        }
        with (
            self._signer() as signer,
            c2pa.Builder(json.dumps(manifest)) as builder,
            source.open("rb") as unsigned,
            target.open("w+b") as signed,
        ):
            builder.sign(signer, SIGNABLE[form], unsigned, signed)

    @contextlib.contextmanager
    def _signer(self) -> Iterator[Any]:  # c2pa.Signer
        """What signs; refusals while it is used are those of `sign`."""
        c2pa = _c2pa()
        try:
            certificate, key = Path(self.certificate).read_bytes(), Path(self.key).read_bytes()
            info = c2pa.C2paSignerInfo(_algorithm(key), certificate, key, None)
            with c2pa.Signer.from_info(info) as signer:
                yield signer
        except (c2pa.C2paError, ValueError, TypeError) as error:  # TypeError: the key has a password
            raise InvalidRequestError(
                f"{self.certificate} and {self.key} can't sign content credentials: {error}"
            ) from error
        except OSError as error:
            if error.filename not in (str(self.certificate), str(self.key)):  # what is to be signed, or the disk
                raise
            raise InvalidRequestError(f"{error.filename} can't be used: {error.strerror}") from error


@dataclass(frozen=True)
class Disclosure:
    """How a written file says that it shows an avatar. Metadata say so always.

    Args:
        avatar: id of the avatar.
        label: whether "AI" stands in the lower right corner. The law may ask for it: in the EU, article 50 of the AI
            Act.
        credentials: who signs.
    """

    avatar: str | None = None
    label: bool = True
    credentials: Credentials | None = None

    @property
    def tool(self) -> str:
        """What has made the file."""
        return f"talksplat {version('talksplat-client')}"

    @property
    def description(self) -> str:
        """A sentence."""
        who = f"the avatar {self.avatar}" if self.avatar else "an avatar"
        return f"AI-generated: {who}, animated by {self.tool}."

    @property
    def tags(self) -> dict[str, str]:
        """For containers that hold names and values."""
        return {
            "title": f"{self.avatar or 'An avatar'}, AI-generated",
            "comment": f"{self.description} DigitalSourceType: {SOURCE_TYPES}{SOURCE_TYPE}",
            "description": self.description,
        }

    @property
    def xmp(self) -> bytes:
        """An XMP packet with IPTC's DigitalSourceType."""
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
            ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
            ' xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"'
            f" Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPES + SOURCE_TYPE)}"
            f" xmp:CreatorTool={quoteattr(self.tool)} photoshop:Headline={quoteattr(self.description)}/>"
            '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
        ).encode()


def require_signable(form: str) -> None:
    """Raise InvalidRequestError if C2PA knows no credentials in files of this format."""
    if form not in SIGNABLE:
        raise InvalidRequestError(f"{form} files take no content credentials, expected one of {', '.join(SIGNABLE)}")


def with_xmp(form: str, data: bytes, xmp: bytes) -> bytes:
    """A PNG, JPEG or WebP file with an XMP packet in it."""
    return _EMBED[form](data, xmp)


def mp4_box(xmp: bytes) -> bytes:
    """What an XMP packet is in an MP4: a box that may stand at its end."""
    return struct.pack(">I4s", 24 + len(xmp), b"uuid") + XMP_UUID + xmp


def draw_label(
    planes: tuple[npt.NDArray[np.uint8], ...],  # Y [H, W], U and V [h, w], full range; changed in place
) -> None:
    """Write "AI" into the lower right corner: white on a box that darkens what is behind it."""
    luma, *chroma = planes
    height, width = luma.shape
    value, opacity = _label(height, width)
    _blend(luma, value, opacity)
    for plane in chroma:  # grey, as far as the label covers each of its larger pixels
        rows, columns = height // plane.shape[0], width // plane.shape[1]
        padded = np.pad(opacity, ((-opacity.shape[0] % rows, 0), (-opacity.shape[1] % columns, 0)))
        coarse = padded.reshape(padded.shape[0] // rows, rows, -1, columns).mean(axis=(1, 3), dtype=np.float32)
        _blend(plane, np.full_like(coarse, 128), coarse)


@cache
def _label(height: int, width: int) -> tuple[Samples, Samples]:
    """Luma and opacity [h, w] of the lower right corner of a picture."""
    size = max(round(LABEL_HEIGHT * min(height, width)), LABEL_LEAST)
    margin = round(LABEL_MARGIN * size)
    shape = min(size + margin, height), min(round(LABEL_WIDTH * size) + margin, width)
    y, x = ((np.arange(side) + 0.5) / size for side in shape)
    x, y = np.meshgrid(x, y)

    def covered(distance: npt.NDArray[Any]) -> Samples:  # of each pixel, by what begins at this distance
        return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)

    corner_x = np.abs(x - LABEL_WIDTH / 2) - LABEL_WIDTH / 2 + LABEL_RADIUS
    corner_y = np.abs(y - 0.5) - 0.5 + LABEL_RADIUS
    box = covered(np.hypot(np.maximum(corner_x, 0), np.maximum(corner_y, 0)) - LABEL_RADIUS)
    strokes = []
    for (x0, y0), (x1, y1) in STROKES:
        along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
        along = np.clip(along, 0, 1)
        strokes.append(covered(np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) - STROKE))
    letters = np.max(strokes, axis=0)
    return BOX_LUMA + letters * (LETTER_LUMA - BOX_LUMA), np.maximum(letters, BOX_OPACITY * box)


def _blend(plane: npt.NDArray[np.uint8], value: Samples, opacity: Samples) -> None:
    corner = plane[plane.shape[0] - value.shape[0] :, plane.shape[1] - value.shape[1] :]
    corner[:] = np.round(corner + (value - corner) * opacity)


def _png(data: bytes, xmp: bytes) -> bytes:
    chunk = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + xmp
    text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    after = 8 + 25  # the signature, and IHDR
    return data[:after] + text + data[after:]


def _jpeg(data: bytes, xmp: bytes) -> bytes:
    segment = XMP_JPEG + xmp
    after = 2  # the start of the image, and JFIF's segment, which wants to be the first
    if data[2:4] == b"\xff\xe0":
        after += 2 + int.from_bytes(data[4:6], "big")
    return data[:after] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[after:]


def _webp(data: bytes, xmp: bytes) -> bytes:
    if data[12:16] == b"VP8 ":  # the simple format, which a single picture gets, has no room for metadata
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
        sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
        data = data[:12] + b"VP8X" + struct.pack("<II", 10, 0) + sides + data[12:]
    xmp += b" " * (len(xmp) % 2)  # chunks are of even length
    whole = bytearray(data + b"XMP " + struct.pack("<I", len(xmp)) + xmp)
    whole[20] |= 4  # there is XMP
    whole[4:8] = struct.pack("<I", len(whole) - 8)
    return bytes(whole)


_EMBED: dict[str, Callable[[bytes, bytes], bytes]] = {"png": _png, "jpeg": _jpeg, "webp": _webp}


def _c2pa() -> Any:
    return import_package("c2pa", "signing content credentials", package="c2pa-python", extra="c2pa")


def _algorithm(key: bytes) -> bytes:
    """C2PA's name of what a private key signs with."""
    from cryptography.hazmat.primitives import serialization  # c2pa-python needs it, too
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    private = serialization.load_pem_private_key(key, None)
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.key_size in (256, 384, 521):
        return {256: b"es256", 384: b"es384", 521: b"es512"}[private.curve.key_size]
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    raise ValueError("the key is neither EC P-256, P-384, P-521 nor RSA nor Ed25519")
