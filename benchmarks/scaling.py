"""What a fleet can carry: sizes and processor times, measured, and a table computed from them.

A Redis server is started for it, on a free port of this machine. Sizes are those of real events:
of the demo model at 512 pixels, which paints smooth landscapes, and of synthetic pictures full of
edges and grain at 1024 pixels, which compress badly. Processor time is that of the processes
themselves, and so hardly depends on what else the machine does; it does depend on the processor.

    python benchmarks/scaling.py            # needs redis-server, and the extras redis and server
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import cast

import psutil
import redis
import torch
from PIL import Image

from sd_progress import painter, synthetic
from sd_progress._redis import GROUP, Keys, event_fields, job_fields
from sd_progress.fleet import RedisBench, RedisHub
from sd_progress.jobs import Event, ImageFormat, Job

FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
NUMBERS = count()
STEPS = 30  # of a run in the table, each with a preview
RUN_S = 10.0
VIEWERS = 2.0  # of a run: who asked, and now and then somebody else
KEPT_S = (900, 60)  # how long runs that are over are kept
BUSY = 0.5  # of a core, so that nothing waits
STEP = re.compile(rb'"step_index": (\d+)')
EVENT_STREAM = b"GET /v1/runs/%s/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@dataclass(frozen=True)
class Run:
    """What a run consists of.

    Attributes:
        kind: of pictures.
        format: of their files.
        preview, completed: one event of each.
    """

    kind: str
    format: ImageFormat
    preview: Event
    completed: Event


class Recorder:
    """A bench that only remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def claim(self, timeout_s: float) -> Job | None:
        """Nothing."""
        return None

    def publish(self, job: Job, event: Event) -> bool:
        """Remember it."""
        self.events.append(event)
        return True

    def keep(self, job: Job) -> bool:
        """Always wanted."""
        return True

    def close(self) -> None:
        """Nothing."""


# What there is to send


