"""The web service: a real server, the demo model, and the clients that people have."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
import torch
import web
from diffusers import DiffusionPipeline
from PIL import Image

from sd_progress import demo_model_path
from sd_progress.cli import main
from sd_progress.images_api import PartialImages, RequestLimits
from sd_progress.jobs import Event, Job
from sd_progress.local import Limits, LocalHub, position_of
from sd_progress.server import Settings

DOCS = Path(__file__).parent.parent / "docs" / "server.md"
DOCS_URL = "http://127.0.0.1:8765"
STEPS = 6
TOKEN = "a-secret-of-these-tests"
LONG = 150  # steps: some seconds
GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def url():
    """`sd-progress serve`, as it is typed; with as many threads as here, for the same bits."""
    words = [sys.executable, "-m", "sd_progress", "serve", "--port", "0", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        line = process.stdout.readline()
        yield re.search(r"http://\S+", line)[0]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(web.WAIT_S) == 0
    assert rest == "\nStopped.\n"


@pytest.fixture(scope="module")
def here():
    """The same in this process, whose hub can be looked at."""
    with web.service() as made:
        yield made


@pytest.fixture(scope="module")
def pipe():
    """The demo model, as everybody loads it."""
    loaded = DiffusionPipeline.from_pretrained(demo_model_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def plain(pipe, **arguments):
    """What a plain call of the pipeline returns."""
    generator = torch.Generator().manual_seed(4)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, **arguments}
    return np.asarray(pipe(web.PROMPT, generator=generator, **arguments).images[0])


# The OpenAI client


def test_the_openai_client_streams_partial_images(client, pipe):
    """Unmodified; the last picture is that of a plain call, bit for bit."""
    body = {"steps": STEPS, "seed": 4}
    stream = client.images.generate(
        model="x", prompt=web.PROMPT, stream=True, partial_images=3, extra_body=body
    )
    *partial, completed = list(stream)
    assert [type(event).__name__ for event in partial] == ["ImageGenPartialImageEvent"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert type(completed).__name__ == "ImageGenCompletedEvent"
    np.testing.assert_array_equal(pixels(completed.b64_json), plain(pipe))


def test_its_events_are_as_its_types_say(client):
    """Not only near enough for the client, which forgives."""
    stream = client.images.generate(
        model="x", prompt=web.PROMPT, stream=True, partial_images=1, extra_body={"steps": STEPS}
    )
    for event in stream:
        content = {**event.to_dict(), "size": "auto"}  # older types know only OpenAI's own sizes
        type(event).model_validate(content, strict=True)
        assert event.run_id
        height, width, _ = pixels(event.b64_json).shape
        assert event.size == f"{width}x{height}"


def test_the_openai_client_waits_for_a_picture(client, pipe):
    """Without a stream, with every field that it has."""
    response = client.images.generate(
        model="x",
        prompt=web.PROMPT,
        n=2,
        size="64x96",
        quality="high",
        response_format="b64_json",
        output_format="png",
        user="somebody",
        extra_body={"steps": STEPS, "seed": 4, "guidance_scale": 2.0, "negative_prompt": "trees"},
    )
    arguments = {"width": 64, "height": 96, "num_images_per_prompt": 2, "guidance_scale": 2.0}
    expected = plain(pipe, negative_prompt="trees", **arguments)
    np.testing.assert_array_equal(pixels(response.data[0].b64_json), expected)
    assert (len(response.data), response.size, response.output_format) == (2, "64x96", "png")
    assert response._request_id == response.run_id


def test_the_openai_client_raises_what_is_wrong(client):
    """With the field that is."""
    with pytest.raises(openai.BadRequestError, match="size must be multiples of 8 pixels") as told:
        client.images.generate(model="x", prompt=web.PROMPT, size="100x64")
    assert (told.value.param, told.value.code) == ("size", "invalid_value")


def test_the_openai_client_raises_what_fails_in_a_stream(client):
    """The answer has begun, so it is an event."""
    stream = client.images.generate(
        model="x", prompt=web.PROMPT, stream=True, extra_body={"steps": LONG}
    )
    run_id = stream.response.headers["x-run-id"]
    requests.delete(f"{stream.response.url.copy_with(path='/v1/runs/')}{run_id}", timeout=9)
    with pytest.raises(openai.APIError, match="the run was cancelled"):
        list(stream)


def test_the_asynchronous_client_streams_too(url):
    """Every step, which is an extension."""

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.images.generate(
                model="x",
                prompt=web.PROMPT,
                stream=True,
                partial_images=100,
                extra_body={"steps": 20},
            )
            return [event.type async for event in stream]

    names = web.asyncio.run(main())
    assert names[-1] == "image_generation.completed"
    assert len(names) > 5


@pytest.mark.parametrize(
    ("count", "steps"), [(0, []), (1, [10]), (3, [5, 10, 15]), (40, range(1, 21))]
)
def test_partial_images_are_even(count, steps):
    """Of 20 steps; never more than there are."""
    partial, seen = PartialImages(Job("a", "x"), count), []
    for step in range(1, 21):
        data = dict.fromkeys(("b64_json", "width", "height", "elapsed_s", "eta_s"), 0)
        data |= {"step_index": step - 1, "num_steps": 20, "progress": step / 20}
        seen += [step for _ in partial.of(Event("preview", data))]
    assert seen == list(steps)


# The docs


@pytest.mark.parametrize(
    "code", re.findall(r"^```sh\n(.*?)^```", DOCS.read_text("utf-8"), re.M | re.S)
)
def test_the_curl_examples_of_the_docs_run(url, code, tmp_path):
    """As they are, but for the port."""
    web.program("curl")
    script = "set -euo pipefail\n" + code.replace(DOCS_URL, url).replace("curl ", "curl --fail ")
    words = ["bash", "-c", script]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    if "LAST=" in code:
        whole, rest = ((tmp_path / name).read_text() for name in ("events.txt", "rest.txt"))
        assert whole.endswith(rest)
        assert "event: completed" in rest
    else:
        assert "b64_json" in result.stdout or "sd_progress_runs_total" in result.stdout


def test_the_openai_example_of_the_docs_runs(url, tmp_path, monkeypatch):
    """As it is, but for the port."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(import base64.*?)^```", DOCS.read_text("utf-8"), re.M | re.S)[1]
    variables = {}
    exec(compile(code.replace(DOCS_URL, url), "server.md", "exec"), variables)
    variables["client"].close()
    assert {x.name for x in tmp_path.iterdir()} == {
        *(f"partial-{i}.png" for i in range(3)),
        "picture.png",
    }


