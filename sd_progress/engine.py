"""Owns the way off the caller's thread: private copies, boxes that wait, threads that handle.

The caller hands over jobs and returns. One thread takes them in order; what it makes goes to one
more thread for each target. Everything that waits is counted in bytes: beyond a limit it waits on
disk.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import math
import os
import queue
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POLL_S = 0.05
LOOK_S = 0.2
PATIENCE_S = 30.0
HOLD_S = 0.1
SEGMENT_BYTES = 64 << 20
_OMP_PAUSE_SOFT = 1


# What waits ---------------------------------------------------------------------------------


class Snapshot:
    """A private copy of a tensor, taken without waiting for it.

    On CUDA the copy goes to pinned memory on the caller's stream, with an event behind it; torch
    keeps pinned memory for the next copy of that size. Other accelerators copy on the device, and
    the worker fetches it. On the CPU it is a plain clone.

    Args:
        tensor: any shape and device; may be changed by its owner as soon as this returns.
        is_private: whether nobody else has it, so that the CPU needs no copy.
    """

    def __init__(self, tensor: Tensor, *, is_private: bool = False) -> None:
        tensor = tensor.detach()
        self._event: _Event | None = None
        self._stored: Stored | None = None
        self._dtype, self._shape = tensor.dtype, tensor.shape
        if tensor.device.type == "cpu":
            self._copy: Tensor | None = tensor if is_private else tensor.clone()
        elif tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = _recorded(_cuda_event())
        else:
            self._copy = tensor if is_private else tensor.clone()
            make_event = getattr(torch.get_device_module(tensor.device), "Event", None)
            self._event = None if make_event is None else _recorded(make_event())

    @property
    def size_bytes(self) -> int:
        """Memory that the copy takes; nothing once it is stored."""
        return 0 if self._copy is None else self._copy.nbytes

    def wait(self) -> Tensor:
        """The copy, on the CPU, once it is whole; called by the worker."""
        if self._stored is not None:
            flat = torch.from_numpy(self._stored.load())
            return flat.view(self._dtype).reshape(self._shape)
        assert self._copy is not None
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        if self._copy.device.type != "cpu":
            self._copy = self._copy.cpu()
        return self._copy

    def store(self, storage: Storage) -> None:
        """Put it on disk; called by the worker.

        Raises:
            OSError: the disk is full.
        """
        if self._stored is None:
            flat = self.wait().contiguous().reshape(-1).view(torch.uint8)
            self._stored, self._copy = storage.put(flat.numpy()), None


class _Event(Protocol):
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def _cuda_event() -> _Event:
    """One that is slept for: a worker that waits must not keep a core busy."""
    return cast(_Event, torch.cuda.Event(blocking=True))


def _recorded(event: _Event) -> _Event:
    event.record()
    return event


class Storage:
    """Arrays that wait on disk, in files without a name: they are gone when the process is.

    Written by one thread, read by others. A file is given back when all that is in it was let go
    of.
    """

    def __init__(self) -> None:
        self.stored_bytes = 0
        self._segment: _Segment | None = None

    def put(self, array: NDArray[np.uint8]) -> Stored:
        """Write an array.

        Raises:
            OSError: the disk is full, or there is no folder for temporary files.
        """
        if self._segment is None or self._segment.size_bytes + array.nbytes > SEGMENT_BYTES:
            self._segment = _Segment()
        stored = Stored(self._segment, self._segment.append(array), array.shape)
        self.stored_bytes += array.nbytes
        return stored

    def let_go(self) -> None:
        """Nothing more will be put, for now; what was stays for those who have it."""
        self._segment = None


class _Segment:
    def __init__(self) -> None:
        self.size_bytes = 0
        self._lock = threading.Lock()
        self._file = tempfile.TemporaryFile(prefix="sd-progress-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def append(self, array: NDArray[np.uint8]) -> int:
        """Where it was written; what was written of it is overwritten if it was not all."""
        with self._lock:
            offset = self._file.seek(self.size_bytes)
            rest = np.ascontiguousarray(array).data.cast("B")
            while rest:
                rest = rest[self._file.write(rest) :]
            self.size_bytes += array.nbytes
            return offset

    def read_into(self, array: NDArray[np.uint8], offset: int) -> None:
        with self._lock:
            self._file.seek(offset)
            rest = array.data.cast("B")
            while rest:
                if not (count := self._file.readinto(rest)):
                    raise OSError("what waited on disk must be there still, got the file's end")
                rest = rest[count:]


@dataclass(frozen=True, eq=False)
class Stored:
    """Where an array waits."""

    segment: _Segment
    offset: int
    shape: tuple[int, ...]

    def load(self) -> NDArray[np.uint8]:
        """The array, read anew."""
        array = np.empty(self.shape, np.uint8)
        self.segment.read_into(array, self.offset)
        return array


class Waiting(Protocol):
    """What can wait in a box."""

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""

    def store(self, storage: Storage) -> None:
        """Go to disk, and take (nearly) no memory any more; may raise OSError."""


Item = TypeVar("Item", bound=Waiting)


class Room:
    """Memory for what waits, in bytes; from any thread.

    Attributes:
        taken_bytes: now.
        peak_bytes: the most that it ever was.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = self.peak_bytes = 0
        self._lock = threading.Lock()

    def take(self, size_bytes: int, *, is_wanted: bool = False) -> bool:
        """Whether there is room for so much more; if there is, it is taken.

        There always is for the only one, and for what `is_wanted`.
        """
        with self._lock:
            taken = self.taken_bytes + size_bytes
            if taken > self.limit_bytes and self.taken_bytes and not is_wanted:
                return False
            self.taken_bytes = taken
            self.peak_bytes = max(self.peak_bytes, taken)
            return True

    def give_back(self, size_bytes: int) -> None:
        """What was taken is free again."""
        with self._lock:
            self.taken_bytes -= size_bytes


