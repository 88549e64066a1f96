"""The service as tests use it: a real server on a free port of this machine, and its events."""

import asyncio
import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass

import pytest
import requests

from sd_progress.jobs import Job
from sd_progress.local import LocalHub
from sd_progress.painter import load_painter
from sd_progress.serve_command import listening, painting, web_server
from sd_progress.server import create_app

PROMPT = "the sea at sunset"
WAIT_S = 30


def program(name):
    """Where a program of the system is; skips where it is not, unless it is required."""
    path = shutil.which(name)
    if path is None and name in os.environ.get("SD_PROGRESS_REQUIRE", "").split(","):
        pytest.fail(f"{name} must be installed, got none; SD_PROGRESS_REQUIRE lists it")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@dataclass(frozen=True)
class Told:
    """An event as it came over the wire."""

    name: str
    id: str
    data: dict


@contextlib.contextmanager
def served(hub, settings=None):
    """A hub, served by the real server; its address."""
    ready = threading.Event()
    with listening("127.0.0.1", 0) as listener:
        server = web_server(create_app(hub, settings), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(WAIT_S)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


@contextlib.contextmanager
def service(*, limits=None, settings=None):
    """The demo model, served: the service's address and its hub."""
    hub = LocalHub(limits)
    with painting(load_painter(device="cpu"), hub.bench()), served(hub, settings) as url:
        yield url, hub


def post(url, path="/v1/images/generations", *, headers=None, **body):
    """Ask for a picture."""
    body = {"prompt": PROMPT, **body}
    return requests.post(url + path, json=body, headers=headers, timeout=WAIT_S)


@contextlib.contextmanager
def streaming(url, path, *, headers=None, **body):
    """An answer whose events come one by one: `events_of` it."""
    method = "POST" if body else "GET"
    with requests.request(
        method, url + path, json=body or None, headers=headers, stream=True, timeout=WAIT_S
    ) as answer:
        yield answer


def events_of(answer):
    """Server-sent events, read by the letter."""
    name, number, data = "message", "", ""
    for line in answer.iter_lines(decode_unicode=True):
        field, _, text = line.partition(": ")
        if field == "event":
            name = text
        elif field == "id":
            number = text
        elif field == "data":
            data += text
        elif not line and data:
            yield Told(name, number, json.loads(data))
            name, number, data = "message", "", ""


def begin(url, **body):
    """Have something painted that goes on by itself; the run's id."""
    answer = post(url, "/v1/runs", **body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def told(url, run_id, after=None):
    """All events of a run, up to its last."""
    headers = {} if after is None else {"Last-Event-ID": after}
    with streaming(url, f"/v1/runs/{run_id}/events", headers=headers) as answer:
        return list(events_of(answer))


def submit(hub, job_id="a", **values):
    """Without a server."""
    asyncio.run(hub.submit(Job(job_id, PROMPT, **values)))


def events_in(hub, run_id="a", after="0-0"):
    """All events of a run that is over, without a server."""

    async def main():
        return [event async for event in hub.events(run_id, after)]

    return asyncio.run(main())


def until(is_so):
    """Wait for something that happens elsewhere."""
    ends_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < ends_s, "it did not happen"
        time.sleep(0.01)
