"""What the lab computes, against numbers from elsewhere."""

import collections
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from autoencoders import autoencoder
from PIL import Image
from sklearn.decomposition import PCA
from test_latent_space import averaging_vae, noise, random_vae

from sd_progress import factors
from sd_progress.factors import Factors
from sd_progress.lab import (
    WAYS,
    Lab,
    Usage,
    channel_statistics,
    colour_map,
    contributions,
    interpolated,
    latent_pixels,
    nearest,
    principal_components,
    psnr,
    round_trip,
    ssim,
    walked,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_scenes import draw, random_scene

SSIM = 0.299496  # structural_similarity(..., gaussian_weights=True, use_sample_covariance=False)


def scene(seed=0):
    """A landscape, 128 pixels a side."""
    return draw(random_scene(seed))


@pytest.fixture(scope="module")
def lab():
    """Of a VAE with statistics of its own."""
    statistics = {"latents_mean": [1.0, -2, 3, 0], "latents_std": [2.0, 0.5, 1, 4]}
    return Lab.of(tiny.working_vae(scaling_factor=1.0, **statistics))


# --- pictures and spaces


def test_pictures_are_cut_around_their_middle(lab):
    """To whole latents, nothing resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (15, 10, 3), np.uint8)
    picture = lab.picture(Image.fromarray(pixels))
    expected = torch.from_numpy(pixels[1:13, 1:9]).movedim(-1, 0) / 127.5 - 1
    assert torch.equal(picture[0], expected)


def test_pictures_are_brought_to_a_size(lab):
    """That covers them, rounded down; what is too small is refused."""
    assert lab.picture(scene(), (30, 17)).shape == (1, 3, 16, 28)
    with pytest.raises(
        ValueError, match=r"image must be at least 4 pixels a side .*, got 3x8; pass"
    ):
        lab.picture(scene(), (3, 8))


def test_sampler_space(lab):
    """Mean and deviation as the VAE states them, and back."""
    latents = noise(1, 4, 3, 5).double()
    mean, std = torch.tensor([1.0, -2, 3, 0]), torch.tensor([2.0, 0.5, 1, 4])
    expected = (latents - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(lab.to_sampler(latents), expected)
    torch.testing.assert_close(lab.from_sampler(expected), latents)


def test_sampler_space_of_a_scale_and_a_shift():
    """As diffusers' own pipelines have it."""
    lab = Lab.of(tiny.vae(scaling_factor=0.37, shift_factor=0.21))
    latents = noise(1, 4, 2, 2)
    torch.testing.assert_close(lab.to_sampler(latents), (latents - 0.21) * 0.37)


def test_statistics_of_patches_are_averaged():
    """Of FLUX.2's VAE, which has them for each latent of a patch."""
    vae = autoencoder("AutoencoderKLFlux2")
    means = vae.bn.running_mean.reshape(4, 4).mean(dim=1)
    np.testing.assert_allclose(Lab.of(vae).centre, means.numpy(), atol=1e-6)


def test_channel_statistics(lab):
    """Of each channel in sampler space, as numpy has them."""
    latents = noise(1, 4, 6, 7)
    row = (latents[0, 1].double().numpy() + 2) / 0.5
    found = channel_statistics(lab, latents)[1]
    assert (found.mean, found.deviation) == pytest.approx((row.mean(), row.std()))
    assert (found.low, found.high) == pytest.approx((row.min(), row.max()))


# --- round trips


def test_a_round_trip():
    """The latents and the picture are the VAE's own, and the clock ran."""
    lab, picture = Lab.of(averaging_vae()), noise(1, 3, 16, 24)
    trip = round_trip(lab, picture)
    with torch.no_grad():
        assert torch.equal(trip.latents, lab.vae.encode(picture).latent_dist.mode())
        assert torch.equal(trip.decoded, lab.vae.decode(trip.latents).sample)
    assert trip.encode_s > 0
    assert trip.peak_bytes > 2**20
    worst = (trip.decoded.clamp(-1, 1) - picture).abs().max() * 127.5
    assert trip.difference.max() == pytest.approx(float(worst))


def test_latents_can_be_drawn():
    """From the posterior, by a seed."""
    lab, picture = Lab.of(tiny.vae()), noise(1, 3, 8, 8)
    drawn = [lab.encode(picture, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], lab.encode(picture))


def test_psnr():
    """Of a picture that is off by a tenth of its range everywhere, 20 dB."""
    wanted = noise(1, 3, 4, 4) / 2
    assert psnr(wanted + 0.2, wanted) == pytest.approx(20, abs=1e-4)
    assert psnr(wanted, wanted) == 100


def test_ssim():
    """As scikit-image 0.26 has it, with the settings of Wang et al."""
    wanted = torch.from_numpy(np.array(scene())).movedim(-1, 0)[None] / 127.5 - 1
    drawn = wanted + 0.3 * noise(*wanted.shape)
    assert ssim(drawn, wanted) == pytest.approx(SSIM, abs=1e-5)
    assert ssim(wanted, wanted) == pytest.approx(1)


def test_what_lies_beyond_is_counted():
    """Saturated values, and those that are not finite."""
    lab, picture = Lab.of(tiny.vae()), noise(1, 3, 8, 8)
    torch.nn.init.constant_(lab.vae.decoder.conv_out.bias, 5.0)
    torch.nn.init.zeros_(lab.vae.decoder.conv_out.weight)
    assert round_trip(lab, picture).saturated == 1
    torch.nn.init.constant_(lab.vae.decoder.conv_out.bias, float("nan"))
    assert round_trip(lab, picture).not_finite == 3 * 8 * 8


# --- principal components


def test_components_are_scikit_learns(lab):
    """Of the latents of a landscape: axes, signs, variances and shares."""
    rows = latent_pixels(lab, [lab.encode(lab.picture(scene(seed))) for seed in (0, 1)])
    assert rows.shape == (2 * 32 * 32, 4)
    found, expected = principal_components(rows), PCA().fit(rows)
    np.testing.assert_allclose(found.mean, expected.mean_, atol=1e-5)
    np.testing.assert_allclose(found.variances, expected.explained_variance_, rtol=1e-5)
    shares = np.cumsum(expected.explained_variance_ratio_)
    np.testing.assert_allclose(found.explained, shares, atol=1e-5)
    signs = np.sign((found.axes * expected.components_).sum(axis=1))
    np.testing.assert_allclose(found.axes, expected.components_ * signs[:, None], atol=1e-5)


def test_components_need_latents():
    """At least two, of numbers."""
    with pytest.raises(
        ValueError, match="rows must be at least 2 and finite, got 1; pass a larger"
    ):
        principal_components(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="got 3 with NaN or infinity; pass"):
        principal_components(np.full((3, 4), np.nan))


# --- ways


@pytest.mark.parametrize("way", WAYS)
def test_the_ends_of_a_way_are_the_pictures_own(way):
    """Bit for bit, whatever the scale."""
    lab = Lab.of(tiny.vae(scaling_factor=1 / 3, shift_factor=1e6))
    first, last = noise(1, 4, 3, 5), noise(1, 4, 3, 5, seed=1)
    found = list(interpolated(lab, first, last, 5, way))
    assert len(found) == 5
    assert torch.equal(found[0], first)
    assert torch.equal(found[-1], last)


def test_the_middle_of_a_way(lab):
    """Straight, the mean; along the sphere, as long as the ends, which are at right angles."""
    ends = torch.zeros(2, 1, 4, 1, 1)
    ends[0, 0, 0], ends[1, 0, 1] = 3, 3
    first, last = map(lab.from_sampler, ends)
    middle = [lab.to_sampler([*interpolated(lab, first, last, 3, w)][1]) for w in WAYS]
    torch.testing.assert_close(middle[0].flatten(), torch.tensor([1.5, 1.5, 0, 0]))
    torch.testing.assert_close(middle[1].flatten(), torch.tensor([4.5, 4.5, 0, 0]).sqrt())


def test_the_way_to_the_same_place_is_short(lab):
    """Where a sphere knows no direction, nothing becomes NaN."""
    latents = noise(1, 4, 2, 2)
    for found in interpolated(lab, latents, latents, 4, "spherical"):
        torch.testing.assert_close(found, latents)
    with pytest.raises(
        ValueError, match=r"last must be \(1, 4, 2, 2\) like first.* got \(1, 4, 2, 3"
    ):
        list(interpolated(lab, latents, noise(1, 4, 2, 3), 4, "linear"))


def test_walks(lab):
    """One channel moves by its deviations, also of clips; no step leaves everything as it is."""
    clip, direction = noise(1, 4, 2, 3, 3), np.array([0.0, 0, 0, 1])
    moved = lab.to_sampler(walked(lab, clip, direction, 2.0)) - lab.to_sampler(clip)
    expected = torch.tensor([0.0, 0, 0, 2])[:, None, None, None].expand_as(clip[0])
    torch.testing.assert_close(moved[0], expected, atol=1e-5, rtol=0)
    assert walked(lab, clip, direction, 0.0) is clip


# --- colour


def test_contributions(lab):
    """The table's own rows, times the deviation of the channel."""
    table = np.array([[0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.05], [0.01, 0.02, 0.03]])
    levels, shown = contributions(lab, Factors.from_table(table, name="mine"), (-1.0, 0.0))
    deviations = np.array([2.0, 0.5, 1, 4])
    np.testing.assert_allclose(levels, table * deviations[:, None] * 127.5, atol=1e-3)
    centre = np.array([1.0, -2, 3, 0]) @ table
    colour = np.rint((centre - table[0] * 2 + 1) * 127.5)
    assert shown.shape == (4, 2, 3)
    assert np.abs(shown[0, 0] - colour).max() <= 1


def test_a_map_is_fitted_where_none_is_known():
    """It draws well where colours are what the latents are."""
    vae = tiny.working_vae(scaling_factor=0.77)
    assert factors.find(vae) is None
    found = colour_map(Lab.of(vae))
    assert found.name == "fitted"
    assert float(found.provenance.split(", ")[1].split()[0]) > 20
    assert colour_map(Lab.of(tiny.vae())).name == "sd1"


# --- tokens


def hand_counted(vae, latents):
    """Tokens by the VAE's own quantiser, counted one by one."""
    with torch.no_grad():
        ids = vae.quantize(latents)[2][2].flatten().tolist()
    return [ids.count(entry) for entry in range(16)], ids


def test_tokens_are_counted():
    """As the VAE's own quantiser finds them; entropy by hand."""
    lab = Lab.of(random_vae("VQModel"))
    latents = lab.encode(noise(1, 3, 16, 24))
    usage = Usage.of(lab.vae, latents)
    counts, ids = hand_counted(lab.vae, latents)
    assert usage.counts.tolist() == counts
    assert usage.ids.flatten().tolist() == ids
    assert usage.dead == counts.count(0)
    shares = [count / 96 for count in counts if count]
    assert usage.perplexity == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares)))


