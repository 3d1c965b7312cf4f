"""gRPC, blocking and asyncio: one request to whichever replica answers, retried while that is worth it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from ._config import Retry, Timeout
from ._exceptions import InvalidRequestError, TalksplatError, from_status
from ._protocol import Request, Response

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # an utterance's frames take tens of megabytes
    ("grpc.max_send_message_length", -1),
    # gRPC itself would look for a lost server more and more seldom, up to every two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class CallCancelledError(Exception):
    """`cancel` was called; never leaves this package."""


class Replicas:
    """Which of several equal servers is asked: always the same one, until it fails.

    Raises:
        InvalidRequestError: no address, or one that is not ``host:port``.
    """

    def __init__(self, urls: str | Sequence[str], timeout: Timeout, retry: Retry) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        for url in self.urls:
            host, _, port = url.rpartition(":")
            if not host or "/" in url or not port.isdigit():
                raise InvalidRequestError(f"the address is {url!r}, expected host:port such as 127.0.0.1:8001")
        if not self.urls:
            raise InvalidRequestError("there is no address to connect to")
        self.current = self.urls[0]
        self._reached = False
        self._timeout = timeout
        self._retry = retry

    def succeeded(self) -> None:
        """A replica has answered: from now on a failure is a loss, worth waiting for."""
        self._reached = True

    def failed(self, url: str) -> None:
        """Turn to the next replica, unless another request has done so already."""
        if self.current == url:
            self.current = self.urls[(self.urls.index(url) + 1) % len(self.urls)]

    def patience(self) -> Patience:
        """For one request."""
        if self._reached:
            return Patience(math.inf, self._timeout.recovery, self._retry)
        return Patience(len(self.urls), math.inf, self._retry)


class Patience:
    """How long, and how often, one request is tried."""

    def __init__(self, attempts: float, seconds: float, retry: Retry) -> None:
        self._attempts = attempts
        self._seconds = seconds
        self._retry = retry
        self._pause = retry.first
        self._since: float | None = None

    def pause(self, error: TalksplatError) -> float | None:
        """Seconds to wait before the next attempt; None: give up."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._attempts -= 1
        pause = self._pause
        self._pause = min(pause * self._retry.factor, self._retry.longest)
        if not error.retryable or self._attempts < 1 or now + pause > self._since + self._seconds:
            return None
        return pause


def _failure(error: Any, url: str) -> TalksplatError:
    return from_status(error.code().name, error.details() or "", url)


class Call:
    """A request under way."""

    def __init__(self, transport: Transport, method: str, request: Request, timeout: float) -> None:
        self._transport = transport
        self._method, self._request, self._timeout = method, request, timeout
        self._cancelled = threading.Event()
        self._attempt()

    def result(self) -> Response:
        """Wait for the answer; a lost replica costs another attempt.

        Raises:
            TalksplatError: there is no answer, or it is an error.
            CallCancelledError: `cancel` was called.
        """
        replicas = self._transport.replicas
        patience = replicas.patience()
        while not self._cancelled.is_set():
            try:
                response = self._future.result()
            except grpc.FutureCancelledError:
                break
            except grpc.RpcError as error:
                failure = _failure(error, self._url)
                if failure.retryable:
                    replicas.failed(self._url)
                pause = patience.pause(failure)
                if pause is None:
                    raise failure from error
                if not self._cancelled.wait(pause):
                    self._attempt()
            else:
                replicas.succeeded()
                return response
        raise CallCancelledError

    def cancel(self) -> None:
        """Drop the request, from any thread."""
        self._cancelled.set()
        self._future.cancel()

    def _attempt(self) -> None:
        self._url = self._transport.replicas.current
        self._future = self._transport.start(self._url, self._method, self._request, self._timeout)
        if self._cancelled.is_set():
            self._future.cancel()


class Transport:
    """Channels to all replicas, opened when first needed."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self._channels = {url: grpc.insecure_channel(url, CHANNEL_OPTIONS) for url in replicas.urls}
        self._stubs = {url: service_pb2_grpc.GRPCInferenceServiceStub(each) for url, each in self._channels.items()}

    def call(self, method: str, request: Request, timeout: float) -> Call:
        """Send a request to the current replica."""
        return Call(self, method, request, timeout)

    def start(self, url: str, method: str, request: Request, timeout: float) -> Any:
        """One attempt at one replica: a gRPC future."""
        return getattr(self._stubs[url], method).future(request, timeout=timeout)

    def ask(self, url: str, method: str, request: Request, timeout: float) -> Response:
        """One attempt at one replica.

        Raises:
            TalksplatError: there is no answer, or it is an error.
        """
        try:
            return self.start(url, method, request, timeout).result()
        except grpc.RpcError as error:
            raise _failure(error, url) from error

    def close(self) -> None:
        """Close all connections."""
        for channel in self._channels.values():
            channel.close()


class AsyncCall:
    """Twin of `Call`."""

    def __init__(self, transport: AsyncTransport, method: str, request: Request, timeout: float) -> None:
        self._task = asyncio.ensure_future(self._run(transport, method, request, timeout))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # may never be asked for

    async def result(self) -> Response:
        """See `Call.result`. A caller that is cancelled while it waits can ask again."""
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._task.cancelled():
                raise CallCancelledError from None
            raise

    def cancel(self) -> None:
        """Drop the request."""
        self._task.cancel()

    async def _run(self, transport: AsyncTransport, method: str, request: Request, timeout: float) -> Response:
        replicas = transport.replicas
        patience = replicas.patience()
        while True:
            url = replicas.current
            try:
                response = await transport.ask(url, method, request, timeout)
            except TalksplatError as failure:
                if failure.retryable:
                    replicas.failed(url)
                pause = patience.pause(failure)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                replicas.succeeded()
                return response


class AsyncTransport:
    """Twin of `Transport`; make it inside the event loop that uses it."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self._channels = {url: grpc.aio.insecure_channel(url, CHANNEL_OPTIONS) for url in replicas.urls}
        self._stubs = {url: service_pb2_grpc.GRPCInferenceServiceStub(each) for url, each in self._channels.items()}

    def call(self, method: str, request: Request, timeout: float) -> AsyncCall:
        """Send a request to the current replica."""
        return AsyncCall(self, method, request, timeout)

    async def ask(self, url: str, method: str, request: Request, timeout: float) -> Response:
        """See `Transport.ask`."""
        try:
            return await getattr(self._stubs[url], method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, url) from error

    async def close(self) -> None:
        """Close all connections."""
        for channel in self._channels.values():
            await channel.close()
