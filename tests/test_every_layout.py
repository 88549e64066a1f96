"""Every layout row, on real tiny pipelines: latents, x0, bit-identity, and what is left behind."""

import contextlib
import functools
import inspect
import itertools
import random
import types
import warnings

import numpy as np
import pytest
import torch
import zoo
from test_promises import assert_same

from sd_progress.boundary import PreviewWarning
from sd_progress.callback import PreviewCallback
from sd_progress.layouts import ROWS, default_registry
from sd_progress.tap import schedulers_of
from sd_progress.x0 import StepCall, has_x0, predict_x0

CASES = zoo.load_families()
SHOWN = [name for name in CASES if name != "ShapEPipeline"]
TESTED_ELSEWHERE = {"StableDiffusionXLPipeline", "StableDiffusion3Pipeline"}


@pytest.fixture(autouse=True)
def _strangers_may_warn():
    """Pipelines, and models on a CPU, have something to say; previews only of unknown VAEs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PreviewWarning)
        warnings.filterwarnings("ignore", "vae must be one whose latents", PreviewWarning)
        yield


def preview_arguments(pipe, callback):
    """How a pipeline is given a callback; older and newer names; none where it takes none."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    names = ("callback_on_step_end", "callback")
    return next(({name: callback} for name in names if name in parameters), {})


