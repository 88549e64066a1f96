"""A pipeline's call as a generator of frames, and every way of leaving it."""

import asyncio
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import zoo
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from sd_progress import PreviewCallback, astream, demo_model_path, stops, stream
from sd_progress.writers import CallableWriter

SIZE = {"height": 16, "width": 24}
THREADS = "sd-progress"


@pytest.fixture
def pipe():
    return tiny.sd()


def call(pipe, **arguments):
    return tiny.sd_call(pipe, **SIZE, **arguments)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def collect(pipe, *, options=None, **arguments):
    return list(stream(pipe, **call(pipe, **arguments), **(options or {})))


async def acollect(pipe, **options):
    return [frame async for frame in astream(pipe, **{**call(pipe), **options})]


def whole(pipe, **arguments):
    """What a plain call returns."""
    return pipe(**call(pipe, **arguments)).images


# To the end


def test_frames_come_and_then_what_the_pipeline_returned(pipe):
    """The last frame is the finished picture, and has the pipeline's own output."""
    frames = collect(pipe)
    steps = [frame.step_index for frame in frames[:-1]]
    assert steps == sorted(set(steps))
    assert {frame.source for frame in frames[:-1]} <= {"denoised"}
    assert (frames[-1].source, frames[-1].progress, frames[-1].eta_s) == ("final", 1.0, 0.0)
    np.testing.assert_array_equal(frames[-1].output.images, whole(pipe))
    assert all(frame.output is None for frame in frames[:-1])


def test_asynchronously_it_is_the_same(pipe):
    """And the event loop goes on meanwhile."""

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        frames = await acollect(pipe)
        ticking.cancel()
        return frames, ticks

    frames, ticks = asyncio.run(main())
    assert frames[-1].source == "final"
    np.testing.assert_array_equal(frames[-1].output.images, whole(pipe))
    assert ticks > 10
    assert not threads()


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_any_output_type_comes_back(pipe, output_type):
    """Where it is no picture, the last preview is shown beside it."""
    last = collect(pipe, output_type=output_type)[-1]
    expected = pipe(**call(pipe, output_type=output_type)).images
    if output_type == "pil":
        np.testing.assert_array_equal(last.output.images[0], expected[0])
    else:
        assert torch.equal(last.output.images, expected)
    assert last.decoder == ("linear:sd1" if output_type == "latent" else "pipeline")


def test_a_tuple_comes_back_too(pipe):
    """`return_dict=False`."""
    last = collect(pipe, return_dict=False)[-1]
    np.testing.assert_array_equal(last.output[0], whole(pipe))
    assert last.images.shape == (1, 16, 24, 3)


def test_a_pipeline_without_a_callback():
    """The scheduler is enough."""
    zoo.load_families()
    case = zoo.build("DiTPipeline")
    sources = [frame.source for frame in stream(case.pipe, **case.call)]
    assert sources[-1] == "final"
    assert "denoised" in sources


def test_settings_of_the_thread_come_along(pipe):
    """Autocast is the thread's own, and changes the picture."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole(pipe)
        found = collect(pipe)[-1].output.images
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, whole(pipe))


def test_files_get_every_frame(pipe, tmp_path):
    """Also where the consumer is slow: it gets the newest only."""
    frames, every = [], []
    run = stream(
        pipe, **call(pipe, steps=20), targets=[tmp_path / "steps", CallableWriter(every.append)]
    )
    for frame in run:
        frames.append(frame)
        time.sleep(0.05)
    assert len(list((tmp_path / "steps").glob("step_*.png"))) == 20
    assert len(every) == 21
    assert len(frames) < 20


def test_the_random_state_is_left_alone(pipe):
    """As with any preview."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    collect(pipe)
    assert torch.equal(torch.get_rng_state(), before)


def test_phases_are_told_where_the_frames_are_taken(pipe):
    """In their order; from the second run on, with the time that they took."""
    first, second, here = [], [], set()

    def told(phase):
        here.add(threading.current_thread())
        first.append(phase)

    collect(pipe, options={"on_phase": told})
    collect(pipe, options={"on_phase": second.append})
    assert [phase.name for phase in first] == ["preparing", "denoising", "finishing"]
    assert {phase.eta_s for phase in first} == {None}
    assert all(phase.eta_s > 0 for phase in second)
    assert here == {threading.current_thread()}


def test_phases_asynchronously(pipe):
    """They are told in the event loop's thread."""
    names = []
    asyncio.run(acollect(pipe, on_phase=lambda phase: names.append(phase.name)))
    assert names == ["preparing", "denoising", "finishing"]


# Leaving early


def is_usable(pipe):
    """Whether it makes what a new one makes, and nothing of ours is on it."""
    assert not {"step"} & set(vars(pipe.scheduler))
    assert not threads()
    return np.array_equal(whole(pipe), whole(tiny.sd()))


