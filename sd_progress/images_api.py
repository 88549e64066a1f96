"""Owns the OpenAI images API as this service speaks it: what may be asked, and what is answered."""

from __future__ import annotations

import math
import re
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from .guard import Refusal
from .jobs import Event, Job

__all__ = ["ErrorBody", "ImageRequest", "Images", "PartialImages", "RequestLimits", "job_of"]

SIZE: Final = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
_SEEDS: Final = 2**32  # of those that are drawn; JavaScript reads no larger ones than 2**53
_NO_USAGE: Final[Mapping[str, object]] = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for.

    Attributes:
        max_pixels: of one picture.
        unit_px: both sides are multiples of it.
    """

    max_pixels: int = 1024 * 1536  # the largest of OpenAI's own sizes
    max_steps: int = 150
    max_count: int = 4
    max_prompt_chars: int = 4000
    max_partial_images: int = 100
    unit_px: int = 8


class ImageRequest(BaseModel):
    """What to paint. Fields without a note are OpenAI's; the others are this service's own."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Annotated[str, Field(min_length=1, description="What to paint.")]
    model: Annotated[str | None, Field(max_length=256, description="Any; there is one model.")] = (
        None
    )
    n: Annotated[int | None, Field(ge=1, description="How many pictures; 1 if left out.")] = None
    size: Annotated[
        str | None,
        Field(pattern=SIZE, description="WIDTHxHEIGHT in pixels; `auto` is the model's own."),
    ] = None
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None,
        Field(description="Changes nothing; `steps` does."),
    ] = None
    background: Annotated[
        Literal["auto", "opaque"] | None, Field(description="Pictures are opaque.")
    ] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="Changes nothing.")] = (
        None
    )
    style: Annotated[Literal["vivid", "natural"] | None, Field(description="Changes nothing.")] = (
        None
    )
    response_format: Annotated[
        Literal["b64_json"] | None,
        Field(description="Pictures come in the answer; there are no URLs of them."),
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "webp"] | None, Field(description="Of all pictures; png.")
    ] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        int | None,
        Field(ge=0, description="How many previews a stream has, evenly over the run; 0."),
    ] = None
    user: Annotated[str | None, Field(max_length=256, description="Changes nothing.")] = None
    safety_identifier: Annotated[
        str | None, Field(max_length=256, description="Changes nothing.")
    ] = None

    negative_prompt: Annotated[
        str | None, Field(description="Own: what to keep out of the picture.")
    ] = None
    steps: Annotated[int | None, Field(ge=1, description="Own: of the denoising loop.")] = None
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=100, allow_inf_nan=False, description="Own: how strictly to follow."),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**63, description="Own: the same seed is the same picture."),
    ] = None
    stays: Annotated[
        bool | None,
        Field(
            description="Own: the run goes on when the client leaves; of a POST to "
            "`/v1/images/generations`, it is cancelled then."
        ),
    ] = None


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How errors are told, as OpenAI does."""

    error: ErrorDetail


class Image(BaseModel):
    """One picture."""

    b64_json: str


class Images(BaseModel):
    """The pictures of a run. `run_id`, `seed` and `elapsed_s` are this service's own."""

    created: int
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    usage: dict[str, object]
    run_id: str
    seed: int
    elapsed_s: float


def job_of(request: ImageRequest, limits: RequestLimits, *, client: str) -> Job:
    """The job that a request asks for, with an id that nobody guesses.

    A seed is drawn where none was given, so that it can be told.

    Raises:
        Refusal: it asks for more than it may.
    """
    for name in ("prompt", "negative_prompt"):
        _check_most(name, len(getattr(request, name) or ""), limits.max_prompt_chars, "characters")
    _check_most("n", request.n, limits.max_count)
    _check_most("steps", request.steps, limits.max_steps)
    _check_most("partial_images", request.partial_images, limits.max_partial_images)
    width, height = _size(request.size, limits)
    return Job(
        id=str(uuid.uuid4()),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        steps=request.steps,
        guidance=request.guidance_scale,
        seed=secrets.randbelow(_SEEDS) if request.seed is None else request.seed,
        count=request.n or 1,
        image_format=request.output_format or "png",
        client=client,
        stays=bool(request.stays),
    )


