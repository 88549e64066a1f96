"""Owns a pipeline's call as a generator of its frames: the thread, and every way of leaving it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import inspect
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from .callback import CALLBACK_NAMES, PreviewCallback
from .callback import Phase as PhaseName
from .choice import Calibrate
from .decoders import Decoder
from .engine import release_team
from .factors import Factors
from .frame import Frame
from .pixels import finished_images
from .run import Batch, PreviewSource
from .stops import StopWhen
from .tap import Pipeline
from .writers import Target

__all__ = ["Phase", "astream", "stream"]

P = ParamSpec("P")
Made = TypeVar("Made")

_LOOK_S: Final = 0.2  # how often a thread that waits for another looks up, for Ctrl-C


@dataclass(frozen=True)
class Phase:
    """A part of a run that has begun: `on_phase` of `stream` is told of each.

    Attributes:
        name: `"preparing"` until the pipeline begins to step (it encodes the prompt, mostly),
            `"denoising"`, and `"finishing"` from its last step on (it decodes the picture).
        elapsed_s: seconds since the pipeline was called.
        eta_s: seconds that this part took in the last run of the same pipeline; None in the first,
            when nobody can know.
    """

    name: PhaseName
    elapsed_s: float
    eta_s: float | None


def _prepared(
    pipe: Pipeline,
    *,
    targets: Sequence[Target] = (),
    every: int = 1,
    vae_every: int | None = None,
    source: PreviewSource = "denoised",
    batch: Batch = "grid",
    decoder: Literal["auto"] | str | Factors | Decoder = "auto",
    keep_latents: bool = False,
    min_interval_s: float = 0.0,
    initial: bool = False,
    budget: float | None = None,
    calibrate: Calibrate = "auto",
    stop_when: StopWhen | Sequence[StopWhen] | None = None,
    on_phase: Callable[[Phase], object] | None = None,
    **call_kwargs: object,
) -> _Streaming:
    """The frames of a pipeline's run, as it makes them, and then what it returned.

    The pipeline runs in a thread of its own, from the first frame that is asked for, and does not
    wait: whoever takes frames more slowly gets the newest, and misses those between. The last frame
    has `source="final"` and `output`, what the pipeline returned; its picture is the finished one.

    Leaving the loop cancels the run, which ends at its next step (a pipeline that is told to
    interrupt itself still decodes what it has); so do closing the generator, cancelling the task,
    and Ctrl-C. When it has been left, the pipeline can be used again. An exception in the pipeline
    is raised here. `frame.stop()` and `stop_when` end the run and keep what is there: it comes as
    the last frame, which has no `output` where the pipeline cannot be told to finish early.

    `stream` is a generator, `astream` an asynchronous one, which blocks no event loop.

    Args:
        pipe: the diffusers pipeline to call. It must not be used otherwise until the end.
        targets: where frames go besides, as for `PreviewCallback`; files get all of them.
        every, vae_every, source, batch, decoder, keep_latents, min_interval_s, initial, budget,
            calibrate, stop_when: as for `PreviewCallback`.
        on_phase: is called with each `Phase` as it begins, where the frames are taken: encoding
            the prompt and decoding the picture show no frames, and can take long.
        **call_kwargs: what the pipeline is called with.

    Raises:
        TypeError: the pipeline does not take one of `call_kwargs`, or `pipe` or a target is of no
            known kind.
        ValueError: an option is out of its range.

    Example:
        `for frame in stream(pipe, prompt="a red fox"): show(frame.image, frame.progress)`
    """
    _check_arguments(pipe, call_kwargs)
    if on_phase is not None and not callable(on_phase):
        raise TypeError(
            f"on_phase must be a function of a Phase, got {type(on_phase).__name__}; pass one"
        )
    post = _Post(pipe)
    preview = PreviewCallback(
        pipe,
        post,
        *targets,
        every=every,
        vae_every=vae_every,
        source=source,
        batch=batch,
        decoder=decoder,
        keep_latents=keep_latents,
        min_interval_s=min_interval_s,
        initial=initial,
        final=True,
        budget=budget,
        calibrate=calibrate,
        stop_when=stop_when,
        on_phase=post.enter,
    )
    return _Streaming(pipe, preview, post, {**call_kwargs, **preview.as_argument()}, on_phase)


class _Post:
    """Where the run leaves what the consumer takes: the newest frame, and all phases.

    A writer of the run's; from any thread.

    Args:
        pipe: whose runs' phases are timed.

    Attributes:
        on_change: is called after each change, by whoever made it; must return at once.
        last: the newest frame, also when it was taken.
    """

    newest = 1

    def __init__(self, pipe: Pipeline) -> None:
        self.on_change: Callable[[], None] = _nothing
        self.last: Frame | None = None
        self._changed = threading.Condition()
        self._timing = _Timing(_lasted.setdefault(pipe, {}))
        self._phases: deque[Phase] = deque()
        self._frame: Frame | None = None
        self._is_over = False

    def write(self, frame: Frame) -> None:
        """Replace the frame that nobody took."""
        with self._change():
            self._frame = self.last = frame

    def close(self) -> None:
        """The files are complete; the pipeline may still have something to return."""

    def enter(self, name: PhaseName) -> None:
        """Another phase begins."""
        with self._change():
            self._phases.append(self._timing.began(name))

    def end(self) -> None:
        """The pipeline's thread has nothing more to leave."""
        with self._change():
            self._timing.end()
            self._is_over = True

    def take(self) -> Frame | Phase | Literal[True] | None:
        """The next phase, else the newest frame; True at the end, None as long as nothing is there.

        The finished picture that the callback found is not given: what the pipeline returns comes
        in its place.
        """
        with self._changed:
            if self._phases:
                return self._phases.popleft()
            frame, self._frame = self._frame, None
            if frame is not None and frame.source != "final":
                return frame
            return True if self._is_over else None

    def wait(self) -> None:
        """Until something is there, or for a moment."""
        with self._changed:
            self._changed.wait_for(self._has_something, _LOOK_S)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()
        self.on_change()

    def _has_something(self) -> bool:
        return bool(self._phases) or self._frame is not None or self._is_over


