"""Owns the painting of jobs: a loaded pipeline takes one after the other, and events go out.

Knows nothing of the web, nor of where the jobs come from. A run that fails ends as `failed`, and
the next one begins.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Final, cast

from diffusers import DiffusionPipeline
from PIL import Image

from ._resize import resized
from .arguments import UsageError
from .demo import DEMO_GUIDANCE, demo_model_path
from .frame import Frame
from .generate import arguments_for, load_pipeline
from .jobs import Bench, Event, EventName, ImageFormat, Job
from .streaming import Phase, astream

__all__ = ["Painter", "load_painter"]

PREVIEW_SIDE_PX: Final = 256  # enough to see; browsers enlarge it without a seam
CLAIM_S: Final = 0.5  # how often an idle painter looks whether it shall stop
KEEP_S: Final = 0.5  # between signs of life, and how late a cancelled run is noticed
DEMO_STEPS: Final = 20

_SAVING: Final[Mapping[ImageFormat, Mapping[str, object]]] = {
    "png": {},
    "jpeg": {"quality": 92, "subsampling": 0},
    "webp": {"quality": 90},
}
_SAVING_PREVIEWS: Final[Mapping[ImageFormat, Mapping[str, object]]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 85},
    "webp": {"quality": 80, "method": 2},
}
_log = logging.getLogger(__name__)


def load_painter(model: str | None = None, *, device: str = "auto", dtype: str = "auto") -> Painter:
    """A painter with its model loaded; None is the demo model, and what suits it.

    Raises:
        UsageError: there is no such model or device, or it paints nothing of a prompt.
    """
    pipe = load_pipeline(model or str(demo_model_path()), device, dtype)
    arguments_for(pipe, prompt="")  # raises where it is of another kind
    pipe.set_progress_bar_config(disable=True)
    return Painter(pipe) if model else Painter(pipe, steps=DEMO_STEPS, guidance=DEMO_GUIDANCE)


class Painter:
    """A pipeline that paints jobs, one at a time.

    Args:
        pipe: is nobody else's as long as this works.
        steps, guidance: where a job leaves them open; None leaves them to the model.
        preview_side_px: previews are smoothly enlarged until their shorter side has this many
            pixels.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        preview_side_px: int = PREVIEW_SIDE_PX,
    ) -> None:
        self._pipe = pipe
        self._steps, self._guidance = steps, guidance
        self._preview_side_px = preview_side_px

    def work(self, bench: Bench, stop: threading.Event) -> None:
        """Paint whatever there is, until told to stop; what is begun is brought to its end.

        To leave a run early, have the bench's `publish` and `keep` return False.
        """
        while not stop.is_set():
            job = bench.claim(CLAIM_S)
            if job is not None:
                self.paint(bench, job)

    def paint(self, bench: Bench, job: Job) -> None:
        """One job, to its last event. Raises only what the bench raises."""
        easel = _Easel(bench, job, self._preview_side_px)
        try:
            arguments = self._arguments(job)
        except UsageError as error:
            bench.publish(job, _failed(str(error).removeprefix("--"), is_client_error=True))
        except Exception as error:  # of what cannot even be passed on
            easel.fail(error)
        else:
            asyncio.run(self._painted(easel, arguments))

    def _arguments(self, job: Job) -> dict[str, object]:
        size = None if job.width is None or job.height is None else (job.width, job.height)
        return arguments_for(
            self._pipe,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            steps=self._steps if job.steps is None else job.steps,
            size=size,
            guidance=self._guidance if job.guidance is None else job.guidance,
            seed=job.seed,
            count=job.count,
        )

    async def _painted(self, easel: _Easel, arguments: dict[str, object]) -> None:
        """In an event loop of its own, because the pipeline's silent parts must not block it."""
        begin = cast("Callable[..., AsyncGenerator[Frame, None]]", astream)  # of any pipeline's
        try:
            frames = begin(self._pipe, on_phase=easel.enter, **arguments)
        except Exception as error:
            easel.fail(error)
            return
        async with aclosing(frames):
            try:
                await easel.show(frames)
            except _NotWantedError:
                easel.publish("cancelled")  # at once; the pipeline ends at its next step
            except Exception as error:  # whatever a pipeline raises
                easel.fail(error)
            finally:
                await easel.leave()


