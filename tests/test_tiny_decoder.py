"""A distilled decoder draws the previews, where it was made for the pipeline's VAE."""

import diffusers
import numpy as np
import pytest
import tiny
import torch
from test_callback import frames_of
from test_choice import chosen, swapped_channels, unknown_vae
from torch import nn

from sd_progress import TinyDecoder
from sd_progress.pixels import to_uint8


def distilled(channels=4, seed=3):
    """An AutoencoderTiny of random weights, with 2x up as `tiny.vae`."""
    torch.manual_seed(seed)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return diffusers.AutoencoderTiny(latent_channels=channels, **blocks, **widths).eval()


def latents(batch=2, channels=4):
    """Of 6 by 8."""
    return torch.randn(batch, channels, 6, 8, generator=torch.Generator().manual_seed(0))


class Stranger(nn.Module):
    """Another class with a `decode`, whose latents are the VAE's own."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def decode(self, latents, return_dict=True):
        """As diffusers has it."""
        return self.vae.decode(latents, return_dict=return_dict)


@torch.no_grad()
def test_it_is_given_sampler_space_latents():
    """Scaled and shifted as the pipeline's VAE says, which is what it was distilled from."""
    model, vae = distilled(), tiny.vae(scaling_factor=0.5, shift_factor=0.25)
    drawn = TinyDecoder(model).for_vae(vae).decode(latents())
    wanted = to_uint8(model.decode((latents() - 0.25) * 0.5).sample)
    assert drawn.shape == (2, 12, 16, 3)
    assert np.abs(drawn.astype(int) - wanted).max() <= 1


@torch.no_grad()
def test_statistics_of_each_channel_are_applied():
    """Of a VAE that states means and deviations."""
    statistics = {"latents_mean": [0.5, 0, -1, 0], "latents_std": [2.0, 1, 4, 0.5]}
    vae = tiny.vae(scaling_factor=1.0, **statistics)
    drawn = TinyDecoder(model := distilled()).for_vae(vae).decode(latents())
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics.values())
    wanted = to_uint8(model.decode((latents() - mean) / std).sample)
    assert np.abs(drawn.astype(int) - wanted).max() <= 1


@torch.no_grad()
def test_another_module_is_given_what_the_vae_is():
    """And so is an AutoencoderTiny in a pipeline whose VAE is one itself."""
    vae = tiny.vae(scaling_factor=0.5)
    drawn = TinyDecoder(Stranger(vae)).for_vae(vae).decode(latents())
    np.testing.assert_array_equal(drawn, to_uint8(vae.decode(latents()).sample))
    model = distilled()
    drawn = TinyDecoder(model).for_vae(distilled(seed=4)).decode(latents())
    np.testing.assert_array_equal(drawn, to_uint8(model.decode(latents()).sample))


def test_it_is_loaded_from_a_folder(tmp_path):
    """As from the Hub; its name is the folder's."""
    distilled().save_pretrained(tmp_path / "taemine")
    decoder = TinyDecoder(tmp_path / "taemine")
    assert decoder.name == "tiny:taemine"
    assert isinstance(decoder.module, diffusers.AutoencoderTiny)
    wanted = TinyDecoder(distilled()).decode(latents())
    np.testing.assert_array_equal(decoder.decode(latents()), wanted)


def test_what_cannot_be_loaded_is_said(tmp_path):
    """With the reason, before the run."""
    with pytest.raises(ValueError, match="tiny must be the Hub id or the folder of an Autoenc"):
        TinyDecoder(tmp_path)
    with pytest.raises(TypeError, match=r"tiny must have a method decode\(latents\), got Linear"):
        TinyDecoder(nn.Linear(2, 2))


def test_a_wrong_number_of_channels_is_refused():
    """Even where nothing may be tried."""
    with pytest.raises(ValueError, match="decoder must have 4 latent channels for this VAE, got"):
        chosen(tiny.vae(), TinyDecoder(distilled(channels=8)), calibrate="never")


def test_statistics_of_patches_are_refused():
    """FLUX.2's are of 2x2 patches, which no AutoencoderTiny takes."""
    vae = tiny.vae(scaling_factor=1.0, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    with pytest.raises(ValueError, match="decoder must be one whose latents are the VAE's own"):
        TinyDecoder(distilled()).for_vae(vae)


def test_one_of_another_vae_is_refused():
    """By what it draws, because the channel counts agree."""
    right = TinyDecoder(Stranger(unknown_vae()))
    assert chosen(unknown_vae(), right, calibrate="auto").name == "tiny:Stranger"
    wrong = TinyDecoder(Stranger(swapped_channels()))
    with pytest.raises(ValueError, match="decoder must be a distilled decoder of this VAE, got 't"):
        chosen(unknown_vae(), wrong, calibrate="always")
    assert chosen(unknown_vae(), wrong, calibrate="never").name == "tiny:Stranger"


def test_a_vae_that_cannot_decode_itself_judges_nobody():
    """One of random weights: what was asked for is shown."""
    decoder = TinyDecoder(distilled())
    assert chosen(tiny.vae(), decoder, calibrate="always").name == "tiny:AutoencoderTiny"


def test_a_run_shows_it_in_full_size(tmp_path):
    """By name, from a folder."""
    distilled().save_pretrained(tmp_path / "taemine")
    frames = frames_of(tiny.sd(), decoder=f"tiny:{tmp_path / 'taemine'}")
    assert {frame.decoder for frame in frames} == {"tiny:taemine"}
    assert {frame.images.shape for frame in frames} == {(1, 16, 24, 3)}
