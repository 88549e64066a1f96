"""Listening to a scheduler and a pipeline without anybody noticing."""

import copy
import functools
import inspect
import sys
import threading
import types

import pytest
import tiny
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.modular_pipelines import PipelineState

from sd_progress.boundary import Boundary
from sd_progress.tap import (
    SchedulerTap,
    is_running,
    listen,
    running_calls,
    schedulers_of,
)


def scheduler():
    made = DDIMScheduler(**tiny.BETAS)
    made.set_timesteps(4)
    return made


def step(stepped):
    x = tiny.torch.ones(1, 4, 2, 2)
    return stepped.step(x, stepped.timesteps[0], x).prev_sample


class Calls(list):
    """A listener that keeps what it hears."""

    hears_copies = False

    def before(self, owner):
        return "seen before"

    def after(self, heard):
        assert heard.seen == "seen before"
        self.append(heard.args)


def heard_by(owner, method="step"):
    calls = Calls()
    return calls, listen(owner, method, calls)


def a_tap(clock=lambda: 0.0):
    return SchedulerTap(clock, Boundary("raise"))


def test_a_wrapped_method_keeps_its_signature_and_result():
    """Pipelines inspect `step` for `eta` and `generator`; both are still there."""
    plain, watched = scheduler(), scheduler()
    calls, _ = heard_by(watched)
    assert inspect.signature(watched.step) == inspect.signature(plain.step)
    assert tiny.torch.equal(step(watched), step(plain))
    assert len(calls) == 1


def test_a_deep_copy_steps_itself_unheard():
    """Pipelines deep-copy schedulers; the copy must not step the original."""
    original = EulerDiscreteScheduler(**tiny.BETAS)
    original.set_timesteps(4)
    calls, _ = heard_by(original)
    copied = copy.deepcopy(original)
    step(copied)
    assert (original.step_index, copied.step_index, len(calls)) == (None, 1, 0)


def test_listeners_leave_in_any_order():
    """The wrapper goes with the last of them."""
    watched = scheduler()
    (first, stop_first), (second, stop_second) = heard_by(watched), heard_by(watched)
    stop_first()
    step(watched)
    assert (len(first), len(second)) == (0, 1)
    stop_second()
    assert "step" not in vars(watched)


def test_another_wrapper_on_the_instance_survives():
    """What somebody else put there is called, and is there again afterwards."""
    watched, theirs = scheduler(), []
    plain = watched.step
    watched.step = lambda *args, **kwargs: theirs.append(1) or plain(*args, **kwargs)
    wrapper = watched.step
    calls, stop = heard_by(watched)
    step(watched)
    stop()
    assert (len(theirs), len(calls)) == (1, 1)
    assert watched.step is wrapper


def test_a_wrapper_put_over_ours_is_left_alone():
    """Leaving in the wrong order takes nobody else's wrapper away."""
    watched = scheduler()
    calls, stop = heard_by(watched)
    ours = watched.step
    watched.step = lambda *args, **kwargs: ours(*args, **kwargs)
    stop()
    step(watched)
    assert calls == []


def test_a_wrapper_that_copies_our_attributes_is_not_ours():
    """`functools.wraps` takes our marks along; the wrapper is another's all the same."""
    watched = scheduler()
    _, stop = heard_by(watched)
    theirs = functools.wraps(watched.step)(lambda *args, **kwargs: None)
    watched.step = theirs
    stop()
    assert watched.step is theirs


def test_a_deep_copy_of_a_scheduler_that_others_wrapped_too():
    """Our wrapper leaves the copy; the other's is bound to the copy, as without us."""
    original, stepped = EulerDiscreteScheduler(**tiny.BETAS), []
    original.set_timesteps(4)

    def theirs(self, *args, **kwargs):
        stepped.append(self)
        return type(self).step(self, *args, **kwargs)

    original.step = types.MethodType(theirs, original)
    calls, _ = heard_by(original)
    copied = copy.deepcopy(original)
    step(copied)
    step(copied)
    assert [each is copied for each in stepped] == [True, True]
    assert (original.step_index, copied.step_index, len(calls)) == (None, 2, 0)
    assert vars(copied)["step"].__func__ is theirs


