"""A whole fleet in processes of its own, some of which are killed.

Two web processes and three workers with the demo model, over one real Redis server.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import redis_server
import web

LEASE_S = 5  # a machine that does much else may stop a process for a while
START_S = 90  # of a worker, which loads a model, on a machine that does much else
RUN_S = 90
SETTINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
JOBS, GROUP = "{sd-progress}:jobs", "workers"


class Process:
    """One `sd-progress` command, and what it printed."""

    def __init__(self, folder, name, *words):
        self.name = name
        self._log = folder / f"{name}.log"
        self._words = [sys.executable, "-m", "sd_progress", *words]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._words, cwd=folder, env={**os.environ, **SETTINGS}, stdout=log, stderr=log
            )

    def until(self, pattern):
        """What it prints when it is ready."""
        give_up_s = time.monotonic() + START_S
        while (match := re.search(pattern, self._log.read_text())) is None:
            assert self.process.poll() is None, f"{self.name} ended: {self._log.read_text()}"
            assert time.monotonic() < give_up_s, f"{self.name} is late: {self._log.read_text()}"
            time.sleep(0.05)
        return match[1]

    def kill(self):
        """At once, with all that it is about to do."""
        self.process.kill()
        self.process.wait()


class Fleet:
    """What runs, and what can be seen of it."""

    def __init__(self, folder, url, stack):
        self._folder, self._url, self._stack = folder, url, stack
        self._numbers = itertools.count()
        self.raw = stack.enter_context(redis.Redis.from_url(url, protocol=2))
        self.workers, self.webs = {}, []

    def begin_workers(self, count, *options):
        """So many more, when they are ready."""
        names = [f"worker-{next(self._numbers)}" for _ in range(count)]
        for name in names:
            words = ("worker", "--redis", self._url, "--name", name, "--lease_s", str(LEASE_S))
            self.workers[name] = self._begun(name, *words, *options)
        for name in names:
            self.workers[name].until(r"(paints) for")

    def begin_webs(self, count):
        """So many more, when they answer."""
        limits = ("--max_per_client", "200", "--max_waiting", "200")
        words = ("serve", "--redis", self._url, "--port", "0", *limits)
        begun = [self._begun(f"web-{next(self._numbers)}", *words) for _ in range(count)]
        self.webs += [(process, process.until(r"Serving (http://\S+)")) for process in begun]

    def _begun(self, *words):
        process = Process(self._folder, *words)
        self._stack.callback(process.kill)
        return process

    def painter_of(self, run_id):
        """The name of the worker that has the run now; None if nobody has."""
        entry = self.raw.hget(f"sd-progress:{{{run_id}}}:run", "entry")
        found = self.raw.xpending_range(JOBS, GROUP, entry, entry, 1) if entry else []
        return found[0]["consumer"].decode() if found else None

    def attempts(self, run_id):
        """How often the run was begun."""
        return int(self.raw.hget(f"sd-progress:{{{run_id}}}:run", "attempts"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Two web processes and three workers; all are dead afterwards."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(redis_server.running())
        made = Fleet(tmp_path_factory.mktemp("fleet"), server.url, stack)
        made.begin_webs(2)
        made.begin_workers(3)
        yield made


def whole_run(events):
    """Whether it began with waiting, and ended once, with a picture."""
    names = [event.name for event in events]
    ends = sum(names.count(name) for name in ("completed", "failed", "cancelled"))
    return (names[0], names[-1], ends) == ("queued", "completed", 1)


def in_middle(url, run_id, count=3):
    """Follow a run until it is well begun; its events so far."""
    seen = []
    with web.streaming(url, f"/v1/runs/{run_id}/events") as answer:
        for event in web.events_of(answer):
            seen.append(event)
            if [event.name for event in seen].count("preview") >= count:
                return seen
    raise AssertionError(f"the run was over too soon: {[event.name for event in seen]}")


def test_sixty_runs_at_once_complete_once_each(fleet):
    """Asked for at both web processes, watched at the other one."""
    urls = [url for _, url in fleet.webs]

    def run(number):
        run_id = web.begin(urls[number % 2], steps=2, seed=number)
        return run_id, web.told(urls[1 - number % 2], run_id)

    began_s = time.monotonic()
    with ThreadPoolExecutor(60) as pool:
        found = dict(pool.map(run, range(60), timeout=RUN_S))
    print(f"\n60 runs in {time.monotonic() - began_s:.1f} s")
    assert len(found) == 60
    assert all(whole_run(events) for events in found.values())
    assert len({events[-1].data["images"][0] for events in found.values()}) == 60
    assert fleet.raw.xlen(JOBS) == 0


def test_all_workers_paint(fleet):
    """None stands idle while the others have much to do."""
    url = fleet.webs[0][1]
    runs = [web.begin(url, steps=40) for _ in range(3)]
    web.until(lambda: {fleet.painter_of(run_id) for run_id in runs} == set(fleet.workers))
    assert all(whole_run(web.told(url, run_id)) for run_id in runs)


def test_killing_workers_in_the_middle_of_a_run_loses_none(fleet):
    """Two of three die, one after the other; each run is begun anew, and viewers see it go on."""
    url = fleet.webs[0][1]
    runs = [web.begin(url, steps=60 if number < 2 else 5) for number in range(6)]
    killed = []
    for run_id in runs[:2]:
        in_middle(url, run_id)
        killed.append(fleet.painter_of(run_id))
        fleet.workers.pop(killed[-1]).kill()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda run_id: web.told(url, run_id), runs, timeout=RUN_S))
    assert all(whole_run(events) for events in found)
    assert len(set(killed)) == 2
    assert all(fleet.attempts(run_id) > 1 for run_id in runs[:2])
    fleet.begin_workers(2)


def test_a_worker_that_is_told_to_stop_gives_its_job_back(fleet):
    """At once: the run does not wait for the lease."""
    url = fleet.webs[0][1]
    fleet.begin_workers(1, "--grace_s", "0.2")
    leaving = [*fleet.workers][-1]
    runs = [web.begin(url, steps=30) for _ in range(len(fleet.workers))]
    web.until(lambda: leaving in map(fleet.painter_of, runs))
    process = fleet.workers.pop(leaving).process
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert all(whole_run(web.told(url, run_id)) for run_id in runs)
    consumers = fleet.raw.xinfo_consumers(JOBS, GROUP)
    assert leaving not in [consumer["name"].decode() for consumer in consumers]


def test_killing_a_web_process_loses_no_event(fleet):
    """A viewer goes on at the other one, behind the last event that it saw."""
    (process, url), (_, other) = fleet.webs
    run_id = web.begin(url, steps=60)
    seen, rest = [], []
    with web.streaming(url, f"/v1/runs/{run_id}/events") as answer:
        for event in web.events_of(answer):
            seen.append(event)
            if len(seen) == 12:
                process.kill()
                break
    rest = web.told(other, run_id, after=seen[-1].id)
    assert seen + rest == web.told(other, run_id)
    assert whole_run(seen + rest)
    steps = [event.data["step_index"] for event in seen + rest if event.name == "preview"]
    assert steps == sorted(set(steps))
    assert len(rest) > 1
    fleet.webs.pop(0)


def test_what_is_left_in_redis_is_little_and_expires(fleet):
    """Streams are capped, nothing waits, and every key of a run has its time."""
    keys = list(fleet.raw.scan_iter())
    of_runs = [key for key in keys if key.startswith(b"sd-progress:")]
    lengths = [fleet.raw.xlen(key) for key in of_runs if key.endswith(b":events")]
    used = fleet.raw.info("memory")["used_memory"]
    print(f"\n{len(lengths)} runs, {used / 2**20:.1f} MiB")
    assert len(lengths) > 60
    assert max(lengths) <= 512
    assert {0 < fleet.raw.ttl(key) <= 900 for key in of_runs} == {True}
    assert fleet.raw.xlen(JOBS) == fleet.raw.xpending(JOBS, GROUP)["pending"] == 0
    assert used < 256 * 2**20
