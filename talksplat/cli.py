"""The command ``talksplat-server``: serve, and measure."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from talksplat import avatar as bundle
from talksplat import bench, doctor, edge, tenants, web
from talksplat.server import EVERYWHERE, HOST, ROOT, Ports, Server, ServerError, Trace
from talksplat.supervisor import Supervisor


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ServerError, tenants.TenantsError, bundle.BundleError, bundle.UnknownAvatarError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"talksplat-server: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="talksplat-server", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="serve until Ctrl-C or SIGTERM, and start again what dies")
    _add_folders(up)
    up.add_argument("--tenants", type=Path, metavar="FILE", help="behind the edge: who may use what")
    default = Ports()
    up.add_argument("--http-port", type=int, default=default.http, help="default: %(default)s")
    up.add_argument("--grpc-port", type=int, default=default.grpc, help="default: %(default)s")
    up.add_argument("--metrics-port", type=int, default=default.metrics, help="default: %(default)s")
    up.add_argument("--free-ports", action="store_true", help="take ports that are free instead")
    up.add_argument(
        "--host",
        choices=(HOST, EVERYWHERE),
        default=HOST,
        help=f"{EVERYWHERE}: for other machines, too, in a network where nobody but the edge gets here",
    )
    up.add_argument("--run-dir", type=Path, help="folder of the log; default: runs/PORT beside the repository")
    up.add_argument("--log-to-stdout", action="store_true", help="print Triton's log, too, instead: for containers")
    _add_tracing(up)
    up.set_defaults(run=_up)

    page = commands.add_parser(
        "web", help="the page to talk to an avatar, and a server behind it, for this machine alone"
    )
    _add_folders(page)
    page.add_argument("--host", default=HOST, help="address of the loopback to listen on; default: %(default)s")
    page.add_argument("--port", type=int, default=web.PORT, help="default: %(default)s")
    page.add_argument("--run-dir", type=Path, help="folder of logs; default: runs/web beside the repository")
    page.set_defaults(run=_web)

    secure = commands.add_parser("secure", help="as up, behind nginx: TLS, API keys, tenants, limits, replicas")
    _add_folders(secure)
    secure.add_argument("--tenants", type=Path, metavar="FILE", help="who may use what; default: made in the run dir")
    secure.add_argument("--replicas", type=int, default=1, metavar="N", help="servers; default: %(default)s")
    secure.add_argument("--host", default=HOST, help="address to listen on; default: %(default)s")
    secure.add_argument("--port", type=int, default=edge.PORT, help="default: %(default)s")
    secure.add_argument("--free-ports", action="store_true", help="take ports that are free for the servers behind it")
    secure.add_argument("--certificate", type=Path, metavar="PEM", help="default: a self-signed one in the run dir")
    secure.add_argument("--certificate-key", type=Path, metavar="PEM")
    secure.add_argument("--run-dir", type=Path, help="folder of logs; default: runs/secure beside the repository")
    _add_tracing(secure)
    secure.set_defaults(run=_secure)

    alone = commands.add_parser("edge", help="nginx alone, before servers on other machines that DNS lists")
    alone.add_argument("--replicas", required=True, metavar="NAME", help="in DNS, of all servers (default ports)")
    alone.add_argument("--tenants", type=Path, required=True, metavar="FILE", help="who may use what")
    alone.add_argument("--certificate", type=Path, required=True, metavar="PEM")
    alone.add_argument("--certificate-key", type=Path, required=True, metavar="PEM")
    alone.add_argument("--host", default=EVERYWHERE, help="address to listen on; default: %(default)s")
    alone.add_argument("--port", type=int, default=edge.PORT, help="default: %(default)s")
    alone.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "edge", help="nginx's; default: %(default)s")
    alone.set_defaults(run=_edge)

    key = commands.add_parser("key", help="make an API key; prints it once, and what to write into the tenants file")
    key.add_argument("--tenant", required=True, metavar="NAME", help="whose key it will be")
    key.set_defaults(run=_key)

    health = commands.add_parser("doctor", help="say in sentences what this machine lacks; 1 if something must be done")
    _add_folders(health)
    doctor.add_arguments(health)
    health.set_defaults(run=doctor.run)

    benches = commands.add_parser("bench", help="measure; prints a table").add_subparsers(required=True, metavar="NAME")
    for module in pkgutil.iter_modules(bench.__path__):
        if not module.name.startswith("_"):
            _add_bench(benches, module.name)
    return parser


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="default: %(default)s")
    parser.add_argument(
        "--avatars", type=Path, default=ROOT / "avatars", help="folder of bundles; default: %(default)s"
    )


def _add_tracing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", metavar="URL", help="send spans to this collector, such as http://HOST:4318/v1/traces"
    )
    parser.add_argument(
        "--trace-every",
        type=int,
        default=Trace.every,
        metavar="N",
        help="trace one request in N, and those with a traceparent; default: %(default)s",
    )


def _trace(arguments: argparse.Namespace) -> Trace | None:
    return Trace(arguments.trace, arguments.trace_every) if arguments.trace else None


def _add_bench(benches: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    module = importlib.import_module(f"talksplat.bench.{name}")
    summary = (module.__doc__ or "").splitlines()[0]
    parser = benches.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def _up(arguments: argparse.Namespace) -> int:
    ports = Ports(arguments.http_port, arguments.grpc_port, arguments.metrics_port)
    if arguments.free_ports:
        ports = Ports.free()
    run_dir = arguments.run_dir or arguments.repository.resolve().parent / "runs" / str(ports.grpc)
    server = Server(
        arguments.repository,
        arguments.avatars,
        tenants=arguments.tenants,
        trace=_trace(arguments),
        host=arguments.host,
        ports=ports,
        run_dir=run_dir,
        log_to_stdout=arguments.log_to_stdout,
    )
    console = Console(highlight=False, soft_wrap=True, markup=False)

    def serving() -> None:
        avatars = ", ".join(bundle.available(server.avatars)) or f"none in {server.avatars}"
        console.print(f"Serving, as process {server.pid}; Ctrl-C stops it. Avatars: {avatars}.")
        console.print(f"  gRPC     {server.grpc_url}\n  HTTP     http://{server.http_url}")
        console.print(f"  metrics  {server.metrics_url}")
        if not server.log_to_stdout:
            console.print(f"  log      {run_dir / 'triton.log'}")

    console.print("Starting Triton ...")
    _until_interrupted(lambda: Supervisor(server, console.print).run(serving), console)
    return 0


def _web(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    run_dir = arguments.run_dir or arguments.repository.resolve().parent / "runs" / "web"
    page = web.Web(
        arguments.repository, arguments.avatars, run_dir, console.print, host=arguments.host, port=arguments.port
    )

    def serving() -> None:
        console.print(f"Talk to an avatar at {page.url} - Ctrl-C stops it. Logs: {run_dir}")

    console.print("Starting nginx and Triton ...")
    _until_interrupted(lambda: page.run(serving), console)
    return 0


def _secure(arguments: argparse.Namespace) -> int:
    if arguments.replicas < 1:
        raise edge.EdgeError(f"--replicas is {arguments.replicas}, expected 1 or more.")
    if (arguments.certificate is None) != (arguments.certificate_key is None):
        raise edge.EdgeError("--certificate and --certificate-key belong together.")
    console = Console(highlight=False, soft_wrap=True, markup=False)
    run_dir = arguments.run_dir or arguments.repository.resolve().parent / "runs" / "secure"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = arguments.certificate, arguments.certificate_key
    if certificate is None:
        certificate, key = run_dir / "certificate.pem", run_dir / "certificate-key.pem"
        if not (certificate.exists() and key.exists()):
            edge.make_certificate(certificate, key, arguments.host)
            console.print(f"Made a self-signed certificate, {certificate}: give it to clients as their CA.")
    file = arguments.tenants or run_dir / "tenants.toml"
    if arguments.tenants is None and not file.exists():
        console.print(f"Made {file} and its first API key, which is shown this once: {edge.make_tenants(file)}")
    ports = [Ports.free() if arguments.free_ports else Ports.numbered(each) for each in range(arguments.replicas)]
    address = edge.Address(certificate, key, arguments.host, arguments.port)
    secure = edge.Secure(
        arguments.repository, arguments.avatars, file, ports, address, run_dir, console.print, _trace(arguments)
    )

    def serving() -> None:
        console.print(f"Serving; Ctrl-C stops it.\n  gRPC and HTTP  {address.url} (TLS, API key)")
        console.print(f"  page           https://{address.url}/")
        console.print(f"  health         https://{address.url}/healthz\n  tenants        {file}")
        for each in ports:
            console.print(f"  metrics        http://{HOST}:{each.metrics}/metrics")
        console.print(f"  logs           {run_dir}")

    console.print(f"Starting nginx and {arguments.replicas} Triton ...")
    _until_interrupted(lambda: secure.run(serving), console)
    return 0


def _edge(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    address = edge.Address(arguments.certificate, arguments.certificate_key, arguments.host, arguments.port)
    cluster = edge.Cluster(
        arguments.tenants, arguments.replicas, Ports(), address, arguments.run_dir.absolute(), console.print
    )
    _until_interrupted(lambda: cluster.run(lambda: console.print(f"Serving {address.url} (TLS, API key).")), console)
    return 0


def _until_interrupted(run: Callable[[], None], console: Console) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        run()
    except KeyboardInterrupt:
        console.print("Stopped.")


def _key(arguments: argparse.Namespace) -> int:
    tenants.check_name(arguments.tenant)
    key, digest = tenants.key()
    print(f"{key}\n\nThat is the key: it is kept nowhere. For the tenants file:\n")
    print(f'[tenants.{arguments.tenant}]\nkeys = ["{digest}"]  # the key\'s SHA-256')
    return 0


def _interrupt(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a second one must not cut the stop short
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