# Boxes --------------------------------------------------------------------------------------


class Box(Protocol[Item]):
    """Where items wait for a thread that takes them."""

    def put(self, item: Item) -> bool:
        """Take an item, at once; False if it had to be left out."""

    def end(self) -> None:
        """Nothing more will come."""

    def get(self, timeout_s: float | None) -> Item | None:
        """The next item; None at the end; raises `queue.Empty` if there is none in time."""


class Inbox(Generic[Item]):
    """What the caller hands over: put in no time; only who takes ever touches the disk.

    From half of the room on, items wait on disk if it takes less time to put one there than to
    handle it. Where that is too slow or full, so that the whole room is taken, they are left out.
    """

    def __init__(self, room: Room, storage: Storage) -> None:
        self._room = room
        self._storage = storage
        self._come: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._waiting: deque[tuple[Item, int]] = deque()
        self._has_ended = False
        self._taken_at_s: float | None = None
        self._handling_s = math.inf  # of the last item, by who took it
        self._storing_s = 0.0  # of the last one that was stored

    def put(self, item: Item, *, is_wanted: bool = False) -> bool:
        """Take an item, if there is room; if `is_wanted`, take it all the same."""
        if not self._room.take(item.size_bytes, is_wanted=is_wanted):
            return False
        self._come.put(item)
        return True

    def end(self) -> None:
        """Nothing more will come."""
        self._come.put(None)

    def get(self, timeout_s: float | None) -> Item | None:
        """The next item; None at the end."""
        if self._taken_at_s is not None:
            self._handling_s, self._taken_at_s = time.monotonic() - self._taken_at_s, None
        self.look()
        if not self._waiting and not self._has_ended:
            self._admit(self._come.get(timeout=timeout_s))
        if not self._waiting:
            return None
        item, size = self._waiting.popleft()
        self._room.give_back(size)
        self._taken_at_s = time.monotonic()
        return item

    def look(self) -> None:
        """Let everything in that has come."""
        while not self._has_ended and not self._come.empty():
            self._admit(self._come.get())

    def others(self) -> Iterable[Item]:
        """What waits behind the last one that was taken, newest first."""
        return (item for item, _ in reversed(self._waiting))

    def _admit(self, item: Item | None) -> None:
        if item is None:
            self._has_ended = True
            return
        size = item.size_bytes
        if self._room.taken_bytes > self._room.limit_bytes // 2:
            size = self._stored(item, size)
        self._waiting.append((item, size))

    def _stored(self, item: Item, size: int) -> int:
        """Put an item on disk if that is worth it; the memory that it then takes."""
        if self._storing_s > self._handling_s:
            self._storing_s *= 0.98  # it is tried again before long
            return size
        began_s = time.monotonic()
        left = _stored(item, size, self._storage, self._room)
        self._storing_s = time.monotonic() - began_s
        if self._taken_at_s is not None:  # who handles an item looks what has come meanwhile
            self._taken_at_s += self._storing_s
        return left


