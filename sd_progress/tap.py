"""Owns how a run is listened to: the wrapped `scheduler.step`, the pipeline's end, its call frame.

The only module that knows that Python frames exist, and the only one that puts anything on the
user's objects. What it puts there are instance attributes that shadow a method, keep its signature,
and are taken away again when the last listener leaves.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Protocol

from .boundary import Boundary
from .x0 import StepCall

_OURS = "_sd_progress_wrapper"
_lock = threading.RLock()  # several callbacks may come and go on one scheduler, in any thread


class Pipeline(Protocol):
    """What is read of a diffusers pipeline; every class derived from DiffusionPipeline has it."""

    scheduler: object

    def maybe_free_model_hooks(self) -> None:
        """Called by pipelines at the end of `__call__`."""


class Listener(Protocol):
    """Is told of each call of a method; must not raise, because the caller is the run itself."""

    def before(self, owner: object) -> object:
        """Just before the call; what is returned here is given to `after`."""

    def after(
        self,
        owner: object,
        seen: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> None:
        """Just after the call, with what the method was given and what it returned."""


@dataclass(frozen=True, eq=False)
class _Wrapper:
    """What is known of a wrapped method: our function, who listens, and what was there before."""

    function: Callable[..., object]
    listeners: list[Listener]
    shadowed: Callable[..., object] | None


def listen(owner: object, method: str, listener: Listener) -> Callable[[], None]:
    """Have `listener` told of every call of `owner.method`; returns the undo, to be called once.

    The wrapper is an instance attribute bound with `types.MethodType`, because pipelines deep-copy
    schedulers (the copy then steps itself, unheard) and inspect the signature of `step`. Several
    listeners share one wrapper; the last one to leave removes it. A shallow copy made meanwhile
    would step its original: no attribute of an instance can help that.
    """
    with _lock:
        wrapper = _wrapper_of(owner, method) or _wrap(owner, method)
        wrapper.listeners.append(listener)
    return functools.partial(_unlisten, weakref.ref(owner), method, wrapper, listener)


def _wrapper_of(owner: object, method: str) -> _Wrapper | None:
    """Ours, and not one that took over our attributes with `functools.wraps`."""
    bound = vars(owner).get(method)
    wrapper = getattr(bound, _OURS, None)
    is_ours = wrapper is not None and getattr(bound, "__func__", None) is wrapper.function
    return wrapper if is_ours else None


def _wrap(owner: object, method: str) -> _Wrapper:
    listeners: list[Listener] = []
    shadowed = vars(owner).get(method)  # someone else's wrapper on the instance, if any
    plain = getattr(type(owner), method)
    owner_ref = weakref.ref(owner)

    @functools.wraps(plain)
    def heard(self: object, *args: object, **kwargs: object) -> object:
        if self is not owner_ref():
            return _as_it_was(self, method, wrapper)(*args, **kwargs)
        original = shadowed or functools.partial(plain, self)
        told = tuple(listeners)
        seen = [listener.before(self) for listener in told]
        output = original(*args, **kwargs)
        for listener, saw in zip(told, seen, strict=True):
            listener.after(self, saw, args, kwargs, output)
        return output

    wrapper = _Wrapper(heard, listeners, shadowed)
    setattr(heard, _OURS, wrapper)
    vars(owner)[method] = types.MethodType(heard, owner)
    return wrapper


def _as_it_was(copied: object, method: str, wrapper: _Wrapper) -> Callable[..., object]:
    """The method of a deep copy, from which our wrapper is taken away."""
    if _wrapper_of(copied, method) is wrapper:
        del vars(copied)[method]
        if wrapper.shadowed is not None:
            function = getattr(wrapper.shadowed, "__func__", None)
            rebound = wrapper.shadowed if function is None else types.MethodType(function, copied)
            vars(copied)[method] = rebound
    method_of_copy: Callable[..., object] = getattr(copied, method)
    return method_of_copy


def _unlisten(
    owner_ref: weakref.ref[object], method: str, wrapper: _Wrapper, listener: Listener
) -> None:
    with _lock:
        if listener in wrapper.listeners:
            wrapper.listeners.remove(listener)
        owner = owner_ref()
        if owner is None or wrapper.listeners or _wrapper_of(owner, method) is not wrapper:
            return
        if wrapper.shadowed is None:
            del vars(owner)[method]
        else:
            vars(owner)[method] = wrapper.shadowed


class SchedulerTap:
    """The last `scheduler.step` of a pipeline, kept until it is asked for.

    Nothing is computed when the scheduler steps: references are kept, and let go of again at the
    next step or when they are taken.
    """

    def __init__(self, clock: Callable[[], float], boundary: Boundary) -> None:
        self._clock = clock
        self._boundary = boundary
        self._scheduler: weakref.ref[object] | None = None
        self._signature: inspect.Signature | None = None
        self._stop: Callable[[], None] | None = None
        self._last: StepCall | None = None
        self._steps = 0
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
        with self._boundary.around("listening to the scheduler"):
            self._signature = inspect.signature(step)
            self._scheduler = weakref.ref(scheduler)
            self._stop = listen(scheduler, "step", self)

    def detach(self) -> None:
        """Leave the scheduler as it was found."""
        stop, self._stop, self._scheduler = self._stop, None, None
        if stop is not None:
            stop()
        self.forget()

    def forget(self) -> None:
        """Start anew: the next step is a run's first."""
        self._last, self._steps, self.started_s = None, 0, None

    def forget_earlier(self) -> None:
        """The last step was the first of a new run; what was before it is forgotten."""
        self._steps, self.started_s = min(self._steps, 1), None

    def take(self) -> tuple[StepCall | None, bool]:
        """The step since the last `take`, and whether it was the first of its run."""
        last, self._last = self._last, None
        return last, self._steps == 1

    def before(self, owner: object) -> object:
        """Read what the step is going to change."""
        with self._boundary.around("reading the scheduler"):
            if self.started_s is None:
                self.started_s = self._clock()
            index = getattr(owner, "step_index", None)
            return index, bool(getattr(owner, "state_in_first_order", True))
        return None

    def after(
        self,
        owner: object,
        seen: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> None:
        """Keep the call, by the names of its parameters."""
        self._last = None
        with self._boundary.around("reading the scheduler's step"):
            if not isinstance(seen, tuple) or self._signature is None:
                return
            index, is_first_order = seen
            if index is None:  # set by step() itself, which then counted one up
                counted = getattr(owner, "step_index", None)
                index = counted - 1 if isinstance(counted, int) else None
            bound = self._signature.bind(owner, *args, **kwargs).arguments
            self._steps += 1
            self._last = StepCall(owner, bound, index, is_first_order, output)


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


def is_called_by(codes: frozenset[CodeType]) -> bool:
    """Whether the caller's caller runs one of `codes`."""
    return sys._getframe(2).f_code in codes
