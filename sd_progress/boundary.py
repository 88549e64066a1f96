"""Owns the one boundary that no failure of a preview passes on its way to the run."""

from __future__ import annotations

import logging
import threading
import warnings
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal

OnError = Literal["warn", "raise"]

_log = logging.getLogger(__name__)


class PreviewWarning(UserWarning):
    """A part of the preview failed or is a makeshift; the run itself is as without a preview."""


class Boundary:
    """Where failures end: told once for each part, or kept to be raised on the caller's thread.

    Args:
        on_error: `"warn"`, or `"raise"` to have failures raised by `raise_kept`.
    """

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._told: set[str] = set()
        self._lock = threading.Lock()  # every target has a thread
        self._kept: BaseException | None = None

    def begin_run(self) -> None:
        """Each run is told of its own failures, and of nothing from before."""
        self._told.clear()
        self._kept = None

    def around(self, part: str) -> AbstractContextManager[None]:
        """Keep a failure of the block from whoever called it; Ctrl-C passes."""
        return _Around(self, part)

    def report(self, part: str, error: BaseException) -> None:
        """Tell that `part` failed, if it is the first time."""
        if self._on_error == "raise":
            self._kept = self._kept or error
        else:
            self.tell(part, f"{part} failed: {_described(error)}; the run goes on")

    def explain(self, part: str, error: BaseException) -> None:
        """Like `report`, for an error whose message says all that there is to know."""
        if self._on_error == "raise":
            self._kept = self._kept or error
        else:
            self.tell(part, f"{error}; the run goes on")

    def tell(self, topic: str, message: str) -> None:
        """Warn, the first time for this topic."""
        with self._lock:
            is_first = topic not in self._told
            self._told.add(topic)
        if is_first:
            warn(message)

    def raise_kept(self) -> None:
        """With `on_error="raise"`, raise the first failure since the last call."""
        error, self._kept = self._kept, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # else it would hold this frame, and this frame the run's


class _Around(AbstractContextManager[None]):
    """A class, because a generator would take several times as long in each step."""

    __slots__ = ("_boundary", "_part")

    def __init__(self, boundary: Boundary, part: str) -> None:
        self._boundary = boundary
        self._part = part

    def __enter__(self) -> None:
        """Nothing has failed yet."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            self._boundary.report(self._part, error)
            return True
        return False


def warn(message: str) -> None:
    """A `PreviewWarning`, or a log record where warnings are errors: nothing may be raised."""
    try:
        warnings.warn(message, PreviewWarning, stacklevel=3)
    except Exception:  # the warning itself, or what a `showwarning` or a closed stream raises
        _log.warning(message)


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # there are exceptions that cannot say what they are
        return type(error).__name__
