"""A Dockerfile, read: its stages and their instructions."""

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    word: str  # such as COPY
    rest: str


@dataclass(frozen=True)
class Stage:
    name: str
    base: str  # an image, or another stage's name
    instructions: list[Instruction] = field(default_factory=list)


class Dockerfile:
    """What is written before the first stage is in `defaults`: the arguments that bases may be named by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.defaults: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M)
        stage = None
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                base, _, name = rest.partition(" AS ")
                stage = self.stages[name] = Stage(name, base)
            elif word == "ARG" and stage is None:
                key, _, value = rest.partition("=")
                self.defaults[key] = value
            elif word:
                assert stage is not None, f"{line} before the first stage"
                stage.instructions.append(Instruction(word, rest.strip()))

    @staticmethod
    def expand(text: str, values: dict[str, str]) -> str:
        """With ``${NAME}`` and ``$NAME`` replaced by those that are known."""
        return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), text)
