"""The kinds of pipelines and runs: without a callback, combined, modular, unknown, cancelled."""

import queue
import subprocess
import sys
import threading
import warnings

import diffusers
import numpy as np
import pytest
import tiny
import torch
import zoo
from diffusers.callbacks import MultiPipelineCallbacks
from PIL import Image
from test_every_layout import at_each_step, shadows
from test_promises import assert_same

from sd_progress import layouts
from sd_progress.boundary import PreviewWarning
from sd_progress.callback import PreviewCallback, RunCancelled

SIZE = {"height": 16, "width": 24}
zoo.load_families()


@pytest.fixture(autouse=True)
def _strangers_may_warn():
    """Pipelines, and models on a CPU, have something to say; previews only of unknown VAEs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PreviewWarning)
        warnings.filterwarnings("ignore", "vae must be one whose latents", PreviewWarning)
        yield


def frames_of(pipe, call, given=None, **options):
    """The frames of a run in a `with` block, to which `given(preview)` is passed, if anything."""
    frames = []
    with PreviewCallback(pipe, frames.append, keep_latents=True, **options) as preview:
        arguments = {"callback_on_step_end": given(preview)} if given else {}
        pipe(**call, **arguments)
    return frames


def assert_equal_frames(some, others):
    """The same steps, the same latents, the same pixels."""
    assert [frame.step_index for frame in some] == [frame.step_index for frame in others]
    for one, other in zip(some, others, strict=True):
        assert (one.source, one.timestep, one.num_steps) == (
            other.source,
            other.timestep,
            other.num_steps,
        )
        torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=0)


# Attached in other ways


@pytest.mark.parametrize("source", ["noisy", "denoised"])
def test_in_a_with_block_the_callback_need_not_be_passed(source):
    """The scheduler alone gives the frames that the callback gives."""
    pipe = tiny.sd()
    passed = frames_of(pipe, tiny.sd_call(pipe, **SIZE), lambda preview: preview, source=source)
    alone = frames_of(pipe, tiny.sd_call(pipe, **SIZE), source=source)
    assert_equal_frames(alone, passed)
    assert shadows(pipe) == []


def test_in_a_chain_of_callbacks_each_step_is_shown_once():
    """A member of a `MultiPipelineCallbacks` is called, and does not listen besides."""
    pipe = tiny.sd()
    frames = frames_of(
        pipe, tiny.sd_call(pipe, **SIZE), lambda preview: MultiPipelineCallbacks([preview])
    )
    assert [frame.step_index for frame in frames] == [0, 1, 2, 3]


def test_a_function_of_the_users_own_around_the_callback():
    """It calls the preview, so nothing is shown twice."""
    pipe = tiny.sd()
    frames = frames_of(
        pipe, tiny.sd_call(pipe, **SIZE), lambda preview: lambda *given: preview(*given)
    )
    assert [frame.step_index for frame in frames] == [0, 1, 2, 3]


def test_a_callback_that_is_not_ours_is_seen_through():
    """After two steps it is clear that it does not call the preview; the rest is shown."""
    pipe = tiny.sd()
    frames = frames_of(pipe, tiny.sd_call(pipe, steps=6, **SIZE), lambda _: lambda *given: {})
    assert len(frames) == 4
    assert frames[-1].sigma is None


def test_a_loop_of_the_users_own():
    """Inside `with`, stepping the scheduler by hand is enough."""
    pipe, frames = tiny.sd(), []
    with PreviewCallback(pipe, frames.append):
        latents = zoo.noise(1, 4, 8, 12)
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(0.1 * latents, t, latents).prev_sample
    assert [(frame.step_index, frame.num_steps) for frame in frames] == [(0, 3), (1, 3), (2, 3)]


def test_older_pipelines_take_it_as_their_callback():
    """`callback=preview`, in one line: all files are complete when the call returns."""
    case = zoo.build("PixArtSigmaPipeline")
    frames = queue.Queue()
    case.pipe(**case.call, callback=PreviewCallback(case.pipe, frames))
    steps = case.call["num_inference_steps"]
    assert [frame.step_index for frame in frames.queue] == list(range(steps))
    assert shadows(case.pipe) == []


@pytest.mark.parametrize(
    "name", ["DiTPipeline", "HunyuanVideo15Pipeline", "LongCatImagePipeline", "FluxModularPipeline"]
)
def test_pipelines_without_a_callback(name, tmp_path):
    """Inside `with` they give denoised frames and whole files."""
    case, frames = zoo.build(name), []
    with PreviewCallback(case.pipe, frames.append, tmp_path / "run.gif"):
        zoo.run(case)
    assert {frame.source for frame in frames} == {"denoised"}
    assert frames[-1].is_last
    with Image.open(tmp_path / "run.gif") as animation:
        assert animation.n_frames == len(frames)


NEEDS_ITS_CALLBACK = "SkyReelsV2Diffusion"  # each frame has a copy of the scheduler
REINSERTS = {"FluxControlNetInpaintPipeline", "Flux2KleinInpaintPipeline"}  # noise, after the step


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in zoo.load_families()
        if not name.startswith((NEEDS_ITS_CALLBACK, "ShapE")) and name not in REINSERTS
    ],
)
def test_the_invariant_without_the_callback(name):
    """What the scheduler alone tells is enough: the last latents are what the decoder gets."""
    case, frames = zoo.build(name), []
    options = {"source": "noisy", "keep_latents": True, "on_error": "raise"}
    with PreviewCallback(case.pipe, frames.append, **options):
        _, decodes = zoo.run(case)
    assert frames[-1].is_last or layouts_row(name).is_in_parts
    if decodes and "WanImageToVideoPipeline:" not in name:
        shown = case.decoded(decodes)
        if layouts_row(name).kept is None:
            torch.testing.assert_close(frames[-1].latents, shown, rtol=1e-6, atol=1e-6)


def layouts_row(name):
    """The row of a pipeline."""
    return layouts.default_registry().row_for([name.partition(":")[0]]) or layouts.INFERRED


def test_a_scheduler_exchanged_between_two_runs_is_heard():
    """Inside one `with`, without passing the callback."""
    pipe, frames = tiny.sd(), []
    with PreviewCallback(pipe, frames.append):
        pipe(**tiny.sd_call(pipe, **SIZE))
        pipe.scheduler = diffusers.EulerDiscreteScheduler(**tiny.BETAS)
        pipe(**tiny.sd_call(pipe, **SIZE))
    assert [frame.run_index for frame in frames] == [0] * 4 + [1] * 4
    assert shadows(pipe) == []


def test_a_callback_that_calls_us_now_and_then():
    """Steps that it leaves out are not taken from the scheduler."""
    pipe, frames = tiny.sd(), []
    with PreviewCallback(pipe, frames.append) as preview:

        def sometimes(*given):
            return preview(*given) if given[1] % 4 == 0 else {}

        call = tiny.sd_call(pipe, steps=10, **SIZE)
        pipe(**call, callback_on_step_end=sometimes)
    assert len(frames) == 3


def test_loops_of_the_users_own_after_a_run():
    """The pipeline's count of an earlier run says nothing of them."""
    pipe, frames = tiny.sd(), []
    pipe(**tiny.sd_call(pipe, steps=2, **SIZE))
    with PreviewCallback(pipe, frames.append):
        for _ in range(2):
            pipe.scheduler.set_timesteps(5)
            for t in pipe.scheduler.timesteps:
                latents = torch.ones(1, 4, 8, 12)
                pipe.scheduler.step(latents, t, latents)
    assert [frame.run_index for frame in frames] == [0] * 5 + [1] * 5