def test_a_deep_copy_sheds_our_wrapper():
    """At its first step it is a scheduler like any other."""
    original = scheduler()
    heard_by(original)
    copied = copy.deepcopy(original)
    step(copied)
    assert "step" not in vars(copied)


def test_each_listener_has_a_clock_of_its_own():
    """Two taps on one scheduler both know when the first step began."""
    watched = scheduler()
    taps = [a_tap(lambda: 1.0), a_tap(lambda: 2.0)]
    for tap in taps:
        tap.attach([watched])
    step(watched)
    assert [tap.started_s for tap in taps] == [1.0, 2.0]


def test_what_fails_in_the_tap_does_not_reach_the_step():
    """A clock that raises costs the record, not the run."""
    watched, boundary = scheduler(), Boundary("raise")
    SchedulerTap(lambda: 1 / 0, boundary).attach([watched])
    assert step(watched) is not None
    with pytest.raises(ZeroDivisionError, match="division"):
        boundary.raise_kept()


def test_a_scheduler_that_cannot_be_wrapped_is_let_be():
    """One without a `__dict__` steps as ever; the tap has nothing to tell."""

    class Slots:
        """A proxy without attributes."""

        __slots__ = ()

        def step(self, model_output, timestep, sample):
            return sample

    boundary = Boundary("raise")
    tap = SchedulerTap(lambda: 0.0, boundary)
    tap.attach([Slots()])
    assert tap.take() == (None, False)
    with pytest.raises(TypeError, match="weak reference"):
        boundary.raise_kept()


def test_the_tap_records_by_name():
    """Positional arguments come out under their names; taking forgets."""
    watched, tap = scheduler(), a_tap(lambda: 5.0)
    tap.attach([watched])
    step(watched)
    call, is_first = tap.take()
    assert set(call.arguments) >= {"model_output", "timestep", "sample"}
    assert (is_first, tap.started_s) == (True, 5.0)
    assert tap.take()[0] is None


def test_the_step_index_is_the_one_of_the_step():
    """Whether or not it was set before, it is the index that the step used."""
    watched, tap = EulerDiscreteScheduler(**tiny.BETAS), a_tap()
    watched.set_timesteps(4)
    tap.attach([watched])
    x, indices = tiny.torch.ones(1, 4, 2, 2), []
    for t in watched.timesteps:
        x = watched.step(x, t, watched.scale_model_input(x, t)).prev_sample
        indices.append(tap.take()[0].step_index)
    assert indices == [0, 1, 2, 3]


def test_attaching_to_another_scheduler_frees_the_first():
    """One tap is on one scheduler."""
    first, second, tap = scheduler(), scheduler(), a_tap()
    tap.attach([first])
    tap.attach([second])
    assert ("step" in vars(first), "step" in vars(second)) == (False, True)


class Pipe(DiffusionPipeline):
    """Calls back, like a pipeline."""

    def __call__(self, function, state=None):
        image = "the local one"
        function()
        return image


def test_the_frame_of_a_call():
    """It is found from inside, has the locals, and is running until it returns."""
    found = []

    def inside():
        call = running_calls().inner
        found.append((call, call.local("nothing", "image"), call.local("nothing")))

    pipe = Pipe()
    pipe(inside)
    call, image, nothing = found[0]
    assert (image, nothing, call.pipe) == ("the local one", None, pipe)
    assert running_calls() is None
    assert not is_running(call.frame, threading.get_ident())


def test_what_is_read_of_a_call():
    """Variables, attributes of the pipeline, whether there is one; what is missing is left out."""
    found = []
    names = ("image", "self.vae_scale_factor", "self.nothing.at_all", "nothing", "state?")
    pipe = Pipe()
    pipe.vae_scale_factor = 8
    pipe(lambda: found.append(running_calls().inner.read(names)))
    assert found == [{"image": "the local one", "self.vae_scale_factor": 8, "state?": False}]