def test_the_other_example_of_the_docs_runs():
    """An application is made."""
    code = re.findall(r"^```python\n(.*?)^```", DOCS.read_text("utf-8"), re.M | re.S)[-1]
    exec(compile(code, "server.md", "exec"), {})


# A run's own events


def test_a_run_tells_everything_from_its_beginning(here):
    """Also when it is over."""
    url, _ = here
    run_id = web.begin(url, steps=STEPS)
    first, second = web.told(url, run_id), web.told(url, run_id)
    assert first == second
    assert [first[0].name, first[-1].name] == ["queued", "completed"]
    assert {event.name for event in first[1:-1]} == {"phase", "preview"}


def test_a_broken_connection_loses_nothing(here):
    """Whoever comes again with the last id gets what came after it."""
    url, _ = here
    run_id, seen, path = web.begin(url, steps=60), [], None
    path = f"/v1/runs/{run_id}/events"
    while not seen or seen[-1].name != "completed":
        headers = {"Last-Event-ID": seen[-1].id} if seen else {}
        with web.streaming(url, path, headers=headers) as answer:
            for _, event in zip(range(7), web.events_of(answer), strict=False):
                seen.append(event)
                if event.name == "completed":
                    break
    assert seen == web.told(url, run_id)
    positions = [position_of(event.id) for event in seen]
    assert positions == sorted(set(positions))


def test_where_nothing_is_left_an_eventsource_stops(here):
    """204; and `?after=` does as the header does."""
    url, _ = here
    run_id = web.begin(url, steps=2)
    last = web.told(url, run_id)[-1].id
    answer = requests.get(f"{url}/v1/runs/{run_id}/events?after={last}", timeout=9)
    assert (answer.status_code, answer.content) == (204, b"")


def test_many_watch_the_same(here):
    """Viewers of one run, and the one who asked for it."""
    url, _ = here
    run_id = web.begin(url, steps=30)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        all_told = list(pool.map(lambda _: web.told(url, run_id), range(20)))
    assert all(told == all_told[0] for told in all_told)
    assert all_told[0][-1].name == "completed"


def test_a_run_can_be_cancelled(here):
    """While it is painted, and while it waits; again does nothing."""
    url, _ = here
    painted, waiting = web.begin(url, steps=LONG), web.begin(url, steps=LONG)
    for run_id in (waiting, painted, painted):
        assert requests.delete(f"{url}/v1/runs/{run_id}", timeout=9).status_code == 204
    assert web.told(url, waiting)[-1].name == web.told(url, painted)[-1].name == "cancelled"


