"""Off the caller's thread: private copies, one worker, in order."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from sd_progress.engine import Snapshot, Worker


def worker(handle, *, is_abandoned=lambda: False, on_end=lambda: None):
    return Worker(handle, is_abandoned=is_abandoned, on_end=on_end)


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


def test_jobs_are_handled_in_order_before_finish_returns():
    """`finish` waits for all of them, and then for the end."""
    done = []
    jobs = worker(done.append, on_end=lambda: done.append("end"))
    for k in range(5):
        jobs.submit(k)
    jobs.finish()
    jobs.finish()
    assert done == [0, 1, 2, 3, 4, "end"]
    assert not jobs.is_alive


def test_submitting_returns_at_once():
    """While a job is stuck, more can be handed over."""
    gate, done = threading.Event(), []
    jobs = worker(lambda job: gate.wait(10) and done.append(job))
    jobs.submit(1)
    jobs.submit(2)
    assert done == []
    gate.set()
    jobs.finish()
    assert done == [1, 2]


def test_finish_gives_up_when_nothing_moves():
    """A job that hangs is left to itself; slow jobs are waited for."""
    gate = threading.Event()
    stuck = worker(lambda job: gate.wait(10))
    stuck.submit(1)
    assert not stuck.finish(patience_s=0.2)
    slow = worker(lambda job: time.sleep(0.3))
    [slow.submit(k) for k in range(5)]
    assert slow.finish(patience_s=1.2)
    gate.set()
    assert stuck.finish()


def test_one_worker_after_the_other():
    """The second handles nothing before the first has ended."""
    gate, done = threading.Event(), []
    first = worker(lambda job: gate.wait(10) and done.append(job))
    second = Worker(done.append, is_abandoned=lambda: False, on_end=lambda: None, after=first)
    first.submit(1)
    second.submit(2)
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
import time
from sd_progress.engine import Worker
def handle(job):
    time.sleep(0.1)
    print(job)
jobs = Worker(handle, is_abandoned=lambda: False, on_end=lambda: print("end"))
jobs.submit(1)
jobs.submit(2)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "2", "end"]
    assert ran.stderr == ""
