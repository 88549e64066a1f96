"""Owns `sd-progress serve`: a hub, a painter in a thread of its own, and a web server, together.

With a hub in Redis there is no painter here, and nothing that it needs is loaded.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import uvicorn
from fastapi import FastAPI

from .arguments import UsageError
from .guard import is_loopback
from .jobs import Bench, Hub
from .local import Limits, LocalHub
from .server import Service, Settings, create_app

if TYPE_CHECKING:
    from .painter import Painter

__all__ = ["Task", "serve"]

_TOKEN: Final = re.compile(r"[!-~]{16,512}")
_BACKLOG: Final = 2048
_JOIN_S: Final = 10  # a step of a large model, and what it decodes then


@dataclass(frozen=True)
class Task:
    """What to serve and where.

    Attributes:
        model: None is the demo model.
        host, port: where to listen; port 0 is any that is free.
        device, dtype: as for `generate.load_pipeline`.
        limits: of the hub; in Redis, those on what waits.
        settings: of the service.
        redis: where the jobs go; None paints them here.
        prefix: of the fleet's keys in Redis.
    """

    model: str | None
    host: str
    port: int
    device: str
    dtype: str
    limits: Limits
    settings: Settings
    redis: str | None = None
    prefix: str = "sd-progress"


def serve(task: Task) -> None:
    """Serve until Ctrl-C or SIGTERM; the address is printed when it can be asked.

    Raises:
        UsageError: the model, the address or the token will not do.
    """
    check_token(task.host, task.settings.token)
    painted = local_painter(task) if task.redis is None else fleet(task.redis, task)
    with listening(task.host, task.port) as listener, painted as hub:
        run(create_app(hub, task.settings), listener, task.host)


def check_token(host: str, token: str | None) -> None:
    """Refuse to let in everyone from elsewhere.

    Raises:
        UsageError: a token is missing, too short to be one, or nothing that fits into a header.
    """
    advice = 'python -c "import secrets; print(secrets.token_urlsafe())" makes one'
    if token is None and not is_loopback(host):
        expected = f"--token must be given with --host {host}, which others can reach"
        raise UsageError(f"{expected}, got none; {advice}, or set SD_PROGRESS_TOKEN")
    if token is not None and _TOKEN.fullmatch(token) is None:
        expected = "--token must be 16 to 512 letters, digits and signs without spaces"
        raise UsageError(f"{expected}, got {len(token)} characters; {advice}")


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at that address.

    Raises:
        UsageError: there is none, or it is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        expected = "--host and --port must be an address of this machine that is free"
        raise UsageError(f"{expected}, got {host} and {port}; {error.strerror}") from error
    with listener:
        yield listener


@contextlib.contextmanager
def local_painter(task: Task) -> Iterator[Hub]:
    """A hub whose jobs are painted in this process.

    Raises:
        UsageError: there is no such model or device.
    """
    from .painter import load_painter

    painter = load_painter(task.model, device=task.device, dtype=task.dtype)
    hub = LocalHub(task.limits)
    with painting(painter, hub.bench()):
        yield hub


@contextlib.contextmanager
def fleet(url: str, task: Task) -> Iterator[Hub]:
    """A hub whose jobs are painted by workers anywhere.

    Raises:
        UsageError: the URL is none of Redis.
    """
    from .fleet import RedisHub

    try:
        yield RedisHub(
            url,
            prefix=task.prefix,
            max_waiting=task.limits.max_waiting,
            max_per_client=task.limits.max_per_client,
        )
    except ValueError as error:
        raise UsageError(f"--redis: {error}") from error


@contextlib.contextmanager
def painting(painter: Painter, bench: Bench) -> Iterator[None]:
    """Somebody paints, in a thread of its own, until this is left."""
    stop = threading.Event()

    def work() -> None:
        try:
            painter.work(bench, stop)
        finally:
            bench.close()

    thread = threading.Thread(target=work, name="sd-progress-painter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        bench.close()
        thread.join(_JOIN_S)


def run(app: FastAPI, listener: socket.socket, host: str) -> None:
    """Answer requests until told to stop by Ctrl-C or SIGTERM."""
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host

    def ready() -> None:
        print(f"Serving http://{shown}:{port} (Ctrl-C stops)", flush=True)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # to leave by the same way
    try:
        web_server(app, ready).run(sockets=[listener])
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)


def web_server(app: FastAPI, ready: Callable[[], None]) -> uvicorn.Server:
    """What answers requests; `run(sockets=[...])` does until `should_exit` is set, or a signal.

    Args:
        app: of `create_app`.
        ready: is called when requests are answered.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody can send them, and runs are counted by address
        ws="none",
        timeout_graceful_shutdown=5,
        backlog=_BACKLOG,
    )
    return _Server(config, app.state.service, ready)


class _Server(uvicorn.Server):
    """Tells when it is ready; ends open streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.aclose()
        await super().shutdown(sockets)
