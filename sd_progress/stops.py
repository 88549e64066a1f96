"""Owns reasons to end a run early: functions of a `Frame` that a run's `stop_when` asks.

Each returns whether the run is to be stopped. Those with settings are made by a call and keep what
they have seen of a run; they begin anew with the next one. Any function of a frame will do beside
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from .frame import Frame

__all__ = ["is_not_finite", "no_change", "one_colour"]

StopWhen = Callable[[Frame], object]


def is_not_finite(frame: Frame) -> bool:
    """Whether there is NaN or infinity in the latents: nothing will come of them any more."""
    return not frame.is_finite


def one_colour(*, levels: float = 2.0, after: float = 0.3) -> StopWhen:
    """Whether each picture is of a single colour, such as black.

    Args:
        levels: standard deviation of each channel, of 0 to 255, up to which it counts as one.
        after: the share of the run before which nothing is expected of a picture, 0 to 1.

    Raises:
        ValueError: an option is out of its range.
    """
    _check("levels", levels, 255)
    _check("after", after, 1)

    def is_one_colour(frame: Frame) -> bool:
        if frame.progress < after or frame.step_index < 0:
            return False
        pictures = frame.images.reshape(-1, *frame.images.shape[-3:])
        return bool(pictures.std(axis=(1, 2)).max() <= levels)

    return is_one_colour


def no_change(*, steps: int = 3, levels: float = 0.5, after: float = 0.3) -> StopWhen:
    """Whether the picture has not changed any more for some frames: the rest will not, either.

    Only of use with denoised frames: noisy ones change until the end.

    Args:
        steps: how many frames in a row must each be like the one before.
        levels: mean difference to the one before, of 0 to 255, up to which nothing has changed.
        after: the share of the run before which nothing is compared, 0 to 1.

    Raises:
        ValueError: an option is out of its range.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps!r}; 3 is usual")
    _check("levels", levels, 255)
    _check("after", after, 1)
    return _NoChange(steps, levels, after)


class _NoChange:
    def __init__(self, steps: int, levels: float, after: float) -> None:
        self._steps, self._levels, self._after = steps, levels, after
        self._begin(-1)

    def _begin(self, run_index: int) -> None:
        self._run_index, self._alike = run_index, 0
        self._last: NDArray[np.int16] | None = None
        self._decoder = ""

    def __call__(self, frame: Frame) -> bool:
        """Whether the run is to be stopped."""
        if frame.run_index != self._run_index:
            self._begin(frame.run_index)
        if frame.progress < self._after or frame.step_index < 0:
            return False
        images, last = frame.images.astype(np.int16), self._last
        # what another decoder drew differs, and tells nothing of the run
        is_same = frame.decoder == self._decoder
        if is_same and last is not None and last.shape == images.shape:
            is_alike = np.abs(images - last).mean() <= self._levels
            self._alike = self._alike + 1 if is_alike else 0
        self._last, self._decoder = images, frame.decoder
        return self._alike >= self._steps


class StopWriter:
    """Asks one function of each frame whether to stop, in a thread of its own."""

    def __init__(self, stop_when: StopWhen) -> None:
        self._stop_when = stop_when

    def write(self, frame: Frame) -> None:
        """Ask."""
        if self._stop_when(frame):
            frame.stop()

    def close(self) -> None:
        """There is nothing to complete."""


def stop_conditions(stop_when: StopWhen | Sequence[StopWhen] | None) -> tuple[StopWhen, ...]:
    """All functions of the option, checked.

    Raises:
        TypeError: one of them cannot be called.
    """
    if stop_when is None:
        return ()
    found = (stop_when,) if callable(stop_when) else tuple(stop_when)
    for one in found:
        if not callable(one):
            raise TypeError(
                f"stop_when must be a function of a Frame, or several, got {type(one).__name__}; "
                "sd_progress.stops has some ready"
            )
    return found


def _check(name: str, value: float, most: float) -> None:
    if not 0 <= cast(object, value) <= most:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number from 0 to {most:g}, got {value!r}; pass one")
