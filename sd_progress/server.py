"""Owns the web service: routes from requests to a hub, and from its events to answers.

Who may ask, and how much, is decided before (`guard`); what the OpenAI images API looks like is in
`images_api`. Jobs are painted elsewhere, by whoever has the other end of the hub.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Final, cast

try:
    from fastapi import FastAPI, Header, Path, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from pydantic import BaseModel
    from sse_starlette import EventSourceResponse
    from starlette.exceptions import HTTPException

    from .metrics import CONTENT_TYPE, Metrics
except ModuleNotFoundError as missing:
    expected = f"{missing.name} must be installed to serve, got none"
    advice = 'pip install "sd-progress[server]"'
    raise ModuleNotFoundError(f"{expected}; {advice}", name=missing.name) from missing

from .guard import Guard, Refusal
from .images_api import (
    ErrorBody,
    ImageRequest,
    Images,
    PartialImages,
    RequestLimits,
    images_of,
    job_of,
    refusal_of,
)
from .jobs import BEGINNING, Event, Hub, HubAwayError, Job, Load, QueueFullError, UnknownRunError
from .local import position_of

__all__ = ["Settings", "create_app"]

RUN_ID: Final = r"^[A-Za-z0-9-]{1,64}$"
_PEEK_S: Final = 0.5  # how long a viewer's answer may wait for what it will be
_PING_S: Final = 15
_RETRY_AFTER_S: Final = 2
_KEPT_TEXTS: Final = 64  # encoded events: many viewers of a run want the same at the same time
_LOST: Final = (HubAwayError, UnknownRunError)  # in the middle of a run
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Who may ask, and for how much.

    Attributes:
        token: what clients must send as `Authorization: Bearer`; None lets in everyone who reaches
            the address.
        hosts: names that requests may be for besides this machine's; None is any.
        limits: of one request.
        max_body_bytes: of one request.
        body_timeout_s: until a request must be here.
        max_viewers: connections that events are sent to.
        send_timeout_s: until a viewer that takes nothing is let go.
    """

    token: str | None = None
    hosts: frozenset[str] | None = frozenset()
    limits: RequestLimits = field(default_factory=RequestLimits)
    max_body_bytes: int = 64 * 2**10
    body_timeout_s: float = 10.0
    max_viewers: int = 1000
    send_timeout_s: float = 30.0


class Begun(BaseModel):
    """A run that was asked for and that nobody need wait for."""

    id: str
    events: str
    seed: int


