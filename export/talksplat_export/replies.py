"""`talksplat-export replies`: how to say the script's sentences, so that they can be said without a phonemiser.

Writes `model_repository/tts/1/replies.json`, a JSON object of sentences and their IPA, from every `says` of the script
in `conversation.json`. Needs espeak-ng (GPL-3, in a process of its own); what was written does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import resources
from pathlib import Path

from talksplat.phonemiser import Espeak, PhonemiserError
from talksplat_client import sentences

from ._onnx import write
from .feeds import REPOSITORY

REPLIES = REPOSITORY / "tts" / "1" / "replies.json"


def script() -> list[str]:
    """Every sentence that the scripted responder may say, each once."""
    conversation = json.loads(resources.files("talksplat_client").joinpath("conversation.json").read_text("utf-8"))
    said = (sentence for rule in conversation["script"] for sentence in sentences(rule["says"]))
    return list(dict.fromkeys(said))


def prepare(path: Path = REPLIES) -> dict[str, str]:
    """Write the file; what is in it.

    Raises:
        PhonemiserError: espeak-ng is not installed, or fails.
        OSError: the file can't be written.
    """
    with Espeak() as espeak:
        replies = {sentence: " ".join(espeak.ipa(sentence)) for sentence in script()}
    write(path, (json.dumps(replies, ensure_ascii=False, indent=1) + "\n").encode())
    return replies


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("replies", help="how to say the script without a phonemiser", description=__doc__)
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    try:
        replies = prepare()
    except (PhonemiserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{REPLIES}: {len(replies)} sentences")
    return 0
