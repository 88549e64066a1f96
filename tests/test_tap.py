"""Listening to a scheduler and a pipeline without anybody noticing."""

import copy
import inspect
import sys
import threading

import tiny
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from sd_progress.tap import (
    SchedulerTap,
    call_code,
    enclosing_call,
    is_running,
    listen,
    local,
)


def scheduler():
    made = DDIMScheduler(**tiny.BETAS)
    made.set_timesteps(4)
    return made


def step(stepped):
    x = tiny.torch.ones(1, 4, 2, 2)
    return stepped.step(x, stepped.timesteps[0], x).prev_sample


def heard_by(owner, method="step"):
    calls = []
    stop = listen(owner, method, lambda before, args, kwargs, output: calls.append(args))
    return calls, stop


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


def test_the_tap_records_by_name():
    """Positional arguments come out under their names; taking forgets."""
    watched, tap = scheduler(), SchedulerTap(clock=lambda: 5.0)
    tap.attach(watched)
    step(watched)
    call, is_first = tap.take()
    assert set(call.arguments) >= {"model_output", "timestep", "sample"}
    assert (is_first, tap.started_s) == (True, 5.0)
    assert tap.take()[0] is None


def test_the_step_index_is_the_one_of_the_step():
    """Whether or not it was set before, it is the index that the step used."""
    watched, tap = EulerDiscreteScheduler(**tiny.BETAS), SchedulerTap(clock=lambda: 0.0)
    watched.set_timesteps(4)
    tap.attach(watched)
    x, indices = tiny.torch.ones(1, 4, 2, 2), []
    for t in watched.timesteps:
        x = watched.step(x, t, watched.scale_model_input(x, t)).prev_sample
        indices.append(tap.take()[0].step_index)
    assert indices == [0, 1, 2, 3]


def test_attaching_to_another_scheduler_frees_the_first():
    """One tap is on one scheduler."""
    first, second, tap = scheduler(), scheduler(), SchedulerTap(clock=lambda: 0.0)
    tap.attach(first)
    tap.attach(second)
    assert ("step" in vars(first), "step" in vars(second)) == (False, True)


class Pipe:
    """Calls back, like a pipeline."""

    def __call__(self, function):
        image = "the local one"
        function()
        return image


def test_the_frame_of_a_call():
    """It is found from inside, has the locals, and is running until it returns."""
    found = []

    def inside():
        call = enclosing_call(call_code(Pipe))
        found.append((call, local(call, "nothing", "image"), local(call, "nothing")))

    pipe = Pipe()
    pipe(inside)
    call, image, nothing = found[0]
    assert (image, nothing) == ("the local one", None)
    assert enclosing_call(call_code(Pipe)) is None
    assert not is_running(call, threading.get_ident())


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
    Derived()(lambda: found.append(enclosing_call(call_code(Derived))))
    assert found[0].f_code is Pipe.__call__.__code__
    assert len(call_code(Derived)) == 2