def create_app(hub: Hub, settings: Settings | None = None) -> FastAPI:
    """The service, for any ASGI server; `app.state.service.aclose()` ends what is open.

    Args:
        hub: where jobs go and events come from; closed with the application.
        settings: None lets in everyone who is on this machine.
    """
    settings = settings or Settings()
    service = Service(hub, settings)
    app = FastAPI(
        title="sd-progress",
        description="Pictures as they form: the OpenAI images API with partial images, and more.",
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        lifespan=service.lifespan,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.service = service
    app.add_middleware(
        Guard,
        token=settings.token,
        hosts=settings.hosts,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HubAwayError, _refused)
    _add_runs(app, service)
    _add_rest(app, service)
    return app


RunId = Annotated[str, Path(pattern=RUN_ID, description="From the header `X-Run-Id`, or events.")]


def _add_runs(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/images/generations",
        response_model=Images,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def generate(body: ImageRequest, request: Request) -> Response:
        """As the OpenAI images API; with `stream`, as its server-sent events."""
        job = await service.submit(body, request)
        headers = {"x-run-id": job.id, "x-request-id": job.id}
        if body.stream:
            return service.stream(service.partial(job, body.partial_images or 0), headers)
        return await service.whole(job, request, headers)

    @app.post("/v1/runs", status_code=202, response_model=Begun)
    async def begin(body: ImageRequest, request: Request) -> Begun:
        """The same, without waiting; it goes on whoever leaves."""
        job = await service.submit(body.model_copy(update={"stays": True}), request)
        events = f"/v1/runs/{job.id}/events"
        return Begun(id=job.id, events=events, seed=cast(int, job.seed))

    @app.get(
        "/v1/runs/{run_id}/events",
        response_class=EventSourceResponse,
        responses={204: {"description": "There are no more."}},
    )
    async def events(
        run_id: RunId,
        after: Annotated[str | None, Query(description="As the header `Last-Event-ID`.")] = None,
        last_event_id: Annotated[str | None, Header(description="Only what came after.")] = None,
    ) -> Response:
        """A run's own events, as they happen, from its beginning on or from where one was."""
        return await service.view(run_id, last_event_id or after or BEGINNING)

    @app.delete("/v1/runs/{run_id}", status_code=204, response_class=Response)
    async def cancel(run_id: RunId) -> None:
        """Have it end soon; again, or when it is over, does nothing."""
        await service.cancel(run_id)


def _add_rest(app: FastAPI, service: Service) -> None:
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether jobs can be taken."""
        await service.load()
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        text = service.metrics.text(await service.load())
        return Response(text, media_type=CONTENT_TYPE)


class Service:
    """What the routes have in common: one hub, and what is going on with it.

    Attributes:
        metrics: what is counted.
    """

    def __init__(self, hub: Hub, settings: Settings) -> None:
        self.metrics = Metrics()
        self._hub, self._settings = hub, settings
        self._texts = _Texts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_viewers = 0
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """As long as the application is served."""
        try:
            yield
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End what is open, so that nobody waits for it; again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await self._hub.aclose()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # Runs ---------------------------------------------------------------------------------

    async def submit(self, body: ImageRequest, request: Request) -> Job:
        """Have something painted.

        Raises:
            Refusal: it asks for too much, or too many wait already.
        """
        client = "" if request.client is None else request.client.host
        job = job_of(body, self._settings.limits, client=client)
        try:
            await self._hub.submit(job)
        except QueueFullError as error:
            self.metrics.runs.labels("refused").inc()
            headers = {"retry-after": str(_RETRY_AFTER_S)}
            code = "rate_limit_exceeded"
            raise Refusal(429, str(error), code=code, headers=headers) from error
        self._soon(self._count(job))
        return job

    async def whole(self, job: Job, request: Request, headers: Mapping[str, str]) -> Response:
        """The answer when the run is over; if the client leaves before, so does the run.

        Raises:
            Refusal: it did not complete.
        """
        ending = asyncio.ensure_future(self._last_of(job))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait([ending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                return Response(status_code=499)  # which nobody reads any more
            event = ending.result()
            if event.name != "completed":
                raise refusal_of(event)
            return JSONResponse(images_of(job, event).model_dump(), headers=dict(headers))
        finally:
            if not ending.done():
                self._abandon(job)
            ending.cancel()
            leaving.cancel()

    async def partial(self, job: Job, count: int) -> AsyncGenerator[bytes, None]:
        """The run as the OpenAI images API streams it; if the client leaves, so does the run."""
        partial, is_over = PartialImages(job, count), False
        with self._viewer():
            try:
                with contextlib.suppress(*_LOST):
                    async with _closing(self._hub.events(job.id)) as events:
                        async for event in events:
                            is_over = event.is_last
                            for name, data in partial.of(event):
                                yield self._sent(_text(name, data, event.id))
                if not is_over:
                    yield self._sent(_text("error", _stopping().body(), ""))
            finally:
                if not is_over:
                    self._abandon(job)

    async def cancel(self, run_id: str) -> None:
        """Have a run end soon.

        Raises:
            Refusal: there is none.
        """
        try:
            await self._hub.cancel(run_id)
        except UnknownRunError as error:
            raise _unknown(run_id) from error

    # Viewers ------------------------------------------------------------------------------

    async def view(self, run_id: str, after: str) -> Response:
        """A run's events behind that id, for one viewer.

        Raises:
            Refusal: there is no such run, `after` is no id, or there are too many viewers.
        """
        _check_position(after)
        if self._num_viewers >= self._settings.max_viewers:
            expected = f"viewers must be below {self._settings.max_viewers}, got as many"
            headers = {"retry-after": str(_RETRY_AFTER_S)}
            raise Refusal(429, f"{expected}; come again", code="too_many_viewers", headers=headers)
        events = _Peeked(self._hub.events(run_id, after))
        try:
            is_empty = await events.is_empty(_PEEK_S)
        except UnknownRunError as error:
            raise _unknown(run_id) from error
        if is_empty:
            return Response(status_code=204)  # which tells an EventSource not to come again
        return self.stream(self._viewed(run_id, events), {"x-run-id": run_id})

    def stream(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> Response:
        """An answer that goes on as long as there are events."""
        timeout_s = self._settings.send_timeout_s
        return EventSourceResponse(
            events, headers=headers, ping=_PING_S, sep="\n", send_timeout=timeout_s
        )

    async def _viewed(self, run_id: str, events: _Peeked) -> AsyncGenerator[bytes, None]:
        with self._viewer(), contextlib.suppress(*_LOST):  # who comes again is told
            async with _closing(events.all()) as rest:
                async for event in rest:
                    yield self._sent(self._texts.of(run_id, event))

    @contextlib.contextmanager
    def _viewer(self) -> Iterator[None]:
        self._num_viewers += 1
        self.metrics.viewers.set(self._num_viewers)
        try:
            yield
        finally:
            self._num_viewers -= 1
            self.metrics.viewers.set(self._num_viewers)

    # What is counted ----------------------------------------------------------------------

    async def load(self) -> Load:
        """How much there is to do."""
        return await self._hub.load()

    async def _count(self, job: Job) -> None:
        """Follow a run to its end, whoever else does."""
        began_s, outcome, has_preview = time.monotonic(), "lost", False
        try:
            async with _closing(self._hub.events(job.id)) as events:
                async for event in events:
                    if event.name == "preview":
                        self.metrics.previews.inc()
                        if not has_preview:
                            self.metrics.first_preview.observe(time.monotonic() - began_s)
                        has_preview = True
                    elif event.is_last:
                        outcome = event.name
        finally:
            self.metrics.runs.labels(outcome).inc()
        if outcome == "completed":
            self.metrics.run_seconds.observe(time.monotonic() - began_s)

    def _sent(self, text: bytes) -> bytes:
        self.metrics.sent.inc()
        return text

    # Within -------------------------------------------------------------------------------

    async def _last_of(self, job: Job) -> Event:
        with contextlib.suppress(UnknownRunError):  # it is lost
            async with _closing(self._hub.events(job.id)) as events:
                async for event in events:
                    if event.is_last:
                        return event
        raise _stopping()

    def _abandon(self, job: Job) -> None:
        """The client left; from where nothing can be awaited any more."""
        if not job.stays and not self._is_closed:
            self._soon(self._cancelled(job))

    async def _cancelled(self, job: Job) -> None:
        with contextlib.suppress(UnknownRunError):  # it is over, and forgotten
            await self._hub.cancel(job.id)

    def _soon(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a run was lost sight of", exc_info=task.exception())


class _Peeked:
    """A run's events, of which the first may be awaited before it is known what to answer."""

    def __init__(self, events: AsyncIterator[Event]) -> None:
        self._events = events
        self._first = asyncio.ensure_future(_next(events))

    async def is_empty(self, timeout_s: float) -> bool:
        """Whether it is known that there are none."""
        await asyncio.wait([self._first], timeout=timeout_s)
        return self._first.done() and self._first.result() is None

    async def all(self) -> AsyncGenerator[Event, None]:
        """All of them."""
        try:
            first = await self._first
            if first is not None:
                yield first
            async for event in self._events:
                yield event
        finally:
            self._first.cancel()
            if isinstance(self._events, AsyncGenerator) and self._first.done():
                await self._events.aclose()


class _Texts:
    """The newest events as they are sent, made once for all who view the same run."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def of(self, run_id: str, event: Event) -> bytes:
        """As `_text`."""
        key = (run_id, event.id)
        if key not in self._kept:
            self._kept[key] = _text(event.name, event.data, event.id)
            if len(self._kept) > _KEPT_TEXTS:
                self._kept.popitem(last=False)
        return self._kept[key]


def _text(name: str, data: Mapping[str, object], event_id: str) -> bytes:
    """A server-sent event."""
    number = f"id: {event_id}\n" if event_id else ""
    return f"event: {name}\n{number}data: {json.dumps(data)}\n\n".encode()


@contextlib.asynccontextmanager
async def _closing(events: AsyncIterator[Event]) -> AsyncIterator[AsyncIterator[Event]]:
    """A generator that is left is closed at once, and not some day."""
    try:
        yield events
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


async def _left(request: Request) -> None:
    """Until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_position(after: str) -> None:
    try:
        position_of(after)
    except ValueError as error:
        raise Refusal(400, str(error), param="after", code="invalid_value") from error


def _stopping() -> Refusal:
    return Refusal(503, "the service must be running, got one that stops; ask again")


def _unknown(run_id: str) -> Refusal:
    expected = "run_id must be that of a run that is not forgotten"
    return Refusal(404, f"{expected}, got {run_id!r}; ask for a new one", code="unknown_run")


async def _refused(request: Request, error: Exception) -> Response:
    """Whatever went wrong with a request, in the one shape of errors."""
    if isinstance(error, Refusal):
        return error.response()
    if isinstance(error, HubAwayError):
        return Refusal(503, str(error), headers={"retry-after": str(_RETRY_AFTER_S)}).response()
    if isinstance(error, RequestValidationError):
        return _invalid(error).response()
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        return Refusal(error.status_code, message[:300], headers=error.headers).response()
    raise error


def _invalid(error: RequestValidationError) -> Refusal:
    """The first of what is wrong with the fields."""
    first = error.errors()[0]
    place, *names = map(str, first["loc"])
    name = ".".join(names)[:80]
    if place == "path":
        return _unknown("another")
    if first["type"] == "json_invalid":
        return Refusal(400, "the body must be JSON, got something else; see /openapi.json")
    if first["type"] == "extra_forbidden":
        message = f"{name} must be left out, got a value; this service does not know it"
        return Refusal(400, message, param=name, code="unknown_parameter")
    if first["type"] == "missing":
        message = f"{name or 'the body'} must be there, got none; see /openapi.json"
        return Refusal(400, message, param=name or None, code="missing_required_parameter")
    message = f"{name or 'the body'} must be valid, got an error: {first['msg']}; see /openapi.json"
    return Refusal(400, message, param=name or None, code="invalid_value")


def _page() -> tuple[str, str]:
    """The page, and the policy that lets its own style and script run, and nothing else."""
    text = resources.files("sd_progress").joinpath("data/page.html").read_text("utf-8")
    policy = (
        "default-src 'none'",
        f"script-src {_hash_of('script', text)}",
        f"style-src {_hash_of('style', text)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return text, "; ".join(policy)


def _hash_of(tag: str, text: str) -> str:
    match = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(match[1].encode() if match else b"").digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
