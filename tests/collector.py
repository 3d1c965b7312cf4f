"""A stand-in for an OpenTelemetry collector: takes OTLP over HTTP and keeps the spans."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from talksplat.server import HOST


@dataclass(frozen=True)
class Span:
    """What the tests ask of one."""

    service: str
    name: str
    trace: str  # hexadecimal, as are the ids of spans
    id: str
    parent: str
    milliseconds: float
    attributes: dict[str, str | int]

    @property
    def request_id(self) -> str:
        """As the client gave it."""
        return str(self.attributes.get("triton.request_id", ""))


class Collector:
    """Listens while it is entered."""

    def __init__(self) -> None:
        self._bodies: list[bytes] = []
        bodies = self._bodies

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                right = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/json"
                self.send_response(200 if right else 400)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Span]:
        """Until now; raises ParseError for what is not OTLP."""
        return [span for body in list(self._bodies) for span in _spans(body)]


def _spans(body: bytes) -> Iterator[Span]:
    content = json.loads(body, object_hook=_with_base64)
    request = json_format.ParseDict(content, ExportTraceServiceRequest())
    for resource in request.resource_spans:
        service = {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service,
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6,
                    {each.key: each.value.string_value or each.value.int_value for each in span.attributes},
                )


def _with_base64(node: dict[str, Any]) -> dict[str, Any]:
    """OTLP writes ids in hexadecimal, where JSON of other Protobuf messages has base64."""
    ids = {
        name: base64.b64encode(bytes.fromhex(value)).decode()
        for name, value in node.items()
        if name in ("traceId", "spanId", "parentSpanId")
    }
    return node | ids
