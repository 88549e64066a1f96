"""Owns one run: from a pipeline's first callback until its frames are written and files closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from types import FrameType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .boundary import Boundary
from .decoders import Decoder, PixelDecoder, VaeDecoder
from .engine import PATIENCE_S, Snapshot, Worker
from .frame import INITIAL_STEP_INDEX, Frame, Source
from .layouts import Layout, LayoutError, Shown, Shows
from .tap import SchedulerTap, is_running
from .writers import Writer
from .x0 import StepCall, initial_noise_scale, noise_scale, predict_x0, sigma_after

PreviewSource = Literal["denoised", "noisy", "both"]
Batch = Literal["grid", "first"]
MAX_WAITING_BYTES = 256 << 20


@dataclass(frozen=True)
class Options:
    """When and what to preview; as in `PreviewCallback`."""

    every: int = 1
    vae_every: int | None = None
    min_interval_s: float = 0.0
    source: PreviewSource = "denoised"
    batch: Batch = "grid"
    initial: bool = False
    final: bool = False
    keep_latents: bool = False


@dataclass(frozen=True, eq=False)
class Parts:
    """What the runs of one callback share. Knows nothing of the callback, which can be freed."""

    options: Options
    make_decoder: Callable[[], Decoder]
    vae_decoder: VaeDecoder | None
    writers: Sequence[Writer]
    boundary: Boundary
    tap: SchedulerTap
    clock: Callable[[], float]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a pipeline, as it was seen on the run's thread.

    Attributes:
        layout: of the pipeline's latents.
        values: what the layout reads of the run.
        latents: after the step, as the callback holds them, or as the scheduler returned them.
        context: what `latents` or x0 are filled in from where they are only a part; None where
            there is nothing.
        kept: of an inpainting run, the mask (1 where it paints) and the picture's own latents.
        timestep: as the pipeline passed it.
        call: of the scheduler; None where it was not heard.
        parts: the same for single frames of a video, with their numbers, where each is stepped by
            itself; None everywhere else.
        is_first: whether `call` was its scheduler's first in the run.
        at_s: when it was seen.
    """

    layout: Layout
    values: Mapping[str, object]
    latents: Tensor
    context: Tensor | None
    kept: tuple[Tensor, Tensor] | None
    timestep: object
    call: StepCall | None
    parts: Sequence[tuple[int, StepCall]] | None
    is_first: bool
    at_s: float


@dataclass(frozen=True, eq=False)
class _Job:
    """What the step path took along of a frame that the worker is to make."""

    step_index: int
    source: Source
    elapsed_s: float
    eta_s: float | None = None
    timestep: Snapshot | float | None = None
    sigma: float | None = None
    layout: Layout | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    noisy: Snapshot | None = None
    denoised: Snapshot | None = None
    context: Snapshot | None = None
    noise_scale: float = 1.0
    images: NDArray[np.uint8] | None = None
    decoder: str = ""
    values_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """What it holds on to while it waits, and no earlier job does."""
        held = [x for x in (self.noisy, self.denoised, self.context) if x is not None]
        images = 0 if self.images is None else self.images.nbytes
        return sum(x.size_bytes for x in held) + images + self.values_bytes


