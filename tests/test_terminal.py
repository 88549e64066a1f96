"""The live view in the terminal: in real pseudo-terminals, read by a terminal emulator."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import numpy as np
import pyte
import pytest
from PIL import Image, ImageGrab

from sd_progress import PngFolderWriter, writer_for
from sd_progress.terminal import TerminalWriter

HERE = Path(__file__).parent
BLUE, RED = "0000ff", "ff0000"

# What the scripts below begin with: frames that are red above and blue below.
MADE = """
import sys, time
import numpy as np
from sd_progress.frame import Frame
from sd_progress.terminal import TerminalWriter

picture = np.zeros((1, 16, 16, 3), np.uint8)
picture[:, :8, :, 0] = picture[:, 8:, :, 2] = 255

def frame(step, source="denoised"):
    return Frame(picture, step - 1, 8, None, None, source, "linear:sd1", 1.0, 2.0)

"""


class Terminal:
    """A terminal of so many rows and columns, in which a script runs.

    Args:
        told: what the script is told of them, where that is something else.
        answers: whether it answers when it is asked what it can.
        stdin: other than the terminal.
    """

    def __init__(
        self, script, *, rows=30, columns=60, told=None, answers=True, stdin=None, begin="", env=()
    ):
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.bytes = b""
        self._fd, theirs = pty.openpty()
        if answers:
            self.screen.write_process_input = lambda text: os.write(self._fd, text.encode())
        self._set_size(*(told or (rows, columns)))
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("TMUX", "XTERM_VERSION")},
            **{"TERM": "xterm-256color", "COLORTERM": "truecolor", "HF_HUB_OFFLINE": "1"},
            **dict(env),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", begin + "import os\n" + textwrap.dedent(script)],
            stdin=theirs if stdin is None else stdin,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.process.stdin is not None:
            self.process.stdin.close()
        os.close(self._fd)

    def resize(self, rows, columns):
        """As a user does with a window; the emulator keeps the lower rows, as most do."""
        self.screen.resize(rows, columns)
        self._set_size(rows, columns)

    def _set_size(self, rows, columns):
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, text, seconds=60):
        """Read until a text was written; returns what is on the screen then, one string a row."""
        end_s = time.monotonic() + seconds
        while text.encode() not in self.bytes:
            assert time.monotonic() < end_s, self.display
            assert self._read(), self.display
        return self.display

    def to_the_end(self, seconds=60):
        """Read until the script has ended well."""
        end_s = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < end_s, self.display
        assert self.process.wait(10) == 0, self.display
        return self.display

    def _read(self):
        if select.select([self._fd], [], [], 0.2)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # of Linux, where the other side is closed
                return False
            self.bytes += data
            # a question in kitty's protocol, which all but this emulator know to leave alone
            self._stream.feed(re.sub(rb"\x1b_G.*?\x1b\\", b"", data, flags=re.S))
            return bool(data)
        return self.process.poll() is None

    @property
    def display(self):
        return [row.rstrip() for row in self.screen.display]

    @property
    def picture(self):
        """The rows that show half-blocks, counted from 0, with the colours of their first."""
        blocks = [self.screen.buffer[row][0] for row in range(self.screen.lines)]
        return {n: (cell.fg, cell.bg) for n, cell in enumerate(blocks) if cell.data == "\u2580"}


@contextlib.contextmanager
def running(script, **options):
    with Terminal(script, begin=MADE, **options) as terminal:
        yield terminal


ONE_RUN = """
    now_s = [0.0]
    writer = TerminalWriter(clock=lambda: now_s[0], **{options})
    print("before", flush=True)
    for step in range(1, 9):
        writer.write(frame(step))
        print("printed", step, flush=True)
        now_s[0] += {seconds}
        time.sleep({pause})
    writer.close()
    print("after", flush=True)