class _NotWantedError(Exception):
    """The job was cancelled, or is somebody else's now."""


class _Easel:
    """One job as it is painted: what becomes of its phases and frames."""

    def __init__(self, bench: Bench, job: Job, preview_side_px: int) -> None:
        self.job = job
        self._bench = bench
        self._preview_side_px = preview_side_px
        self._began_s = time.monotonic()
        self._is_wanted = True
        self._coming: asyncio.Future[Frame | None] | None = None

    async def show(self, frames: AsyncGenerator[Frame, None]) -> None:
        """Publish all frames; give signs of life where none comes.

        Raises:
            _NotWantedError: nobody wants them any more.
        """
        last = None
        while (frame := await self._next(frames)) is not None:
            last = frame
            if frame.source != "final":
                self.publish("preview", self._preview(frame))
        if last is None or last.source != "final":
            raise RuntimeError("pipe must return a picture, got none; choose another model")
        self.publish("completed", self._completed(last))

    def enter(self, phase: Phase) -> None:
        """The pipeline is in another phase now."""
        self.publish("phase", asdict(phase))

    async def leave(self) -> None:
        """Wait until the pipeline can be used again."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)

    def fail(self, error: Exception) -> None:
        """Say no more of it than its kind: messages can tell of folders and of other people."""
        _log.error("run %s failed", self.job.id, exc_info=error)
        kind = type(error).__name__
        self._bench.publish(self.job, _failed(f"the model failed with {kind}; its log tells why"))

    def publish(self, name: EventName, data: Mapping[str, object] | None = None) -> None:
        """Add an event."""
        is_wanted = self._bench.publish(self.job, Event(name, data or {}))
        self._is_wanted = self._is_wanted and is_wanted

    async def _next(self, frames: AsyncGenerator[Frame, None]) -> Frame | None:
        self._coming = coming = asyncio.ensure_future(anext(frames, None))
        while self._is_wanted and not coming.done():
            await asyncio.wait([coming], timeout=KEEP_S)
            if not coming.done():
                self._is_wanted = self._is_wanted and self._bench.keep(self.job)
        if not self._is_wanted:
            raise _NotWantedError
        return coming.result()

    def _preview(self, frame: Frame) -> dict[str, object]:
        picture = _enlarged(frame.image, self._preview_side_px)
        return {
            "b64_json": _base64(picture, self.job.image_format, _SAVING_PREVIEWS),
            "format": self.job.image_format,
            "width": picture.width,
            "height": picture.height,
            "step_index": frame.step_index,
            "num_steps": frame.num_steps,
            "progress": frame.progress,
            "elapsed_s": frame.elapsed_s,
            "eta_s": frame.eta_s,
            "source": frame.source,
            "decoder": frame.decoder,
        }

    def _completed(self, frame: Frame) -> dict[str, object]:
        pictures = _pictures(frame)
        return {
            "images": [_base64(one, self.job.image_format, _SAVING) for one in pictures],
            "format": self.job.image_format,
            "width": pictures[0].width,
            "height": pictures[0].height,
            "elapsed_s": time.monotonic() - self._began_s,
            "is_whole": frame.output is not None,
        }


def _failed(message: str, *, is_client_error: bool = False) -> Event:
    return Event("failed", {"message": message, "is_client_error": is_client_error})


def _pictures(frame: Frame) -> Sequence[Image.Image]:
    """Each picture of its own, in full size; of a clip, the frame in its middle."""
    images = frame.images[:, frame.images.shape[1] // 2] if frame.is_video else frame.images
    return [Image.fromarray(pixels) for pixels in images]


def _enlarged(picture: Image.Image, side_px: int) -> Image.Image:
    scale = side_px / min(picture.size)
    if scale <= 1:
        return picture
    size = round(picture.width * scale), round(picture.height * scale)
    return resized(picture, size)


def _base64(
    picture: Image.Image,
    image_format: ImageFormat,
    options: Mapping[ImageFormat, Mapping[str, object]],
) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options[image_format])
    return base64.b64encode(buffer.getvalue()).decode("ascii")
