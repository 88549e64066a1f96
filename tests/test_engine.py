"""Off the caller's thread: private copies, one worker, in order."""

import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sd_progress.engine import (
    EveryBox,
    Inbox,
    NewestBox,
    Room,
    Snapshot,
    Storage,
    Stored,
    Worker,
)


@dataclass(eq=False)
class Item:
    """Something of a size that can wait on disk."""

    name: int
    size_bytes: int = 10
    stored: Stored | None = None

    def store(self, storage):
        """Leave ten bytes there."""
        self.stored = storage.put(np.full(10, self.name, np.uint8))
        self.size_bytes = 0


class Jobs(EveryBox):
    """A box with room enough."""

    def __init__(self):
        super().__init__(Room(1000), Storage())


def worker(handle, *, is_abandoned=None, on_end=lambda: None, after=None):
    made = Worker(Jobs(), handle, on_end=on_end, is_abandoned=is_abandoned, after=after)
    made.start()
    return made


def names(box):
    """What is left in a box that was ended."""
    box.end()
    return [item.name for item in iter(lambda: box.get(None), None)]


def test_a_snapshot_is_private():
    """What its owner does with the tensor afterwards does not show."""
    tensor = torch.arange(4.0)
    snapshot = Snapshot(tensor)
    tensor.zero_()
    assert snapshot.wait().tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_snapshot_does_not_wait_for_the_device():
    """On CUDA it is taken without a synchronisation, and whole when waited for."""
    tensor = torch.arange(1000.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshot = Snapshot(tensor)
        tensor.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert snapshot.wait().tolist() == list(range(1000))


def test_a_private_tensor_is_not_copied_on_the_cpu():
    """What nobody else has is kept as it is."""
    tensor = torch.arange(4.0)
    assert Snapshot(tensor, is_private=True).wait().data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_snapshot_on_disk_takes_no_memory(dtype):
    """It comes back as it was, in any type and shape."""
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    snapshot, storage = Snapshot(tensor), Storage()
    assert snapshot.size_bytes == storage.stored_bytes + tensor.nbytes
    snapshot.store(storage)
    assert snapshot.size_bytes == 0
    assert storage.stored_bytes == tensor.nbytes
    assert torch.equal(snapshot.wait(), tensor)


def test_storage_goes_on_in_another_file(monkeypatch):
    """One file is not filled without end, and is closed when nothing in it is wanted."""
    monkeypatch.setattr("sd_progress.engine.SEGMENT_BYTES", 25)
    storage = Storage()
    stored = [storage.put(np.full(10, k, np.uint8)) for k in range(5)]
    assert len({id(one.segment) for one in stored}) == 3
    assert [int(one.load().max()) for one in stored] == [0, 1, 2, 3, 4]
    file = stored[0].segment._file
    del stored[:2]
    assert file.closed


def test_what_finds_no_room_waits_on_disk_in_order():
    """A box for every item keeps the first in memory, and all of them."""
    room, storage = Room(25), Storage()
    box = EveryBox(room, storage)
    assert all(box.put(Item(k)) for k in range(5))
    assert room.peak_bytes == 20
    assert storage.stored_bytes == 30
    assert names(box) == [0, 1, 2, 3, 4]
    assert room.taken_bytes == 0


def test_without_disk_what_finds_no_room_is_left_out(monkeypatch, tmp_path):
    """The box says so; what is in it stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    box = EveryBox(Room(25), Storage())
    assert [box.put(Item(k)) for k in range(3)] == [True, True, False]
    assert names(box) == [0, 1]


def test_the_only_item_always_finds_room():
    """One that is larger than the limit is not refused for ever."""
    for kind in (EveryBox, Inbox):
        box = kind(Room(5), Storage())
        assert box.put(Item(0))
        assert names(box) == [0]


def test_an_inbox_puts_on_disk_only_when_it_is_looked_into():
    """Who hands over never writes; half of the room is kept free for what comes."""
    room, storage = Room(40), Storage()
    inbox = Inbox(room, storage)
    assert [inbox.put(Item(k)) for k in range(5)] == [True] * 4 + [False]
    assert inbox.put(Item(5), is_wanted=True)
    assert storage.stored_bytes == 0
    inbox.look()
    assert storage.stored_bytes == 30
    assert room.taken_bytes == 20
    assert [item.name for item in inbox.others()] == [5, 3, 2, 1, 0]
    assert names(inbox) == [0, 1, 2, 3, 5]
    assert room.taken_bytes == 0


def test_an_inbox_puts_on_disk_only_what_takes_longer_to_handle(monkeypatch):
    """Where the disk is slower than whoever takes the items, it would only hold them up."""
    now_s = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now_s[0])
    monkeypatch.setattr("sd_progress.engine.time", clock)

    class Slow(Item):
        def store(self, storage):
            now_s[0] += 0.05
            super().store(storage)

    for handling_s, least, most in ((0.01, 1, 1), (0.1, 4, 9)):
        storage = Storage()
        inbox = Inbox(Room(40), storage)
        for k in range(8):  # more and more come, of which one is handled at a time
            assert inbox.put(Slow(k, size_bytes=5))
            inbox.put(Slow(k, size_bytes=5))
            assert inbox.get(None)
            now_s[0] += handling_s
        assert least <= storage.stored_bytes / 10 <= most


def test_an_inbox_without_disk_keeps_what_it_has(monkeypatch, tmp_path):
    """What cannot be stored stays in memory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    inbox = Inbox(Room(40), Storage())
    assert [inbox.put(Item(k)) for k in range(5)] == [True] * 4 + [False]
    assert names(inbox) == [0, 1, 2, 3]


def test_a_box_of_the_newest():
    """Older items make room, and are counted."""
    box = NewestBox(2)
    for k in range(5):
        box.put(Item(k))
    assert names(box) == [3, 4]
    assert box.dropped == 3


def test_what_is_held_makes_room_for_what_follows_at_once():
    """It is taken after a moment if nothing does."""
    box = NewestBox(1, is_held=lambda item: item.name == 1)
    box.put(Item(1))
    assert box.get(None).name == 1
    box.put(Item(1))
    threading.Timer(0.02, box.put, [Item(2)]).start()
    assert box.get(None).name == 2
    assert box.dropped == 1


def test_a_worker_computes_in_its_own_thread_only():
    """Parallel work of its own would slow down the run's; the run's number of threads stays."""
    threads, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jobs = worker(lambda job: threads.append(torch.get_num_threads()))
        jobs.box.put(Item(0))
        jobs.finish()
        assert threads == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_jobs_are_handled_in_order_before_finish_returns():
    """`finish` waits for all of them, and then for the end."""
    done = []
    jobs = worker(done.append, on_end=lambda: done.append("end"))
    for k in range(5):
        jobs.box.put(Item(k))
    jobs.finish()
    jobs.finish()
    assert [getattr(one, "name", one) for one in done] == [0, 1, 2, 3, 4, "end"]
    assert not jobs.is_alive


def test_a_worker_does_not_wait_for_one_that_never_began():
    """As where no thread could be started for it."""
    done = []
    never = Worker(Jobs(), done.append, on_end=lambda: None)
    never.give_up()
    jobs = worker(done.append, after=never)
    jobs.box.put(Item(1))
    assert jobs.finish()
    assert [item.name for item in done] == [1]


def test_submitting_returns_at_once():
    """While a job is stuck, more can be handed over."""
    gate, done = threading.Event(), []
    jobs = worker(lambda job: gate.wait(10) and done.append(job.name))
    jobs.box.put(Item(1))
    jobs.box.put(Item(2))
    assert done == []
    gate.set()
    jobs.finish()
    assert done == [1, 2]


def test_finish_gives_up_when_nothing_moves():
    """A job that hangs is left to itself; slow jobs are waited for."""
    gate = threading.Event()
    stuck = worker(lambda job: gate.wait(10))
    stuck.box.put(Item(1))
    assert not stuck.finish(patience_s=0.2)
    slow = worker(lambda job: time.sleep(0.3))
    [slow.box.put(Item(k)) for k in range(5)]
    assert slow.finish(patience_s=1.2)
    gate.set()
    assert stuck.finish()


def test_one_worker_after_the_other():
    """The second handles nothing before the first has ended."""
    gate, done = threading.Event(), []
    first = worker(lambda job: gate.wait(10) and done.append(job.name))
    second = worker(lambda job: done.append(job.name), after=first)
    first.box.put(Item(1))
    second.box.put(Item(2))
    assert not second.finish(patience_s=0.2)
    gate.set()
    assert first.finish()
    assert second.finish()
    assert done == [1, 2]


def test_an_abandoned_worker_ends_by_itself():
    """It handles what it was given, then ends."""
    ended = threading.Event()
    jobs = worker(lambda job: None, is_abandoned=lambda: True, on_end=ended.set)
    assert ended.wait(10)
    jobs.finish()
    assert not jobs.is_alive


def test_the_interpreter_waits_for_jobs_that_are_left():
    """A script that ends without `finish` loses nothing."""
    code = """
import queue, time
from sd_progress.engine import Worker
class Box(queue.SimpleQueue):
    def end(self):
        self.put(None)
    def get(self, timeout_s):
        return super().get(timeout=timeout_s)
def handle(job):
    time.sleep(0.1)
    print(job)
jobs = Worker(Box(), handle, on_end=lambda: print("end"))
jobs.start()
jobs.box.put(1)
jobs.box.put(2)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "2", "end"]
    assert ran.stderr == ""
