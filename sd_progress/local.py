"""Owns jobs and events in this process: those who ask and those who paint meet in memory."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from .jobs import BEGINNING, Event, Job, Load, QueueFullError, UnknownRunError

__all__ = ["Limits", "LocalBench", "LocalHub"]

Position = tuple[int, int]
"""An event's id as numbers: milliseconds, and count within the millisecond."""

_FULL: Final = "{what} must be below {most}, got as many; ask again when one is over"


@dataclass(frozen=True)
class Limits:
    """How much a hub takes and keeps.

    Attributes:
        max_waiting: jobs that nobody paints yet.
        max_per_client: jobs of one client that are not over.
        max_events: of one run; beyond it, the oldest preview makes room.
        max_finished: runs that are over and can still be read; the oldest is forgotten.
        keep_s: seconds until a run that is over is forgotten.
        max_bytes: of all finished runs' events together, roughly; the oldest run is forgotten.
    """

    max_waiting: int = 64
    max_per_client: int = 16
    max_events: int = 512
    max_finished: int = 64
    keep_s: float = 900.0
    max_bytes: int = 128 * 2**20


class LocalHub:
    """A `Hub` whose benches are in the same process. Any number of event loops and threads.

    Args:
        limits: how much it takes and keeps.
        clock: seconds that only grow; for what is forgotten after a while.
        wall_clock: seconds since 1970; for the events' ids.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits or Limits()
        self._clock, self._wall_clock = clock, wall_clock
        self._changed = threading.Condition(threading.RLock())
        self._waiting: OrderedDict[str, _Run] = OrderedDict()
        self._running: dict[str, _Run] = {}
        self._finished: OrderedDict[str, _Run] = OrderedDict()
        self._benches: set[LocalBench] = set()
        self._is_closed = False

    def bench(self) -> LocalBench:
        """For one painter, in a thread of its own; several share the work."""
        bench = LocalBench(self)
        with self._changed:
            self._benches.add(bench)
        return bench

    # Those who ask ------------------------------------------------------------------------

    async def submit(self, job: Job) -> None:
        """Have it painted, after all that wait already.

        Raises:
            QueueFullError: too many are waiting, or too many are of this client.
            ValueError: there is a run of this id already.
        """
        with self._changed:
            self._check_room(job)
            run = _Run(job, max_events=self._limits.max_events)
            self._waiting[job.id] = run
            self._add(run, Event("queued", {"position": len(self._waiting) - 1}))
            self._changed.notify()

    async def events(self, run_id: str, after: str = BEGINNING) -> AsyncIterator[Event]:
        """The run's events behind that id, as they happen, up to its last.

        Who reads too slowly for the number of events that are kept misses previews.

        Raises:
            UnknownRunError: there is no such run.
            ValueError: `after` is no event's id.
        """
        position = position_of(after)
        run = self._known(run_id)
        with run.watched() as changed:
            while True:
                changed.clear()
                with self._changed:
                    events, is_over = run.behind(position), run.is_over or self._is_closed
                for event in events:
                    yield event
                    position = position_of(event.id)
                if is_over:
                    return
                await changed.wait()

    async def cancel(self, run_id: str) -> None:
        """Have it end soon: at once where it still waits, at its next step where it is painted.

        Raises:
            UnknownRunError: there is no such run.
        """
        with self._changed:
            run = self._known(run_id)
            run.is_cancelled = True
            if run_id in self._waiting:
                self._end(run, Event("cancelled"))
                self._tell_positions()

    async def load(self) -> Load:
        """How much there is to do."""
        with self._changed:
            return Load(len(self._waiting), len(self._running), len(self._benches))

    async def aclose(self) -> None:
        """Let go of everything: painters are told to stop, who iterates gets no more."""
        with self._changed:
            self._is_closed = True
            for run in (*self._waiting.values(), *self._running.values()):
                run.wake()
            self._changed.notify_all()

    # Those who paint ----------------------------------------------------------------------

    def _claim(self, bench: LocalBench, timeout_s: float) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_left(bench), timeout_s)
            if not self._waiting or self._is_left(bench):
                return None
            run_id, run = self._waiting.popitem(last=False)
            self._running[run_id] = run
            self._tell_positions()
            return run.job

    def _publish(self, job: Job, event: Event) -> bool:
        with self._changed:
            run = self._running.get(job.id)
            if run is None:
                return False
            if event.is_last:
                self._end(run, event)
            else:
                self._add(run, event)
            return self._is_wanted(run)

    def _keep(self, job: Job) -> bool:
        with self._changed:
            run = self._running.get(job.id)
            return run is not None and self._is_wanted(run)

    def _close(self, bench: LocalBench) -> None:
        with self._changed:
            self._benches.discard(bench)
            self._changed.notify_all()

    # With the lock held -------------------------------------------------------------------

    def _is_left(self, bench: LocalBench) -> bool:
        return self._is_closed or bench not in self._benches

    def _is_wanted(self, run: _Run) -> bool:
        return not (run.is_cancelled or self._is_closed)

    def _check_room(self, job: Job) -> None:
        self._forget()
        if self._is_closed:
            raise QueueFullError("hub must be open, got one that is closed; ask the next one")
        if any(job.id in runs for runs in (self._waiting, self._running, self._finished)):
            raise ValueError(f"job.id must be new, got {job.id!r} again; make one for each run")
        unfinished = (*self._waiting.values(), *self._running.values())
        of_client = sum(run.job.client == job.client for run in unfinished)
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFullError(_FULL.format(what="waiting runs", most=self._limits.max_waiting))
        if of_client >= self._limits.max_per_client:
            most = self._limits.max_per_client
            raise QueueFullError(_FULL.format(what="runs of one client", most=most))

    def _known(self, run_id: str) -> _Run:
        with self._changed:
            self._forget()
            for runs in (self._running, self._waiting, self._finished):
                if run_id in runs:
                    return runs[run_id]
        raise UnknownRunError(f"run_id must be that of a run, got {run_id!r}; it may be forgotten")

    def _add(self, run: _Run, event: Event) -> None:
        run.add(event, int(self._wall_clock() * 1000))

    def _end(self, run: _Run, event: Event) -> None:
        self._add(run, event)
        self._waiting.pop(run.job.id, None)
        self._running.pop(run.job.id, None)
        run.ended_s = self._clock()
        self._finished[run.job.id] = run
        self._forget()

    def _tell_positions(self) -> None:
        for position, run in enumerate(self._waiting.values()):
            self._add(run, Event("queued", {"position": position}))

    def _forget(self) -> None:
        """What is over for long, or beyond what is kept; the newest always stays."""
        oldest_s = self._clock() - self._limits.keep_s
        kept_bytes = sum(run.num_bytes for run in self._finished.values())
        while self._finished:
            run = next(iter(self._finished.values()))
            is_old = run.ended_s < oldest_s
            is_many = len(self._finished) > self._limits.max_finished
            is_much = kept_bytes > self._limits.max_bytes and len(self._finished) > 1
            if not (is_old or is_many or is_much):
                return
            kept_bytes -= run.num_bytes
            del self._finished[run.job.id]


class LocalBench:
    """One painter's side of a `LocalHub`; a `Bench`."""

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub

    def claim(self, timeout_s: float) -> Job | None:
        """The job that waits longest; None if there is none in time, or the hub is closed."""
        return self._hub._claim(self, timeout_s)

    def publish(self, job: Job, event: Event) -> bool:
        """Add an event to the job's run; whether it is wanted still. After its last, nothing is."""
        return self._hub._publish(job, event)

    def keep(self, job: Job) -> bool:
        """Whether it is wanted still; a job in the same process needs no sign of life."""
        return self._hub._keep(job)

    def close(self) -> None:
        """Nothing more will be claimed; a `claim` that waits returns None."""
        self._hub._close(self)


