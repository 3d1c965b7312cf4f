"""espeak-ng as a process of its own: it is GPL-3, so nothing else of talksplat loads it.

Reads one JSON object a line from standard input and answers each with one JSON line on standard output:

- ``{"voice", "text"}`` -> ``{"sentences"}``: the IPA of each sentence, punctuation kept.
- ``{"voice", "text", "rate", "pitch"}`` -> ``{"sample_rate", "samples", "phonemes"}``, then ``samples`` int16 values as
  raw bytes; ``phonemes`` is ``[[start in seconds, IPA], ...]``, an empty IPA string is a pause.

A request that fails is answered with ``{"error"}``. ``rate`` is in words a minute, ``pitch`` from 0 to 100
(espeak-ng's units). The C interface is documented in espeak-ng's ``speak_lib.h``.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import espeakng_loader
import numpy as np
import numpy.typing as npt

_OUTPUT_SYNCHRONOUS = 2  # samples go to the callback, nothing is played
_INITIALIZE_PHONEME_EVENTS, _INITIALIZE_PHONEME_IPA = 1, 2
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_CHARS_UTF8, _PHONEMES_IPA = 1, 2
_RATE, _PITCH = 1, 3

# One clause ends here; espeak drops the mark and leaves its pointer up to a letter into the next clause.
# A mark in a number or after an abbreviation ends nothing.
_GO_ON = "".join(rf"(?<!\b{each})" for each in ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "vs", r"e\.g", r"i\.e"))
_CLAUSE = re.compile(rf".+?(?:{_GO_ON}[,.;:!?]+(?=\s|$)|$)", re.DOTALL)
_LANGUAGE_SWITCH = re.compile(r"\([a-z-]+\)")

_WORD = re.compile(r"\s*\S{1,40}")  # or a part of one
_LONGEST = 160  # bytes at a time: from 200 of letters on, "a.a.a." and "a .a ." overrun a buffer of espeak-ng 1.52's


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Engine:
    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._library.espeak_TextToPhonemes.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.c_int,
        ]
        options = _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_PHONEME_IPA
        data = str(espeakng_loader.get_data_path()).encode()
        self.sample_rate: int = self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data, options)
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng did not start")
        self._samples: list[npt.NDArray[np.int16]] = []
        self._phonemes: list[tuple[float, str]] = []
        self._callback = _CALLBACK(self._collect)  # C holds only the address: keep the object alive
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == _EVENT_PHONEME:
                ipa = event.id.string.decode("utf-8", "ignore")  # cut at 8 bytes, perhaps inside a letter
                self._phonemes.append((event.audio_position / 1000, ipa))
            index += 1
        return 0

    def set_voice(self, voice: str) -> None:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")

    def speak(self, text: str, rate: int, pitch: int) -> tuple[npt.NDArray[np.int16], list[tuple[float, str]]]:
        self._samples, self._phonemes = [], []
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # its noise follows the clock otherwise
        raw = text.encode()
        self._library.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, 1, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._samples) if self._samples else np.zeros(0, np.int16)
        return samples, self._phonemes

    def _clause_ipa(self, clause: str) -> str:
        parts = []
        for piece in _pieces(clause):
            raw = ctypes.create_string_buffer(piece.encode())
            pointer = ctypes.c_void_p(ctypes.addressof(raw))
            while pointer.value:
                ipa = self._library.espeak_TextToPhonemes(ctypes.byref(pointer), _CHARS_UTF8, _PHONEMES_IPA)
                parts.append(_LANGUAGE_SWITCH.sub("", ipa.decode()))
        return " ".join(part for part in parts if part)

    def sentences(self, text: str) -> list[str]:
        found, current = [], ""
        for clause in _CLAUSE.findall(text):
            if not any(map(str.isalnum, clause)):  # it would read the marks out
                continue
            mark = clause.strip()[-1:]
            current += self._clause_ipa(clause) + (mark if mark in ",.;:!?" else "")
            if mark in (".", "!", "?"):
                found.append(current)
                current = ""
            else:
                current += " "
        return [*found, current.strip()] if current.strip() else found


def _pieces(clause: str) -> Iterator[str]:
    piece = ""
    for word in _WORD.findall(clause):
        if piece and len((piece + word).encode()) > _LONGEST:
            yield piece
            piece = ""
        piece += word
    yield piece


def _answer(engine: _Engine, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    engine.set_voice(request["voice"])
    if "rate" not in request:
        return {"sentences": engine.sentences(request["text"])}, b""
    samples, phonemes = engine.speak(request["text"], request["rate"], request["pitch"])
    header = {"sample_rate": engine.sample_rate, "samples": len(samples), "phonemes": phonemes}
    return header, samples.astype("<i2").tobytes()


def main() -> None:
    """Answer requests until standard input ends."""
    engine = _Engine()
    for line in sys.stdin:
        try:
            header, samples = _answer(engine, json.loads(line))
        except Exception as error:  # the caller decides what a failed request means
            header, samples = {"error": f"{type(error).__name__}: {error}"}, b""
        sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + samples)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
