"""Owns the way off the caller's thread: private copies of small tensors, one worker in order."""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Job = TypeVar("Job")

POLL_S = 0.05
PATIENCE_S = 30.0


class Snapshot:
    """A private copy of a tensor, taken without waiting for it.

    On an accelerator the copy goes to pinned memory on the caller's stream, with an event behind
    it; on the CPU it is a plain clone.

    Args:
        tensor: any shape and device; may be changed by its owner as soon as this returns.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            self._copy = tensor.clone()
        elif tensor.device.type == "cuda":
            self._copy = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:  # no pinned copies there: a copy that waits is slower, and correct
            self._copy = tensor.to("cpu", copy=True)

    @property
    def size_bytes(self) -> int:
        """Size of the copy."""
        return self._copy.nbytes

    def wait(self) -> Tensor:
        """The copy, on the CPU, once it is whole; called by the worker."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class Worker(Generic[Job]):
    """One thread that handles jobs in the order they came, until it is finished.

    A daemon with an exit handler rather than a plain thread: the interpreter then waits for the
    jobs that are left, and not for a run that was given up.

    Args:
        handle: called in the thread with each job; must not raise.
        is_abandoned: asked in the thread now and then while there is nothing to do; True ends it.
        on_end: called in the thread after the last job; must not raise.
        after: a worker whose thread must have ended before the first job is handled.
    """

    def __init__(
        self,
        handle: Callable[[Job], None],
        *,
        is_abandoned: Callable[[], bool],
        on_end: Callable[[], None],
        after: Worker[Job] | None = None,
    ) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._last_sign_s = time.monotonic()
        work = functools.partial(self._work, handle, is_abandoned, on_end, after)
        self._thread = threading.Thread(target=work, name="sd-progress", daemon=True)
        self._thread.start()
        atexit.register(self.finish)

    @property
    def is_alive(self) -> bool:
        """Whether jobs are still handled; False once finished, or abandoned."""
        return self._thread.is_alive()

    @property
    def is_current_thread(self) -> bool:
        """Whether it is the worker itself that asks."""
        return threading.current_thread() is self._thread

    def submit(self, job: Job) -> None:
        """Hand over a job; returns at once."""
        self._jobs.put(job)

    def finish(self, patience_s: float = PATIENCE_S) -> bool:
        """Wait until all jobs are handled and the thread has ended.

        Args:
            patience_s: give up when no job was finished for so many seconds.

        Returns:
            False if it was given up; the thread then goes on by itself.
        """
        self._jobs.put(None)
        began_s = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            if time.monotonic() - max(began_s, self._last_sign_s) > patience_s:
                return False
        return True

    def _work(
        self,
        handle: Callable[[Job], None],
        is_abandoned: Callable[[], bool],
        on_end: Callable[[], None],
        after: Worker[Job] | None,
    ) -> None:
        if after is not None:
            after._thread.join()
        try:
            with torch.no_grad():
                while (job := self._next(is_abandoned)) is not None:
                    handle(job)
                    self._last_sign_s = time.monotonic()
                on_end()
        finally:
            atexit.unregister(self.finish)

    def _next(self, is_abandoned: Callable[[], bool]) -> Job | None:
        signs = 0
        while True:
            try:
                return self._jobs.get(timeout=POLL_S)
            except queue.Empty:
                # twice, because another thread's stack may be seen half way through a change
                signs = signs + 1 if is_abandoned() else 0
                if signs == 2:
                    return None