def test_image_to_image_knows_its_steps():
    """Of a pipeline that keeps no count of its own, the steps that are left out do not count."""
    case, frames = zoo.build("IFImg2ImgPipeline"), []
    callback = PreviewCallback(case.pipe, frames.append)
    zoo.run(case, callback=callback)
    assert frames[-1].is_last


# Several pipelines in one, several parts of one video


def test_a_combined_pipeline_is_one_run(tmp_path):
    """Two inner pipelines, one after the other: one file, and the steps of both are counted."""
    case, frames = zoo.build("VisualClozePipeline"), []
    with PreviewCallback(case.pipe, frames.append, tmp_path / "run.gif") as preview:
        zoo.run(case, callback_on_step_end=preview)
    assert [frame.step_index for frame in frames] == list(range(6))
    assert {frame.run_index for frame in frames} == {0}
    assert [frame.num_steps for frame in frames] == [3, 3, 3, 6, 6, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["run.gif"]


def test_parts_whose_latents_are_asked_for_are_one_run(tmp_path):
    """Nothing tells of the end of such a call; the parts' ends are not taken for it."""
    case = zoo.build("HeliosPipeline")
    with PreviewCallback(case.pipe, tmp_path / "run.gif") as preview:
        zoo.run(case, callback_on_step_end=preview, **{})
        case.call["output_type"] = "latent"
        zoo.run(case, callback_on_step_end=preview)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-2.gif", "run.gif"]


def test_steps_that_are_no_picture_are_left_out():
    """A prior steps an embedding first, with a scheduler and a callback of its own."""
    case = zoo.build("StableUnCLIPPipeline")
    frames = []
    case.pipe(**case.call, callback=PreviewCallback(case.pipe, frames.append))
    assert [frame.step_index for frame in frames] == [0, 1, 2, 3]
    assert {frame.images.ndim for frame in frames} == {4}


def test_a_video_in_parts_is_one_run():
    """Where the pipeline counts from 0 again, more steps are expected."""
    case, frames = zoo.build("HeliosPipeline"), []
    with PreviewCallback(case.pipe, frames.append) as preview:
        zoo.run(case, callback_on_step_end=preview)
    assert [frame.num_steps for frame in frames] == [3, 3, 3, 6, 6, 6]
    assert {frame.run_index for frame in frames} == {0}


# Videos


@pytest.mark.parametrize("name", ["WanPipeline", "AnimateDiffPipeline", "LTXPipeline"])
def test_frames_of_a_video(name):
    """(B, F, H, W, 3): as many as there are latent frames, for video and image VAEs."""
    case = zoo.build(name)
    frames = []
    with PreviewCallback(case.pipe, frames.append, batch="first") as preview:
        zoo.run(case, callback_on_step_end=preview)
    assert frames[0].images.shape[:2] == (1, 3)
    assert frames[0].images.shape[-1] == 3


@pytest.mark.parametrize(
    "name", ["WanPipeline", "AnimateDiffPipeline", "StableVideoDiffusionPipeline"]
)
def test_a_full_decode_of_a_video_is_its_first_frame(name):
    """`vae_every` decodes one latent frame, which of a causal VAE is what the run decodes."""
    case, frames = zoo.build(name, guidance=False), []
    options = {"vae_every": case.call["num_inference_steps"], "source": "noisy"}
    with PreviewCallback(case.pipe, frames.append, **options) as preview:
        output, _ = zoo.run(case, callback_on_step_end=preview)
    assert frames[-1].decoder == "vae"
    first = frames[-1].images[:, 0]
    assert frames[-1].images.shape[1] == 1
    if name != "StableVideoDiffusionPipeline":  # which looks at the frames around, too
        finished = np.asarray(output[0])[:, 0]
        np.testing.assert_allclose(first, finished * 255, atol=1)


def test_the_finished_video_is_a_frame():
    """With `final=True` the last frame has the pipeline's own clip."""
    case, frames = zoo.build("WanPipeline"), []
    callback = PreviewCallback(case.pipe, frames.append, final=True)
    output, _ = zoo.run(case, callback_on_step_end=callback)
    assert frames[-1].source == "final"
    np.testing.assert_allclose(frames[-1].images, np.asarray(output[0]) * 255, atol=0.51)


@pytest.mark.parametrize("name", ["WanImageToVideoPipeline", "StableVideoDiffusionPipeline"])
def test_the_finished_video_is_not_the_image_it_starts_from(name):
    """The call has a variable `image`, too."""
    case, frames = zoo.build(name), []
    callback = PreviewCallback(case.pipe, frames.append, final=True)
    output, _ = zoo.run(case, callback_on_step_end=callback)
    assert frames[-1].images.shape == np.asarray(output[0]).shape


def test_a_finished_picture_that_is_not_scaled_yet():
    """Some pipelines tell of their end with the decoder's values, in [-1, 1]."""
    case, frames = zoo.build("KandinskyPipeline"), []
    callback = PreviewCallback(case.pipe, frames.append, final=True)
    output, _ = zoo.run(case, callback=callback)
    np.testing.assert_allclose(frames[-1].images, np.asarray(output[0]) * 255, atol=0.51)


def test_masked_tokens_are_not_decoded():
    """Their ids are beyond the codebook; the full decode waits until none is left."""
    case, frames = zoo.build("AmusedPipeline"), []
    options = {"vae_every": 1, "source": "noisy"}
    zoo.run(case, callback=PreviewCallback(case.pipe, frames.append, **options))
    assert [frame.decoder for frame in frames][-1] == "vae"
    assert frames[0].decoder == "pca"


def test_the_initial_frame_has_the_shape_of_the_others():
    """Also with both sources side by side."""
    pipe, frames = tiny.sd(), []
    callback = PreviewCallback(pipe, frames.append, source="both", initial=True)
    pipe(**tiny.sd_call(pipe, **SIZE), callback_on_step_end=callback)
    assert len({frame.images.shape for frame in frames}) == 1


# The unknown


def made_up(pipe, name="UnheardPipeline", **more):
    """The pipeline as an object of a class that nobody has heard of, nor of its parents."""
    cls = type(pipe)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    pipe.__class__ = type(name, cls.__bases__, {**own, **more})
    return pipe


@pytest.mark.parametrize(
    "name",
    [
        "FluxPipeline",
        "QwenImagePipeline",
        "Flux2Pipeline",
        "BriaFibo2Pipeline",
        "Lumina2Pipeline",
        "WanPipeline",
        "CogVideoXPipeline",
        "AnimateDiffPipeline",
        "LTXPipeline",
        "HunyuanVideo15Pipeline",
    ],
)
def test_a_made_up_pipeline_is_inferred(name):
    """Packed, patchified, plain and video latents: the last ones are what the decoder gets."""
    case = zoo.build(name)
    made_up(case.pipe)
    frames = []
    options = {"source": "noisy", "keep_latents": True, "on_error": "raise"}
    with PreviewCallback(case.pipe, frames.append, **options):
        _, decodes = zoo.run(case)
    assert {frame.layout for frame in frames} == {"inferred"}
    torch.testing.assert_close(frames[-1].latents, case.decoded(decodes), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_inferred_is_one_warning():
    """It names the pipeline, the shape and the two lines; the run is the same to the bit."""
    plain = zoo.build("JoyImageEditPlusPipeline")
    expected = zoo.run(plain)
    case, frames = zoo.build("JoyImageEditPlusPipeline"), []
    made_up(case.pipe)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PreviewWarning)
        with PreviewCallback(case.pipe, frames.append, decoder="wan21") as preview:
            output = zoo.run(case, callback_on_step_end=preview)
    messages = [str(one.message) for one in told if issubclass(one.category, PreviewWarning)]
    assert len(messages) == 1
    assert "for UnheardPipeline, got (2, 126, 4, 1, 2, 2), a layout that nobody" in messages[0]
    assert "layouts.register('UnheardPipeline', 'FluxPipeline')" in messages[0]
    assert frames == []
    assert_same(output, expected)


@pytest.fixture
def _own_registry(monkeypatch):
    """Registers into a registry that is thrown away."""
    registry = layouts.LayoutRegistry()
    monkeypatch.setattr(layouts, "default_registry", lambda: registry)


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("layout", ["JoyImageEditPlusPipeline", "patches_of_target"])
def test_a_registered_layout_is_used(layout):
    """One line, by the name of a pipeline that is laid out the same, or of a row."""
    case, frames = zoo.build("JoyImageEditPlusPipeline"), []
    layouts.register(type(made_up(case.pipe)), layout)
    options = {"source": "noisy", "keep_latents": True}
    with PreviewCallback(case.pipe, frames.append, **options):
        _, decodes = zoo.run(case)
    assert frames[-1].layout == "patches_of_target"
    torch.testing.assert_close(frames[-1].latents, case.decoded(decodes))


@pytest.mark.usefixtures("_own_registry")
def test_a_registered_function_is_used():
    """A function of the latents and of what was read of the call."""

    def mine(latents, reading):
        side = reading.integer("height") // 2  # the tiny VAE makes two pixels of one
        statistics = reading.statistics
        grid = latents.reshape(len(latents), side // 2, -1, 4, 2, 2)
        image = grid.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), 4, side, -1)
        return image / statistics.scaling_factor + statistics.shift_factor

    case, frames = zoo.build("FluxPipeline"), []
    layouts.register(type(made_up(case.pipe)).__name__, mine)
    options = {"source": "noisy", "keep_latents": True, "on_error": "raise"}
    with PreviewCallback(case.pipe, frames.append, **options):
        _, decodes = zoo.run(case)
    assert frames[-1].layout == "registered"
    torch.testing.assert_close(frames[-1].latents, case.decoded(decodes))


