"""Owns one run: from a pipeline's first callback until its frames are written and files closed."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import islice
from types import FrameType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .boundary import Boundary
from .cost import Budget, Stats, Stopwatch
from .decoders import Decoder, PixelDecoder
from .engine import (
    PATIENCE_S,
    EveryBox,
    Inbox,
    NewestBox,
    Room,
    Snapshot,
    Storage,
    Stored,
    Worker,
    finished,
)
from .frame import INITIAL_STEP_INDEX, Frame, Source
from .layouts import Layout, LayoutError, Shown, Shows
from .refit import RefitDecoder
from .tap import Calls, SchedulerTap, is_running
from .vae import VaeDecoder
from .writers import Writer
from .x0 import (
    READ_TENSORS,
    StepCall,
    has_x0,
    initial_noise_scale,
    noise_scale,
    predict_x0,
    sigma_after,
)

PreviewSource = Literal["denoised", "noisy", "both"]
Batch = Literal["grid", "first"]
MAX_WAITING_BYTES = 256 << 20  # half for latents, half for pictures; more waits on disk


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
    budget: float | None = None


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
    watch: Stopwatch
    stop: Callable[[int], None]


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


class _Parcel:
    """A frame that waits for a target; one for all targets that want it."""

    def __init__(self, frame: Frame) -> None:
        self._frame: Frame | None = frame
        self._rest = frame
        self._images: Stored | None = None
        self._latents: Snapshot | None = None

    @property
    def is_last_preview(self) -> bool:
        """Whether only the finished picture can come after it."""
        return self._rest.is_last and self._rest.source != "final"

    @property
    def size_bytes(self) -> int:
        """Memory that the pictures and latents take."""
        frame = self._frame
        if frame is None:
            return 0
        return frame.images.nbytes + (0 if frame.latents is None else frame.latents.nbytes)

    def store(self, storage: Storage) -> None:
        """Put them on disk."""
        frame = self._frame
        if frame is None:
            return
        if frame.latents is not None:
            self._latents = Snapshot(frame.latents, is_private=True)
            self._latents.store(storage)
        self._images = storage.put(frame.images)
        self._rest = replace(frame, images=frame.images[:0].copy(), latents=None)
        self._frame = None  # last, because a target's thread may be looking

    def frame(self) -> Frame:
        """The frame, whole."""
        frame = self._frame
        if frame is not None:
            return frame
        assert self._images is not None
        latents = None if self._latents is None else self._latents.wait()
        return replace(self._rest, images=self._images.load(), latents=latents)


class _Prediction:
    """x0 that the worker is to compute.

    On an accelerator that is less for the run: a few copies of half-precision tensors instead of
    as many bytes in float32 and a handful of kernels besides.
    """

    def __init__(self, call: StepCall, kept: tuple[Snapshot, Snapshot] | None) -> None:
        given = {name: call.arguments[name] for name in READ_TENSORS if name in call.arguments}
        self.shape = call.sample.shape
        self._call = replace(call, scheduler=_as_it_is(call.scheduler), arguments={}, output=None)
        self._given = {
            name: Snapshot(value) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        self._kept = kept

    @property
    def _copies(self) -> list[Snapshot]:
        return [value for value in self._given.values() if isinstance(value, Snapshot)]

    @property
    def size_bytes(self) -> int:
        """Memory that the copies take."""
        return sum(copy.size_bytes for copy in self._copies)

    def store(self, storage: Storage) -> None:
        """Put them on disk."""
        for copy in self._copies:
            copy.store(storage)

    def sample(self) -> Tensor:
        """The latents before the step."""
        sample = self._given["sample"]
        assert isinstance(sample, Snapshot)
        return sample.wait()

    def wait(self) -> Tensor:
        """x0, on the CPU."""
        arguments = {
            name: value.wait() if isinstance(value, Snapshot) else value
            for name, value in self._given.items()
        }
        x0 = predict_x0(replace(self._call, arguments=arguments))
        assert x0 is not None
        kept = None if self._kept is None else (self._kept[0].wait(), self._kept[1].wait())
        return _with_kept(x0, kept)


def _as_it_is(scheduler: object) -> object:
    """A scheduler with the tables that it has now; another run may set others."""
    same = object.__new__(type(scheduler))
    vars(same).update(vars(scheduler))
    return same


@dataclass(eq=False)
class _Job:
    """What the step path took along of a frame that the worker is to make.

    Attributes:
        number: counts the jobs of a run.
        parcel: the frame, where it was made before its turn.
        is_hastened: whether live targets got it before its turn.
    """

    number: int
    step_index: int
    source: Source
    elapsed_s: float
    eta_s: float | None = None
    timestep: Snapshot | float | None = None
    sigma: float | None = None
    layout: Layout | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    values_bytes: int = 0
    noisy: Snapshot | None = None
    denoised: Snapshot | _Prediction | None = None
    context: Snapshot | None = None
    noise_scale: float = 1.0
    images: NDArray[np.uint8] | Stored | None = None
    decoder: str = ""
    parcel: _Parcel | None = None
    is_hastened: bool = False

    @property
    def _parts(self) -> list[Snapshot | _Prediction | _Parcel]:
        parts = (self.noisy, self.denoised, self.context, self.parcel)
        return [part for part in parts if part is not None]

    @property
    def size_bytes(self) -> int:
        """Memory that it takes while it waits, and no earlier job does."""
        images = self.images.nbytes if isinstance(self.images, np.ndarray) else 0
        return sum(part.size_bytes for part in self._parts) + images + self.values_bytes

    def store(self, storage: Storage) -> None:
        """Put its tensors and pictures on disk."""
        for part in self._parts:
            part.store(storage)
        if isinstance(self.images, np.ndarray):
            self.images = storage.put(self.images)


class _Outlet:
    """One target: its writer, what waits for it, and the thread that writes.

    Attributes:
        newest: how many of the newest frames are of use to it; None is every frame.
        left_out: how many frames it did not get because there was no room for them.
    """

    def __init__(
        self, number: int, writer: Writer, run: Run, room: Room, after: _Outlet | None
    ) -> None:
        self.newest: int | None = getattr(writer, "newest", None)
        self.left_out = 0
        self._part = f"preview target {number}, {type(writer).__name__},"
        self._writer = writer
        self._dropped_before = _dropped(writer)
        self._boundary = run.parts.boundary
        self._has_failed = False
        # the last step's preview is of no use to a live view whose next frame is the real thing
        is_replaced = self.newest == 1 and run.parts.options.final
        self._box: EveryBox[_Parcel] | NewestBox[_Parcel]
        if self.newest is None:
            self._box = EveryBox(room, run.storage)
        else:
            self._box = NewestBox(self.newest, lambda x: is_replaced and x.is_last_preview)
        self._has_thread = True
        self._after = after  # let go of by `start`: else every run would keep the one before
        self.worker: Worker[_Parcel] = Worker(
            self._box,
            self._write,
            on_end=self._close,
            after=None if after is None else after.worker,
        )

    def start(self) -> None:
        """Begin to write; without a thread to be had, in that of whoever hands over frames."""
        after, self._after = self._after, None
        try:
            self.worker.start()
        except RuntimeError:
            self._has_thread = False
            if after is not None:
                after.worker.wait()

    @property
    def dropped(self) -> int:
        """How many frames gave way to newer ones, on their way here and in the writer's queue."""
        on_the_way = self._box.dropped if isinstance(self._box, NewestBox) else 0
        return on_the_way + _dropped(self._writer) - self._dropped_before

    def put(self, parcel: _Parcel) -> None:
        """Hand over a frame; returns at once."""
        if not self._has_thread:
            self._write(parcel)
        elif not self._has_failed and not self._box.put(parcel):
            self.left_out += 1
            _tell_of_no_room(self._boundary)

    def end(self) -> None:
        """No frame will come any more."""
        self._box.end()
        if not self._has_thread:
            self._close()

    def _write(self, parcel: _Parcel) -> None:
        if self._has_failed:
            return
        try:
            self._writer.write(parcel.frame())
        except BaseException as error:  # Ctrl-C goes to the main thread
            self._has_failed = True
            self._boundary.report(self._part, error)

    def _close(self) -> None:
        try:
            self._writer.close()
        except BaseException as error:
            self._boundary.report(self._part, error)


