"""The page for whoever sits at this machine: a supervised server, and nginx before it in plain HTTP, without keys.

    Web(Path("model_repository"), Path("avatars"), run_dir=Path("runs/web"), say=print).run(print)

Only the loopback is listened on. That is a secure context to a browser, which it asks for before it gives the
microphone; everybody else comes by `talksplat.edge.Secure`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path

from talksplat.edge import SOURCE, EdgeError, Machine, Nginx, find_nginx
from talksplat.server import HOST, Ports, Server

PORT = 8080


class PublicAddressError(EdgeError):
    """The page without keys was to be served to other machines."""


class Page(Nginx):
    """The nginx of `web.conf.template`.

    Args:
        server: the ports of the server behind it.
        host: an IPv4 address of the loopback.
        port: of the page.
        prefix: nginx's folder: configuration, logs, temporary files.

    Raises:
        PublicAddressError: the address is not one of the loopback's.
        MissingNginxError: nginx is not installed.
    """

    def __init__(self, server: Ports, host: str, port: int, prefix: Path) -> None:
        try:
            is_loopback = ipaddress.IPv4Address(host).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise PublicAddressError(
                f"--host is {host}, expected an address of this machine alone, such as {HOST}: without TLS and keys "
                "nobody else is served. For others: talksplat-server secure."
            )
        super().__init__("web.conf.template", host, port, prefix, find_nginx(lua=False))
        self.url = f"http://{host}:{port}/"
        self._server = server

    def _values(self) -> dict[str, object]:
        sizes = models()
        doors = [
            f"location = /v2/models/{name}/infer "
            f"{{ client_max_body_size {size}; limit_except POST {{ deny all; }} proxy_pass http://triton; }}"
            for name, size in sizes.items()
        ]
        return {
            **super()._values(),
            "TALKSPLAT_HOST": self._host,
            "TALKSPLAT_HTTP_SERVERS": f"server {HOST}:{self._server.http} max_fails=0;",
            "TALKSPLAT_NAMES": "|".join(sizes),
            "TALKSPLAT_MODELS": "\n    ".join(doors),
        }


class Web(Machine):
    """A server and the page before it.

    Args:
        repository: the model repository, with the exported models in it.
        avatars: the folder of the avatar bundles.
        run_dir: keeps all logs.
        say: is told what happens, in sentences; from several threads.
        host: an IPv4 address of the loopback.
        port: of the page.

    Raises:
        PublicAddressError: the address is not one of the loopback's.
        MissingNginxError: nginx is not installed.
    """

    def __init__(
        self,
        repository: Path,
        avatars: Path,
        run_dir: Path,
        say: Callable[[str], None],
        host: str = HOST,
        port: int = PORT,
    ) -> None:
        ports = Ports.free()
        page = Page(ports, host, port, run_dir / "nginx")
        self.url = page.url
        super().__init__(page, {"server": Server(repository, avatars, ports=ports, run_dir=run_dir)}, say)


def models() -> dict[str, int]:
    """The models that may be asked from outside, and the bytes of the largest request of each."""
    lines = (line.split() for line in (SOURCE / "models").read_text().splitlines() if line[:1] not in ("", "#"))
    return {name: int(size) for name, _, size, *_ in lines}