# Leaving


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_cancels(here, stream):
    """A run that nobody waits for any more."""
    url, hub = here
    before = web.asyncio.run(hub.load())
    leave(url, steps=LONG, stream=stream, partial_images=100)
    web.until(lambda: web.asyncio.run(hub.load()) == before)
    assert [event.name for event in newest(hub)][-1] == "cancelled"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_may_let_it_go_on(here, stream):
    """`stays`."""
    url, hub = here
    leave(url, steps=30, stream=stream, stays=True)
    assert [event.name for event in newest(hub)][-1] == "completed"


def test_who_leaves_at_once_cancels():
    """Before the answer has begun, too; of runs that nobody paints."""
    hub = LocalHub(Limits(max_waiting=1000, max_per_client=1000))
    with web.served(hub) as url:
        for number in range(60):
            content = json.dumps({"prompt": "x", "stream": number % 2 == 0}).encode()
            with connected(url) as connection:
                connection.sendall(head(url, len(content)) + content)
        web.until(lambda: numbers(url)["sd_progress_waiting"] == 0)
        assert set(ended(numbers(url))) <= {"cancelled"}


def leave(url, **body):
    """Ask, and close the connection while it is painted."""
    content = json.dumps({"prompt": web.PROMPT, **body}).encode()
    with connected(url) as connection:
        connection.sendall(head(url, len(content)) + content)
        if body["stream"]:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            web.until(lambda: numbers(url)["sd_progress_running"] == 1)


def connected(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=web.WAIT_S)


def head(url, length, path=GENERATIONS):
    lines = (f"POST {path} HTTP/1.1", f"Host: {url.removeprefix('http://')}")
    more = ("Content-Type: application/json", f"Content-Length: {length}", "", "")
    return "\r\n".join((*lines, *more)).encode()


def newest(hub):
    """All events of the run that was begun last."""
    runs = (*hub._finished, *hub._running, *hub._waiting)
    return web.events_in(hub, runs[-1])


