"""The Gradio example: the app as it is, driven by Gradio's own client.

Gradio wants Pillow below 13, and so has an environment of its own: `.venv-gradio`, which
`scripts/test` makes.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
OWN_PYTHON = ROOT / ".venv-gradio" / "bin" / "python"

CLIENT = """
import json, sys
from gradio_client import Client

client = Client(sys.argv[1], verbose=False)
taken = []
run = client.submit("the sea at sunset", 100, api_name="/paint")
for picture, gallery, words in run:
    taken.append(words)
    if len(taken) == 2:
        run.cancel()
        break
cancelled = list(taken)
run = client.submit("the sea at sunset", 6, api_name="/paint")
outputs = list(run)
print(json.dumps({"cancelled": cancelled, "outputs": outputs}))
"""


def interpreter():
    """The one that has Gradio; skips where there is none, unless it is required."""
    if importlib.util.find_spec("gradio") is not None:
        return sys.executable
    if not OWN_PYTHON.exists():
        if "gradio" in os.environ.get("SD_PROGRESS_REQUIRE", "").split(","):
            pytest.fail("gradio must be installed, here or in .venv-gradio")
        pytest.skip("needs gradio, here or in .venv-gradio, which scripts/test makes")
    return OWN_PYTHON


@pytest.fixture(scope="module")
def python():
    return interpreter()


@pytest.fixture(scope="module")
def address(python, tmp_path_factory):
    """Of the running app."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [python, ROOT / "examples" / "gradio_app.py"]
    folder = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["GRADIO_SERVER_PORT"] = str(port)
    log = folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=output) as app,
    ):
        try:
            end_s = time.monotonic() + 120
            while "Running on" not in log.read_text():
                assert app.poll() is None, log.read_text()
                assert time.monotonic() < end_s, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
            assert "Traceback" not in log.read_text()
        finally:
            app.terminate()


@pytest.fixture(scope="module")
def happened(address, python, tmp_path_factory):
    """What a client got: of a run that it cancelled, and of the next."""
    words = [python, "-c", CLIENT, address]
    folder = tmp_path_factory.mktemp("client")
    result = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_previews_come_and_the_gallery_grows(happened):
    """The last is the finished picture."""
    pictures, galleries, words = zip(*happened["outputs"], strict=True)
    counts = [len(gallery) for gallery in galleries]
    assert counts == list(range(1, len(counts) + 1))
    assert words[-1] == "100%, 0 s to go"
    last = np.asarray(Image.open(pictures[-1]))
    assert last.shape == (512, 512, 3)
    assert last.std() > 10


def test_a_cancelled_run_makes_room_for_the_next(happened):
    """One pipeline runs one call at a time."""
    assert len(happened["cancelled"]) == 2
    assert "100%" not in happened["cancelled"][-1]
    assert len(happened["outputs"]) >= 2
