"""All of it on one machine: supervised servers, and nginx before them as the edge (``deploy/nginx``).

    Secure(tenants=Path("tenants.toml"), certificate=Path("certificate.pem"), ...).run(print)

What nginx is to know lies in one folder, its prefix: the configuration, rendered from ``deploy/nginx``; `tenants`, the
tenants' limits by the hashes of their keys; and `canaries`, which says that some replica has just answered one.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import ipaddress
import os
import pwd
import shutil
import signal
import socket
import string
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from talksplat import tenants as tenants_module
from talksplat.server import ENDING_WITH_LAUNCHER, HOST, ROOT, PortInUseError, Ports, Server, ServerError, Trace
from talksplat.supervisor import Supervisor
from talksplat.tenants import Tenants, TenantsFile

SOURCE = ROOT / "deploy" / "nginx"
MODULES = Path("/usr/lib/nginx/modules")  # Debian's and Ubuntu's
PORT = 8443
STREAMS = 8  # of a first tenants file: at 512x512 on two cores
CERTIFICATE_DAYS = 825
_START_SECONDS = 5.0
_STOP_SECONDS = 15.0
_LOOK_SECONDS = 0.1
_LAUNCH_SECONDS = 1.0  # between two starts of nginx: one that lived longer is started again at once
_DNS_SECONDS = 1.0


class EdgeError(ServerError):
    """The edge cannot start; the message says why and what to do."""


class MissingNginxError(EdgeError):
    """nginx, or its Lua module where that is wanted, is not installed."""


class Nginx:
    """One nginx, started again by `look` when it has died. It ends with the thread that started it.

    Args:
        template: of its configuration, in `SOURCE`.
        host, port: where it listens.
        prefix: its folder: configuration, logs, temporary files.
        program: the installed nginx.
    """

    def __init__(self, template: str, host: str, port: int, prefix: Path, program: Path) -> None:
        self._template = template
        self._host = host
        self._port = port
        self._prefix = prefix.resolve()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = 0.0

    @property
    def pid(self) -> int | None:
        """Of nginx's master process, while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start, and return once nginx listens.

        Raises:
            EdgeError: it does not; nothing is left running.
            PortInUseError: something else listens there.
        """
        self._prefix.mkdir(parents=True, exist_ok=True)
        (self._prefix / "temp").mkdir(exist_ok=True)
        self._configure()
        try:
            _check_free(self._host, self._port)
            self._launch()
            self._wait_until_listening()
        except BaseException:
            self.stop()
            raise

    def look(self) -> str | None:
        """Start nginx again when it has died, and say so."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        if time.monotonic() < self._launched + _LAUNCH_SECONDS:
            return None
        self._kill()
        self._launch()
        return f"nginx ended with {code}: started again."

    def stop(self) -> None:
        """Stop, and leave no process behind."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(3)
            self._kill()

    def _values(self) -> dict[str, object]:
        """What the template is filled with."""
        user = "nobody"  # nginx looks at it only when root starts it; a container's user may have no name
        if os.getuid() == 0:
            user = f"{pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getgid()).gr_name}"
        return {
            "TALKSPLAT_USER": user,
            "TALKSPLAT_LISTEN": f"{self._host}:{self._port}",
            "TALKSPLAT_EDGE": SOURCE,
            "TALKSPLAT_CLIENT": ROOT / "client",
        }

    def _configure(self) -> None:
        template = string.Template((SOURCE / self._template).read_text())
        _write(self._prefix / "nginx.conf", template.safe_substitute(self._values()))  # nginx has variables of its own

    def _launch(self) -> None:
        self._launched = time.monotonic()
        files = ("-p", self._prefix, "-c", self._prefix / "nginx.conf", "-e", self._prefix / "error.log")
        self._process = subprocess.Popen(
            [*ENDING_WITH_LAUNCHER, "TERM", self._program, *files],  # its workers follow it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the launcher only
        )

    def _wait_until_listening(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self._host, self._port), 1):
                return
            if (code := self._process.poll()) is not None or time.monotonic() > deadline:
                log = self._prefix / "error.log"
                lines = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
                reason = f"does not listen after {_START_SECONDS:.0f} s" if code is None else f"ended with {code}"
                raise EdgeError("\n  ".join([f"nginx does not start, it {reason}:", *lines, f"The whole log: {log}"]))
            time.sleep(0.02)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers of a killed master hold on to the port
            process.wait()


@dataclass(frozen=True)
class Address:
    """Where the edge listens, and by what it proves who it is."""

    certificate: Path  # PEM, with the chain
    certificate_key: Path  # PEM
    host: str = HOST
    port: int = PORT

    @property
    def url(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"


class Edge(Nginx):
    """The nginx of `nginx.conf.template`.

    Args:
        tenants: the file of `talksplat.tenants`.
        replicas: of the servers on this machine.
        address: where to listen.
        prefix: nginx's folder: configuration, logs, temporary files.

    Raises:
        TenantsError: the tenants file can't be used.
        MissingNginxError: nginx or its Lua module is not installed.
    """

    def __init__(self, tenants: Path, replicas: Sequence[Ports], address: Address, prefix: Path) -> None:
        self.address = address
        self._file = TenantsFile(tenants)
        self._replicas = [(HOST, each) for each in replicas]
        self._written: Tenants | None = None
        self._beats = 0
        self._answers: dict[Ports, bool] = {}  # whether a replica has answered its last canary
        self._asked: list[tuple[str, Ports]] | None = None  # as nginx has been told; None: it could not be
        self._lock = threading.Lock()
        super().__init__("nginx.conf.template", address.host, address.port, prefix, find_nginx())

    def look(self) -> str | None:
        """Follow the tenants file and the replicas' canaries; start nginx again when it has died, and say so."""
        with contextlib.suppress(OSError):  # a full disk may be mended
            self._write_tenants()
            if self._to_be_asked() != self._asked:
                self._reload()
        return super().look()

    def lead_to(self, hosts: Sequence[str], ports: Ports) -> None:
        """Balance over these machines from now on; a running nginx goes on with what it has begun.

        It reads its certificate anew, too.
        """
        self._replicas = [(host, ports) for host in hosts]
        self._reload()

    def passed(self, replica: Ports) -> None:
        """A replica has answered a canary; from any thread."""
        self._heard_of(replica, answered=True)

    def fell(self, replica: Ports) -> None:
        """A replica is down, and not asked again before it has answered a canary; from any thread.

        Another program may take its port meanwhile.
        """
        self._heard_of(replica, answered=False)

    def _heard_of(self, replica: Ports, *, answered: bool) -> None:
        with self._lock:
            self._answers[replica] = answered
        self._beat()

    def _beat(self) -> None:
        with self._lock:
            self._beats += 1
            with contextlib.suppress(OSError):  # what can't be written down is no sign of health, but no end either
                _write(self._prefix / "canaries", f"{self._beats}\n" if any(self._answers.values()) else "")

    def _to_be_asked(self) -> list[tuple[str, Ports]]:
        with self._lock:
            return [each for each in self._replicas if self._answers.get(each[1], True)]

    def _reload(self) -> None:
        if self._process is not None:
            self._configure()
            self._process.send_signal(signal.SIGHUP)

    def _write_tenants(self) -> None:
        tenants = self._file.tenants
        if tenants is not self._written:
            _write(self._prefix / "tenants", hashes(tenants))
            self._written = tenants

    def _configure(self) -> None:
        self._asked = self._to_be_asked()
        try:
            super()._configure()
        except OSError:
            self._asked = None
            raise
        self._write_tenants()
        self._beat()

    def _values(self) -> dict[str, object]:
        def servers(doors: Sequence[tuple[str, int]]) -> str:
            each = [f"server {host}:{port} max_fails=1 fail_timeout=3s;" for host, port in doors]
            return " ".join(each) or f"server {HOST}:9 down;"  # nginx refuses to have none

        return {
            **super()._values(),
            "TALKSPLAT_CERTIFICATE": self.address.certificate.resolve(),
            "TALKSPLAT_CERTIFICATE_KEY": self.address.certificate_key.resolve(),
            "TALKSPLAT_GRPC_SERVERS": servers([(host, ports.grpc) for host, ports in self._asked or []]),
            "TALKSPLAT_HTTP_SERVERS": servers([(host, ports.http) for host, ports in self._asked or []]),
        }


