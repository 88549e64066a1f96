"""Owns the way off the caller's thread: private copies of small tensors, one worker in order."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Job = TypeVar("Job")

POLL_S = 0.1


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
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:  # no pinned copies there: a copy that waits is slower, and correct
            self._copy = tensor.to("cpu", copy=True)

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
    """

    def __init__(
        self,
        handle: Callable[[Job], None],
        *,
        is_abandoned: Callable[[], bool],
        on_end: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._is_abandoned = is_abandoned
        self._on_end = on_end
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sd-progress", daemon=True)
        self._thread.start()
        atexit.register(self.finish)

    @property
    def is_alive(self) -> bool:
        """Whether jobs are still handled; False once finished, or abandoned."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Hand over a job; returns at once."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait until all jobs are handled and the thread has ended; again does nothing."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        with torch.no_grad():
            while (job := self._next()) is not None:
                self._handle(job)
            self._on_end()
        atexit.unregister(self.finish)

    def _next(self) -> Job | None:
        while True:
            try:
                return self._jobs.get(timeout=POLL_S)
            except queue.Empty:
                if self._is_abandoned():
                    return None