def _check_most(name: str, value: int | None, most: int, unit: str = "") -> None:
    if value is not None and value > most:
        what = f"{most} {unit}".strip()
        raise _wrong(name, f"{name} must be at most {what}, got {value}; ask for less")


def _size(text: str | None, limits: RequestLimits) -> tuple[int, int] | tuple[None, None]:
    match = re.fullmatch(r"(\d+)x(\d+)", text or "auto", re.ASCII)
    if match is None:
        return None, None
    width, height = int(match[1]), int(match[2])
    if width * height > limits.max_pixels:
        side_px = math.isqrt(limits.max_pixels) // limits.unit_px * limits.unit_px
        expected = f"size must be at most {limits.max_pixels} pixels"
        raise _wrong("size", f"{expected}, got {text}; for example {side_px}x{side_px}")
    if width % limits.unit_px or height % limits.unit_px:
        expected = f"size must be multiples of {limits.unit_px} pixels"
        near = "x".join(
            str(max(limits.unit_px, side // limits.unit_px * limits.unit_px))
            for side in (width, height)
        )
        raise _wrong("size", f"{expected}, got {text}; for example {near}")
    return width, height


def _wrong(param: str, message: str) -> Refusal:
    return Refusal(400, message, param=param, code="invalid_value")


# Answers


def images_of(job: Job, event: Event) -> Images:
    """The answer to a request without `stream`, from a run's `completed`."""
    return Images(
        created=int(time.time()),
        data=[Image(b64_json=text) for text in _texts(event)],
        output_format=job.image_format,
        size=_size_of(event),
        usage=dict(_NO_USAGE),
        run_id=job.id,
        seed=cast(int, job.seed),
        elapsed_s=cast(float, event.data["elapsed_s"]),
    )


def refusal_of(event: Event) -> Refusal:
    """What a client is told of a run that did not complete."""
    if event.name == "cancelled":
        return Refusal(409, "the run was cancelled; ask again", code="cancelled")
    message = str(event.data.get("message", "the run failed"))
    if event.data.get("is_client_error"):
        param = message.partition(" ")[0]
        return Refusal(400, message, param=_PARAMS.get(param), code="invalid_value")
    return Refusal(500, message, code="run_failed")


_PARAMS: Final = {
    "steps": "steps",
    "size": "size",
    "negative_prompt": "negative_prompt",
    "guidance": "guidance_scale",
    "count": "n",
}


class PartialImages:
    """A run's events as those of the OpenAI images API.

    Args:
        count: how many previews to pass on at most, evenly over the run: the first one at or after
            1/(count + 1) of the steps, and so on. Of a run in few steps there are fewer.
    """

    def __init__(self, job: Job, count: int) -> None:
        self._job = job
        self._count = count
        self._sent = 0
        self._passed = 0

    def of(self, event: Event) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Names and data of what an event becomes: nothing, one, or one for each picture."""
        if event.name == "preview" and self._is_due(cast(float, event.data["progress"])):
            more = {name: event.data[name] for name in _PREVIEW_EXTENSIONS}
            more["partial_image_index"] = self._sent
            text = cast(str, event.data["b64_json"])
            yield self._event("partial_image", text, _size_of(event), more)
            self._sent += 1
        elif event.name == "completed":
            for index, text in enumerate(_texts(event)):
                usage = {"usage": _NO_USAGE, "image_index": index}
                yield self._event("completed", text, _size_of(event), usage)
        elif event.is_last:
            yield "error", refusal_of(event).body()

    def _is_due(self, progress: float) -> bool:
        passed = min(self._count, math.floor(progress * (self._count + 1) + 1e-9))
        is_due, self._passed = passed > self._passed, max(passed, self._passed)
        return is_due

    def _event(
        self, name: str, b64_json: str, size: str, more: Mapping[str, object]
    ) -> tuple[str, Mapping[str, object]]:
        kind = f"image_generation.{name}"
        return kind, {
            "type": kind,
            "b64_json": b64_json,
            "created_at": int(time.time()),
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._job.image_format,
            **more,
            "run_id": self._job.id,
            "seed": self._job.seed,
        }


_PREVIEW_EXTENSIONS: Final = ("progress", "step_index", "num_steps", "elapsed_s", "eta_s")


def _texts(event: Event) -> Sequence[str]:
    return cast("Sequence[str]", event.data["images"])


def _size_of(event: Event) -> str:
    return f"{event.data['width']}x{event.data['height']}"
