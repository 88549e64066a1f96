"""Owns one run: from a pipeline's first callback until its frames are written and files closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from types import FrameType
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .boundary import Boundary
from .decoders import Decoder, VaeDecoder
from .engine import PATIENCE_S, Snapshot, Worker
from .frame import INITIAL_STEP_INDEX, Frame, Source
from .layouts import Layout
from .tap import SchedulerTap, is_running
from .writers import Writer
from .x0 import StepCall, initial_noise_scale, noise_scale, predict_x0, sigma_after

PreviewSource = Literal["denoised", "noisy", "both"]
Batch = Literal["grid", "first"]
MAX_WAITING_BYTES = 256 << 20
_Array = TypeVar("_Array", Tensor, NDArray[np.uint8])


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
    layout: Layout
    make_decoder: Callable[[], Decoder]
    vae_decoder: VaeDecoder | None
    writers: Sequence[Writer]
    boundary: Boundary
    tap: SchedulerTap
    clock: Callable[[], float]


@dataclass(frozen=True, eq=False)
class _Step:
    """One callback: the step before it, and what it was given."""

    call: StepCall | None
    timestep: object
    latents: Tensor
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
    noisy: Snapshot | None = None
    denoised: Snapshot | None = None
    noise_scale: float = 1.0
    images: NDArray[np.uint8] | None = None
    decoder: str = ""

    @property
    def size_bytes(self) -> int:
        """What it holds on to while it waits."""
        held = [x.size_bytes for x in (self.noisy, self.denoised) if x is not None]
        return sum(held) + (0 if self.images is None else self.images.nbytes)


@dataclass(eq=False)
class Run:
    """One call of a pipeline.

    Attributes:
        parts: what the callback's runs share.
        index: 0-based count of the callback's runs.
        num_steps: how many callbacks are expected.
        call: the frame of the pipeline's `__call__`; let go of when the run ends.
        started_s: when the first step began, by the clock in `parts`.
        undo: what to undo on the pipeline when the run ends; may be called again.
        previous: the run before; its files are closed before this one's are opened.
    """

    parts: Parts
    index: int
    num_steps: int
    call: FrameType | None
    started_s: float
    undo: Callable[[], None]
    previous: InitVar[Run | None] = None

    def __post_init__(self, previous: Run | None) -> None:
        self._decoder = self.parts.make_decoder()
        self._steps = self._frames = 0
        self._first_step_s = self.started_s
        self._last_frame_s = float("-inf")
        self._skipped: _Step | None = None
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

    def step(self, timestep: object, latents: Tensor, *, is_last: bool) -> None:
        """Take one callback: decide, copy what is small, hand over, return."""
        call, is_first = self.parts.tap.take()
        step = _Step(call, timestep, latents, self.parts.clock())
        self._steps += 1
        self.num_steps = max(self.num_steps, self._steps)
        if self._steps == 1:
            self._first_step_s = step.at_s
            if self.parts.options.initial and is_first and call is not None:
                self._submit_initial(call)
        if is_last or self.is_complete or self._is_due(step.at_s):
            self._submit_step(step)
        else:
            self._skipped = step

    def submit_final(self, images: NDArray[np.uint8] | None) -> None:
        """Show the pipeline's finished pictures, uint8 (B, H, W, 3), as the run's last frame."""
        if images is None:
            return
        images = _of_batch(images, self.parts.options.batch)
        if self.parts.options.source == "both":
            images = np.concatenate([images, images], axis=2)
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

    def _submit_step(self, step: _Step) -> None:
        self._skipped = None
        self._last_frame_s = step.at_s
        self._frames += 1
        self._submit(self._job(step))

    def _is_due(self, now: float) -> bool:
        options = self.parts.options
        too_soon = now - self._last_frame_s < options.min_interval_s
        return self._steps % options.every == 0 and not too_soon

    def _submit_initial(self, call: StepCall) -> None:
        with self.parts.boundary.around("the initial noise"):
            self._submit(
                _Job(
                    step_index=INITIAL_STEP_INDEX,
                    source="noisy",
                    elapsed_s=0.0,
                    noisy=Snapshot(_of_batch(call.sample, self.parts.options.batch)),
                    noise_scale=initial_noise_scale(call),
                )
            )

    def _job(self, step: _Step) -> _Job:
        options = self.parts.options
        x0 = None if options.source == "noisy" else self._x0(step)
        noisy = None if x0 is not None and options.source == "denoised" else step.latents
        noisy, x0 = (None if x is None else _of_batch(x, options.batch) for x in (noisy, x0))
        sigma, scale = self._noise_level(step)
        images = self._full_decode(_pictured(noisy, x0, scale))
        return _Job(
            step_index=self._steps - 1,
            source=options.source if x0 is not None else "noisy",
            elapsed_s=step.at_s - self.started_s,
            eta_s=self._eta_s(step.at_s),
            timestep=_scalar(step.timestep),
            sigma=sigma,
            noisy=None if noisy is None else Snapshot(noisy),
            denoised=None if x0 is None else Snapshot(x0),
            noise_scale=scale,
            images=images,
            decoder="" if images is None else VaeDecoder.name,
        )

    def _x0(self, step: _Step) -> Tensor | None:
        """None where there is none, or where the scheduler steps another layout than is shown."""
        x0 = None
        if step.call is not None:
            with self.parts.boundary.around("the predicted x0 (noisy latents are shown)"):
                x0 = predict_x0(step.call)
        return x0 if x0 is not None and x0.shape == step.latents.shape else None

    def _noise_level(self, step: _Step) -> tuple[float | None, float]:
        if step.call is not None:
            with self.parts.boundary.around("reading the noise level"):
                return sigma_after(step.call), noise_scale(step.call)
        return None, 1.0

    def _full_decode(self, pictured: Sequence[Tensor]) -> NDArray[np.uint8] | None:
        decoder, every = self.parts.vae_decoder, self.parts.options.vae_every
        if decoder is None or every is None or self._frames % every or self._vae_failed:
            return None
        try:
            images = [decoder.decode(self.parts.layout.to_vae(latents)) for latents in pictured]
        except Exception as error:
            if _are_finite(pictured):  # else it is not the VAE's fault
                self._vae_failed = True
                self.parts.boundary.report("the full VAE decode (vae_every)", error)
            return None
        return np.concatenate(images, axis=2)

    def _eta_s(self, now: float) -> float | None:
        left = self.num_steps - self._steps
        if self._steps > 1:
            return (now - self._first_step_s) / (self._steps - 1) * left
        # with the warm-up in it, but better than nothing
        return (now - self.started_s) * left if now > self.started_s else None

    def _release(self) -> None:
        self.undo()
        self.call = None

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
        noisy = None if job.noisy is None else job.noisy.wait()
        x0 = None if job.denoised is None else job.denoised.wait()
        latents = noisy if x0 is None else x0
        images, decoder = job.images, job.decoder
        if images is None:
            images = self._decode(_pictured(noisy, x0, job.noise_scale), job.step_index)
            decoder = self._decoder.name
        is_kept = self.parts.options.keep_latents and latents is not None
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
            layout=self.parts.layout.name,
            run_index=self.index,
            latents=self.parts.layout.to_vae(cast(Tensor, latents)) if is_kept else None,
        )

    def _decode(self, pictured: Sequence[Tensor], step_index: int) -> NDArray[np.uint8]:
        if not _are_finite(pictured):
            self.parts.boundary.tell(
                "finite",
                f"latents must be finite, got NaN or infinity after step {step_index + 1}; "
                "such pixels are shown grey, and bfloat16 or float32 may cure it",
            )
        in_vae_space = map(self.parts.layout.to_vae, pictured)
        return np.concatenate([self._decoder.decode(x) for x in in_vae_space], axis=2)


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _pictured(noisy: Tensor | None, x0: Tensor | None, scale: float) -> list[Tensor]:
    """What is to be seen, left to right, the noisy latents brought to unit variance."""
    shown = [] if noisy is None else [noisy if scale == 1.0 else noisy.float() / scale]
    return shown if x0 is None else [*shown, x0]


def _of_batch(values: _Array, batch: Batch) -> _Array:
    return values if batch == "grid" else values[:1]


def _scalar(value: object) -> Snapshot | float | None:
    """A timestep, which may be a number, a 0-d or 1-element tensor, or a vector (then None)."""
    if isinstance(value, Tensor):
        return Snapshot(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _number(value: Snapshot | float | None) -> float | None:
    return float(value.wait()) if isinstance(value, Snapshot) else value
