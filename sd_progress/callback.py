"""Owns `PreviewCallback`: its options, and which callback of a pipeline belongs to which run."""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from . import factors
from .boundary import Boundary, OnError, warn
from .decoders import Decoder, LinearDecoder, PcaDecoder, VaeDecoder, to_uint8
from .factors import Factors
from .layouts import layout_for, vae_of
from .run import Batch, Options, Parts, PreviewSource, Run
from .tap import (
    Pipeline,
    SchedulerTap,
    call_code,
    enclosing_call,
    is_called_by,
    listen,
    local,
)
from .writers import Target, Writer, writer_for

_END = "maybe_free_model_hooks"  # the last thing that pipelines call before they return


class PreviewCallback:
    """Shows a diffusers run while it happens: pass it as `callback_on_step_end`.

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
        vae_every: decode every Nth preview with the pipeline's VAE, at full resolution. This one
            does cost time: a decode each.
        source: `"denoised"` shows the predicted x0, `"noisy"` the latents after the step,
            `"both"` the noisy left of the denoised. Where x0 cannot be had the frame is noisy,
            and says so.
        batch: `"grid"` shows the whole batch, `"first"` its first picture only.
        decoder: `"auto"` finds the linear map of the pipeline's VAE; or the name of factors
            (`"sd1"`), a `Factors`, or any `Decoder`.
        keep_latents: put the VAE-space latents into each `Frame`.
        on_error: `"warn"` warns once for each part that fails and goes on; `"raise"` raises the
            failure out of the pipeline call.
        min_interval_s: seconds that must lie between two previews; the last is always made.
        initial: also show the noise that the run starts from, as a frame before the first step.
        final: also show the pipeline's own finished picture, as a frame after the last step; twice
            side by side with `source="both"`, so that all frames of a run have one shape.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_pipeline(pipe)
        _check_count("every", every, "1 previews every step")
        if vae_every is not None:
            _check_count("vae_every", vae_every, "None decodes with the linear map only")
        _check_choice("source", source, PreviewSource)
        _check_choice("batch", batch, Batch)
        _check_choice("on_error", on_error, OnError)
        _check_interval(min_interval_s)
        if not targets:
            raise ValueError(
                "targets must be at least one, got none; "
                "pass a folder, a file, a queue, a callable or a writer"
            )
        self._options = Options(
            every, vae_every, min_interval_s, source, batch, initial, final, keep_latents
        )
        vae = vae_of(pipe)
        boundary = Boundary(on_error)
        self._parts = Parts(
            options=self._options,
            layout=layout_for(pipe),
            make_decoder=_decoder_maker(decoder, vae),
            vae_decoder=None if vae_every is None else _vae_decoder(vae),
            writers=tuple(map(writer_for, targets)),
            boundary=boundary,
            tap=SchedulerTap(clock, boundary),
            clock=clock,
        )
        self._pipe = weakref.ref(pipe)
        self._is_entered = False
        self._run: Run | None = None
        self._unfinished: Run | None = None
        self._runs_begun = self._runs_at_entry = 0
        self._ears: _Ears | None = None
        self._listen(pipe)

    @property
    def writers(self) -> tuple[Writer, ...]:
        """One for each target, in their order; file writers have `path`, where the run went."""
        return tuple(self._parts.writers)

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

    # diffusers asks `isinstance(callback, PipelineCallback)` before it reads `tensor_inputs`.
    # To be one by `__class__` needs no base class, and so no import of diffusers.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """A `PipelineCallback`, for diffusers' `isinstance`; `type(callback)` is the truth."""
        callbacks = sys.modules.get("diffusers.callbacks")
        return PreviewCallback if callbacks is None else callbacks.PipelineCallback

    def __call__(
        self,
        pipe: Pipeline,
        step_index: int,
        timestep: object,
        callback_kwargs: dict[str, object],
    ) -> dict[str, object]:
        """What diffusers calls after each step; nothing of `callback_kwargs` is changed.

        Args:
            pipe: the pipeline that runs; an inner one of a combined pipeline.
            step_index: not used, because some pipelines restart it.
            timestep: the scheduler's timestep, or what the pipeline passes as one.
            callback_kwargs: `latents`, as the pipeline steps them.

        Returns:
            {} to a pipeline, which changes nothing in any of them; the given dict to whoever else
            calls, such as a `MultiPipelineCallbacks`, which passes it on.
        """
        is_chained = not is_called_by(call_code(type(pipe)))
        boundary = self._parts.boundary
        with boundary.around("the preview of a step"), torch.no_grad():
            self._step(pipe, timestep, _latents(callback_kwargs))
        boundary.raise_kept()
        return callback_kwargs if is_chained else {}

    def __enter__(self) -> PreviewCallback:
        """Listen from now on; returns the callback."""
        self._is_entered = True
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
    ) -> None:
        """Complete all files and leave the pipeline as it was found; passes exceptions on."""
        self._is_entered = False
        self._end()
        if error is None:
            self._parts.boundary.raise_kept()
            if self._runs_begun == self._runs_at_entry:
                warn(
                    "the pipeline must be given the callback, got no step of any run; "
                    "pass it: pipe(..., callback_on_step_end=preview)"
                )

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
        if self._ears is not None:
            self._ears.close()

    # One run after the other --------------------------------------------------------------

    def _listen(self, pipe: Pipeline) -> _Ears:
        """Hear the pipeline's steps and the end of its calls, from now until the run is over."""
        ears = self._ears
        if ears is None or ears.is_closed or ears.pipe() is not pipe:
            if ears is not None:
                ears.close()
            self._ears = ears = _Ears(self, pipe, self._parts.tap)
        self._parts.tap.attach(pipe.scheduler)  # a no-op, unless the scheduler was exchanged
        return ears

    def _step(self, pipe: Pipeline, timestep: object, latents: Tensor) -> None:
        call = enclosing_call(call_code(type(pipe)))
        run = self._current_run(pipe, call)
        run.step(timestep, latents, is_last=bool(getattr(pipe, "_interrupt", False)))
        if run.is_complete and (call is None or not _ends_with_a_sign(call)):
            self._finish()

    def _current_run(self, pipe: Pipeline, call: FrameType | None) -> Run:
        run = self._run
        if run is not None and not run.is_over and run.call is call:
            return run
        if run is not None:
            self._leave(run)
            self._parts.tap.forget_earlier()
        self._run = run = self._begin(pipe, call)
        return run

    def _begin(self, pipe: Pipeline, call: FrameType | None) -> Run:
        ears = self._listen(pipe)
        started_s = self._parts.tap.started_s
        run = Run(
            self._parts,
            index=self._runs_begun,
            num_steps=_num_callbacks(pipe),
            call=call,
            started_s=self._parts.clock() if started_s is None else started_s,
            undo=_nothing if self._is_entered else ears.close,
            previous=self._unfinished,
        )
        self._runs_begun += 1
        return run

    def _is_running(self) -> bool:
        run, pipe = self._run, self._pipe()
        if run is None or pipe is None or run.call is None:
            return False
        return enclosing_call(call_code(type(pipe))) is run.call

    def _on_call_ended(self, pipe: Pipeline) -> None:
        run, call = self._run, enclosing_call(call_code(type(pipe)))
        if run is None or call is None or run.call is not call:
            if run is None:
                self._parts.tap.forget()  # that call was not ours: keep nothing of it
            return
        with self._parts.boundary.around("the last frame"), torch.no_grad():
            run.submit_skipped()
            if self._options.final:
                run.submit_final(_finished_images(local(call, "image", "images")))
        self._finish()
        self._parts.boundary.raise_kept()

    def _finish(self) -> None:
        run = self._run
        if run is not None and not run.is_current_thread:
            self._leave(run)
            self._parts.tap.forget()

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
        self._finalizer = weakref.finalize(callback, self.close)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Leave the pipeline as it was found; again does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._finalizer.detach()
            self._stop()
            self._tap.detach()

    def before(self, owner: object) -> object:
        """Nothing is to be seen yet."""

    def after(
        self,
        owner: object,
        seen: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: object,
    ) -> None:
        """The pipeline's call is about to return."""
        callback, pipe = self._callback(), self.pipe()
        if callback is not None and pipe is not None:
            callback._on_call_ended(pipe)