"""


def one_run(pause=0.0, seconds=1.0, **options):
    return ONE_RUN.format(pause=pause, seconds=seconds, options=options)


# In place


def test_previews_stay_in_place_while_the_run_prints():
    """The picture is in the last rows, the line of progress below it, and all else above."""
    with running(one_run(pause=0.02), rows=24) as terminal:
        display = terminal.until("printed 8")
        picture = terminal.picture
    assert display[:8] == [*[f"printed {step}" for step in range(2, 9)], ""]
    assert list(picture) == list(range(8, 23))
    assert display[23].startswith("step 8/8")


def test_the_last_picture_stays_among_what_was_printed():
    """Once, whole, and behind it the terminal is as it was: it scrolls, and text goes on."""
    with running(one_run(), rows=24) as terminal:
        display = terminal.to_the_end()
        rows = list(terminal.picture)
        assert terminal.screen.margins is None
    assert display[:6] == [f"printed {step}" for step in range(3, 9)]
    assert rows == list(range(6, 21))
    assert display[21].split() == [
        "step",
        "8/8",
        "\u2501" * 10,
        "100%",
        "0:01<0:02",
        "denoised",
        "linear:sd1",
    ]
    assert display[22:] == ["after", ""]


def test_the_picture_is_the_frame_s():
    """Red above and blue below, two pixels for each character."""
    with running(one_run()) as terminal:
        terminal.to_the_end()
        colours = list(terminal.picture.values())
    assert len(colours) == 19
    assert set(colours[:9]) == {(RED, RED)}
    assert set(colours[-9:]) == {(BLUE, BLUE)}


def test_a_line_that_was_not_ended_is_kept():
    """The last picture begins in a row of its own, and the cursor is put back in between."""
    script = """
        writer = TerminalWriter()
        print("half a line", end="", flush=True)
        writer.write(frame(1))
        print(", the other half", end="", flush=True)
        writer.close()
    """
    with running(script) as terminal:
        display = terminal.to_the_end()
    assert display[0] == "half a line, the other half"
    assert min(terminal.picture) == 1


def test_frames_that_come_too_fast_are_left_out():
    """The next is drawn after a tenth of a second, or four times the time that one took."""
    with running(one_run(seconds=0.06)) as terminal:
        terminal.to_the_end()
    drawn = re.findall(rb"step (\d)/8", terminal.bytes)
    assert drawn == [b"1", b"3", b"5", b"7", b"8"]


def test_a_second_run_begins_anew():
    """One writer serves any number of runs, one after the other."""
    script = """
        writer = TerminalWriter(max_rows=8)
        for name in ("first", "second"):
            writer.write(frame(1))
            print(name)
            writer.close()
    """
    with running(script, rows=50) as terminal:
        display = terminal.to_the_end()
    assert [row for row in display if row.isalpha()] == ["first", "second"]
    assert len([row for row in display if row.startswith("step")]) == 2


# Terminals of all kinds


def test_nothing_is_written_into_a_pipe():
    """What goes there is somebody's data."""
    words = [sys.executable, "-c", MADE + textwrap.dedent(one_run())]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    printed = ["before", *[f"printed {step}" for step in range(1, 9)], "after"]
    assert (result.stdout.splitlines(), result.stderr) == (printed, "")


def test_nothing_is_written_where_print_does_not_go():
    """As in a notebook, whose process has its terminal somewhere else."""
    script = """
        real, sys.stdout = sys.stdout, open(os.devnull, "w")
        writer = TerminalWriter()
        writer.write(frame(1))
        writer.close()
        real.write("end")
    """
    with running(script) as terminal:
        assert terminal.to_the_end()[0] == "end"
    assert terminal.bytes == b"end"


def test_a_terminal_that_does_not_answer_holds_up_nothing():
    """It is asked, and then taken for one that draws characters only."""
    with running(one_run(), answers=False) as terminal:
        terminal.to_the_end(seconds=30)
    assert b"\x1b[c" in terminal.bytes
    assert len(terminal.picture) == 19


def test_a_terminal_that_draws_sixels_gets_them():
    """One graphic for each frame, in as many rows as the characters had."""
    env = {"TERM": "mlterm"}
    with running(one_run(protocol="sixel"), env=env) as terminal:
        terminal.until("printed 8")
    first = terminal.bytes[: terminal.bytes.index(b"printed 1")]
    assert re.search(rb'\x1b\[11;1H\x1bP[0-9;]*q"1;1;380;380#', first)
    assert first.count(b"\x1bP") == 1
    assert b"\xe2\x96\x80" not in first


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, subprocess.PIPE], ids=["null", "pipe"])
def test_nobody_is_asked_where_no_answer_would_come(stdin):
    """A loop over lines of a file keeps its file; pictures are drawn in characters."""
    with running(one_run(), stdin=stdin) as terminal:
        terminal.to_the_end()
    assert b"\x1b[c" not in terminal.bytes
    assert len(terminal.picture) == 19