class _Replica(Server):
    """A server whose canaries the edge is told of."""

    edge: Edge

    def canary(self, timeout: float) -> None:
        super().canary(timeout)
        self.edge.passed(self.ports)

    def kill(self) -> None:
        self.edge.fell(self.ports)
        super().kill()

    def stop(self) -> None:
        self.edge.fell(self.ports)
        super().stop()


class Machine:
    """Servers and the nginx before them, each started again when it dies.

    Args:
        nginx: not started yet.
        servers: by name, not started yet.
        say: is told what happens, in sentences; from several threads.
    """

    def __init__(self, nginx: Nginx, servers: Mapping[str, Server], say: Callable[[str], None]) -> None:
        self._nginx = nginx
        self._say = say
        self._supervisors = [
            Supervisor(server, functools.partial(self._say_of, name)) for name, server in servers.items()
        ]
        self._serving = 0
        self._failure: BaseException | None = None

    def run(self, serving: Callable[[], None]) -> None:
        """Start everything and keep it up; returns only by an exception, and leaves nothing running then.

        Args:
            serving: is called once, when all of it serves.

        Raises:
            ServerError, OSError: the first start failed.
        """
        threads = [threading.Thread(target=self._keep, args=(each,), daemon=True) for each in self._supervisors]
        try:
            self._nginx.start()
            for thread in threads:
                thread.start()
            is_serving = False
            while self._failure is None:
                if (news := self._nginx.look()) is not None:
                    self._say(news)
                if not is_serving and self._serving >= len(threads):
                    is_serving = True
                    serving()
                time.sleep(_LOOK_SECONDS)
            raise self._failure
        finally:
            self._nginx.stop()
            for supervisor in self._supervisors:
                supervisor.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(_STOP_SECONDS)

    def _say_of(self, name: str, text: str) -> None:
        self._say(f"{name}: {text}")

    def _keep(self, supervisor: Supervisor) -> None:
        def serving() -> None:
            self._serving += 1

        try:
            supervisor.run(serving)
        except BaseException as error:
            self._failure = error


