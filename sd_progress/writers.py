"""Owns where frames go: PNG folders, animations, contact sheets, queues and callables.

Views that need an extra are in modules of their own, and are found here by their names.

A writer is any object with `write(frame)` and `close()`. It is called from one thread, in order.
`close()` ends a run and completes what is open; a later `write()` begins the next run, in new
files. `close()` twice, or with nothing written, does nothing. Nothing touches the file system
before the first `write()`, no file that exists is ever overwritten, and files appear whole.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import io
import os
import queue as queues
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

from PIL import Image

from ._animation import FORMATS, Animation, Timing, png_bytes
from ._files import claim_folder, move_over, publish, temporary_path, write_temporary
from ._resize import Size, resized
from ._sheet import Cell, sheet, with_longer_side
from .frame import Frame

__all__ = [
    "AnimationVideo",
    "AnimationWriter",
    "CallableWriter",
    "ContactSheetWriter",
    "FolderVideo",
    "FrameQueue",
    "PngFolderWriter",
    "QueueWriter",
    "Resample",
    "Target",
    "Writer",
    "writer_for",
]

Resample = Literal["nearest", "smooth"]
FolderVideo = Literal["sheet", "frames"]
AnimationVideo = Literal["middle", "clip", "mosaic"]


@runtime_checkable
class Writer(Protocol):
    """Where frames go. Any object with these two methods is one.

    It is called in a thread of its own, and gets every frame, however slow it is. One with an
    attribute `newest`, a whole number, gets the newest so many frames instead, and loses older
    ones where it cannot keep up; a live view has `newest = 1`.
    """

    def write(self, frame: Frame) -> None:
        """Take one frame of the run; the first one begins it."""

    def close(self) -> None:
        """End the run and complete what is open; a later `write` begins the next run."""


@runtime_checkable
class FrameQueue(Protocol):
    """What frames need of a queue; all of Python's own have it."""

    def put_nowait(self, item: Frame, /) -> object:
        """Take one frame at once, or raise."""


Target = str | os.PathLike[str] | Writer | FrameQueue | Callable[[Frame], object]


def writer_for(target: Target) -> Writer:
    """The writer for a path, a view, a queue or a function; a writer is returned as it is.

    `"terminal"` and `"notebook"` are live views. A folder of that name is `"terminal/"`. Any other
    string is a path, as is every `pathlib.Path`.

    A path is an animation where its suffix is one of `.gif`, `.webp`, `.png`, `.apng`, `.mp4`
    (`.png` is an APNG), and a folder where it exists as one, ends in a separator, has no suffix,
    or has one that is no file type: `runs/v1.5` and `runs.2` are folders, because file types
    begin with a letter.

    A URL like `redis://host/0?key=run:42` (`rediss://`, `unix://`) is a Redis Stream, which keeps
    the newest frames; `sd_progress.fleet.RedisWriter` has options.

    Args:
        target: a path; a view; a URL; a queue (`queue.Queue`, `asyncio.Queue`,
            `multiprocessing.Queue` or anything with `put_nowait`); a function of one `Frame`; or
            a `Writer`, which may also be callable.

    Raises:
        ValueError: a path with another suffix, or an asyncio queue outside its event loop.
        TypeError: `target` is none of these.
        ModuleNotFoundError: `.mp4`, a view or a URL without its extra.
        RuntimeError: `"notebook"` outside of one.
    """
    if isinstance(target, str) and target.startswith(_REDIS_URLS):
        from .redis_writer import writer_at

        return writer_at(target)
    if isinstance(target, str) and target in _VIEWS:
        view = getattr(importlib.import_module(f".{target}", __package__), _VIEWS[target])
        return cast(Writer, view())
    if isinstance(target, (str, os.PathLike)):
        return _writer_for_path(os.fspath(target))
    if isinstance(target, (type, io.IOBase)):
        raise TypeError(_target_message(target, "pass an instance, or the path of the file"))
    if isinstance(target, Writer):
        return target
    if isinstance(target, FrameQueue):
        return QueueWriter(target)
    if callable(target):
        return CallableWriter(target)
    raise TypeError(_target_message(target, "wrap it in a class with write(frame) and close()"))


