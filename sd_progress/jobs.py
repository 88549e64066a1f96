"""Owns what travels between those who ask for pictures and those who paint them: jobs and events.

The web side (`Hub`, asynchronous) and the painting side (`Bench`, one call after the other, in a
thread of its own) meet in one process or through Redis; neither knows which.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

EventName = Literal["queued", "phase", "preview", "completed", "failed", "cancelled"]
ImageFormat = Literal["png", "jpeg", "webp"]

LAST_EVENTS: Final = frozenset({"completed", "failed", "cancelled"})
"""One of these is the last event of every run."""

BEGINNING: Final = "0-0"
"""Comes before the id of every event. Ids are those of Redis streams: `milliseconds-sequence`."""


@dataclass(frozen=True)
class Job:
    """One picture, or several of one prompt, to be painted.

    Attributes:
        id: of the run; letters, digits and dashes.
        prompt: what to paint.
        width, height: in pixels; None leaves them to the model.
        steps: None leaves it to the model.
        guidance: likewise.
        count: how many pictures.
        image_format: of the pictures in events.
        client: who asked; for limits of each client's runs.
        stays: whether the run goes on when nobody watches it.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    count: int = 1
    image_format: ImageFormat = "png"
    client: str = ""
    stays: bool = False


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        name: `queued`: `{position}`, runs before it. `phase`: `{name, elapsed_s, eta_s}`, as
            `sd_progress.Phase`. `preview`: `{b64_json, format, width, height, step_index,
            num_steps, progress, elapsed_s, eta_s, source, decoder}`, as `Frame`. `completed`:
            `{images: [b64_json, ...], format, width, height, elapsed_s, is_whole}`; `is_whole` is
            false where the run was stopped early. `failed`: `{message, is_client_error}`; the
            latter is true where the job asks what the model cannot do, and may be left out.
            `cancelled`: `{}`.
        data: what JSON can hold.
        id: where in the run's stream it stands; "" until it is there.
    """

    name: EventName
    data: Mapping[str, object] = field(default_factory=dict)
    id: str = ""

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.name in LAST_EVENTS


class QueueFullError(RuntimeError):
    """There are as many jobs waiting, of all clients or of this one, as may wait."""


class UnknownRunError(LookupError):
    """There is no run of this id, or it is over and forgotten."""


class HubAwayError(ConnectionError):
    """What is between those who ask and those who paint cannot be reached; it may come back."""


class Hub(Protocol):
    """The web side: jobs go in, events come out. Coroutines of one event loop.

    Where the two sides are apart, everything may raise `HubAwayError`.
    """

    async def submit(self, job: Job) -> None:
        """Have it painted.

        Raises:
            QueueFullError: too many are waiting.
        """

    def events(self, run_id: str, after: str = BEGINNING) -> AsyncIterator[Event]:
        """The run's events behind that id, as they happen, up to its last.

        Raises:
            UnknownRunError: there is no such run.
        """

    async def cancel(self, run_id: str) -> None:
        """Have it end soon, whether it has begun or not; again, or when it is over, does nothing.

        Raises:
            UnknownRunError: there is no such run.
        """

    async def load(self) -> Load:
        """How much there is to do."""

    async def aclose(self) -> None:
        """Let go of everything; who iterates over events gets no more."""


@dataclass(frozen=True)
class Load:
    """How much there is to do.

    Attributes:
        waiting: jobs that nobody paints yet.
        running: jobs that are being painted.
        workers: that are alive; None where nobody counts them.
    """

    waiting: int
    running: int
    workers: int | None = None


class Bench(Protocol):
    """The painting side: one job after the other, events go out. Called from one thread."""

    def claim(self, timeout_s: float) -> Job | None:
        """The next job, which is then nobody else's; None if there is none in time."""

    def publish(self, job: Job, event: Event) -> bool:
        """Add an event to the job's run; whether it is still this painter's, and not cancelled.

        After False the painter stops, and publishes `cancelled` (which is ignored of a job that is
        not its own any more). The last event gives the job back as done.
        """

    def keep(self, job: Job) -> bool:
        """Say that it is still being painted, where no event did for a while; returned as above."""

    def close(self) -> None:
        """Nothing more will be claimed."""