def test_in_the_background_nobody_is_asked():
    """To change the terminal from there would stop the process."""
    words = MADE + textwrap.dedent(one_run())
    script = f"""
        import subprocess, sys
        subprocess.run([sys.executable, "-c", {words!r}], preexec_fn=os.setpgrp, check=True)
    """
    with Terminal(script) as terminal:
        terminal.to_the_end()
    assert b"\x1b[c" not in terminal.bytes
    assert len(terminal.picture) == 19


def test_a_terminal_that_does_not_know_its_size():
    """Is taken for one of 80 columns and 24 rows, as everywhere."""
    with running(one_run(), rows=24, columns=80, told=(0, 0)) as terminal:
        terminal.to_the_end()
    assert len(terminal.picture) == 15


@pytest.mark.parametrize("rows", [3, 6, 7])
def test_in_a_short_terminal_there_is_the_line_only(rows):
    """What cannot be recognised is not drawn."""
    with running(one_run(pause=0.02), rows=rows) as terminal:
        display = terminal.until("printed 8")
    assert not terminal.picture
    assert display[-1].startswith("step 8/8")


def test_one_that_is_too_small_is_left_alone():
    """Until the end, when the line is printed."""
    with running(one_run(), rows=2, columns=10) as terminal:
        display = terminal.to_the_end()
    assert terminal.bytes.count(b"\x1b7") == 0
    assert display[0] == "after"


@pytest.mark.parametrize("columns", [12, 20, 40])
def test_in_a_narrow_terminal_nothing_is_wider(columns):
    """The picture and the line fit, so no row is broken in two."""
    with running(one_run(pause=0.02), columns=columns) as terminal:
        display = terminal.until("printed 8")
    assert display[-1].startswith("step 8/8")
    assert max(len(row) for row in display) < columns
    assert len(terminal.picture) >= 6


def test_a_window_that_changes_its_size():
    """The view moves to the new last rows, and leaves nothing where it was."""
    script = """
        writer = TerminalWriter(clock=iter([0, 0, 1, 1]).__next__)
        writer.write(frame(1))
        print("printed 1", flush=True)
        sys.stdin.readline()
        writer.write(frame(2))
        print("printed 2", flush=True)
        sys.stdin.readline()
        writer.close()
    """
    with running(script, rows=24) as terminal:
        terminal.until("printed 1")
        terminal.resize(rows=30, columns=50)
        os.write(terminal._fd, b"\n")
        terminal.until("printed 2")
        assert list(terminal.picture) == list(range(10, 29))
        os.write(terminal._fd, b"\n")
        display = terminal.to_the_end()
    assert len(terminal.picture) == 19
    assert [row for row in display if row.startswith("step")] == [
        row for row in display if "2/8" in row
    ]


# The end


def test_a_program_that_forgets_to_close_gives_the_rows_back():
    """At its exit, without the picture."""
    script = """
        print("before")
        writer = TerminalWriter()
        writer.write(frame(1))
        sys.exit()
    """
    with running(script) as terminal:
        display = terminal.to_the_end()
        assert terminal.screen.margins is None
    assert [row for row in display if row] == ["before"]


PIPELINE = """
import os, sys, time
from diffusers import DiffusionPipeline
from sd_progress import PreviewCallback, demo_model_path
from sd_progress.terminal import TerminalWriter
pipe = DiffusionPipeline.from_pretrained(demo_model_path())
pipe.unet.register_forward_pre_hook(lambda *_: time.sleep({pause}))
preview = PreviewCallback(pipe, TerminalWriter(protocol="{protocol}"), final=True)
try:
    with preview:
        picture = pipe(
            "the sea at sunset", num_inference_steps={steps}, callback_on_step_end=preview
        ).images[0]
    if {hold}:
        picture.save("part.png")
        os.rename("part.png", "final.png")
except KeyboardInterrupt:
    print("interrupted")
print("done", flush=True)
time.sleep({hold})
"""


def pipeline(steps=4, pause=0.0, protocol="auto", hold=0.0):
    return PIPELINE.format(steps=steps, pause=pause, protocol=protocol, hold=hold)