class Slow:
    """A denoiser that takes its time, so that a run can be left in its middle."""

    def __init__(self, denoiser, seconds=0.05):
        self.steps = 0
        self._seconds = seconds
        self._handle = denoiser.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.steps += 1
        time.sleep(self._seconds)

    def remove(self):
        self._handle.remove()


@pytest.fixture
def slow(pipe):
    made = Slow(pipe.unet)
    yield made
    made.remove()


def test_leaving_the_loop_cancels(pipe, slow):
    """The run is over when the loop has been left."""
    for _frame in stream(pipe, **call(pipe, steps=100)):
        break
    assert not threads()
    assert slow.steps < 10
    slow.remove()
    assert is_usable(pipe)


def test_closing_the_generator_cancels(pipe, slow):
    """As with any generator."""
    frames = stream(pipe, **call(pipe, steps=100))
    next(frames)
    frames.close()
    assert not threads()
    assert slow.steps < 10
    assert list(frames) == []


def test_an_exception_in_the_loop_cancels(pipe, slow):
    """It is the consumer's own, and is not hidden."""

    def consume():
        for _frame in stream(pipe, **call(pipe, steps=100)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    gc.collect()
    assert not threads()
    assert slow.steps < 10


def test_a_stream_that_is_never_asked_calls_nothing(pipe, slow):
    """Nothing runs before the first frame is wanted."""
    stream(pipe, **call(pipe)).close()
    assert slow.steps == 0


def test_leaving_an_asynchronous_loop_cancels(pipe, slow):
    """`aclose`, as `contextlib.aclosing` does it."""

    async def main():
        frames = astream(pipe, **call(pipe, steps=100))
        async for _frame in frames:
            break
        await frames.aclose()
        return threads()

    assert asyncio.run(main()) == []
    assert slow.steps < 10


def test_cancelling_the_task_cancels(pipe, slow):
    """And the task ends only when the pipeline can be used again."""

    async def main():
        task = asyncio.create_task(acollect(pipe))
        await asyncio.sleep(0.08)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return threads()

    assert asyncio.run(main()) == []
    slow.remove()
    assert is_usable(pipe)


def test_an_exception_in_the_pipeline_is_raised_here(pipe, tmp_path):
    """With its traceback; what was made until then is there."""
    calls = []

    def failing(module, arguments):
        calls.append(module)
        if len(calls) > 3:
            raise OSError("the denoiser broke")

    handle = pipe.unet.register_forward_pre_hook(failing)
    run = stream(pipe, **call(pipe, steps=20), targets=[tmp_path / "run.gif"])
    with pytest.raises(OSError, match="the denoiser broke") as caught:
        list(run)
    handle.remove()
    assert any(entry.name == "failing" for entry in caught.traceback)
    assert (tmp_path / "run.gif").exists()
    del caught
    gc.collect()
    assert is_usable(pipe)


def test_an_exception_in_the_pipeline_is_raised_in_the_task(pipe):
    """Asynchronously, too."""
    with pytest.raises(ValueError, match="divisible by 8"):
        asyncio.run(acollect(pipe, height=13))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_cancels_and_leaves_the_files_whole(tmp_path):
    """A script that is interrupted ends at once, its GIF complete."""
    script = textwrap.dedent(
        """
        import sys, time
        sys.path.insert(0, sys.argv[1])
        import test_stream, tiny
        from sd_progress import stream
        pipe = tiny.sd()
        slow = test_stream.Slow(pipe.unet, 0.1)
        try:
            for frame in stream(pipe, **test_stream.call(pipe, steps=200), targets=["run.gif"]):
                print(frame.step_index, flush=True)
        except KeyboardInterrupt:
            print("left after", slow.steps, test_stream.threads(), flush=True)
        """
    )
    words = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    steps = int(rest.rpartition("left after ")[2].split()[0])
    assert rest.endswith("[]\n")
    assert steps < 10
    assert (tmp_path / "run.gif").read_bytes()[-1:] == b";"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_a_program_that_ends_takes_its_runs_along(tmp_path):
    """A generator that nobody closes does not keep the process; the run ends in good order."""
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_stream, tiny
        from sd_progress import stream
        pipe = tiny.sd()
        pipe.maybe_free_model_hooks = lambda: print("put away")
        slow = test_stream.Slow(pipe.unet, 0.1)
        frames = stream(pipe, **test_stream.call(pipe, steps=500), targets=["steps"])
        next(frames)
        sys.modules["kept"] = frames
        """
    )
    words = [sys.executable, "-c", script, str(Path(__file__).parent)]
    ended = subprocess.run(words, cwd=tmp_path, check=True, timeout=60, stdout=subprocess.PIPE)
    assert ended.stdout == b"put away\n"
    names = [path.name for path in (tmp_path / "steps").iterdir()]
    assert 0 < len(names) < 20
    assert {Path(name).suffix for name in names} == {".png"}  # the lock of an open folder is gone


def test_two_hundred_runs_leave_no_thread(pipe):
    """Half of them left early; the pipeline is then as it was."""
    for number in range(200):
        for _frame in stream(pipe, **call(pipe, steps=2)):
            if number % 2:
                break
    assert not threads()
    assert is_usable(pipe)


# Keeping what is there


def test_a_stopped_run_keeps_what_the_model_expects(pipe, slow):
    """The pipeline finishes x0, without its noise, and returns it."""
    every = []
    options = {"keep_latents": True, "targets": [every.append]}
    for frame in stream(pipe, **call(pipe, steps=50), **options):
        frame.stop()
    assert slow.steps < 10
    with torch.no_grad():
        decoded = pipe.vae.decode(every[-2].latents, return_dict=False)[0]
    expected = pipe.image_processor.postprocess(decoded, output_type="np")
    np.testing.assert_allclose(frame.output.images, expected, atol=1e-5)


def test_a_pipeline_that_cannot_finish_early_leaves_its_guess():
    """Decoded by the VAE, as the last frame, without an output."""
    zoo.load_families()
    case = zoo.build("DiTPipeline")
    Slow(case.pipe.transformer)
    frames = []
    for frame in stream(case.pipe, **{**case.call, "num_inference_steps": 50}):
        frames.append(frame)
        frame.stop()
    assert [frames[-1].decoder, frames[-1].source] == ["vae", "denoised"]
    assert frames[-1].output is None
    assert frames[-1].step_index < 10


def test_an_old_frame_does_not_stop_a_new_run(pipe, slow):
    """Nor does it fail."""
    old = collect(pipe)[0]
    frames = stream(pipe, **call(pipe))
    next(frames)
    old.stop()
    assert [*frames][-1].output is not None


def test_a_frame_stops_its_own_run_only(pipe):
    """The next run of the same callback goes on."""
    frames = []

    def stop_with_the_first(frame):
        frames.append(frame)
        frames[0].stop()

    callback = PreviewCallback(pipe, stop_with_the_first)
    for _ in range(2):
        slow = Slow(pipe.unet)
        pipe(**call(pipe, steps=20), callback_on_step_end=callback)
        slow.remove()
    assert sum(frame.run_index == 0 for frame in frames) < 10
    assert sum(frame.run_index == 1 for frame in frames) == 20


def test_stop_when(pipe):
    """A function of the frame ends the run; any callback takes one."""
    seen = []
    callback = PreviewCallback(pipe, seen.append, stop_when=lambda frame: frame.step_index >= 1)
    slow = Slow(pipe.unet)
    images = pipe(**call(pipe, steps=50), callback_on_step_end=callback).images
    slow.remove()
    assert images.shape == (1, 16, 24, 3)
    assert slow.steps < 10


def test_nan_stops_the_run(pipe):
    """`stops.is_not_finite`: nothing will come of it any more."""

    def broken(module, arguments, output):
        time.sleep(0.02)
        return (output[0] * float("nan"),)

    handle = pipe.unet.register_forward_hook(broken)
    with pytest.warns(UserWarning, match="latents must be finite"):
        frames = collect(pipe, steps=100, options={"stop_when": stops.is_not_finite})
    handle.remove()
    assert not frames[0].is_finite
    assert max(frame.step_index for frame in frames[:-1]) < 50


# Wrong use


def test_a_pipeline_is_streamed_once_at_a_time(pipe, slow):
    """Two runs would mix up their pictures; the first one goes on."""
    first = stream(pipe, **call(pipe))
    next(first)
    with pytest.raises(RuntimeError, match="pipe must be idle, got a StableDiffusionPipeline"):
        next(stream(pipe, **call(pipe)))
    assert [*first][-1].source == "final"
    assert collect(pipe)[-1].source == "final"


def test_what_is_no_pipeline():
    """It is told before anything else."""
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline"):
        stream("a prompt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"promt": "a typo"},
            "call_kwargs must be arguments of StableDiffusion3Pipel.*, got 'promt'",
        ),
        ({"callback_on_step_end": print}, "callback_on_step_end must be left out"),
        ({"every": 0}, "every must be a whole number from 1 on"),
        ({"stop_when": 3}, "stop_when|not iterable"),
        ({"on_phase": "loud"}, "on_phase must be a function of a Phase"),
    ],
)
def test_wrong_options_raise_at_once(options, message):
    """Before anything runs, and before the first frame is asked for."""
    pipe = tiny.sd3(StableDiffusion3Pipeline)
    with pytest.raises((TypeError, ValueError), match=message):
        stream(pipe, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        astream(pipe, **options)


def test_the_demo_model_streams():
    """The whole way, with text; the picture is that of a plain call."""
    pipe = DiffusionPipeline.from_pretrained(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": "the sea at sunset", "num_inference_steps": 8, "output_type": "np"}
    generator = torch.Generator().manual_seed
    *_, last = stream(pipe, **arguments, generator=generator(4))
    expected = pipe(**arguments, generator=generator(4)).images
    np.testing.assert_array_equal(last.output.images, expected)
