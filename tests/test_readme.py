"""The code of the README and of the pages beside it, executed."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from diffusers import DiffusionPipeline

from sd_progress import demo_model_path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/lab.md", "docs/live.md")
FENCE = re.compile(r"^(?P<note><!-- in a notebook -->\n)?```python\n(?P<code>.*?)^```", re.M | re.S)


def blocks(is_for_notebooks=False):
    """The code, by page."""
    for page in PAGES:
        for found in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
            if (found["note"] is not None) == is_for_notebooks:
                name = f"{page}: {found['code'].strip().partition(chr(10))[0]}"
                yield pytest.param(found["code"], id=name)


@pytest.fixture(scope="module")
def pipe():
    """The demo model, as every reader has it."""
    return DiffusionPipeline.from_pretrained(demo_model_path())


@pytest.mark.parametrize("page", PAGES)
def test_there_is_code(page):
    """A page of this package shows how it is used."""
    assert FENCE.search((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", list(blocks()))
def test_the_code_runs(code, pipe, tmp_path, monkeypatch):
    """Each block on its own, in an empty folder, given a pipeline and a prompt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    exec(compile(code, "README.md", "exec"), {"pipe": pipe, "prompt": "the sea at sunset"})


def test_the_code_for_notebooks_runs(tmp_path):
    """In a kernel, as cells."""
    begin = (
        "from diffusers import DiffusionPipeline\nfrom sd_progress import demo_model_path\n"
        "pipe = DiffusionPipeline.from_pretrained(demo_model_path())\nprompt = 'the sea at sunset'"
    )
    cells = [begin, *(block.values[0] for block in blocks(is_for_notebooks=True))]
    assert len(cells) > 1
    made = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    nbclient.NotebookClient(made, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [str(cell.outputs) for cell in made.cells[1:]]
    assert all("data:image/png" in outputs for outputs in shown)
