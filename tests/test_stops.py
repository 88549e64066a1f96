"""Reasons to end a run early."""

import numpy as np
import pytest

from sd_progress import stops
from sd_progress.frame import Frame


def frame(images, step_index=5, num_steps=10, **more):
    images = np.broadcast_to(np.asarray(images, np.uint8), (1, 8, 8, 3))
    return Frame(images, step_index, num_steps, None, None, "denoised", "pca", 1.0, 1.0, **more)


NOISE = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3))


def test_one_colour():
    """Black is one, grey too; a picture is none."""
    is_one_colour = stops.one_colour()
    assert is_one_colour(frame(0))
    assert is_one_colour(frame([90, 120, 40]))
    assert not is_one_colour(frame(NOISE))


def test_one_colour_of_a_batch_is_that_of_all():
    """One picture of two that is none keeps the run going."""
    both = np.concatenate([np.zeros((1, 8, 8, 3)), NOISE]).astype(np.uint8)
    shown = Frame(both, 5, 10, None, None, "denoised", "pca", 1.0, 1.0)
    assert not stops.one_colour()(shown)


def test_early_on_nothing_is_expected():
    """First guesses are often flat, and the initial noise is no guess."""
    assert not stops.one_colour(after=0.5)(frame(0, step_index=3))
    assert stops.one_colour(after=0.5)(frame(0, step_index=4))
    assert not stops.one_colour(after=0.0)(frame(0, step_index=-1))


def test_no_change():
    """So many frames in a row must be like the one before."""
    stop = stops.no_change(steps=2, levels=1.0)
    found = [stop(frame(levels, index)) for index, levels in enumerate([9, 50, 90, 91, 91], 3)]
    assert found == [False, False, False, False, True]


def test_a_change_in_between_starts_the_count_anew():
    """Only frames in a row count."""
    stop = stops.no_change(steps=2)
    assert not any(stop(frame(levels, 5)) for levels in (10, 10, 60, 60, 10))


def test_no_change_begins_anew_with_each_run():
    """Two runs are nothing to compare."""
    stop = stops.no_change(steps=1)
    assert not stop(frame(50, run_index=0))
    assert not stop(frame(50, run_index=1))
    assert stop(frame(50, run_index=1))


@pytest.mark.parametrize("option", [{"levels": -1}, {"after": 2}, {"steps": 0}])
def test_wrong_options(option):
    """They say what is expected."""
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        stops.no_change(**option)
