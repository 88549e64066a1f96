"""Owns how jobs, events and frames are written down in Redis: keys, entries, connections."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import unquote, urlsplit

from .jobs import Event, EventName, Job

try:
    import redis
    from redis import asyncio as aio
    from redis import exceptions as errors
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
    "aclose",
    "close",
    "connected",
    "connected_async",
    "entry_fields",
    "errors",
    "event_fields",
    "event_of",
    "is_away",
    "job_fields",
    "job_of",
    "without_secrets",
]

Entry = tuple[bytes, dict[bytes, bytes]]
Fields = dict[str, str | bytes]

GROUP: Final = "workers"
OVER: Final = b"over"
AWAY: Final = (errors.ConnectionError, errors.TimeoutError)
"""What is raised while there is no server to talk to; `is_away` knows the exceptions."""

_PASSING: Final = (
    errors.ClusterDownError,
    errors.OutOfMemoryError,
    errors.ReadOnlyError,
    errors.TryAgainError,
)
_JOB_FIELDS: Final = frozenset(one.name for one in dataclasses.fields(Job))
_TIMEOUT_S: Final = 5.0
_CONNECT_S: Final = 2.0
_UNLIMITED: Final = 2**31


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

    @property
    def looked(self) -> str:
        """There for a moment after a worker has looked for the jobs of dead ones."""
        return f"{{{self.prefix}}}:looked"

    def unfinished(self, client: str) -> str:
        """Set of the client's runs that are not over."""
        return f"{{{self.prefix}}}:unfinished:{client}"

    def run(self, run_id: str) -> str:
        """Hash of what is known of a run.

        `client` and `position` in line, `entry` of the jobs stream, `owner`, count of `attempts`,
        whether it is `cancelled`, and `state`, which is "over" after the last event.
        """
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


# Connections


def connected(url: str, *, timeout_s: float = _TIMEOUT_S, retries: int = 3) -> redis.Redis:
    """A client for threads; nothing is connected yet, but with a cluster.

    Raises:
        ValueError: `url` is none of Redis.
    """
    place, options = _place(url), _options(timeout_s)
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries)
    if place.kind == "cluster":
        return redis.RedisCluster.from_url(place.url, **options)
    if place.kind == "sentinel":
        options |= {"retry": retry, "ssl": place.is_tls}
        sentinel = redis.Sentinel(place.hosts, **options, **place.login)
        return sentinel.master_for(place.service, db=place.database)
    return redis.Redis.from_url(place.url, retry=retry, **options)


def connected_async(url: str, *, max_connections: int) -> aio.Redis:
    """A client for coroutines; who needs a connection while all are taken waits for one.

    Clients of clusters and of sentinels cannot wait, and so have no limit.

    Raises:
        ValueError: `url` is none of Redis.
    """
    place, options = _place(url), _options(_TIMEOUT_S)
    retry = AsyncRetry(ExponentialBackoff(cap=0.5, base=0.05), 3)
    if place.kind == "cluster":
        return aio.RedisCluster.from_url(place.url, max_connections=_UNLIMITED, **options)
    options |= {"retry": retry}
    if place.kind == "sentinel":
        options |= {"ssl": place.is_tls}
        sentinel = aio.Sentinel(place.hosts, **options, **place.login)
        return sentinel.master_for(place.service, db=place.database)
    pool = aio.BlockingConnectionPool.from_url(
        place.url, max_connections=max_connections, timeout=_TIMEOUT_S, **options
    )
    return aio.Redis.from_pool(pool)


def close(client: redis.Redis) -> None:
    """Disconnect, from sentinels as well."""
    client.close()
    for sentinel in _sentinels(client):
        sentinel.close()


async def aclose(client: aio.Redis) -> None:
    """Disconnect, from sentinels as well."""
    await client.aclose()
    for sentinel in _sentinels(client):
        await sentinel.aclose()


def _sentinels(client: object) -> list[redis.Redis]:
    pool = getattr(client, "connection_pool", None)
    return getattr(getattr(pool, "sentinel_manager", None), "sentinels", [])


@dataclass(frozen=True)
class _Place:
    """Where the server is.

    Attributes:
        kind: "", "cluster" or "sentinel".
        url: as the client library has it.
        hosts: of the sentinels.
        service: the name that they know the server by.
    """

    kind: str
    url: str
    is_tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    database: int = 0
    login: Mapping[str, str] = field(default_factory=dict)


def _place(url: str) -> _Place:
    """Where a URL points to.

    Raises:
        ValueError: it is none of Redis.
    """
    match = re.fullmatch(r"(redis|rediss|unix)(?:\+(cluster|sentinel))?://(.+)", url)
    if match is None or (match[1] == "unix" and match[2]):
        expected = "url must begin with redis://, rediss:// (TLS) or unix://"
        raise ValueError(f"{expected}, got {without_secrets(url)!r}; see docs/scaling.md")
    if match[2] != "sentinel":
        return _Place(match[2] or "", f"{match[1]}://{match[3]}")
    login, _, rest = match[3].rpartition("@")
    hosts, _, path = rest.partition("/")
    service, _, database = path.partition("/")
    if not service or not (database or "0").isdigit():
        expected = "url must name the service, like redis+sentinel://host:26379,host-2:26379/name"
        raise ValueError(f"{expected}, got {without_secrets(url)!r}; add it")
    return _Place(
        "sentinel",
        url,
        match[1] == "rediss",
        tuple(
            (host.partition(":")[0], int(host.partition(":")[2] or 26379))
            for host in hosts.split(",")
        ),
        service,
        int(database or 0),
        _login(login),
    )


def _login(text: str) -> dict[str, str]:
    user, _, password = map(unquote, text.partition(":"))
    found = {"username": user, "password": password}
    return {name: value for name, value in found.items() if value}


def _options(timeout_s: float) -> dict[str, object]:
    return {
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": min(timeout_s, _CONNECT_S),
    }


def without_secrets(url: str) -> str:
    """The URL as it may be printed."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else parts.path


def is_away(error: Exception) -> bool:
    """Whether it may go away by itself: no server, one that is loading, full or taken over."""
    if isinstance(error, errors.AuthenticationError):
        return False
    return isinstance(error, (*AWAY, *_PASSING))