# Limits


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"prompt": ""}, "prompt must be valid", "prompt"),
        ({"prompt": None}, "prompt must be valid", "prompt"),
        ({"prompt": "x" * 4001}, "prompt must be at most 4000 characters, got 4001", "prompt"),
        ({"n": 5}, "n must be at most 4, got 5", "n"),
        ({"n": "2"}, "n must be valid", "n"),
        ({"steps": 151}, "steps must be at most 150, got 151", "steps"),
        ({"partial_images": 101}, "partial_images must be at most 100", "partial_images"),
        ({"size": "4096x4096"}, "size must be at most 1572864 pixels", "size"),
        ({"size": "100x100"}, "size must be multiples of 8 pixels, got 100x100; .* 96x96", "size"),
        ({"size": "٣٢x٣٢"}, "size must be valid", "size"),
        ({"size": "99999x8"}, "size must be multiples of 8 pixels, got 99999x8", "size"),
        ({"seed": -1}, "seed must be valid", "seed"),
        ({"seed": 2**63}, "seed must be valid", "seed"),
        ({"response_format": "url"}, "response_format must be valid", "response_format"),
        ({"background": "transparent"}, "background must be valid", "background"),
        ({"stepz": 3}, "stepz must be left out", "stepz"),
        ({"steps": 1001, "prompt": "x"}, "steps must be at most", "steps"),
    ],
)
def test_what_goes_too_far_is_refused(here, body, message, param):
    """In the shape of OpenAI's errors, with the field that is wrong."""
    answer = web.post(here[0], **body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert re.match(message, error["message"])
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_what_the_model_cannot_do_is_refused(pipe):
    """Only the painter knows: here, that more steps than it was trained with make no sense."""
    settings = Settings(limits=RequestLimits(max_steps=5000))
    with web.service(settings=settings) as (url, _):
        answer = web.post(url, steps=2000)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("steps must be at most 1000, got 2000")
    assert answer.json()["error"]["param"] == "steps"


def test_only_so_many_runs_may_wait():
    """The others are told to come again."""
    hub = LocalHub(Limits(max_waiting=3, max_per_client=2))
    with web.served(hub) as url:
        for _ in range(2):
            web.begin(url)
        answer = web.post(url)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "runs of one client must be below 2" in error["message"]


def test_only_so_many_may_watch():
    """Each is a connection."""
    hub = LocalHub()
    with web.served(hub, Settings(max_viewers=1)) as url:
        path = f"/v1/runs/{web.begin(url)}/events"
        with web.streaming(url, path) as answer:
            events = web.events_of(answer)
            assert next(events).name == "queued"
            assert requests.get(url + path, timeout=9).status_code == 429


def test_a_large_body_is_refused(here):
    """Before it is read, and also where it does not say how large it is."""
    url, _ = here
    assert web.post(url, user="x" * 70_000).status_code == 413
    chunks = (b'{"prompt": "' + b"x" * 1000 for _ in range(200))
    kind = {"Content-Type": "application/json"}
    with contextlib.suppress(requests.ConnectionError):  # it is closed while it is sent
        answer = requests.post(url + GENERATIONS, data=chunks, headers=kind, timeout=9)
        assert answer.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for():
    """Else connections would be held for nothing."""
    settings = Settings(body_timeout_s=0.2)
    with web.served(LocalHub(), settings) as url, connected(url) as connection:
        connection.sendall(head(url, 100) + b'{"prompt"')
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_viewer_that_takes_nothing_is_let_go():
    """Else it would be kept waiting for, with all that it has not taken."""
    hub = LocalHub()
    with web.served(hub, Settings(send_timeout_s=0.3)) as url:
        run_id = web.begin(url)
        bench = hub.bench()
        job = bench.claim(0)
        with connected(url) as connection:
            request = f"GET /v1/runs/{run_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(request.encode())
            web.until(lambda: numbers(url)["sd_progress_viewers"] == 1)
            for _ in range(100):
                bench.publish(job, Event("preview", {"b64_json": "x" * 200_000}))
            web.until(lambda: numbers(url)["sd_progress_viewers"] == 0)
        bench.publish(job, Event("completed"))
        bench.close()


# Who may ask


def test_with_a_token_nobody_else_is_let_in():
    """But for the page and the sign of life, which tell nothing."""
    with web.served(LocalHub(), Settings(token=TOKEN)) as url:
        for given in (
            None,
            "",
            TOKEN,
            f"Basic {TOKEN}",
            f"Bearer {TOKEN}x",
            "Bearer \xe9",
            "Bearer",
        ):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for path in ("/v1/runs/x/events", "/metrics", "/openapi.json", "/nothing"):
                answer = requests.get(url + path, headers=headers, timeout=9)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert requests.get(url + "/", timeout=9).status_code == 200
        assert requests.get(url + "/healthz", timeout=9).json() == {"status": "ok"}
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert requests.get(url + "/metrics", headers=right, timeout=9).status_code == 200


def test_the_openai_client_sends_the_token_as_its_key():
    """A wrong one raises what it raises elsewhere."""
    hub = LocalHub()
    with web.served(hub, Settings(token=TOKEN)) as url:
        for key in (TOKEN, "another"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                if key == TOKEN:
                    web.asyncio.run(hub.aclose())  # nobody paints
                    with pytest.raises(openai.RateLimitError, match="hub must be open"):
                        client.images.generate(model="x", prompt="x")
                else:
                    with pytest.raises(openai.AuthenticationError, match="Authorization header"):
                        client.images.generate(model="x", prompt="x")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8", 200),
        ("me.example", 200),
        ("evil.example", 421),
        ("", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 421),
    ],
)
def test_other_names_for_this_machine_are_refused(host, status):
    """Against DNS rebinding."""
    settings = Settings(hosts=frozenset({"me.example"}))
    with web.served(LocalHub(), settings) as url:
        assert requests.get(url + "/", headers={"Host": host}, timeout=9).status_code == status


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://["]
)
def test_pages_of_other_origins_are_refused(here, origin):
    """A browser sends their requests, too."""
    answer = web.post(here[0], headers={"Origin": origin})
    assert answer.status_code == 403
    assert web.post(here[0], steps=2, headers={"Origin": here[0]}).status_code == 200


