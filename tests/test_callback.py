"""When previews are made, what belongs to which run, and what happens when a part fails."""

import contextlib
import gc
import itertools
import multiprocessing
import queue
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from PIL import Image

from sd_progress.boundary import PreviewWarning
from sd_progress.callback import PreviewCallback
from sd_progress.cost import Stats
from sd_progress.engine import finished
from sd_progress.factors import by_name
from sd_progress.x0 import predict_x0

SIZE = {"height": 16, "width": 24}


@pytest.fixture
def pipe():
    return tiny.sd()


def run(pipe, callback, **arguments):
    call = tiny.sd_call(pipe, **SIZE, **arguments)
    return pipe(**call, callback_on_step_end=callback)


def frames_of(pipe, *, call=None, **options):
    frames = []
    run(pipe, PreviewCallback(pipe, frames.append, **options), **(call or {}))
    return frames


def gif_frames(path):
    with Image.open(path) as animation:
        return animation.n_frames


# One line, no `with`


def test_files_are_complete_when_the_call_returns(pipe, tmp_path):
    """N PNGs, a whole GIF and N queue frames, in one line."""
    frames = queue.Queue()
    run(pipe, PreviewCallback(pipe, tmp_path / "steps", tmp_path / "denoise.gif", frames))
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [f"step_00{k}.png" for k in range(1, 5)]
    assert gif_frames(tmp_path / "denoise.gif") == 4
    assert [frame.step_index for frame in frames.queue] == [0, 1, 2, 3]


def test_frames_tell_where_they_are(pipe):
    """Steps are counted, progress ends at 1, the ETA at 0, and timesteps are the scheduler's."""
    frames = frames_of(pipe)
    assert [frame.progress for frame in frames] == [0.25, 0.5, 0.75, 1.0]
    assert [frame.timestep for frame in frames] == pipe.scheduler.timesteps.tolist()
    assert all(frame.eta_s > 0 for frame in frames[:-1])
    assert frames[-1].eta_s == 0
    assert sorted(frame.elapsed_s for frame in frames) == [frame.elapsed_s for frame in frames]


def test_eta_is_the_mean_step_times_the_steps_left(pipe):
    """With a clock that ticks a second each time it is read, the estimate is exact."""
    ticks = iter(range(1000))
    frames = frames_of(pipe, clock=lambda: next(ticks))
    per_step = frames[1].elapsed_s - frames[0].elapsed_s
    assert frames[1].eta_s == pytest.approx(2 * per_step)
    assert frames[2].eta_s == pytest.approx(per_step)


def test_initial_and_final_frames(pipe):
    """On request the noise comes first, and the pipeline's own picture last."""
    frames = []
    callback = PreviewCallback(pipe, frames.append, initial=True, final=True)
    images = run(pipe, callback).images
    assert [frame.step_index for frame in frames] == [-1, 0, 1, 2, 3, 3]
    assert [frames[0].source, frames[-1].source] == ["noisy", "final"]
    np.testing.assert_array_equal(frames[-1].images, (images * 255).round().astype(np.uint8))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_the_final_frame_is_found_in_any_output_type(pipe, output_type):
    """PIL pictures, arrays and tensors give the same final frame."""
    frames = frames_of(pipe, final=True, call={"output_type": output_type, "batch": 2})
    assert frames[-1].images.shape == (2, 16, 24, 3)
    assert frames[-1].source == "final"


def test_latent_output_has_no_final_frame(pipe):
    """Where the pipeline finishes no picture, none is shown."""
    frames = frames_of(pipe, final=True, call={"output_type": "latent"})
    assert [frame.source for frame in frames] == ["denoised"] * 4


# When


def test_every(pipe):
    """Every third step, and the last."""
    frames = frames_of(pipe, every=3, call={"steps": 7})
    assert [frame.step_index for frame in frames] == [2, 5, 6]


def test_min_interval(pipe):
    """Frames that come too soon are left out; the last never is."""
    seconds = iter(range(1000))
    frames = frames_of(pipe, min_interval_s=1e6, clock=lambda: next(seconds))
    assert [frame.step_index for frame in frames] == [0, 3]


def test_vae_every(pipe):
    """Every second frame is decoded in full, at full resolution."""
    frames = frames_of(pipe, vae_every=2)
    assert [frame.decoder for frame in frames] == ["linear:sd1", "vae", "linear+refit:sd1", "vae"]
    assert [frame.images.shape for frame in frames[:2]] == [(1, 8, 12, 3), (1, 16, 24, 3)]


def test_second_order_schedulers_count_half_steps():
    """Heun makes 2N-1 callbacks for N steps, and the frames know."""
    pipe = tiny.sd(scheduler=diffusers.HeunDiscreteScheduler(**tiny.BETAS))
    frames = frames_of(pipe)
    assert [frame.step_index for frame in frames] == list(range(7))
    assert frames[-1].progress == 1.0


def test_the_last_frame_of_an_interrupted_run_is_made(pipe):
    """A run that another callback stops is previewed at the step where it stopped."""

    class Stop(SDCFGCutoffCallback):
        """Stops after the third step."""

        tensor_inputs = ()

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._interrupt = step_index == 2
            return callback_kwargs

    frames = []
    mine = PreviewCallback(pipe, frames.append, every=100)
    run(pipe, MultiPipelineCallbacks([Stop(), mine]), steps=6)
    assert [frame.step_index for frame in frames] == [2]


