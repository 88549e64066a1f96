"""Previews in a Redis Stream, as any program can read them."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import redis
import redis_server
import tiny
from PIL import Image

from sd_progress import Frame, PreviewCallback, PreviewWarning, writer_for
from sd_progress.fleet import RedisWriter


@pytest.fixture(scope="module")
def server():
    """One for all tests here."""
    with redis_server.running() as started:
        yield started


@pytest.fixture
def raw(server):
    """What any program can see."""
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.flushall()
        yield client


def frame(step=0, value=7):
    images = np.full((1, 4, 6, 3), value, np.uint8)
    return Frame(images, step, 10, 1.0, 0.5, "denoised", "linear", 1.5, None)


def entries(raw, key="run:42"):
    return [fields for _, fields in raw.xrange(key)]


def test_a_run_is_a_stream(server, raw):
    """Each frame an entry, and one that says that the run is over; pictures are whole files."""
    pipe = tiny.sd()
    writer = RedisWriter(server.url, "run:42")
    callback = PreviewCallback(pipe, writer, every=2)
    pipe(**tiny.sd_call(pipe, steps=4, height=16, width=24), callback_on_step_end=callback)
    *frames, end = entries(raw)
    told = [json.loads(fields[b"data"]) for fields in frames]
    assert (frames[-1][b"name"], end) == (b"preview", {b"name": b"end", b"data": b"{}"})
    assert told[-1]["progress"] == 1.0
    with Image.open(io.BytesIO(frames[-1][b"picture"])) as picture:
        assert picture.size == (told[-1]["width"], told[-1]["height"])


def test_pixels_come_through(server, raw):
    """In a format that keeps them."""
    writer = RedisWriter(server.url, "run:42")
    writer.write(frame(value=99))
    writer.close()
    with Image.open(io.BytesIO(entries(raw)[0][b"picture"])) as picture:
        assert np.array_equal(np.asarray(picture), frame(value=99).images[0])


def test_the_stream_is_capped_and_forgotten(server, raw):
    """The newest stay, for a while."""
    writer = RedisWriter(server.url, "run:42", max_frames=3, keep_s=100, format="jpeg")
    for step in range(10):
        writer.write(frame(step))
    assert [json.loads(one[b"data"])["step_index"] for one in entries(raw)] == [7, 8, 9]
    assert 0 < raw.ttl("run:42") <= 100
    writer.close()


def test_a_url_is_a_target(server, raw):
    """The key is in it."""
    writer = writer_for(f"{server.url}?key=run:42")
    writer.write(frame())
    writer.close()
    assert len(entries(raw)) == 2
    with pytest.raises(ValueError, match=r"target must name the stream.*got 0 keys"):
        writer_for(server.url)


def test_without_a_server_frames_are_dropped_and_the_run_goes_on():
    """It is told once, costs next to nothing, and mends itself."""
    now = [0.0]
    with redis_server.running() as own:
        own.stop()
        writer = RedisWriter(own.url, "run:42", clock=lambda: now[0])
        with pytest.warns(PreviewWarning, match=r"frames for 'run:42' are dropped"):
            writer.write(frame())
        began_s = time.monotonic()
        for _ in range(1000):
            writer.write(frame())
        assert time.monotonic() - began_s < 1
        assert writer.dropped == 1001
        own.start()
        now[0] = 60.0
        writer.write(frame())
        writer.close()
        with redis.Redis.from_url(own.url, protocol=2) as raw:
            assert len(entries(raw)) == 2


def test_a_server_that_hangs_takes_a_bounded_time(server, raw):
    """As one whose disk is slow, or whose network swallows everything."""
    writer = RedisWriter(server.url, "run:42", timeout_s=0.2)
    raw.client_pause(3000)
    began_s = time.monotonic()
    with pytest.warns(PreviewWarning, match="are dropped"):
        writer.write(frame())
    writer.close()
    assert time.monotonic() - began_s < 2
    assert writer.dropped == 2


def test_what_cannot_mend_itself_is_an_error(server, raw):
    """As a key that is no stream."""
    raw.set("run:42", "taken")
    writer = RedisWriter(server.url, "run:42")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        writer.write(frame())
    raw.delete("run:42")
    writer.close()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("http://host", "a"), {}, "url must begin with redis://"),
        (("redis://host", ""), {}, "key must be the name of a stream, got ''"),
        (("redis://host", "a"), {"max_frames": 0}, "max_frames, keep_s and timeout_s must be"),
        (("redis://host", "a"), {"format": "bmp"}, "format must be one of 'png', 'jpeg', 'webp'"),
    ],
)
def test_wrong_settings_raise_at_once(arguments, options, message):
    """Before the first step."""
    with pytest.raises(ValueError, match=message):
        RedisWriter(*arguments, **options)


def test_without_the_extra_the_error_says_what_to_install():
    """And the rest of the package does without."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from sd_progress import writer_for\n"
        "writer_for('steps/')\n"
        "try: writer_for('redis://host/0?key=a')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "sd-progress[redis]"' in result.stdout
    assert result.stderr == ""