def test_what_other_pages_can_send_unasked_is_refused(here):
    """A form, and text."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"Content-Type": kind}
        data = b'{"prompt": "x"}'
        answer = requests.post(here[0] + GENERATIONS, data=data, headers=headers, timeout=9)
        assert answer.status_code == 415


def test_every_answer_is_strict(here):
    """Also that something is not there, and that something is wrong."""
    url, _ = here
    for path in ("/", "/nothing", "/metrics", "/v1/runs/x/events"):
        headers = requests.get(url + path, timeout=9).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


def test_the_page_runs_only_what_is_its_own(here):
    """The policy names its script and its style, and no place but this."""
    answer = requests.get(here[0] + "/", timeout=9)
    policy = answer.headers["content-security-policy"]
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert not re.search(
        r"https?://|<script src|<link rel=.stylesheet|style=|onclick=", answer.text
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--token must be given with --host 0.0.0.0"),
        (["--host", "::"], "--token must be given with --host ::"),
        (["--token", "short"], "--token must be 16 to 512 letters"),
        (["--token", "with a space in it"], "--token must be 16 to 512 letters"),
        (["--host", "203.0.113.7", "--token", TOKEN], "must be an address of this machine"),
        (["--port", "70000"], "--port must be at most 65535"),
        (["--port", "x"], "--port must be a whole number"),
        (["--max_steps", "0"], "--max_steps must be a whole number from 1 on"),
        (["--port", "0", "--model", "./nothing-here"], "--model must be a model id"),
    ],
)
def test_what_cannot_be_served_is_told(words, message, capsys, monkeypatch):
    """In one line, before anything is loaded."""
    monkeypatch.delenv("SD_PROGRESS_TOKEN", raising=False)
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_told(here, capsys):
    """Before anything is loaded."""
    assert main(["serve", "--port", here[0].rpartition(":")[2]]) == 2
    assert "must be an address of this machine that is free" in capsys.readouterr().err


# Metrics


def numbers(url):
    """What the service counts."""
    text = requests.get(url + "/metrics", timeout=9).text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def ended(counted):
    """Runs by outcome."""
    found = (re.match(r'sd_progress_runs_total\{outcome="(.*)"\}', name) for name in counted)
    return {match[1]: counted[match[0]] for match in found if match}


def test_what_happens_is_counted():
    """Runs by outcome, frames, viewers, and how long it takes."""
    with web.service(limits=Limits(max_waiting=1)) as (url, _):
        web.post(url, steps=STEPS)
        run_id = web.begin(url, steps=LONG)
        with web.streaming(url, f"/v1/runs/{run_id}/events") as answer:
            events = web.events_of(answer)
            assert next(events).name == "queued"
            web.until(lambda: numbers(url)["sd_progress_running"] == 1)
            web.begin(url)
            assert web.post(url).status_code == 429
            assert numbers(url)["sd_progress_waiting"] == 1
            assert numbers(url)["sd_progress_viewers"] == 1
            requests.delete(f"{url}/v1/runs/{run_id}", timeout=9)
        web.until(lambda: ended(numbers(url)) == {"completed": 2, "cancelled": 1, "refused": 1})
        web.until(lambda: numbers(url)["sd_progress_viewers"] == 0)
        counted = numbers(url)
    assert counted["sd_progress_previews_total"] > 2
    assert counted["sd_progress_seconds_to_first_preview_count"] in (2, 3)
    assert counted["sd_progress_run_seconds_count"] == 2
    assert counted["sd_progress_workers"] == 1


# The end


def test_what_is_missing_is_told_with_its_cure(tmp_path):
    """The extra, by the command and by the module."""
    code = "import sys; sys.modules['fastapi'] = None; from sd_progress.cli import main; "
    for more in ("sys.exit(main(['serve']))", "import sd_progress.server"):
        words = [sys.executable, "-c", code + more]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        expected = 'fastapi must be installed to serve, got none; pip install "sd-progress[server]"'
        assert result.returncode
        assert result.stderr.rstrip().endswith(expected)


def test_stopping_ends_what_is_open():
    """Streams end, those that wait are told, and no thread is left."""
    before = set(threading.enumerate())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with contextlib.ExitStack() as stack:
            url, hub = stack.enter_context(web.service())
            web.begin(url, steps=LONG)
            waiting = pool.submit(web.post, url, steps=LONG)
            web.until(lambda: web.asyncio.run(hub.load()).waiting == 1)
        answer = waiting.result(web.WAIT_S)
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("sd-progress")]


def test_sigterm_stops_the_command(tmp_path):
    """As Ctrl-C does, also in the middle of a run."""
    words = [sys.executable, "-m", "sd_progress", "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        run_id = web.begin(url, steps=LONG)
        with web.streaming(url, f"/v1/runs/{run_id}/events") as answer:
            events = web.events_of(answer)
            while next(events).name != "preview":
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(web.WAIT_S) == 0
    assert list(tmp_path.iterdir()) == []