def test_a_layout_that_nobody_knows_is_refused():
    """Registering a name that is no row and no pipeline says which there are."""
    with pytest.raises(ValueError, match="layout must be the name of a row or of a known pipeline"):
        layouts.LayoutRegistry().register("Mine", "no such")


# Cancelled


def test_a_pipeline_that_heeds_interrupt_finishes_what_it_has():
    """Cancelled at its second step, it returns a picture all the same."""
    pipe, frames = tiny.sd(), []
    callback = PreviewCallback(pipe, frames.append)

    def after_two(*given):
        if given[1] == 1:
            callback.cancel()
        return callback(*given)

    images = pipe(**tiny.sd_call(pipe, steps=6, **SIZE), callback_on_step_end=after_two).images
    assert images.shape == (1, 16, 24, 3)
    assert [frame.step_index for frame in frames] == [0, 1]
    assert shadows(pipe) == []


def test_without_a_with_block_a_cancelled_run_raises(tmp_path):
    """Where `_interrupt` is ignored; the files are whole, and all is as it was."""
    case = zoo.build("Lumina2Pipeline")
    callback = PreviewCallback(case.pipe, tmp_path / "run.gif")

    def after_two(*given):
        if given[1] == 1:
            callback.cancel()
        return callback(*given)

    with pytest.raises(RunCancelled, match="the run was cancelled"):
        zoo.run(case, callback_on_step_end=after_two)
    with Image.open(tmp_path / "run.gif") as animation:
        assert animation.n_frames == 2
    assert shadows(case.pipe) == []


