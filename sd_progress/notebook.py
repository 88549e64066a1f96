"""Owns the live view in a notebook: one output of the running cell, updated in place.

With `ipywidgets` it has a stop button. Its clicks reach the kernel only while that listens: not
while a cell blocks it (`pipe(...)`, `for frame in stream(...)`), where the notebook's own interrupt
does the same, but while a cell waits (`await watch(...)`, `async for frame in astream(...)`), and
between cells. The button can be clicked only then. So it is with ipykernel 7.4; version 6 listens
between cells only, so that a run must be a task to be stopped: `asyncio.create_task(watch(...))`.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import importlib.util
import math
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, cast

from ._words import clock_time, progress_words
from .frame import Frame

if TYPE_CHECKING:
    from .streaming import Phase
    from .tap import Pipeline
    from .writers import Target

__all__ = ["NotebookWriter", "watch"]

_MIN_INTERVAL_S: Final = 0.1  # between two pictures, each of which the browser is sent


async def watch(
    pipe: Pipeline,
    *,
    targets: Sequence[Target] = (),
    on_phase: Callable[[Phase], object] | None = None,
    **options: object,
) -> object:
    """Call a pipeline and show it while it runs, in a cell that waits: the stop button works.

    Args:
        pipe: the diffusers pipeline to call.
        targets: where frames go besides.
        on_phase: is called with each phase, which is shown, too.
        **options: what the pipeline is called with, and all else that `sd_progress.astream` takes.

    Returns:
        What the pipeline returned; None where it was stopped and cannot finish early.

    Raises:
        RuntimeError: this is no notebook.
        ModuleNotFoundError: the `notebook` extra is not installed.

    Example:
        `image = (await watch(pipe, prompt="a red fox")).images[0]`
    """
    from .streaming import astream

    writer = NotebookWriter()

    def told(phase: Phase) -> None:
        writer.enter(phase)
        if on_phase is not None:
            on_phase(phase)

    begin = cast("Callable[..., AsyncGenerator[Frame, None]]", astream)
    frames = begin(pipe, targets=[writer, *targets], on_phase=told, **options)
    output: object = None
    with contextlib.closing(writer):
        async with contextlib.aclosing(frames):
            async for frame in frames:
                output = frame.output
    return output


class NotebookWriter:
    """Shows the newest frame in the output of the running cell, in place; the last one stays.

    The output is HTML; with ipywidgets, a picture, a progress bar, a line of words and a stop
    button, which make way for the HTML when the run is over, so that a saved notebook has the last
    picture. Every run has an output of its own.

    Attributes:
        newest: 1, for frames that come while another is sent are left out.
    """

    newest = 1

    def __init__(self, *, side_px: int = 384, clock: Callable[[], float] = time.monotonic) -> None:
        """Find the notebook; nothing is shown before the first `write`.

        Args:
            side_px: longer side of the picture as it is shown, whatever size it has.
            clock: seconds, monotonic.

        Raises:
            ValueError: `side_px` is out of its range.
            RuntimeError: this is no notebook.
            ModuleNotFoundError: the `notebook` extra is not installed.
        """
        if not isinstance(side_px, int) or not 16 <= side_px <= 8192:
            raise ValueError(f"side_px must be an int from 16 to 8192, got {side_px!r}; pass one")
        _check_notebook()
        self._side_px, self._clock = side_px, clock
        self._lock = threading.Lock()
        self._view: _View | None = None
        self._frame: Frame | None = None
        self._rests_until_s = -math.inf
        self._loop = _loop()

    def enter(self, phase: Phase) -> None:
        """Show that another phase of the run began; from any thread."""
        words = f"{phase.name} \u2026"
        if phase.eta_s is not None:
            words += f"  {clock_time(phase.eta_s)} the last time"
        with self._lock:
            if self._view is not None or phase.name == "preparing":
                self._opened().say(words)

    def write(self, frame: Frame) -> None:
        """Show the frame, unless another was shown just now."""
        with self._lock:
            self._frame = frame
            now_s = self._clock()
            if now_s >= self._rests_until_s:
                self._opened().show(frame)
                self._rests_until_s = now_s + _MIN_INTERVAL_S
            self._have_told_when_listening(self._view)

    def close(self) -> None:
        """Leave the last frame as the run's output."""
        with self._lock:
            view, self._view = self._view, None
            frame, self._frame = self._frame, None
            self._rests_until_s = -math.inf
            if view is not None:
                view.end(frame)

    def _opened(self) -> _View:
        if self._view is None:
            has_widgets = importlib.util.find_spec("ipywidgets") is not None
            self._view = (_WidgetView if has_widgets else _HtmlView)(self._side_px)
        return self._view

    def _have_told_when_listening(self, view: _View | None) -> None:
        if view is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(view.listen)


