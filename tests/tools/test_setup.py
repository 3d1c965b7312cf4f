"""What a newcomer meets first: `make` on a machine that lacks something, or where it was stopped half-way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of one as the set-up looks at."""
    files = ["Makefile", "constraints.txt", "CMakeLists.txt", "tools/preflight.py"]
    for name in [*files, "pyproject.toml", "client/pyproject.toml", "export/pyproject.toml"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(checkout: Path, *arguments: str, **environment: str) -> str:
    """What a failing `make` says."""
    done = subprocess.run(
        ["make", "-C", checkout, *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode, done.stdout
    return done.stderr


def fake_python(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def preflight(path: Path, **environment: str) -> str:
    """What it says where only the programs in ``path`` can be found."""
    command = [sys.executable, str(ROOT / "tools" / "preflight.py")]
    done = subprocess.run(command, env={"PATH": str(path)} | environment, capture_output=True, text=True)
    return done.stderr


def test_a_missing_python_is_one_sentence(checkout: Path) -> None:
    said = make(checkout, "models", "PYTHON=/missing/python3")
    assert "There is no /missing/python3: install Python 3.11 or 3.12" in said
    assert not (checkout / ".venv").exists()


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    assert preflight(tmp_path) == "A C++ compiler is missing: apt install g++ (or name yours in the variable CXX).\n"


def test_a_compiler_that_is_named_must_be_there(tmp_path: Path) -> None:
    assert preflight(tmp_path, CXX="/missing/g++ -O2").startswith("The C++ compiler /missing/g++, named by CXX,")
    own = fake_python(tmp_path / "own-c++")
    assert preflight(tmp_path, CXX=f"{own} -O2") == ""


def test_an_environment_without_pip_is_made_anew(checkout: Path) -> None:
    """`make` may have been stopped between the environment's Python and its pip."""
    fake_python(checkout / ".venv" / "bin" / "python", "exit 1")
    asked = checkout / "asked"
    python = fake_python(checkout / "python", f'echo "$@" >> {asked}', 'case "$2" in venv) exit 1; esac')
    make(checkout, "models", f"PYTHON={python}")
    assert asked.read_text().splitlines() == ["tools/preflight.py", "-m venv --clear .venv"]
