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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from torch import Tensor

from .boundary import Boundary
from .cost import Stopwatch
from .x0 import StepCall, plain_attribute

_OURS = "_sd_progress_wrapper"
_lock = threading.RLock()  # several callbacks may come and go on one scheduler, in any thread


class Pipeline(Protocol):
    """What is read of a diffusers pipeline; every class derived from DiffusionPipeline has it."""

    scheduler: object

    def maybe_free_model_hooks(self) -> None:
        """Called by pipelines at the end of `__call__`."""


@dataclass(frozen=True, eq=False)
class Heard:
    """One call of a method that is listened to.

    Attributes:
        owner: whose method; a deep copy of it, for listeners that hear those.
        seen: what the listener's `before` returned.
        args: what the method was given.
        kwargs: likewise.
        output: what it returned.
    """

    owner: object
    seen: object
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    output: object


class Listener(Protocol):
    """Is told of each call of a method; must not raise, because the caller is the run itself."""

    @property
    def hears_copies(self) -> bool:
        """Whether it is also told of the calls of the owner's deep copies."""

    def before(self, owner: object) -> object:
        """Just before the call; what is returned here is given to `after`."""

    def after(self, heard: Heard) -> None:
        """Just after the call."""


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
        told, owner = tuple(listeners), owner_ref()
        if owner is not None and getattr(vars(owner).get(method), "__self__", None) is self:
            self = owner  # also where a copy of the owner's attributes was put back into it
        if self is owner:
            original = shadowed or functools.partial(plain, self)
        else:
            told = tuple(listener for listener in told if listener.hears_copies)
            original = _as_it_was(self, method, wrapper, shed=not told)
        seen = [listener.before(self) for listener in told]
        output = original(*args, **kwargs)
        for listener, saw in zip(told, seen, strict=True):
            listener.after(Heard(self, saw, args, kwargs, output))
        return output

    wrapper = _Wrapper(heard, listeners, shadowed)
    setattr(heard, _OURS, wrapper)
    vars(owner)[method] = types.MethodType(heard, owner)
    return wrapper