def test_the_last_frame_is_made_when_somebody_stops_the_run_after_us(pipe):
    """The step that was not due when it came is shown after all."""
    frames = []
    mine = PreviewCallback(pipe, frames.append, every=100)

    def chained(pipeline, step_index, timestep, callback_kwargs):
        mine(pipeline, step_index, timestep, callback_kwargs)
        pipeline._interrupt = step_index == 2
        return {}

    run(pipe, chained, steps=6)
    assert [(frame.step_index, frame.source) for frame in frames] == [(2, "denoised")]


# What


def test_sources(pipe):
    """Denoised, noisy, and both side by side."""
    denoised = frames_of(pipe)[0]
    noisy = frames_of(pipe, source="noisy")[0]
    both = frames_of(pipe, source="both")[0]
    side_by_side = np.concatenate([noisy.images, denoised.images], axis=2)
    np.testing.assert_array_equal(both.images, side_by_side)
    assert [f.source for f in (denoised, noisy, both)] == ["denoised", "noisy", "both"]


def test_at_the_last_step_denoised_is_what_the_run_ends_with(pipe):
    """With DDIM the last predicted x0 is the final latents, and so is the last noisy frame."""
    denoised = frames_of(pipe, keep_latents=True)[-1].latents
    noisy = frames_of(pipe, source="noisy", keep_latents=True)[-1].latents
    torch.testing.assert_close(denoised, noisy, atol=1e-5, rtol=1e-4)
    assert frames_of(pipe)[-1].latents is None


def test_without_x0_the_frame_is_noisy_and_says_so(pipe):
    """A loop of one's own that steps no scheduler gives noisy frames."""
    frames = []
    with PreviewCallback(pipe, frames.append) as preview:
        pipe.scheduler.set_timesteps(3)
        for k, t in enumerate(pipe.scheduler.timesteps):
            given = {"latents": torch.zeros(1, 4, 8, 12)}
            assert preview(pipe, k, t, given) is given
    assert [frame.source for frame in frames] == ["noisy"] * 3
    assert frames[-1].is_last


def test_batch(pipe):
    """The whole batch as a grid, or its first picture only."""
    call = {"batch": 3}
    assert frames_of(pipe, call=call)[0].image.size == (24, 16)
    assert frames_of(pipe, batch="first", call=call)[0].image.size == (12, 8)


def test_decoders_by_name_and_by_value(pipe):
    """A row's name, a Factors and a Decoder are all understood."""

    class Grey:
        """A decoder of one's own."""

        name = "grey"

        def decode(self, latents):
            return np.full((len(latents), 2, 2, 3), 127, np.uint8)

    assert frames_of(pipe, decoder="keturn/SD1_4")[0].decoder == "linear:keturn/SD1_4"
    assert frames_of(pipe, decoder=by_name("sdxl"))[0].decoder == "linear:sdxl"
    assert frames_of(pipe, decoder=Grey())[0].images.mean() == 127


def test_each_run_has_principal_components_of_its_own():
    """The same run twice gives the same frames."""
    pipe = tiny.sd(vae=tiny.vae(scaling_factor=0.7))
    frames = []
    with pytest.warns(PreviewWarning):
        callback = PreviewCallback(pipe, frames.append)
    run(pipe, callback)
    run(pipe, callback)
    for first, second in zip(frames[:4], frames[4:], strict=True):
        np.testing.assert_array_equal(first.images, second.images)


def test_an_unknown_vae_is_told_once_and_shown_by_principal_components():
    """Nothing crashes; the warning says what to do."""
    pipe = tiny.sd(vae=tiny.vae(scaling_factor=0.7))
    frames = []
    with pytest.warns(PreviewWarning, match=r"vae must be .* got AutoencoderKL .*decoder=") as told:
        callback = PreviewCallback(pipe, frames.append)
    run(pipe, callback)
    assert len(told) == 1
    assert {frame.decoder for frame in frames} == {"pca"}


# Several runs


def test_runs_do_not_mix(pipe, tmp_path):
    """One callback, two runs: two folders, two GIFs, all frames denoised."""
    frames = []
    callback = PreviewCallback(pipe, tmp_path / "s/", tmp_path / "d.gif", frames.append)
    run(pipe, callback)
    run(pipe, callback, steps=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d-2.gif", "d.gif", "s", "s-2"]
    assert [gif_frames(tmp_path / name) for name in ("d.gif", "d-2.gif")] == [4, 3]
    assert [frame.run_index for frame in frames] == [0] * 4 + [1] * 3
    assert {frame.source for frame in frames} == {"denoised"}


def test_inside_a_chain_of_callbacks(pipe):
    """`MultiPipelineCallbacks` gets its dict back, and every frame is made."""
    frames = []
    mine = PreviewCallback(pipe, frames.append)
    chain = MultiPipelineCallbacks([mine, SDCFGCutoffCallback(cutoff_step_ratio=0.5)])
    watched = run(pipe, chain).images
    plain = run(pipe, MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.5)])).images
    assert len(frames) == 4
    np.testing.assert_array_equal(watched, plain)