@dataclass(eq=False)
class Run:
    """One call of a pipeline.

    Attributes:
        parts: what the callback's runs share.
        index: 0-based count of the callback's runs.
        call: the frame of the outermost pipeline's `__call__`; let go of when the run ends.
        started_s: when the first step began, by the clock in `parts`.
        is_called_back: whether the pipeline calls the callback itself.
        shows: what its pictures are of.
        undo: what to undo on the pipeline when the run ends; may be called again.
        previous: the run before; its files are closed before this one's are opened.
    """

    parts: Parts
    index: int
    call: FrameType | None
    started_s: float
    undo: Callable[[], None]
    previous: InitVar[Run | None] = None

    def __post_init__(self, previous: Run | None) -> None:
        self._decoder = self.parts.make_decoder()
        self.num_steps = self._steps = self._frames = 0
        self._stage: FrameType | None = None
        self._stage_began = self._stage_index = 0
        self._copies: dict[str, tuple[Tensor, int | None, Snapshot]] = {}
        self.is_called_back = False
        self.shows: Shows = "image"
        self._first_step_s = self.started_s
        self._last_frame_s = float("-inf")
        self._skipped: Step | None = None
        self._vae_failed = False
        self._failed_writers: set[int] = set()
        self._submitted_bytes = self._handled_bytes = 0
        self._thread_id = threading.get_ident()
        self._worker: Worker[_Job] = Worker(
            self._handle,
            is_abandoned=self._is_abandoned,
            on_end=self._end,
            after=None if previous is None else previous._worker,
        )
        self.parts.boundary.begin_run()

    @property
    def is_over(self) -> bool:
        """Whether its frames are written and its files closed."""
        return not self._worker.is_alive

    @property
    def is_current_thread(self) -> bool:
        """Whether it is the run's own worker that asks, and so one of the targets."""
        return self._worker.is_current_thread

    @property
    def is_complete(self) -> bool:
        """Whether as many callbacks have come as were expected."""
        return self._steps >= self.num_steps

    # The caller's thread ------------------------------------------------------------------

    def begin_step(self, stage: FrameType | None, index: int, expected: int) -> None:
        """Count a step in, and the steps that are to come.

        Combined pipelines run in stages, one inner pipeline after the other, and some pipelines
        start over for each part of a long video: each time, more steps are expected.

        Args:
            stage: frame of the innermost pipeline's `__call__`.
            index: the pipeline's own count of its steps.
            expected: how many steps that pipeline makes.
        """
        if self._steps == 0 or stage is not self._stage:
            self._stage, self._stage_began = stage, self._steps
            self.num_steps = self._steps + expected
        elif index < self._stage_index:
            as_before = self._steps - self._stage_began
            self.num_steps = max(self.num_steps, self._steps + as_before)
            self._stage_began = self._steps
        self._stage_index = index
        self._steps += 1
        self.num_steps = max(self.num_steps, self._steps)

    def step(self, step: Step, *, is_last: bool) -> None:
        """Take a step that was counted in: decide, copy what is small, hand over, return."""
        self.shows = step.layout.row.shows
        if self._frames == 0 and self._skipped is None:
            self._first_step_s = step.at_s
            if self.parts.options.initial and step.is_first:
                self._submit_initial(step)
        if is_last or self.is_complete or self._is_due(step.at_s):
            self._submit_step(step)
        else:
            self._skipped = step

    def submit_final(self, images: NDArray[np.uint8] | None) -> None:
        """Show the pipeline's own finished pictures as the run's last frame.

        Args:
            images: (B, H, W, 3) or (B, F, H, W, 3) uint8; None shows nothing.
        """
        if images is None:
            return
        images = images[: _count(self.parts.options.batch)]
        if self.parts.options.source == "both":
            images = np.concatenate([images, images], axis=-2)
        self._submit(
            _Job(
                step_index=self.num_steps - 1,
                source="final",
                elapsed_s=self.parts.clock() - self.started_s,
                eta_s=0.0,
                images=images,
                decoder="pipeline",
            )
        )

    def submit_skipped(self) -> None:
        """Show the last step after all: the run ended early, and nobody had said so."""
        if self._skipped is not None:
            self._submit_step(self._skipped)

    def finish(self) -> None:
        """Leave the pipeline as it was found, wait for the frames, close the files."""
        self._release()
        if not self._worker.finish():
            self.parts.boundary.tell(
                "patience",
                f"preview targets must take frames, got no sign of life for {PATIENCE_S:.0f} s; "
                "the run goes on, and its files are completed in the background",
            )

    def _submit(self, job: _Job) -> None:
        size = job.size_bytes
        if self._submitted_bytes - self._handled_bytes + size > MAX_WAITING_BYTES:
            self.parts.boundary.tell(
                "waiting",
                f"previews waiting to be written must be at most {MAX_WAITING_BYTES >> 20} MiB, "
                "got more; frames are left out because the targets are slower than the run",
            )
            return
        self._submitted_bytes += size
        self._worker.submit(job)

    def _submit_step(self, step: Step) -> None:
        self._skipped = None
        self._last_frame_s = step.at_s
        self._frames += 1
        self._submit(self._job(step))

    def _is_due(self, now: float) -> bool:
        options = self.parts.options
        too_soon = now - self._last_frame_s < options.min_interval_s
        return self._steps % options.every == 0 and not too_soon

    def _submit_initial(self, step: Step) -> None:
        with self.parts.boundary.around("the initial noise"):
            if step.call is None:
                return
            context = self._context(step, step.call.sample)
            values, values_bytes = self._private(step.values)
            self._submit(
                _Job(
                    step_index=INITIAL_STEP_INDEX,
                    source="noisy",
                    elapsed_s=0.0,
                    layout=step.layout,
                    values=values,
                    values_bytes=values_bytes,
                    noisy=Snapshot(step.call.sample),
                    context=None if context is None else Snapshot(context),
                    noise_scale=initial_noise_scale(step.call),
                )
            )

    def _job(self, step: Step) -> _Job:
        options = self.parts.options
        x0 = None if options.source == "noisy" else self._x0(step)
        noisy = None if x0 is not None and options.source == "denoised" else step.latents
        context = self._context(step, noisy, x0)
        sigma, scale = self._noise_level(step)
        images = self._full_decode(step, _pictured(noisy, x0, scale), context)
        copied = _Snapshots()
        values, values_bytes = self._private(step.values)
        return _Job(
            step_index=self._steps - 1,
            source=options.source if x0 is not None else "noisy",
            elapsed_s=step.at_s - self.started_s,
            eta_s=self._eta_s(step.at_s),
            timestep=_scalar(step.timestep),
            sigma=sigma,
            layout=step.layout,
            values=values,
            values_bytes=values_bytes,
            noisy=copied.of(noisy),
            denoised=copied.of(x0),
            context=copied.of(context),
            noise_scale=scale,
            images=images,
            decoder="" if images is None else VaeDecoder.name,
        )

    def _context(self, step: Step, *shown: Tensor | None) -> Tensor | None:
        """What the tensors are filled in from; None where they are whole."""
        context = step.context
        if context is None or step.layout.row.stepped is None:
            return None
        is_whole = all(x is None or x.shape == context.shape for x in shown)
        return None if is_whole else context

    def _private(self, values: Mapping[str, object]) -> tuple[dict[str, object], int]:
        """Values with copies in the place of tensors, and the size of those that are new.

        What did not change since the last time is not copied again.
        """
        private, new_bytes = dict(values), 0
        for name, value in values.items():
            if isinstance(value, Tensor):
                known = self._unchanged(name, value)
                private[name] = copy = known or Snapshot(value)
                if known is None:
                    new_bytes += copy.size_bytes
                    self._copies[name] = value, _version(value), copy
        return private, new_bytes

    def _unchanged(self, name: str, tensor: Tensor) -> Snapshot | None:
        seen, version, copy = self._copies.get(name, (None, None, None))
        is_same = seen is tensor and version is not None and version == _version(tensor)
        return copy if is_same else None

    def _x0(self, step: Step) -> Tensor | None:
        """None where there is none, or where the scheduler steps something else than is shown."""
        x0 = None
        if step.parts is not None:
            with self.parts.boundary.around("the predicted x0 (noisy latents are shown)"):
                return _frame_by_frame(step.latents, step.parts)
        if step.call is not None:
            with self.parts.boundary.around("the predicted x0 (noisy latents are shown)"):
                x0 = _with_kept(predict_x0(step.call), step.kept)
        if x0 is None or x0.shape == step.latents.shape:
            return x0
        return x0 if self._context(step, x0) is not None else None

    def _noise_level(self, step: Step) -> tuple[float | None, float]:
        if step.call is not None:
            with self.parts.boundary.around("reading the noise level"):
                return sigma_after(step.call), noise_scale(step.call)
        return None, 1.0

    def _full_decode(
        self, step: Step, pictured: Sequence[Tensor], context: Tensor | None
    ) -> NDArray[np.uint8] | None:
        decoder, every, row = self.parts.vae_decoder, self.parts.options.vae_every, step.layout.row
        if decoder is None or every is None or self._frames % every or self._vae_failed:
            return None
        if row.space == "pixels" or row.shows == "audio":
            return None
        try:
            images = []
            for latents in pictured:
                shown = _looked_at(step.layout, latents, context, step.values)
                if not decoder.can_decode(shown.latents):
                    return None
                images.append(self._decoded(decoder, step, shown))
        except Exception as error:
            if _are_finite(pictured):  # else it is not the VAE's fault
                self._vae_failed = True
                self.parts.boundary.report("the full VAE decode (vae_every)", error)
            return None
        return np.concatenate(images, axis=-2)

    def _decoded(self, decoder: VaeDecoder, step: Step, shown: Shown) -> NDArray[np.uint8]:
        """(B, H, W, 3), or of videos the first frame, (B, 1, H, W, 3)."""
        latents, frames = shown.latents, shown.frames
        is_video = frames is not None or (latents.ndim == 5 and latents.shape[2] > 1)
        latents = latents[:: frames or 1] if latents.ndim == 4 else latents[:, :, :1]
        latents = latents[: _count(self.parts.options.batch)]
        images = decoder.decode(latents, step.layout.row.decode, step.layout.row.decode_range)
        return images[:, None] if is_video else images

    def _eta_s(self, now: float) -> float | None:
        left = self.num_steps - self._steps
        if self._steps > 1:
            return (now - self._first_step_s) / (self._steps - 1) * left
        # with the warm-up in it, but better than nothing
        return (now - self.started_s) * left if now > self.started_s else None

    def _release(self) -> None:
        self.undo()
        self.call = self._stage = None
        self._copies.clear()

    # The worker's thread ------------------------------------------------------------------
    # Here even a BaseException is a failure of a target: Ctrl-C goes to the main thread.

    def _is_abandoned(self) -> bool:
        """Whether the pipeline was left by an exception, so that no callback will end the run."""
        call = self.call
        return call is not None and not is_running(call, self._thread_id)

    def _end(self) -> None:
        for part, writer in self._writers():
            try:
                writer.close()
            except BaseException as error:
                self.parts.boundary.report(part, error)
        self._skipped = None
        self._release()

    def _handle(self, job: _Job) -> None:
        try:
            self._write(self._frame(job))
        except LayoutError as error:
            self.parts.boundary.explain("the layout", error)
        except BaseException as error:
            self.parts.boundary.report("making a preview frame", error)
        self._handled_bytes += job.size_bytes

    def _write(self, frame: Frame) -> None:
        for number, (part, writer) in enumerate(self._writers()):
            if number in self._failed_writers:
                continue
            try:
                writer.write(frame)
            except BaseException as error:
                self._failed_writers.add(number)
                self.parts.boundary.report(part, error)

    def _writers(self) -> Iterator[tuple[str, Writer]]:
        for number, writer in enumerate(self.parts.writers, start=1):
            yield f"preview target {number}, {type(writer).__name__},", writer

    def _frame(self, job: _Job) -> Frame:
        images, decoder, latents = job.images, job.decoder, None
        is_kept = self.parts.options.keep_latents
        if job.layout is not None and (images is None or is_kept):
            noisy, x0, context = (
                None if x is None else x.wait() for x in (job.noisy, job.denoised, job.context)
            )
            values = {
                name: value.wait() if isinstance(value, Snapshot) else value
                for name, value in job.values.items()
            }
            if is_kept:
                kept = noisy if x0 is None else x0
                assert kept is not None
                shown = _looked_at(job.layout, kept, context, values)
                latents = shown.latents[: _count(self.parts.options.batch, shown.frames)]
            if images is None:
                pictured = _pictured(noisy, x0, job.noise_scale)
                self._check_finite(pictured, job.step_index)
                looked_at = [_looked_at(job.layout, x, context, values) for x in pictured]
                images, decoder = self._drawn(job.layout, looked_at, values)
                if job.step_index == INITIAL_STEP_INDEX and self.parts.options.source == "both":
                    images = np.concatenate([images, images], axis=-2)
        assert images is not None
        return Frame(
            images=images,
            step_index=job.step_index,
            num_steps=self.num_steps,
            timestep=_number(job.timestep),
            sigma=job.sigma,
            source=job.source,
            decoder=decoder,
            elapsed_s=job.elapsed_s,
            eta_s=job.eta_s,
            layout="" if job.layout is None else job.layout.name,
            run_index=self.index,
            latents=latents,
        )

    def _check_finite(self, pictured: Sequence[Tensor], step_index: int) -> None:
        if not _are_finite(pictured):
            self.parts.boundary.tell(
                "finite",
                f"latents must be finite, got NaN or infinity after step {step_index + 1}; "
                "such pixels are shown grey, and bfloat16 or float32 may cure it",
            )

    def _drawn(
        self, layout: Layout, looked_at: Sequence[Shown], values: Mapping[str, object]
    ) -> tuple[NDArray[np.uint8], str]:
        """(B, H, W, 3) or (B, F, H, W, 3), the sources side by side, and who drew them."""
        decoder = _PIXELS if layout.row.space == "pixels" else self._decoder
        images = []
        for shown in looked_at:
            pictures, frames = _as_pictures(layout.to_drawn(shown.latents, values), shown.frames)
            pictures = pictures[: _count(self.parts.options.batch, frames)]
            drawn = decoder.decode(pictures)
            images.append(drawn if frames is None else drawn.reshape(-1, frames, *drawn.shape[1:]))
        return np.concatenate(images, axis=-2), decoder.name