def _stored(item: Item, size: int, storage: Storage, room: Room) -> int:
    """Put an item on disk; the memory that it then takes."""
    try:
        item.store(storage)
    except Exception:  # no disk, or nothing that can be read: whoever takes the item will tell
        return size
    left = item.size_bytes
    room.give_back(size - left)
    return left


class EveryBox(Generic[Item]):
    """All items in order; those that find no room wait on disk."""

    def __init__(self, room: Room, storage: Storage) -> None:
        self._room = room
        self._storage = storage
        self._items: queue.SimpleQueue[tuple[Item, int] | None] = queue.SimpleQueue()

    def put(self, item: Item) -> bool:
        """Take an item; False if memory and disk are full."""
        size = item.size_bytes
        if not self._room.take(size):
            try:
                item.store(self._storage)
            except OSError:
                return False
            size = 0
        self._items.put((item, size))
        return True

    def end(self) -> None:
        """Nothing more will come."""
        self._items.put(None)

    def get(self, timeout_s: float | None) -> Item | None:
        """The oldest item; None at the end."""
        found = self._items.get(timeout=timeout_s)
        if found is None:
            return None
        item, size = found
        self._room.give_back(size)
        return item


class NewestBox(Generic[Item]):
    """The newest `count` items; older ones make room.

    Args:
        count: 1 or more.
        is_held: whether an item is to wait a moment, because the next one may follow at once and
            then takes its place.

    Attributes:
        dropped: how many items made room.
    """

    def __init__(self, count: int, is_held: Callable[[Item], bool] = lambda item: False) -> None:
        self.dropped = 0
        self._is_held = is_held
        self._items: deque[Item] = deque()
        self._count = count
        self._has_ended = False
        self._changed = threading.Condition()

    def put(self, item: Item) -> bool:
        """Take an item, at the cost of the oldest."""
        with self._changed:
            if len(self._items) == self._count:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify()
        return True

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def get(self, timeout_s: float | None) -> Item | None:
        """The oldest item that is left; None at the end."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._has_ended, timeout_s):
                raise queue.Empty
            while self._items and self._is_held(first := self._items[0]) and not self._has_ended:
                if not self._changed.wait_for(functools.partial(self._has_moved, first), HOLD_S):
                    break
            return self._items.popleft() if self._items else None

    def _has_moved(self, first: Item) -> bool:
        return self._has_ended or not self._items or self._items[0] is not first


# Threads ------------------------------------------------------------------------------------


class Worker(Generic[Item]):
    """One thread that handles what is in a box, until its end.

    A daemon with an exit handler rather than a plain thread: the interpreter then waits for the
    items that are left, and not for a run that was given up.

    Whoever starts a thread waits until it runs, which takes milliseconds where torch uses all
    cores. So the caller of a run starts one, and that one starts the others.

    Args:
        box: where items come from.
        handle: called in the thread with each item; must not raise.
        on_begin: called in the thread before the first item; must not raise.
        on_end: called in the thread after the last item; must not raise.
        is_abandoned: asked in the thread now and then while there is nothing to do; True ends it.
        after: a worker whose thread must have ended before `on_begin` is called.

    Attributes:
        busy_s: processor time that the thread has taken.
        last_sign_s: when it last finished something, by `time.monotonic`.
    """

    def __init__(
        self,
        box: Box[Item],
        handle: Callable[[Item], None],
        *,
        on_end: Callable[[], None],
        on_begin: Callable[[], None] = lambda: None,
        is_abandoned: Callable[[], bool] | None = None,
        after: Worker[Item] | None = None,
    ) -> None:
        self.box = box
        self.busy_s = 0.0
        self.last_sign_s = time.monotonic()
        work = functools.partial(self._work, handle, is_abandoned, on_begin, on_end, after)
        self._thread = threading.Thread(target=work, name="sd-progress", daemon=True)
        atexit.register(self.finish)

    def start(self) -> None:
        """Begin to handle what is in the box; to be called once.

        Raises:
            RuntimeError: there are no more threads to be had.
        """
        try:
            self._thread.start()
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """It is not going to be started."""
        atexit.unregister(self.finish)

    @property
    def is_alive(self) -> bool:
        """Whether items are handled; False before it is started, once finished, or abandoned."""
        return self._thread.is_alive()

    @property
    def is_current_thread(self) -> bool:
        """Whether it is the worker itself that asks."""
        return threading.current_thread() is self._thread

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end, at most so long."""
        self._thread.join(timeout_s)

    def wait(self) -> None:
        """Wait for the thread's end, however long; not at all where it never began."""
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self, patience_s: float = PATIENCE_S) -> bool:
        """Wait until all items are handled and the thread has ended.

        Args:
            patience_s: give up when no item was finished for so many seconds.

        Returns:
            False if it was given up; the thread then goes on by itself.
        """
        self.box.end()
        return finished([self], patience_s)

    def _work(
        self,
        handle: Callable[[Item], None],
        is_abandoned: Callable[[], bool] | None,
        on_begin: Callable[[], None],
        on_end: Callable[[], None],
        after: Worker[Item] | None,
    ) -> None:
        if after is not None:
            after.wait()
        on_begin()
        work_on_one_core()
        _let_the_run_go_first()
        try:
            with torch.no_grad():
                while (item := self._next(is_abandoned)) is not None:
                    handle(item)
                    self.last_sign_s = time.monotonic()
                    self.busy_s = time.thread_time()
                    del item  # else it would be kept until the next one comes
                on_end()
        finally:
            self.busy_s = time.thread_time()
            atexit.unregister(self.finish)

    def _next(self, is_abandoned: Callable[[], bool] | None) -> Item | None:
        signs = 0
        while True:
            try:
                return self.box.get(None if is_abandoned is None else LOOK_S)
            except queue.Empty:
                # twice, because another thread's stack may be seen half way through a change
                signs = signs + 1 if is_abandoned is not None and is_abandoned() else 0
                if signs == 2:
                    return None