def test_inside_a_function_of_ones_own(pipe):
    """Whoever is not the pipeline gets the dict back, and can go on with it."""
    frames = []
    mine, other = PreviewCallback(pipe, frames.append), SDCFGCutoffCallback(0.5)

    def both(pipeline, step_index, timestep, callback_kwargs):
        callback_kwargs = mine(pipeline, step_index, timestep, callback_kwargs)
        return other(pipeline, step_index, timestep, callback_kwargs)

    names = ["latents", "prompt_embeds"]
    call = tiny.sd_call(pipe, **SIZE)
    pipe(**call, callback_on_step_end=both, callback_on_step_end_tensor_inputs=names)
    assert len(frames) == 4


def test_a_pipeline_that_does_not_prepare_its_callback(tmp_path):
    """Its first run is denoised from the first step on; so are all runs in a `with`."""
    pipe = tiny.sd3(diffusers.StableDiffusion3Img2ImgPipeline)
    image = Image.new("RGB", (24, 16))
    frames = []
    call = {**tiny.sd3_call(pipe), "image": image, "strength": 1.0}
    with PreviewCallback(pipe, frames.append, initial=True) as preview:
        for _ in range(2):
            pipe(**call, callback_on_step_end=preview)
    assert [f.source for f in frames] == (["noisy"] + ["denoised"] * 4) * 2
    preview = PreviewCallback(pipe, frames.append)
    for _ in range(2):
        pipe(**call, callback_on_step_end=preview)
        assert "step" not in vars(pipe.scheduler)


def test_latents_that_leave_early_close_the_files_too(tmp_path):
    """Some pipelines return latents without a sign of their end."""
    config = tiny.sdxl().unet.config
    names = [key for key in config if key.startswith(("addition", "projection"))]
    controlnet = tiny.controlnet(**{key: config[key] for key in names})
    cls = diffusers.StableDiffusionXLControlNetImg2ImgPipeline
    pipe = tiny.sdxl(cls, controlnet=controlnet)
    image = Image.new("RGB", (24, 16))
    images = {"image": image, "control_image": image, "strength": 1.0}
    callback = PreviewCallback(pipe, tmp_path / "d.gif")
    call = tiny.sdxl_call(pipe, output_type="latent")
    pipe(**call, **images, callback_on_step_end=callback)
    assert gif_frames(tmp_path / "d.gif") == 4
    assert "step" not in vars(pipe.scheduler)


def test_a_run_that_was_not_ours_leaves_nothing_with_us(pipe):
    """Between construction and use, other runs of the pipeline are not held on to."""
    callback = PreviewCallback(pipe, print)
    run(pipe, None)
    assert callback._parts.tap.take() == (None, False)
    assert callback._parts.tap.started_s is None


def test_nothing_is_kept_alive(pipe):
    """After a run, what nobody holds is freed without the garbage collector."""
    run(pipe, callback := PreviewCallback(pipe, target := lambda frame: None, vae_every=2))
    gone = [weakref.ref(thing) for thing in (callback, target, pipe.vae, pipe)]
    gc.disable()
    try:
        del callback, target
        assert [ref() is None for ref in gone] == [True, True, False, False]
    finally:
        gc.enable()


def test_a_context_without_a_run_says_what_is_missing(pipe):
    """Entered, and with no step of the pipeline, it warns."""
    with (
        pytest.warns(PreviewWarning, match="must take a step in the `with` block, got none"),
        PreviewCallback(pipe, print),
    ):
        pass


def test_as_a_context(pipe, tmp_path):
    """Two runs in one `with`, and the pipeline is untouched after it."""
    frames = []
    with PreviewCallback(pipe, tmp_path / "a.gif", frames.append) as preview:
        run(pipe, preview)
        run(pipe, preview)
    assert [frame.source for frame in frames] == ["denoised"] * 8
    assert gif_frames(tmp_path / "a-2.gif") == 4
    assert "step" not in vars(pipe.scheduler)


def test_two_callbacks_on_one_pipeline(pipe):
    """They share the wrapped step, and either may go first."""
    first, second = [], []
    a, b = PreviewCallback(pipe, first.append), PreviewCallback(pipe, second.append)
    run(pipe, a)
    run(pipe, b)
    assert {frame.source for frame in first + second} == {"denoised"}
    assert "step" not in vars(pipe.scheduler)


def test_a_scheduler_exchanged_after_construction(pipe):
    """The run's own scheduler is listened to, from its first step on."""
    frames = []
    callback = PreviewCallback(pipe, frames.append)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**tiny.BETAS)
    run(pipe, callback)
    assert [frame.source for frame in frames] == ["denoised"] * 4
    assert frames[-1].sigma == 0.0


# Interrupted and failed runs


class BoomError(Exception):
    """Raised in the middle of a run."""


def failing(pipe, callback, *, at=2, error=BoomError):
    def chained(pipeline, step_index, timestep, callback_kwargs):
        callback(pipeline, step_index, timestep, callback_kwargs)
        if step_index == at:
            raise error
        return {}

    with pytest.raises(error):
        run(pipe, chained, steps=6)


def failing_again(pipe, callback):
    failing(pipe, callback)
    raise KeyboardInterrupt


