"""The label, the metadata and the signed credentials of written files."""

from __future__ import annotations

import datetime
import io
import json
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import c2pa
import numpy as np
import numpy.typing as npt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from talksplat_client import Credentials, Disclosure, Frame, InvalidRequestError, MissingExtraError, file_writer
from talksplat_client._disclosure import SOURCE_TYPE, SOURCE_TYPES, draw_label, with_xmp

SIZE = 256
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
PLACES = ("out.mp4", "out.webm", "out.webp", "frames/%d.png", "frames/%d.jpg")


def write(path: Path, disclosure: Disclosure, grey: int = 128) -> Path:
    """Three grey frames; returns the file, or the first picture."""
    with file_writer(path, sample_rate=16_000, disclosure=disclosure) as file:
        file.write_audio(np.zeros(1920, np.float32))
        for index in range(3):
            file.write(Frame(index, index / 25, 0.0, "raw", bytes([grey]) * (SIZE * SIZE * 3)))
    return Path(str(path).replace("%d", "0"))


def first_picture(path: Path) -> npt.NDArray[np.uint8]:
    if path.suffix == ".webp":
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    with av.open(str(path)) as container:
        return np.asarray(next(container.decode(video=0)).to_ndarray(format="rgb24"), np.uint8)


@pytest.mark.parametrize("grey", [0, 128, 255])
@pytest.mark.parametrize("name", PLACES)
def test_every_file_has_a_label_in_its_corner_and_nowhere_else(tmp_path: Path, name: str, grey: int) -> None:
    pixels = first_picture(write(tmp_path / name, Disclosure("kim"), grey)).astype(int)
    corner = pixels[-30:, -40:]
    assert corner.max() > 230
    assert corner.min() < 100  # white on dark, whatever was there
    assert np.abs(corner - corner.mean(axis=2, keepdims=True)).max() < 12  # without colour
    pixels[-30:, -40:] = grey
    assert np.abs(pixels - grey).max() < 12


@pytest.mark.parametrize("name", PLACES)
def test_a_label_can_be_left_out(tmp_path: Path, name: str) -> None:
    pixels = first_picture(write(tmp_path / name, Disclosure("kim", label=False))).astype(int)
    assert np.abs(pixels - 128).max() < 6


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    divisors=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    background=st.integers(0, 255),
)
def test_a_label_fits_any_picture(height: int, width: int, divisors: tuple[int, int], background: int) -> None:
    rows, columns = divisors
    luma = np.full((height * rows, width * columns), background, np.uint8)
    chroma = np.full((height, width), background, np.uint8)
    draw_label((luma, chroma, chroma.copy()))
    if min(luma.shape) >= 24:
        assert luma.max() >= 200  # letters
        assert (luma != background).any()
        assert (luma[: luma.shape[0] // 4] == background).all()


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_a_film_says_in_its_tags_what_it_shows(tmp_path: Path, name: str) -> None:
    with av.open(str(write(tmp_path / name, Disclosure("kim")))) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    assert re.match(r"AI-generated: the avatar kim, animated by talksplat \d", tags["comment"])
    assert f"{SOURCE_TYPES}{SOURCE_TYPE}" in tags["comment"]
    assert tags["title"] == "kim, AI-generated"


def xmp_of(path: Path) -> bytes:
    """The XMP packet, found as the format's specification says."""
    data = path.read_bytes()
    if path.suffix == ".mp4":
        at = 0
        while at < len(data):
            size, kind = struct.unpack(">I4s", data[at : at + 8])
            if kind == b"uuid" and data[at + 8 : at + 24].hex().upper() == "BE7ACFCB97A942E89C71999491E3AFAC":
                return data[at + 24 : at + size]
            at += size
        raise AssertionError("no box")
    with Image.open(path) as image:
        image.load()
        found = image.info.get("xmp") or image.info["XML:com.adobe.xmp"]
        return found.encode() if isinstance(found, str) else found


@pytest.mark.parametrize("name", ["out.mp4", "out.webp", "frames/%d.png", "frames/%d.jpg"])
def test_files_carry_iptc_s_digital_source_type_as_xmp(tmp_path: Path, name: str) -> None:
    avatar = 'kim & "lee" <\'>'
    packet = xmp_of(write(tmp_path / name, Disclosure(avatar))).decode().strip()
    [description] = ET.fromstring(packet.removeprefix("\ufeff")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.attrib[IPTC] == f"{SOURCE_TYPES}{SOURCE_TYPE}"
    assert avatar in description.attrib["{http://ns.adobe.com/photoshop/1.0/}Headline"]
    assert description.attrib["{http://ns.adobe.com/xap/1.0/}CreatorTool"].startswith("talksplat ")


@given(xmp=st.binary(max_size=300))
def test_metadata_leave_a_picture_readable(xmp: bytes) -> None:
    for form, more in (("png", ()), ("jpeg", ()), ("webp", ()), ("webp", ("blue",))):
        out = io.BytesIO()
        red, *others = (Image.new("RGB", (8, 24), color) for color in ("red", *more))
        red.save(out, form, **({"save_all": True, "append_images": others} if others else {}))
        with Image.open(io.BytesIO(with_xmp(form, out.getvalue(), xmp))) as image:
            assert image.size == (8, 24)
            assert image.convert("RGB").getpixel((4, 4))[0] > 200  # type: ignore[index]  # a tuple: it is RGB


def make_signer(folder: Path, key: Any, digest: hashes.HashAlgorithm | None) -> Credentials:
    """A test signer and the authority that vouches for it; nobody trusts that one."""
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    above = ec.generate_private_key(ec.SECP256R1())

    def name(text: str) -> x509.Name:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "talksplat"), x509.NameAttribute(NameOID.COMMON_NAME, text)]
        )

    def certificate(subject: str, public: Any, issuer_key: Any, *, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False),
                critical=True,
            )
        )
        if not authority:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=True
            )
        return builder.sign(issuer_key, hashes.SHA256())

    chain = [
        certificate("test signer", key.public_key(), above, authority=False),
        certificate("test authority", above.public_key(), above, authority=True),
    ]
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(each.public_bytes(pem) for each in chain))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Credentials(folder / "chain.pem", folder / "key.pem")


