"""docker-compose.yml, read as Compose reads it, as far as the file makes use of that."""

import re
from typing import Any, TypeAlias

import yaml

from talksplat.server import ROOT

FILE = ROOT / "docker-compose.yml"

Document: TypeAlias = dict[str, Any]


class UnsetError(Exception):
    """A variable that has to be set is not; the message is the file's."""


def load(environment: dict[str, str]) -> Document:
    """The document with ``${NAME:-default}``, ``${NAME:?message}`` and ``$$`` replaced; any other $ is a ValueError."""
    text = FILE.read_text()

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if found[0] == "$$":
            return "$"
        if name is None:
            raise ValueError(f"{text[found.start() : found.start() + 20]!r} is none of the forms")
        if environment.get(name):
            return environment[name]
        if kind == ":?":
            raise UnsetError(f"{name} {rest}")
        return str(rest)

    document: Document = yaml.safe_load(re.sub(r"\$\$|\$\{(\w+)(:-|:\?)([^}]+)\}|\$", value, text))
    return document