def wait_for_worker():
    for thread in threading.enumerate():
        if thread.name == "sd-progress":
            thread.join(timeout=20)


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
def test_a_failed_run_keeps_what_was_made(pipe, tmp_path, error):
    """Without a `with`, the worker notices that the call is gone and completes the files."""
    callback = PreviewCallback(pipe, tmp_path / "s/", tmp_path / "d.gif", tmp_path / "d.webp")
    failing(pipe, callback, error=error)
    wait_for_worker()
    assert len(list((tmp_path / "s").glob("*.png"))) == 3
    assert gif_frames(tmp_path / "d.gif") == gif_frames(tmp_path / "d.webp") == 3
    assert "step" not in vars(pipe.scheduler)


def test_a_failed_run_in_a_context(pipe, tmp_path):
    """With a `with`, the files are complete when the exception leaves it."""
    with PreviewCallback(pipe, tmp_path / "d.webp") as preview:
        failing(pipe, preview)
    assert gif_frames(tmp_path / "d.webp") == 3
    assert "maybe_free_model_hooks" not in vars(pipe)


def test_a_run_right_after_a_failed_one(pipe, tmp_path):
    """The next run is a run of its own, whether or not the failed one was noticed yet."""
    frames = []
    callback = PreviewCallback(pipe, tmp_path / "d.gif", frames.append)
    failing(pipe, callback)
    run(pipe, callback)
    assert [frame.run_index for frame in frames] == [0] * 3 + [1] * 4
    assert [frame.source for frame in frames] == ["denoised"] * 7
    assert [gif_frames(tmp_path / name) for name in ("d.gif", "d-2.gif")] == [3, 4]


def test_no_thread_outlives_its_run(pipe):
    """After the call returned, the worker is gone."""
    frames_of(pipe)
    gc.collect()
    assert "sd-progress" not in {thread.name for thread in threading.enumerate()}


# Failing parts


class Broken:
    """A writer that fails at its second frame."""

    def __init__(self):
        self.frames = self.closed = 0

    def write(self, frame):
        self.frames += 1
        if self.frames == 2:
            raise OSError("the disk is full")

    def close(self):
        self.closed += 1


def closed_queue():
    frames = multiprocessing.Queue()
    frames.close()
    return frames


def cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "steps/"


