"""gRPC, blocking and asyncio: one request to whichever replica answers, retried while that is worth it."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import _protocol as protocol
from ._config import Retry, Timeout, Tls
from ._exceptions import (
    ChunkExpiredError,
    InvalidRequestError,
    OverloadedError,
    TalksplatError,
    from_status,
)
from ._protocol import Request, Response

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # an utterance's frames take tens of megabytes
    ("grpc.max_send_message_length", -1),
    # gRPC itself would look for a lost server more and more seldom, up to every two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.min_reconnect_backoff_ms", 2000),  # for a handshake, which takes a far or a busy server its time
    # a peer that is silent for 2 s of a request is asked whether it lives, and has 2 s to say so; without a request
    # nothing is asked. gRPC's servers take offence (GOAWAY, too_many_pings) after two minutes of one silent request
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),  # for the kernel: TCP_USER_TIMEOUT
]
_KEY = re.compile(r"[!-~]+")  # what a header's value may hold


class CallCancelledError(Exception):
    """`cancel` was called; never leaves this package."""


def _closed() -> TalksplatError:
    return TalksplatError("the client is closed")


@dataclass(frozen=True)
class Terms:
    """Under which one request is tried."""

    timeout: float  # seconds, each attempt
    stream: str | None  # id; None: it belongs to none, and needs no place among streams
    deadline: float | None = None  # seconds, all attempts
    running: bool = False  # it belongs to a stream that has frames already


class Replicas:
    """Which of several equal servers is asked, and as whom: always the same one, until it fails.

    Raises:
        InvalidRequestError: no address, or one that is not ``host:port``; no API key that can be sent, or that would
            travel in the clear; no usable CA file.
    """

    def __init__(
        self, urls: str | Sequence[str], api_key: str | None, tls: Tls | None, timeout: Timeout, retry: Retry
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        for url in self.urls:
            host, _, port = url.rpartition(":")
            if not host or "/" in url or not port.isdigit():
                raise InvalidRequestError(f"the address is {url!r}, expected host:port such as 127.0.0.1:8001")
            if api_key is not None and tls is None and not _is_this_machine(host):
                raise InvalidRequestError(f"the API key would travel to {host} in the clear: expected tls=Tls()")
        if not self.urls:
            raise InvalidRequestError("there is no address to connect to")
        if api_key is not None and not _KEY.fullmatch(api_key):
            raise InvalidRequestError("the API key is empty or holds spaces or control characters, expected ASCII")
        self.current = self.urls[0]
        self._authorization = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._credentials = None if tls is None else grpc.ssl_channel_credentials(tls.roots())
        self._reached = False
        self._lost_since = math.inf
        self._timeout = timeout
        self._retry = retry

    def channel(self, module: ModuleType, url: str) -> Any:
        """A channel of ``grpc`` or ``grpc.aio``, which connects when it is first used."""
        if self._credentials is None:
            return module.insecure_channel(url, CHANNEL_OPTIONS)
        return module.secure_channel(url, self._credentials, CHANNEL_OPTIONS)

    def metadata(self, terms: Terms) -> tuple[tuple[str, str], ...]:
        """What the edge reads of a request."""
        stream = () if terms.stream is None else (("x-talksplat-stream", terms.stream),)
        return (*self._authorization, *stream)

    def succeeded(self) -> None:
        """A replica has answered: from now on a failure is a loss, worth waiting for."""
        self._reached = True
        self._lost_since = math.inf

    def failed(self, url: str) -> None:
        """Turn to the next replica, unless another request has done so already."""
        self._lost_since = min(self._lost_since, time.monotonic())
        if self.current == url:
            self.current = self.urls[(self.urls.index(url) + 1) % len(self.urls)]

    def lost(self) -> bool:
        """Whether nothing has answered anybody for longer than servers take to come back."""
        return time.monotonic() - self._lost_since > self._timeout.recovery

    def patience(self, terms: Terms) -> Patience:
        """For one request."""
        if self._reached:
            return Patience(self, math.inf, self._timeout.recovery, self._retry, terms)
        return Patience(self, len(self.urls), math.inf, self._retry, terms)


class Patience:
    """How long, and how often, one request is tried."""

    def __init__(self, replicas: Replicas, attempts: float, seconds: float, retry: Retry, terms: Terms) -> None:
        self._replicas = replicas
        self._attempts = attempts
        self._seconds = seconds
        self._retry = retry
        self._terms = terms
        self._pause = retry.first
        self._expires = time.monotonic() + (math.inf if terms.deadline is None else terms.deadline)
        self._since: float | None = None

    def begin(self, request: Request) -> float:
        """Seconds that the attempt which is about to be made may take; the server hears of a deadline."""
        left = max(0.0, self._expires - time.monotonic())
        if left < math.inf:
            protocol.expire(request, left)
        return min(left, self._terms.timeout)

    def pause(self, error: TalksplatError, url: str, since: float) -> float:
        """Seconds to wait before the next attempt, after one that failed at the time ``since``.

        Raises:
            TalksplatError: the error, when there is to be no other attempt.
            ChunkExpiredError: the next one would come too late.
        """
        if error.retryable:
            self._replicas.failed(url)
        pause = self._pause
        self._pause = min(pause * self._retry.factor, self._retry.longest)
        self._attempts -= 1
        worthwhile = error.retryable
        if isinstance(error, OverloadedError):  # who had no place before takes no for an answer
            worthwhile = self._terms.running
            pause = max(pause, error.retry_after or 0.0)
        self._since = since if self._since is None else self._since
        again = since + pause
        if not worthwhile or self._attempts < 1 or again > self._since + self._seconds:
            raise error
        if again >= self._expires:
            if isinstance(error, OverloadedError) or self._replicas.lost():
                raise error
            raise ChunkExpiredError(f"the chunk is older than its deadline of {self._terms.deadline} s") from error
        return max(0.0, again - time.monotonic())


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _failure(error: Any, url: str) -> TalksplatError:
    metadata = dict((*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())))
    try:
        retry_after = float(metadata["retry-after"])
    except (KeyError, ValueError):
        retry_after = None
    return from_status(error.code().name, error.details() or "", url, retry_after)


class Call:
    """A request under way."""

    def __init__(self, transport: Transport, method: str, request: Request, terms: Terms) -> None:
        self._transport = transport
        self._method, self._request, self._terms = method, request, terms
        self._patience = transport.replicas.patience(terms)
        self._cancelled = threading.Event()
        self._attempt()

    def result(self) -> Response:
        """Wait for the answer; a lost replica costs another attempt.

        Raises:
            TalksplatError: there is no answer, or it is an error; the client was closed.
            ChunkExpiredError: there was none within the deadline.
            CallCancelledError: `cancel` was called.
        """
        while not self._cancelled.is_set():
            try:
                response = self._future.result()
            except grpc.FutureCancelledError:
                if not self._cancelled.is_set():
                    raise _closed() from None
            except grpc.RpcError as error:
                failure = _failure(error, self._url)
                failure.__cause__ = error
                if not self._cancelled.wait(
                    self._patience.pause(failure, self._url, min(self._ended, time.monotonic()))
                ):
                    self._attempt()
            else:
                self._transport.replicas.succeeded()
                return response
        raise CallCancelledError

    def cancel(self) -> None:
        """Drop the request, from any thread."""
        self._cancelled.set()
        self._future.cancel()

    def _attempt(self) -> None:
        self._url = self._transport.replicas.current
        timeout = self._patience.begin(self._request)
        self._ended = math.inf
        self._future = self._transport.start(self._url, self._method, self._request, timeout, self._terms)
        self._future.add_done_callback(self._note_end)
        if self._cancelled.is_set():
            self._future.cancel()

    def _note_end(self, future: Any) -> None:
        self._ended = time.monotonic()  # the consumer may come to see it much later


class Transport:
    """Channels to all replicas, opened when first needed."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self._closed = False
        self._channels = {url: replicas.channel(grpc, url) for url in replicas.urls}
        self._stubs = {url: service_pb2_grpc.GRPCInferenceServiceStub(each) for url, each in self._channels.items()}

    def call(self, method: str, request: Request, terms: Terms) -> Call:
        """Send a request to the current replica."""
        return Call(self, method, request, terms)

    def start(self, url: str, method: str, request: Request, timeout: float, terms: Terms) -> Any:
        """One attempt at one replica: a gRPC future."""
        if self._closed:
            raise _closed()
        metadata = self.replicas.metadata(terms)
        return getattr(self._stubs[url], method).future(request, timeout=timeout, metadata=metadata)

    def ask(self, url: str, method: str, request: Request, terms: Terms) -> Response:
        """One attempt at one replica.

        Raises:
            TalksplatError: there is no answer, or it is an error.
        """
        try:
            return self.start(url, method, request, terms.timeout, terms).result()
        except grpc.RpcError as error:
            raise _failure(error, url) from error

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()


