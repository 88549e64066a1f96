"""The live view in a notebook: real kernels, and what they send to a notebook's page."""

import base64
import io
import re
import sys
import time
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image

from sd_progress import PngFolderWriter, writer_for
from sd_progress.notebook import NotebookWriter

EXAMPLE = Path(__file__).parent.parent / "examples" / "notebook.ipynb"

BEGIN = """
import time, sys
from diffusers import DiffusionPipeline
from sd_progress import PreviewCallback, astream, demo_model_path, notebook, stream
pipe = DiffusionPipeline.from_pretrained(demo_model_path())
pipe.set_progress_bar_config(disable=True)
call = {"prompt": "the sea at sunset", "num_inference_steps": 4}
taken = []
pipe.unet.register_forward_pre_hook(lambda *_: taken.append(time.sleep(0.15)))
"""
WITHOUT_WIDGETS = "import sys\nsys.modules['ipywidgets'] = None"


CELLS = {
    "begin": BEGIN,
    "run": """
preview = PreviewCallback(pipe, "notebook", final=True)
pipe(**call, callback_on_step_end=preview).images[0].save("run.png")
""",
    "run again": "pipe(**call, callback_on_step_end=preview);",
    "watch": """
result = await notebook.watch(pipe, **call)
result.images[0].save("watch.png")
""",
    "astream": """
async for frame in astream(pipe, **call, targets=["notebook"]):
    last = frame
print(last.source)
""",
}


class Executed(nbclient.NotebookClient):
    """Cells that were run in a kernel of their own; knows their outputs, and all messages."""

    def __init__(self, cells, folder):
        self.folder, self._messages = folder, []
        self._cells = {name: nbformat.v4.new_code_cell(code) for name, code in cells.items()}
        made = nbformat.v4.new_notebook(cells=list(self._cells.values()))
        super().__init__(made, timeout=120, resources={"metadata": {"path": folder}})
        self.execute()

    def process_message(self, message, cell, cell_index):
        self._messages.append((cell_index, message["msg_type"]))
        return super().process_message(message, cell, cell_index)

    def outputs(self, cell):
        return self._cells[cell].outputs

    def count(self, cell, kind):
        return self._messages.count((list(self._cells).index(cell), kind))


@pytest.fixture(scope="module")
def with_widgets(tmp_path_factory):
    return Executed(CELLS, tmp_path_factory.mktemp("widgets"))


@pytest.fixture(scope="module")
def without_widgets(tmp_path_factory):
    hidden = {"hide": "import sys\nsys.modules['ipywidgets'] = None"}
    return Executed({**hidden, **CELLS}, tmp_path_factory.mktemp("html"))


@pytest.fixture(params=["with_widgets", "without_widgets"])
def executed(request):
    return request.getfixturevalue(request.param)


def shown(output):
    """The picture in an output's HTML."""
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', output["data"]["text/html"])
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("cell", ["run", "watch"])
def test_an_output_ends_as_the_finished_picture(executed, cell):
    """The one that the pipeline returned, in its own size, and how long it took."""
    (output,) = executed.outputs(cell)
    made = np.asarray(Image.open(Path(executed.folder, f"{cell}.png")))
    np.testing.assert_array_equal(shown(output), made)
    assert re.fullmatch(r"finished in 0:\d\d \u00b7 pipeline", output["data"]["text/plain"])


def test_without_widgets_one_output_is_updated_in_place(without_widgets):
    """For each step, and at the end."""
    assert without_widgets.count("run", "display_data") == 1
    assert without_widgets.count("run", "update_display_data") >= 4


def test_with_widgets_they_are_updated_and_make_way(with_widgets):
    """For one output, which has no widget in the end."""
    assert with_widgets.count("run", "display_data") == 1
    assert with_widgets.count("run", "update_display_data") == 1
    assert with_widgets.count("run", "comm_msg") > 8
    assert with_widgets.count("run", "comm_close") >= 5


def test_each_run_has_an_output_of_its_own(executed):
    """In the cell that runs it, also where the callback was made in another."""
    (output,) = executed.outputs("run again")
    assert "finished" in output["data"]["text/plain"]
    assert len(executed.outputs("run")) == 1


def test_an_asynchronous_stream_shows_itself(executed):
    """`targets=["notebook"]`, beside a loop of one's own."""
    kinds = {output.output_type: output for output in executed.outputs("astream")}
    assert sorted(kinds) == ["display_data", "stream"]
    assert kinds["stream"].text == "final\n"


# The example