class _View(Protocol):
    """One output."""

    def say(self, words: str) -> None:
        """Below the picture."""

    def show(self, frame: Frame) -> None:
        """The picture, and how far it is."""

    def listen(self) -> None:
        """The kernel takes clicks."""

    def end(self, frame: Frame | None) -> None:
        """What stays."""


class _HtmlView:
    """An output that is replaced as a whole."""

    def __init__(self, side_px: int) -> None:
        self._side_px = side_px
        self._id = uuid.uuid4().hex
        self._is_there = False
        self._frame: Frame | None = None

    def say(self, words: str) -> None:
        self._put(words)

    def show(self, frame: Frame) -> None:
        self._frame = frame
        self._put(_line(frame))

    def listen(self) -> None:
        """There is nothing to click at."""

    def end(self, frame: Frame | None) -> None:
        self._frame = frame
        self._put("" if frame is None else _line(frame))

    def _put(self, words: str) -> None:
        bundle = {"text/plain": words, "text/html": _html(self._frame, words, self._side_px)}
        self.put(bundle, is_raw=True)

    def put(self, content: object, *, is_raw: bool = False) -> None:
        """Make this the output."""
        from IPython.display import display

        display(  # type: ignore[no-untyped-call]
            content, raw=is_raw, display_id=self._id, update=self._is_there
        )
        self._is_there = True


class _WidgetView:
    """The same, of widgets until the end."""

    def __init__(self, side_px: int) -> None:
        import ipywidgets

        self._side_px = side_px
        self._frame: Frame | None = None
        self._picture = ipywidgets.Image(format="png", width=side_px, layout={"display": "none"})
        self._bar = ipywidgets.FloatProgress(max=1.0, layout={"width": f"{side_px - 80}px"})
        self._words = ipywidgets.Label()
        self._button = ipywidgets.Button(
            description="stop",
            disabled=True,
            tooltip="keep what is there; while a cell blocks the kernel, interrupt that instead",
            layout={"width": "72px"},
        )
        self._button.on_click(self._stop)
        row = ipywidgets.HBox([self._bar, self._button])
        self._box = ipywidgets.VBox([self._picture, row, self._words])
        self._output = _HtmlView(side_px)
        self._output.put(self._box)

    def say(self, words: str) -> None:
        self._words.value = words

    def show(self, frame: Frame) -> None:
        self._frame = frame
        width, height = _shown_size(frame, self._side_px)
        self._picture.width, self._picture.height = str(width), str(height)
        self._picture.value = frame.to_bytes()
        self._picture.layout.display = None
        self._bar.value = frame.progress
        self._words.value = _line(frame)

    def listen(self) -> None:
        self._button.disabled = False

    def end(self, frame: Frame | None) -> None:
        self._output.end(frame)
        for widget in (self._box, self._picture, self._bar, self._words, self._button):
            widget.close()

    def _stop(self, button: object) -> None:
        self._words.value = "stopping \u2026"
        if self._frame is not None:
            self._frame.stop()


def _html(frame: Frame | None, words: str, side_px: int) -> str:
    words = html.escape(words)
    if frame is None:
        return f"<div>{words}</div>"
    width, height = _shown_size(frame, side_px)
    picture = f'<img src="{frame.to_data_url()}" width="{width}" height="{height}">'
    bar = f'<progress value="{frame.progress:.3f}" style="width: {side_px}px"></progress>'
    return f"<div>{picture}</div><div>{bar}</div><div>{words}</div>"


def _shown_size(frame: Frame, side_px: int) -> tuple[int, int]:
    """As large as was asked for, however small or large the preview is."""
    width, height = frame.image.size
    longer = max(width, height)
    return round(width / longer * side_px), round(height / longer * side_px)


def _line(frame: Frame) -> str:
    return " \u00b7 ".join(progress_words(frame))


def _check_notebook() -> None:
    if importlib.util.find_spec("IPython") is None:
        expected = "IPython must be installed to show previews in a notebook"
        raise ModuleNotFoundError(f'{expected}, got none; pip install "sd-progress[notebook]"')
    from IPython.core.getipython import get_ipython

    if not hasattr(get_ipython(), "kernel"):
        raise RuntimeError(
            "notebook must be a target in a notebook, got a program without a Jupyter kernel; "
            "pass 'terminal' there, or 'notebook/' for a folder of that name"
        )


def _loop() -> asyncio.AbstractEventLoop | None:
    """The kernel's, which runs when it is idle or a cell waits."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # made in another thread
        return None
