"""The guess for unknown pipelines: what fits is laid out, what does not is refused."""

import pytest
import torch

from sd_progress.inference import infer
from sd_progress.operations import Reading, VaeStatistics

IMAGE = VaeStatistics(latent_channels=4, scaling_factor=0.5, shift_factor=1.0)
VIDEO = VaeStatistics(latent_channels=4, is_video=True)


def shape_of(latents_shape, statistics=IMAGE, **values):
    result = infer(torch.zeros(latents_shape), Reading(statistics, values))
    return None if result is None else tuple(result.shape)


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        ((2, 4, 6, 8), (2, 4, 6, 8)),
        ((2, 6, 8, 4), (2, 4, 6, 8)),  # channels last
        ((2, 16, 6, 8), (2, 4, 12, 16)),  # 2x2 patches
        ((2, 48, 16), (2, 4, 12, 16)),  # tokens of 2x2 patches
        ((2, 48, 4), (2, 4, 6, 8)),  # tokens of one pixel
        ((2, 4, 3, 6, 8), (6, 4, 6, 8)),  # a video for an image VAE
        ((2, 3, 4, 6, 8), (6, 4, 6, 8)),
    ],
)
def test_shapes_for_an_image_vae(latents, expected):
    """Axes in any order, tokens by the picture's aspect ratio."""
    assert shape_of(latents, height=96, width=128) == expected


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        ((2, 4, 3, 6, 8), (2, 4, 3, 6, 8)),
        ((2, 3, 4, 6, 8), (2, 4, 3, 6, 8)),
        ((2, 3, 6, 8, 4), (2, 4, 3, 6, 8)),
        ((2, 48, 16), (2, 4, 1, 12, 16)),  # an image for a video VAE
    ],
)
def test_shapes_for_a_video_vae(latents, expected):
    """The result always has frames."""
    assert shape_of(latents, VIDEO, height=96, width=128) == expected


def test_video_tokens_need_their_grid():
    """Frames, height and width in latents, whose product must be the number of tokens."""
    grid = {"latent_num_frames": 3, "latent_height": 6, "latent_width": 8}
    size = {"height": 96, "width": 128, "num_frames": 9}
    assert shape_of((2, 144, 4), VIDEO, **size, **grid) == (2, 4, 3, 6, 8)
    assert shape_of((2, 150, 4), VIDEO, **size, **grid) is None
    assert shape_of((2, 144, 4), VIDEO, **size) is None


@pytest.mark.parametrize("latents", [(2, 5, 6, 8), (2, 48, 7), (2, 47, 4), (2, 32), (2,) * 6])
def test_what_does_not_fit_is_refused(latents):
    """Other channels, a number of tokens without a grid, other numbers of axes."""
    assert shape_of(latents, height=96, width=128) is None


def test_tokens_without_a_size_are_refused():
    """Nobody knows how wide the picture is."""
    assert shape_of((2, 48, 16)) is None
    assert shape_of((2, 48, 16), height=None, width=128) is None


def test_no_vae_no_layout():
    """Without latent channels there is nothing to go by."""
    assert shape_of((2, 4, 6, 8), VaeStatistics()) is None


def test_normalisation_is_what_the_vae_says():
    """Scale and shift, or mean and deviation where there are such."""
    ones = torch.ones(1, 4, 2, 2)
    assert infer(ones, Reading(IMAGE)).unique().tolist() == [3.0]
    mean, std = torch.full((4,), 7.0), torch.full((4,), 2.0)
    assert infer(ones, Reading(VaeStatistics(4, 1.0, mean=mean, std=std))).unique().tolist() == [9]


def test_batch_norm_of_patches():
    """Sixteen statistics for four channels are those of 2x2 patches."""
    mean, std = torch.arange(16.0), torch.ones(16)
    statistics = VaeStatistics(4, 0.5, mean=mean, std=std)
    image = infer(torch.zeros(1, 16, 1, 1), Reading(statistics))
    assert image[0, 1].tolist() == [[4, 5], [6, 7]]