class _Timing:
    """When which phase of a run began, and how long each took the last time.

    Args:
        lasted: seconds by phase, of the last run of the same pipeline; changed in place.
    """

    def __init__(self, lasted: dict[PhaseName, float]) -> None:
        self._lasted, self._before = lasted, dict(lasted)
        self._called_s = self._began_s = time.perf_counter()
        self._name: PhaseName | None = None

    def began(self, name: PhaseName) -> Phase:
        """Note it, and tell what is known of it."""
        self.end()
        if self._name is None:
            self._called_s = self._began_s
        self._name = name
        return Phase(name, self._began_s - self._called_s, self._before.get(name))

    def end(self) -> None:
        """The phase is over."""
        now_s = time.perf_counter()
        if self._name is not None:
            self._lasted[self._name] = now_s - self._began_s
        self._began_s = now_s


_lasted: weakref.WeakKeyDictionary[Pipeline, dict[PhaseName, float]] = weakref.WeakKeyDictionary()


class _Streaming:
    """One call of a pipeline in a thread of its own, and its consumer's side."""

    def __init__(
        self,
        pipe: Pipeline,
        preview: PreviewCallback,
        post: _Post,
        arguments: dict[str, object],
        on_phase: Callable[[Phase], object] | None,
    ) -> None:
        self._pipe, self._preview, self._post = pipe, preview, post
        self._arguments, self._on_phase = arguments, on_phase
        self._is_left = self._has_output = False
        self._output: object = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    # The consumer's thread ----------------------------------------------------------------

    def frames(self) -> Generator[Frame, None, None]:
        """As a generator; the pipeline is called when the first frame is asked for."""
        try:
            self._start()
            while (taken := self._post.take()) is not True:
                if taken is None:
                    self._post.wait()
                elif isinstance(taken, Frame):
                    yield taken
                elif self._on_phase is not None:
                    self._on_phase(taken)
            yield from self._end()
        finally:
            self._leave()
            self._join()

    async def aframes(self) -> AsyncGenerator[Frame, None]:
        """The same, without blocking the event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        self._post.on_change = wake
        try:
            self._start()
            while (taken := self._post.take()) is not True:
                if taken is None:
                    await changed.wait()
                    changed.clear()
                elif isinstance(taken, Frame):
                    yield taken
                elif self._on_phase is not None:
                    self._on_phase(taken)
            for frame in self._end():
                yield frame
        finally:
            self._leave()
            while self._thread is not None and (taken := self._post.take()) is not True:
                if taken is None:
                    await changed.wait()
                    changed.clear()
            self._join()

    def _start(self) -> None:
        here = _Here()
        release_team()
        self._thread = threading.Thread(
            target=self._run, args=[here], name="sd-progress-pipeline", daemon=True
        )
        atexit.register(self._end_with_the_process)
        self._thread.start()

    def _end(self) -> Iterator[Frame]:
        """Raise what the pipeline raised; else the last frame, if it returned something."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # else it would hold this frame, and this frame the run's
        if self._has_output:
            yield self._final()

    def _final(self) -> Frame:
        """What the pipeline returned, as a picture if it is one; else with the last preview's."""
        last = self._post.last or _NO_FRAME
        images = last.images if last.source == "final" else _pictures(self._output)
        return replace(
            last,
            images=last.images if images is None else images,
            step_index=last.num_steps - 1,
            source="final",
            decoder=last.decoder if images is None else "pipeline",
            eta_s=0.0,
            output=self._output,
        )

    def _leave(self) -> None:
        """Have the run end soon, if it has not."""
        self._is_left = True
        self._preview.cancel()

    def _join(self) -> None:
        """Wait until the pipeline can be used again; Ctrl-C ends the waiting."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK_S)
        atexit.unregister(self._end_with_the_process)
        self._post.on_change = _nothing

    def _end_with_the_process(self) -> None:
        self._leave()
        self._join()

    # The pipeline's thread ----------------------------------------------------------------

    def _run(self, here: _Here) -> None:
        call = cast("Callable[..., object]", self._pipe)
        try:
            with here, self._preview:
                self._post.enter("preparing")
                if not self._is_left:
                    self._output = call(**self._arguments)
                    self._has_output = True
        except BaseException as error:  # it is the consumer's
            self._error = error
        finally:
            self._arguments = {}
            self._post.end()


# Of a pipeline of which nothing is shown: one black pixel beside what it returned.
_NO_FRAME: Final = Frame(np.zeros((1, 1, 1, 3), np.uint8), 0, 1, None, None, "noisy", "", 0.0, None)


class _Here:
    """What torch keeps for each thread, as it is in the thread that makes this.

    Entered in another thread, it is so there too: a pipeline makes the same there as here.
    """

    def __init__(self) -> None:
        self._settings: list[Callable[[], contextlib.AbstractContextManager[object]]] = [
            functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
            functools.partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        ]
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                self._settings.append(functools.partial(torch.autocast, device, dtype=dtype))
        default = torch.get_default_device()
        if default.type != "cpu":
            self._settings.append(lambda: default)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            stream = torch.cuda.current_stream()
            self._settings.append(lambda: torch.cuda.stream(stream))
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for setting in self._settings:
            self._stack.enter_context(setting())

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _pictures(output: object) -> NDArray[np.uint8] | None:
    """Of what a pipeline returned: an object with images or frames, or a tuple that begins so."""
    first: object = output
    if isinstance(output, tuple) or hasattr(output, "to_tuple"):
        first = cast("Sequence[object]", output)[0]
    return finished_images(first)


def _check_arguments(pipe: object, call_kwargs: Mapping[str, object]) -> None:
    taken = inspect.signature(type(pipe).__call__).parameters
    takes_any = any(x.kind is x.VAR_KEYWORD for x in taken.values())
    for name in call_kwargs:
        if name in CALLBACK_NAMES:
            raise TypeError(
                f"{name} must be left out, got {type(call_kwargs[name]).__name__}; "
                "pass what is to get the frames in targets"
            )
        if name not in taken and not takes_any:
            raise TypeError(
                f"call_kwargs must be arguments of {type(pipe).__name__}, got {name!r}; "
                f"it takes {', '.join(x for x in taken if x != 'self')}"
            )


def _nothing() -> None:
    """Nobody is to be told."""


def _named(
    name: str, prepare: Callable[P, _Streaming], take: Callable[[_Streaming], Made]
) -> Callable[P, Made]:
    """A public function with the parameters of `prepare`, which returns what `take` makes of it."""

    @functools.wraps(prepare)
    def begun(*args: P.args, **kwargs: P.kwargs) -> Made:
        return take(prepare(*args, **kwargs))

    begun.__name__ = begun.__qualname__ = name
    return begun


stream = _named("stream", _prepared, _Streaming.frames)
astream = _named("astream", _prepared, _Streaming.aframes)
