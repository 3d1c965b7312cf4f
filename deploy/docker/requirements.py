"""The third-party packages that projects of this repository ask for, a line each, as their pyproject.toml says.

python3 deploy/docker/requirements.py . './export[gpu]' --without nvidia-pytriton
"""

import argparse
import re
import tomllib
from pathlib import Path


def wanted(project: str) -> list[str]:
    """The requirements of a folder, and of the extras named behind it: ``./export[gpu]``."""
    folder, _, extras = project.rstrip("]").partition("[")
    table = tomllib.loads(Path(folder, "pyproject.toml").read_text())["project"]
    chosen = [table["optional-dependencies"][extra] for extra in filter(None, extras.split(","))]
    return [*table["dependencies"], *(each for requirements in chosen for each in requirements)]


def name(requirement: str) -> str:
    """Of the package, as indexes have it."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("projects", nargs="+", metavar="FOLDER[EXTRA]")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME")
    arguments = parser.parse_args()
    left_out = {"talksplat", *arguments.without}  # its own packages come after the others
    every = {requirement for project in arguments.projects for requirement in wanted(project)}
    print("\n".join(sorted(requirement for requirement in every if name(requirement) not in left_out)))