def _dropped(writer: Writer) -> int:
    """What a writer has counted itself, over all runs."""
    dropped = getattr(writer, "dropped", 0)
    return dropped if isinstance(dropped, int) else 0


def _tell_of_no_room(boundary: Boundary) -> None:
    boundary.tell(
        "waiting",
        f"previews waiting to be written must be at most {MAX_WAITING_BYTES >> 20} MiB in memory, "
        "and find room on the disk beyond, got more; frames are left out",
    )


@dataclass(eq=False)
class Run:
    """One call of a pipeline.

    Attributes:
        parts: what the callback's runs share.
        index: 0-based count of the callback's runs.
        call: the frame of the outermost pipeline's `__call__`; let go of when the run ends.
        started_s: when the first step began, by the clock in `parts`.
        calls: the pipeline calls of its last step; let go of when the run ends.
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
        self._budget = Budget(self.parts.options.budget)
        self.num_steps = self._steps = self._frames = self._jobs = 0
        self._stage: FrameType | None = None
        self._stage_began = self._stage_index = 0
        self._copies: dict[str, tuple[Tensor, int | None, Snapshot]] = {}
        self.calls: Calls | None = None
        self.is_called_back = False
        self.shows: Shows = "image"
        self._first_step_s = self.started_s
        self._last_frame_s = float("-inf")
        self._skipped: Step | None = None
        self._vae_failed = False
        self._vae_decodes = self._skipped_frames = self._left_out = self._made = self._passed = 0
        self._vae_s = self._drain_s = 0.0
        self._watched_s = self.parts.watch.total_s
        self._thread_id = threading.get_ident()
        self.storage = Storage()
        self._rooms = Room(MAX_WAITING_BYTES // 2), Room(MAX_WAITING_BYTES // 2)
        self._newest_shown = -1
        self._inbox = Inbox[_Job](self._rooms[0], self.storage)
        self._outlets: list[_Outlet] = []
        self.parts.boundary.begin_run()
        try:
            self._start(previous)
        except BaseException:  # no more threads to be had, or Ctrl-C
            for outlet in self._outlets:
                outlet.worker.give_up()
            raise

    def _start(self, previous: Run | None) -> None:
        """Start the thread that draws; it starts the others, and tells them of the end."""
        earlier = [None] * len(self.parts.writers) if previous is None else previous._outlets
        for number, writer in enumerate(self.parts.writers):
            after = earlier[number]
            self._outlets.append(_Outlet(number + 1, writer, self, self._rooms[1], after))
        self._worker: Worker[_Job] = Worker(
            self._inbox,
            self._handle,
            is_abandoned=self._is_abandoned,
            on_begin=self._begin,
            on_end=self._end,
            after=None if previous is None else previous._worker,
        )
        self._worker.start()

    @property
    def takes_steps(self) -> bool:
        """Whether it was neither finished nor found to be abandoned."""
        return self._worker.is_alive

    @property
    def is_over(self) -> bool:
        """Whether its frames are written and its files closed."""
        return not any(worker.is_alive for worker in self._workers)

    @property
    def is_current_thread(self) -> bool:
        """Whether it is one of the run's own threads that asks, and so one of the targets."""
        return any(worker.is_current_thread for worker in self._workers)

    @property
    def _workers(self) -> list[Worker[_Job] | Worker[_Parcel]]:
        return [self._worker, *(outlet.worker for outlet in self._outlets)]

    @property
    def is_complete(self) -> bool:
        """Whether as many callbacks have come as were expected."""
        return self._steps >= self.num_steps

    @property
    def stats(self) -> Stats:
        """What it came to so far."""
        return Stats(
            steps=self._steps,
            frames=self._made,
            skipped=self._skipped_frames,
            dropped=self._passed + sum(outlet.dropped for outlet in self._outlets),
            left_out=self._left_out + sum(outlet.left_out for outlet in self._outlets),
            step_path_s=self._step_path_s,
            drain_s=self._drain_s,
            worker_s=self._worker_s,
            peak_backlog_bytes=sum(room.peak_bytes for room in self._rooms),
            spilled_bytes=self.storage.stored_bytes,
        )

    @property
    def _step_path_s(self) -> float:
        return self.parts.watch.total_s - self._watched_s

    @property
    def _worker_s(self) -> float:
        return sum(worker.busy_s for worker in self._workers)

    # The caller's thread ------------------------------------------------------------------

    def begin_step(self, stage: FrameType | None, index: int, expected: Callable[[], int]) -> None:
        """Count a step in, and the steps that are to come.

        Combined pipelines run in stages, one inner pipeline after the other, and some pipelines
        start over for each part of a long video: each time, more steps are expected.

        Args:
            stage: frame of the innermost pipeline's `__call__`.
            index: the pipeline's own count of its steps.
            expected: says how many steps that pipeline makes; asked when it begins.
        """
        if self._steps == 0 or stage is not self._stage:
            self._stage, self._stage_began = stage, self._steps
            self.num_steps = self._steps + expected()
        elif index < self._stage_index:
            as_before = self._steps - self._stage_began
            self.num_steps = max(self.num_steps, self._steps + as_before)
            self._stage_began = self._steps
        self._stage_index = index
        self._steps += 1
        self.num_steps = max(self.num_steps, self._steps)

    def step(self, step: Step, *, is_last: bool, decodes: bool = False) -> None:
        """Take a step that was counted in: decide, copy what is small, hand over, return.

        Args:
            step: what was seen of it.
            is_last: whether the run ends with it, however many were expected.
            decodes: whether the VAE is to decode it, if there is one, however seldom it does.
        """
        self.shows = step.layout.row.shows
        if self._frames == 0 and self._skipped is None:
            self._first_step_s = step.at_s
            if self.parts.options.initial and step.is_first:
                self._submit_initial(step)
        if is_last or self.is_complete or (self._is_due(step.at_s) and self._affords(step.at_s)):
            self._submit_step(step, decodes=decodes)
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
                self._jobs,
                step_index=self.num_steps - 1,
                source="final",
                elapsed_s=self.parts.clock() - self.started_s,
                eta_s=0.0,
                images=images,
                decoder="pipeline",
            ),
            is_wanted=True,
        )

    def submit_skipped(self) -> None:
        """Show the last step after all: the run ended early, and nobody had said so."""
        if self._skipped is not None:
            self._submit_step(self._skipped)

    def finish(self) -> None:
        """Leave the pipeline as it was found, wait for the frames, close the files."""
        self._release()
        began_s = self.parts.clock()
        self._inbox.end()
        has_finished = finished(self._workers)
        self._drain_s = self.parts.clock() - began_s
        self.parts.watch.leave_out(self._drain_s)
        if not has_finished:
            self.parts.boundary.tell(
                "patience",
                f"preview targets must take frames, got no sign of life for {PATIENCE_S:.0f} s; "
                "the run goes on, and its files are completed in the background",
            )

    def _submit(self, job: _Job, *, is_wanted: bool = False) -> None:
        self._jobs += 1
        if not self._inbox.put(job, is_wanted=is_wanted):
            self._left_out += 1
            _tell_of_no_room(self.parts.boundary)

    def _submit_step(self, step: Step, *, decodes: bool = False) -> None:
        self._skipped = None
        self._last_frame_s = step.at_s
        self._frames += 1
        self._submit(self._job(step, is_decoded=decodes))

    def _is_due(self, now: float) -> bool:
        options = self.parts.options
        too_soon = now - self._last_frame_s < options.min_interval_s
        return self._steps % options.every == 0 and not too_soon

    def _affords(self, now: float) -> bool:
        """Whether one more preview is within the budget; the first one shows what they cost."""
        if self._budget.share is None or self._frames == 0:
            return True
        each_s = (self._spent_s - self._vae_s) / max(1, self._made)
        is_affordable = self._budget.affords(
            spent_s=self._spent_s,
            more_s=each_s * (self._frames - self._made + 1),
            elapsed_s=now - self.started_s,
        )
        self._skipped_frames += not is_affordable
        return is_affordable

    def _affords_vae(self, now: float) -> bool:
        """The same for a full decode, of which the first is taken to last as long as a step."""
        each_s = self._step_s(now) if self._vae_decodes == 0 else self._vae_s / self._vae_decodes
        return self._budget.affords(
            spent_s=self._spent_s, more_s=each_s, elapsed_s=now - self.started_s
        )

    @property
    def _spent_s(self) -> float:
        return self._step_path_s + self._worker_s

    def _submit_initial(self, step: Step) -> None:
        with self.parts.boundary.around("the initial noise"):
            if step.call is None:
                return
            context = self._context(step, step.call.sample)
            values, values_bytes = self._private(step.values)
            self._submit(
                _Job(
                    self._jobs,
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

    def _job(self, step: Step, *, is_decoded: bool) -> _Job:
        options = self.parts.options
        decodes = self._can_decode(step) and (is_decoded or self._is_vae_due(step))
        x0 = None if options.source == "noisy" else self._x0(step, is_wanted_now=decodes)
        noisy = None if x0 is not None and options.source == "denoised" else step.latents
        context = self._context(step, noisy, x0)
        sigma, scale = self._noise_level(step, noisy)
        images = None
        if decodes and not isinstance(x0, _Prediction):
            images = self._full_decode(step, _pictured(noisy, x0, scale), context)
        copied = _Snapshots()
        values, values_bytes = self._private(step.values)
        return _Job(
            self._jobs,
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
            denoised=Snapshot(x0, is_private=True) if isinstance(x0, Tensor) else x0,
            context=copied.of(context),
            noise_scale=scale,
            images=images,
            decoder="" if images is None else VaeDecoder.name,
        )

    def _context(self, step: Step, *shown: Tensor | _Prediction | None) -> Tensor | None:
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
                private[name], size_bytes = self._copy(name, value)
                new_bytes += size_bytes
        return private, new_bytes

    def _copy(self, name: str, tensor: Tensor) -> tuple[Snapshot, int]:
        seen, version, copy = self._copies.get(name, (None, None, None))
        if copy is not None and seen is tensor and version == _version(tensor) is not None:
            return copy, 0
        copy = Snapshot(tensor)
        self._copies[name] = tensor, _version(tensor), copy
        return copy, copy.size_bytes

    def _x0(self, step: Step, *, is_wanted_now: bool) -> Tensor | _Prediction | None:
        """None where there is none, or where the scheduler steps something else than is shown."""
        x0: Tensor | _Prediction | None = None
        if step.parts is not None:
            with self.parts.boundary.around(_X0):
                return _frame_by_frame(step.latents, step.parts)
        if step.call is not None:
            with self.parts.boundary.around(_X0):
                is_later = not is_wanted_now and _is_better_later(step.call)
                x0 = self._prediction(step) if is_later else _x0_of(step)
        if x0 is None or x0.shape == step.latents.shape:
            return x0
        return x0 if self._context(step, x0) is not None else None

    def _prediction(self, step: Step) -> _Prediction:
        assert step.call is not None
        if step.kept is None:
            return _Prediction(step.call, None)
        mask, picture = step.kept
        kept = self._copy("kept mask", mask)[0], self._copy("kept picture", picture)[0]
        return _Prediction(step.call, kept)

    def _noise_level(self, step: Step, noisy: Tensor | None) -> tuple[float | None, float]:
        if step.call is not None:
            with self.parts.boundary.around("reading the noise level"):
                scale = 1.0 if noisy is None else noise_scale(step.call)
                return sigma_after(step.call), scale
        return None, 1.0

    def _can_decode(self, step: Step) -> bool:
        row = step.layout.row
        has_vae = self.parts.vae_decoder is not None and not self._vae_failed
        return has_vae and row.space != "pixels" and row.shows != "audio"

    def _is_vae_due(self, step: Step) -> bool:
        every = self.parts.options.vae_every
        return every is not None and self._frames % every == 0 and self._affords_vae(step.at_s)

    def _full_decode(
        self, step: Step, pictured: Sequence[Tensor], context: Tensor | None
    ) -> NDArray[np.uint8] | None:
        decoder, began_s = self.parts.vae_decoder, self.parts.clock()
        assert decoder is not None
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
        finally:
            self._vae_decodes += 1
            self._vae_s += self.parts.clock() - began_s
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
        return self._step_s(now) * left if now > self.started_s else None

    def _step_s(self, now: float) -> float:
        """Mean duration of the steps; only until there are two with the warm-up in it."""
        if self._steps > 1:
            return (now - self._first_step_s) / (self._steps - 1)
        return now - self.started_s

    def _release(self) -> None:
        self.undo()
        self.call = self._stage = self.calls = None
        self._copies.clear()

    # The worker's thread ------------------------------------------------------------------
    # Here even a BaseException is a failure of a target: Ctrl-C goes to the main thread.

    def _is_abandoned(self) -> bool:
        """Whether the pipeline was left by an exception, so that no callback will end the run."""
        call = self.call
        return call is not None and not is_running(call, self._thread_id)

    def _begin(self) -> None:
        for outlet in self._outlets:
            outlet.start()

    def _end(self) -> None:
        for outlet in self._outlets:
            outlet.end()
        self.storage.let_go()
        self._skipped = None
        self._release()

    def _handle(self, job: _Job) -> None:
        try:
            self._hasten()
            self._show(job)
        except BaseException as error:
            self.parts.boundary.report("making a preview frame", error)

    def _show(self, job: _Job) -> None:
        is_newest = job.number > self._newest_shown
        outlets = [outlet for outlet in self._outlets if is_newest or outlet.newest is None]
        if not is_newest and not job.is_hastened:
            self._passed += len(self._outlets) - len(outlets)
        if outlets:
            self._deliver(job, outlets)

    def _hasten(self) -> None:
        """Show the newest first to those who want only that, where the drawing lags behind."""
        live = [outlet for outlet in self._outlets if outlet.newest is not None]
        if not live:
            return
        self._inbox.look()
        enough = max(outlet.newest or 0 for outlet in live)
        waiting = list(islice(self._inbox.others(), enough))
        if len(waiting) == enough and waiting[0].number > self._newest_shown:
            self._newest_shown, waiting[0].is_hastened = waiting[0].number, True
            self._deliver(waiting[0], live)

    def _deliver(self, job: _Job, outlets: Sequence[_Outlet]) -> None:
        job.parcel = job.parcel or self._made_of(job)
        if job.parcel is not None:
            for outlet in outlets:
                outlet.put(job.parcel)

    def _made_of(self, job: _Job) -> _Parcel | None:
        try:
            frame = self._frame(job)
        except LayoutError as error:
            self.parts.boundary.explain("the layout", error)
        except BaseException as error:
            self.parts.boundary.report("making a preview frame", error)
        else:
            self._made += 1
            if job.images is None:
                # Anew, now that what it was drawn from is freed: where pictures wait by the
                # hundred, each would lie behind a gap as large as that.
                frame = replace(frame, images=frame.images.copy())
            return _Parcel(frame)
        return None

    def _frame(self, job: _Job) -> Frame:
        decoder, latents, source, is_finite = job.decoder, None, job.source, True
        images = job.images.load() if isinstance(job.images, Stored) else job.images
        is_kept = self.parts.options.keep_latents
        learner = None if images is None else self._learner(job)
        if job.layout is not None and (images is None or is_kept or learner is not None):
            noisy, x0, context = _come(job.noisy), self._come_x0(job), _come(job.context)
            if x0 is None and isinstance(job.denoised, _Prediction):
                noisy, source = job.denoised.sample() if noisy is None else noisy, "noisy"
            values = {
                name: value.wait() if isinstance(value, Snapshot) else value
                for name, value in job.values.items()
            }
            if is_kept:
                kept = noisy if x0 is None else x0
                assert kept is not None
                shown = _looked_at(job.layout, kept, context, values)
                latents = shown.latents[: _count(self.parts.options.batch, shown.frames)]
            if images is not None and learner is not None:
                with self.parts.boundary.around("refitting the linear map"):
                    self._learn(
                        learner, job.layout, noisy if x0 is None else x0, context, values, images
                    )
            if images is None:
                pictured = _pictured(noisy, x0, job.noise_scale)
                is_finite = self._check_finite(pictured, job.step_index)
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
            source=source,
            decoder=decoder,
            elapsed_s=job.elapsed_s,
            eta_s=job.eta_s,
            layout="" if job.layout is None else job.layout.name,
            run_index=self.index,
            latents=latents,
            is_finite=is_finite,
            _stop=functools.partial(self.parts.stop, self.index),
        )

    def _learner(self, job: _Job) -> RefitDecoder | None:
        """What a full decode is shown to; a video's are of its first frame, which is no example."""
        is_picture = isinstance(job.images, Stored) or job.images is None or job.images.ndim == 4
        is_decoded = job.decoder == VaeDecoder.name and is_picture
        return self._decoder if is_decoded and isinstance(self._decoder, RefitDecoder) else None

    def _learn(
        self,
        learner: RefitDecoder,
        layout: Layout,
        latents: Tensor | None,
        context: Tensor | None,
        values: Mapping[str, object],
        images: NDArray[np.uint8],
    ) -> None:
        """Show the decoded picture, the denoised one of two, and its latents to the map."""
        if latents is None or images.ndim != 4:
            return
        shown = _looked_at(layout, latents, context, values)
        pictures, frames = _as_pictures(layout.to_drawn(shown.latents, values), shown.frames)
        if frames is None and pictures.is_floating_point():
            width = pictures.shape[-1] * images.shape[1] // pictures.shape[-2]
            learner.learn(pictures[: len(images)], images[:, :, -width:])

    def _come_x0(self, job: _Job) -> Tensor | None:
        if isinstance(job.denoised, _Prediction):
            with self.parts.boundary.around(_X0):
                return job.denoised.wait()
            return None
        return _come(job.denoised)

    def _check_finite(self, pictured: Sequence[Tensor], step_index: int) -> bool:
        is_finite = _are_finite(pictured)
        if not is_finite:
            self.parts.boundary.tell(
                "finite",
                f"latents must be finite, got NaN or infinity after step {step_index + 1}; "
                "such pixels are shown grey, and bfloat16 or float32 may cure it",
            )
        return is_finite

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
_X0 = "the predicted x0 (noisy latents are shown)"


def _is_better_later(call: StepCall) -> bool:
    """Whether x0 is left to the worker: not where a copy costs what the arithmetic does."""
    return call.sample.device.type != "cpu" and has_x0(call.scheduler)


def _x0_of(step: Step) -> Tensor | None:
    x0 = None if step.call is None else predict_x0(step.call)
    return None if x0 is None else _with_kept(x0, step.kept)


def expected_latents(step: Step) -> Tensor | None:
    """What a pipeline can go on with instead of a step's latents: x0, if it is of their kind."""
    x0 = _x0_of(step) if step.parts is None else None
    if x0 is None or x0.shape != step.latents.shape or not x0.isfinite().all():
        return None
    return x0.to(step.latents.dtype)


def _come(copy: Snapshot | None) -> Tensor | None:
    return None if copy is None else copy.wait()


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


def _with_kept(x0: Tensor, kept: tuple[Tensor, Tensor] | None) -> Tensor:
    """x0 where an inpainting run paints, and its picture everywhere else."""
    if kept is None or kept[1].shape[1:] != x0.shape[1:]:
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
    return all(_is_finite(tensor) for tensor in tensors)


def _is_finite(tensor: Tensor) -> bool:
    """A sum tells it a dozen times sooner, where it is finite itself."""
    total = tensor.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(tensor.isfinite().all())


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
        if value.numel() != 1:
            return None
        return value.item() if value.device.type == "cpu" else Snapshot(value)
    return float(value) if isinstance(value, int | float) else None


def _number(value: Snapshot | float | None) -> float | None:
    return float(value.wait()) if isinstance(value, Snapshot) else value