def _as_it_was(
    copied: object, method: str, wrapper: _Wrapper, *, shed: bool
) -> Callable[..., object]:
    """The method of a deep copy; to `shed` is to take our wrapper away from the copy."""
    if wrapper.shadowed is None:
        original: Callable[..., object] = functools.partial(getattr(type(copied), method), copied)
    else:
        function = getattr(wrapper.shadowed, "__func__", None)
        original = wrapper.shadowed if function is None else types.MethodType(function, copied)
    if shed and _wrapper_of(copied, method) is wrapper:
        del vars(copied)[method]
        if wrapper.shadowed is not None:
            vars(copied)[method] = original
    return original


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
    """The last `step` of a run's schedulers, kept until it is asked for.

    Nothing is computed when a scheduler steps: references are kept, and let go of again at the
    next step or when they are taken.

    Args:
        clock: seconds, monotonic.
        boundary: where failures end.
        watch: measures what this costs the run; None does not.
        on_step: called after each step, on the run's thread.

    Attributes:
        part: the call's variable that says which frame of a video is stepped, for pipelines that
            step each with a copy of the scheduler; None for all others.
        started_s: when the run's first step began.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        boundary: Boundary,
        watch: Stopwatch | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self._watch = Stopwatch(clock) if watch is None else watch
        self._clock = clock
        self._boundary = boundary
        self._on_step = on_step
        self._heard: list[tuple[weakref.ref[object], Callable[[], None]]] = []
        self._last: StepCall | None = None
        self._counts: dict[int, int] = {}
        self._parts: list[tuple[int, StepCall]] = []
        self._steps = 0
        self.part: str | None = None
        self.started_s: float | None = None

    @property
    def hears_copies(self) -> bool:
        """Whether copies of the schedulers step parts of the latents."""
        return self.part is not None

    def attach(self, schedulers: Iterable[object]) -> None:
        """Listen to these schedulers, and to no other; what is listened to already stays so."""
        wanted = {id(scheduler): scheduler for scheduler in schedulers}
        heard = {id(owner()): stop for owner, stop in self._heard}
        if wanted.keys() == heard.keys():
            return
        self.detach()
        for scheduler in wanted.values():
            with self._boundary.around("listening to the scheduler"):
                self._heard.append((weakref.ref(scheduler), listen(scheduler, "step", self)))

    def detach(self) -> None:
        """Leave the schedulers as they were found."""
        heard, self._heard = self._heard, []
        for _, stop in heard:
            stop()
        self.forget()

    def forget(self) -> None:
        """Start anew: the next step is a run's first."""
        self._last, self._steps, self.started_s = None, 0, None
        self._counts.clear()
        self._parts.clear()

    def forget_earlier(self) -> None:
        """The last step was the first of a new run; what was before it is forgotten."""
        self._steps, self.started_s = min(self._steps, 1), None
        self._counts = {key: min(count, 1) for key, count in self._counts.items()}

    def take(self) -> tuple[StepCall | None, bool]:
        """The step since the last `take`, and whether it was its scheduler's first in the run."""
        last, self._last = self._last, None
        return last, last is not None and self._counts.get(id(last.scheduler)) == 1

    def take_parts(self) -> list[tuple[int, StepCall]]:
        """The steps of single frames since the last time, with the frames' numbers."""
        parts, self._parts = self._parts, []
        return parts

    @property
    def count(self) -> int:
        """How many steps the run has made."""
        return self._steps

    @property
    def last(self) -> StepCall | None:
        """The step since the last `take`."""
        return self._last

    def before(self, owner: object) -> object:
        """Read what the step is going to change."""
        with self._boundary.around("reading the scheduler"), self._watch:
            if self.started_s is None:
                self.started_s = self._clock()
            index = plain_attribute(owner, "step_index")
            return index, plain_attribute(owner, "state_in_first_order") is not False
        return None

    def after(self, heard: Heard) -> None:
        """Keep the call, by the names of its parameters."""
        if all(scheduler() is not heard.owner for scheduler, _ in self._heard):
            self._after_part(heard)
            return
        self._last = None
        with self._boundary.around("reading the scheduler's step"), self._watch:
            self._last = self._step_call(heard)
            self._steps += 1
            self._counts[id(heard.owner)] = self._counts.get(id(heard.owner), 0) + 1
        if self._on_step is not None:
            self._on_step()

    def _after_part(self, heard: Heard) -> None:
        with self._boundary.around("reading the scheduler's step"), self._watch:
            calls = running_calls()
            number = None if calls is None or self.part is None else calls.inner.local(self.part)
            if isinstance(number, int):
                self._parts.append((number, self._step_call(heard)))

    def _step_call(self, heard: Heard) -> StepCall:
        index, is_first_order = heard.seen if isinstance(heard.seen, tuple) else (None, True)
        if index is None:  # set by step() itself, which then counted one up
            counted = plain_attribute(heard.owner, "step_index")
            index = counted - 1 if isinstance(counted, int) else None
        names = _parameters(getattr(type(heard.owner), "step"))  # noqa: B009 - no type has one
        given = {**dict(zip(names, heard.args, strict=False)), **heard.kwargs}
        return StepCall(heard.owner, _unshared(given), index, is_first_order, heard.output)


@functools.cache
def _parameters(method: Callable[..., object]) -> tuple[str, ...]:
    """The names of a method's parameters, without `self`; the call itself has checked the rest."""
    return tuple(inspect.signature(method).parameters)[1:]


def _unshared(arguments: dict[str, object]) -> dict[str, object]:
    """The step's arguments, its sample copied where it is part of a larger tensor.

    Some pipelines write the step's result into the tensor that they cut the sample from.
    """
    sample = arguments.get("sample")
    if isinstance(sample, Tensor) and sample.nbytes < sample.untyped_storage().nbytes():
        arguments["sample"] = sample.clone()
    return arguments