def previewed(case, prepare=None, **options):
    """The frames of a run in a `with` block, its output, and what it gave its decoder."""
    frames = []
    options = {"keep_latents": True, "on_error": "raise", **options}
    with PreviewCallback(case.pipe, frames.append, **options) as preview:
        for scheduler in schedulers_of(case.pipe) if prepare else ():
            prepare(scheduler)
        output, decodes = zoo.run(case, **preview_arguments(case.pipe, preview))
    return frames, output, decodes


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", SHOWN)
def test_last_latents_are_what_the_decoder_is_given(name, guidance):
    """The invariant: the last noisy frame's latents equal the pipeline's own `vae.decode` input.

    In pixel space, where there is none, its picture is the pipeline's own.
    """
    case = zoo.build(name, guidance=guidance)
    frames, output, decodes = previewed(case, source="noisy")
    assert frames[-1].layout not in ("", "inferred")
    if decodes:
        torch.testing.assert_close(frames[-1].latents, case.decoded(decodes), rtol=1e-6, atol=1e-6)
    else:
        pictures = (np.asarray(output[0]) * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(frames[-1].images, pictures)


def test_every_row_has_a_case():
    """No layout is without a pipeline that proves it."""
    names = {name.partition(":")[0] for name in SHOWN} | TESTED_ELSEWHERE
    assert [row.name for row in ROWS if row.pipelines.isdisjoint(names)] == []


def test_a_pipeline_that_makes_no_pictures_says_why():
    """A 3-D scene must be rendered: one warning with the reason, and no frame."""
    frames, case = [], zoo.build("ShapEPipeline")
    with (
        pytest.warns(PreviewWarning, match="nothing is shown: its latents are a 3-D scene"),
        PreviewCallback(case.pipe, frames.append),
    ):
        zoo.run(case)
    assert frames == []


def make_denoiser_know(scheduler):
    """From now on `scheduler` is stepped as if the denoiser knew x0, the same for all of a shape.

    Put around the preview's own wrapper, as a denoiser would be; copies know it, too.
    """
    if not has_x0(scheduler):
        return
    plain, heard = type(scheduler).step, scheduler.step

    @functools.wraps(plain)
    def step(self, *args, **kwargs):
        bound = inspect.signature(plain).bind(self, *args, **kwargs)
        if getattr(self, "step_index", 0) is None:
            self._init_step_index(bound.arguments["timestep"])
        bound.arguments["model_output"] = knowing(self, bound.arguments)
        return types.MethodType(heard.__func__, self)(*bound.args[1:], **bound.kwargs)

    scheduler.step = types.MethodType(step, scheduler)


def knowing(scheduler, arguments):
    """The model output by which x0 is what was decided; x0 is affine in it."""

    def x0(model_output):
        given = {**arguments, "model_output": model_output}
        is_first_order = bool(getattr(scheduler, "state_in_first_order", True))
        index = getattr(scheduler, "step_index", None)
        return predict_x0(StepCall(scheduler, given, index, is_first_order, None))

    output = arguments["model_output"]
    offset = x0(torch.zeros_like(output))
    gain = x0(torch.ones_like(output)) - offset
    decided = torch.rand(offset.shape, generator=zoo.generator(offset.ndim)).to(offset) * 2 - 1
    wanted = torch.where(gain.abs() > 1e-9, (decided - offset) / gain, 0.0).to(output)
    if output.shape == wanted.shape:
        return wanted
    return torch.cat([wanted, output[:, wanted.shape[1] :]], dim=1)  # a learned variance


@pytest.mark.parametrize("name", SHOWN)
def test_denoised_latents_are_what_the_denoiser_knows(name):
    """With a denoiser that knows x0, the last denoised frames have what is decoded at the end."""
    case = zoo.build(name)
    frames, _, decodes = previewed(case, prepare=make_denoiser_know)
    assert frames[-1].source == "denoised" or not case.settled
    if decodes and case.settled:
        for frame in frames[-case.settled :]:
            torch.testing.assert_close(
                frame.latents, case.decoded(decodes), rtol=1e-4, atol=case.tolerance
            )


@pytest.mark.parametrize("name", [*SHOWN[::6], *(x for x in SHOWN if "Inpaint" in x)])
def test_x0_of_an_accelerator_is_the_same(name, monkeypatch):
    """There it is computed later, by the worker, of copies: here on the CPU for once, too."""
    known, _, _ = previewed(zoo.build(name))
    monkeypatch.setattr("sd_progress.run._is_better_later", lambda call: has_x0(call.scheduler))
    frames, _, _ = previewed(zoo.build(name))
    for frame, same in zip(frames, known, strict=True):
        assert frame.source == same.source
        torch.testing.assert_close(frame.latents, same.latents)


def outcome(name, with_preview):
    """All that a run leaves behind: its output, random state, and the state of its parts."""
    case = zoo.build(name)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    if with_preview:
        frames = []
        options = {"vae_every": 2} if case.decoder and has_pictures(name) else {}
        with PreviewCallback(case.pipe, frames.append, source="both", **options) as preview:
            output, decodes = zoo.run(case, **preview_arguments(case.pipe, preview))
        assert frames
    else:
        output, decodes = zoo.run(case)
    random_state = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    return [values_of(output), decodes, random_state, attributes_of(case.pipe)]


def has_pictures(name):
    """Whether a full decode makes pictures; of sound it makes none."""
    row = default_registry().row_for([name.partition(":")[0]])
    return row is None or row.shows != "audio"


def values_of(output):
    """A pipeline's output as plain containers."""
    return list(output.values()) if isinstance(output, dict) else output


def attributes_of(pipe):
    """Names of the attributes, and numbers of the hooks, of a pipeline and of all its parts."""
    owners = {"pipe": pipe, **{f"pipe.{name}": part for name, part in vars(pipe).items()}}
    modules = {
        f"{name}.{path}": module
        for name, part in owners.items()
        if isinstance(part, torch.nn.Module)
        for path, module in part.named_modules()
    }
    return {
        name: sorted(
            (key, len(value) if isinstance(value, dict) and "_hooks" in key else -1)
            for key, value in vars(owner).items()
        )
        for name, owner in {**owners, **modules}.items()
        if hasattr(owner, "__dict__")
    }


@pytest.mark.parametrize("name", SHOWN)
def test_run_is_bit_identical(name):
    """Output, decoder inputs, random state, attributes and hooks are as without a preview."""
    assert_same(outcome(name, with_preview=False), outcome(name, with_preview=True))


class FailureError(Exception):
    """What happens to a run in these tests."""


def at_each_step(pipe, act):
    """Have `act(number)` called before each step, 1 first; returns what takes it away again."""
    stack, steps = contextlib.ExitStack(), itertools.count(1)
    for scheduler in schedulers_of(pipe):
        stack.callback(put_around(scheduler, lambda: act(next(steps))))
    return stack


def put_around(scheduler, act):
    """Wrap `step`, around a preview's own wrapper, as the denoiser that comes before it."""
    plain, heard, shadowed = type(scheduler).step, scheduler.step, vars(scheduler).get("step")

    @functools.wraps(plain)
    def step(self, *args, **kwargs):
        act()
        return types.MethodType(heard.__func__, self)(*args, **kwargs)

    scheduler.step = types.MethodType(step, scheduler)

    def undo():
        if shadowed is None:
            del scheduler.step
        else:
            scheduler.step = shadowed

    return undo


def shadows(pipe):
    """The methods of a pipeline and its schedulers that are shadowed by attributes."""
    owners = [pipe, *schedulers_of(pipe)]
    return [
        name
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, types.MethodType)
    ]


