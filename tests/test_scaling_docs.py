"""What docs/scaling.md shows, done."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest
import redis
import redis_server
import tiny
import web
from PIL import Image
from test_fleet import RUN, have_a_run

TEXT = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
AT_HOME = "redis://127.0.0.1"


def blocks(language, *words):
    """Those of the language that have the words in them."""
    return [text for kind, text in BLOCKS if kind == language and all(w in text for w in words)]


@pytest.fixture(scope="module")
def url():
    """A server, at a port."""
    port = redis_server.free_port()
    with redis_server.running(port=port):
        yield f"{AT_HOME}:{port}"


@pytest.fixture
def written(url):
    """A run of a tiny model, as the block shows it; the model takes no text."""
    code, call = blocks("python", "RedisWriter")[0].replace(AT_HOME, url).rsplit("\npipe(", 1)
    pipe = tiny.sd()
    names = {"pipe": pipe}
    exec(code, names)
    assert call == "prompt, callback_on_step_end=preview)\n"
    pipe(**tiny.sd_call(pipe, height=16, width=24), callback_on_step_end=names["preview"])
    return url


def test_any_run_is_written_and_read_in_python(written):
    """By a reader that knows nothing of this package."""
    (code,) = blocks("python", "client.xread")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        names = {}
        exec(code.replace(AT_HOME, written), names)
        names["client"].close()
    assert told.getvalue().splitlines()[-1] == "100% (12, 8)"


def test_the_newest_frame_in_a_shell(written, tmp_path):
    """With nothing but `redis-cli`."""
    (line,) = blocks("sh", "redis-cli")
    with redis.Redis.from_url(written) as raw:
        raw.xtrim("run:42", maxlen=2, approximate=False)
        raw.xdel("run:42", raw.xrevrange("run:42", count=1)[0][0])  # the end
    program = f"{web.program('redis-cli')} -u {written}"
    subprocess.run(["sh", "-c", line.replace("redis-cli", program)], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "newest.png") as picture:
        assert picture.size == (12, 8)


def test_the_rights_of_the_docs_are_enough():
    """For a whole run, a cancelled one and one that is given back; and they are no more."""
    (rule,) = blocks("text", "ACL SETUSER")
    with redis_server.running() as server:
        with redis.Redis.from_url(server.url) as raw:
            raw.execute_command(*rule.split())
        login = f"{server.url}?username=fleet&password=PASSWORD"
        assert have_a_run(login) == RUN
        with redis.Redis.from_url(login) as client:
            for forbidden in ("FLUSHALL", "KEYS *", "CONFIG GET maxmemory", "GET other"):
                with pytest.raises(redis.ResponseError, match="permission"):
                    client.execute_command(*forbidden.split())


def test_a_fleet_in_a_program(url):
    """The last block."""
    (code,) = blocks("python", "create_app")
    names = {}
    exec(code.replace(AT_HOME, url), names)
    assert names["bench"].claim(0) is None
    names["bench"].close()