@pytest.mark.parametrize(
    ("make_target", "cause"),
    [
        (lambda tmp_path: Broken(), "the disk is full"),
        (cannot_be_made, "Not a directory|FileExistsError|NotADirectoryError"),
        (lambda tmp_path: closed_queue(), "closed"),
        (lambda tmp_path: lambda frame: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["writer", "folder", "queue", "callable"],
)
def test_a_failing_target_is_told_once_and_harms_nothing_else(pipe, tmp_path, make_target, cause):
    """One warning with the cause; the run is as ever, and the other targets are complete."""
    plain = run(pipe, None).images
    frames = []
    target = make_target(tmp_path)
    callback = PreviewCallback(pipe, tmp_path / "a.gif", target, frames.append)
    with pytest.warns(PreviewWarning, match=cause) as told:
        images = run(pipe, callback).images
    assert len(told) == 1
    np.testing.assert_array_equal(images, plain)
    assert (len(frames), gif_frames(tmp_path / "a.gif")) == (4, 4)


def test_a_failed_writer_is_left_alone_until_the_next_run(pipe):
    """After its failure it gets no frame of this run, but is closed; the next run tries again."""
    callback = PreviewCallback(pipe, broken := Broken())
    with pytest.warns(PreviewWarning, match="the disk is full"):
        run(pipe, callback)
    assert (broken.frames, broken.closed) == (2, 1)
    run(pipe, callback)
    assert (broken.frames, broken.closed) == (6, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk(pipe):
    """A write that meets a full disk is such a failure."""
    frames = []

    def write(frame):
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(frame.to_bytes())

    with pytest.warns(PreviewWarning, match="No space left on device"):
        run(pipe, PreviewCallback(pipe, write, frames.append))
    assert len(frames) == 4


def test_a_failing_decoder_harms_nothing(pipe):
    """No frame is made, one warning says why, the run is as ever."""
    plain = run(pipe, None).images
    callback = PreviewCallback(pipe, print, decoder=by_name("flux"))
    with pytest.warns(PreviewWarning, match=r"latents must be \(B, 16, h, w\)") as told:
        images = run(pipe, callback).images
    assert len(told) == 1
    np.testing.assert_array_equal(images, plain)


def test_nan_latents_are_told_once_and_shown_grey():
    """A run that breaks is told of, and previewed to its end."""
    vae, unet = tiny.vae(), tiny.unet()
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    pipe = tiny.sd(vae=vae, unet=unet)
    frames = []
    callback = PreviewCallback(pipe, frames.append)
    with pytest.warns(PreviewWarning, match=r"latents must be finite, got NaN") as told:
        run(pipe, callback, output_type="latent")
    assert len(told) == 1
    assert [int(frame.images.mean()) for frame in frames] == [128] * 4


def test_nan_latents_are_not_blamed_on_the_vae():
    """With full decodes, too, there is one warning, about the latents."""
    vae, unet = tiny.vae(), tiny.unet()
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    pipe = tiny.sd(vae=vae, unet=unet)
    with pytest.warns(PreviewWarning, match="latents must be finite") as told:
        run(pipe, PreviewCallback(pipe, lambda frame: None, vae_every=1), output_type="latent")
    assert len(told) == 1


def test_a_vae_that_fails_falls_back_to_the_linear_map(pipe):
    """A decode that gives NaN is told of once; the frames are linear from there on."""
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    frames = []
    callback = PreviewCallback(pipe, frames.append, vae_every=1)
    with pytest.warns(PreviewWarning, match=r"vae.decode must give finite values") as told:
        run(pipe, callback, output_type="latent")
    assert len(told) == 1
    assert [frame.decoder for frame in frames] == ["linear:sd1"] * 4


def test_a_target_that_ends_the_program_does_not(pipe):
    """In the worker, even SystemExit is only a failing target."""
    frames = []
    callback = PreviewCallback(pipe, lambda frame: sys.exit(1), frames.append)
    with pytest.warns(PreviewWarning, match="SystemExit"):
        run(pipe, callback)
    assert [frame.run_index for frame in frames] == [0] * 4


def test_an_error_that_cannot_say_what_it_is(pipe):
    """Its class is told."""

    class Mute(Exception):  # noqa: N818
        """Raises when it is asked."""

        def __str__(self):
            raise RuntimeError

    def fail(frame):
        raise Mute

    with pytest.warns(PreviewWarning, match="failed: Mute; the run goes on"):
        run(pipe, PreviewCallback(pipe, fail))


def test_a_target_that_closes_the_callback_is_told_not_to(pipe):
    """It would wait for itself; the other targets go on in the same run."""
    frames = []
    callback = PreviewCallback(pipe, lambda frame: callback.close(), frames.append)
    with pytest.warns(PreviewWarning, match="close must be called from outside"):
        run(pipe, callback)
    assert [frame.run_index for frame in frames] == [0] * 4


def test_a_target_that_hangs_does_not_hang_the_run(pipe):
    """After a while without a sign of life the run goes on; the next run's files wait."""
    gate, seen = threading.Event(), []

    def slow(frame):
        gate.wait(20)
        seen.append((frame.run_index, frame.step_index))

    callback = PreviewCallback(pipe, slow)
    finished.__defaults__, patience = (0.3,), finished.__defaults__
    try:
        with pytest.warns(PreviewWarning, match="got no sign of life"):
            run(pipe, callback, steps=2)
        with pytest.warns(PreviewWarning, match="got no sign of life"):
            run(pipe, callback, steps=2)
    finally:
        finished.__defaults__ = patience
    gate.set()
    wait_for_worker()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_slow_target_gets_every_frame(pipe, monkeypatch):
    """What does not fit into memory waits on disk, in order and whole."""
    gate, frames = threading.Event(), []
    monkeypatch.setattr("sd_progress.run.MAX_WAITING_BYTES", 6000)

    def slow(frame):
        gate.wait(20)
        frames.append(frame)

    callback = PreviewCallback(pipe, slow, keep_latents=True)
    run(pipe, opening(gate, callback), steps=6)
    stats = callback.stats
    assert [frame.step_index for frame in frames] == list(range(6))
    assert stats.spilled_bytes > 0
    assert stats.peak_backlog_bytes <= 6000
    assert (stats.frames, stats.left_out, stats.dropped) == (6, 0, 0)
    monkeypatch.undo()
    quick = []
    run(pipe, PreviewCallback(pipe, quick.append, keep_latents=True), steps=6)
    for frame, other in zip(frames, quick, strict=True):
        assert np.array_equal(frame.images, other.images)
        assert torch.equal(frame.latents, other.latents)


def opening(gate, callback):
    """Call the callback, let each frame be drawn; open the gate after the last of six steps."""

    def chained(pipeline, step_index, timestep, callback_kwargs):
        callback(pipeline, step_index, timestep, callback_kwargs)
        give_up_at = time.monotonic() + 10
        while callback.stats.frames <= step_index and time.monotonic() < give_up_at:
            time.sleep(0.001)
        if step_index == 5:
            gate.set()
        return {}

    return chained


def test_without_room_frames_are_left_out(pipe, monkeypatch, tmp_path):
    """Where memory and disk are full, a slow target costs frames, which is told and counted."""
    gate, frames = threading.Event(), []
    monkeypatch.setattr("sd_progress.run.MAX_WAITING_BYTES", 2000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))

    def slow(frame):
        gate.wait(20)
        frames.append(frame)

    callback = PreviewCallback(pipe, slow)
    with pytest.warns(PreviewWarning, match="previews waiting to be written must be at most"):
        run(pipe, opening(gate, callback), steps=6)
    assert 1 <= len(frames) < 6
    assert callback.stats.left_out == 6 - len(frames)


def test_a_slow_target_does_not_hold_up_a_live_one(pipe):
    """While a file is stuck, a queue of one holds the newest frame, at every step."""
    gate, newest, frames = threading.Event(), queue.Queue(1), []

    def slow(frame):
        gate.wait(20)
        frames.append(frame)

    def chained(pipeline, step_index, timestep, callback_kwargs):
        callback(pipeline, step_index, timestep, callback_kwargs)
        seen.append(newest.get(timeout=10).step_index)
        if step_index == 5:
            gate.set()
        return {}

    seen = []
    callback = PreviewCallback(pipe, slow, newest)
    run(pipe, chained, steps=6)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert len(frames) == 6


class SlowAtFirst:
    """A decoder that lags behind until it is let go."""

    name = "slow"

    def __init__(self):
        self.gate, self.decoded = threading.Event(), 0

    def decode(self, latents):
        """Wait, then grey."""
        self.gate.wait(20)
        self.decoded += 1
        return np.full((len(latents), 4, 4, 3), 128, np.uint8)


@pytest.mark.parametrize("with_file", [True, False])
def test_a_live_target_gets_the_newest_of_what_lags_behind(pipe, with_file):
    """What a queue of one would not keep is not even drawn, unless somebody else wants it."""
    decoder, newest, frames = SlowAtFirst(), queue.Queue(1), []
    targets = [newest, frames.append] if with_file else [newest]

    def chained(pipeline, step_index, timestep, callback_kwargs):
        callback(pipeline, step_index, timestep, callback_kwargs)
        if step_index == 5:
            decoder.gate.set()
        return {}

    callback = PreviewCallback(pipe, *targets, decoder=decoder)
    run(pipe, chained, steps=6)
    assert newest.get_nowait().step_index == 5
    assert [frame.step_index for frame in frames] == (list(range(6)) if with_file else [])
    assert decoder.decoded == 6 if with_file else decoder.decoded <= 2
    assert callback.stats.dropped == 5


def test_a_writer_says_how_many_of_the_newest_it_wants(pipe):
    """An attribute `newest` makes any writer a live one."""

    class Screen:
        """Slower than the run."""

        newest = 1
        gate = threading.Event()

        def __init__(self):
            self.steps = []

        def write(self, frame):
            """Look at it."""
            self.gate.wait(20)
            self.steps.append(frame.step_index)

        def close(self):
            """Do nothing."""

    screen = Screen()
    callback = PreviewCallback(pipe, screen)
    run(pipe, opening(screen.gate, callback), steps=6)
    assert screen.steps[-1] == 5
    assert len(screen.steps) <= 3
    assert callback.stats.dropped == 6 - len(screen.steps)


def test_a_live_view_is_not_shown_the_last_preview_before_the_finished_picture(pipe, monkeypatch):
    """That follows at once and takes its place; a file has both."""
    monkeypatch.setattr("sd_progress.engine.HOLD_S", 10)
    seen, frames = [], []

    class Screen:
        """A live view."""

        newest = 1

        def write(self, frame):
            """Take it."""
            seen.append((frame.step_index, frame.source))

        def close(self):
            """Do nothing."""

    run(pipe, PreviewCallback(pipe, Screen(), frames.append, final=True), steps=4)
    assert seen[-1] == (3, "final")
    assert (3, "denoised") not in seen
    assert len(frames) == 5


def test_waiting_for_files_is_not_the_step_path(pipe):
    """It is counted by itself, also where the last callback is what waits."""
    callback = PreviewCallback(pipe, lambda frame: time.sleep(0.2))
    run(pipe, callback, steps=2, output_type="latent")
    assert callback.stats.drain_s > 0.2
    assert callback.stats.step_path_s < callback.stats.drain_s


def test_stats_count_what_a_full_queue_lost(pipe):
    """Nobody reads a queue of one: all but the newest; the next run counts anew."""
    callback = PreviewCallback(pipe, queue.Queue(1))
    run(pipe, callback, steps=20)
    assert callback.stats.dropped == 19
    run(pipe, callback, steps=20)
    assert callback.stats.dropped == 20


@pytest.mark.parametrize("newest", [0, "all", True])
def test_how_many_of_the_newest_is_checked(pipe, newest):
    """A writer's attribute of that name that means something else is told at construction."""
    writer = Broken()
    writer.newest = newest
    with pytest.raises(ValueError, match="newest of Broken must be a whole number from 1 on"):
        PreviewCallback(pipe, writer)


def test_nothing_of_a_call_is_kept(pipe):
    """Also of one that failed, once its files are complete: its frame would keep its tensors."""
    callback = PreviewCallback(pipe, [].append)

    class Marker:
        """Something that the call knows."""

    def failing(pipeline, step_index, timestep, callback_kwargs, marker=None):
        callback(pipeline, step_index, timestep, callback_kwargs)
        raise ValueError("boom")

    marker = Marker()
    alive, failing.marker = weakref.ref(marker), marker
    with contextlib.suppress(ValueError):
        run(pipe, failing)
    wait_for_worker()
    gc.disable()
    try:
        del failing, marker
        assert alive() is None
    finally:
        gc.enable()


def test_stats(pipe):
    """What a run's previews came to can be read at any time, and afterwards."""
    callback = PreviewCallback(pipe, [].append)
    assert callback.stats == Stats()
    run(pipe, callback, steps=4)
    stats = callback.stats
    assert (stats.steps, stats.frames) == (4, 4)
    assert stats.skipped == stats.dropped == stats.left_out == stats.spilled_bytes == 0
    assert stats.step_path_s > 0
    assert stats.worker_s > 0
    assert stats.peak_backlog_bytes > 0


def test_the_step_path_keeps_nothing(pipe):
    """What our own lines have allocated is as much after 120 steps as after 60."""
    callback, sizes = PreviewCallback(pipe, lambda frame: None), []

    def chained(pipeline, step_index, timestep, callback_kwargs):
        callback(pipeline, step_index, timestep, callback_kwargs)
        if step_index in (20, 60, 120):
            while callback.stats.frames <= step_index:
                time.sleep(0.01)
            gc.collect()
            ours = tracemalloc.Filter(inclusive=True, filename_pattern="*/sd_progress/*")
            traces = tracemalloc.take_snapshot().filter_traces([ours]).traces
            sizes.append(sum(trace.size for trace in traces))
        return {}

    tracemalloc.start()
    try:
        run(pipe, chained, steps=125)
    finally:
        tracemalloc.stop()
    assert abs(sizes[2] - sizes[1]) < 4000


def test_the_step_path_makes_no_tensors_of_numbers(pipe, monkeypatch):
    """Those that are needed are there already; the worker may do as it likes."""
    here, made = threading.get_ident(), []

    def recording(function):
        def record(*args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            if threading.get_ident() == here and caller.startswith("sd_progress."):
                made.append(caller)
            return function(*args, **kwargs)

        return record

    callback = PreviewCallback(pipe, [].append, source="both", initial=True)
    for name in ("tensor", "as_tensor", "from_numpy", "arange", "full", "zeros", "ones"):
        monkeypatch.setattr(torch, name, recording(getattr(torch, name)))
    run(pipe, callback, steps=5)
    assert callback.stats.frames == 6
    assert made == []


def limited_to(monkeypatch, count):
    """From now on, so many threads of ours can be started."""
    start, started = threading.Thread.start, []

    def limited(thread):
        started.extend([thread] if thread.name == "sd-progress" else [])
        if thread in started[count:]:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


def test_where_no_thread_can_be_started(pipe, monkeypatch):
    """The run goes on without previews, one warning says why, and no other thread stays."""
    before = threading.active_count()
    plain = run(tiny.sd(), None).images
    limited_to(monkeypatch, 0)
    with pytest.warns(PreviewWarning, match="can't start new thread"):
        pictures = run(pipe, PreviewCallback(pipe, [].append, [].append)).images
    assert np.array_equal(pictures, plain)
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 2])
def test_where_too_few_threads_can_be_started(pipe, tmp_path, monkeypatch, count):
    """The thread that draws writes, too, and every target gets every frame."""
    before, frames = threading.active_count(), []
    limited_to(monkeypatch, count)
    callback = PreviewCallback(pipe, frames.append, tmp_path / "steps", tmp_path / "run.gif")
    run(pipe, callback, steps=3)
    assert [frame.step_index for frame in frames] == [0, 1, 2]
    assert len(list((tmp_path / "steps").glob("*.png"))) == 3
    assert gif_frames(tmp_path / "run.gif") == 3
    assert threading.active_count() == before


def test_no_thread_is_left(pipe, tmp_path):
    """Whatever the targets, when the files are closed all threads have ended."""
    before = threading.active_count()
    with PreviewCallback(pipe, tmp_path / "a.gif", tmp_path / "b", queue.Queue(1)) as callback:
        run(pipe, callback)
        run(pipe, callback)
    assert threading.active_count() == before


def stepping(callback, now):
    """Call the callback after a step that took a second, and let its frame be drawn."""

    def chained(pipeline, step_index, timestep, callback_kwargs):
        now[0] += 1.0
        callback(pipeline, step_index, timestep, callback_kwargs)
        give_up_at = time.monotonic() + 10
        while callback.stats.frames + callback.stats.skipped <= step_index:
            assert time.monotonic() < give_up_at
            time.sleep(0.001)
        return {}

    return chained


def test_a_budget_skips_previews(pipe, monkeypatch):
    """Where each costs half a step, a tenth of the run affords one in five; the last is made."""
    now, frames = [0.0], []

    def dear(call):
        now[0] += 0.5
        return predict_x0(call)

    monkeypatch.setattr("sd_progress.run.predict_x0", dear)
    callback = PreviewCallback(pipe, frames.append, budget=0.1, clock=lambda: now[0])
    run(pipe, stepping(callback, now), steps=22)
    steps = [frame.step_index for frame in frames]
    assert steps[0] == 0
    assert steps[-1] == 21
    assert all(later - earlier >= 4 for earlier, later in itertools.pairwise(steps[:-1]))
    assert 4 <= len(steps) <= 6
    assert callback.stats.skipped == 22 - len(steps)


def test_a_budget_puts_off_full_decodes(pipe):
    """Each takes as long as a step: a quarter of the run affords one in four; else it is linear."""
    now, frames = [0.0], []
    decode = pipe.vae.decoder.forward

    def dear(*args, **kwargs):
        now[0] += 1.0
        return decode(*args, **kwargs)

    pipe.vae.decoder.forward = dear
    options = {"budget": 0.25, "vae_every": 1, "clock": lambda: now[0]}
    run(pipe, stepping(PreviewCallback(pipe, frames.append, **options), now), steps=14)
    kinds = [frame.decoder == "vae" for frame in frames]
    assert len(kinds) == 14
    assert 2 <= sum(kinds) <= 4
    assert not any(kinds[:3])


def test_x0_that_cannot_be_computed_later_leaves_noisy_frames(pipe, monkeypatch):
    """As where it is computed at once: one warning, and the latents before the step are shown."""
    monkeypatch.setattr("sd_progress.run._is_better_later", lambda call: True)
    monkeypatch.setitem(pipe.scheduler.config, "prediction_type", "unheard of")
    frames = []
    with pytest.warns(PreviewWarning, match="prediction_type must be epsilon"):
        run_failing(pipe, PreviewCallback(pipe, frames.append))
    assert [frame.source for frame in frames] == ["noisy"]


def run_failing(pipe, callback):
    """The scheduler does not know this prediction type either: one step by hand."""
    latents = torch.ones(1, 4, 8, 8)
    with callback:
        pipe.scheduler.set_timesteps(1)
        plain = type(pipe.scheduler).step
        type(pipe.scheduler).step = lambda self, model_output, timestep, sample: (sample,)
        try:
            pipe.scheduler.step(latents, pipe.scheduler.timesteps[0], latents)
        finally:
            type(pipe.scheduler).step = plain


def test_a_budget_is_a_share(pipe):
    """Others are refused at construction."""
    for budget in (0, 1.5, "2 %", True):
        with pytest.raises(ValueError, match="budget must be a share of the run, above 0"):
            PreviewCallback(pipe, [].append, budget=budget)


def test_on_error_raise(pipe):
    """On request a failure comes out of the pipeline call."""
    callback = PreviewCallback(pipe, Broken(), on_error="raise")
    with pytest.raises(OSError, match="the disk is full"):
        run(pipe, callback)
    callback.close()


def test_on_error_raise_does_not_hide_what_went_wrong(pipe):
    """The exception that leaves the `with` is the run's own; the next run starts afresh."""

    class FailsToClose:
        """Only the first time."""

        closed = 0

        def write(self, frame):
            """Take it."""

        def close(self):
            self.closed += 1
            if self.closed == 1:
                raise OSError("the disk is full")

    callback = PreviewCallback(pipe, FailsToClose(), on_error="raise")
    with callback:
        failing(pipe, callback, error=KeyboardInterrupt)
        with pytest.raises(OSError, match="the disk is full"):
            callback.close()
    callback = PreviewCallback(pipe, FailsToClose(), on_error="raise")
    with pytest.raises(KeyboardInterrupt), callback:
        failing_again(pipe, callback)
    assert np.isfinite(run(pipe, callback).images).all()


def test_x0_that_fails_gives_noisy_frames():
    """A scheduler whose `step` names its arguments otherwise costs x0 only."""

    class Renamed(diffusers.DDIMScheduler):
        """Says `x` for `sample`."""

        def step(self, model_output, timestep, x, return_dict=True):
            return super().step(model_output, timestep, x, return_dict=return_dict)

    pipe = tiny.sd(scheduler=Renamed(**tiny.BETAS))
    frames = []
    with pytest.warns(PreviewWarning, match=r"predicted x0 \(noisy latents are shown\) failed"):
        run(pipe, PreviewCallback(pipe, frames.append))
    assert [frame.source for frame in frames] == ["noisy"] * 4


def test_warnings_that_are_errors_do_not_break_the_run(pipe):
    """With `-W error` a failure is logged instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PreviewWarning)
        images = run(pipe, PreviewCallback(pipe, Broken())).images
    assert np.isfinite(images).all()


def test_without_latents_the_message_says_what_to_pass(pipe):
    """A call that hands over no latents is told how to."""
    callback = PreviewCallback(pipe, print)
    with pytest.warns(PreviewWarning, match=r"callback_on_step_end_tensor_inputs=\['latents'\]"):
        assert callback(pipe, 0, 1, {}) == {}
    callback.close()


# Wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every must be a whole number from 1 on, got 0; "),
        ({"every": True}, r"every must be .* got True"),
        ({"every": 1.5}, r"every must be .* got 1.5"),
        ({"vae_every": 0}, r"vae_every must be a whole number from 1 on, got 0; None"),
        ({"source": "x0"}, r"source must be one of 'denoised', 'noisy', 'both', got 'x0'"),
        ({"batch": "all"}, r"batch must be one of 'grid', 'first', got 'all'"),
        ({"on_error": "ignore"}, r"on_error must be one of 'warn', 'raise', got 'ignore'"),
        ({"min_interval_s": -1}, r"min_interval_s must be seconds from 0 on, got -1"),
        ({"decoder": "sd15"}, r"decoder must be .* got 'sd15'; did you mean"),
    ],
)
def test_wrong_options_raise_at_construction(pipe, options, message):
    """The message says what was expected, what came, and what to do."""
    with pytest.raises(ValueError, match=message):
        PreviewCallback(pipe, print, **options)
    assert "step" not in vars(pipe.scheduler)


def test_wrong_pipelines_targets_and_decoders(pipe):
    """So do a pipeline that is none, no target, an odd target and an odd decoder."""
    with pytest.raises(TypeError, match=r"pipe must be a diffusers pipeline .* got str; pass"):
        PreviewCallback("steps/", pipe)
    with pytest.raises(ValueError, match="targets must be at least one, got none"):
        PreviewCallback(pipe)
    with pytest.raises(TypeError, match="target must be"):
        PreviewCallback(pipe, 7)
    with pytest.raises(TypeError, match="decoder must be 'auto'"):
        PreviewCallback(pipe, print, decoder=7)


def test_vae_every_needs_a_vae():
    """A pipeline without one is told so."""
    pipe = tiny.sd()
    pipe.vae = None
    with pytest.raises(ValueError, match="vae_every must be None for a pipeline without a VAE"):
        PreviewCallback(pipe, print, vae_every=2)
