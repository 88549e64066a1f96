"""Owns the live view in a terminal: the newest preview, in place, above a line of progress.

The pictures are drawn by `textual-image` (LGPL), the one library that is kept (releases every other
month, no upper bound on Pillow) and speaks kitty's protocol, sixel (which iTerm2, WezTerm, foot,
Windows Terminal and VS Code understand) and half-blocks. `term-image` refuses Pillow 11 and newer,
`chafa.py` had its last release in 2024, needs the system's GLib and never frees what it has drawn,
and `dapple` encodes sixels pixel by pixel, in Python.

The view takes the terminal's last rows out of its scrolling. What is printed meanwhile, tqdm's bars
above all, goes on above it, and neither side has to know of the other. Each picture is one write,
which leaves the cursor where it was. At the end of a run the rows are given back, and the last
picture is printed among the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, cast, get_args

from PIL import Image

from ._words import progress_words
from .frame import Frame

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["TerminalWriter"]

_MIN_ROWS: Final = 4  # of a picture; in fewer nothing can be recognised
_MIN_COLUMNS: Final = 12
_MIN_INTERVAL_S: Final = 0.1  # between two pictures: more often the eye does not need
_REST: Final = 4  # times what the terminal took for a picture, which it is then left to others

# What VT100 and all its heirs know; the last two are ignored by those that do not.
_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor's place and colours
_NO_MARGINS = "\x1b[r"
_DOWN = "\x1bD"  # by one row, scrolling at the last one; the column stays
_TO_END, _REST_OF_ROW = "\x1b[J", "\x1b[K"  # are erased
_BEGIN, _SHOW = "\x1b[?2026h", "\x1b[?2026l"  # all at once what is between them

Protocol = Literal["kitty", "sixel", "blocks"]
Draw = Callable[[Image.Image], "RenderableType"]


class TerminalWriter:
    """Shows the newest frame in the terminal, in place; the last one of a run stays.

    It draws on the standard output, and only where that is a terminal: into a file or a pipe, or a
    notebook, it writes nothing. Terminals of less than 8 rows or 12 columns have the line of
    progress only.

    Where it is made, the terminal is asked what it can draw, once; keys that are typed in that
    moment are lost. Where it cannot be asked (the standard input is no terminal, or the process is
    in the background), or knows nothing better, pictures are drawn in half-blocks. So they are in
    xterm and foot, where text that scrolls takes every sixel along. kitty must be 0.28 (of 2023) or
    newer.

    A program that is killed cannot give the terminal's last rows back; the command `reset` does.

    Attributes:
        newest: 1, for frames that come while another is drawn are left out.
    """

    newest = 1

    def __init__(
        self,
        *,
        protocol: Literal["auto"] | Protocol = "auto",
        max_rows: int = 24,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask the terminal; nothing is drawn before the first `write`.

        Args:
            protocol: `"kitty"`, `"sixel"` or `"blocks"`, where `"auto"` is mistaken.
            max_rows: of the picture; a third of the terminal is left to others in any case.
            clock: seconds, monotonic.

        Raises:
            ValueError: an option is out of its range.
            ModuleNotFoundError: the `terminal` extra is not installed.
        """
        if protocol != "auto" and protocol not in get_args(Protocol):
            expected = f"auto, {', '.join(get_args(Protocol))}"
            raise ValueError(f"protocol must be one of {expected}, got {protocol!r}; pass one")
        if not isinstance(max_rows, int) or max_rows < _MIN_ROWS:
            expected = f"max_rows must be a whole number from {_MIN_ROWS} on"
            raise ValueError(f"{expected}, got {max_rows!r}; 24 is usual")
        if importlib.util.find_spec("textual_image") is None:
            expected = "textual-image must be installed to draw in the terminal"
            raise ModuleNotFoundError(f'{expected}, got none; pip install "sd-progress[terminal]"')
        self._max_rows, self._clock = max_rows, clock
        fd = _drawable()
        self._view = None if fd is None else _View(fd, _drawing(protocol))
        self._frame: Frame | None = None
        self._rests_until_s = -math.inf

    def write(self, frame: Frame) -> None:
        """Draw the frame, unless another was drawn just now.

        Raises:
            OSError: the terminal is gone.
        """
        self._frame = frame
        began_s = self._clock()
        if self._view is None or began_s < self._rests_until_s:
            return
        self._view.show(frame, self._max_rows)
        ended_s = self._clock()
        self._rests_until_s = ended_s + max(_MIN_INTERVAL_S, _REST * (ended_s - began_s))

    def close(self) -> None:
        """Give the rows back, and print the last frame.

        Raises:
            OSError: the terminal is gone.
        """
        frame, self._frame = self._frame, None
        self._rests_until_s = -math.inf
        if self._view is not None and frame is not None:
            self._view.leave(frame, self._max_rows)