@pytest.fixture
def signer(tmp_path: Path) -> Credentials:
    folder = tmp_path / "signer"
    folder.mkdir()
    return make_signer(folder, ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())


def read_back(path: Path) -> tuple[str, dict[str, Any], set[str]]:
    """State, active manifest, and the codes of what failed."""
    with c2pa.Reader(path) as reader:
        found = json.loads(reader.json())
        state = reader.get_validation_state()
    failures = found["validation_results"]["activeManifest"]["failure"]
    return state, found["manifests"][found["active_manifest"]], {each["code"] for each in failures}


@pytest.mark.parametrize("name", ["out.mp4", "out.webp", "frames/%d.png", "frames/%d.jpg"])
def test_signed_files_can_be_validated_and_say_what_they_are(tmp_path: Path, name: str, signer: Credentials) -> None:
    path = write(tmp_path / name, Disclosure("kim", credentials=signer))
    state, manifest, failures = read_back(path)
    # The content and the signature are right; who signed is known to nobody, and the reader says so.
    assert (state, failures) == ("Valid", {"signingCredential.untrusted"})
    [actions] = [each for each in manifest["assertions"] if each["label"].startswith("c2pa.actions")]
    [created] = [each for each in actions["data"]["actions"] if each["action"] == "c2pa.created"]
    assert created["digitalSourceType"] == f"{SOURCE_TYPES}{SOURCE_TYPE}"
    assert manifest["title"] == path.name
    assert manifest["claim_generator_info"][0]["name"] == "talksplat"
    assert first_picture(path).shape == (SIZE, SIZE, 3)
    assert {each.name for each in tmp_path.iterdir()} == {"signer", name.split("/")[0]}


def test_a_signed_film_that_was_changed_is_found_out(tmp_path: Path, signer: Credentials) -> None:
    path = write(tmp_path / "out.mp4", Disclosure("kim", credentials=signer))
    data = bytearray(path.read_bytes())
    data[data.index(b"mdat") + 100] ^= 1
    path.write_bytes(data)
    state, _, failures = read_back(path)
    assert state == "Invalid"
    assert "assertion.bmffHash.mismatch" in failures


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["P-384", "RSA", "Ed25519"],
)
def test_the_key_says_how_it_signs(tmp_path: Path, make: Callable[[], Any]) -> None:
    path = write(tmp_path / "out.mp4", Disclosure(credentials=make_signer(tmp_path, make(), None)))
    assert read_back(path)[0] == "Valid"


def test_a_signer_that_can_not_sign_is_said_and_no_file_is_left(tmp_path: Path, signer: Credentials) -> None:
    (tmp_path / "signer" / "text.pem").write_text("no key")
    other = tmp_path / "signer" / "other"
    other.mkdir()
    strange = make_signer(other, ed25519.Ed25519PrivateKey.generate(), None)
    for credentials, reason in (
        (Credentials(tmp_path / "none.pem", signer.key), r"none\.pem can't be used: No such file"),
        (Credentials(signer.certificate, tmp_path / "signer" / "text.pem"), "can't sign content credentials"),
        (Credentials(signer.certificate, strange.key), "can't sign content credentials"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            write(tmp_path / "out.mp4", Disclosure("kim", credentials=credentials))
        assert {each.name for each in tmp_path.iterdir()} == {"signer"}


def test_without_the_extra_it_is_said_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signer: Credentials
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MissingExtraError, match=r"c2pa-python: pip install 'talksplat-client\[c2pa\]'"):
        write(tmp_path / "out.mp4", Disclosure(credentials=signer))


def test_a_certificate_as_openssl_makes_it_will_do(tmp_path: Path) -> None:
    """One command is enough for who wants to try it."""
    files = ("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem"))
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-noenc",
                "-days",
                "2",
            ),
            *("-subj", "/O=talksplat/CN=test", *files),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=critical,digitalSignature"),
            *("-addext", "extendedKeyUsage=emailProtection", "-addext", "authorityKeyIdentifier=keyid:always"),
        ],
        check=True,
        capture_output=True,
    )
    signer = Credentials(tmp_path / "certificate.pem", tmp_path / "key.pem")
    state, _, failures = read_back(write(tmp_path / "out.mp4", Disclosure(credentials=signer)))
    assert (state, failures) == ("Valid", {"signingCredential.untrusted"})
