"""Owns `PreviewCallback`: its options, and which callback of a pipeline belongs to which run."""

from __future__ import annotations

import functools
import inspect
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Literal, ParamSpec, cast, get_args, overload

import torch
from torch import Tensor

from .boundary import Boundary, OnError, warn
from .choice import Calibrate, decoder_maker
from .cost import Stats, Stopwatch
from .decoders import Decoder
from .factors import Factors
from .layouts import Layout, layout_for, reason_not_shown, vae_of
from .pixels import finished_images
from .run import Batch, Options, Parts, PreviewSource, Run, Step, expected_latents
from .stops import StopWhen, StopWriter, stop_conditions
from .tap import (
    Call,
    Calls,
    Heard,
    Pipeline,
    SchedulerTap,
    is_called_by,
    is_pipeline,
    listen,
    running_calls,
    schedulers_of,
)
from .vae import vae_decoder
from .writers import Target, Writer, writer_for
from .x0 import StepCall

P = ParamSpec("P")
CALLBACK_NAMES = ("callback_on_step_end", "callback")
_OUTPUTS = {
    "image": ("image", "images", "video", "videos", "frames"),
    "video": ("video", "videos", "frames", "image", "images"),  # an image is what it starts from
    "audio": (),
}
Phase = Literal["preparing", "denoising", "finishing"]
Ending = Literal["cancel", "stop"]
_START = "progress_bar"  # called by most pipelines just before their loop
_END = "maybe_free_model_hooks"  # the last thing that pipelines call before they return


class RunCancelled(BaseException):
    """`PreviewCallback.cancel` ended a pipeline that knows no other way to end.

    Attributes:
        callback: whose `cancel` it was.
    """

    def __init__(self, callback: PreviewCallback) -> None:
        super().__init__("the run was cancelled")
        self.callback = callback