class PngFolderWriter:
    """One PNG per frame: `step_001.png` is the picture after the first step.

    The initial noise is `step_000.png`, the pipeline's finished picture `final.png`. Numbers have
    three digits, or as many as the run's last step. Each file carries `Frame.metadata()` as text
    chunks. A folder that holds an earlier run, or that another writer is using, is left alone:
    the run goes to `steps-2`, `steps-3` and so on. (While it runs, a lock file holds the folder;
    that of a killed process only means that the next run takes the next name.)

    A step of a video is a contact sheet (`Frame.image`), or a folder of its frames, which appears
    with all of them at once: `step_001/frame_000.png`, ..., `final/frame_000.png`. These carry a
    `frame_index` too, which counts the step's own frames from 0.

    Attributes:
        path: the folder of the current or last run; None before the first.
    """

    path: Path | None

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        min_side_px: int | None = None,
        resample: Resample = "nearest",
        video: FolderVideo = "sheet",
    ) -> None:
        """Choose the folder; it is made by the first `write`.

        Args:
            folder: where to write; its parents are made too.
            min_side_px: enlarge pictures until the shorter side has this many pixels (a whole
                factor with `"nearest"`); None keeps the exact pixels.
            resample: `"nearest"` keeps latent pixels visible, `"smooth"` is bicubic.
            video: `"sheet"` is one contact sheet for each step of a video, `"frames"` one folder
                of single frames; nothing changes for images.

        Raises:
            ValueError: an option is out of range.
        """
        self._folder = _nameable(folder, "folder")
        self._min_side_px = _checked_side(min_side_px)
        self._resample = _checked_choice("resample", resample, Resample)
        self._video = _checked_choice("video", video, FolderVideo)
        self._lock: Path | None = None
        self.path = None

    def write(self, frame: Frame) -> None:
        """Write one PNG, or one folder of them, whole or not at all.

        Raises:
            OSError: the folder cannot be made, the disk is full, or there already is a folder of
                single frames for this step.
        """
        if self.path is None or self._lock is None:
            self.path, self._lock = claim_folder(self._folder)
        if frame.is_video and self._video == "frames":
            self._write_clip(self.path / _step_name(frame), frame)
        else:
            temporary = write_temporary(self.path, self._png(frame.image, frame.metadata()))
            move_over(temporary, self.path / f"{_step_name(frame)}.png")

    def _write_clip(self, folder: Path, frame: Frame) -> None:
        temporary = temporary_path(folder.parent)
        clip, text = frame.clip(), frame.metadata()
        digits = max(3, len(str(len(clip) - 1)))
        try:
            temporary.mkdir(parents=True)
            for index, picture in enumerate(clip):
                png = self._png(picture, {**text, "frame_index": str(index)})
                (temporary / f"frame_{index:0{digits}}.png").write_bytes(png)
            temporary.rename(folder)  # refused where one is there that has something in it
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _png(self, picture: Image.Image, text: dict[str, str]) -> bytes:
        size = _enlarged(picture.size, self._min_side_px, self._resample)
        return png_bytes(_resized(picture, size, self._resample), text)

    def close(self) -> None:
        """End the run: the next `write` takes another folder."""
        if self._lock is not None:
            self._lock.unlink(missing_ok=True)
            self._lock = None