def smooth(format: ImageFormat) -> Run:
    """The demo model at 512 pixels; the preview of its run's middle."""
    recorder = Recorder()
    job = Job("a", "snowy mountains by the sea", width=512, height=512, steps=8, seed=1)
    painter.load_painter(device="cpu").paint(recorder, replace(job, image_format=format))
    previews = [event for event in recorder.events if event.name == "preview"]
    return Run("512 px, smooth", format, previews[len(previews) // 2], recorder.events[-1])


def detailed(format: ImageFormat) -> Run:
    """Synthetic pictures at 1024 pixels, whose latents are 128."""
    pictures = [
        Image.fromarray(
            synthetic.dead_leaves(1, size, torch.Generator().manual_seed(2))[0]
            .add(1)
            .mul(127.5)
            .byte()
            .permute(1, 2, 0)
            .numpy()
        )
        for size in (128, 1024)
    ]
    small = painter._enlarged(pictures[0], painter.PREVIEW_SIDE_PX)
    preview = painter._base64(small, format, painter._SAVING_PREVIEWS)
    whole = painter._base64(pictures[1], format, painter._SAVING)
    told = {"format": format, "step_index": 14, "num_steps": 30, "progress": 0.5, "eta_s": 5.0}
    return Run(
        "1024 px, detailed",
        format,
        Event("preview", {**told, "width": 256, "height": 256, "b64_json": preview}),
        Event("completed", {"format": format, "width": 1024, "height": 1024, "images": [whole]}),
    )


def num_bytes(event: Event) -> int:
    """In Redis, without its overhead."""
    return sum(len(value) for value in event_fields(event).values())


def num_bytes_as_json(event: Event) -> int:
    """As all text, with pictures as base64: as it is sent to browsers."""
    return len(json.dumps(event.data)) + len(event.name)


# What is measured


@dataclass(frozen=True)
class Costs:
    """Processor seconds, and others.

    Attributes:
        publish_s: of the Redis server, for an event that a worker adds.
        read_s: of the Redis server, for an event that a web process reads.
        worker_s: of the worker, for an event.
        web_read_s: of a web process, for an event that it reads and encodes, for all its viewers.
        web_send_s: of a web process, for an event that it sends to one viewer.
        run_bytes: of the Redis server's memory, for a run of `STEPS` previews.
        run_bytes_as_json: the same, were pictures base64.
        publish_ms: until `publish` returns, median by the clock.
        latency_ms: from before `publish` until a viewer in another process has it: the middle, and
            what one in twenty exceeds.
    """

    publish_s: float
    read_s: float
    worker_s: float
    web_read_s: float
    web_send_s: float
    run_bytes: float
    run_bytes_as_json: float
    publish_ms: float
    latency_ms: tuple[float, float]


@contextlib.contextmanager
def redis_server() -> Iterator[tuple[str, psutil.Process]]:
    """A server that keeps nothing: its URL and process."""
    if shutil.which("redis-server") is None:
        raise SystemExit("redis-server must be installed, got none; apt-get install redis-server")
    folder, port = tempfile.mkdtemp(prefix="sd-progress-"), free_port()
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen([*words, "--dir", folder], stdout=subprocess.DEVNULL)
    try:
        await_port(port)
        yield f"redis://127.0.0.1:{port}", psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)


@contextlib.contextmanager
def web_process(url: str) -> Iterator[tuple[int, psutil.Process]]:
    """`sd-progress serve`: its port and process."""
    port = free_port()
    words = ["serve", "--redis", url, "--port", str(port), "--max_viewers", "2000"]
    server = subprocess.Popen(
        [sys.executable, "-m", "sd_progress", *words], stdout=subprocess.DEVNULL
    )
    try:
        await_port(port)
        yield port, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return cast(int, listener.getsockname()[1])


def await_port(port: int) -> None:
    """Return when somebody listens there."""
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise SystemExit(f"port {port} must answer, got nothing")


def cpu_s(process: psutil.Process) -> float:
    """Processor seconds so far, in nanoseconds where the system tells them."""
    threads = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    if threads:
        return sum(int(one.read_text().split()[0]) for one in threads) / 1e9
    times = process.cpu_times()
    return cast(float, times.user + times.system)


def begun(url: str) -> tuple[RedisBench, Job]:
    """A new run, that is claimed."""
    job = Job(f"run-{next(NUMBERS)}", "x", stays=True)

    async def submit() -> None:
        hub = RedisHub(url)
        await hub.submit(job)
        await hub.aclose()

    asyncio.run(submit())
    bench = RedisBench(url, f"worker-{next(NUMBERS)}")
    claimed = bench.claim(5)
    assert claimed == job
    return bench, job


def measured(run: Run, url: str, server: psutil.Process, events: int, viewers: int) -> Costs:
    """All costs of a kind of run."""
    publishing(run, url, server, 20)  # to warm up
    publish_s, worker_s, publish_ms = publishing(run, url, server, events)
    with web_process(url) as (port, web):
        see = functools.partial(viewing, run, url, server, port, web)
        see(20, 2)
        one, many = see(events, 1), see(events, viewers)
    send_s = (many.web_s - one.web_s) / (many.num_sent - one.num_sent)
    return Costs(
        publish_s,
        one.server_s / events - publish_s,
        worker_s,
        one.web_s / events - send_s,
        send_s,
        memory(run, url, event_fields),
        memory(run, url, lambda event: {"name": event.name, "data": json.dumps(event.data)}),
        publish_ms,
        many.late_ms,
    )


def publishing(
    run: Run, url: str, server: psutil.Process, events: int
) -> tuple[float, float, float]:
    """Seconds of the server and of the worker for an event, and milliseconds by the clock."""
    bench, job = begun(url)
    took = []
    before_s, own_s = cpu_s(server), time.process_time()
    for _ in range(events):
        began_s = time.perf_counter()
        bench.publish(job, run.preview)
        took.append(time.perf_counter() - began_s)
    server_s, own_s = cpu_s(server) - before_s, time.process_time() - own_s
    bench.publish(job, run.completed)
    bench.close()
    return server_s / events, own_s / events, 1000 * median(took)


@dataclass(frozen=True)
class Seen:
    """What it took to show a run.

    Attributes:
        web_s, server_s: of the web process and of Redis, for all of it.
        num_sent: previews that came to viewers; the slow ones miss some.
        late_ms: the middle, and what one in twenty exceeds.
    """

    web_s: float
    server_s: float
    num_sent: int
    late_ms: tuple[float, float]


def viewing(
    run: Run,
    url: str,
    server: psutil.Process,
    port: int,
    web: psutil.Process,
    events: int,
    viewers: int,
) -> Seen:
    """Show a run to so many viewers, as fast as they can take it."""
    bench, job = begun(url)
    pause_s = 0.02 + viewers * (1 / 4000 + num_bytes_as_json(run.preview) / 200e6)
    sent_s: list[float] = []

    def paint() -> tuple[float, float]:
        before_s = cpu_s(web), cpu_s(server)
        for number in range(events):
            sent_s.append(time.perf_counter())
            bench.publish(job, Event("preview", {**run.preview.data, "step_index": number}))
            time.sleep(pause_s)
        return cpu_s(web) - before_s[0], cpu_s(server) - before_s[1]

    async def show() -> tuple[tuple[float, float], list[dict[int, float]]]:
        watching = [asyncio.create_task(view(port, job.id)) for _ in range(viewers)]
        await asyncio.sleep(0.5 + viewers / 100)
        took_s = await asyncio.to_thread(paint)
        bench.publish(job, run.completed)
        return took_s, await asyncio.gather(*watching)

    (web_s, server_s), came_s = asyncio.run(show())
    bench.close()
    late_ms = [1000 * (came - sent_s[step]) for one in came_s for step, came in one.items()]
    return Seen(web_s, server_s, len(late_ms), (median(late_ms), quantiles(late_ms, n=20)[-1]))


def queueing(url: str, server: psutil.Process, others: int, jobs: int) -> float:
    """Seconds of the server for a job without previews, while so many others are being painted."""
    bench = RedisBench(url, "measured", prefix="queue")
    done = Event("completed", {"images": []})
    keys = Keys("queue")

    async def main() -> float:
        hub = RedisHub(url, prefix="queue", max_waiting=10**6, max_per_client=10**6)
        await hub.load()  # makes the group
        with redis.Redis.from_url(url, protocol=2) as raw:
            for number in range(others):
                raw.xadd(keys.jobs, dict(job_fields(Job(f"other-{number}", "x" * 300))))
                raw.xreadgroup(GROUP, f"other-{number}", {keys.jobs: ">"}, count=1)
        before_s = cpu_s(server)
        for number in range(jobs):
            await hub.submit(Job(f"{others}-{number}", "x" * 300, stays=True, client="me"))
            claimed = bench.claim(5)
            assert claimed is not None
            bench.publish(claimed, done)
        took_s = cpu_s(server) - before_s
        await hub.aclose()
        return took_s / jobs

    took_s = asyncio.run(main())
    with redis.Redis.from_url(url) as raw:
        raw.delete(keys.jobs)
    bench.close()
    return took_s


async def view(port: int, run_id: str) -> dict[int, float]:
    """When each preview of the run was here, by its step."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    writer.write(EVENT_STREAM % run_id.encode())
    came_s, name = {}, b""
    while (line := await reader.readline()) and name != b"event: completed":
        if line.startswith(b"event: "):
            name = line.strip()
        if line.startswith(b"data: ") and name == b"event: preview":
            came_s[int(STEP.search(line)[1])] = time.perf_counter()  # type: ignore[index]
    writer.close()
    return came_s


def memory(run: Run, url: str, fields_of: Callable[[Event], Mapping[str, str | bytes]]) -> float:
    """Bytes of the server for the stream of a run."""
    with redis.Redis.from_url(url, protocol=2) as raw:
        for event in [run.preview] * STEPS + [run.completed]:
            raw.xadd("measured", dict(fields_of(event)))
        found = raw.memory_usage("measured", samples=0)
        raw.delete("measured")
    return float(found)


# What is told


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    line = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join(
        [f"| {' | '.join(header)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]
    )


def sizes(runs: Sequence[Run]) -> str:
    """What events weigh."""
    rows = [
        [
            f"{run.kind}, {run.format}",
            f"{num_bytes(run.preview) / 1000:.1f}",
            f"{num_bytes_as_json(run.preview) / 1000:.1f}",
            f"{num_bytes(run.completed) / 1000:.0f}",
            f"{num_bytes_as_json(run.completed) / 1000:.0f}",
        ]
        for run in runs
    ]
    header = ["pictures", "preview, kB", "as JSON", "completed, kB", "as JSON"]
    return table(header, rows)


def costs_of(runs: Sequence[Run], costs: Sequence[Costs]) -> str:
    """What events take."""
    rows = [
        [
            f"{run.kind}, {run.format}",
            f"{1e6 * cost.worker_s:.0f}",
            f"{1e6 * cost.publish_s:.0f}",
            f"{1e6 * cost.read_s:.0f}",
            f"{1e6 * cost.web_read_s:.0f}",
            f"{1e6 * cost.web_send_s:.0f}",
            f"{cost.publish_ms:.2f}",
            f"{cost.latency_ms[0]:.1f} / {cost.latency_ms[1]:.1f}",
        ]
        for run, cost in zip(runs, costs, strict=True)
    ]
    header = [
        "pictures",
        "worker, µs",
        "Redis, to add, µs",
        "Redis, to read, µs",
        "web, to read, µs",
        "web, to send to one viewer, µs",
        "publish, ms",
        "late at the viewer, ms",
    ]
    return table(header, rows)


def memories(runs: Sequence[Run], costs: Sequence[Costs]) -> str:
    """What is kept of a run."""
    rows = [
        [
            f"{run.kind}, {run.format}",
            f"{cost.run_bytes / 1e6:.2f}",
            f"{cost.run_bytes_as_json / 1e6:.2f}",
            f"{cost.run_bytes_as_json / cost.run_bytes:.2f}",
        ]
        for run, cost in zip(runs, costs, strict=True)
    ]
    return table(["pictures", f"a run of {STEPS} previews, MB", "as JSON, MB", "ratio"], rows)


def capacity(run: Run, cost: Costs) -> str:
    """How much of everything so many workers need."""
    rows = []
    for workers in (1, 10, 100, 1000, 10_000):
        runs = workers / RUN_S  # a second
        events = runs * (STEPS + 1)
        in_bytes = runs * (STEPS * num_bytes(run.preview) + num_bytes(run.completed))
        json_bytes = STEPS * num_bytes_as_json(run.preview) + num_bytes_as_json(run.completed)
        redis_cores = events * (cost.publish_s + cost.read_s)
        web_cores = events * (cost.web_read_s + VIEWERS * cost.web_send_s)
        rows.append(
            [
                f"{workers}",
                f"{events:.0f}",
                f"{in_bytes / 1e6:.1f}",
                f"{redis_cores:.2f}",
                f"{max(1, math.ceil(redis_cores / BUSY))}",
                *(f"{cost.run_bytes * (runs * keep_s + workers) / 1e9:.2f}" for keep_s in KEPT_S),
                f"{runs * VIEWERS * json_bytes / 1e6:.1f}",
                f"{web_cores:.2f}",
                f"{max(2, math.ceil(web_cores / BUSY))}",
            ]
        )
    header = [
        "workers",
        "events/s",
        "into Redis, MB/s",
        "Redis, cores",
        "nodes",
        *(f"memory, GB, runs kept {keep_s} s" for keep_s in KEPT_S),
        "to viewers, MB/s",
        "web, cores",
        "processes",
    ]
    return table(header, rows)


def limits(runs: Sequence[Run], costs: Sequence[Costs]) -> str:
    """What one of each can do."""
    rows = [
        [
            f"{run.kind}, {run.format}",
            f"{BUSY / (cost.publish_s + cost.read_s):.0f}",
            f"{BUSY / (cost.publish_s + cost.read_s) / (STEPS / RUN_S):.0f}",
            f"{BUSY / cost.web_send_s:.0f}",
            f"{BUSY / cost.web_send_s / (STEPS / RUN_S):.0f}",
        ]
        for run, cost in zip(runs, costs, strict=True)
    ]
    header = [
        "pictures",
        "events/s of a Redis node",
        "so workers",
        "events/s to viewers of a web process",
        "so viewers",
    ]
    return table(header, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=200, help="for each measurement")
    parser.add_argument("--viewers", type=int, default=200)
    args = parser.parse_args()
    runs = [make(format) for make in (smooth, detailed) for format in FORMATS]
    print(sizes(runs), end="\n\n", flush=True)
    with redis_server() as (url, server):
        costs = [measured(run, url, server, args.events, args.viewers) for run in runs]
        jobs_s = {others: queueing(url, server, others, args.events) for others in (0, 1000)}
    print(costs_of(runs, costs), end="\n\n")
    print(memories(runs, costs), end="\n\n")
    print(limits(runs, costs), end="\n\n")
    for others, job_s in jobs_s.items():
        print(f"One job takes Redis {1e6 * job_s:.0f} µs while {others} others are painted,")
        print(f"so that one node can take {BUSY / job_s:.0f} jobs a second.", end="\n\n")
    for run, cost in zip(runs, costs, strict=True):
        if run.format != "webp":
            print(f"{run.kind}, {run.format}:\n\n{capacity(run, cost)}", end="\n\n")


if __name__ == "__main__":
    main()