class PreviewCallback:
    """Shows a diffusers run while it happens: pass it as `callback_on_step_end`.

    Older pipelines take it as `callback`. In a `with` block it need not be passed at all, which
    also reaches the pipelines that take no callback, and modular ones. Combined pipelines are one
    run, and so are videos that are made in parts. In a distributed run the first rank previews.

    The run's latents, pictures and random numbers are bit-identical with and without it, and
    nothing that fails in here fails the run. When the pipeline call returns, all files are
    complete; when it is interrupted or fails, they hold everything up to that point.

    One object serves any number of runs, one after the other; each run gets files of its own
    (`denoise.gif`, then `denoise-2.gif`). Also a context manager, and a member for diffusers'
    `MultiPipelineCallbacks`.

    Args:
        pipe: the diffusers pipeline that will run.
        *targets: where frames go: a folder for PNGs (`"steps/"`), an animation by suffix (`.gif`,
            `.webp`, `.png`, `.mp4`), a queue, a callable of one `Frame`, or a `Writer`. The
            callback closes every writer at the end of each run, the user's own included.
        every: preview every Nth step; the last step is always previewed.
        vae_every: decode every Nth preview with the pipeline's VAE, at full resolution; of a
            video, its first latent frame. This one does cost time: a decode each.
        source: `"denoised"` shows the predicted x0, `"noisy"` the latents after the step,
            `"both"` the noisy left of the denoised. Where x0 cannot be had the frame is noisy,
            and says so.
        batch: `"grid"` shows the whole batch, `"first"` its first picture only.
        decoder: `"auto"` finds the linear map of the pipeline's VAE, or makes one; or the name of
            factors (`"sd1"`), a `.safetensors` file of them, a `Factors`, `"pca"` (principal
            components), `"channels"` (each latent channel in grey), `"tiny:madebyollin/taesd"` (a
            distilled decoder, see `TinyDecoder`), or any `Decoder`.
        calibrate: whether the VAE may be run here, before the run, to fit a map that is then kept
            in the user's cache, or to check one that was given. `"auto"` does where the VAE is on
            an accelerator or nothing is known of it (up to a minute on a CPU, once), `"always"`
            also where there is a published map or a kept one, `"never"` does not. The environment
            variable `SD_PROGRESS_CALIBRATE` takes the place of `"auto"`.
        keep_latents: put the VAE-space latents into each `Frame`.
        on_error: `"warn"` warns once for each part that fails and goes on; `"raise"` raises the
            failure out of the pipeline call.
        min_interval_s: seconds that must lie between two previews; the last is always made.
        initial: also show the noise that the run starts from, as a frame before the first step.
        final: also show the pipeline's own finished picture or clip, as a frame after the last
            step, of pipelines that say when they are done (most do); twice side by side with
            `source="both"`.
        budget: the share of the run that its previews may cost, for example 0.02; None is without
            limit. What they cost is measured as the run goes; where it is too much, steps are
            skipped, and full VAE decodes wait until they can be afforded. The first and the last
            preview are always made.
        stop_when: a function of one `Frame`, or several: the run is stopped, as by `stop`, where
            one returns something true. It sees every frame, in a thread of its own.
            `sd_progress.stops` has some ready.
        on_phase: is called on the run's own thread, and must be quick: with `"denoising"` when the
            pipeline begins to step, and with `"finishing"` when its last step is done and it
            decodes what came out.
        clock: seconds, monotonic.

    Raises:
        TypeError: `pipe` is no pipeline, or a target is of no known kind.
        ValueError: an option is out of its range; the message says which and what to do.

    Example:
        `pipe(prompt, callback_on_step_end=PreviewCallback(pipe, "steps/", "denoise.gif"))`
    """

    def __init__(
        self,
        pipe: Pipeline,
        *targets: Target,
        every: int = 1,
        vae_every: int | None = None,
        source: PreviewSource = "denoised",
        batch: Batch = "grid",
        decoder: Literal["auto"] | str | Factors | Decoder = "auto",
        keep_latents: bool = False,
        on_error: OnError = "warn",
        min_interval_s: float = 0.0,
        initial: bool = False,
        final: bool = False,
        budget: float | None = None,
        calibrate: Calibrate = "auto",
        stop_when: StopWhen | Sequence[StopWhen] | None = None,
        on_phase: Callable[[Phase], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check_pipeline(pipe)
        _check_count("every", every, "1 previews every step")
        if vae_every is not None:
            _check_count("vae_every", vae_every, "None decodes with the linear map only")
        _check_choice("source", source, PreviewSource)
        _check_choice("batch", batch, Batch)
        _check_choice("on_error", on_error, OnError)
        _check_interval(min_interval_s)
        _check_budget(budget)
        if not targets:
            raise ValueError(
                "targets must be at least one, got none; "
                "pass a folder, a file, a queue, a callable or a writer"
            )
        self._options = Options(
            every, vae_every, min_interval_s, source, batch, initial, final, keep_latents, budget
        )
        vae, layout = vae_of(pipe), layout_for(pipe)
        if layout is None:
            warn(_why_nothing_is_shown(pipe))
        boundary, self._watch = Boundary(on_error), Stopwatch(clock)
        self._writers = tuple(map(_checked_writer, targets))
        self._parts = Parts(
            options=self._options,
            make_decoder=decoder_maker(
                decoder,
                vae,
                is_colour_known=layout is not None and layout.row.has_own_colours,
                calibrate=calibrate,
                refits=vae_every is not None,
            ),
            vae_decoder=vae_decoder(vae, is_needed=vae_every is not None),
            writers=(*self._writers, *map(StopWriter, stop_conditions(stop_when))),
            boundary=boundary,
            tap=SchedulerTap(clock, boundary, self._watch, _weakly(self._on_scheduler_step)),
            clock=clock,
            watch=self._watch,
            stop=_weakly(self._stop_run),
        )
        self._on_phase, self._phase = on_phase, cast("Phase", "preparing")
        self._pipe = weakref.ref(pipe)
        self._layouts = weakref.WeakKeyDictionary[object, Layout | None]()
        self._layouts[pipe] = layout
        self._is_entered = False
        self._ending: Ending | None = None
        self._handed_back: Tensor | None = None
        self._silent_steps = 0
        self._run: Run | None = None
        self._last: Run | None = None
        self._unfinished: Run | None = None
        self._runs_begun = self._runs_at_entry = 0
        self._ears: _Ears | None = None
        self._listen(pipe)

    @property
    def writers(self) -> tuple[Writer, ...]:
        """One for each target, in their order; file writers have `path`, where the run went."""
        return self._writers

    @property
    def tensor_inputs(self) -> list[str]:
        """What diffusers must hand over; read by it as a run begins, which prepares that run."""
        with self._parts.boundary.around("preparing for a run"):
            pipe = self._pipe()
            if pipe is not None and not self._is_running():
                self._finish()
                self._listen(pipe)
                self._parts.tap.forget()
        return ["latents"]

    @property
    def stats(self) -> Stats:
        """What the previews of the current run, or of the last one, came to so far."""
        return Stats() if self._last is None else self._last.stats

    def as_argument(self) -> dict[str, PreviewCallback]:
        """What to call the pipeline with: itself, by the name that the pipeline has for callbacks.

        Nothing for pipelines that take none, which are heard in a `with` block all the same.

        Example:
            `with preview: pipe(prompt, **preview.as_argument())`
        """
        taken = inspect.signature(type(self._pipe()).__call__).parameters
        return next(({name: self} for name in CALLBACK_NAMES if name in taken), {})

    # diffusers asks `isinstance(callback, PipelineCallback)` before it reads `tensor_inputs`.
    # To be one by `__class__` needs no base class, and so no import of diffusers.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """A `PipelineCallback`, for diffusers' `isinstance`; `type(callback)` is the truth."""
        callbacks = sys.modules.get("diffusers.callbacks")
        return PreviewCallback if callbacks is None else callbacks.PipelineCallback

    @overload
    def __call__(
        self,
        pipe: Pipeline,
        step_index: int,
        timestep: object,
        callback_kwargs: dict[str, object],
        /,
    ) -> dict[str, object]: ...

    @overload
    def __call__(self, step_index: int, timestep: object, latents: Tensor, /) -> None: ...

    def __call__(self, *given: object) -> dict[str, object] | None:
        """What diffusers calls after each step; nothing that is given is changed.

        Older pipelines call it without the pipeline: pass it to them as `callback`.

        Args:
            *given: the pipeline that runs (an inner one of a combined pipeline), its own count of
                steps, which some restart, the timestep, and a dict with `latents` as the pipeline
                steps them; or, without the pipeline, the count, the timestep and the latents.

        Returns:
            {} to a pipeline, which changes nothing in any of them; the given dict to whoever else
            calls, such as a `MultiPipelineCallbacks`, which passes it on; None to older pipelines.
            Only a run that was stopped, and is to finish what is there, gets other `latents`: x0.

        Raises:
            RunCancelled: `cancel` was called, and the pipeline knows no other way to end.
        """
        boundary = self._parts.boundary
        self._silent_steps = 0
        calls, is_chained = None, False
        with boundary.around("the preview of a step"), self._watch, _no_grad():
            calls = self._running_calls()
            is_chained = not is_called_by(calls)
            *pipe, step_index, timestep, latents = given
            self._step(calls, pipe, step_index, timestep, _latents(latents))
        boundary.raise_kept()
        self._end_if_cancelled(calls)
        if len(given) == 3:
            return None
        returned = cast("dict[str, object]", given[-1]) if is_chained else {}
        x0, self._handed_back = self._handed_back, None
        return returned if x0 is None else {**returned, "latents": x0}

    def __enter__(self) -> PreviewCallback:
        """Listen from now on; returns the callback.

        Inside the block the pipeline need not be given the callback: its scheduler is enough.
        """
        self._is_entered, self._ending = True, None
        self._runs_at_entry = self._runs_begun
        pipe = self._pipe()
        if pipe is not None:
            self._listen(pipe)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Complete all files and leave the pipeline as it was found.

        Exceptions are passed on, except for the one by which `cancel` ended the run.
        """
        self._is_entered = False
        self._end()
        if error is None:
            self._parts.boundary.raise_kept()
            if self._runs_begun == self._runs_at_entry and self._is_something_expected():
                warn(
                    "the pipeline must take a step in the `with` block, got none; call the "
                    "pipeline that the callback was made for, and pass the callback to it if it "
                    "takes one"
                )
        return isinstance(error, RunCancelled) and error.callback is self

    def cancel(self) -> None:
        """End the current run at its next step; from any thread, also from a preview target.

        Pipelines that heed `pipe._interrupt` then finish the picture from what they have. Those
        that do not are left with `RunCancelled`, which a `with` block takes. Either way the files
        are completed and the pipeline can be used again. In a distributed run call it on every
        rank, or the others wait for ever.
        """
        if self._is_run_expected():
            self._ending = "cancel"

    def stop(self) -> None:
        """End the current run at its next step, and keep what is there.

        Like `cancel`, but the picture is that which the model expects at that step, without its
        noise: pipelines that heed `pipe._interrupt` and call the callback finish and return it; of
        the others it is the last frame, decoded by the VAE.
        """
        if self._is_run_expected():
            self._ending = "stop"

    def _stop_run(self, index: int) -> None:
        """The same for one run only, which may be over; for `Frame.stop`, from any thread."""
        if self._run is None or self._run.index != index:
            return
        if _rank_count() > 1:  # the others see no frames, and would wait for this one for ever
            self._parts.boundary.tell(
                "stop",
                f"frame.stop and stop_when must be used in a run of one process, got one of "
                f"{_rank_count()}; call `stop` of the callback on every rank",
            )
            return
        self.stop()

    def _is_run_expected(self) -> bool:
        """Whether there is a run, or one is to come; other ranks do not know of theirs."""
        is_one_coming = self._is_entered and self._runs_begun == self._runs_at_entry
        return self._run is not None or is_one_coming or not _is_first_rank()

    def close(self) -> None:
        """End the run, if there is one, and leave the pipeline as it was found.

        Needed only when neither a `with` block nor the end of a pipeline call does it. The callback
        can be used again.

        Raises:
            RuntimeError: it is one of the targets that calls, which would wait for itself.
        """
        if self._run is not None and self._run.is_current_thread:
            raise RuntimeError(
                "close must be called from outside, got a call from a preview target; "
                "set pipe._interrupt = True to end the run itself"
            )
        self._end()
        self._parts.boundary.raise_kept()

    def _end(self) -> None:
        self._finish()
        self._ending = None
        if self._ears is not None:
            self._ears.close()

    # One run after the other --------------------------------------------------------------

    def _listen(self, pipe: Pipeline, inner: Pipeline | None = None) -> _Ears:
        """Hear the pipeline's steps and the end of its calls, from now until the run is over."""
        ears = self._ears
        if ears is None or ears.is_closed or ears.pipe() is not pipe:
            if ears is not None:
                ears.close()
            self._ears = ears = _Ears(self, pipe, self._parts.tap)
        layout = self._layout_of(inner or pipe)
        self._parts.tap.part = None if layout is None else layout.row.part
        known = schedulers_of(pipe)
        self._parts.tap.attach([*known, *(schedulers_of(inner) if inner is not None else [])])
        return ears

    def _running_calls(self) -> Calls | None:
        return running_calls(None if self._run is None else self._run.calls)

    def _step(
        self,
        calls: Calls | None,
        given: Sequence[object],
        index: object,
        timestep: object,
        latents: Tensor,
    ) -> None:
        """Take a callback; older pipelines have not given themselves."""
        pipe = next(iter(given), self._pipe()) if calls is None else calls.inner.pipe
        layout = self._layout_of(pipe)
        if layout is None or (self._run is None and not _is_first_rank()):
            return
        if layout.row.latents is not None and calls is not None:
            latents = cast(Tensor, calls.inner.local(layout.row.latents))
        # older pipelines take nothing back; others would take it back as something else
        can_hand_back = bool(given) and layout.row.latents is None
        self._take(
            layout, calls, cast(Pipeline, pipe), index, timestep, latents, latents, can_hand_back
        )
        if self._run is not None:
            self._run.is_called_back = True

    def _on_scheduler_step(self) -> None:
        """A scheduler has stepped: in a `with` block, all that some pipelines show of a step."""
        call, calls = self._parts.tap.last, None
        if not self._is_entered or call is None:
            return
        boundary = self._parts.boundary
        with boundary.around("the preview of a step"), self._watch, _no_grad():
            calls = self._running_calls()
            if self._will_be_called(calls):
                return
            if self._run is not None or _is_first_rank():
                self._take_stepped(calls, call)
        boundary.raise_kept()
        self._end_if_cancelled(calls)

    def _take_stepped(self, calls: Calls | None, call: StepCall) -> None:
        """Take what a scheduler returned."""
        pipe = self._pipe() if calls is None else calls.inner.pipe
        layout, latents, count = self._layout_of(pipe), call.prev_sample, self._parts.tap.count
        if layout is None or latents is None or pipe is None or count % layout.row.steps:
            return
        context = None if calls is None else calls.inner.local("latents")
        whole = context if isinstance(context, Tensor) else latents
        self._take(layout, calls, pipe, count, call.timestep, latents, whole)

    def _will_be_called(self, calls: Calls | None) -> bool:
        """Whether the running pipeline was given this callback, and so calls it itself."""
        if calls is None:
            return False
        run = self._run
        if run is not None and run.is_called_back and run.call is calls.outer.frame:
            return True
        given = [calls.inner.local(name) for name in CALLBACK_NAMES]
        given = [one for one in given if one is not None]
        if any(one is self or self in _members(one) for one in given):
            return True
        # Someone else's function, which may call this one: that is seen after two steps.
        self._silent_steps += 1
        may_call_us = any(type(one) is not PreviewCallback for one in given)
        return may_call_us and self._silent_steps <= 2

    def _layout_of(self, pipe: object) -> Layout | None:
        if pipe is None:
            return None
        if pipe not in self._layouts:
            self._layouts[pipe] = layout_for(pipe)
        return self._layouts[pipe]

    def _take(
        self,
        layout: Layout,
        calls: Calls | None,
        pipe: Pipeline,
        index: object,
        timestep: object,
        latents: Tensor,
        context: Tensor,
        can_hand_back: bool = False,
    ) -> None:
        if latents.ndim < layout.row.least_ndim:
            return  # an embedding, which some pipelines step first
        run = self._current_run(calls, pipe)
        self._enter("denoising")
        run.calls = calls
        frame = None if calls is None else calls.inner.frame
        scheduler_call, is_first = self._parts.tap.take()
        inner = None if calls is None else calls.inner
        expected = functools.partial(_num_callbacks, inner, pipe, scheduler_call)
        run.begin_step(frame, index if isinstance(index, int) else 0, expected)
        step = Step(
            layout=layout,
            values={} if calls is None else calls.inner.read(layout.reads),
            latents=latents,
            context=context,
            kept=None if calls is None else _kept(calls.inner, layout),
            timestep=timestep,
            call=scheduler_call,
            parts=None if layout.row.part is None else self._parts.tap.take_parts(),
            is_first=is_first and scheduler_call is not None,
            at_s=self._parts.clock(),
        )
        is_stopped = self._ending == "stop"
        if is_stopped and can_hand_back and inner is not None and _heeds_interrupt(inner):
            self._handed_back = expected_latents(step)
        run.step(
            step,
            is_last=self._ending is not None or bool(getattr(pipe, "_interrupt", False)),
            decodes=is_stopped and self._handed_back is None,
        )
        if run.is_complete or self._ending is not None:
            self._enter("finishing")
        if run.is_complete and _is_last_of(calls, layout):
            self._finish()

    def _current_run(self, calls: Calls | None, pipe: Pipeline) -> Run:
        run, call = self._run, None if calls is None else calls.outer.frame
        if run is not None and run.takes_steps and run.call is call:
            return run
        if run is not None:
            self._leave(run)
            self._parts.tap.forget_earlier()
        outer = pipe if calls is None else calls.outer.pipe
        self._run = self._last = run = self._begin(outer, pipe, call)
        return run

    def _begin(self, outer: Pipeline, inner: Pipeline, call: FrameType | None) -> Run:
        ears = self._listen(outer, inner)
        started_s = self._parts.tap.started_s
        run = Run(
            self._parts,
            index=self._runs_begun,
            call=call,
            started_s=self._parts.clock() if started_s is None else started_s,
            undo=_nothing if self._is_entered else ears.close,
            previous=self._unfinished,
        )
        self._runs_begun += 1
        return run

    def _is_running(self) -> bool:
        run, calls = self._run, running_calls()
        return run is not None and calls is not None and calls.outer.frame is run.call

    def _end_if_cancelled(self, calls: Calls | None) -> None:
        if self._ending is None:
            return
        if calls is not None and _heeds_interrupt(calls.inner):
            calls.inner.pipe._interrupt = True  # type: ignore[attr-defined]
            return
        self._finish()
        if calls is not None and hasattr(calls.outer.pipe, _END):
            calls.outer.pipe.maybe_free_model_hooks()
        self._ending = None
        raise RunCancelled(self)

    def _on_loop_begins(self) -> None:
        self._enter("denoising")
        with self._parts.boundary.around("listening to the scheduler"):
            pipe = self._pipe()
            if pipe is not None and self._is_entered and self._run is None:
                self._listen(pipe)

    def _is_something_expected(self) -> bool:
        """Whether this process previews, and the pipeline is not known to make no pictures."""
        return _is_first_rank() and self._layout_of(self._pipe()) is not None

    def _on_call_ended(self, pipe: Pipeline) -> None:
        run, calls = self._run, running_calls()
        if run is None or calls is None or run.call is not calls.outer.frame:
            if run is None:  # that call was not ours: keep nothing of it
                self._parts.tap.forget()
                self._ending = None
            return
        with self._parts.boundary.around("the last frame"), self._watch, _no_grad():
            run.submit_skipped()
            if self._options.final:
                is_raw = calls.outer.local("output_type") != "pt"
                output = calls.outer.local(*_OUTPUTS[run.shows])
                run.submit_final(finished_images(output, is_raw=is_raw))
        self._finish()
        self._parts.boundary.raise_kept()

    def _finish(self) -> None:
        run = self._run
        if run is not None and not run.is_current_thread:
            self._leave(run)
            self._parts.tap.forget()
            self._ending = self._handed_back = None
            self._phase = "preparing"

    def _enter(self, phase: Phase) -> None:
        """Tell that the run is now in another phase."""
        if self._phase != phase:
            self._phase = phase
            if self._on_phase is not None:
                with self._parts.boundary.around("on_phase"):
                    self._on_phase(phase)

    def _leave(self, run: Run) -> None:
        self._unfinished = run  # also where Ctrl-C ends the waiting: the next run's files wait
        self._run = None
        run.finish()
        if run.is_over:
            self._unfinished = None


class _Ears:
    """What is put on a pipeline while it is listened to; taken away once, by whoever comes first.

    Knows the callback only weakly, so that a callback that nobody holds any more is freed, and
    takes its wrappers along.
    """

    def __init__(self, callback: PreviewCallback, pipe: Pipeline, tap: SchedulerTap) -> None:
        self.pipe = weakref.ref(pipe)
        self.is_closed = False
        self._tap = tap
        self._callback = weakref.ref(callback)
        self._stop = listen(pipe, _END, self) if hasattr(type(pipe), _END) else _nothing
        self._stop_start = listen(pipe, _START, _Start(callback)) if hasattr(pipe, _START) else None
        self._finalizer = weakref.finalize(callback, self.close)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Leave the pipeline as it was found; again does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._finalizer.detach()
            self._stop()
            if self._stop_start is not None:
                self._stop_start()
            self._tap.detach()

    @property
    def hears_copies(self) -> bool:
        """The end of a copy's call is none of the run's."""
        return False

    def before(self, owner: object) -> object:
        """Nothing is to be seen yet."""

    def after(self, heard: Heard) -> None:
        """The pipeline's call is about to return."""
        callback, pipe = self._callback(), self.pipe()
        if callback is not None and pipe is not None:
            callback._on_call_ended(pipe)


class _Start:
    """Hears that a pipeline is about to loop, perhaps with another scheduler than before."""

    hears_copies = False

    def __init__(self, callback: PreviewCallback) -> None:
        self._callback = weakref.ref(callback)

    def before(self, owner: object) -> object:
        """Listen to the schedulers that the pipeline has now."""
        callback = self._callback()
        if callback is not None:
            callback._on_loop_begins()
        return None

    def after(self, heard: Heard) -> None:
        """The loop begins only now."""


def _no_grad() -> AbstractContextManager[object]:
    """`torch.no_grad`, where a pipeline has not done so already."""
    return torch.no_grad() if torch.is_grad_enabled() else _ALREADY


_ALREADY = nullcontext()


def _nothing() -> None:
    """Nothing is there to undo."""


def _kept(call: Call, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """The mask and the latents that a pipeline puts back after each step: inpainting, mostly."""
    names = layout.row.kept
    if names is None and call.has("init_latents_proper"):
        names = ("init_mask" if call.has("init_mask") else "mask", "image_latents")
    if names is None:
        return None
    mask, latents = map(call.local, names)
    if not isinstance(latents, Tensor):
        return None
    if mask is None and isinstance(whole := call.local("mask"), Tensor):
        mask = whole[: len(latents)]  # before the first step's end; doubled for guidance
    return (mask, latents) if isinstance(mask, Tensor) else None


def _weakly(method: Callable[P, None]) -> Callable[P, None]:
    """A method that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        alive = reference()
        if alive is not None:
            alive(*args, **kwargs)

    return call


def _members(callback: object) -> Sequence[object]:
    """Of a `MultiPipelineCallbacks`."""
    members = getattr(callback, "callbacks", ())
    return members if isinstance(members, list | tuple) else ()


def _why_nothing_is_shown(pipe: object) -> str:
    reason = reason_not_shown(*(cls.__name__ for cls in type(pipe).__mro__))
    return (
        f"pipe must be one that makes pictures, got {type(pipe).__name__}, of which nothing is "
        f"shown: {reason}; `sd-progress models` lists those that are shown"
    )


def _is_first_rank() -> bool:
    """Whether this process is the one of a distributed run that previews."""
    return _rank_count() == 1 or torch.distributed.get_rank() == 0


def _rank_count() -> int:
    """How many processes make the run together."""
    distributed = torch.distributed
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_distributed else 1


def _heeds_interrupt(call: Call) -> bool:
    """Whether a pipeline's loop asks for its `interrupt`."""
    return "interrupt" in call.frame.f_code.co_names and hasattr(call.pipe, "_interrupt")


def _is_last_of(calls: Calls | None, layout: Layout) -> bool:
    """Whether a run's last expected step is where to end it: nothing else will tell of its end."""
    if calls is None:
        return True
    is_one_loop = calls.outer.frame is calls.inner.frame and not layout.row.is_in_parts
    return is_one_loop and not _ends_with_a_sign(calls.outer)


def _ends_with_a_sign(call: Call) -> bool:
    """Whether a call will still tell of its end; some leave early when latents are asked for."""
    return _END in call.frame.f_code.co_names and call.local("output_type") != "latent"


def _latents(given: object) -> Tensor:
    """Of a dict, as pipelines give, or as they are, as older ones do."""
    latents = given.get("latents") if isinstance(given, dict) else given
    if not isinstance(latents, Tensor):
        found = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise TypeError(
            f"callback_kwargs must hold a tensor 'latents', got {found}; "
            "pass callback_on_step_end_tensor_inputs=['latents']"
        )
    return latents


def _num_callbacks(call: Call | None, pipe: Pipeline, step: StepCall | None) -> int:
    """How many steps a pipeline makes: half steps of second-order schedulers count.

    Its own count is believed only where the running call sets it: else it is of an earlier one.
    """
    if call is not None and "_num_timesteps" in call.frame.f_code.co_names:
        counted = getattr(pipe, "_num_timesteps", None)
        if isinstance(counted, int):
            return counted
    scheduler = getattr(pipe, "scheduler", None) if step is None else step.scheduler
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor):
        return 1
    used = None if call is None else call.local("timesteps")
    is_known = isinstance(used, Tensor) and _is_end_of(used, timesteps)
    return len(cast(Tensor, used)) if is_known else len(timesteps)


def _is_end_of(part: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is the last part of another: image-to-image leaves out the first steps."""
    if part.ndim != 1 or whole.ndim != 1 or not part.is_contiguous():
        return False
    is_view = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return is_view and part[:1].data_ptr() + part.nbytes == whole[:1].data_ptr() + whole.nbytes


def _check_pipeline(pipe: object) -> None:
    if not callable(pipe) or not (is_pipeline(type(pipe)) or hasattr(pipe, "scheduler")):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}; "
            "pass the pipeline first, then the targets: PreviewCallback(pipe, 'denoise.gif')"
        )


def _check_count(name: str, value: object, advice: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}; {advice}")


def _check_choice(name: str, value: object, choices: object) -> None:
    expected = get_args(choices)
    if value not in expected:
        shown = ", ".join(map(repr, expected))
        raise ValueError(f"{name} must be one of {shown}, got {value!r}; pass one of them")


def _checked_writer(target: Target) -> Writer:
    writer = writer_for(target)
    newest = getattr(writer, "newest", None)
    if newest is not None:
        name = f"newest of {type(writer).__name__}"
        _check_count(name, newest, "1 shows the newest frame only, None every frame")
    return writer


def _check_budget(value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value <= 1):  # type: ignore[operator]
        raise ValueError(
            f"budget must be a share of the run, above 0 and up to 1, or None, got {value!r}; "
            "0.02 is two percent, None is without limit"
        )


def _check_interval(value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value >= 0:  # type: ignore[operator]
        raise ValueError(
            f"min_interval_s must be seconds from 0 on, got {value!r}; 0 makes every preview"
        )
