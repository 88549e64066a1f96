"""Owns how a run is listened to: the wrapped `scheduler.step`, the pipeline's end, its call frame.

The only module that knows that Python frames exist, and the only one that puts anything on the
user's objects. What it puts there are instance attributes that shadow a method, keep its signature,
and are taken away again when the last listener leaves.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Protocol

from .x0 import StepCall

_LISTENERS = "_sd_progress_listeners"
_SHADOWED = "_sd_progress_shadowed"


class Pipeline(Protocol):
    """What is read of a diffusers pipeline; every class derived from DiffusionPipeline has it."""

    scheduler: object

    def maybe_free_model_hooks(self) -> None:
        """Called by pipelines at the end of `__call__`."""


class MethodListener(Protocol):
    """Called after each call of a wrapped method; must not raise."""

    def __call__(
        self,
        before: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> None:
        """`before` is what the wrapper's `look` saw just before the call."""


def listen(
    owner: object,
    method: str,
    listener: MethodListener,
    look: Callable[[object], object] = lambda owner: None,
) -> Callable[[], None]:
    """Have `listener` called after every call of `owner.method`; returns the undo.

    The wrapper is an instance attribute bound with `types.MethodType`, because pipelines deep-copy
    schedulers (the copy then steps itself, unheard) and inspect the signature of `step`. Several
    listeners share one wrapper; the last one to leave removes it.

    Args:
        owner: a scheduler or pipeline.
        method: the name of its method.
        listener: called after the method returned, with what it was given and what it returned.
        look: reads the state of `owner` just before the call.
    """
    listeners = getattr(vars(owner).get(method), _LISTENERS, None)
    if listeners is None:
        listeners = _wrap(owner, method, look)
    listeners.append(listener)
    return functools.partial(_unlisten, weakref.ref(owner), method, listeners, listener)


def _wrap(owner: object, method: str, look: Callable[[object], object]) -> list[MethodListener]:
    listeners: list[MethodListener] = []
    shadowed = vars(owner).get(method)  # someone else's wrapper on the instance, if any
    plain = getattr(type(owner), method)
    owner_ref = weakref.ref(owner)

    @functools.wraps(plain)
    def heard(self: object, *args: object, **kwargs: object) -> object:
        original = shadowed or functools.partial(plain, self)
        if self is not owner_ref() or not listeners:
            return original(*args, **kwargs)
        before = look(self)
        output = original(*args, **kwargs)
        for listener in tuple(listeners):
            listener(before, args, kwargs, output)
        return output

    setattr(heard, _LISTENERS, listeners)
    setattr(heard, _SHADOWED, shadowed)
    vars(owner)[method] = types.MethodType(heard, owner)
    return listeners


def _unlisten(
    owner_ref: weakref.ref[object],
    method: str,
    listeners: list[MethodListener],
    listener: MethodListener,
) -> None:
    if listener in listeners:
        listeners.remove(listener)
    owner = owner_ref()
    wrapper = vars(owner).get(method) if owner is not None else None
    if listeners or getattr(wrapper, _LISTENERS, None) is not listeners:
        return
    shadowed = getattr(wrapper, _SHADOWED)
    if shadowed is None:
        del vars(owner)[method]
    else:
        vars(owner)[method] = shadowed


class SchedulerTap:
    """The last `scheduler.step` of a pipeline, kept until it is asked for.

    Nothing is computed when the scheduler steps: references are kept, and let go of again at the
    next step or when they are taken.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._scheduler: weakref.ref[object] | None = None
        self._stop: Callable[[], None] | None = None
        self._last: StepCall | None = None
        self._steps = 0
        self._attachments = 0
        self.started_s: float | None = None

    def attach(self, scheduler: object) -> None:
        """Listen to this scheduler, and to no other; again if it was already listened to."""
        current = self._scheduler() if self._scheduler is not None else None
        if self._stop is not None and current is scheduler:
            return
        self.detach()
        step = getattr(type(scheduler), "step", None)
        if step is None:
            return
        signature = inspect.signature(step)
        self._attachments += 1
        self._scheduler = weakref.ref(scheduler)
        record = functools.partial(self._record, signature, self._scheduler)
        self._stop = listen(scheduler, "step", record, look=self._look)

    def detach(self) -> None:
        """Leave the scheduler as it was found."""
        if self._stop is not None:
            self._stop()
        self._stop = self._scheduler = None
        self.forget()

    def disarmer(self) -> Callable[[], None]:
        """What detaches, unless the tap was attached anew in the meantime."""
        attachment = self._attachments

        def disarm() -> None:
            if attachment == self._attachments:
                self.detach()

        return disarm

    def forget(self) -> None:
        """Start anew: the next step is a run's first."""
        self._last, self._steps, self.started_s = None, 0, None

    def take(self) -> tuple[StepCall | None, bool]:
        """The step since the last `take`, and whether it was the first of its run."""
        last, self._last = self._last, None
        return last, self._steps == 1

    def _look(self, scheduler: object) -> tuple[int | None, bool]:
        if self.started_s is None:
            self.started_s = self._clock()
        index = getattr(scheduler, "step_index", None)
        return index, bool(getattr(scheduler, "state_in_first_order", True))

    def _record(
        self,
        signature: inspect.Signature,
        scheduler_ref: weakref.ref[object],
        before: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> None:
        scheduler = scheduler_ref()
        assert isinstance(before, tuple)
        index, is_first_order = before
        if index is None:  # set by step() itself, which then counted one up
            after = getattr(scheduler, "step_index", None)
            index = after - 1 if isinstance(after, int) else None
        try:
            bound = signature.bind(scheduler, *args, **kwargs).arguments
        except TypeError:  # another's wrapper takes other arguments: no x0 from this step
            return
        self._steps += 1
        self._last = StepCall(scheduler, bound, index, is_first_order, output)


@functools.cache
def call_code(pipeline_class: type) -> frozenset[CodeType]:
    """The code objects of `__call__`, of a pipeline's class and of its parents."""
    calls = (vars(cls).get("__call__") for cls in pipeline_class.__mro__)
    plain = (inspect.unwrap(call) for call in calls if call is not None)
    return frozenset(call.__code__ for call in plain if hasattr(call, "__code__"))


def enclosing_call(codes: frozenset[CodeType]) -> FrameType | None:
    """The innermost frame on this thread's stack that runs one of `codes`; None if none does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


def is_running(call: FrameType, thread_id: int) -> bool:
    """Whether `call` is still on the stack of the thread `thread_id`, asked from another thread."""
    frame = sys._current_frames().get(thread_id)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def local(call: FrameType, *names: str) -> object:
    """The first of these local variables of a running call that exists; None if none does."""
    found = call.f_locals
    return next((found[name] for name in names if name in found), None)


def is_called_by_chain() -> bool:
    """Whether the caller's caller is a diffusers `MultiPipelineCallbacks`, which needs its dict."""
    caller = sys._getframe(2)
    if caller.f_code.co_name != "__call__":
        return False
    return type(caller.f_locals.get("self")).__name__ == "MultiPipelineCallbacks"