def test_cancelling_from_another_thread():
    """An app's stop button: the run ends within a step or two."""
    pipe, frames = tiny.sd(), queue.Queue()
    callback = PreviewCallback(pipe, frames)

    def press_stop():
        frames.get(timeout=30)
        callback.cancel()

    button = threading.Thread(target=press_stop)
    button.start()
    call = tiny.sd_call(pipe, steps=400, **SIZE)
    pipe(**call, callback_on_step_end=callback)
    button.join()
    assert frames.queue[-1].step_index < 399


def test_a_late_cancel_in_a_with_block_does_nothing():
    """The first run is over, and the second is another."""
    pipe, frames = tiny.sd(), []
    with PreviewCallback(pipe, frames.append) as preview:
        pipe(**tiny.sd_call(pipe, **SIZE))
        preview.cancel()
        pipe(**tiny.sd_call(pipe, **SIZE))
    assert len(frames) == 8


def test_a_run_left_by_an_exception_has_no_finished_picture():
    """What the call has under that name is something else."""
    case, frames = zoo.build("LDMSuperResolutionPipeline"), []
    with (
        PreviewCallback(case.pipe, frames.append, final=True) as preview,
        at_each_step(case.pipe, lambda number: preview.cancel()),
    ):
        zoo.run(case)
    assert [frame.source for frame in frames] == ["denoised"]


