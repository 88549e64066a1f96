"""Real Redis servers for the tests, that keep nothing and are gone afterwards."""

import contextlib
import functools
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import redis
import web


class Server:
    """One `redis-server` on a socket in a folder; it can be stopped and started again, empty."""

    def __init__(self, folder, *options):
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._words = [
            web.program("redis-server"),
            *options,
            "--unixsocket",
            str(self.socket),
            "--dir",
            str(folder),
        ]
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


@contextlib.contextmanager
def running(*options, port=0):
    """A server; with a port, it listens there as well."""
    keeps_nothing = ["--save", "", "--appendonly", "no"]
    with started(*options, *keeps_nothing, "--bind", "127.0.0.1", "--port", str(port)) as server:
        yield server


@contextlib.contextmanager
def started(*options):
    """The program with these words, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="sdp-"))  # the path of a socket must be short
    server = Server(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@contextlib.contextmanager
def cluster():
    """The URL of three nodes that share the keys."""
    with contextlib.ExitStack() as stack:
        servers, nodes = [], [f"127.0.0.1:{free_port()}" for _ in range(3)]
        for node in nodes:
            options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            servers.append(stack.enter_context(running(*options, port=node.partition(":")[2])))
        words = [web.program("redis-cli"), "--cluster", "create", *nodes, "--cluster-yes"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=30)
        for server in servers:
            web.until(functools.partial(is_whole, server))
        yield f"redis+cluster://{nodes[0]}"


def is_whole(server):
    """Whether a node of a cluster knows of all keys where they are."""
    with redis.Redis.from_url(server.url, protocol=2) as raw:
        return b"cluster_state:ok" in raw.execute_command("CLUSTER", "INFO")


@contextlib.contextmanager
def sentinel(tmp_path):
    """The URL of a server that a sentinel knows by the name of `main`."""
    port, own_port, config = free_port(), free_port(), tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {port} 1\n")
    words = (str(config), "--sentinel", "--bind", "127.0.0.1", "--port", str(own_port))
    with running(port=port), started(*words):
        yield f"redis+sentinel://127.0.0.1:{own_port}/main"


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