class AsyncCall:
    """Twin of `Call`."""

    def __init__(self, transport: AsyncTransport, method: str, request: Request, terms: Terms) -> None:
        self._cancelled = False
        self._task = asyncio.ensure_future(self._run(transport, method, request, terms))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # may never be asked for

    async def result(self) -> Response:
        """See `Call.result`. A caller that is cancelled while it waits can ask again."""
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._task.cancelled():
                raise (CallCancelledError() if self._cancelled else _closed()) from None
            raise

    def cancel(self) -> None:
        """Drop the request."""
        self._cancelled = True
        self._task.cancel()

    async def _run(self, transport: AsyncTransport, method: str, request: Request, terms: Terms) -> Response:
        replicas = transport.replicas
        patience = replicas.patience(terms)
        while True:
            url = replicas.current
            try:
                response = await transport.start(url, method, request, patience.begin(request), terms)
            except TalksplatError as failure:
                await asyncio.sleep(patience.pause(failure, url, time.monotonic()))
            else:
                replicas.succeeded()
                return response


class AsyncTransport:
    """Twin of `Transport`; make it inside the event loop that uses it."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self._closed = False
        self._channels = {url: replicas.channel(grpc.aio, url) for url in replicas.urls}
        self._stubs = {url: service_pb2_grpc.GRPCInferenceServiceStub(each) for url, each in self._channels.items()}

    def call(self, method: str, request: Request, terms: Terms) -> AsyncCall:
        """Send a request to the current replica."""
        return AsyncCall(self, method, request, terms)

    async def ask(self, url: str, method: str, request: Request, terms: Terms) -> Response:
        """See `Transport.ask`."""
        return await self.start(url, method, request, terms.timeout, terms)

    async def start(self, url: str, method: str, request: Request, timeout: float, terms: Terms) -> Response:
        """One attempt at one replica; errors as of `ask`."""
        if self._closed:
            raise _closed()
        metadata = self.replicas.metadata(terms)
        try:
            return await getattr(self._stubs[url], method)(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise _failure(error, url) from error

    async def close(self) -> None:
        """Close all connections."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close()