def test_cancelling_no_run_does_nothing():
    """A click that comes too late does not end the next run."""
    pipe, frames = tiny.sd(), []
    callback = PreviewCallback(pipe, frames.append)
    callback.cancel()
    pipe(**tiny.sd_call(pipe, **SIZE), callback_on_step_end=callback)
    assert len(frames) == 4


# Offloaded, compiled, distributed


def outcome(pipe, with_preview):
    frames = []
    preview = {"callback_on_step_end": PreviewCallback(pipe, frames.append)} if with_preview else {}
    return pipe(**tiny.sd_call(pipe, **SIZE), **preview).images


def counted_hook(module, calls, name):
    """Count how often a module is woken, as accelerate's and diffusers' offload hooks are."""
    plain = module._hf_hook.pre_forward

    def pre_forward(*args, **kwargs):
        calls.append(name)
        return plain(*args, **kwargs)

    module._hf_hook.pre_forward = pre_forward


def test_no_model_is_woken_that_was_at_rest():
    """With model offload the hooks are called as often as without a preview, in the same order."""
    import accelerate

    orders = []
    for with_preview in (False, True):
        pipe, calls, before = tiny.sd(), [], None
        for name in ("unet", "vae"):
            module = getattr(pipe, name)
            _, before = accelerate.cpu_offload_with_hook(module, torch.device("cpu"), before)
            counted_hook(module, calls, name)
        orders.append((calls, outcome(pipe, with_preview)))
    assert_same(orders[0], orders[1])
    assert orders[0][0] == ["unet"] * 4 + ["vae"]


