"""The README's code, executed."""

import re
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from sd_progress import demo_model_path

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def pipe():
    """The demo model, as every reader has it."""
    return DiffusionPipeline.from_pretrained(demo_model_path())


def test_there_is_code():
    """A README of this package shows how it is used."""
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().partition("\n")[0])
def test_the_code_runs(code, pipe, tmp_path, monkeypatch):
    """Each block on its own, in an empty folder, given a pipeline and a prompt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    exec(compile(code, "README.md", "exec"), {"pipe": pipe, "prompt": "the sea at sunset"})
