"""Owns how jobs, events and frames are written down in Redis: keys, entries, connections."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

from .jobs import Event, EventName, Job

try:
    import redis
    from redis import exceptions as errors
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio import Redis as AsyncRedis
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import ExponentialBackoff
    from redis.retry import Retry
except ModuleNotFoundError as error:
    expected = "redis must be installed to reach a Redis server, got none"
    raise ModuleNotFoundError(f'{expected}; pip install "sd-progress[redis]"') from error

__all__ = [
    "AWAY",
    "GROUP",
    "OVER",
    "Entry",
    "Fields",
    "Keys",
    "connected",
    "connected_async",
    "entry_fields",
    "errors",
    "event_fields",
    "event_of",
    "is_away",
    "job_fields",
    "job_of",
    "order",
    "without_secrets",
]

Entry = tuple[bytes, dict[bytes, bytes]]
Fields = dict[str, str | bytes]

GROUP: Final = "workers"
OVER: Final = b"over"
AWAY: Final = (errors.ConnectionError, errors.TimeoutError)
"""What is raised while there is no server to talk to; `is_away` knows the exceptions."""

_SCHEMES: Final = ("redis", "rediss", "unix")
_JOB_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(Job))
_TIMEOUT_S: Final = 5.0
_CONNECT_S: Final = 2.0


@dataclass(frozen=True)
class Keys:
    """Where everything is.

    What is in braces decides on which node of a cluster a key is: the keys of a run are together,
    runs are spread, and all that is about waiting is together.
    """

    prefix: str

    def __post_init__(self) -> None:
        """Check the prefix."""
        if not re.fullmatch(r"[\w.:-]+", self.prefix):
            expected = "prefix must be letters, digits and any of _ . : -"
            raise ValueError(f"{expected}, got {self.prefix!r}; for example 'sd-progress'")

    @property
    def jobs(self) -> str:
        """Stream of the jobs that are waiting or being painted."""
        return f"{{{self.prefix}}}:jobs"

    @property
    def tickets(self) -> str:
        """How many jobs there ever were; who adds one watches it."""
        return f"{{{self.prefix}}}:tickets"

    def unfinished(self, client: str) -> str:
        """Set of the client's runs that are not over."""
        return f"{{{self.prefix}}}:unfinished:{client}"

    def run(self, run_id: str) -> str:
        """Hash of what is known of a run: client, entry, attempt, strikes, cancelled, state."""
        return f"{self.prefix}:{{{run_id}}}:run"

    def events(self, run_id: str) -> str:
        """Stream of the run's events."""
        return f"{self.prefix}:{{{run_id}}}:events"

    def watched(self, run_id: str) -> str:
        """There as long as somebody watches the run."""
        return f"{self.prefix}:{{{run_id}}}:watched"


# Entries


def job_fields(job: Job) -> Fields:
    """The fields of a job's entry."""
    return {"job": json.dumps(dataclasses.asdict(job))}


def job_of(fields: Mapping[bytes, bytes]) -> Job:
    """The job of an entry; what a newer version added to it is left out."""
    found = json.loads(fields[b"job"])
    return Job(**{name: value for name, value in found.items() if name in _JOB_FIELDS})


def event_fields(event: Event) -> Fields:
    """The fields of an event's entry: name, data as JSON, and pictures as they are.

    Base64 would be a third larger, in Redis and on every wire.
    """
    data = dict(event.data)
    pictures: dict[str, str] = {}
    if "b64_json" in data:
        pictures["picture"] = cast(str, data.pop("b64_json"))
    for index, picture in enumerate(cast(list[str], data.pop("images", []))):
        pictures[f"picture.{index}"] = picture
    raw = {name: base64.b64decode(text, validate=True) for name, text in pictures.items()}
    return entry_fields(event.name, data, raw)


def entry_fields(name: str, data: Mapping[str, object], pictures: Mapping[str, bytes]) -> Fields:
    """The fields of any entry."""
    return {"name": name, "data": json.dumps(data), **pictures}


def event_of(entry: Entry) -> Event:
    """The event of an entry."""
    entry_id, fields = entry
    data = json.loads(fields[b"data"])
    name = cast(EventName, fields[b"name"].decode())
    if b"picture" in fields:
        data["b64_json"] = _base64(fields[b"picture"])
    if name == "completed":
        count = sum(field.startswith(b"picture.") for field in fields)
        data["images"] = [_base64(fields[b"picture.%d" % index]) for index in range(count)]
    return Event(name, data, entry_id.decode())


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")


def order(event_id: str) -> tuple[int, int]:
    """To compare the ids of events.

    Raises:
        ValueError: it is no id.
    """
    match = re.fullmatch(r"(\d{1,20})-(\d{1,20})", event_id)
    if match is None:
        expected = "after must be the id of an event, milliseconds-sequence"
        raise ValueError(f"{expected}, got {event_id!r}; pass one that came with an event")
    return int(match[1]), int(match[2])


# Connections


def connected(
    url: str, *, timeout_s: float = _TIMEOUT_S, retries: int = 3, name: str | None = None
) -> redis.Redis:
    """A client for one thread after the other; nothing is connected yet."""
    return redis.Redis.from_url(
        checked_url(url),
        protocol=2,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, _CONNECT_S),
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries),
        client_name=name,
    )


def connected_async(url: str, *, max_connections: int) -> AsyncRedis:
    """A client for coroutines; who needs a connection while all are taken waits for one."""
    pool = BlockingConnectionPool.from_url(
        checked_url(url),
        protocol=2,
        max_connections=max_connections,
        timeout=_TIMEOUT_S,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_S,
        retry=AsyncRetry(ExponentialBackoff(cap=0.5, base=0.05), 3),
    )
    return AsyncRedis.from_pool(pool)


def checked_url(url: str) -> str:
    """The URL, if it is one of Redis.

    Raises:
        ValueError: it is none.
    """
    if urlsplit(url).scheme not in _SCHEMES:
        expected = "url must begin with redis://, rediss:// (TLS) or unix://"
        raise ValueError(f"{expected}, got {without_secrets(url)!r}; see docs/scaling.md")
    return url


def without_secrets(url: str) -> str:
    """The URL as it may be printed."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else parts.path


def is_away(error: Exception) -> bool:
    """Whether it may go away by itself: no server, one that is loading, full or taken over."""
    if isinstance(error, errors.AuthenticationError):
        return False
    passing = (errors.ReadOnlyError, errors.OutOfMemoryError, errors.TryAgainError)
    return isinstance(error, (*AWAY, *passing))
