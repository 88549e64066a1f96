"""The linear map learns from the run's own full decodes."""

import numpy as np
import pytest
import tiny
import torch
from test_callback import frames_of

from sd_progress.decoders import LinearDecoder
from sd_progress.factors import Factors
from sd_progress.pixels import to_uint8
from sd_progress.refit import RefitDecoder


def made_up(kernel_size, upscale, seed=0):
    """A map of four channels; with the same seed, the same one."""
    made = np.random.default_rng(seed)
    weight = made.normal(size=(3 * upscale**2, 4, kernel_size, kernel_size)) * 0.3 / kernel_size
    return Factors(weight, np.zeros(3 * upscale**2), name="made-up")


def latents(seed, batch=2):
    """Of 24 by 32 pixels."""
    return torch.randn(batch, 4, 24, 32, generator=torch.Generator().manual_seed(seed))


def error(drawn, wanted):
    """Root mean square, in levels of 256."""
    return float(np.sqrt(np.mean((drawn.astype(float) - wanted.astype(float)) ** 2)))


@pytest.mark.parametrize("upscale", [1, 2])
def test_a_wrong_map_comes_near_the_truth_after_one_decode(upscale):
    """Other latents of the same VAE are drawn right, too."""
    truth, wrong = made_up(3, upscale), made_up(3, upscale, seed=1)
    decoder, vae = RefitDecoder(wrong), LinearDecoder(truth)
    full = np.repeat(np.repeat(vae.decode(latents(0)), 4, axis=1), 4, axis=2)
    before = error(decoder.decode(latents(1)), vae.decode(latents(1)))
    decoder.learn(latents(0), full)
    after = error(decoder.decode(latents(1)), vae.decode(latents(1)))
    assert before > 40
    assert after < before / 4


def test_the_name_says_so():
    """Before the first full decode it is the map's own."""
    decoder = RefitDecoder(made_up(3, 1))
    assert decoder.name == "linear:made-up"
    decoder.learn(latents(0), LinearDecoder(made_up(3, 1)).decode(latents(0)))
    assert decoder.name == "linear+refit:made-up"


def test_a_map_that_is_right_stays_right():
    """What the map explains is not fitted again; what is left is held towards nothing."""
    map_ = made_up(5, 1)
    decoder, plain = RefitDecoder(map_), LinearDecoder(map_)
    decoder.learn(latents(0), plain.decode(latents(0)))
    assert error(decoder.decode(latents(1)), plain.decode(latents(1))) < 1


def test_without_a_map_colours_come_with_the_first_decode():
    """Until then there are principal components."""
    decoder, vae = RefitDecoder(None), LinearDecoder(made_up(3, 1))
    assert decoder.decode(latents(1)).shape == (2, 24, 32, 3)
    assert decoder.name == "pca"
    decoder.learn(latents(0), vae.decode(latents(0)))
    assert decoder.name == "linear+refit"
    assert error(decoder.decode(latents(1)), vae.decode(latents(1))) < 15


def test_the_newest_decode_counts_most():
    """Two VAEs that disagree: the last word is nearer."""
    decoder = RefitDecoder(made_up(1, 1))
    first, last = (LinearDecoder(made_up(1, 1, seed)) for seed in (1, 2))
    decoder.learn(latents(0), first.decode(latents(0)))
    decoder.learn(latents(0), last.decode(latents(0)))
    drawn = decoder.decode(latents(1))
    assert error(drawn, last.decode(latents(1))) < error(drawn, first.decode(latents(1)))


def test_the_decoded_picture_itself_is_drawn_as_it_is():
    """Whatever the map could not explain is added, pixel by pixel."""
    decoder, made = RefitDecoder(made_up(1, 2)), np.random.default_rng(0)
    picture = made.integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    decoder.learn(latents(0), picture)
    assert np.abs(decoder.decode(latents(0)).astype(int) - picture).max() <= 1


def test_what_one_picture_taught_fades_as_the_latents_change():
    """Noise, which no other part of the picture confirms, is not carried to another picture."""
    map_, made = made_up(1, 1), np.random.default_rng(0)
    decoder, plain = RefitDecoder(map_), LinearDecoder(map_)
    noise = made.integers(-60, 61, (2, 24, 32, 3))
    decoder.learn(latents(0), np.clip(plain.decode(latents(0)) + noise, 0, 255).astype(np.uint8))
    near, far = latents(0) + 0.05 * latents(2), latents(1)
    assert error(decoder.decode(near), plain.decode(near) + noise) < error(noise, 0 * noise) / 2
    assert error(decoder.decode(far), plain.decode(far)) < 1


def test_another_size_is_drawn_with_what_applies_to_it():
    """Some pipelines enlarge the latents in mid-run; the convolution goes on, pixels do not."""
    truth, decoder = LinearDecoder(made_up(1, 1)), RefitDecoder(made_up(1, 1, seed=1))
    decoder.learn(latents(0), truth.decode(latents(0)))
    larger = latents(1).repeat(1, 1, 2, 2)
    plain = LinearDecoder(made_up(1, 1, seed=1)).decode(larger)
    assert (
        error(decoder.decode(larger), truth.decode(larger)) < error(plain, truth.decode(larger)) / 4
    )


def test_latents_that_are_not_finite_teach_nothing():
    """A run in float16 that overflows does not spoil the map."""
    decoder, broken = RefitDecoder(made_up(1, 1)), latents(0)
    broken[0, 0, 0, 0] = torch.nan
    decoder.learn(broken, to_uint8(torch.zeros(2, 3, 24, 32)))
    assert decoder.name == "linear:made-up"


def test_a_run_says_which_frames_are_refitted():
    """Each run starts from the map itself."""
    pipe = tiny.sd()
    for _ in range(2):
        names = [frame.decoder for frame in frames_of(pipe, vae_every=2)]
        assert names == ["linear:sd1", "vae", "linear+refit:sd1", "vae"]


def test_refitted_frames_are_nearer_to_the_pictures_of_the_vae():
    """In a real run of a VAE with random weights, which no published map fits."""
    pipe = tiny.sd()
    full = [frame.images for frame in frames_of(pipe, vae_every=1)]
    small = [frame.reshape(1, 8, 2, 12, 2, 3).mean(axis=(2, 4)) for frame in full]
    plain = [frame.images for frame in frames_of(pipe)]
    refitted = [frame.images for frame in frames_of(pipe, vae_every=2)]
    assert error(refitted[2], small[2]) < error(plain[2], small[2]) / 2
    np.testing.assert_array_equal(refitted[0], plain[0])
