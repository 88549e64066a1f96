"""Owns `sd-progress worker`: a model that paints the jobs of a fleet, and how it leaves it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from ._redis import errors, without_secrets
from .arguments import UsageError
from .fleet import RedisBench
from .jobs import Bench
from .painter import load_painter

__all__ = ["Task", "work"]


@dataclass(frozen=True)
class Task:
    """What to paint with, and for whom.

    Attributes:
        redis: where the jobs come from.
        model: None is the demo model.
        device, dtype: as for `generate.load_pipeline`.
        name: of the worker; None is made of the machine's name and the process' number.
        prefix: of the fleet's keys.
        lease_s: after so long without a sign of life, it is taken for dead.
        keep_s: until a run that is over is forgotten.
        grace_s: how long a job that is begun may go on after SIGTERM, before it is given back.
    """

    redis: str
    model: str | None
    device: str
    dtype: str
    name: str | None
    prefix: str
    lease_s: float
    keep_s: float
    grace_s: float


def work(task: Task) -> None:
    """Paint until SIGTERM or Ctrl-C; then finish the job, or give it back.

    Raises:
        UsageError: the model or the server will not do.
    """
    name = task.name or f"{socket.gethostname()}-{os.getpid()}"
    try:
        bench = RedisBench(
            task.redis, name, prefix=task.prefix, lease_s=task.lease_s, keep_s=task.keep_s
        )
    except ValueError as error:
        raise UsageError(f"--redis: {error}") from error
    painter = load_painter(task.model, device=task.device, dtype=task.dtype)
    print(f"{name} paints for {without_secrets(task.redis)} (Ctrl-C stops)", flush=True)
    try:
        with contextlib.closing(bench), told_to_stop(bench, task.grace_s) as stop:
            painter.work(bench, stop)
    except (errors.AuthenticationError, errors.NoPermissionError) as error:
        expected = "--redis must be a server that lets the worker do its work"
        raise UsageError(f"{expected}, got {without_secrets(task.redis)}; {error}") from error
    print("Stopped.", flush=True)


@contextlib.contextmanager
def told_to_stop(bench: Bench, grace_s: float) -> Iterator[threading.Event]:
    """Is set by SIGTERM or Ctrl-C; a second one, or the time, closes the bench."""
    stop, timers = threading.Event(), [threading.Timer(grace_s, bench.close)]

    def leave(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(0, bench.close) if stop.is_set() else timers[0]
        timers.append(timer)
        stop.set()
        timer.start()  # in a thread, for the main one may be within the bench

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(one, leave) for one in signals]
    try:
        yield stop
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
        for timer in timers:
            timer.cancel()