class AnimationWriter:
    """One animated file per run: GIF, WebP, APNG (`.png`) or MP4, by suffix.

    A GIF, WebP or APNG is complete and playable on disk after every frame, also when the process
    is killed; an MP4 appears when the run is closed, and of a killed process only its hidden
    `.sd-progress-*.tmp` stays. Frames are encoded as they come and at most one is kept, so memory
    does not grow with the run. Each frame of a GIF has 255 colours, dithered unless it is noise,
    and keeps what changes too little to be seen; WebP is lossy at quality 90. A name that
    is taken is left alone: the run goes to `denoise-2.gif`, `denoise-3.gif` and so on.

    The first frame, enlarged, is the canvas; later frames of another size are fitted into it.

    A step of a video is one frame of the animation, the middle one of its clip or a contact sheet
    (`Frame.image`; a run whose first step has fewer frames than the others shows small sheets).
    Or its whole clip plays, as many frames as it has, and after it the next step's. A clip of one
    frame is a still and stays as long as a picture does.

    Attributes:
        path: the file of the current or last run; None until it exists.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        duration_ms: int = 100,
        hold_last_ms: int = 1500,
        min_side_px: int | None = 256,
        resample: Resample = "smooth",
        loop: int = 0,
        video: AnimationVideo = "middle",
        clip_frame_ms: int | None = None,
    ) -> None:
        """Choose the file; it is made by the first `write`.

        Args:
            path: ends in `.gif`, `.webp`, `.png`, `.apng` or `.mp4`; parents are made too.
            duration_ms: how long each frame stays, 20 to 60000; a GIF counts in 10 ms.
            hold_last_ms: the same for a complete run's last frame.
            min_side_px: the canvas' shorter side is at least this many pixels (by a whole factor
                with `"nearest"`); None keeps the first frame's size. MP4 rounds up to even sides.
            resample: `"nearest"` keeps latent pixels visible, `"smooth"` is bicubic.
            loop: how often the animation plays; 0 is forever. MP4 has no such setting.
            video: what a step of a video shows: the `"middle"` frame of its clip, the whole
                `"clip"` in motion, or all its frames as a `"mosaic"`; nothing changes for images.
            clip_frame_ms: how long each frame of a clip stays, 20 to 60000, with `video="clip"`
                only; None is `duration_ms`. An MP4 that begins with a clip has one frame per
                `clip_frame_ms`; other durations are rounded to whole frames, at least one.

        Raises:
            ValueError: an unknown suffix, an option out of range, or `clip_frame_ms` without
                `video="clip"`.
            ModuleNotFoundError: `.mp4` without the `mp4` extra.
        """
        self._wanted = _nameable(path, "path")
        self._format = _animation_format(self._wanted)
        self._timing = Timing(
            _checked_range("duration_ms", duration_ms, 20, 60_000),
            _checked_range("hold_last_ms", hold_last_ms, 20, 60_000),
            _checked_range("loop", loop, 0, 65_535),
        )
        self._duration_ms = duration_ms
        self._min_side_px = _checked_side(min_side_px)
        self._resample = _checked_choice("resample", resample, Resample)
        self._video = _checked_choice("video", video, AnimationVideo)
        self._clip_frame_ms = _checked_clip_frame(clip_frame_ms, self._video) or duration_ms
        self._open: Animation | None = None
        self._canvas: Size = (0, 0)
        self._last_path: Path | None = None

    @property
    def path(self) -> Path | None:
        """The file of the current or last run; None until it exists."""
        return self._last_path if self._open is None else self._open.path

    def write(self, frame: Frame) -> None:
        """Append one frame, or with `video="clip"` one clip.

        Raises:
            OSError: the file cannot be made, or the disk is full; the file keeps what it had.
        """
        pictures = self._pictures(frame)
        if self._open is None:
            self._open = self._begun(frame, pictures[0].size)
        duration_ms = self._clip_frame_ms if len(pictures) > 1 else self._duration_ms
        for picture in pictures:
            self._open.add(_fitted(picture, self._canvas, self._resample), duration_ms)

    def _pictures(self, frame: Frame) -> list[Image.Image]:
        if self._video == "clip":
            return frame.clip()
        return [frame.middle if self._video == "middle" else frame.image]

    def _begun(self, frame: Frame, size: Size) -> Animation:
        size = _enlarged(size, self._min_side_px, self._resample)
        self._canvas = _rounded_up(size, self._format.side_multiple)
        tick_ms = self._clip_frame_ms if frame.is_video else self._duration_ms
        return self._format(self._wanted, replace(self._timing, tick_ms=tick_ms))

    def close(self) -> None:
        """End the run: the last frame is held, an MP4 is completed and appears.

        Raises:
            OSError: the disk is full.
        """
        if self._open is None:
            return
        animation = self._open
        try:
            animation.finish()
        finally:
            self._last_path, self._open = animation.path, None


class ContactSheetWriter:
    """One still picture of the run: evenly chosen frames as a strip or a grid.

    The first and the last frame are always among them; of a video's frame, the middle of its clips
    is shown. Gaps and background are transparent in a PNG, white in a JPEG. Memory is bounded by
    `max_frames`; the file appears when the run is closed. A name that is taken is left alone: the
    run goes to `sheet-2.png` and so on.

    Attributes:
        path: the last run's file; None before it exists.
    """

    path: Path | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_frames: int = 8,
        columns: int | None = None,
        max_side_px: int = 192,
        gap_px: int = 6,
        label: Callable[[Frame], str] | None = None,
    ) -> None:
        """Choose the file; it is made by `close`.

        Args:
            path: ends in `.png`, `.jpg` or `.jpeg`; parents are made too.
            max_frames: how many frames to show at most, 2 or more.
            columns: how many in a row; None is all in one row.
            max_side_px: longer side of one picture; smaller frames are enlarged to it.
            gap_px: space between pictures.
            label: a short text to put under a picture, for example
                `lambda frame: f"{frame.progress:.0%}"`; None puts none.

        Raises:
            ValueError: an unknown suffix, or an option out of range.
        """
        self._wanted = _nameable(path, "path")
        _checked_suffix(self._wanted, (".png", ".jpg", ".jpeg"))
        self._max_frames = _checked_range("max_frames", max_frames, 2, 1000)
        self._columns = (
            max_frames if columns is None else _checked_range("columns", columns, 1, 1000)
        )
        self._max_side_px = _checked_range("max_side_px", max_side_px, 1, 8192)
        self._gap_px = _checked_range("gap_px", gap_px, 0, 1024)
        self._label = label
        self._cells: _EvenSample | None = None
        self.path = None

    def write(self, frame: Frame) -> None:
        """Keep a small picture of the frame, if it is among the evenly chosen so far."""
        if self._cells is None:
            self._cells = _EvenSample(self._max_frames)
        picture = with_longer_side(frame.middle, self._max_side_px)
        self._cells.add(Cell(picture, self._label(frame) if self._label else ""))

    def close(self) -> None:
        """Write the sheet of the run.

        Raises:
            OSError: the file cannot be made, or the disk is full.
        """
        if self._cells is None:
            return
        cells, self._cells = self._cells.chosen(), None
        made = sheet(cells, self._columns, self._gap_px)
        temporary = write_temporary(self._wanted.parent, self._encoded(made))
        self.path = publish(temporary, self._wanted)

    def _encoded(self, made: Image.Image) -> bytes:
        buffer = io.BytesIO()
        if self._wanted.suffix.lower() == ".png":
            made.save(buffer, "PNG")
        else:
            white = Image.new("RGB", made.size, "white")
            white.paste(made, mask=made.getchannel("A"))
            white.save(buffer, "JPEG", quality=92, subsampling=0)
        return buffer.getvalue()


class QueueWriter:
    """Frames into a queue, without ever waiting for the consumer.

    A full queue loses its oldest frame to the newest; where it is bounded (`maxsize`), frames that
    would not stay in it anyway need not be drawn. An `asyncio.Queue` is filled in the thread
    of its event loop. Through a `multiprocessing.Queue` frames travel pickled; a process that
    fills one and ends waits until it has been read.

    Attributes:
        newest: the queue's `maxsize`; None where it is not bounded.
    """

    newest: int | None

    def __init__(self, queue: FrameQueue, *, end: object = ...) -> None:
        """Bind to a queue, and for an `asyncio.Queue` to the running event loop.

        Args:
            queue: `queue.Queue`, `asyncio.Queue`, `multiprocessing.Queue`, or anything with
                `put_nowait`.
            end: an object to put after each run's last frame, for example None, so that a
                consumer can stop. `...` puts nothing. It counts as an item: give a bounded queue
                room for two or more.

        Raises:
            TypeError: `queue` has no `put_nowait`.
            ValueError: an `asyncio.Queue` where no event loop is running.
        """
        if not isinstance(queue, FrameQueue):
            expected = "queue must be an object with put_nowait"
            raise TypeError(f"{expected}, got {type(queue).__name__}; pass a queue.Queue")
        maxsize = getattr(queue, "maxsize", 0)
        self.newest = maxsize if isinstance(maxsize, int) and maxsize > 0 else None
        self._end = end
        self._wrote = False
        self._feeder = _LoopFeeder(queue) if isinstance(queue, asyncio.Queue) else _Feeder(queue)

    @property
    def dropped(self) -> int:
        """How many items were lost to newer ones so far, over all runs."""
        return self._feeder.dropped

    def write(self, frame: Frame) -> None:
        """Put the frame, at the cost of the oldest one where the queue is full.

        Raises:
            RuntimeError: the asyncio queue's event loop is closed.
            ValueError: the multiprocessing queue is closed.
            queue.ShutDown, asyncio.QueueShutDown: the queue was shut down (Python 3.13).
        """
        self._feeder.put(frame)
        self._wrote = True

    def close(self) -> None:
        """End the run: put the `end` object, if there is one and a frame was written."""
        if self._wrote and self._end is not ...:
            self._feeder.put(self._end)
        self._wrote = False


class CallableWriter:
    """Frames into a function, called in the preview's worker thread."""

    def __init__(self, function: Callable[[Frame], object]) -> None:
        """Bind to the function.

        Args:
            function: called with each `Frame`; what it returns is ignored.

        Raises:
            TypeError: `function` is not callable, or is `async`.
        """
        if not callable(function) or inspect.iscoroutinefunction(function):
            found = "an async function" if callable(function) else type(function).__name__
            advice = "pass an asyncio.Queue to reach async code"
            raise TypeError(f"function must be a plain callable, got {found}; {advice}")
        self._function = function

    def write(self, frame: Frame) -> None:
        """Call the function; what it raises is passed on."""
        self._function(frame)

    def close(self) -> None:
        """Do nothing."""


