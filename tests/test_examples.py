"""The examples, run as they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
MAKES = {
    "early_stop.py": {"sea.png"},
    "live_queue.py": {"live.png"},
    "make_gif.py": {"denoise.gif"},
    "own_writer.py": set(),
    "save_pngs.py": {"house.png", "steps/step_001.png", "steps/step_002.png"},
    "stream.py": {"desert.png"},
}
ELSEWHERE = {"gradio_app.py"}  # a server; tests/test_gradio.py runs it


def test_every_example_is_known():
    """A new one must be listed with what it makes."""
    assert {path.name for path in FOLDER.glob("*.py")} == {*MAKES, *ELSEWHERE}


@pytest.mark.parametrize("name", MAKES)
def test_an_example_runs_from_nothing(name, tmp_path):
    """In an empty folder, with the demo model, and no preview fails."""
    result = subprocess.run(
        [sys.executable, FOLDER / name, "--steps", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "PreviewWarning" not in result.stderr
    assert result.stdout
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert made == MAKES[name]


@pytest.mark.parametrize("name", [*MAKES, *ELSEWHERE])
def test_an_example_is_one_idea(name):
    """At most forty lines, introduced by a sentence."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert (ast.get_docstring(ast.parse(text)) or "").endswith(".")
