"""Requests that nobody sends in earnest: nothing fails, hangs, is written, or read elsewhere."""

import contextlib
import json
import os
import re
import socket
import sys
import threading
from pathlib import Path

import pytest
import requests
import schemathesis
import web
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import sd_progress
from sd_progress.images_api import RequestLimits
from sd_progress.local import Limits
from sd_progress.server import Settings

EXAMPLES = 40  # of each operation, of requests as described and of others
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    ("/v1/images/generations", "POST"),
    ("/v1/runs", "POST"),
    ("/v1/runs/{run_id}/events", "GET"),
    ("/v1/runs/{run_id}", "DELETE"),
    ("/healthz", "GET"),
    ("/metrics", "GET"),
]
OF_A_RUN = [
    (schemathesis.GenerationMode.POSITIVE, *OPERATIONS[2]),
    (schemathesis.GenerationMode.NEGATIVE, *OPERATIONS[2]),
    (schemathesis.GenerationMode.POSITIVE, *OPERATIONS[3]),
]
SMALL = Settings(limits=RequestLimits(max_pixels=64 * 64, max_steps=2, max_count=2))
JSON = {"Content-Type": "application/json"}
GENERATIONS = "/v1/images/generations"
TRICKS = [
    "..",
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "..%5c..%5cwindows",
    "%00",
    "a%00b",
    "a%0d%0aSet-Cookie:x=1",
    "%ff%fe",
    "C:%5C",
    "~root",
    "$(id)",
    "{run_id}",
    "a" * 65,
    "a" * 5000,
    "%F0%9F%8E%A8",
    "*",
    "-",
]


HARMLESS = ("os.listdir", "os.scandir", "os.putenv")


class Files:
    """What this process opens, makes, moves or removes in threads of the service."""

    def __init__(self):
        self.touched = []
        self.is_watched = False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.is_watched or threading.current_thread() is threading.main_thread():
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self.touched.append((str(path), writes or bool(set(mode or "") & set("wax+"))))
        elif event not in HARMLESS and event.partition(".")[0] in ("os", "shutil", "subprocess"):
            self.touched.append((f"{event} {arguments}", True))


FILES = Files()
OURS = tuple(
    str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, sd_progress.__path__[0])
)


@pytest.fixture(scope="module")
def url():
    """The service; of all that is asked, it touches nothing but its own code."""
    limits = Limits(max_waiting=10_000, max_per_client=10_000)
    with web.service(limits=limits, settings=SMALL) as (url, _):
        assert web.post(url, steps=1, n=2).status_code == 200  # all is loaded
        for image_format in ("png", "jpeg", "webp"):
            web.post(url, steps=1, output_format=image_format)
        FILES.is_watched = True
        yield url
        assert web.post(url, steps=1).status_code == 200
        FILES.is_watched = False
    assert [name for name, writes in FILES.touched if writes] == []
    assert [name for name, _ in FILES.touched if not is_ours(name)] == []


def is_ours(name):
    return name.isdecimal() or str(Path(name).resolve()).startswith(OURS)


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_url(url + "/openapi.json")


