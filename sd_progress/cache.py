"""Owns where calibrations are kept between processes, by the hash of the VAE's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from . import factors
from .boundary import warn
from .factors import Factors

FOLDER_VARIABLE: Final = "SD_PROGRESS_CACHE"
# Part of a file's name: to be raised when calibration becomes better.
GENERATION: Final = 1


def folder() -> Path:
    """`$SD_PROGRESS_CACHE`, else `sd-progress` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
        OSError: none of them is set, and the user has no home, as in some containers.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-progress"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def load(vae_hash: str) -> Factors | None:
    """What was kept for a VAE; None where there is nothing that can be used."""
    try:
        path = _path(vae_hash)
    except OSError:
        return None
    try:
        kept = factors.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"{path} must be a calibration, got {error}; it is ignored and made anew")
        return None
    if kept.vae_hash != vae_hash:
        warn(f"{path} must be for this VAE, got one for another; it is ignored and made anew")
        return None
    return kept


def keep(calibrated: Factors) -> None:
    """Keep it for the next process; where that cannot be done, say so and go on.

    The file appears whole or not at all, so processes that do the same at once are no harm.
    """
    if calibrated.vae_hash is None:
        return
    place = "the cache"
    try:
        path = _path(calibrated.vae_hash)
        place = str(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        factors.save(calibrated, path)
    except Exception as error:  # safetensors has its own for a full disk
        warn(
            f"{place} must be writable, got {error}; the calibration is not kept, set "
            f"{FOLDER_VARIABLE} to another folder"
        )


def _path(vae_hash: str) -> Path:
    return folder() / f"{vae_hash[:32]}-{GENERATION}.safetensors"