def test_the_state_of_a_modular_pipeline_counts_as_its_variables():
    """Its blocks keep height and width there, and not in the call."""
    found = []
    state = PipelineState(values={"height": 16})
    Pipe()(lambda: found.append(running_calls().inner.read(("height", "image"))), state)
    assert found == [{"height": 16, "image": "the local one"}]


def test_combined_pipelines_have_an_outer_and_an_inner_call():
    """The outer one is the run's, the inner one has the variables."""
    found = []
    inner, outer = Pipe(), Pipe()
    outer(lambda: inner(lambda: found.append(running_calls())))
    assert (found[0].outer.pipe, found[0].inner.pipe) == (outer, inner)


def test_the_schedulers_of_a_pipeline():
    """Its own and those of the pipelines in it, each once; nothing else that has a `step`."""
    inner, outer = Pipe(), Pipe()
    inner.scheduler = outer.scheduler = scheduler()
    outer.prior_scheduler, outer.prior_pipe = scheduler(), inner
    assert schedulers_of(outer) == [outer.scheduler, outer.prior_scheduler]


def test_copies_are_heard_on_request():
    """A pipeline that steps each frame with a copy of its scheduler is heard, and copies shed."""

    class OfCopies(Calls):
        """Hears copies, too."""

        hears_copies = True

    watched, calls = scheduler(), OfCopies()
    stop = listen(watched, "step", calls)
    copied = copy.deepcopy(watched)
    step(copied)
    stop()
    step(copied)
    assert len(calls) == 1
    assert "step" not in vars(copied)


def test_attributes_that_are_copied_and_put_back():
    """A pipeline that keeps its scheduler's state for each view still steps that scheduler."""
    watched, plain = EulerDiscreteScheduler(**tiny.BETAS), EulerDiscreteScheduler(**tiny.BETAS)
    calls, stop = heard_by(watched)
    for one in (watched, plain):
        one.set_timesteps(4)
        for _ in range(2):
            one.__dict__.update(copy.deepcopy(one.__dict__))
            step(one)
    assert (watched.step_index, len(calls)) == (plain.step_index, 2)
    stop()
    assert "step" not in vars(watched)


def test_parts_come_with_their_number():
    """The steps of single frames are kept with the variable that says which frame it was."""
    watched, tap = scheduler(), a_tap()
    tap.part = "image"
    tap.attach([watched])
    copied = copy.deepcopy(watched)

    class Frames(DiffusionPipeline):
        """Steps its third frame."""

        def __call__(self):
            image = 2
            step(copied)
            return image

    Frames()()
    assert [number for number, _ in tap.take_parts()] == [2]
    assert tap.take_parts() == []


def test_a_sample_that_is_part_of_a_tensor_is_kept_apart():
    """Some pipelines write the result over it before the callback comes."""
    watched, tap = scheduler(), a_tap()
    tap.attach([watched])
    whole = tiny.torch.ones(1, 8, 2, 2)
    watched.step(whole[:, :4], watched.timesteps[0], whole[:, :4])
    whole.zero_()
    assert tap.take()[0].sample.unique().tolist() == [1.0]


def test_a_running_call_is_seen_from_another_thread():
    """The other thread only looks."""
    seen = []

    def inside():
        call, ident = sys._getframe(1), threading.get_ident()
        watcher = threading.Thread(target=lambda: seen.append(is_running(call, ident)))
        watcher.start()
        watcher.join()

    Pipe()(inside)
    assert seen == [True]


def test_a_decorated_call_of_a_parent_is_known():
    """`torch.no_grad` around `__call__` and classes that derive from it are seen through."""

    class Derived(Pipe):
        """With a decorated call."""

        @tiny.torch.no_grad()
        def __call__(self, function):
            return super().__call__(function)

    found = []
    Derived()(lambda: found.append(running_calls()))
    assert found[0].inner.frame.f_code is Pipe.__call__.__code__
    assert found[0].outer.frame.f_code.co_name == "__call__"
    assert found[0].outer.frame is not found[0].inner.frame
