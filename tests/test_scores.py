"""How near drawn pictures come to what they should be; one process's share of the work.

Several processes are in `test_calibration`.
"""

import math

import numpy as np
import pytest
import torch

from sd_progress.decoders import PixelDecoder
from sd_progress.factors import Factors
from sd_progress.scores import Pair, Score, compared, reduced, scored, scored_decoder
from sd_progress.share import Share

STRIPES = torch.tensor([-1.0, 1.0]).expand(1, 3, 4, 2)  # black and white
IDENTITY = Factors.from_table(np.eye(3), name="identity")


def noise(*shape, seed=0):
    """From -1 to 1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_by_hand():
    """An error of a tenth of the range is 20 dB, of a hundredth 40 dB, none 100 dB."""
    wanted = noise(1, 3, 4, 6) / 2
    assert compared(wanted + 0.2, wanted).psnr_db == pytest.approx(20, abs=1e-4)
    assert compared(wanted - 0.02, wanted).psnr_db == pytest.approx(40, abs=1e-3)
    assert compared(wanted, wanted).psnr_db == pytest.approx(100)


def test_scores_are_means_over_pictures():
    """Of decibels, not of errors: a bad picture does not hide a good one."""
    wanted = torch.zeros(2, 3, 4, 4)
    drawn = wanted + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    assert compared(drawn, wanted).psnr_db == pytest.approx(30, abs=1e-4)


def test_flat_pictures_have_each_its_own_colour():
    """Stripes in one channel of three are off by a twelfth; what is flat is drawn without error."""
    wanted = torch.full((2, 3, 4, 2), 0.5)
    wanted[1] = -0.5
    wanted[:, 0] = STRIPES[0, 0]
    assert compared(wanted, wanted).flat_db == pytest.approx(10 * math.log10(12), abs=1e-4)
    assert compared(wanted[:, 1:], wanted[:, 1:]).flat_db == pytest.approx(40)  # the most there is


def test_gain_is_what_is_won_over_flat_pictures():
    """And a score reads well."""
    score = Score(27.25, 12.0)
    assert score.gain_db == 15.25
    assert str(score) == "27.2 dB, where flat pictures have 12.0 dB"


def test_what_cannot_be_shown_counts_as_it_is_shown():
    """NaN is grey, infinity and what is beyond white are white."""
    white = torch.ones(1, 3, 2, 2)
    assert compared(white * math.nan, white).psnr_db == pytest.approx(10 * math.log10(4), abs=1e-4)
    assert compared(white * math.inf, white).psnr_db == pytest.approx(100)
    assert compared(white * 3, white).psnr_db == pytest.approx(100)


@pytest.mark.parametrize("upscale", [1, 2, 4])
def test_reduced_pictures_are_means_of_areas(upscale):
    """Eight pixels a side per latent, averaged in squares."""
    pictures, latents, side = noise(2, 3, 24, 16), torch.zeros(2, 4, 3, 2), 8 // upscale
    expected = pictures.numpy().reshape(2, 3, 3 * upscale, side, 2 * upscale, side)
    found = reduced(pictures, latents, upscale)
    np.testing.assert_allclose(found, expected.mean(axis=(3, 5)), atol=1e-6)


def test_full_resolution_is_not_reduced():
    """The very same pictures."""
    pictures = noise(1, 3, 24, 16)
    assert reduced(pictures, torch.zeros(1, 4, 3, 2), 8) is pictures


def test_a_map_is_scored_at_its_own_resolution():
    """The colours of four pixels are their mean; drawn one by one they are all there."""
    pictures = noise(2, 3, 8, 12)
    latents = pictures.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5))
    assert scored(IDENTITY, Pair(pictures, latents), 1).psnr_db > 90
    repeated = Factors(np.repeat(np.eye(3), 4, axis=0)[:, :, None, None], np.zeros(12), name="2x")
    lost = latents.repeat_interleave(2, 2).repeat_interleave(2, 3) - pictures
    expected = -10 * lost.square().mean(dim=(1, 2, 3)).div(4).log10()
    found = scored(repeated, Pair(pictures, latents), 2)
    assert found.psnr_db == pytest.approx(expected.mean().item(), abs=1e-3)


def test_any_decoder_is_scored_at_one_pixel_per_latent():
    """Here one that shows its latents, to within half a level of 256."""
    pictures = noise(2, 3, 8, 12)
    latents = pictures.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5))
    assert scored_decoder(PixelDecoder(), Pair(pictures, latents)).psnr_db > 55
    inverted = scored_decoder(PixelDecoder(), Pair(-pictures, latents))
    assert inverted.psnr_db == pytest.approx(inverted.flat_db - 10 * math.log10(4), abs=0.5)


# --- shares


def test_one_process_has_all_of_the_work():
    """What it adds up is what it has."""
    share, sums = Share(None), torch.tensor([1.0, 2.0])
    share.add_up(sums)
    assert (share.rank, share.count, share.total(5), sums.tolist()) == (0, 1, 5, [1.0, 2.0])
    assert share.mean([Score(10, 2), Score(20, 4)]) == Score(15, 3)
    assert share.mean([]) == Score(0, 0)
