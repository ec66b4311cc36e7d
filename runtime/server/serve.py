"""Runs the application on a socket until a signal, then drains it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from llmc.errors import UsageError
from llmc.runtime.engine import Engine
from llmc.runtime.server.app import create_app
from llmc.runtime.server.engine_thread import EngineThread
from llmc.runtime.server.errors import draining
from llmc.runtime.server.model import ServerLimits

_BACKLOG = 2048
_FLUSH_S = 5  # for the last bytes of answers, after the engine has finished them
_MAX_HEADER_BYTES = 32 << 10


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket, on a free port for 0; UsageError where it cannot be had."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise UsageError(
            f"cannot listen on {host} port {port}: {reason}", hint="choose another --host or --port"
        ) from exc
    return sock


def url_of(sock: socket.socket) -> str:
    """The API's base URL at `sock`."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(
    engine: Engine,
    sock: socket.socket,
    *,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    drain_timeout_s: float = 30.0,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serves `engine` on `sock` until SIGTERM or SIGINT; returns when it is drained.

    From the signal on new requests get 503, and running ones may finish within `drain_timeout_s`; a
    second signal gives them up at once. `on_ready` is called when requests are accepted.
    """
    thread = EngineThread(engine)
    app = create_app(thread, api_key=api_key, limits=limits)
    thread.start()
    try:
        asyncio.run(_serve(thread, app, sock, drain_timeout_s=drain_timeout_s, on_ready=on_ready))
    finally:
        thread.stop()


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which stops listening at once and then kills itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    thread: EngineThread,
    app: FastAPI,
    sock: socket.socket,
    *,
    drain_timeout_s: float,
    on_ready: Callable[[], None] | None,
) -> None:
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_graceful_shutdown=_FLUSH_S,
        )
    )
    with _signals() as signals:
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if on_ready is not None and server.started:
            on_ready()
        await _first(serving, signals.first)
        thread.draining = True
        # Still listening: clients learn by a 503 that they should go elsewhere.
        await _first(asyncio.ensure_future(thread.idle(drain_timeout_s)), signals.second)
        await thread.fail_all(draining())
        server.should_exit = True
        await serving


async def _first(work: asyncio.Future[Any], event: asyncio.Event) -> None:
    """Returns when `work` or `event` is done."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


class _Signals:
    """SIGTERM and SIGINT as events of the running loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals, loop = _Signals(), asyncio.get_running_loop()

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(signals.on_signal)

    # Only the main thread may have handlers; a server in another thread is stopped by its owner.
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