@dataclass(eq=False)
class _Run:
    """One job's events, and who waits for the next. All but `watched` with the hub's lock held."""

    job: Job
    max_events: int
    is_cancelled: bool = False
    is_over: bool = False
    ended_s: float = 0.0
    num_bytes: int = 0
    _events: list[Event] = field(default_factory=list)
    _last: Position = (0, 0)
    _watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = field(default_factory=dict)

    def add(self, event: Event, now_ms: int) -> None:
        """Give the event its id, after all earlier ones even if the clock was set back."""
        self._last = max((now_ms, 0), (self._last[0], self._last[1] + 1))
        self._events.append(replace(event, id="{}-{}".format(*self._last)))
        self.num_bytes += _num_bytes(event)
        self.is_over = event.is_last
        if len(self._events) > self.max_events:
            self._drop_preview()
        self.wake()

    def behind(self, position: Position) -> Sequence[Event]:
        """Events after that id, oldest first."""
        count = 0
        for event in reversed(self._events):
            if position_of(event.id) <= position:
                break
            count += 1
        return self._events[len(self._events) - count :]

    @contextlib.contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set whenever there is something new."""
        changed = asyncio.Event()
        self._watchers[changed] = asyncio.get_running_loop()
        try:
            yield changed
        finally:
            del self._watchers[changed]

    def wake(self) -> None:
        """Tell all who watch; each loop is woken once, however many do."""
        by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for changed, loop in tuple(self._watchers.items()):
            by_loop.setdefault(loop, []).append(changed)
        for loop, watchers in by_loop.items():
            with contextlib.suppress(RuntimeError):  # it is closed: nobody waits there any more
                loop.call_soon_threadsafe(_set_all, watchers)

    def _drop_preview(self) -> None:
        for index, event in enumerate(self._events):
            if event.name == "preview":
                self.num_bytes -= _num_bytes(event)
                del self._events[index]
                return


def position_of(event_id: str) -> Position:
    """An event's id as numbers, to be compared.

    Raises:
        ValueError: it is none.
    """
    milliseconds, dash, count = event_id.partition("-")
    parts = (milliseconds, count if dash else "0")
    if not all(_is_whole(part) for part in parts):
        expected = "the id of an event must be milliseconds-count"
        raise ValueError(f"{expected}, got {event_id[:80]!r}; for example {BEGINNING}")
    return int(parts[0]), int(parts[1])


def _is_whole(text: str) -> bool:
    """Whether it is a number of 64 bits, which Redis' ids are of too."""
    return text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 2**64


def _num_bytes(event: Event) -> int:
    """Roughly: the texts, of which those of pictures are nearly everything."""
    texts = [x for x in event.data.values() if isinstance(x, str)]
    lists = [x for x in event.data.values() if isinstance(x, list | tuple)]
    return sum(map(len, texts)) + sum(len(x) for xs in lists for x in xs if isinstance(x, str))


def _set_all(watchers: Sequence[asyncio.Event]) -> None:
    for changed in watchers:
        changed.set()