class Secure(Machine):
    """Servers behind their edge.

    Args:
        repository: the model repository, with the exported models in it.
        avatars: the folder of the avatar bundles.
        tenants: the file of `talksplat.tenants`.
        replicas: the ports of each server.
        address: where the edge listens.
        run_dir: keeps all logs.
        say: is told what happens, in sentences; from several threads.
        trace: where the servers' spans go; None: nothing is traced.

    Raises:
        TenantsError: the tenants file can't be used.
        MissingNginxError: nginx or its Lua module is not installed.
    """

    def __init__(
        self,
        repository: Path,
        avatars: Path,
        tenants: Path,
        replicas: Sequence[Ports],
        address: Address,
        run_dir: Path,
        say: Callable[[str], None],
        trace: Trace | None = None,
    ) -> None:
        edge = Edge(tenants, replicas, address, run_dir / "edge")
        servers = {}
        for number, ports in enumerate(replicas):
            name = f"replica-{number}"
            servers[name] = _Replica(
                repository, avatars, tenants=tenants, trace=trace, ports=ports, run_dir=run_dir / name
            )
            servers[name].edge = edge
        super().__init__(edge, servers, say)


class Cluster:
    """The edge alone, before servers on other machines: those that a name in DNS lists.

    In Kubernetes that is a headless service, which lists the pods whose canary was answered. nginx is told within a
    second when the list changes, and when the certificate does.

    Args:
        tenants: the file of `talksplat.tenants`, which the servers have, too.
        name: whose addresses are the replicas.
        ports: of each replica.
        address: where to listen.
        run_dir: nginx's folder. Its logs go to this process's standard output.
        say: is told what happens, in sentences.

    Raises:
        TenantsError: the tenants file can't be used.
        MissingNginxError: nginx or its Lua module is not installed.
    """

    def __init__(
        self, tenants: Path, name: str, ports: Ports, address: Address, run_dir: Path, say: Callable[[str], None]
    ) -> None:
        self._edge = Edge(tenants, [], address, run_dir)
        self._name = name
        self._ports = ports
        self._run_dir = run_dir
        self._say = say

    def run(self, serving: Callable[[], None]) -> None:
        """Start nginx and keep it up; returns only by an exception, and leaves nothing running then.

        Args:
            serving: is called once, when nginx listens.

        Raises:
            EdgeError: nginx does not start.
            OSError: the run folder or the certificate can't be used.
        """
        self._run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("access.log", "error.log"):
            log = self._run_dir / name
            log.unlink(missing_ok=True)
            log.symlink_to(f"/proc/{os.getpid()}/fd/1")
        led: tuple[list[str], bytes] | None = None
        try:
            while True:
                hosts = addresses(self._name)
                wanted = led[0] if hosts is None and led else hosts or [], self._edge.address.certificate.read_bytes()
                (self._edge.passed if wanted[0] else self._edge.fell)(self._ports)
                if wanted != led:
                    if led is None or wanted[0] != led[0]:
                        self._say(f"Replicas: {', '.join(wanted[0]) or 'none'}.")
                    self._edge.lead_to(wanted[0], self._ports)
                if led is None:
                    self._edge.start()
                    serving()
                led = wanted
                if (news := self._edge.look()) is not None:
                    self._say(news)
                time.sleep(_DNS_SECONDS)
        finally:
            self._edge.stop()