@pytest.mark.parametrize("error", [FailureError, KeyboardInterrupt], ids=["failed", "interrupted"])
@pytest.mark.parametrize("name", SHOWN)
def test_a_run_that_ends_early_leaves_everything_as_it_was(name, error):
    """The error is raised; all attributes and hooks are as after the same run without a preview."""

    def fail(number):
        if number == 2:
            raise error

    plain, case = zoo.build(name), zoo.build(name)
    with pytest.raises(error), at_each_step(plain.pipe, fail):
        zoo.run(plain)
    with (
        pytest.raises(error),
        PreviewCallback(case.pipe, print_nothing) as preview,
        at_each_step(case.pipe, fail),
    ):
        zoo.run(case, **preview_arguments(case.pipe, preview))
    assert attributes_of(case.pipe) == attributes_of(plain.pipe)


def print_nothing(frame):
    """A target."""


@pytest.mark.parametrize("name", SHOWN)
def test_every_run_can_be_cancelled(name):
    """Also where `_interrupt` is ignored: it ends early, all is undone, the next run is whole."""
    case, steps = zoo.build(name), []

    def count(number):
        steps.append(number)

    def cancel(number):
        count(number)
        preview.cancel()

    with PreviewCallback(case.pipe, print_nothing) as preview, at_each_step(case.pipe, cancel):
        zoo.run(case, **preview_arguments(case.pipe, preview))
    after, cancelled, steps = attributes_of(case.pipe), steps, []
    with at_each_step(case.pipe, count):
        zoo.run(case)
    assert len(cancelled) < len(steps)
    whole = attributes_of(case.pipe)
    assert [owner for owner in after if not set(after[owner]) <= set(whole[owner])] == []


@pytest.mark.parametrize("name", SHOWN)
def test_every_run_can_be_stopped(name):
    """What it then finishes is what the model expected at that step, without its noise.

    Where it cannot finish early, the VAE has decoded that for the last frame.
    """
    case, steps, frames, decodes = zoo.build(name), [], [], []

    def stop(number):
        steps.append(number)
        preview.stop()

    with (
        PreviewCallback(case.pipe, frames.append, keep_latents=True, on_error="raise") as preview,
        at_each_step(case.pipe, stop),
    ):
        _, decodes = zoo.run(case, **preview_arguments(case.pipe, preview))
    stopped, steps = len(steps), []
    with at_each_step(case.pipe, steps.append):
        zoo.run(case)
    assert stopped < len(steps)
    leaves_frames_out = name == "ChronoEditPipeline:shortened"  # at a step that does not come
    if decodes and frames[-1].decoder != "vae" and not leaves_frames_out:
        torch.testing.assert_close(frames[-1].latents, case.decoded(decodes), rtol=1e-2, atol=1e-2)
