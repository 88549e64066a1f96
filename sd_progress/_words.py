"""Owns how far a run is, in words, as the live views put it."""

from __future__ import annotations

import math

from .frame import Frame


def progress_words(frame: Frame) -> list[str]:
    """Step, percent, time and time to go, source and decoder; the more important, the earlier.

    A finished picture tells no step: that of a run that was stopped early is none of the last.
    """
    digits = len(str(frame.num_steps))
    time_s = clock_time(frame.elapsed_s)
    if frame.source == "final":
        return [f"finished in {time_s}", frame.decoder]
    if frame.eta_s:
        time_s += f"<{clock_time(frame.eta_s)}"
    return [
        f"step {max(0, frame.step_index + 1):{digits}}/{frame.num_steps}",
        f"{frame.progress:4.0%}",
        time_s,
        frame.source,
        frame.decoder,
    ]


def clock_time(seconds: float) -> str:
    """As a clock shows it, rounded up: 0:07, 12:05, 1:02:03."""
    minutes, whole = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
