"""Faults planted in the demo model's VAE, and each called by its name."""

import copy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from autoencoders import autoencoder
from diffusers import AutoencoderKL
from PIL import Image
from test_latent_space import noise, without_encoder

from sd_progress import demo_model_path
from sd_progress.diagnosis import diagnosed, diagnosed_latents
from sd_progress.lab import Lab, round_trip

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_scenes import draw, random_scene

SWAP = [2, 1, 0]
SMALL = draw(random_scene(0)).resize((64, 64))  # half precision is slow on a CPU


@pytest.fixture(scope="module")
def demo():
    """The demo model's VAE; copied before it is changed."""
    return AutoencoderKL.from_pretrained(demo_model_path(), subfolder="vae").eval()


def faults(vae, image=None):
    """What is found in a round trip of a landscape."""
    lab = Lab.of(vae)
    found = diagnosed(lab, round_trip(lab, lab.picture(image or draw(random_scene(0)))))
    return {finding.fault: finding.text for finding in found}


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_wrong_with_the_demo_model(demo, seed):
    """Whatever the landscape."""
    assert not faults(demo, draw(random_scene(seed)))


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (64, 64), "teal"), draw(random_scene(3)).convert("L")]
)
def test_nothing_is_wrong_with_dull_pictures(demo, image):
    """One colour, and none: they are no reason to doubt a VAE."""
    assert not faults(demo, image)


def test_bfloat16_is_no_fault(demo):
    """Nor is float16 where it does not overflow."""
    assert not faults(copy.deepcopy(demo).bfloat16(), SMALL)
    assert not faults(copy.deepcopy(demo).half(), SMALL)


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_scaling_factor_off_by_two(demo, factor, seed):
    """What would fit is told, to a quarter."""
    vae = copy.deepcopy(demo)
    vae.register_to_config(scaling_factor=0.7545 * factor)
    found = faults(vae, draw(random_scene(seed)))
    assert list(found) == ["scaling-factor"]
    told = float(found["scaling-factor"].split("about ")[-1].split()[0])
    assert told == pytest.approx(0.7545, rel=0.25)


def test_grey_pictures_tell_nothing_of_scale(demo):
    """Where there is no colour, some channels are idle."""
    vae = copy.deepcopy(demo)
    vae.register_to_config(scaling_factor=0.7545 / 2)
    assert not faults(vae, draw(random_scene(3)).convert("L"))


def test_wrong_statistics(demo):
    """Of a VAE that states means and deviations."""
    vae = copy.deepcopy(demo)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[4.0] * 4)
    assert "latents_mean and latents_std; correct" in faults(vae)["scaling-factor"]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("seed", range(3))
def test_swapped_colours(demo, part, seed):
    """In whichever half; the order is told."""
    vae = copy.deepcopy(demo)
    with torch.no_grad():
        if part == "encoder":
            vae.encoder.conv_in.weight.copy_(vae.encoder.conv_in.weight[:, SWAP])
        else:
            for parameter in vae.decoder.conv_out.parameters():
                parameter.copy_(parameter[SWAP])
    found = faults(vae, draw(random_scene(seed)))
    assert list(found) == ["swapped-channels"]
    assert "in the order RGB, got BGR" in found["swapped-channels"]


def test_a_weight_that_is_no_number(demo):
    """It is named, with how many there are in it, wherever it is."""
    vae = copy.deepcopy(demo)
    with torch.no_grad():
        vae.decoder.conv_out.bias[1] = float("nan")
    found = faults(vae)
    assert list(found) == ["nan-weight"]
    assert "in decoder.conv_out.bias (1); the file is damaged" in found["nan-weight"]


def test_a_weight_that_is_too_large_for_float16(demo):
    """The message says how to tell it from one that is no number."""
    vae = copy.deepcopy(demo)
    with torch.no_grad():
        vae.decoder.conv_in.weight[0, 0, 0, 0] = 1e5
    found = faults(vae.half(), SMALL)
    assert list(found) == ["nan-weight"]
    assert found["nan-weight"].endswith("float32 shows that they are only too large for float16")


def overflowing(demo):
    """The same VAE in float32: what one layer makes too large, the normalisation behind undoes."""
    vae = copy.deepcopy(demo)
    with torch.no_grad():
        for parameter in vae.decoder.mid_block.resnets[0].conv1.parameters():
            parameter.mul_(3e4)
    return vae


def test_float16_that_overflows(demo):
    """The layer is named, and what helps; in float32 and bfloat16 nothing is wrong."""
    vae = overflowing(demo)
    assert not faults(vae)
    assert not faults(copy.deepcopy(vae).bfloat16(), SMALL)
    found = faults(vae.half(), SMALL)
    assert list(found) == ["fp16-overflow"]
    assert "first in decoder.mid_block.resnets.0.conv1, in float16" in found["fp16-overflow"]
    assert "bfloat16 or float32, or set force_upcast" in found["fp16-overflow"]


def test_force_upcast_helps(demo):
    """As the message says."""
    vae = overflowing(demo).half()
    vae.register_to_config(force_upcast=True)
    assert not faults(vae)


def test_infinity_in_float32(demo):
    """Another fault, because another number format does not help."""
    vae = copy.deepcopy(demo)
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e38)
    assert list(faults(vae)) == ["not-finite"]


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan", "VQModel"])
def test_untrained(name):
    """Random weights draw no picture."""
    assert list(faults(autoencoder(name), draw(random_scene(0)).resize((32, 32)))) == ["untrained"]


# --- latents from elsewhere


def latents_of(vae, seed=0):
    """Of a landscape."""
    lab = Lab.of(vae)
    return lab.encode(lab.picture(draw(random_scene(seed))))


@pytest.mark.parametrize("seed", range(3))
def test_its_own_latents(demo, seed):
    """They come back from decoding and encoding."""
    assert not diagnosed_latents(Lab.of(demo), latents_of(demo, seed))


@pytest.mark.parametrize("seed", range(3))
def test_latents_of_another_vae(demo, seed):
    """As many channels, and another meaning."""
    lab = Lab.of(demo)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    turned = torch.einsum("oc,bchw->bohw", turn, latents_of(demo, seed))
    for latents in (latents_of(tiny.working_vae(), seed), turned):
        found = diagnosed_latents(lab, latents)
        assert [finding.fault for finding in found] == ["other-latents"]
        assert "decode them with the VAE that made them" in found[0].text


def test_latents_of_another_shape(demo):
    """Sixteen channels are none of four; the message says what is expected."""
    (found,) = diagnosed_latents(Lab.of(demo), noise(1, 16, 8, 8))
    assert found.fault == "other-latents"
    assert "must be (1, C, h, w) with C = 4 for this VAE, got (1, 16, 8, 8)" in found.text


def test_latents_in_the_other_space(demo):
    """If they look like its own there, that is told."""
    vae = copy.deepcopy(demo)
    vae.register_to_config(scaling_factor=0.2)
    lab, latents = Lab.of(vae), latents_of(demo)
    (found,) = diagnosed_latents(lab, lab.to_sampler(latents), latents)
    assert "they do look like its own in the other space: pass --space" in found.text


def test_latents_that_are_no_numbers(demo):
    """They are not decoded to see."""
    (found,) = diagnosed_latents(Lab.of(demo), noise(1, 4, 8, 8) * float("nan"))
    assert found.fault == "not-finite"


def test_a_vae_without_an_encoder_cannot_tell(demo):
    """It says nothing rather than something wrong."""
    vae = without_encoder(copy.deepcopy(demo))
    assert not diagnosed_latents(Lab.of(vae), noise(1, 4, 8, 8))
