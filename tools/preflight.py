"""Say in one sentence what this machine lacks before anything is installed; silent when nothing is missing.

Any Python 3 runs it, without an environment: ``python3 tools/preflight.py``.
"""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> "str | None":
    """The first thing that is missing, as a sentence that says what to do; None when all is there."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return (
            f"The embedded Triton runs on Linux x86-64 and this is {sys.platform} {platform.machine()}: "
            "use such a machine, or a Linux container on it."
        )
    version = "{}.{}".format(*sys.version_info)
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        return (
            f"Python 3.11 or 3.12 is needed and {sys.executable} is {version}: "
            "install one (Debian 12, Ubuntu 24.04: apt install python3) or name it, make PYTHON=/path/to/python3.12."
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        return f"Python's venv module is missing: apt install python{version}-venv."
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python's C headers are missing: apt install python{version}-dev."
    named = os.environ.get("CXX", "").split()[:1]  # options may follow
    if not any(map(shutil.which, named or ("c++", "g++", "clang++"))):
        missing_one = f"The C++ compiler {named[0]}, named by CXX," if named else "A C++ compiler"
        return f"{missing_one} is missing: apt install g++ (or name yours in the variable CXX)."
    return None


if __name__ == "__main__":
    sys.exit(missing())