def _nothing() -> None:
    """Nothing is there to undo."""


def _ends_with_a_sign(call: FrameType) -> bool:
    """Whether a call will still tell of its end; some leave early when latents are asked for."""
    return _END in call.f_code.co_names and local(call, "output_type") != "latent"


def _latents(callback_kwargs: Mapping[str, object]) -> Tensor:
    latents = callback_kwargs.get("latents")
    if not isinstance(latents, Tensor):
        raise TypeError(
            f"callback_kwargs must hold a tensor 'latents', got {sorted(callback_kwargs)}; "
            "pass callback_on_step_end_tensor_inputs=['latents']"
        )
    return latents


def _num_callbacks(pipe: Pipeline) -> int:
    """How many callbacks a run makes: half steps of second-order schedulers count."""
    counted = getattr(pipe, "_num_timesteps", None)
    if isinstance(counted, int):
        return counted
    timesteps = getattr(pipe.scheduler, "timesteps", None)
    return len(timesteps) if isinstance(timesteps, Tensor) else 1


def _finished_images(output: object) -> NDArray[np.uint8] | None:
    """Pipeline output of any `output_type` as (B, H, W, 3) uint8; None for latents."""
    if isinstance(output, list) and output and all(isinstance(x, Image.Image) for x in output):
        return np.stack([np.asarray(picture.convert("RGB")) for picture in output])
    if isinstance(output, np.ndarray) and output.ndim == 4 and output.shape[-1] == 3:
        output = torch.from_numpy(output).movedim(-1, 1)
    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] == 3:
        return to_uint8(output.detach().float().cpu() * 2 - 1)
    return None


