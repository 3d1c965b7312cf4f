"""Text to IPA by espeak-ng, in a process of its own: it is GPL-3, so nothing else of talksplat loads it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DEADLINE = 5.0  # seconds for an answer; a sentence takes a few milliseconds


class PhonemiserError(RuntimeError):
    """espeak-ng died, took too long, or refuses a voice."""


class MissingPhonemiserError(PhonemiserError):
    """espeak-ng is not installed; the message says how it can be."""


class Espeak:
    """espeak-ng as `_espeak.py` runs it; a context manager. It starts when first asked, and again where it has died.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def start(self) -> None:
        """Start the process ahead of the first text, unless it runs, without waiting for it.

        Raises:
            MissingPhonemiserError: the wheel espeakng-loader is not installed.
            PhonemiserError: no process can be started.
        """
        self._running()

    def ipa(self, text: str, voice: str = "en-us") -> list[str]:
        """The IPA of each sentence of ``text``, punctuation kept: what Piper voices are trained on.

        Raises:
            MissingPhonemiserError: the wheel espeakng-loader is not installed.
            PhonemiserError: espeak-ng failed.
        """
        sentences: list[str] = self.ask(voice=voice, text=text)[0]["sentences"]
        return sentences

    def ask(self, **request: Any) -> tuple[dict[str, Any], bytes]:
        """The answer to a request, and the samples after it; see `_espeak.py`. Errors as of `ipa`."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(DEADLINE, process.kill)  # which ends whatever is waited for
        late.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            size = 2 * answer.get("samples", 0)
            samples = process.stdout.read(size)
            if len(samples) < size:
                raise EOFError
        except (OSError, ValueError, EOFError) as error:
            self.close()
            raise PhonemiserError(f"espeak-ng died, or took more than {DEADLINE:g} s.") from error
        finally:
            late.cancel()
        if "error" in answer:
            raise PhonemiserError(f"espeak-ng: {answer['error']}")
        return answer, samples

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            if importlib.util.find_spec("espeakng_loader") is None:
                raise MissingPhonemiserError("espeak-ng (GPL-3) is needed: make voice, or pip install espeakng-loader.")
            self.close()
            script = Path(__file__).with_name("_espeak.py")
            command = [sys.executable, str(script)]
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            except OSError as error:
                raise PhonemiserError(f"espeak-ng can't be started: {error}") from error
        return self._process
