"""Owns previews in Redis: a writer that adds each frame to a capped stream, for any reader.

An entry has three fields: `name` is "preview", or "end" after a run's last frame; `data` is JSON,
what `Frame` tells; `picture` is the encoded picture, as it is. See docs/scaling.md for readers in
other languages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, get_args
from urllib.parse import parse_qsl, urlencode

from ._redis import close, connected, entry_fields, is_away
from .boundary import warn
from .frame import Frame, ImageFormat

__all__ = ["RedisWriter"]

_PAUSES_S: Final = (0.5, 1.0, 2.0, 5.0)  # without a try, after so many failures


class RedisWriter:
    """Frames into a Redis Stream, which keeps the newest ones.

    It is a live view: it gets the newest frame, and a server that is slow or away costs frames, not
    time. They are counted, and the first one is told in a warning; what cannot get better by itself
    (a wrong password, a key of another type) is an error. All runs go into the one stream, with an
    entry named `end` after each.

    Attributes:
        newest: 1; see `sd_progress.Writer`.
        dropped: how many frames were lost because there was no server.
    """

    newest: int = 1

    def __init__(
        self,
        url: str,
        key: str,
        *,
        max_frames: int = 64,
        format: ImageFormat = "png",
        keep_s: float = 3600.0,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Choose the server and the stream; it is reached for by the first `write`.

        Args:
            url: `redis://[[user]:password@]host[:port][/database]`, `rediss://` for TLS, or any
                other that `sd_progress.fleet.RedisHub` takes.
            key: of the stream, for example `"run:42"`.
            max_frames: how many entries to keep, from 1 on; older ones are forgotten.
            format: of the pictures: `"png"`, `"jpeg"` or `"webp"`.
            keep_s: seconds after the last frame until the stream is forgotten.
            timeout_s: how long to wait for the server.
            clock: seconds that only grow.

        Raises:
            ValueError: `url` is none of Redis, `key` is empty, or an option is out of range.
        """
        if not key:
            raise ValueError("key must be the name of a stream, got ''; for example 'run:42'")
        if max_frames < 1 or keep_s < 1 or timeout_s <= 0:
            expected = "max_frames, keep_s and timeout_s must be from 1, from 1, and above 0"
            raise ValueError(f"{expected}, got {max_frames}, {keep_s}, {timeout_s}; raise them")
        if format not in get_args(ImageFormat):
            expected = f"format must be one of {', '.join(map(repr, get_args(ImageFormat)))}"
            raise ValueError(f"{expected}, got {format!r}; pass one of them")
        self.key = key
        self.dropped = 0
        self._redis = connected(url, timeout_s=timeout_s, retries=1)
        self._max_frames = max_frames
        self._format = format
        self._keep_s = keep_s
        self._clock = clock
        self._wrote = False
        self._failures = 0
        self._pause_until_s = float("-inf")

    def write(self, frame: Frame) -> None:
        """Add the frame to the stream; where there is no server, drop it.

        Raises:
            redis.RedisError: the server refuses.
        """
        self._wrote = True
        self._add("preview", _told(frame, self._format), frame)

    def close(self) -> None:
        """End the run, and disconnect; the next `write` connects again."""
        if self._wrote:
            self._add("end", {}, None)
        self._wrote = False
        close(self._redis)

    def _add(self, name: str, data: dict[str, object], frame: Frame | None) -> None:
        if self._clock() < self._pause_until_s:
            self.dropped += 1
            return
        pictures = {} if frame is None else {"picture": frame.to_bytes(self._format)}
        try:
            with self._redis.pipeline(transaction=True) as pipe:
                fields = entry_fields(name, data, pictures)
                pipe.xadd(self.key, fields, maxlen=self._max_frames, approximate=False)
                pipe.expire(self.key, int(self._keep_s))
                pipe.execute()
        except Exception as error:
            if not is_away(error):
                raise
            self._fail(error)
        else:
            self._failures = 0

    def _fail(self, error: Exception) -> None:
        if not self.dropped:
            warn(f"redis: frames for {self.key!r} are dropped, because {error}; the run goes on")
        self.dropped += 1
        pause_s = _PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)]
        self._failures += 1
        self._pause_until_s = self._clock() + pause_s


def writer_at(url: str) -> RedisWriter:
    """The writer of a URL with a key: `redis://host/0?key=run:42`.

    Raises:
        ValueError: there is no key in it.
    """
    place, _, query = url.partition("?")
    words = parse_qsl(query)
    keys = [value for name, value in words if name == "key"]
    if len(keys) != 1:
        expected = "target must name the stream, like redis://host/0?key=run:42"
        raise ValueError(f"{expected}, got {len(keys)} keys; pass one")
    others = urlencode([word for word in words if word[0] != "key"])
    return RedisWriter(f"{place}?{others}" if others else place, keys[0])


def _told(frame: Frame, format: ImageFormat) -> dict[str, object]:
    """What a frame tells, as the events of a `Hub` do."""
    picture = frame.image
    return {
        "format": format,
        "width": picture.width,
        "height": picture.height,
        "step_index": frame.step_index,
        "num_steps": frame.num_steps,
        "progress": frame.progress,
        "timestep": frame.timestep,
        "sigma": frame.sigma,
        "elapsed_s": frame.elapsed_s,
        "eta_s": frame.eta_s,
        "source": frame.source,
        "decoder": frame.decoder,
        "run_index": frame.run_index,
    }
