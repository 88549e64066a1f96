"""Owns jobs and events in Redis: any number of web processes and of painting ones, anywhere.

A job is an entry of one stream, from which a consumer group gives it to one worker after the other
until one has brought it to its end. A run's events are entries of a stream of its own, and the id
of an event is the entry's id, so that every web process can resume for every viewer. See
docs/scaling.md for what is where, and what happens when something dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from ._redis import (
    AWAY,
    GROUP,
    OVER,
    Entry,
    Fields,
    Keys,
    aclose,
    close,
    connected,
    connected_async,
    errors,
    event_fields,
    event_of,
    is_away,
    job_fields,
    job_of,
)
from .jobs import (
    BEGINNING,
    Event,
    HubAwayError,
    Job,
    Load,
    QueueFullError,
    UnknownRunError,
)
from .local import position_of
from .redis_writer import RedisWriter

__all__ = ["RedisBench", "RedisHub", "RedisWriter"]

_PAGE: Final = 4  # events that are fetched at once
_BLOCK_MS: Final = 2000  # how long a reader waits before it looks whether its run is still there
_RETRY_S: Final = 0.5  # between two tries while there is no server
_LOOK_S: Final = 1.0  # how often any of the workers looks for jobs whose worker died
_WAITING_S: Final = 24 * 3600  # what nobody has touched for so long is forgotten
_ATTEND_S: Final = 2.0  # how often viewers learn that they moved up
_NEAR: Final = 100  # who is so near to the front learns it
_ALIVE_S: Final = 60.0  # a worker that was not heard of for longer is not counted
_NEWEST_PREVIEWS: Final = 8  # for viewers that fall behind
_NEWEST_OTHERS: Final = 64
_NOBODY: Final = "nobody"  # whom jobs belong to that were given back
_FULL: Final = "{what} must be below {most}, got as many; ask again when one is over"

_log = logging.getLogger(__name__)


class RedisHub:
    """A `Hub` in Redis; any number of them share the jobs and the runs of one prefix.

    However many watch a run here, one reader follows it in Redis. Who watches too slowly misses
    previews, and nothing else.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "sd-progress",
        max_waiting: int = 1000,
        max_per_client: int = 16,
        unwatched_s: float = 30.0,
        keep_s: float = 900.0,
        max_connections: int = 1000,
    ) -> None:
        """Choose the server; it is reached for when it is needed.

        Args:
            url: `redis://[[user]:password@]host[:port][/database]`, `rediss://` for TLS,
                `unix:///path/of/socket`, `redis+cluster://host:port` of any node, or
                `redis+sentinel://host,host-2/service`.
            prefix: of all keys; one fleet has one.
            max_waiting: jobs that nobody paints yet.
            max_per_client: jobs of one client that are not over; a client "" has no such limit.
            unwatched_s: after so long without a viewer, a run ends whose job does not `stays`.
            keep_s: seconds until a run that was cancelled before it began is forgotten.
            max_connections: to Redis; each run that is watched here takes one.

        Raises:
            ValueError: `url` or `prefix` is none.
        """
        self._keys = Keys(prefix)
        self._max_waiting, self._max_per_client = max_waiting, max_per_client
        self._unwatched_ms = int(unwatched_s * 1000)
        self._keep_s = math.ceil(keep_s)
        self._redis = connected_async(url, max_connections=32)
        self._reading = connected_async(url, max_connections=max_connections)
        self._feeds: dict[str, _Feed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._attending: asyncio.Task[None] | None = None
        self._submitting = asyncio.Lock()  # so that only other processes come between
        self._is_closed = False

    # Jobs

    async def submit(self, job: Job) -> None:
        """Have it painted, after all that wait already.

        Raises:
            QueueFullError: too many are waiting, or too many are of this client.
            ValueError: there is a run of this id already.
            HubAwayError: there is no server.
        """
        async with self._submitting, _reaching():
            await self._begin(job, await self._room_for(job))
            try:
                while (entry := await self._added(job)) is None:
                    pass
            except QueueFullError:
                await self._redis.delete(*self._keys_of(job.id))
                raise
            await self._redis.hset(self._keys.run(job.id), "entry", entry)

    async def _room_for(self, job: Job) -> int:
        """How many wait."""
        of_client = await self._redis.scard(self._keys.unfinished(job.client)) if job.client else 0
        waiting, _ = await self._counted()
        if waiting >= self._max_waiting:
            raise QueueFullError(_FULL.format(what="waiting runs", most=self._max_waiting))
        if of_client >= self._max_per_client:
            most = self._max_per_client
            raise QueueFullError(_FULL.format(what="runs of one client", most=most))
        return waiting

    async def _counted(self) -> tuple[int, int]:
        """Jobs that wait, and jobs that are being painted."""
        while True:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xlen(self._keys.jobs)
                pipe.xpending(self._keys.jobs, GROUP)
                length, pending = await pipe.execute(raise_on_error=False)
            if not isinstance(pending, Exception):
                return max(0, length - pending["pending"]), pending["pending"]
            if "NOGROUP" not in str(pending):
                raise pending
            with contextlib.suppress(errors.ResponseError):  # another one was quicker
                await self._redis.xgroup_create(self._keys.jobs, GROUP, id="0", mkstream=True)

    async def _begin(self, job: Job, position: int) -> None:
        """The run's own keys, which must be there before anybody can claim the job."""
        run, events, watched = self._keys_of(job.id)
        if not await self._redis.hsetnx(run, "client", job.client):
            raise ValueError(f"job.id must be new, got {job.id!r} again; make one for each run")
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(run, "position", position)
            pipe.xadd(events, event_fields(Event("queued", {"position": position})))
            pipe.expire(run, _WAITING_S)
            pipe.expire(events, _WAITING_S)
            pipe.set(watched, 1, px=self._unwatched_ms)
            await pipe.execute()

    async def _added(self, job: Job) -> bytes | None:
        """The job's entry; None where another process added one meanwhile: it is to be tried again.

        Where the answer was lost, it may be there twice; who claims it sees that.
        """
        unfinished = self._keys.unfinished(job.client)
        async with self._redis.pipeline(transaction=True) as pipe:
            try:
                await pipe.watch(self._keys.tickets)
                await self._room_for(job)
                pipe.multi()
                pipe.incr(self._keys.tickets)
                pipe.sadd(unfinished, job.id)
                pipe.expire(unfinished, _WAITING_S)
                pipe.xadd(self._keys.jobs, job_fields(job))
                entry: bytes = (await pipe.execute())[-1]
            except errors.WatchError:
                return None
        return entry

    async def cancel(self, run_id: str) -> None:
        """Have it end soon: at once where nobody has claimed it, else when its worker looks.

        Raises:
            UnknownRunError: there is no such run.
            HubAwayError: there is no server.
        """
        async with _reaching():
            while True:
                with contextlib.suppress(errors.WatchError):
                    return await self._cancelled(run_id)

    async def _cancelled(self, run_id: str) -> None:
        run, events, _ = self._keys_of(run_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(run)
            client, state, owner, entry = await pipe.hmget(run, "client", "state", "owner", "entry")
            if client is None:
                raise _unknown(run_id)
            if state == OVER:
                return
            pipe.multi()
            pipe.hset(run, "cancelled", 1)
            if owner is None:
                pipe.xadd(events, event_fields(Event("cancelled")))
                pipe.hset(run, "state", OVER)
                pipe.expire(run, self._keep_s)
                pipe.expire(events, self._keep_s)
            await pipe.execute()
        if owner is None and entry is not None:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xdel(self._keys.jobs, entry)
                pipe.srem(self._keys.unfinished(client.decode()), run_id)
                await pipe.execute()

    async def load(self) -> Load:
        """How much there is to do; workers count that were heard of within a minute.

        Raises:
            HubAwayError: there is no server.
        """
        async with _reaching():
            waiting, running = await self._counted()
            workers = await self._redis.xinfo_consumers(self._keys.jobs, GROUP)
        alive = [
            worker["name"] != _NOBODY.encode() and worker["idle"] < _ALIVE_S * 1000
            for worker in workers
        ]
        return Load(waiting, running, sum(alive))

    # Events

    async def events(self, run_id: str, after: str = BEGINNING) -> AsyncIterator[Event]:
        """The run's events behind that id, as they happen, up to its last.

        Raises:
            UnknownRunError: there is no such run, or it was forgotten meanwhile.
            ValueError: `after` is no event's id.
            HubAwayError: there is no server when it begins; later, it is waited for.
        """
        newest = await self._newest(run_id, after)
        if newest.is_last and position_of(newest.id) <= position_of(after):
            return
        cursor, is_waiting = min(after, newest.id, key=position_of), newest.name == "queued"
        async for event in self._history(run_id, cursor):
            yield event
            cursor, is_waiting = event.id, event.name == "queued"
            if event.is_last:
                return
        with self._joined(run_id, cursor, is_waiting) as feed:
            if position_of(feed.begin) > position_of(cursor):  # another viewer began it meanwhile
                async for event in self._history(run_id, cursor):
                    yield event
                    cursor = event.id
                    if event.is_last:
                        return
            async for event in feed.behind(cursor):
                yield event

    async def _newest(self, run_id: str, after: str) -> Event:
        position_of(after)  # raises
        async with _reaching():
            found = await self._redis.xrevrange(self._keys.events(run_id), count=1)
            if not found:
                raise _unknown(run_id)
            newest = event_of(found[0])
            if not newest.is_last:
                await self._redis.set(self._keys.watched(run_id), 1, px=self._unwatched_ms)
            return newest

    async def _history(self, run_id: str, cursor: str) -> AsyncIterator[Event]:
        """What is there already, a few at a time: Redis keeps it, not this process."""
        is_more = True
        while is_more and not self._is_closed:
            async with _reaching():
                found = await self._redis.xrange(
                    self._keys.events(run_id), min=f"({cursor}", count=_PAGE
                )
            for event in map(event_of, found or ()):
                yield event
                cursor = event.id
            is_more = len(found or ()) == _PAGE

    @contextlib.contextmanager
    def _joined(self, run_id: str, cursor: str, is_waiting: bool) -> Iterator[_Feed]:
        """The run's feed, which is there as long as anybody is in this block."""
        feed = self._feeds.get(run_id)
        if feed is None:
            feed = self._feeds[run_id] = _Feed(cursor, is_waiting)
            if self._is_closed:
                feed.close()
            else:
                feed.reader = self._begun(self._follow(run_id, feed))
                self._attending = self._attending or self._begun(self._attend())
        feed.viewers += 1
        try:
            yield feed
        finally:
            feed.viewers -= 1
            if not feed.viewers:
                del self._feeds[run_id]
                if feed.reader is not None:
                    feed.reader.cancel()

    async def _follow(self, run_id: str, feed: _Feed) -> None:
        """Read the run's stream into the feed, up to its last event."""
        key = self._keys.events(run_id)
        while not feed.is_over:
            try:
                reply = await self._reading.xread({key: feed.end}, count=_PAGE, block=_BLOCK_MS)
                for entry in _entries(reply):
                    feed.add(event_of(entry))
                if not reply and not await self._redis.exists(key):
                    feed.fail(_unknown(run_id))
            except Exception as error:
                if not is_away(error):
                    feed.fail(error)
                await asyncio.sleep(_RETRY_S)

    async def _attend(self) -> None:
        """Tell others which runs are watched here, and viewers how far they have moved up."""
        while self._feeds:
            await asyncio.sleep(min(self._unwatched_ms / 3000, _ATTEND_S))
            try:
                await self._mark_watched()
                if any(feed.is_waiting for feed in self._feeds.values()):
                    await self._tell_positions()
            except Exception as error:  # the next time, then
                if not is_away(error):
                    _log.warning("runs cannot be attended to: %s", error)
        self._attending = None

    async def _mark_watched(self) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for run_id in self._feeds:
                pipe.set(self._keys.watched(run_id), 1, px=self._unwatched_ms)
            await pipe.execute()

    async def _tell_positions(self) -> None:
        """To those near the front; the others have time."""
        groups = await self._redis.xinfo_groups(self._keys.jobs)
        delivered = groups[0]["last-delivered-id"].decode()
        waiting = await self._redis.xrange(self._keys.jobs, f"({delivered}", count=_NEAR)
        for position, (_, fields) in enumerate(waiting):
            run_id = job_of(fields).id
            feed = self._feeds.get(run_id)
            if feed is not None and feed.is_waiting:
                with contextlib.suppress(errors.WatchError):  # it has begun, or another was quicker
                    await self._move_up(run_id, position)

    async def _move_up(self, run_id: str, position: int) -> None:
        run, events, _ = self._keys_of(run_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(run)
            owner, state, known = await pipe.hmget(run, "owner", "state", "position")
            if owner is None and state is None and known is not None and position < int(known):
                pipe.multi()
                pipe.hset(run, "position", position)
                pipe.xadd(events, event_fields(Event("queued", {"position": position})))
                await pipe.execute()

    def _begun(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _keys_of(self, run_id: str) -> tuple[str, str, str]:
        keys = self._keys
        return keys.run(run_id), keys.events(run_id), keys.watched(run_id)

    async def aclose(self) -> None:
        """Let go of everything; who iterates over events gets no more. Runs go on."""
        self._is_closed = True
        for feed in self._feeds.values():
            feed.close()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await aclose(self._reading)
        await aclose(self._redis)


class _Feed:
    """The newest events of one run, for all who watch it in this process.

    Args:
        begin: events behind this id are, or were, here.
        is_waiting: whether nobody paints it yet.
    """

    def __init__(self, begin: str, is_waiting: bool) -> None:
        self.begin = self.end = begin
        self.is_waiting = is_waiting
        self.viewers = 0
        self.reader: asyncio.Task[None] | None = None
        self.is_over = False
        self._events: deque[Event] = deque()
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def add(self, event: Event) -> None:
        """One more; the oldest of its kind makes room for it."""
        self._events.append(event)
        self.end, self.is_over = event.id, event.is_last
        self.is_waiting = event.name == "queued"
        alike = [one for one in self._events if _is_preview(one) == _is_preview(event)]
        if len(alike) > (_NEWEST_PREVIEWS if _is_preview(event) else _NEWEST_OTHERS):
            self._events.remove(alike[0])
        self._tell()

    def fail(self, error: Exception) -> None:
        """Raise it in all who watch."""
        self._failure, self.is_over = error, True
        self._tell()

    def close(self) -> None:
        """Nobody gets any more."""
        self._events.clear()
        self.is_over = True
        self._tell()

    async def behind(self, cursor: str) -> AsyncIterator[Event]:
        """The events behind that id which are still here, as they come."""
        position = position_of(cursor)
        while True:
            event = next((one for one in self._events if position_of(one.id) > position), None)
            if event is not None:
                yield event
                position = position_of(event.id)
            elif self._failure is not None:
                raise self._failure
            elif self.is_over:
                return
            else:
                await self._news.wait()

    def _tell(self) -> None:
        told, self._news = self._news, asyncio.Event()
        told.set()


@contextlib.asynccontextmanager
async def _reaching() -> AsyncIterator[None]:
    """Where there is no server, that is what is raised."""
    try:
        yield
    except Exception as error:
        if not is_away(error):
            raise
        expected = "Redis must be there to take and to show runs, got none"
        raise HubAwayError(f"{expected}; ask again") from error


def _is_preview(event: Event) -> bool:
    return event.name == "preview"


def _unknown(run_id: str) -> UnknownRunError:
    return UnknownRunError(f"run_id must be that of a run, got {run_id!r}; it may be forgotten")


# Painting


@dataclass(eq=False)
class _Held:
    """A job that is this worker's.

    Attributes:
        entry: of the jobs stream.
        owner: made for this claim; as long as the run has it, it is this worker's.
        renewed_s: when the lease was.
        sizes: bytes of the newest events.
        is_cut: whether older events than those were left out for their size.
    """

    job: Job
    entry: bytes
    owner: bytes
    renewed_s: float
    sizes: deque[int] = field(default_factory=deque)
    is_cut: bool = False


class RedisBench:
    """A `Bench` in Redis: one worker of any number.

    A job belongs to who claimed it as long as it publishes or keeps at least once per lease. After
    that another worker takes it over and begins anew; nothing more of the first one's is added.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        prefix: str = "sd-progress",
        lease_s: float = 30.0,
        max_attempts: int = 3,
        max_events: int = 512,
        max_bytes: int = 32 * 2**20,
        keep_s: float = 900.0,
        patience_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Choose the server; it is reached for when it is needed.

        Args:
            url: as for `RedisHub`.
            name: no other living worker has it.
            prefix: of all keys; one fleet has one.
            lease_s: after so long without a sign of life, a worker is taken for dead.
            max_attempts: a job that so many workers died of has failed.
            max_events: of a run; the oldest make room.
            max_bytes: of a run's events, likewise.
            keep_s: seconds until a run that is over is forgotten.
            patience_s: how long a run's last event is held while there is no server.
            clock: seconds that only grow.

        Raises:
            ValueError: `url` or `prefix` is none, `name` is taken by the fleet itself, or an option
                is out of range.
        """
        if not name or name == _NOBODY:
            raise ValueError(f"name must be that of a worker, got {name!r}; pass another")
        if lease_s <= 0 or max_attempts < 1 or max_events < 2:
            expected = "lease_s, max_attempts and max_events must be above 0, 0 and 1"
            raise ValueError(f"{expected}, got {lease_s}, {max_attempts}, {max_events}; raise them")
        self.name = name
        self._keys = Keys(prefix)
        self._lease_ms = max(1, int(lease_s * 1000))
        self._look_ms = max(1, int(min(_LOOK_S * 1000, self._lease_ms / 4)))
        self._max_attempts = max_attempts
        self._max_events, self._max_bytes = max_events, max_bytes
        self._keep_s, self._patience_s = math.ceil(keep_s), patience_s
        self._clock = clock
        self._redis = connected(url)
        self._held: dict[str, _Held] = {}
        self._is_missed = False
        self._claiming = threading.Lock()
        self._closing = threading.Event()

    def claim(self, timeout_s: float) -> Job | None:
        """The next job, which is then nobody else's; None if there is none in time.

        First come those whose worker died or gave them back. Without a server there is none.
        """
        give_up_s = self._clock() + timeout_s
        while not self._closing.is_set():
            left_s = max(0.0, give_up_s - self._clock())
            try:
                with self._claiming:
                    job = self._claimed(min(left_s, self._look_ms / 1000))
                self._is_missed = False
            except Exception as error:
                if not is_away(error):
                    raise
                self._miss(error)
                self._closing.wait(min(left_s, _RETRY_S))
                job = None
            if job is not None or self._clock() >= give_up_s:
                return job
        return None

    def publish(self, job: Job, event: Event) -> bool:
        """Add an event to the job's run; whether it is still this worker's, and wanted.

        Without a server, events are lost, but the last one is held for `patience_s`.

        Raises:
            redis.RedisError: the server refuses, or stays away for too long.
        """
        held = self._held.get(job.id)
        if held is None:
            return False
        give_up_s = self._clock() + self._patience_s
        while True:
            try:
                return self._published(held, event)
            except errors.WatchError:
                continue
            except Exception as error:
                is_late = self._closing.is_set() or self._clock() >= give_up_s
                if not is_away(error) or (event.is_last and is_late):
                    raise
                self._miss(error)
                if not event.is_last:
                    return True  # as far as anybody knows
                self._closing.wait(_RETRY_S)

    def keep(self, job: Job) -> bool:
        """Say that it is still being painted, where no event did for a while; returned as above."""
        held = self._held.get(job.id)
        if held is None:
            return False
        try:
            return self._is_wanted(held)
        except Exception as error:
            if not is_away(error):
                raise
            self._miss(error)
            return True  # as far as anybody knows

    def close(self) -> None:
        """Nothing more will be claimed; a job that is not at its end is given back.

        Another worker begins it anew, at once. From any thread; again, it does nothing.
        """
        self._closing.set()
        with self._claiming, contextlib.suppress(*AWAY):  # then others wait for the lease to end
            for held in tuple(self._held.values()):
                self._give_back(held)
            self._leave()
        close(self._redis)

    def _miss(self, error: Exception) -> None:
        """Tell that there is no server, once."""
        if not self._is_missed:
            _log.warning("there is no Redis server: %s", error)
        self._is_missed = True

    # Claiming

    def _claimed(self, timeout_s: float) -> Job | None:
        while True:
            try:
                entry = self._abandoned() or self._next(timeout_s)
            except errors.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                self._make_group()
            else:
                return None if entry is None else self._begun(entry)

    def _make_group(self) -> None:
        with contextlib.suppress(errors.ResponseError):  # another one was quicker
            self._redis.xgroup_create(self._keys.jobs, GROUP, id="0", mkstream=True)

    def _abandoned(self) -> Entry | None:
        """The job of a worker that gave no sign of life for longer than the lease."""
        jobs = self._keys.jobs
        if not self._redis.set(self._keys.looked, 1, nx=True, px=self._look_ms):
            return None  # somebody has just looked, and it takes longer the more jobs there are
        idle = self._redis.xpending_range(jobs, GROUP, "-", "+", 10, idle=self._lease_ms)
        for found in idle:
            entry = found["message_id"]
            taken: list[Entry] = self._redis.xclaim(jobs, GROUP, self.name, self._lease_ms, [entry])
            if taken and taken[0][1]:
                self._redis.delete(self._keys.looked)  # there may be more
                return taken[0]
            if taken:  # Redis 6 gives nothing of those that are deleted
                self._redis.xack(jobs, GROUP, entry)
        return None

    def _next(self, timeout_s: float) -> Entry | None:
        block_ms = int(timeout_s * 1000) or None
        reply = self._redis.xreadgroup(
            GROUP, self.name, {self._keys.jobs: ">"}, count=1, block=block_ms
        )
        return next(iter(_entries(reply)), None)

    def _begun(self, entry: Entry) -> Job | None:
        job = job_of(entry[1])
        held = None
        while held is None:
            with contextlib.suppress(errors.WatchError):
                held = self._attempt(job, entry[0])
                if held is None:
                    return None
        self._held[job.id] = held
        if self._closing.is_set():
            return None  # `close` waits to give it back
        return job if self._is_due(held) else None

    def _attempt(self, job: Job, entry: bytes) -> _Held | None:
        """One more attempt; None, and no entry, where the run is over or the job there twice."""
        run, owner = self._keys.run(job.id), f"{self.name}/{secrets.token_hex(8)}".encode()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(run)
            client, state, known = pipe.hmget(run, "client", "state", "entry")
            is_over = client is None or state == OVER
            if is_over or known not in (None, entry):
                self._remove(entry, job if is_over else None)
                return None
            pipe.multi()
            pipe.hset(run, "owner", owner)
            pipe.hset(run, "entry", entry)
            pipe.hincrby(run, "attempts", 1)
            pipe.expire(run, _WAITING_S)
            pipe.expire(self._keys.events(job.id), _WAITING_S)
            pipe.execute()
        return _Held(job, entry, owner, self._clock())

    def _is_due(self, held: _Held) -> bool:
        """Whether it is to be painted; if not, its last event is published."""
        attempts = int(self._redis.hget(self._keys.run(held.job.id), "attempts") or 0)
        if attempts > self._max_attempts:
            message = (
                f"{self._max_attempts} workers ended in the middle of it; it is not tried again"
            )
            self.publish(held.job, Event("failed", {"message": message}))
            return False
        if not self._is_wanted(held):
            self.publish(held.job, Event("cancelled"))
            return False
        return True

    # Publishing

    def _published(self, held: _Held, event: Event) -> bool:
        run, events = self._keys.run(held.job.id), self._keys.events(held.job.id)
        fields = event_fields(event)
        keep_s = self._keep_s if event.is_last else _WAITING_S
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(run)
            owner, state = pipe.hmget(run, "owner", "state")
            if owner != held.owner:
                self._held.pop(held.job.id, None)
                return False
            if state == OVER:  # the last event is there, only the answer was lost
                self._finish(held)
                return True
            pipe.multi()
            pipe.xadd(events, fields, maxlen=self._room(held, fields), approximate=False)
            pipe.hget(run, "cancelled")
            pipe.exists(self._keys.watched(held.job.id))
            if event.is_last:
                pipe.hset(run, "state", OVER)
            pipe.expire(run, keep_s)
            pipe.expire(events, keep_s)
            _, cancelled, watched, *_ = pipe.execute()
        if event.is_last:
            self._finish(held)
            return True
        self._renew(held)
        return not cancelled and bool(watched or held.job.stays)

    def _is_wanted(self, held: _Held) -> bool:
        run = self._keys.run(held.job.id)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(run, "owner", "state", "cancelled")
            pipe.exists(self._keys.watched(held.job.id))
            (owner, state, cancelled), watched = pipe.execute()
        if owner != held.owner or state == OVER:
            self._held.pop(held.job.id, None)
            return False
        self._renew(held)
        return not cancelled and bool(watched or held.job.stays)

    def _renew(self, held: _Held) -> None:
        if self._clock() < held.renewed_s + self._lease_ms / 4000:
            return
        self._redis.xclaim(self._keys.jobs, GROUP, self.name, 0, [held.entry], justid=True)
        held.renewed_s = self._clock()

    def _room(self, held: _Held, fields: Fields) -> int:
        """How many events may be there, this one among them."""
        held.sizes.append(sum(len(value) for value in fields.values()))
        while len(held.sizes) > self._max_events:
            held.sizes.popleft()
        while sum(held.sizes) > self._max_bytes and len(held.sizes) > 1:
            held.sizes.popleft()
            held.is_cut = True
        return len(held.sizes) if held.is_cut else self._max_events

    # Letting go

    def _finish(self, held: _Held) -> None:
        """Say that the job is done; should this worker die before that, another finds it over."""
        self._remove(held.entry, held.job)
        self._held.pop(held.job.id, None)

    def _remove(self, entry: bytes, job: Job | None) -> None:
        """No worker gets the entry any more; the job, if there is one, is over for its client."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(self._keys.jobs, GROUP, entry)
            pipe.xdel(self._keys.jobs, entry)
            if job is not None:
                pipe.srem(self._keys.unfinished(job.client), job.id)
            pipe.execute()

    def _give_back(self, held: _Held) -> None:
        """Have nobody's events added any more, until somebody claims it anew."""
        run, events = self._keys.run(held.job.id), self._keys.events(held.job.id)
        self._held.pop(held.job.id, None)
        is_done = False
        while not is_done:
            with (
                contextlib.suppress(errors.WatchError),
                self._redis.pipeline(transaction=True) as pipe,
            ):
                pipe.watch(run)
                owner, state = pipe.hmget(run, "owner", "state")
                if owner == held.owner and state != OVER:
                    pipe.multi()
                    pipe.hdel(run, "owner")
                    pipe.hincrby(run, "attempts", -1)  # it is not the job's fault
                    pipe.xadd(events, event_fields(Event("queued", {"position": 0})))
                    pipe.execute()
                is_done = True

    def _leave(self) -> None:
        """Have others take over what is this worker's, and forget the worker."""
        jobs, long_ms = self._keys.jobs, _WAITING_S * 1000
        with contextlib.suppress(errors.ResponseError):  # there is no group, and so no job
            mine = self._redis.xpending_range(jobs, GROUP, "-", "+", 100, self.name)
            entries = [found["message_id"] for found in mine]
            if entries:
                self._redis.xclaim(jobs, GROUP, _NOBODY, 0, entries, idle=long_ms, justid=True)
            for worker in self._redis.xinfo_consumers(jobs, GROUP):
                is_me = worker["name"] == self.name.encode()
                if is_me or (worker["idle"] > long_ms and not worker["pending"]):
                    self._redis.xgroup_delconsumer(jobs, GROUP, worker["name"])


def _entries(reply: Iterable[tuple[bytes, list[Entry]]] | None) -> list[Entry]:
    """What XREAD found in its one stream."""
    return [entry for _, entries in reply or () for entry in entries]