def test_a_pipeline_with_its_own_progress_bar():
    """Both are whole in the end: tqdm's bar once, and below it the finished picture."""
    with Terminal(pipeline(), rows=24, columns=80) as terminal:
        display = terminal.to_the_end()
        rows = list(terminal.picture)
    bar = next(n for n, row in enumerate(display) if "4/4 [" in row)
    assert rows == list(range(bar + 1, bar + 16))
    assert display[rows[-1] + 1].startswith("finished in 0:")
    assert display[rows[-1] + 2 :][:1] == ["done"]


def test_the_command_shows_its_run(tmp_path):
    """Unless it is told not to; its own line of progress is the only one."""
    script = f"""
        from sd_progress.cli import main
        words = ["demo", "--steps", "3", "--out", {str(tmp_path)!r}]
        main(words)
        main([*words, "--no-preview_terminal"])
    """
    with Terminal(script, rows=40, columns=100) as terminal:
        display = terminal.to_the_end()
    assert len(terminal.picture) == 24
    assert terminal.bytes.count(b"finished in") >= 1
    assert len([row for row in display if "3/3 [" in row]) == 1  # tqdm's, of the second run


def test_ctrl_c_leaves_the_terminal_in_order():
    """With the last preview, and able to scroll."""
    with Terminal(pipeline(steps=50, pause=0.3), rows=24, columns=80) as terminal:
        terminal.until("step  2/50")
        os.killpg(terminal.process.pid, signal.SIGINT)
        display = terminal.to_the_end()
        assert terminal.screen.margins is None
    assert len(terminal.picture) == 15
    assert display[max(terminal.picture) + 2 :][:2] == ["interrupted", "done"]


# Names


def test_the_name_is_the_view_and_a_folder_of_that_name_ends_in_a_slash(tmp_path):
    """A `Path` is a folder, too."""
    assert isinstance(writer_for("terminal"), TerminalWriter)
    assert isinstance(writer_for("terminal/"), PngFolderWriter)
    assert isinstance(writer_for(Path("terminal")), PngFolderWriter)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    """At construction, before the run."""
    monkeypatch.setitem(sys.modules, "textual_image", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sd-progress\[terminal\]"'):
        writer_for("terminal")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_rows": 3}, "max_rows must be a whole number"), ({"protocol": "gif"}, "protocol must")],
)
def test_wrong_options_raise(options, message):
    """With what is expected."""
    with pytest.raises(ValueError, match=message):
        TerminalWriter(**options)


# Seen


@pytest.fixture
def screen():
    """The name of an X display that nobody sees."""
    missing = {name for name in ("xterm", "Xvfb") if shutil.which(name) is None}
    if missing & set(os.environ.get("SD_PROGRESS_REQUIRE", "").split(",")):
        pytest.fail(f"{', '.join(missing)} must be installed")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    words = ["Xvfb", "-displayfd", "1", "-screen", "0", "740x500x24", "-nolisten", "tcp"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            yield f":{int(server.stdout.readline())}"
        finally:
            server.terminate()


def test_in_a_real_terminal_it_looks_like_the_picture(screen, tmp_path):
    """What xterm shows of a finished run, against the pipeline's own picture."""
    env = {**os.environ, "DISPLAY": screen, "HF_HUB_OFFLINE": "1"}
    options = ["-ti", "vt340", "-geometry", "100x30+0+0", "-xrm", "*numColorRegisters: 256"]
    words = ["xterm", *options, "-e", sys.executable, "-c", pipeline(protocol="sixel", hold=60)]
    with subprocess.Popen(words, cwd=tmp_path, env=env) as process:
        try:
            wait_for(tmp_path / "final.png")
            made = small(Image.open(tmp_path / "final.png"))
            end_s = time.monotonic() + 20  # for xterm to paint
            while np.abs(small(coloured_part(ImageGrab.grab(xdisplay=screen))) - made).mean() > 12:
                assert time.monotonic() < end_s
                time.sleep(0.2)
        finally:
            process.terminate()


def small(image):
    """Comparable."""
    return np.asarray(image.resize((64, 64)), int)


def wait_for(path, seconds=60):
    end_s = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def coloured_part(image):
    """What is neither black nor white, nor grey, as text is."""
    pixels = np.asarray(image.convert("RGB"), int)
    rows, columns = np.nonzero(np.ptp(pixels, axis=2) > 20)
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return image.convert("RGB").crop(box)
