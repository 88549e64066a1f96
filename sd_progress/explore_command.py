"""Owns `sd-progress explore`: the explorer's page, served until Ctrl-C."""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import threading
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import FrameType

from .arguments import UsageError
from .guard import is_loopback

__all__ = ["Task", "explore"]

_LEAST_TOKEN_CHARS = 16


@dataclass(frozen=True)
class Task:
    """What to explore, and where the page is.

    Attributes:
        model: a Hub id or a folder; None is the demo model.
        device, dtype: as for `generate.load_pipeline`.
        tiny: the Hub id or the folder of a distilled decoder; None shows none.
        max_side_px: larger pictures are reduced.
        host, port: where to listen.
        token: what visitors must give as their password; None lets in all of this machine.
    """

    model: str | None
    device: str
    dtype: str
    tiny: str | None
    max_side_px: int
    host: str
    port: int
    token: str | None


def explore(task: Task) -> None:
    """Serve the page until Ctrl-C or SIGTERM; the address is printed when it can be asked.

    What visitors upload is in a temporary folder, and gone in the end.

    Raises:
        UsageError: the model, the address or the token will not do.
        ModuleNotFoundError: gradio is not installed.
    """
    _check_token(task.host, task.token)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with TemporaryDirectory(prefix="sd-progress-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        _serve(task)


def _serve(task: Task) -> None:
    from .exploration import UnusableError
    from .explore import CSS, build  # says it better where gradio is missing

    import gradio as gr  # isort: skip

    try:
        page = build(
            task.model, task.device, task.dtype, tiny=task.tiny, max_side_px=task.max_side_px
        )
    except UnusableError as error:
        raise UsageError(f"--model must be one that can be explored; {error.detail}") from error
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    token = task.token
    try:
        page.launch(
            server_name=task.host,
            server_port=task.port,
            auth=None if token is None else lambda _, given: _is_same(given, token),
            max_file_size="64mb",
            theme=gr.themes.Default(font=sans, font_mono=mono),  # no fonts of other servers
            css=CSS,
            footer_links=[],
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs=_only_for_this_machine(task.host),
        )
    except OSError as error:
        expected = "--host and --port must be an address of this machine that is free"
        raise UsageError(f"{expected}, got {task.host} and {task.port}") from error
    print(f"Exploring at http://{task.host}:{task.port} (Ctrl-C stops)", flush=True)
    _until_told()
    page.close(verbose=False)
    print("\nStopped.", flush=True)


def _is_same(given: str, token: str) -> bool:
    """In a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode(), token.encode())


def _only_for_this_machine(host: str) -> dict[str, object]:
    """Requests must be for a name of it, so that no page elsewhere gets in by a name of its own."""
    if not is_loopback(host) or ":" in host:
        return {}
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = ["localhost", "127.0.0.1"]
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=names)]}


def _until_told() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    told = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            told.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_token(host: str, token: str | None) -> None:
    advice = 'python -c "import secrets; print(secrets.token_urlsafe())" makes one'
    if token is None and not is_loopback(host):
        expected = f"--token must be given with --host {host}, which others can reach"
        raise UsageError(f"{expected}, got none; {advice}, or set SD_PROGRESS_TOKEN")
    if token is not None and (len(token) < _LEAST_TOKEN_CHARS or not token.isascii()):
        expected = f"--token must be {_LEAST_TOKEN_CHARS} ASCII characters or more"
        raise UsageError(f"{expected}, got {len(token)} characters; {advice}")
