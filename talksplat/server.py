"""The embedded Triton: NVIDIA's tritonserver, of the nvidia-pytriton wheel on a plain CPU, or of NVIDIA's container.

    with Server(avatars=Path("avatars"), ports=Ports.free()) as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

The wheel carries the server, its Python backend and one backend stub a CPython version; the ONNX Runtime backend is
this project's own (``backends/onnxruntime``). The container has native backends, TensorRT's among them.

A started server has answered a real request from audio to text and frames: Triton's readiness alone says little, since
it stays true when a backend stub is dead.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import psutil
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from talksplat import avatar as bundle
from talksplat import clock
from talksplat.tenants import CANARY_VARIABLE, FILE_VARIABLE, HEADER, Tenants

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
CANARY_FILE = "canary"  # in the run folder, as old as the last canary that was answered: what else can look at
STUB = "triton_python_backend_stub"
# Before a signal's name and a command: the kernel sends that signal when the thread that started the command ends,
# however it ends. A program of its own (util-linux), since gRPC now and then aborts between Python's fork and exec.
ENDING_WITH_LAUNCHER = ("setpriv", "--pdeathsig")
CONTAINER = Path("/opt/tritonserver")  # where NVIDIA's images have Triton
SHARED_MEMORY = Path("/dev/shm")
NO_PROXY = [("grpc.enable_http_proxy", 0)]  # which gRPC would ask even for this machine
TAIL = 15  # lines of the log that a failed start shows


class ServerError(RuntimeError):
    """The server cannot start or does not serve; the message says why and, where known, what to do."""


class MissingTritonError(ServerError):
    """There is no tritonserver, or parts of it are missing."""


class UnsupportedPythonError(ServerError):
    """Triton has no backend stub for this Python."""


class MissingModelsError(ServerError):
    """Exported models are missing from the model repository."""


class PortInUseError(ServerError):
    """Something else listens on a port that the server was to take."""


class StartError(ServerError):
    """tritonserver ended while starting, or was not ready in time."""


class NotServingError(ServerError):
    """The server runs, but does not answer requests as it should."""


@dataclass(frozen=True)
class Ports:
    """The ports of one server, on the loopback interface."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def free(cls) -> Ports:
        """Three ports that nothing listens on now."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind((HOST, 0))
            return cls(*(each.getsockname()[1] for each in sockets))

    @classmethod
    def numbered(cls, number: int) -> Ports:
        """Those of one of several servers, counted from 0: ten ports apart."""
        return cls(*(port + 10 * number for port in vars(cls()).values()))

    def check(self) -> None:
        """Raise PortInUseError if one of them is taken: another server's answers would pass for our own."""
        for name, port in vars(self).items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except (OSError, OverflowError) as error:
                    reason = error.strerror if isinstance(error, OSError) else "there is none beyond 65535"
                    raise PortInUseError(
                        f"Port {port} ({name}) can't be used ({reason}): stop what listens there, "
                        "or take free ports with --free-ports."
                    ) from error


@dataclass(frozen=True)
class Trace:
    """Where the spans of traced requests go, by OTLP over HTTP (as JSON: this Triton's exporter knows no other way).

    Raises:
        ServerError: on construction, when one of them can't be meant.
    """

    url: str  # of a collector, such as http://127.0.0.1:4318/v1/traces
    every: int = 100  # one request in so many is traced, and each that comes with a ``traceparent``
    delay_ms: int = 1000  # that spans are gathered before they are sent

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/,]+(/[^\s,]*)?", self.url):
            raise ServerError(f"{self.url!r} is no collector's address: expected one such as {_COLLECTOR}.")
        if self.every < 1 or self.delay_ms < 1:
            raise ServerError(
                f"One request in {self.every}, sent after {self.delay_ms} ms: expected 1 or more of each."
            )


_COLLECTOR = "http://127.0.0.1:4318/v1/traces"