def schedulers_of(pipe: object) -> list[object]:
    """The schedulers of a pipeline, and of the pipelines in it, each once."""
    parts = list(vars(pipe).items())
    for _, part in list(parts):
        if is_pipeline(type(part)):
            parts += vars(part).items()
    found = {
        id(part): part
        for name, part in parts
        if "scheduler" in name and hasattr(type(part), "step")
    }
    return list(found.values())


_PIPELINES = frozenset({"DiffusionPipeline", "ModularPipeline"})


def is_pipeline(cls: type) -> bool:
    """Whether a class is a pipeline of diffusers, which need not be imported for that."""
    return any(base.__name__ in _PIPELINES for base in cls.__mro__)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a pipeline that is running.

    Attributes:
        frame: of the pipeline's `__call__`.
        pipe: the pipeline.
    """

    frame: FrameType
    pipe: Pipeline

    def local(self, *names: str) -> object:
        """The first of these variables of the call that exists; None if none does."""
        found = self._variables
        return next((found[name] for name in names if name in found), None)

    def has(self, name: str) -> bool:
        """Whether the call has a variable of this name, set or not yet."""
        return name in self.frame.f_code.co_varnames

    def read(self, names: Iterable[str]) -> dict[str, object]:
        """Variables of the call and attributes of its pipeline (`"self.vae_scale_factor"`).

        What is not there is left out. Nothing is copied. `"image?"` is whether there is an image.
        """
        names = tuple(names)
        if not names:
            return {}
        found = self._variables
        values = {}
        for name in names:
            root, *path = name.removesuffix("?").split(".")
            value = self.pipe if root == "self" else found.get(root, _MISSING)
            for attribute in path:
                value = getattr(value, attribute, _MISSING)
            if name.endswith("?"):
                value = value is not None and value is not _MISSING
            if value is not _MISSING:
                values[name] = value
        return values

    @functools.cached_property
    def _variables(self) -> Mapping[str, object]:
        """Local variables; of a modular pipeline also what its blocks have put into its state."""
        found = self.frame.f_locals
        state = getattr(found.get("state"), "values", None)
        return {**found, **state} if isinstance(state, dict) else found


_MISSING = object()


@dataclass(frozen=True, eq=False)
class Calls:
    """The pipeline calls on a thread's stack: combined pipelines call others."""

    outer: Call
    inner: Call

    def anew(self) -> Calls:
        """The same calls, with the variables that they have now."""
        inner = Call(self.inner.frame, self.inner.pipe)
        is_one = self.outer.frame is self.inner.frame
        return Calls(inner if is_one else Call(self.outer.frame, self.outer.pipe), inner)


def running_calls(known: Calls | None = None) -> Calls | None:
    """The outermost and innermost pipeline call on this thread's stack; None without any.

    Args:
        known: what was found before. Where its innermost call is met first, so would the others be.
    """
    inner = outer = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if known is not None and frame is known.inner.frame and inner is None:
            return known.anew()
        pipe = _pipeline_of(frame)
        if pipe is not None:
            outer = Call(frame, pipe)
            inner = inner or outer
        frame = frame.f_back
    return None if inner is None or outer is None else Calls(outer, inner)


def _pipeline_of(frame: FrameType) -> Pipeline | None:
    """The pipeline whose `__call__` a frame runs; None if it runs something else."""
    code = frame.f_code
    if code.co_name != "__call__" or code.co_varnames[:1] != ("self",) or not code.co_argcount:
        return None
    owner = frame.f_locals.get("self")
    return owner if is_pipeline(type(owner)) else None


def is_running(call: FrameType, thread_id: int) -> bool:
    """Whether `call` is still on the stack of the thread `thread_id`, asked from another thread."""
    frame = sys._current_frames().get(thread_id)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def is_called_by(calls: Calls | None) -> bool:
    """Whether the caller's caller is the innermost of these calls, or diffusers on its behalf."""
    frame = sys._getframe(2)
    if calls is not None and frame is calls.inner.frame:
        return True
    module = str(frame.f_globals.get("__name__"))
    return module.startswith("diffusers.") and module != "diffusers.callbacks"