def addresses(name: str) -> list[str] | None:
    """The IPv4 addresses that DNS lists under a name, sorted; None if it can't be asked just now."""
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return None if error.errno == socket.EAI_AGAIN else []
    return sorted({str(each[4][0]) for each in found})


def hashes(tenants: Tenants) -> str:
    """What the edge knows of tenants: the machine's streams, then a line a key with its tenant's limits."""
    lines = [f"streams {tenants.streams}"]
    for tenant in tenants.by_name.values():
        lines += [f"{key} {tenant.name} {tenant.streams} {tenant.requests_per_second!r}" for key in sorted(tenant.keys)]
    return "\n".join(lines) + "\n"


def make_tenants(path: Path, name: str = "first") -> str:
    """Write a tenants file with one tenant, who may use every avatar; returns its API key, which is kept nowhere."""
    made, digest = tenants_module.key()
    _write(
        path,
        f"streams = {STREAMS}  # at a time, of the whole machine\n\n"
        f'[tenants.{name}]\nkeys = ["{digest}"]  # SHA-256\n'
        f'avatars = ["*"]\nstreams = {STREAMS}\nrequests_per_second = {STREAMS * 25}\n',
    )
    return made


def make_certificate(certificate: Path, key: Path, host: str) -> None:
    """Write a self-signed certificate for this machine, and its key.

    Raises:
        EdgeError: openssl is missing or fails.
    """
    names = {"DNS:localhost", f"DNS:{socket.gethostname()}", f"IP:{HOST}"}
    try:
        names.add(f"IP:{ipaddress.ip_address(host)}")
    except ValueError:
        names.add(f"DNS:{host}")
    made = [path.with_name(f".{path.name}.{os.getpid()}") for path in (certificate, key)]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", str(CERTIFICATE_DAYS), "-subj", "/CN=talksplat", "-out", str(made[0]), "-keyout", str(made[1])]
    command += ["-addext", f"subjectAltName={','.join(sorted(names))}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, umask=0o077)
        for path, target in zip(made, (certificate, key), strict=True):
            path.chmod(0o600)
            path.replace(target)
    except FileNotFoundError as error:
        raise EdgeError("There is no openssl to make a certificate with: apt install openssl.") from error
    except subprocess.CalledProcessError as error:
        raise EdgeError(f"openssl made no certificate: {error.stderr.strip()}") from error
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def find_nginx(*, lua: bool = True) -> Path:
    """The installed nginx.

    Args:
        lua: its Lua module is wanted, too.

    Raises:
        MissingNginxError: it is not installed.
    """
    found = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    missing = [] if found else ["nginx"]
    if lua and not all((MODULES / f"{name}_module.so").exists() for name in ("ndk_http", "ngx_http_lua")):
        missing.append("its Lua module" if missing else "nginx's Lua module")
    if found is None or missing:
        packages = "nginx-light libnginx-mod-http-lua" if lua else "nginx-light"
        raise MissingNginxError(f"{' and '.join(missing)} is not installed: apt install {packages}.")
    return Path(found)


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise PortInUseError(f"{host}:{port} can't be used ({error}): choose another with --port.") from error


def _write(path: Path, text: str) -> None:
    """In one step, for the owner's eyes only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