def work_on_one_core() -> None:
    """Have torch compute in the calling thread only, and in no other thread differently.

    A second thread that computes in parallel has threads of its own, and there are then more than
    cores. From that moment on OpenMP's threads sleep between operations instead of spinning, which
    makes layers on two cores slower by a third or more, even while the second thread does nothing
    at all (`benchmarks/second_thread.py`). `torch.set_num_threads` would change the run's own
    number, too; these two, of OpenMP and MKL, are for one thread.
    """
    torch.get_num_threads()  # else it would be set again by the first operation
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        with contextlib.suppress(OSError, AttributeError):  # another platform's torch
            getattr(_torch_library(), name)(1)


def release_team() -> None:
    """End the calling thread's own threads of GNU OpenMP; it gets new ones when it needs some.

    Where a pipeline goes to another thread, which computes with threads of its own, those of the
    thread that it was loaded in would make it slower while they do nothing, as told above.
    """
    for path in Path(torch.__file__).parent.glob("lib/libgomp*"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(os.fspath(path)).omp_pause_resource_all(_OMP_PAUSE_SOFT)


def _let_the_run_go_first() -> None:
    """On Linux, the calling thread does not interrupt others when it is woken.

    It gets its share all the same, so that it is not starved while the run waits for what it holds.
    Where torch uses all cores, handing over a frame otherwise takes milliseconds in some runs,
    because the thread that is handed it takes the place of the one that does ("ms in callback" of
    `benchmarks/overhead.py`).
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere, or where it is forbidden
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@functools.cache
def _torch_library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)


class Thread(Protocol):
    """What can be waited for."""

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""

    @property
    def last_sign_s(self) -> float:
        """When it last finished something, by `time.monotonic`."""

    def join(self, timeout_s: float) -> None:
        """Wait for its end, at most so long."""


def finished(workers: Iterable[Thread], patience_s: float = PATIENCE_S) -> bool:
    """Wait until these workers have ended, which somebody else tells them.

    Args:
        workers: one or more.
        patience_s: give up when none of those that are left finished anything for so many seconds.

    Returns:
        False if they were given up.
    """
    began_s = time.monotonic()
    while left := [worker for worker in workers if worker.is_alive]:
        left[0].join(POLL_S)
        last_sign_s = max(worker.last_sign_s for worker in left)
        if time.monotonic() - max(began_s, last_sign_s) > patience_s:
            return False
    return True