def _decoder_maker(decoder: str | Factors | Decoder, vae: object) -> Callable[[], Decoder]:
    """What gives each run its decoder: principal components start anew, all others are shared."""
    if decoder == "auto":
        found = None if vae is None else factors.find(vae)
        if found is None and vae is not None:
            warn(factors.explain_unknown(vae))
        return PcaDecoder if found is None else functools.partial(_itself, LinearDecoder(found))
    return functools.partial(_itself, _decoder(decoder, vae))


def _itself(decoder: Decoder) -> Decoder:
    return decoder


def _decoder(decoder: str | Factors | Decoder, vae: object) -> Decoder:
    if isinstance(decoder, Factors):
        return LinearDecoder(decoder)
    if isinstance(decoder, str):
        return _named_decoder(decoder, vae)
    if isinstance(decoder, Decoder):
        return decoder
    raise TypeError(
        f"decoder must be 'auto', the name of factors, a Factors or a Decoder, got "
        f"{type(decoder).__name__}; a Decoder has `name` and `decode(latents)`"
    )


def _named_decoder(name: str, vae: object) -> Decoder:
    try:
        return LinearDecoder(factors.by_name(name, vae))
    except ValueError as error:
        raise ValueError(f"decoder must be 'auto' or the name of factors; {error}") from None


def _vae_decoder(vae: object) -> VaeDecoder:
    if not isinstance(vae, nn.Module):
        raise ValueError(
            f"vae_every must be None for a pipeline without a VAE, got {type(vae).__name__} as "
            "its VAE; leave vae_every out"
        )
    return VaeDecoder(vae)


def _check_pipeline(pipe: object) -> None:
    if not callable(pipe) or not hasattr(pipe, "scheduler"):
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


def _check_interval(value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value >= 0:  # type: ignore[operator]
        raise ValueError(
            f"min_interval_s must be seconds from 0 on, got {value!r}; 0 makes every preview"
        )