def test_the_example_runs_and_shows_its_pictures(tmp_path):
    """From nothing, with the demo model; each run has one output that ends as a picture."""
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": tmp_path}}
    ).execute()
    runs = [
        cell for cell in notebook.cells if '"notebook"' in cell.source or "watch(" in cell.source
    ]
    pictures = [
        sum("<img" in output.get("data", {}).get("text/html", "") for output in cell.outputs)
        for cell in runs
        if cell.cell_type == "code"
    ]
    assert pictures == [1, 1, 1, 1]


def test_the_example_is_kept_without_outputs():
    """They would be in the way of every change."""
    cells = [
        cell for cell in nbformat.read(EXAMPLE, as_version=4).cells if cell.cell_type == "code"
    ]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


# The stop button: a kernel, and a page that clicks


class Page:
    """What a browser does: it executes cells, sees the widgets, and clicks."""

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(cwd=folder, kernel_name="python3")
        self.buttons = {}  # by their comm's id, whether each can be clicked
        self.printed = ""

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def execute(self, code, on_enabled=None, seconds=90):
        """To the end of the cell; `on_enabled` is called once a button can be clicked."""
        self.buttons, self.printed, was_called = {}, "", False
        cell = self.client.execute(code)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            message = self.client.get_iopub_msg(timeout=seconds)
            self._look_at(message["msg_type"], message["content"])
            if on_enabled is not None and not was_called and True in self.buttons.values():
                was_called = True
                on_enabled()
            is_mine = message["parent_header"].get("msg_id") == cell
            if is_mine and message["content"].get("execution_state") == "idle":
                return self.printed
        raise AssertionError(self.printed)

    def _look_at(self, kind, content):
        state = content.get("data", {}).get("state", {}) if kind.startswith("comm") else {}
        if state.get("_model_name") == "ButtonModel" or (
            content.get("comm_id") in self.buttons and "disabled" in state
        ):
            self.buttons[content["comm_id"]] = not state["disabled"]
        self.printed += content.get("text", "") + "\n".join(content.get("traceback", ()))

    def click(self):
        """At the only button."""
        (comm_id,) = self.buttons
        data = {"method": "custom", "content": {"event": "click"}}
        message = self.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
        self.client.shell_channel.send(message)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = Page(tmp_path_factory.mktemp("page"))
    try:
        made.execute(BEGIN)
        yield made
    finally:
        made.close()


def test_the_stop_button_stops_a_run_that_is_waited_for(page):
    """The cell goes on with what was there."""
    code = """
    taken.clear()
    result = await notebook.watch(pipe, **{**call, "num_inference_steps": 100})
    print("steps", len(taken), result.images[0].size)
    """
    printed = page.execute(code.replace("\n    ", "\n"), on_enabled=page.click)
    steps = int(re.search(r"steps (\d+) \(128, 128\)", printed)[1])
    assert steps < 50


def test_it_cannot_be_clicked_while_a_cell_blocks_the_kernel(page):
    """A click would only come when all is over."""
    seen = []
    code = "for frame in stream(pipe, **call, targets=['notebook']): pass"
    page.execute(code, on_enabled=lambda: seen.append(page.buttons))
    assert list(page.buttons.values()) == [False]
    assert not seen


def test_the_interrupt_ends_a_run_that_blocks_the_kernel(page):
    """And the kernel can be used again."""
    code = """
    taken.clear()
    try:
        for frame in stream(pipe, **{**call, "num_inference_steps": 100}, targets=["notebook"]):
            print("frame", flush=True)
            if frame.step_index == 0:
                __import__("os").kill(__import__("os").getpid(), 2)
    except KeyboardInterrupt:
        print("interrupted", len(taken))
    """
    printed = page.execute(code.replace("\n    ", "\n"))
    assert int(re.search(r"interrupted (\d+)", printed)[1]) < 50


# Wrong use


def test_outside_of_a_notebook_it_says_so():
    """At construction, before the run."""
    with pytest.raises(
        RuntimeError, match="notebook must be a target in a notebook, got a program"
    ):
        writer_for("notebook")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    """As every target does."""
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sd-progress\[notebook\]"'):
        writer_for("notebook")


def test_a_folder_of_that_name_ends_in_a_slash():
    """A `Path` is a folder, too."""
    assert isinstance(writer_for("notebook/"), PngFolderWriter)
    assert isinstance(writer_for(Path("notebook")), PngFolderWriter)


@pytest.mark.parametrize("side_px", [8, 10_000, "wide"])
def test_a_wrong_size_raises(side_px):
    """With what is expected."""
    with pytest.raises(ValueError, match="side_px must be an int from 16 to 8192"):
        NotebookWriter(side_px=side_px)
