"""Owns what is done to every request before a route sees it, and to every answer after it.

Who may ask (token, host, origin), how much may be sent, and which headers keep browsers strict.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "Refusal", "is_loopback"]

OPEN_PATHS: Final = frozenset({"/", "/healthz"})
"""Need no token: neither tells anything."""

_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS: Final[Mapping[str, str]] = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 (it is an answer)
    """What a client is told instead of what it asked for, in the shape of OpenAI's errors.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field that is wrong.
        code: for programs.
        headers: to send along.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def body(self) -> dict[str, object]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message.encode("utf-8", "replace").decode(),  # lone surrogates
                "type": kinds.get(self.status, other),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


class Guard:
    """Stands before an application; for ASGI.

    Args:
        app: what is guarded.
        token: that clients must send as `Authorization: Bearer`; None lets everyone in, and only
            from pages of this host.
        hosts: names that the Host header may have, against DNS rebinding; None is any.
        max_body_bytes: of a request.
        body_timeout_s: until it must be here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: frozenset[str] | None,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else hosts | _LOOPBACK_NAMES
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have it answered."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _Answer(send))

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _Replay(body, receive), answer)
        except _GoneError:
            pass
        except Refusal as refusal:
            await refusal.response()(scope, receive, answer)
        except Exception:
            if answer.is_begun:
                raise  # the connection is cut: what came is not whole
            _log.exception("%s %r failed", scope["method"], scope["path"])
            failure = Refusal(500, "the service failed; its log tells why", code="server_error")
            await failure.response()(scope, receive, answer)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = _name_of(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            expected = "the Host header must name this machine"
            raise Refusal(421, f"{expected}, got {host[:80]!r}; allow it with --allow_host")
        if self._token is None:
            _check_origin(headers)
        elif scope["path"] not in OPEN_PATHS:
            _check_token(self._token, headers.get("authorization", ""))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        if scope["method"] in ("GET", "HEAD"):
            return b""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            self._check_length(int(length[:20]))
        try:
            body = await asyncio.wait_for(self._read(receive), self._body_timeout_s)
        except asyncio.TimeoutError:
            seconds = f"{self._body_timeout_s:g} s"
            raise Refusal(408, f"the body must be here within {seconds}; send it again") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":  # which pages of other origins cannot send unasked
            expected = "the Content-Type header must be application/json"
            raise Refusal(415, f"{expected}, got {kind[:80]!r}; send JSON")
        return body

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        count = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            count += len(parts[-1])
            self._check_length(count)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_length(self, count: int) -> None:
        if count > self._max_body_bytes:
            expected = f"the body must be at most {self._max_body_bytes} bytes"
            raise Refusal(413, f"{expected}, got more; send less", headers={"connection": "close"})


class _GoneError(Exception):
    """The client left before it had said what it wants."""


class _Replay:
    """A request's body, read already; then whatever else comes, such as that the client left."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        """For ASGI."""
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


class _Answer:
    """Where an answer goes; it gets the headers that all have.

    Attributes:
        is_begun: whether its head was sent.
    """

    def __init__(self, send: Send) -> None:
        self.is_begun = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        """For ASGI."""
        if message["type"] == "http.response.start":
            self.is_begun = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_token(token: bytes, authorization: str) -> None:
    scheme, _, given = authorization.partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), token)
    if scheme.lower() != "bearer" or not is_right:
        expected = "the Authorization header must be 'Bearer' and the service's token"
        got = "another one" if given else "none"
        raise Refusal(
            401,
            f"{expected}, got {got}; pass it as the client's api_key",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _check_origin(headers: Headers) -> None:
    """Pages of other origins must not have pictures painted only because a browser is here."""
    origin, host = headers.get("origin"), headers.get("host")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        expected = "the Origin header must be that of this service"
        raise Refusal(403, f"{expected}, got {origin[:80]!r}; use its own page, or a token")


def _name_of(host: str) -> str:
    """A Host header without its port, and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