def test_few_entries():
    """Each latent becomes the nearest of the most used; with all of them, its own."""
    lab = Lab.of(random_vae("VQModel"))
    latents = lab.encode(noise(1, 3, 16, 24))
    usage = Usage.of(lab.vae, latents)
    with torch.no_grad():
        torch.testing.assert_close(usage.with_most_used(latents, 16), lab.vae.quantize(latents)[0])
    one = usage.with_most_used(latents, 1)
    assert (one == usage.codebook[usage.counts.argmax()][:, None, None]).all()


def test_more_entries_draw_better():
    """Of a VAE whose entries are colours."""
    lab = Lab.of(tiny.working_vq())
    picture = lab.picture(scene())
    latents = lab.encode(picture)
    usage = Usage.of(lab.vae, latents)
    drawn = [lab.decode(usage.with_most_used(latents, count)) for count in (1, 4, 16)]
    fits = [psnr(one, picture) for one in drawn]
    assert fits == sorted(fits)
    assert fits[-1] > fits[0] + 5


def test_tokens_of_a_scalar_quantiser():
    """Of VidTok's clips: its grid is the codebook."""
    vae = autoencoder("AutoencoderVidTok:fsq")
    clip = noise(1, 3, 5, 32, 32)
    with torch.no_grad():
        latents, ids = vae.encode(clip)
    usage = Usage.of(vae, latents)
    assert len(usage.counts) == 8**4
    assert np.array_equal(usage.ids.ravel(), ids.flatten().numpy())


