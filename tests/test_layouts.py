"""The invariant: at the last step, the frame's noisy latents are what `vae.decode` is given."""

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sd_progress.callback import PreviewCallback
from sd_progress.layouts import layout_for

SIZE = {"height": 16, "width": 24}
STATISTICS = {
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [1.5, 0.5, 2.0, 0.8],
}


def picture(mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (16, 24, len(mode)), np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def frames_and_decoded(pipe, **call):
    """Frames of a noisy preview, and what the pipeline itself gave `vae.decode` at the end."""
    decoded, frames = [], []
    decode = pipe.vae.decode

    def record(z, *args, **kwargs):
        decoded.append(z.clone())
        return decode(z, *args, **kwargs)

    pipe.vae.decode = record
    options = {"source": "noisy", "keep_latents": True}
    callback = PreviewCallback(pipe, frames.append, **options)
    pipe(**call, callback_on_step_end=callback)
    (last,) = decoded
    return frames, last


def assert_invariant(pipe, **call):
    frames, decoded = frames_and_decoded(pipe, **call)
    assert frames[-1].is_last
    assert frames[-1].layout != "inferred"
    torch.testing.assert_close(frames[-1].latents, decoded, rtol=0, atol=0)


def inpainting(mask_seed=1):
    return {"image": picture(), "mask_image": picture("L", mask_seed), "strength": 0.8}


SD = {
    "StableDiffusionPipeline": {},
    "StableDiffusionImg2ImgPipeline": {"image": picture(), "strength": 0.8},
    "StableDiffusionInpaintPipeline": inpainting(),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("name", SD)
def test_stable_diffusion(name, guidance_scale, batch):
    """Stable Diffusion 1 and its kin scale."""
    pipe = tiny.sd(getattr(diffusers, name))
    size = SIZE if name != "StableDiffusionImg2ImgPipeline" else {}
    call = tiny.sd_call(pipe, batch=batch, guidance_scale=guidance_scale)
    assert_invariant(pipe, **call, **SD[name], **size, num_images_per_prompt=2)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("StableDiffusionControlNetPipeline", {"image": picture()}),
        (
            "StableDiffusionControlNetImg2ImgPipeline",
            {"image": picture(), "control_image": picture(seed=2), "strength": 0.8},
        ),
        (
            "StableDiffusionControlNetInpaintPipeline",
            {**inpainting(), "control_image": picture(seed=2)},
        ),
    ],
)
def test_stable_diffusion_controlnet(name, arguments):
    """ControlNets change nothing of that."""
    pipe = tiny.sd(getattr(diffusers, name), controlnet=tiny.controlnet())
    assert_invariant(pipe, **tiny.sd_call(pipe, **SIZE), **arguments)


SDXL = {
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLImg2ImgPipeline": {"image": picture(), "strength": 0.8},
    "StableDiffusionXLInpaintPipeline": inpainting(),
    "StableDiffusionXLControlNetPipeline": {"image": picture()},
}


@pytest.mark.parametrize("statistics", [{}, STATISTICS], ids=["scaled", "standardised"])
@pytest.mark.parametrize("name", SDXL)
def test_stable_diffusion_xl(name, statistics):
    """Stable Diffusion XL standardises where its VAE has statistics, and scales where not."""
    extra = {}
    if "ControlNet" in name:
        config = tiny.sdxl().unet.config
        names = [key for key in config if key.startswith(("addition", "projection"))]
        extra["controlnet"] = tiny.controlnet(**{key: config[key] for key in names})
    vae = tiny.vae(scaling_factor=0.13025, **statistics)
    pipe = tiny.sdxl(getattr(diffusers, name), vae=vae, **extra)
    size = SIZE if name != "StableDiffusionXLImg2ImgPipeline" else {}
    assert_invariant(pipe, **tiny.sdxl_call(pipe, batch=2, **size), **SDXL[name])


@pytest.mark.parametrize("statistics", [{}, STATISTICS], ids=["scaled", "standardised"])
def test_stable_diffusion_xl_controlnet_inpaint_ignores_statistics(statistics):
    """One SDXL pipeline ignores its VAE's statistics, and so does its preview."""
    config = tiny.sdxl().unet.config
    names = [key for key in config if key.startswith(("addition", "projection"))]
    controlnet = tiny.controlnet(**{key: config[key] for key in names})
    vae = tiny.vae(scaling_factor=0.13025, **statistics)
    cls = diffusers.StableDiffusionXLControlNetInpaintPipeline
    pipe = tiny.sdxl(cls, vae=vae, controlnet=controlnet)
    arguments = {**inpainting(), "control_image": picture(seed=2)}
    assert_invariant(pipe, **tiny.sdxl_call(pipe, **SIZE), **arguments)


SD3 = {
    "StableDiffusion3Pipeline": {},
    "StableDiffusion3Img2ImgPipeline": {"image": picture(), "strength": 0.8},
    "StableDiffusion3InpaintPipeline": inpainting(),
}


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("name", SD3)
def test_stable_diffusion_3(name, guidance_scale):
    """Stable Diffusion 3 scales and shifts; its inpainting decodes without the shift."""
    pipe = tiny.sd3(getattr(diffusers, name))
    call = tiny.sd3_call(pipe, batch=2, guidance_scale=guidance_scale, **SIZE)
    assert_invariant(pipe, **call, **SD3[name])


def test_stable_diffusion_3_controlnet():
    """And so it does with a ControlNet."""
    cls = diffusers.StableDiffusion3ControlNetPipeline
    pipe = tiny.sd3(cls, controlnet=tiny.sd3_controlnet())
    assert_invariant(pipe, **tiny.sd3_call(pipe, **SIZE), control_image=picture())


def test_a_derived_pipeline_is_laid_out_as_its_parent():
    """A community pipeline that derives from a known one needs no row."""

    class Mine(diffusers.StableDiffusion3Pipeline):
        """With something of its own."""

    assert layout_for(tiny.sd3(Mine)).name == "shifted"


def test_an_unknown_pipeline_is_inferred():
    """A class that nobody knows goes by its VAE's config, and the layout says so."""

    class Pipe:
        """Has a VAE and nothing else."""

        vae = tiny.vae(scaling_factor=2.0, shift_factor=0.5)

    layout = layout_for(Pipe())
    assert layout.name == "inferred"
    assert torch.equal(layout.to_vae(torch.ones(1, 4, 2, 3)), torch.ones(1, 4, 2, 3))


def test_other_shapes_are_refused():
    """Packed latents and other channel counts are an error that names the pipeline."""
    layout = layout_for(tiny.sd())
    with pytest.raises(ValueError, match=r"latents must become \(B, 4, h, w\) for StableDiffusi"):
        layout.to_vae(torch.ones(1, 6, 64))
    with pytest.raises(ValueError, match=r"got \(1, 16, 2, 2\), which the layout 'scaled'"):
        layout.to_vae(torch.ones(1, 16, 2, 2))
