"""The pictures that a VAE is calibrated on where there are no photographs."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from sd_progress.synthetic import TEMPLATES, dead_leaves


def leaves(count=8, size=64, seed=0):
    return dead_leaves(count, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "size"), [(1, 5), (3, 64), (TEMPLATES + 2, 33)])
def test_pictures_fill_the_range(count, size):
    """Float32 on the CPU, from black to white and not beyond."""
    pictures = leaves(count, size)
    assert (pictures.shape, pictures.dtype) == ((count, 3, size, size), torch.float32)
    assert pictures.device.type == "cpu"
    assert -1 <= pictures.min() < 0 < pictures.max() <= 1


def test_the_same_seed_makes_the_same_pictures():
    """Another seed makes others, and so does the same generator when asked again."""
    generator = torch.Generator().manual_seed(0)
    first, second = (dead_leaves(2, 32, generator) for _ in range(2))
    assert torch.equal(first, leaves(2, 32))
    assert (first - second).abs().mean() > 0.1
    assert (first - leaves(2, 32, seed=1)).abs().mean() > 0.1


def test_no_global_randomness():
    """All of it comes from the generator."""
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    leaves(2, 32)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_host_s_defaults_change_nothing(dtype):
    """A program that sets a default device or dtype gets the same pictures."""
    expected = leaves(2, 32)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = leaves(2, 32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_pictures_differ_in_contrast_saturation_and_sharpness():
    """By a factor of two and more among a few, and in brightness."""
    pictures = leaves(16)
    luma = pictures.mean(dim=1)
    contrast = luma.std(dim=(1, 2))
    colours = pictures - luma[:, None]
    saturation = (colours - colours.mean(dim=(2, 3), keepdim=True)).flatten(1).std(dim=1)
    sharpness = luma.diff(dim=2).abs().amax(dim=(1, 2)) / contrast
    for measure in (contrast, saturation, sharpness):
        assert measure.max() > 2 * measure.min()
    assert luma.mean(dim=(1, 2)).std() > 0.1


def test_pictures_with_one_arrangement_of_leaves_differ_in_colours():
    """Arrangements repeat when there are many pictures; no two pictures are alike."""
    pictures = leaves(TEMPLATES + 1, 32)
    first, again = pictures[0], pictures[TEMPLATES]
    flips = [(), (1,), (2,), (1, 2)]
    assert min((first - again.flip(axes)).abs().mean() for axes in flips) > 0.1


def test_pictures_have_edges_and_surfaces():
    """Most neighbours are alike and a few are not, as in photographs and as in no noise."""
    steps = leaves(8, 128).mean(dim=1).diff(dim=2)
    kurtosis = steps.pow(4).mean() / steps.square().mean().square()
    assert kurtosis > 8  # of Gaussian noise 3
    assert (steps.abs() < 2e-3).float().mean() < 0.2  # surfaces are rough, not flat


def test_pictures_look_alike_at_every_scale():
    """Reduced by two, four and eight they have nearly as much detail; noise would lose it all."""
    pictures = leaves(8, 128)
    details = [
        functional.avg_pool2d(pictures, factor).diff(dim=3).square().mean().item()
        for factor in (2, 4, 8)
    ]
    assert max(details) < 3 * min(details)


def test_colours_go_together():
    """Within a picture the channels are correlated, as under any light, and yet not grey."""
    pictures = leaves(16)
    channels = (pictures - pictures.mean(dim=(2, 3), keepdim=True)).movedim(1, 0).flatten(1)
    correlation = torch.corrcoef(channels)[torch.triu_indices(3, 3, 1).unbind()]
    assert ((correlation > 0.5) & (correlation < 0.97)).all()