def test_levels_of_a_scalar_quantiser():
    """Each number's levels are counted by themselves; a learned codebook has none."""
    vae = autoencoder("AutoencoderVidTok:fsq")
    with torch.no_grad():
        latents, _ = vae.encode(noise(1, 3, 5, 32, 32))
    usage = Usage.of(vae, latents)
    entries = usage.codebook[torch.as_tensor(usage.ids).flatten()]
    assert [len(levels) for levels in usage.levels] == [8, 8, 8, 8]
    for number, levels in enumerate(usage.levels):
        by_hand = collections.Counter(entries[:, number].tolist())
        assert {level: count for level, count in levels.items() if count} == by_hand
    assert Usage.of(tiny.working_vq(), noise(1, 4, 2, 2)).levels == []


def test_the_nearest_pictures(lab):
    """The first comes first, then those that are like it, whatever their size."""
    light, dark = torch.full((1, 4, 8, 8), 1.0), torch.full((1, 4, 8, 8), -1.0)
    like = torch.full((1, 4, 16, 12), 0.9)
    assert nearest(lab, [light, dark, like], 2) == [0, 2]
    assert nearest(lab, [dark, light, like, dark], 3) == [0, 3, 2]


def test_not_every_vae_has_tokens(lab):
    """The message says what has some."""
    with pytest.raises(
        TypeError, match="vae must have a codebook, as a VQModel has, got AutoencoderKL"
    ):
        Usage.of(lab.vae, noise(1, 4, 2, 2))