_PIXELS = PixelDecoder()


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _frame_by_frame(latents: Tensor, parts: Sequence[tuple[int, StepCall]]) -> Tensor:
    """(B, C, F, h, w): x0 of the frames that were stepped, the others as they are."""
    video = latents.float().clone()
    for number, call in parts:
        x0 = predict_x0(call)
        if x0 is not None:
            video[:, :, number] = x0
    return video


def _with_kept(x0: Tensor | None, kept: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """x0 where an inpainting run paints, and its picture everywhere else."""
    if x0 is None or kept is None or kept[1].shape[1:] != x0.shape[1:]:
        return x0
    mask, picture = (tensor.to(x0) for tensor in kept)
    return picture + mask * (x0 - picture)


class _Snapshots:
    """Copies of tensors; of one that is given twice, one copy."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Snapshot]] = []

    def of(self, tensor: Tensor | None) -> Snapshot | None:
        """A copy; of None, None."""
        if tensor is None:
            return None
        known = next((copy for seen, copy in self._copies if seen is tensor), None)
        if known is None:
            known = Snapshot(tensor)
            self._copies.append((tensor, known))
        return known


def _looked_at(
    layout: Layout, latents: Tensor, context: Tensor | None, values: Mapping[str, object]
) -> Shown:
    """Latents in VAE space, what is shown of them."""
    whole = latents if context is None else layout.to_callback(latents.float(), context, values)
    return layout.to_shown(layout.to_vae(whole, values), whole, values)


def _as_pictures(latents: Tensor, frames: int | None) -> tuple[Tensor, int | None]:
    """(N, C, h, w), and how many of them are one video; None where they are single images."""
    if latents.ndim == 4:
        return latents, frames
    if latents.shape[2] == 1:
        return latents.squeeze(2), None
    return latents.transpose(1, 2).flatten(0, 1), latents.shape[2]


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _pictured(noisy: Tensor | None, x0: Tensor | None, scale: float) -> list[Tensor]:
    """What is to be seen, left to right, the noisy latents brought to unit variance."""
    shown = [] if noisy is None else [noisy if scale == 1.0 else noisy.float() / scale]
    return shown if x0 is None else [*shown, x0]


def _count(batch: Batch, frames: int | None = None) -> int | None:
    """How many pictures of a batch are shown; None is all."""
    return None if batch == "grid" else frames or 1


def _scalar(value: object) -> Snapshot | float | None:
    """A timestep, which may be a number, a 0-d or 1-element tensor, or a vector (then None)."""
    if isinstance(value, Tensor):
        return Snapshot(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _number(value: Snapshot | float | None) -> float | None:
    return float(value.wait()) if isinstance(value, Snapshot) else value
