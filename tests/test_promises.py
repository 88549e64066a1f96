"""The first promise: a run is bit-identical with and without a preview."""

import random

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline

from sd_progress.callback import PreviewCallback

SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("LMSDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    ("DEISMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
]


def seed_everything():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def outcome(make_pipe, call, arguments, with_preview, tmp_path):
    """All that a run leaves behind: its latents and pictures, and the state of everything."""
    pipe = make_pipe()
    frames = []
    preview = {}
    if with_preview:
        targets = (frames.append, tmp_path / "run.gif", tmp_path / "steps/")
        callback = PreviewCallback(pipe, *targets, **arguments)
        preview = {"callback_on_step_end": callback}
    seed_everything()
    latents = pipe(**{**call(pipe), "generator": None, "output_type": "latent"}, **preview).images
    images = pipe(**{**call(pipe), "generator": None}, **preview).images
    random_state = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    state = (random_state, vars(pipe.scheduler), pipe.vae.dtype, pipe.vae.state_dict(), vars(pipe))
    return latents, images, state, frames


def assert_same(a, b):
    """Equal to the bit, through containers."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        [assert_same(a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        [assert_same(x, y) for x, y in zip(a, b, strict=True)]
    elif isinstance(a, int | float | str | torch.dtype | None):
        assert a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
def test_run_is_bit_identical(name, config, dtype, tmp_path):
    """Latents, pictures, random state, scheduler and VAE are as without a preview."""

    def make_pipe():
        scheduler = getattr(diffusers, name)(**tiny.BETAS, **config)
        return tiny.sd(scheduler=scheduler, dtype=dtype)

    def call(pipe):
        return tiny.sd_call(pipe, batch=2, height=16, width=24)

    arguments = {"source": "both", "vae_every": 2, "initial": True, "final": True}
    plain = outcome(make_pipe, call, {}, False, tmp_path)
    watched = outcome(make_pipe, call, arguments, True, tmp_path)
    assert_same(plain[:3], watched[:3])
    assert {frame.decoder for frame in watched[3]} == {
        "linear:sd1",
        "linear+refit:sd1",
        "vae",
        "pipeline",
    }
    assert {frame.source for frame in watched[3]} == {"noisy", "both", "final"}


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler"])
def test_flow_run_is_bit_identical(name, tmp_path):
    """The same for Stable Diffusion 3."""

    def make_pipe():
        return tiny.sd3(StableDiffusion3Pipeline, scheduler=getattr(diffusers, name)())

    def call(pipe):
        return tiny.sd3_call(pipe, height=16, width=24)

    plain = outcome(make_pipe, call, {}, False, tmp_path)
    watched = outcome(make_pipe, call, {"vae_every": 2}, True, tmp_path)
    assert_same(plain[:3], watched[:3])
    assert {frame.source for frame in watched[3]} == {"denoised"}


def test_fp16_vae_that_must_be_upcast_is_left_in_fp16(tmp_path):
    """SDXL decides by the VAE's dtype after the loop; a decode in between must not show."""

    def make_pipe():
        return tiny.sdxl(dtype=torch.float16)

    def call(pipe):
        return tiny.sdxl_call(pipe, height=16, width=24)

    plain = outcome(make_pipe, call, {}, False, tmp_path)
    watched = outcome(make_pipe, call, {"vae_every": 1}, True, tmp_path)
    assert_same(plain[:3], watched[:3])
    assert watched[2][2] == torch.float16
    assert {frame.decoder for frame in watched[3]} == {"vae"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_calibrating_before_the_run_does_not_show(dtype):
    """The VAE is run when the callback is made; random state, weights and pictures are as ever."""

    def ended(**options):
        pipe, frames = tiny.sd(vae=tiny.working_vae(), dtype=dtype), []
        seed_everything()
        given = PreviewCallback(pipe, frames.append, **options) if options else None
        call = {**tiny.sd_call(pipe, height=32, width=48), "generator": None}
        images = pipe(**call, callback_on_step_end=given).images
        random_state = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        return [images, random_state, pipe.vae.state_dict(), pipe.vae.dtype, vars(pipe)], frames

    plain, _ = ended()
    watched, frames = ended(calibrate="always")
    assert_same(plain, watched)
    assert {frame.decoder for frame in frames} == {"linear:sd1-calibrated"}


def test_the_pipeline_is_as_it_was_found():
    """During the run two methods are shadowed; before a second run and after it, none is."""
    pipe = tiny.sd()
    before = set(vars(pipe)), set(vars(pipe.scheduler))
    seen = []
    callback = PreviewCallback(pipe, lambda frame: seen.append("step" in vars(pipe.scheduler)))
    for _ in range(2):
        pipe(**tiny.sd_call(pipe, height=16, width=16), callback_on_step_end=callback)
        after = set(vars(pipe)) - {"_callback_tensor_inputs"}, set(vars(pipe.scheduler))
        assert "step" not in after[1]
        assert "maybe_free_model_hooks" not in after[0] - before[0]
    assert any(seen)


def test_a_callback_that_never_ran_leaves_no_trace():
    """Deleted or closed, it takes its wrapper away."""
    pipe = tiny.sd()
    callback = PreviewCallback(pipe, print)
    assert "step" in vars(pipe.scheduler)
    del callback
    assert "step" not in vars(pipe.scheduler)
