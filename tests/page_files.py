"""What must be true of the page's files, by whichever door they come."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from talksplat.server import ROOT

# method, path, headers -> status, headers by lower-case name, body
Ask: TypeAlias = Callable[[str, str, Mapping[str, str]], tuple[int, Mapping[str, str], Any]]

PAGE = ROOT / "client" / "web"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HIDDEN = [
    *("/package.json", "/package-lock.json", "/tsconfig.json", "/audioworklet.d.ts", "/web/app.js", "/.gitignore"),
    *("/node_modules/typescript/package.json", "/node_modules/typescript/lib/tsc.js", "/talksplat_client/__init__.py"),
    *("/pyproject.toml", "/x/../../pyproject.toml", "/x/..%2f..%2fpyproject.toml", "/conversation.json/", "/index"),
    *(
        "/APP.JS",
        "/app.js/",
        "/a%2f..%2fapp.js%00.css",
        "//app.js.map",
        "/app.js~",
        "/talksplat_client/conversation.json",
    ),
]


def check(ask: Ask) -> None:
    """The page is there for everybody, whole and with the headers of a careful server; what lies beside it is not."""
    status, headers, body = ask("GET", "/", {})
    assert (status, body) == (200, (PAGE / "index.html").read_bytes())
    policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["connect-src"] == "http: https:"  # an endpoint of the user's own
    assert "microphone=(self)" in headers["permissions-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["server"] == "nginx"

    files = [path for path in PAGE.iterdir() if path.suffix in KINDS]
    assert len(files) > 10
    for path in files:
        status, headers, body = ask("GET", f"/{path.name}", {})
        assert (status, body) == (200, path.read_bytes()), path.name
        assert headers["content-type"] == f"{KINDS[path.suffix]}; charset=utf-8"
    status, headers, body = ask("GET", "/conversation.json", {})
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert body == json.loads((ROOT / "client" / "talksplat_client" / "conversation.json").read_text())

    _, headers, _ = ask("GET", "/app.js", {})
    assert headers["cache-control"] == "no-cache"
    status, _, body = ask("GET", "/app.js", {"If-None-Match": headers["etag"]})
    assert (status, body) == (304, b"")
    _, headers, body = ask("GET", "/app.js", {"Accept-Encoding": "gzip"})
    assert headers["content-encoding"] == "gzip"
    assert len(body) < (PAGE / "app.js").stat().st_size / 2
    assert ask("HEAD", "/app.js", {})[::2] == (200, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(method, "/app.js", {})[0] == 403, method
    for address in HIDDEN:
        assert ask("GET", address, {})[0] in (400, 401, 403, 404), address  # 400: it lies above the root
