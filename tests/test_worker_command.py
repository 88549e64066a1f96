"""`sd-progress worker`, and `sd-progress serve --redis`: what they refuse, and how they leave."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest
import redis
import redis_server
import web
from test_cli import command
from test_fleet import names, read, submit

from sd_progress.fleet import RedisHub
from sd_progress.jobs import Job
from sd_progress.local import LocalHub
from sd_progress.worker_command import told_to_stop


@pytest.fixture
def server():
    """An empty one."""
    with redis_server.running() as started:
        yield started


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("worker", "--redis must be the URL of a Redis server, got none"),
        ("worker --redis http://host", "--redis: url must begin with redis://"),
        ("worker --redis redis://host --prefix {a}", "--redis: prefix must be letters"),
        (
            "worker --redis redis://host --lease_s 0",
            "--lease_s must be a number of seconds above 0",
        ),
        ("worker --redis redis://host --grace_s soon", "--grace_s must be a number of seconds"),
        ("worker --redis redis://host --name nobody", "--redis: name must be that of a worker"),
        ("serve --redis http://host --port 0", "--redis: url must begin with redis://"),
        ("serve --redis redis://host --model a/b", "--model must be left out with --redis"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, message, tmp_path, monkeypatch):
    """And exit code 2."""
    monkeypatch.delenv("SD_PROGRESS_REDIS", raising=False)
    done = command(tmp_path, *words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"sd-progress: error: {message}")
    assert done.err.count("\n") == 1


def test_a_server_that_lets_nobody_in_is_one_line(server, tmp_path):
    """A wrong password does not become right by waiting; it is not printed."""
    with redis.Redis.from_url(server.url) as raw:
        raw.config_set("requirepass", "right")
    url = f"{server.url}?password=wrong-one"
    done = command(tmp_path, "worker", "--redis", url, "--device", "cpu")
    assert done.code == 2
    assert "--redis must be a server that lets the worker do its work" in done.err
    assert "wrong-one" not in done.out + done.err


def test_what_is_missing_is_told(tmp_path):
    """With the command that installs it."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from sd_progress.cli import main\n"
        "sys.exit(main([*sys.argv[1:], '--redis', 'redis://host']))"
    )
    for words in (["worker"], ["serve", "--port", "0"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 2
        assert 'pip install "sd-progress[redis]"' in result.stderr


def test_a_web_process_of_a_fleet_loads_no_model():
    """Nor what models need: it is small, and there at once."""
    code = (
        "import sys, sd_progress.serve_command, sd_progress.fleet\n"
        "print({'torch', 'diffusers', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_a_worker_that_is_told_to_stop_finishes_its_job(server, tmp_path):
    """Within the time of grace; it begins no other, and says that it stopped."""
    submit(server, Job("a", web.PROMPT, steps=6, stays=True), Job("b", web.PROMPT, stays=True))

    async def stop_in_the_middle():
        hub = RedisHub(server.url)
        async for event in hub.events("a"):
            if event.name == "preview":
                break
        os.kill(os.getpid(), signal.SIGTERM)
        await hub.aclose()

    stopping = threading.Thread(target=asyncio.run, args=[stop_in_the_middle()])
    stopping.start()
    done = command(tmp_path, "worker", "--redis", server.url, "--device", "cpu", "--name", "ann")
    stopping.join()
    assert (done.code, done.out.splitlines()[-1]) == (0, "Stopped.")
    assert done.out.startswith(f"ann paints for {server.url}")
    assert names(read(server, "a"))[-1] == "completed"
    with redis.Redis.from_url(server.url, protocol=2) as raw:
        assert raw.xpending("{sd-progress}:jobs", "workers")["pending"] == 0
        assert raw.xlen("{sd-progress}:jobs") == 1


@pytest.mark.parametrize(("grace_s", "signals"), [(0.1, 1), (60, 2)])
def test_when_the_time_is_over_the_job_is_let_go(grace_s, signals):
    """Or at a second signal."""
    hub = LocalHub()
    web.submit(hub)
    bench = hub.bench()
    with told_to_stop(bench, grace_s) as stop:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        web.until(lambda: asyncio.run(hub.load()).workers == 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert bench.claim(0) is None