# Targets and options

_VIEWS = {"terminal": "TerminalWriter", "notebook": "NotebookWriter"}


def _writer_for_path(path: str) -> Writer:
    suffix = Path(path).suffix
    is_folder = path.endswith(_SEPARATORS) or Path(path).is_dir()
    if is_folder or not re.match(r"\.[A-Za-z]\w*$", suffix):
        return PngFolderWriter(path)
    return AnimationWriter(path)


_REDIS_URLS = ("redis://", "rediss://", "redis+", "rediss+", "unix://")
_SEPARATORS = tuple(filter(None, ("/", os.sep, os.altsep)))


def _target_message(target: object, advice: str) -> str:
    found = target.__name__ if isinstance(target, type) else type(target).__name__
    expected = "a path, a queue, a callable or a writer"
    return f"target must be {expected}, got {found}; {advice}"


def _nameable(path: str | os.PathLike[str], name: str) -> Path:
    if not os.fspath(path):
        raise ValueError(f"{name} must be a path, got ''; pass '.' for the current folder")
    found = Path(path)
    return found if found.name not in ("", "..") else found.resolve()


def _checked_suffix(path: Path, expected: Iterable[str]) -> str:
    suffix = path.suffix.lower()
    if suffix in expected:
        return suffix
    shown = ", ".join(expected)
    advice = "change it, or end the path in '/' for a folder of PNGs"
    raise ValueError(f"path must end in one of {shown}, got {str(path)!r}; {advice}")


