"""How late a viewer sees a frame: server-sent events beside polling, on one machine.

A server and its viewers are two processes on the loopback; the clock is the machine's. A frame is
made when the hub gives it its id, which carries the millisecond. It is received when the last byte
of its event, or of its answer, was read.

    viewers    200 connections watch one run
    runs       50 runs are in flight at the same time, each watched by one connection
    demo       200 connections watch one run of the demo model, which shares the cores with them

Frames of the first two are canned: a preview of the demo model (256x256, PNG), five a second, by
one thread for each run, which claims jobs and publishes events as a painter does. Hub, server and
events are the real ones. Polling is what many UIs do, a GET of the newest preview each half second
on a connection that stays open; its route is added here and answers from memory, which is as good
as polling gets. Printed are

    p50, p95, p99, most   milliseconds until a viewer has a frame, or a newer one in its place; of
                          frames that were made after it had connected
    seen                  which share of the frames a viewer got at all
    frames/s, MiB/s       that all viewers together got
    CPU                   of the server, of one core

    python benchmarks/live.py                  # some minutes
    python benchmarks/live.py --seconds 4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import random
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastapi import Response

from sd_progress.jobs import Bench, Event, ImageFormat, Job
from sd_progress.local import Limits, LocalHub
from sd_progress.painter import Painter, load_painter
from sd_progress.serve_command import listening, painting, run
from sd_progress.server import Settings, create_app

Painted = Literal["canned", "demo"]

FRAMES_PER_S = 5
POLL_S = 0.5
JSON = "Content-Type: application/json"
DEMO_STEPS = 150
NOTHING = b'{"is_over": false, "made_ms": []}\n'
LIMIT_BYTES = 2**22  # of one event


# The server, a process of its own


class Canned:
    """Claims jobs and publishes the same few previews, again and again."""

    def __init__(self, previews: Sequence[dict[str, object]], num_frames: int) -> None:
        self.newest: dict[str, bytes] = {}
        self._previews, self._num_frames = previews, num_frames

    def work(self, bench: Bench, stop: threading.Event) -> None:
        """As `Painter.work`."""
        while not stop.is_set():
            job = bench.claim(0.5)
            if job is not None:
                self._paint(bench, job)

    def _paint(self, bench: Bench, job: Job) -> None:
        time.sleep(random.random() / FRAMES_PER_S)  # else all runs would publish at once
        made_ms, text = [], ""
        for index in range(self._num_frames):
            data = {**self._previews[index % len(self._previews)], "step_index": index}
            bench.publish(job, Event("preview", data))
            made_ms.append(time.time() * 1000)
            text = json.dumps(data)
            self._tell(job, made_ms[-1:], text)
            time.sleep(1 / FRAMES_PER_S)
        bench.publish(job, Event("completed", {"images": []}))
        self._tell(job, made_ms, text, is_over=True)

    def _tell(
        self, job: Job, made_ms: Sequence[float], text: str, *, is_over: bool = False
    ) -> None:
        head = json.dumps({"is_over": is_over, "made_ms": made_ms})
        self.newest[job.id] = f"{head}\n{text}".encode()


def serve(painted: Painted, num_painters: int, num_frames: int, image_format: ImageFormat) -> None:
    """Print the address, answer until told to stop, and print what it cost."""
    painter = load_painter(device="cpu")
    canned = Canned(_previews(painter, image_format), num_frames)
    hub = LocalHub(Limits(max_waiting=1000, max_per_client=1000))
    app = create_app(hub, Settings(max_viewers=10_000))

    @app.get("/newest/{run_id}")
    async def newest(run_id: str) -> Response:
        return Response(canned.newest.get(run_id, NOTHING), media_type="text/plain")

    with contextlib.ExitStack() as stack:
        if painted == "demo":
            stack.enter_context(painting(painter, hub.bench()))
        else:
            stop = threading.Event()
            stack.callback(stop.set)
            for _ in range(num_painters):
                work = threading.Thread(target=canned.work, args=[hub.bench(), stop], daemon=True)
                work.start()
        listener = stack.enter_context(listening("127.0.0.1", 0))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        began_s = usage.ru_utime + usage.ru_stime
        run(app, listener, "127.0.0.1")
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(f"CPU {usage.ru_utime + usage.ru_stime - began_s}", flush=True)


def _previews(painter: Painter, image_format: ImageFormat) -> list[dict[str, object]]:
    """Those of a real run."""
    hub = LocalHub()
    asyncio.run(hub.submit(Job("a", "the sea at sunset", seed=4, image_format=image_format)))
    bench = hub.bench()
    job = bench.claim(0)
    assert job is not None
    painter.paint(bench, job)

    async def previews() -> list[dict[str, object]]:
        return [dict(event.data) async for event in hub.events("a") if event.name == "preview"]

    return asyncio.run(previews())


# The viewers


@dataclass
class Seen:
    """What all viewers saw.

    Attributes:
        late_ms: for each viewer and each frame, until it came or a newer one.
        num_seen: that came.
        num_bytes: received.
        cpu_s: of the server.
        wall_s: of all.
    """

    late_ms: list[float] = field(default_factory=list)
    num_seen: int = 0
    num_bytes: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


async def ask(host: str, port: int, line: str, *headers: str, body: bytes = b"") -> bytes:
    """One answer, whole."""
    reader, writer = await asyncio.open_connection(host, port, limit=LIMIT_BYTES)
    writer.write(_request(host, line, *headers, f"Content-Length: {len(body)}") + body)
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


def _request(host: str, line: str, *headers: str) -> bytes:
    return "\r\n".join((line, f"Host: {host}", *headers, "", "")).encode()


async def begin(host: str, port: int, steps: int | None) -> str:
    """Have a run painted; its id."""
    body = json.dumps({"prompt": "the sea at sunset", "steps": steps}).encode()
    answer = await ask(host, port, "POST /v1/runs HTTP/1.0", JSON, body=body)
    return str(json.loads(answer)["id"])


async def view(host: str, port: int, run_id: str, seen: Seen) -> None:
    """Events, as they come."""
    reader, writer = await asyncio.open_connection(host, port, limit=LIMIT_BYTES)
    writer.write(_request(host, f"GET /v1/runs/{run_id}/events HTTP/1.0"))
    await reader.readuntil(b"\r\n\r\n")
    since_ms = time.time() * 1000
    while True:
        event = await reader.readuntil(b"\n\n")
        now_ms = time.time() * 1000
        seen.num_bytes += len(event)
        head = event[:200]
        if head.startswith(b"event: preview"):
            made = re.search(rb"id: (\d+)-", head)
            assert made is not None
            if int(made[1]) >= since_ms:
                seen.late_ms.append(now_ms - int(made[1]))
                seen.num_seen += 1
        elif head.startswith((b"event: completed", b"event: failed", b"event: cancelled")):
            writer.close()
            return


async def poll(host: str, port: int, run_id: str, seen: Seen) -> None:
    """The newest preview, each half second, on a connection that stays open."""
    await asyncio.sleep(random.random() * POLL_S)
    reader, writer = await asyncio.open_connection(host, port, limit=LIMIT_BYTES)
    got: dict[float, float] = {}  # when each frame came that came
    due_s, since_ms = time.monotonic(), time.time() * 1000
    while True:
        writer.write(_request(host, f"GET /newest/{run_id} HTTP/1.1"))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        text = await reader.readexactly(int(length[1]))
        now_ms = time.time() * 1000
        seen.num_bytes += len(head) + len(text)
        told = json.loads(text.partition(b"\n")[0])
        for made_ms in told["made_ms"][-1:]:
            got.setdefault(made_ms, now_ms)
        if told["is_over"]:
            break
        due_s += POLL_S
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    writer.close()
    counted = [made_ms for made_ms in told["made_ms"] if made_ms >= since_ms]
    seen.num_seen += len(got.keys() & counted)
    for made_ms in counted:  # of a frame that did not come, the next one that did
        seen.late_ms.append(min(at for other, at in got.items() if other >= made_ms) - made_ms)


Watch = Callable[[str, int, str, Seen], Coroutine[object, object, None]]


def measure(
    watch: Watch,
    *,
    num_runs: int,
    num_viewers: int,
    num_frames: int,
    painted: Painted = "canned",
    image_format: ImageFormat = "png",
) -> Seen:
    """One server, its runs, and for each of them as many viewers."""
    words = [sys.executable, __file__, "--serve", painted, str(num_runs), str(num_frames)]
    with subprocess.Popen([*words, image_format], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = re.search(r"http://([\d.]+):(\d+)", server.stdout.readline())
            assert address is not None
            steps = DEMO_STEPS if painted == "demo" else None
            all_watch = _watched(watch, address[1], int(address[2]), num_runs, num_viewers, steps)
            seen = asyncio.run(asyncio.wait_for(all_watch, 120))
        finally:
            server.terminate()
            rest = server.stdout.read()
            server.wait(30)
    seen.cpu_s = float(rest.rpartition("CPU ")[2])
    return seen


async def _watched(
    watch: Watch, host: str, port: int, num_runs: int, num_viewers: int, steps: int | None
) -> Seen:
    seen, began_s = Seen(), time.monotonic()
    run_ids = [await begin(host, port, steps) for _ in range(num_runs)]
    watching = [watch(host, port, run_id, seen) for run_id in run_ids for _ in range(num_viewers)]
    await asyncio.gather(*watching)
    seen.wall_s = time.monotonic() - began_s
    return seen


def row(name: str, seen: Seen) -> str:
    """One line of the table."""
    late = sorted(seen.late_ms)
    p50, p95, p99 = (
        late[min(len(late) - 1, int(len(late) * share))] for share in (0.5, 0.95, 0.99)
    )
    return (
        f"{name:<40}{p50:6.0f}{p95:6.0f}{p99:6.0f}{late[-1]:6.0f}{seen.num_seen / len(late):6.0%}"
        f"{seen.num_seen / seen.wall_s:10.0f}{seen.num_bytes / seen.wall_s / 2**20:7.1f}"
        f"{seen.cpu_s / seen.wall_s:6.0%}"
    )


def main() -> None:
    """Measure everything, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--viewers", type=int, default=200)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        painted, num_painters, num_frames, image_format = args.serve
        serve(painted, int(num_painters), int(num_frames), image_format)
        return
    few = functools.partial(measure, num_frames=round(args.seconds * FRAMES_PER_S))
    of_one = functools.partial(few, num_runs=1, num_viewers=args.viewers)
    of_many = functools.partial(few, num_runs=args.runs, num_viewers=1)
    one, many = f"{args.viewers} viewers of one run", f"{args.runs} runs, a viewer each"
    rows = {
        f"{one}, events": functools.partial(of_one, view),
        f"{one}, events, WebP": functools.partial(of_one, view, image_format="webp"),
        f"{one}, polling": functools.partial(of_one, poll),
        f"{many}, events": functools.partial(of_many, view),
        f"{many}, polling": functools.partial(of_many, poll),
        f"{args.viewers} viewers of the demo, events": functools.partial(
            of_one, view, painted="demo"
        ),
    }
    print(f"{'':<40}   p50   p95   p99  most  seen  frames/s  MiB/s   CPU", flush=True)
    for name, measured in rows.items():
        print(row(name, measured()), flush=True)


if __name__ == "__main__":
    main()