class Server:
    """One tritonserver process; a context manager. It ends with the thread that started it.

    Args:
        repository: the model repository, with the exported models in it.
        avatars: the folder of the avatar bundles.
        tenants: the file of `talksplat.tenants`, for a server behind the edge: it then believes the header that names
            the tenant. Without one everybody may do everything.
        shared_memory: open Triton's shared-memory door, through which every caller may have any region of this machine
            read and written: for measurements.
        trace: where spans go; None: nothing is traced.
        host: where to listen: on this machine, or `EVERYWHERE`, in a network where nobody but the edge gets here.
        ports: where to listen.
        run_dir: keeps the log, ``triton.log``, and the one before it; by default a temporary folder that a clean stop
            removes.
        log_to_stdout: write no log there, but to this process's standard output, which a container's engine keeps.
        start_timeout: seconds until the first canary must have been answered.
    """

    def __init__(
        self,
        repository: Path = ROOT / "model_repository",
        avatars: Path = ROOT / "avatars",
        *,
        tenants: Path | None = None,
        shared_memory: bool = False,
        trace: Trace | None = None,
        host: str = HOST,
        ports: Ports = Ports(),
        run_dir: Path | None = None,
        log_to_stdout: bool = False,
        start_timeout: float = 120.0,
    ) -> None:
        self.repository = repository.resolve()
        self.avatars = avatars.resolve()
        self.tenants = tenants and tenants.resolve()
        self.shared_memory = shared_memory
        self.trace = trace
        self.host = host
        self.ports = ports
        self.run_dir = run_dir
        self.log_to_stdout = log_to_stdout
        self.start_timeout = start_timeout
        self.restarts = 0  # that a supervisor has counted: told to the models, for the metrics
        self._canary = ""  # the name that canaries go by, where every request needs a tenant's
        self._process: subprocess.Popen[str] | None = None
        self._stubs: list[psutil.Process] = []
        self._temporary: Path | None = None
        self._log: _Log | None = None
        # whether a version of an avatar is sound and of a profile
        self._looked_at: dict[tuple[type[bundle.AnyAvatar], str], tuple[object, bool]] = {}
        # of shared memory and temporary folder: by the launcher's id a later one knows what a killed one has left
        self._prefix = f"talksplat-{os.getpid()}-{ports.grpc}-"

    @property
    def http_url(self) -> str:
        """``host:port`` of the HTTP endpoint."""
        return f"{HOST}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{HOST}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """The Prometheus page."""
        return f"http://{HOST}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int | None:
        """Of tritonserver, while it runs."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and return once a canary has been answered.

        Raises:
            ServerError: one of its kinds; nothing is left running.
            TenantsError: the tenants file can't be used.
            OSError: the log can't be written.
        """
        installation = require_startable(self.repository)
        if self.tenants is not None:
            Tenants.read(self.tenants)
        self.ports.check()
        _remove_abandoned()
        self._canary = f"canary-{secrets.token_hex(16)}"  # never known outside, so that nobody else goes by it
        try:
            self._launch(installation)
            self._wait_until_serving(time.monotonic() + self.start_timeout)
        except BaseException:
            self._end(keep_log=True)
            raise

    def stop(self) -> None:
        """Stop, and leave neither processes nor shared memory behind. Harmless when it is not running."""
        try:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_EXIT_SECONDS + 3)
        finally:  # an impatient second Ctrl-C too
            self._end(keep_log=False)

    def kill(self) -> None:
        """Stop at once, without waiting for requests that run."""
        self._end(keep_log=False)

    def dead_processes(self) -> str | None:
        """Which of the server's processes have ended or were stopped, in words.

        Triton itself says nothing of a dead stub, and aborts a while after one was stopped (SIGSTOP).
        """
        if self._process is None:
            return "tritonserver is not running"
        if (code := self._process.poll()) is not None:
            return f"tritonserver ended with {code}"
        if not _is_alive(psutil.Process(self._process.pid)):
            return "tritonserver ended or was stopped"
        ended = sum(1 for stub in self._stubs if not _is_alive(stub))
        return f"{ended} of {len(self._stubs)} backend stubs ended or were stopped" if ended else None

    def processor_seconds(self) -> float:
        """Processor time that the server's processes have used so far."""
        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def canary(self, timeout: float) -> None:
        """Send a real request, from audio to text and frames, and one to the ensemble of each other profile.

        Without a sound avatar only the speech recognition can be asked, and a profile without one is left out.

        Raises:
            NotServingError: no answer within ``timeout`` seconds, or an error for an answer.
        """
        avatar_id, huma1_id = self._sound_avatar(bundle.Avatar), self._sound_avatar(bundle.Huma1Avatar)
        with triton.InferenceServerClient(self.grpc_url, channel_args=NO_PROXY) as client:
            ask = functools.partial(_ask, client, headers={HEADER: self._canary}, timeout=timeout)
            if avatar_id is None:
                ask("transcribe", {"AUDIO": _SILENCE})
            else:
                ask("speech_to_animation", {"AUDIO": _SILENCE, **_first_frame(avatar_id)})
            if huma1_id is not None:
                chunk = {"AUDIO": np.zeros(clock.WINDOW, np.float32), **_first_frame(huma1_id)}
                batch = {name: array[None] for name, array in chunk.items()}
                # who refuses an avatar answers: it may have been fitted to another speech encoder
                ask(bundle.Huma1Avatar.model, batch, may_refuse=True)
        if self.run_dir is not None:
            with contextlib.suppress(OSError):  # a full disk is not the server's fault
                (self.run_dir / CANARY_FILE).touch()

    def _sound_avatar(self, kind: type[bundle.AnyAvatar]) -> str | None:
        """An avatar of a profile that can be read: a broken bundle must not make a server look broken."""
        for avatar_id in bundle.available(self.avatars):
            with contextlib.suppress(bundle.BundleError, bundle.UnknownAvatarError):
                version = bundle.version(self.avatars, avatar_id)
                known, is_sound = self._looked_at.get((kind, avatar_id), (None, False))
                if known != version:
                    self._looked_at[kind, avatar_id] = version, False
                    bundle.read(self.avatars, avatar_id, kind)
                    is_sound = True
                    self._looked_at[kind, avatar_id] = version, is_sound
                if is_sound:
                    return avatar_id
        return None

    def _launch(self, installation: _Installation) -> None:
        self._temporary = Path(tempfile.mkdtemp(prefix=self._prefix))
        backends = self._temporary / "backends"
        installation.assemble(backends)
        run_dir = self.run_dir or self._temporary
        run_dir.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [*ENDING_WITH_LAUNCHER, "KILL", *self._command(installation, backends)],
            env={**_environment(installation), **self._told_to_models()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches the launcher only, which stops it in order
        )
        assert self._process.stdout is not None
        self._log = _Log(self._process.stdout, None if self.log_to_stdout else run_dir / "triton.log")

    def _told_to_models(self) -> dict[str, str]:
        told = {
            "TALKSPLAT_AVATARS": str(self.avatars),
            "TALKSPLAT_RESTARTS": str(self.restarts),
            CANARY_VARIABLE: self._canary,
        }
        return told if self.tenants is None else {**told, FILE_VARIABLE: str(self.tenants)}

    def _command(self, installation: _Installation, backends: Path) -> list[str]:
        doors = [door for door in _DOORS if not (self.shared_memory and door == "shared-memory")]
        closed = f"{','.join(doors)}:closed={secrets.token_hex(16)}"  # a header that nobody is told
        return [
            str(installation.server),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--cache-directory={installation.caches}",
            f"--http-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.ports.metrics}",
            f"--grpc-header-forward-pattern={_FORWARDED}",
            f"--http-header-forward-pattern={_FORWARDED}",
            f"--grpc-restricted-protocol={closed}",
            f"--http-restricted-api={closed}",
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            *(f"--metrics-config={setting}" for setting in _METRICS),
            *(f"--trace-config={setting}" for setting in _tracing(self.trace)),
            "--disable-auto-complete-config",  # a config says what it means, and the start is faster
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
        ]

    def _wait_until_serving(self, deadline: float) -> None:
        while not (_is_ready(self.ports.http) and self._listens()):
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise StartError(f"tritonserver ended with {code} while starting.{self._reasons()}")
            if time.monotonic() > deadline:
                raise StartError(f"tritonserver was not ready after {self.start_timeout:g} s.{self._reasons()}")
            time.sleep(0.05)
        self._stubs = [process for process in self._processes() if _is_stub(process)]
        try:
            self.canary(max(1.0, deadline - time.monotonic()))
        except NotServingError as error:
            raise StartError(f"{error}{self._reasons()}") from error

    def _listens(self) -> bool:
        """Whether the ports are its own: another server may have taken one while the models were loaded.

        That one's answers would pass for this one's, and it may know nothing of tenants.
        """
        assert self._process is not None
        listening = set()
        with contextlib.suppress(psutil.Error):  # it has just ended
            for each in psutil.Process(self._process.pid).net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    listening.add(each.laddr.port)
        return listening >= set(vars(self.ports).values())

    def _processes(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self._process.pid)
            return [server, *server.children(recursive=True)]
        return []

    def _reasons(self) -> str:
        assert self._log is not None
        return self._log.reasons()

    def _end(self, *, keep_log: bool) -> None:
        process, self._process = self._process, None
        if self.run_dir is not None:
            with contextlib.suppress(OSError):  # a run folder that can't be made has none
                (self.run_dir / CANARY_FILE).unlink()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # stubs too: those of a server that hangs or ended while loading
            process.wait()
        deadline = time.monotonic() + 5
        while any(map(_is_there, self._stubs)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stubs = []
        if self._log is not None:
            self._log.close()
            self._log = None
        _remove_regions(self._prefix)
        if self._temporary is not None:
            log_inside = keep_log and self.run_dir is None
            shutil.rmtree(self._temporary / "backends" if log_inside else self._temporary, ignore_errors=True)
            self._temporary = None


_FORWARDED = "(?i)x-talksplat-.*"  # headers that models see as request parameters
_DOORS = ("model-repository", "shared-memory", "trace", "logging")  # of Triton, that nothing here needs
_METRICS = ("summary_latencies=true", "summary_quantiles=0.5:0.05,0.95:0.005,0.99:0.001")  # quantile:error
_EXIT_SECONDS = 5  # that requests which run get to end when the server is told to stop


def _tracing(trace: Trace | None) -> tuple[str, ...]:
    if trace is None:
        return ()
    spans = ("resource=service.name=talksplat", f"url={trace.url}", f"bsp_schedule_delay={trace.delay_ms}")
    return (
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        f"rate={trace.every}",
        *(f"opentelemetry,{setting}" for setting in spans),
    )


_SILENCE = np.zeros(clock.CHUNK_SAMPLES, np.float32)


def _first_frame(avatar_id: str) -> dict[str, npt.NDArray[Any]]:
    return {"AVATAR": np.array([avatar_id.encode()], np.object_), "FRAME_INDEX": np.zeros(1, np.int64)}


def _ask(
    client: triton.InferenceServerClient,
    model: str,
    arrays: dict[str, npt.NDArray[Any]],
    *,
    headers: dict[str, str],
    timeout: float,
    may_refuse: bool = False,
) -> None:
    inputs = [
        triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]
    try:
        client.infer(model, inputs, headers=headers, client_timeout=timeout)
    except InferenceServerException as error:
        if may_refuse and error.status() == "StatusCode.INVALID_ARGUMENT":
            return
        raise NotServingError(f"The canary through {model} failed: {error.message()}") from error


_LIBDIR = Path(sysconfig.get_config_var("LIBDIR"))  # of libpython; of threads that ask at once, one is told None


@dataclass(frozen=True)
class _Installation:
    """A tritonserver and what belongs to it."""

    server: Path
    caches: Path
    backends: Path  # those that came with it
    stub: Path  # of the Python backend, for the Python that runs here
    libraries: tuple[Path, ...] = ()  # folders that the loader has to be told of

    @classmethod
    def find(cls) -> _Installation:
        """That of NVIDIA's container, in there, and the wheel's everywhere else.

        Raises:
            MissingTritonError: it is not there, or lacks a part.
            UnsupportedPythonError: it has no stub for this Python.
        """
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        found = cls._of_container(version) if (CONTAINER / "bin").is_dir() else cls._of_wheel(version)
        for path in (found.server, found.caches, found.backends / "python", found.stub, *found.libraries):
            if not path.exists():
                raise MissingTritonError(f"There is no {path}: install Triton again, in the version that is pinned.")
        return found

    @classmethod
    def _of_container(cls, version: str) -> _Installation:
        backends = CONTAINER / "backends"
        stub = backends / "python" / STUB
        linked = _LIBPYTHON.search(stub.read_bytes()) if stub.exists() else None
        if linked is not None and linked[1].decode() != version:
            raise UnsupportedPythonError(
                f"The backend stub of {CONTAINER} is for Python {linked[1].decode()}, and this is {version}: "
                "use the Python of the container."
            )
        return cls(CONTAINER / "bin" / "tritonserver", CONTAINER / "caches", backends, stub)

    @classmethod
    def _of_wheel(cls, version: str) -> _Installation:
        spec = importlib.util.find_spec("pytriton")  # finds it without importing it
        if spec is None or spec.origin is None:
            raise MissingTritonError(
                f"nvidia-pytriton, which carries tritonserver, is not installed for {sys.executable}: "
                "run `make models`, which installs all that is needed."
            )
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        stubs = root / "python_backend_stubs"
        if stubs.is_dir() and not (stubs / version).is_dir():
            raise UnsupportedPythonError(
                f"nvidia-pytriton has no backend stub for Python {version}: use Python 3.11 or 3.12."
            )
        return cls(
            root / "bin" / "tritonserver",
            root / "caches",
            root / "backends",
            stubs / version / STUB,
            (package.parent / "nvidia_pytriton.libs", _LIBDIR),
        )

    def assemble(self, target: Path) -> None:
        """Make Triton's backend directory; where there is no native ONNX Runtime, with ours.

        The stub has to lie beside the Python backend's library, of which Triton takes no link.
        """
        target.mkdir()
        folders = {each.name: each for parent in (ROOT / "backends", self.backends) for each in parent.iterdir()}
        if self.stub.parent != folders["python"]:
            shutil.copytree(folders.pop("python"), target / "python", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy2(self.stub, target / "python")
        for name, folder in folders.items():
            (target / name).symlink_to(folder)


_LIBPYTHON = re.compile(rb"libpython(\d+\.\d+)")


class _Log:
    """Copies the server's output to a file: readable, without what is normal on a machine that has no GPU.

    Args:
        stream: that output.
        path: of the file; None: standard output.
    """

    def __init__(self, stream: IO[str], path: Path | None) -> None:
        self.path = path
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._errors: deque[str] = deque(maxlen=TAIL)
        if path is None:
            file = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.replace(path.with_suffix(".previous.log"))  # it says why the server had to be started again
            file = path.open("w", buffering=1)
        self._thread = threading.Thread(target=self._copy, args=(stream, file), name="triton-log", daemon=True)
        self._thread.start()

    def reasons(self) -> str:
        """The last errors, or else the last lines, for a message."""
        time.sleep(0.1)  # the last words may still be on their way
        lines = list(self._errors) or list(self._tail)
        return "".join(f"\n  {line}" for line in lines) + (f"\nThe whole log: {self.path}" if self.path else "")

    def close(self) -> None:
        self._thread.join(5)

    def _copy(self, stream: IO[str], file: IO[str]) -> None:
        with stream, file:
            for raw in stream:
                line = readable(raw)
                if line is None:
                    continue
                file.write(line + "\n")
                self._tail.append(line)
                if " ERROR " in line:
                    self._errors.append(line)


_LEVELS = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "FATAL"}
_LINE = re.compile(r'([IWEF])\d{4} (\d\d:\d\d:\d\d\.\d{3})\d* \d+ [\w.]+:\d+\] "?(.*?)"?$')
_TABLES = re.compile(r"^[+|]|^I\d{4} .*\] ?$")  # of what the configs and the command line say
_GPU = Path("/dev/nvidiactl")
_NO_GPU = re.compile(  # what is said where there is none
    r"CudaDriverHelper|pinned memory|NVML|DCGM|nvidia-ml|CUDA memory pool|CUDA driver|"
    r"cudaSuccess|unable to create stream|GPU metrics|cnmem"
)


def readable(line: str) -> str | None:
    """One line of tritonserver's output as ``time level message``, or None for one that says nothing here."""
    line = line.rstrip()
    if line.startswith("{"):  # of talksplat.log
        return line
    if not line or _TABLES.search(line) or (_NO_GPU.search(line) and not _GPU.exists()):
        return None
    line = line.split(r"\n\nAt:")[0]  # the stack of a Python model's exception, on one line
    if found := _LINE.match(line):
        level, clock_time, message = found.groups()
        return f"{clock_time} {_LEVELS[level]} {message}"
    return line


def _environment(installation: _Installation) -> dict[str, str]:
    """PATH selects the stubs' interpreter; without these libraries the server's start hangs."""
    libraries = [*map(str, installation.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        # each model has a process of its own: pools in all of them would fight for the cores
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # whichever thread reads an avatar takes memory that the others can use once it has left
        "MALLOC_ARENA_MAX": "2",
    }


def require_startable(repository: Path) -> _Installation:
    """The installed Triton, if it is whole and all exported models are there.

    Raises:
        ServerError: one of its kinds, which says what is missing.
    """
    installation = _Installation.find()
    _require_models(repository)
    return installation


def _require_models(repository: Path) -> None:
    configs = sorted(repository.glob("*/config.pbtxt"))
    if not configs:
        raise MissingModelsError(f"{repository} is no model repository: it has no config.pbtxt in any folder.")
    missing = []
    for path in configs:
        try:
            config = text_format.Parse(path.read_text(), ModelConfig())
        except text_format.ParseError as error:
            raise ServerError(f"{path} can't be parsed: {error}.") from error
        name = _FILES.get(config.backend or config.platform)
        if name is not None and not (path.parent / "1" / (config.default_model_filename or name)).is_file():
            missing.append(path.parent.name)
    if missing:
        raise MissingModelsError(
            f"{repository} lacks the model file of {', '.join(missing)}: run `make models`, "
            "and for a derived repository what has made it."
        )


# by backend, or platform, what Triton looks for
_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "tensorrt_plan": "model.plan"}


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=1)  # goes through no proxy, whatever the environment
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _is_there(process: psutil.Process) -> bool:
    """Whether a process has not ended; what its new parent has yet to reap, some in seconds, has."""
    return _status(process) not in _ENDED


def _is_alive(process: psutil.Process) -> bool:
    """Whether a process may run: one that was stopped serves nobody."""
    return _status(process) not in (*_ENDED, psutil.STATUS_STOPPED)


def _status(process: psutil.Process) -> str | None:
    try:
        return str(process.status())
    except psutil.Error:
        return None


_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, None)


def _remove_regions(prefix: str) -> None:
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def _remove_abandoned() -> None:
    """What launchers left that were killed: folders, regions, and stubs that still wait for their server."""
    for folder in Path(tempfile.gettempdir()).glob("talksplat-*"):
        if _is_abandoned(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    for region in SHARED_MEMORY.glob("talksplat-*"):
        if _is_abandoned(region.name):
            with contextlib.suppress(OSError):  # another user's, who will see to it
                region.unlink()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _is_stub(process) and any(map(_is_abandoned, process.cmdline())):
                process.kill()


def _is_abandoned(name: str) -> bool:
    found = re.match(r"talksplat-(\d+)-\d+-", name)
    return found is not None and not psutil.pid_exists(int(found[1]))


def _is_stub(process: psutil.Process) -> bool:
    try:
        return bool(process.name().startswith(STUB[:15]))  # the kernel keeps no more of it
    except psutil.Error:  # it has just ended
        return False
