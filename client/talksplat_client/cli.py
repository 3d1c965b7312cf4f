"""``talksplat animate | transcribe | avatars | stream | doctor``."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from . import doctor
from ._audio import Samples, to_mono
from ._blocking import Client, Stream
from ._config import DEFAULT_URL, Limits, Tls
from ._disclosure import Credentials, Disclosure
from ._exceptions import InvalidAudioError, InvalidRequestError, TalksplatError
from ._files import FORMATS, STDOUT, Writer, file_writer
from ._media import Recording, microphone, read_audio

RAW_PACKET = 4096  # bytes read at once from a pipe
LIVE_PACKET = 0.02  # seconds
MICROPHONE_RATE = 48_000  # Hz, that every sound card has
BAR = 24  # letters of the progress bar
API_KEY = "TALKSPLAT_API_KEY"  # environment variable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 1 after an error, 2 for wrong usage, 130 when interrupted."""
    args = _parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops cleanly, too
    code = _run(args)
    try:
        sys.stdout.flush()
    except OSError as error:  # Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code and not isinstance(error, BrokenPipeError):
            print(f"talksplat: standard output: {error.strerror}", file=sys.stderr)
        return code or 1
    return code


def _run(args: argparse.Namespace) -> int:
    try:
        with _client(args) as client:
            return args.run(client, args) or 0
    except BrokenPipeError:  # whoever read our output has enough
        return 1
    except TalksplatError as error:
        print(f"talksplat: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"talksplat: {error.filename or 'input or output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="talksplat", description="Speech in, a talking head out, from a talksplat server."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Client, argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument(
            "--url", action="append", metavar="HOST:PORT", help=f"server, or several (default: {DEFAULT_URL})"
        )
        added.add_argument("--tls", action="store_true", help="encrypt; the server's certificate is a public one")
        added.add_argument("--ca", metavar="FILE", help="encrypt; PEM file of the certificate to believe")
        added.add_argument(
            "--api-key-file", metavar="FILE", help=f"where the API key is (default: environment variable {API_KEY})"
        )
        return added

    def sound(added: argparse.ArgumentParser, text: str, **options: Any) -> None:
        added.add_argument("file", metavar="FILE", help=text, **options)
        added.add_argument(
            "--raw", type=int, metavar="HZ", help="the input is headerless int16 mono of this sample rate"
        )

    def look(added: argparse.ArgumentParser) -> None:
        added.add_argument("--avatar", required=True, metavar="ID")
        added.add_argument("--seed", type=int, default=0, help="of blinks and background (default: 0)")
        added.add_argument("--size", type=int, help="height and width in pixels (default: the avatar's)")
        added.add_argument("--quality", type=int, default=85, help="of JPEG, 1 to 100 (default: 85)")

    animate = command("animate", _animate, "Write films, pictures or subtitles of an avatar that speaks a recording.")
    sound(animate, "audio or video file, - for standard input")
    look(animate)
    animate.add_argument(
        "--out",
        required=True,
        action="append",
        metavar="FILE",
        help="what to write, by its ending: .mp4, .webm, .webp (no sound), .srt or .vtt (what is said), FOLDER/ or "
        "FOLDER/%%05d.png (.jpg) for each frame, - for standard output; several times: all from the same frames",
    )
    animate.add_argument(
        "--format", choices=[*dict.fromkeys(FORMATS.values())], help="of what has no ending: standard output, a pipe"
    )
    animate.add_argument("--transcript", action="store_true", help="also tell what is said")
    animate.add_argument(
        "--no-label",
        action="store_true",
        help='leave out the "AI" in the corner; the law may ask for one (in the EU, article 50 of the AI Act)',
    )
    animate.add_argument(
        "--c2pa-certificate", metavar="PEM", help="sign files as C2PA content credentials: the signer's certificates"
    )
    animate.add_argument("--c2pa-key", metavar="PEM", help="and the private key")

    transcribe = command("transcribe", _transcribe, "Print what is said in a recording.")
    sound(transcribe, "audio or video file, - for standard input")

    avatars = command("avatars", _avatars, "List the server's avatars.")
    avatars.add_argument("--preload", action="append", default=[], metavar="ID", help="load this one first")

    stream = command(
        "stream", _stream, "Animate live sound: frames come out at the pace at which they are to be shown."
    )
    sound(stream, "audio file, - for standard input (default: the microphone)", nargs="?")
    look(stream)
    stream.add_argument(
        "--out", metavar="FILE", help="where the JPEG frames go, one after the other; - for standard output"
    )
    stream.add_argument("--deadline", type=float, metavar="SECONDS", help="drop what comes later (default: nothing)")

    health = command("doctor", _doctor, "Say in sentences what this machine lacks; 1 if something must be done.")

    for each in (animate, transcribe, avatars, health):
        each.add_argument("--json", action="store_true", help="report as JSON on standard output")
    return parser


def _client(args: argparse.Namespace) -> Client:
    try:
        api_key = Path(args.api_key_file).read_text().strip() if args.api_key_file else os.environ.get(API_KEY) or None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{args.api_key_file} holds no API key: it is no text") from None
    tls = Tls(args.ca) if args.tls or args.ca else None
    limits = Limits(in_flight=1) if args.run is _doctor else Limits()
    return Client(args.url or DEFAULT_URL, api_key=api_key, tls=tls, limits=limits)


def _animate(client: Client, args: argparse.Namespace) -> None:
    opened = _opener(args)
    recording = opened()
    client.clock()  # a missing server is a matter of its own, before anything is measured
    began = time.monotonic()
    model = client.preload(args.avatar).model
    preload_ms = 1e3 * (time.monotonic() - began)
    sound: deque[Samples] = deque()  # taken by the stream and not written yet

    def heard() -> Iterator[Samples]:
        for packet in recording.packets:
            sound.append(packet)
            yield packet

    began = time.monotonic()
    first = 0.0
    count = samples = 0
    fps = client.clock().fps
    total = recording.seconds and math.ceil(recording.seconds * fps)
    with ExitStack() as stack:
        files = [stack.enter_context(each) for each in _writers(client, args, recording.sample_rate)]

        def write_sound() -> None:
            nonlocal samples
            while sound:
                packet = sound.popleft()
                samples += packet.size
                for file in files:
                    file.write_audio(packet)

        frames = stack.enter_context(_start(client, heard(), recording.sample_rate, args, model))
        stack.callback(_progress_end)
        for frame in frames:
            first = first or time.monotonic() - began
            count += 1
            write_sound()
            for file in files:
                file.write(frame)
            _progress(count, total, time.monotonic() - began)
        if not count:
            raise InvalidAudioError(f"{args.file} holds no sound at all")
        write_sound()
    seconds = time.monotonic() - began
    report: dict[str, object] = {
        "files": args.out,
        "frames": count,
        "seconds_of_audio": round(samples / recording.sample_rate, 3),
        "ttff_ms": round(1e3 * first, 1),
        "fps": round(count / seconds, 1),
        "preload_ms": round(preload_ms, 1),
    }
    if args.transcript:
        again = opened()
        report = {"transcript": client.transcribe(again.packets, sample_rate=again.sample_rate)} | report
    told = sys.stderr if STDOUT in args.out else sys.stdout  # which may be the film
    if args.json:
        print(json.dumps(report), file=told)
        return
    if args.transcript:
        print(report["transcript"], file=told)
    print(
        f"{', '.join(args.out)}: {count} frames for {report['seconds_of_audio']} s of audio, first frame after "
        f"{report['ttff_ms']} ms, {report['fps']} frames/s",
        file=told,
    )


def _writers(client: Client, args: argparse.Namespace, sample_rate: int) -> list[Writer]:
    if (args.c2pa_certificate is None) != (args.c2pa_key is None):
        raise InvalidRequestError("--c2pa-certificate and --c2pa-key belong together")
    if len({os.path.realpath(path) for path in args.out}) < len(args.out):
        raise InvalidRequestError("two --out are the same file")
    signer = Credentials(args.c2pa_certificate, args.c2pa_key) if args.c2pa_key else None

    def writer(path: str) -> Writer:
        return file_writer(
            path,
            format=args.format,
            transcribe=partial(client.transcribe, sample_rate=sample_rate),
            sample_rate=sample_rate,
            fps=client.clock().fps,
            disclosure=Disclosure(args.avatar, not args.no_label, signer),
        )

    return [writer(path) for path in args.out]


def _transcribe(client: Client, args: argparse.Namespace) -> None:
    recording = _opener(args)()
    text = client.transcribe(recording.packets, sample_rate=recording.sample_rate)
    print(json.dumps({"transcript": text}) if args.json else text)


def _avatars(client: Client, args: argparse.Namespace) -> None:
    preloaded = [client.preload(avatar) for avatar in args.preload]
    avatars = client.avatars()
    if args.json:
        print(json.dumps({"avatars": [asdict(each) for each in avatars], "preloaded": [asdict(e) for e in preloaded]}))
        return
    for each in avatars:
        print(f"{each.id}\t{'loaded' if each.loaded else 'on disk'}")


def _doctor(client: Client, args: argparse.Namespace) -> int:
    findings = []
    for finding in doctor.examine(client):
        findings.append(finding)
        if not args.json:
            print(f"{finding.level:>7}  {finding.about}: {finding.sentence}", flush=True)
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    return int(any(finding.level == "problem" for finding in findings))


def _stream(client: Client, args: argparse.Namespace) -> None:
    client.clock()
    if args.file is None:
        recording = Recording(MICROPHONE_RATE, None, microphone(MICROPHONE_RATE, LIVE_PACKET))
    elif args.file == "-" and args.raw is not None:
        recording = Recording(args.raw, None, _raw_packets(sys.stdin.buffer))
    else:
        recording = read_audio(sys.stdin.buffer) if args.file == "-" else _opener(args)()
        recording = Recording(recording.sample_rate, None, _paced(recording))
    model = client.preload(args.avatar).model
    late = count = 0
    start = 0.0
    with _sink(args.out) as sink, _start(client, recording.packets, recording.sample_rate, args, model) as frames:
        for frame in frames:
            start = start or time.monotonic() - frame.pts
            due = start + frame.pts
            late += time.monotonic() > due + 1 / client.clock().fps
            time.sleep(max(0.0, due - time.monotonic()))
            sink.write(frame.data)
            sink.flush()
            count += 1
        dropped = frames.dropped
    print(f"{count} frames, {late} of them late, {dropped} dropped", file=sys.stderr)


def _start(client: Client, audio: Iterable[Samples], sample_rate: int, args: argparse.Namespace, model: str) -> Stream:
    return client.animate(
        audio,
        avatar=args.avatar,
        sample_rate=sample_rate,
        seed=args.seed,
        size=args.size,
        quality=args.quality,
        model=model,
        deadline=getattr(args, "deadline", None),
    )


def _opener(args: argparse.Namespace) -> Callable[[], Recording]:
    """What opens the recording that was asked for, as often as it is needed."""
    if args.file == "-":
        content: bytes | None = sys.stdin.buffer.read()
    else:
        pipe = stat.S_ISFIFO(os.stat(args.file).st_mode)
        content = Path(args.file).read_bytes() if pipe else None

    def opened() -> Recording:
        source: BinaryIO = open(args.file, "rb") if content is None else io.BytesIO(content)  # noqa: SIM115 (read later)
        return read_audio(source) if args.raw is None else Recording(args.raw, None, _raw_packets(source))

    return opened


def _raw_packets(pipe: BinaryIO) -> Iterator[Samples]:
    half = b""  # of a sample that a pipe has cut
    read: Callable[[int], bytes] = getattr(pipe, "read1", pipe.read)  # whatever is there, without waiting for more
    while data := read(RAW_PACKET):
        data = half + data
        whole = len(data) // 2 * 2
        half = data[whole:]
        yield to_mono(data[:whole])
    if half:
        raise InvalidAudioError("the input ends in the middle of an int16 sample")


def _paced(recording: Recording) -> Iterator[Samples]:
    """A recording as it would come from a microphone."""
    length = round(recording.sample_rate * LIVE_PACKET)
    start, given = time.monotonic(), 0
    for packet in recording.packets:
        for begin in range(0, packet.size, length):
            part = packet[begin : begin + length]
            given += part.size
            time.sleep(max(0.0, start + given / recording.sample_rate - time.monotonic()))
            yield part


def _sink(out: str | None) -> Any:
    if out == "-":
        return nullcontext(sys.stdout.buffer)
    return open(out or os.devnull, "wb")


def _progress(count: int, total: float | None, seconds: float) -> None:
    if not sys.stderr.isatty():
        return
    rate = count / seconds
    line = f"{count} frames, {rate:.0f} frames/s"
    if total:
        done = min(count / total, 1.0)
        filled = round(BAR * done)
        left = math.ceil(max(total - count, 0) / rate)
        line = (
            f"[{'#' * filled}{'.' * (BAR - filled)}] {count} of {total:.0f} frames, {rate:.0f} frames/s, {left} s left"
        )
    print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def _progress_end() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