def _checked_range(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, int) and low <= value <= high:
        return value
    raise ValueError(f"{name} must be an int from {low} to {high}, got {value!r}; pass one")


def _checked_side(min_side_px: int | None) -> int | None:
    return None if min_side_px is None else _checked_range("min_side_px", min_side_px, 1, 8192)


_Choice = TypeVar("_Choice", bound=str)


def _checked_choice(name: str, value: _Choice, choices: object) -> _Choice:
    if value in get_args(choices):
        return value
    expected = " or ".join(map(repr, get_args(choices)))
    raise ValueError(f"{name} must be {expected}, got {value!r}; pass one of them")


def _checked_clip_frame(clip_frame_ms: int | None, video: AnimationVideo) -> int | None:
    if clip_frame_ms is None:
        return None
    if video != "clip":
        expected = f"clip_frame_ms must be None with video={video!r}"
        raise ValueError(f"{expected}, got {clip_frame_ms!r}; pass video='clip'")
    return _checked_range("clip_frame_ms", clip_frame_ms, 20, 60_000)


# Sizes


def _enlarged(size: Size, min_side_px: int | None, resample: Resample) -> Size:
    factor = max(1.0, (min_side_px or 1) / min(size))
    if resample == "nearest":
        factor = -(-(min_side_px or 1) // min(size))
    return round(size[0] * factor), round(size[1] * factor)


def _rounded_up(size: Size, multiple: int) -> Size:
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def _resized(image: Image.Image, size: Size, resample: Resample) -> Image.Image:
    if image.size == size:
        return image
    shrinks = size[0] < image.width or size[1] < image.height  # which nearest does badly
    if resample == "smooth" or shrinks:
        return resized(image, size)
    return image.resize(size, Image.Resampling.NEAREST)


def _fitted(image: Image.Image, canvas: Size, resample: Resample) -> Image.Image:
    """`image` at the size of the canvas; black bars where the aspects differ visibly."""
    scale = min(canvas[0] / image.width, canvas[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if canvas[0] - size[0] <= 2 and canvas[1] - size[1] <= 2:
        return _resized(image, canvas, resample)
    barred = Image.new("RGB", canvas)
    left, top = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    barred.paste(_resized(image, size, resample), (left, top))
    return barred


def _animation_format(path: Path) -> type[Animation]:
    suffix = _checked_suffix(path, FORMATS)
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        expected = "imageio-ffmpeg must be installed to write .mp4"
        raise ModuleNotFoundError(f'{expected}, got none; pip install "sd-progress[mp4]"')
    return FORMATS[suffix]


# Folders


def _step_name(frame: Frame) -> str:
    digits = max(3, len(str(frame.num_steps)))
    return "final" if frame.source == "final" else f"step_{frame.step_index + 1:0{digits}}"


# Contact sheets


class _EvenSample:
    """Up to `size` evenly chosen cells of a run of unknown length; first and last among them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[Cell] = []
        self._stride = 1
        self._count = 0

    def add(self, cell: Cell) -> None:
        if self._count % self._stride == 0:
            self._kept.append(cell)
        if len(self._kept) > 4 * self._size:
            self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._last = cell
        self._count += 1

    def chosen(self) -> list[Cell]:
        cells = self._kept if self._kept[-1] is self._last else [*self._kept, self._last]
        if len(cells) <= self._size:
            return cells
        share = (len(cells) - 1) / (self._size - 1)
        return [cells[round(index * share)] for index in range(self._size)]


# Queues


class _Feeder:
    """A queue that takes every new item, at the cost of the oldest ones."""

    def __init__(self, queue: FrameQueue) -> None:
        self.dropped = 0
        self._queue = queue

    def put(self, item: object) -> None:
        self.dropped += _put_newest(self._queue, item)


class _LoopFeeder:
    """The same for an asyncio queue, from other threads; what waits for the loop is bounded too."""

    def __init__(self, queue: asyncio.Queue[Frame]) -> None:
        self.dropped = 0
        self._queue = queue
        self._loop = _running_loop()
        self._waiting: deque[object] = deque()
        self._lock = threading.Lock()
        self._failure: Exception | None = None

    def put(self, item: object) -> None:
        if self._failure is not None:
            raise self._failure
        with self._lock:
            self._waiting.append(item)
            if 0 < self._queue.maxsize < len(self._waiting):
                self._waiting.popleft()
                self.dropped += 1
        try:
            self._loop.call_soon_threadsafe(self._hand_over)
        except RuntimeError as error:
            expected = "queue must belong to an open event loop, got one whose loop is closed"
            raise RuntimeError(f"{expected}; keep the loop running until the run ends") from error

    def _hand_over(self) -> None:
        """Runs in the loop's thread."""
        with self._lock:
            try:
                while self._waiting:
                    self.dropped += _put_newest(self._queue, self._waiting.popleft())
            except Exception as error:  # for example QueueShutDown; raised by the next `put`
                self._failure = error


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        expected = "queue must be given while its event loop runs, got an asyncio.Queue outside one"
        advice = "make the writer or callback inside the coroutine, before going to a thread"
        raise ValueError(f"{expected}; {advice}") from error


def _put_newest(queue: FrameQueue, item: object) -> int:
    """Put the item, dropping the oldest ones as needed; how many items were lost.

    A queue can be full and have nothing to give for a moment, while its items travel between
    processes. After a second of that, its consumer is taken for dead and the item is lost.
    """
    lost = 0
    give_up_at = time.monotonic() + 1.0
    while True:
        try:
            queue.put_nowait(cast(Frame, item))
        except (queues.Full, asyncio.QueueFull):
            if _drop_oldest(queue):
                lost += 1
            elif time.monotonic() > give_up_at or not hasattr(queue, "get_nowait"):
                return lost + 1
            else:
                time.sleep(0.001)
        else:
            return lost


def _drop_oldest(queue: FrameQueue) -> bool:
    try:
        queue.get_nowait()  # type: ignore[attr-defined]
    except (queues.Empty, asyncio.QueueEmpty, AttributeError):
        return False
    if hasattr(queue, "task_done"):
        queue.task_done()  # for those who wait in queue.join()
    return True