def test_every_operation_is_tried(schema):
    """A new one must be added here."""
    found = {(r.ok().path, r.ok().method.upper()) for r in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_whatever_is_asked_is_answered_as_described(schema, path, method, mode):
    """Within limits or not: with a status, a type and a content that the description has."""
    if mode.is_positive or path.startswith("/v1"):  # else there is nothing to get wrong
        fuzz(schema[path][method].as_strategy(generation_mode=mode))


@pytest.mark.parametrize(("mode", "path", "method"), OF_A_RUN)
def test_so_it_is_of_a_run_that_is_there(schema, url, path, method, mode):
    """Events behind any id, and cancelling again and again."""
    known = {"run_id": web.begin(url, steps=1)}
    fuzz(schema[path][method].as_strategy(generation_mode=mode, path_parameters=known))


def fuzz(strategy):
    @given(case=strategy)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        answer = case.call(timeout=web.WAIT_S)
        case.validate_response(answer, checks=CHECKS)

    ask()


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("method", ["GET", "DELETE", "POST", "PUT", "HEAD", "OPTIONS"])
def test_tricks_in_paths_lead_nowhere(url, trick, method):
    """Sent as they are, which no client does."""
    for path in (f"/v1/runs/{trick}/events", f"/v1/runs/{trick}", f"/{trick}", f"/v1/{trick}/"):
        assert raw(url, f"{method} {path} HTTP/1.1") in (400, 404, 405, 307)


@pytest.mark.parametrize(
    "line",
    [
        "GET http://evil.example/ HTTP/1.1",
        "GET //evil.example/ HTTP/1.1",
        "GET /v1/runs/x/events?after=../../etc/passwd HTTP/1.1",
        "GET /v1/runs/x/events?after=1-1&after=2-2 HTTP/1.1",
        "GET /\xff\xfe HTTP/1.1",
        "GET / HTTP/9.9",
        "GET /" + "a" * 100_000 + " HTTP/1.1",
        "\x00\x01\x02",
        "BREW / HTTP/1.1",
        "CONNECT 127.0.0.1:22 HTTP/1.1",
        "TRACE / HTTP/1.1",
    ],
)
def test_what_is_hardly_http_is_refused(url, line):
    """At once."""
    assert raw(url, line) in (200, 400, 403, 404, 405, 421, None)


def raw(url, line, *headers):
    """The status of an answer to a request that is sent as it is; None where there is none."""
    host = url.removeprefix("http://")
    text = "\r\n".join((line, f"Host: {host}", "Connection: close", *headers, "", ""))
    name, _, port = host.partition(":")
    answer = b""
    with (
        socket.create_connection((name, int(port)), timeout=web.WAIT_S) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(text.encode("latin-1"))
        answer = connection.recv(4096)
    match = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return None if match is None else int(match[1])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"prompt"',
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"[" * 30_000,
        b'{"prompt":' * 5_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "x", "guidance_scale": 1e999}',
        b'{"prompt": "x", "n": 1e400}',
        b'{"prompt": "x", "steps": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "x", "seed": -0.0}',
        b'{"prompt": "x", "n": true}',
        b'{"prompt": "x", "size": "8x8\\n"}',
        b'{"prompt": "x", "size": "1x1"}',
        b'{"prompt": ["x"]}',
        b'{"prompt": "x", "__proto__": {}}',
        b'{"prompt": "x", "model": "../../etc/passwd", "size": 3}',
    ],
)
@pytest.mark.parametrize("path", [GENERATIONS, "/v1/runs"])
def test_bodies_that_make_no_sense_are_refused(url, path, body):
    """In the one shape of errors."""
    answer = requests.post(url + path, data=body, headers=JSON, timeout=web.WAIT_S)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "\x00"},
        {"prompt": "\u202e" * 2000},
        {"prompt": "🎨" * 2000},
        {"prompt": "../../../etc/passwd"},
        {"prompt": "<|endoftext|>" * 100},
        {"prompt": "x", "model": "../../etc/passwd"},
        {"prompt": "x", "model": "https://evil.example/model"},
        {"prompt": "x", "user": "'; DROP TABLE runs; --"},
        {"prompt": "x", "seed": 2**63 - 1},
        {"prompt": "x", "guidance_scale": 100},
        {"prompt": "x", "guidance_scale": 0},
        {"prompt": "x", "size": "8x8"},
        {"prompt": "x", "size": "512x8"},
    ],
)
def test_strange_wishes_are_fulfilled(url, body):
    """They are pictures like others."""
    body = {"steps": 1, **body}
    answer = requests.post(url + GENERATIONS, json=body, timeout=web.WAIT_S)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "number", ["", "x", "1-1-1", "-1", "1e3", "9" * 21, "9" * 60_000, "1-\xb2"]
)
def test_ids_of_events_that_are_none_are_refused(url, number):
    """And not looked up; an empty one is none at all."""
    path = f"{url}/v1/runs/{web.begin(url, steps=1)}/events"
    headers = {"Last-Event-ID": number.encode("latin-1")}
    answer = requests.get(path, headers=headers, timeout=web.WAIT_S)
    assert answer.status_code == (400 if number else 200)


def test_bodies_sent_in_pieces_are_read(url):
    """Byte by byte, which is slow but allowed."""
    content = json.dumps({"prompt": "x", "steps": 1, "size": "8x8"}).encode()
    pieces = (content[index : index + 1] for index in range(len(content)))
    answer = requests.post(url + GENERATIONS, data=pieces, headers=JSON, timeout=web.WAIT_S)
    assert answer.status_code == 200


def test_two_lengths_are_refused(url):
    """Else a proxy and the service would read two requests differently."""
    line = f"POST {GENERATIONS} HTTP/1.1"
    kind = "Content-Type: application/json"
    assert raw(url, line, kind, "Content-Length: 2", "Content-Length: 3") == 400
    assert raw(url, line, kind, "Content-Length: -1") == 400
    assert raw(url, line, kind, "Content-Length: " + "9" * 30) in (400, 413)
