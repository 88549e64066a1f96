"""A real Redis server for the tests, on a socket of its own, that keeps nothing."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PROGRAM = "redis-server"
REQUIRED = os.environ.get("SD_PROGRESS_REQUIRE", "").split(",")


def needed():
    """Mark of tests that need the program: without it they are skipped, or fail if it must be."""
    is_missing = shutil.which(PROGRAM) is None and PROGRAM not in REQUIRED
    return pytest.mark.skipif(is_missing, reason=f"there is no {PROGRAM}; apt-get install it")


@contextlib.contextmanager
def running(*options):
    """The server's folder and URL; it is dead and gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="sdp-"))  # the path of a socket must be short
    server = Server(folder, options)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


class Server:
    """One `redis-server`, which can be stopped and started again, empty."""

    def __init__(self, folder, options=()):
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._words = [PROGRAM, "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self._words += ["--appendonly", "no", "--dir", str(folder), "--loglevel", "warning"]
        self._words += options
        self._process = None

    def start(self):
        """Run it, until it answers."""
        self._process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL)
        give_up_s = time.monotonic() + 10
        while not self.socket.exists():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < give_up_s, "redis-server does not answer"
            time.sleep(0.01)

    def stop(self):
        """Kill it, as nothing is to be kept."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.socket.unlink(missing_ok=True)
