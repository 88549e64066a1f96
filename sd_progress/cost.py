"""Owns what previews cost a run: measured as it goes, told in `Stats`, held under a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True)
class Stats:
    """What the previews of one run came to, so far.

    Attributes:
        steps: callbacks that were counted.
        frames: previews that were made.
        skipped: previews that `budget` did not allow.
        dropped: frames that targets which want only the newest lost to newer ones, on their way or
            in a full queue.
        left_out: frames that targets which want every one did not get, because both memory and
            disk were full.
        step_path_s: seconds in the run's own thread: copies, bookkeeping, and full VAE decodes.
        drain_s: seconds that the run waited for its files at the end.
        worker_s: processor time of the threads that decode and write.
        peak_backlog_bytes: the most memory that what waited to be drawn or written ever took.
        spilled_bytes: of that which waited on disk instead.
    """

    steps: int = 0
    frames: int = 0
    skipped: int = 0
    dropped: int = 0
    left_out: int = 0
    step_path_s: float = 0.0
    drain_s: float = 0.0
    worker_s: float = 0.0
    peak_backlog_bytes: int = 0
    spilled_bytes: int = 0


class Stopwatch:
    """Seconds inside of `with` blocks, which may be nested.

    Args:
        clock: seconds, monotonic.

    Attributes:
        total_s: of all blocks that were left.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.total_s = 0.0
        self._clock = clock
        self._depth = 0
        self._began_s = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._began_s = self._clock()
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.total_s += self._clock() - self._began_s

    def leave_out(self, seconds: float) -> None:
        """What was just done in the block is not to count."""
        self._began_s += seconds


@dataclass(frozen=True)
class Budget:
    """The share of a run that its previews may cost; None is without limit.

    All processor time of the previews' threads counts, as if the run had to wait for it. That is
    more than the run loses, so the share is kept on every machine.
    """

    share: float | None

    def affords(self, *, spent_s: float, more_s: float, elapsed_s: float) -> bool:
        """Whether something may be done.

        Args:
            spent_s: what previews have cost so far.
            more_s: what it is expected to cost, with what is still under way.
            elapsed_s: since the run began.
        """
        return self.share is None or spent_s + more_s <= self.share * elapsed_s