class _View:
    """The last rows of a terminal, which do not scroll with the others.

    Args:
        fd: of the terminal.
        draw: makes rich's renderable of a picture.
    """

    def __init__(self, fd: int, draw: Draw) -> None:
        self._fd, self._draw = fd, draw
        self._rows = 0  # that are taken
        self._size = os.terminal_size((0, 0))

    def show(self, frame: Frame, max_rows: int) -> None:
        """Draw the frame in these rows, which are taken if they are not yet."""
        size = _size(self._fd)
        if size.lines < 3 or size.columns < _MIN_COLUMNS:
            return
        made = self._drawn(frame, size, max_rows)
        rows = made.rows + 1
        taken = "" if (rows, size) == (self._rows, self._size) else self._take(rows, size)
        margins = f"\x1b[1;{size.lines - rows}r"  # else a graphic below them would scroll
        line = f"{_at(size.lines)}{_line(frame, size.columns - 1)}{_REST_OF_ROW}"
        picture = made.placed(size.lines - made.rows)
        drawn = f"{_SAVE}{_NO_MARGINS}{picture}{line}{margins}{_RESTORE}"
        self._write(f"{_BEGIN}{taken}{drawn}{_SHOW}")

    def leave(self, frame: Frame, max_rows: int) -> None:
        """Give the rows back, and print the frame where the cursor is."""
        size = _size(self._fd)
        made = self._drawn(frame, size, max_rows)
        given_back = self._give_back(size)
        # Behind a text that was not ended these spaces reach into the next row; else they do not.
        new_row = f"{' ' * (size.columns - 1)}\r"
        line = _line(frame, size.columns - 1)
        self._write(f"{given_back}{new_row}{made.printed()}{line}\n")

    def restore(self) -> None:
        """Give the rows back, when the program ends without having closed the view."""
        with contextlib.suppress(OSError):
            self._write(self._give_back(_size(self._fd)))

    def _drawn(self, frame: Frame, size: os.terminal_size, max_rows: int) -> _Drawing:
        rows = min(max_rows, size.lines - 1 - max(3, size.lines // 3))
        if rows < _MIN_ROWS or size.columns < _MIN_COLUMNS:
            return _Drawing()
        return _rendered(self._draw(frame.image), size.columns - 1, rows)

    def _take(self, rows: int, size: os.terminal_size) -> str:
        text = self._give_back(size)
        atexit.register(self.restore)
        self._rows, self._size = rows, size
        return f"{text}{_DOWN * rows}\x1b[{rows}A"  # room below the cursor

    def _give_back(self, size: os.terminal_size) -> str:
        if self._rows == 0:
            return ""
        atexit.unregister(self.restore)
        # after a change of size nobody knows where the picture is, except that it is below
        where = _at(size.lines - self._rows + 1) if size == self._size else _RESTORE
        self._rows = 0
        return f"{_SAVE}{_NO_MARGINS}{where}{_TO_END}{_RESTORE}"

    def _write(self, text: str) -> None:
        stdout = cast(io.TextIOWrapper, sys.__stdout__)
        stdout.flush()
        data = memoryview(text.encode(stdout.encoding, "replace"))
        while data:
            data = data[os.write(self._fd, data) :]


@dataclass(frozen=True)
class _Drawing:
    """A picture as a terminal takes it.

    Attributes:
        rows: of the terminal.
        lines: text, one for each row.
        graphic: instead of them, a sequence that draws all of it from the cursor on.
    """

    rows: int = 0
    lines: tuple[str, ...] = ()
    graphic: str = ""

    def placed(self, top: int) -> str:
        """To be drawn from that row on, counted from 1."""
        if self.graphic:
            return f"{_at(top)}{self.graphic}"
        lines = (f"{_at(top + row)}{line}{_REST_OF_ROW}" for row, line in enumerate(self.lines))
        return "".join(lines)

    def printed(self) -> str:
        """To be printed as text is, with a newline at the end."""
        if self.graphic:
            room = f"{chr(10) * self.rows}\x1b[{self.rows}A"
            return f"{room}{_SAVE}{self.graphic}{_RESTORE}\x1b[{self.rows}B"
        return "".join(f"{line}\n" for line in self.lines)


def _rendered(picture: RenderableType, columns: int, rows: int) -> _Drawing:
    """What rich makes of it, in at most so many columns and rows."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor" if _has_all_colours() else "256",
        no_color=False,
        legacy_windows=False,
        width=columns,
        height=rows,
    )
    with console.capture() as capture:
        console.print(picture, end="")
    text = capture.get()
    begin, end = text.find("\x1bP"), text.rfind("\x1b\\")  # of a sixel, behind blank rows
    graphic = text[begin : end + 2] if 0 <= begin < end else ""
    lines = text[:begin].split("\n")[:-1] if graphic else text.split("\n")[:-1]
    return _Drawing(len(lines), () if graphic else tuple(lines), graphic)


def _line(frame: Frame, columns: int) -> str:
    """How far the run is, in one row, with a bar; what does not fit is left out from the end.

    A finished picture has no bar.
    """
    words = progress_words(frame)
    while len(words) > 1 and len("  ".join(words)) > columns:
        words.pop()
    room = min(30, columns - len("  ".join(words)) - 2)
    if room >= 5 and frame.source != "final":
        done = round(frame.progress * room)
        words.insert(1, "\u2501" * done + "\u2500" * (room - done))
    return "  ".join(words)[:columns]


def _at(row: int) -> str:
    """Go to the begin of a row, counted from 1."""
    return f"\x1b[{row};1H"


# The terminal


def _drawable() -> int | None:
    """The file descriptor of the standard output, where it is a terminal that can draw."""
    stdout = sys.__stdout__
    if stdout is None or os.environ.get("TERM") == "dumb" or not _is_unicode(stdout.encoding):
        return None
    try:
        is_redirected = sys.stdout.fileno() != stdout.fileno()
        return None if is_redirected or not stdout.isatty() else stdout.fileno()
    except (AttributeError, OSError, ValueError):  # a stream that is no file, or a closed one
        return None


def _size(fd: int) -> os.terminal_size:
    """Of a terminal; of one that does not know, what is usual."""
    size = os.get_terminal_size(fd)
    return size if all(size) else os.terminal_size((80, 24))


def _is_unicode(encoding: str) -> bool:
    return encoding.lower().startswith("utf")


def _drawing(protocol: Literal["auto"] | Protocol) -> Draw:
    """What draws in this terminal; asks it, where it can be asked."""
    can_ask = _can_ask()
    with _quietly(), contextlib.nullcontext() if can_ask else _out_of_sight():
        from textual_image import renderable as library

        # asks for the size of a character, too: in mid-run it might take a user's key for it
        _rendered(library.HalfcellImage(Image.new("RGB", (1, 2)), 1, 1), 1, 1)
    known = {
        "kitty": library.TGPImage,
        "sixel": library.SixelImage,
        "blocks": library.HalfcellImage,
    }
    best = library.Image if can_ask else library.HalfcellImage
    if best is library.SixelImage and _scrolls_sixels():
        best = library.HalfcellImage
    chosen = known.get(protocol, best)
    return lambda picture: chosen(picture, width="auto", height="auto")


def _scrolls_sixels() -> bool:
    """Whether the terminal is known to move all sixels when some rows scroll."""
    return "XTERM_VERSION" in os.environ or os.environ.get("TERM", "").startswith("foot")


def _has_all_colours() -> bool:
    """Whether the terminal says so; kitty, xterm and tmux are known to, and do not always."""
    known = ("KITTY_WINDOW_ID", "TMUX", "XTERM_VERSION")
    says = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    return says or any(name in os.environ for name in known)


def _can_ask() -> bool:
    """Whether an answer would come here: not from a pipe, nor in the background.

    The library divides by the size, so it must be known.
    """
    stdin = sys.__stdin__
    try:
        if stdin is None or not stdin.isatty() or not all(os.get_terminal_size(stdin.fileno())):
            return False
        return not hasattr(os, "tcgetpgrp") or os.tcgetpgrp(stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's warnings that the terminal does not answer."""
    logger = logging.getLogger("textual_image")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _out_of_sight() -> Iterator[None]:
    """Without a terminal in sight, for a library that otherwise asks it when it is imported."""
    stdout, sys.__stdout__ = sys.__stdout__, io.StringIO()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        sys.__stdout__ = stdout  # type: ignore[misc]
