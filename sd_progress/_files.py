"""Owns how files appear: whole, and never in the place of another's."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_temporary(folder: Path, data: bytes) -> Path:
    """A new file with `data`, to be published in the same folder; nothing is left of a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = temporary_path(folder)
    try:
        path.write_bytes(data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def temporary_path(folder: Path) -> Path:
    """A name that no other thread or process uses."""
    return folder / f".sd-progress-{uuid.uuid4().hex}.tmp"


def move_over(temporary: Path, target: Path) -> None:
    """Publish under this very name, in the place of what was there."""
    try:
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, wanted: Path) -> Path:
    """Give the temporary file the first free name: `wanted`, or with -2, -3, ... added."""
    for path in _numbered(wanted.parent, wanted.stem, wanted.suffix):
        try:
            _move_to_free(temporary, path)
        except FileExistsError:
            continue
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return path
    raise AssertionError("the numbers ended")


def _move_to_free(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: hold the name with an empty file instead
        path.open("xb").close()
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    else:
        temporary.unlink()


def _numbered(folder: Path, stem: str, suffix: str = "") -> Iterator[Path]:
    for number in itertools.count(1):
        yield folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")


def claim_folder(wanted: Path) -> tuple[Path, Path]:
    """The first folder that is free and holds no earlier run; and the lock that now holds it."""
    for folder in _numbered(wanted.parent, wanted.name):
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / ".sd-progress.lock"
        if _holds_a_run(folder) or not _made_new(lock):
            continue
        if not _holds_a_run(folder):  # one may have come and gone since the first look
            return folder, lock
        lock.unlink()
    raise AssertionError("the numbers ended")


def _made_new(path: Path) -> bool:
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    return True


def _holds_a_run(folder: Path) -> bool:
    patterns = ("step_*.png", "final.png", "step_*/frame_*.png", "final/frame_*.png")
    return any(any(folder.glob(pattern)) for pattern in patterns)