@pytest.mark.parametrize("kind", ["sequential", "group", "compiled"])
def test_moved_and_compiled_models(kind):
    """Sequential and group offload and `torch.compile` change nothing, and nothing changes them."""
    pictures = []
    for with_preview in (False, True):
        pipe = tiny.sd()
        prepared(pipe, kind)
        pictures.append(outcome(pipe, with_preview))
    assert_same(*pictures)


def prepared(pipe, kind):
    import accelerate
    from diffusers.hooks import apply_group_offloading

    for name in ("unet", "vae"):
        if kind == "sequential":
            accelerate.cpu_offload(getattr(pipe, name), execution_device=torch.device("cpu"))
        elif kind == "group":
            cpu = torch.device("cpu")
            apply_group_offloading(getattr(pipe, name), cpu, offload_type="leaf_level")
        else:
            setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))


RANKS = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import tiny
from sd_progress.callback import PreviewCallback
rank = int(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", init_method="file://" + {store!r}, rank=rank, world_size=2
)
pipe, frames = tiny.sd(), []
call = tiny.sd_call(pipe, height=16, width=24)
with PreviewCallback(pipe, frames.append, {folder!r}) as preview:
    pipe(**call, callback_on_step_end=preview)
    pipe(**call)
shown, steps = len(frames), []
pipe.unet.register_forward_hook(lambda *given: steps.append(given))
callback = PreviewCallback(pipe, frames.append)
def after_two(*given):
    if given[1] == 1:
        callback.cancel()
    return callback(*given)
pipe(**call, callback_on_step_end=after_two)
cancelled, steps = len(steps), steps.clear() or steps
pipe(**call, callback_on_step_end=callback)
print(shown, cancelled, len(steps), end="")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_only_the_first_rank_previews(tmp_path):
    """Two real processes run the pipeline; one of them makes frames and files, no one waits.

    Cancelled on both, both end at the same step, and run as ever afterwards.
    """
    script = RANKS.format(
        tests=str(zoo.__path__[0]) + "/..",
        store=str(tmp_path / "store"),
        folder=str(tmp_path / "steps"),
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning:sd_progress", "-c", script, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert [out for out, _ in results] == ["8 2 4", "0 2 4"]
    assert sorted(path.name for path in tmp_path.glob("steps*")) == ["steps", "steps-2"]
