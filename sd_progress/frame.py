"""Owns `Frame`: the value that every writer, queue and callable is given."""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["denoised", "noisy", "both", "final"]
ImageFormat = Literal["png", "jpeg", "webp"]

INITIAL_STEP_INDEX = -1
MAX_ROW_FRAMES = 8  # of a clip's contact sheet that is a single row


@dataclass(frozen=True, eq=False)
class Frame:
    """One preview of one step: pixels, and where in the run they come from.

    Attributes:
        images: uint8 RGB, (B, H, W, 3), or (B, F, H, W, 3) for video, B clips of F frames;
            `source="both"` puts the noisy picture left of the denoised one. H, W and F may
            change in the course of a run; F is 1 where only one frame of a clip was decoded.
        step_index: 0-based count of this run's callbacks; -1 is the initial noise. Not the
            pipeline's own index, which counts half steps and restarts in some pipelines.
        num_steps: how many callbacks the run makes (2N-1 for N steps of a second-order scheduler),
            as far as is known: runs in stages, and videos made in parts, go on for more.
        timestep: what the scheduler was given, in its own units; None where there is none.
        sigma: noise level of the latents shown as `noisy`, after the step; None where the
            scheduler keeps no sigmas.
        source: `"denoised"` is the predicted x0, `"noisy"` the latents after the step, `"both"`
            the two side by side, `"final"` the pipeline's own finished picture.
        decoder: what made the pixels, for example `"linear:sd1"`, `"pca"` or `"vae"`.
        elapsed_s: seconds since the run's first step began.
        eta_s: estimated seconds until the last step; None before it can be known.
        layout: how the latents became VAE-space, the name of a row in `sd_progress.layouts`;
            `"inferred"` where that was a guess, `""` for the pipeline's own finished picture.
        run_index: 0-based count of the runs that this callback object has served.
        latents: (B, C, h, w) or (B, C, F, h, w) float, on the CPU, VAE-space: what `vae.decode` is
            given. (B * F, C, h, w) for a video whose VAE takes images, token ids for one that takes
            those, and the picture itself in pixel space. Kept only with `keep_latents=True`; with
            `source="both"`, the denoised ones.
        is_finite: whether all latents that are shown were finite; NaN and infinity are shown grey.
        output: what the pipeline returned; only in the last frame of `sd_progress.stream`.
    """

    images: NDArray[np.uint8]
    step_index: int
    num_steps: int
    timestep: float | None
    sigma: float | None
    source: Source
    decoder: str
    elapsed_s: float
    eta_s: float | None
    layout: str = "plain"
    run_index: int = 0
    latents: Tensor | None = None
    is_finite: bool = True
    output: object = None
    _stop: Callable[[], None] | None = field(default=None, repr=False)

    def stop(self) -> None:
        """End the run at its next step and keep what is there; from any thread.

        The picture that then comes last is what the model expected at that step. Does nothing where
        the run is over.

        Raises:
            RuntimeError: the frame came from another process, or from a file.
        """
        if self._stop is None:
            raise RuntimeError(
                "frame must be one of a run in this process, got one that was sent or made; "
                "have the process that runs the pipeline stop it"
            )
        self._stop()

    def __getstate__(self) -> dict[str, object]:
        """What travels to other processes: all but the way back to the run."""
        return {**vars(self), "output": None, "_stop": None}

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done, 0 to 1."""
        return min(1.0, (self.step_index + 1) / self.num_steps) if self.num_steps else 1.0

    @property
    def is_last(self) -> bool:
        """Whether this is the run's last step, or the finished picture."""
        return self.step_index + 1 >= self.num_steps

    @property
    def is_video(self) -> bool:
        """Whether `images` are clips, (B, F, H, W, 3); so they are with F = 1."""
        return self.images.ndim == 5

    @property
    def image(self) -> Image.Image:
        """RGB picture of everything: images as a near-square grid, each clip as a contact sheet.

        A clip is one row of frames, or near-square where it has more than 8; clips are stacked.
        Clips of a single frame are laid out as images are. Cells without a picture are black.
        """
        return Image.fromarray(as_grid(self.images))

    @property
    def middle(self) -> Image.Image:
        """RGB picture of frame F // 2 of all clips, as a near-square grid; of images, `image`."""
        pictures = self._pictures()
        return Image.fromarray(as_grid(pictures[len(pictures) // 2]))

    def clip(self) -> list[Image.Image]:
        """The video as F RGB pictures, each of all clips as a near-square grid.

        Of images, it is `[image]`.
        """
        return [Image.fromarray(as_grid(images)) for images in self._pictures()]

    def _pictures(self) -> NDArray[np.uint8]:
        """(F, B, H, W, 3); F is 1 for images."""
        return self.images.swapaxes(0, 1) if self.is_video else self.images[None]

    def metadata(self) -> dict[str, str]:
        """Where the frame comes from, as text, for an image file's header."""
        values = {
            "step_index": self.step_index,
            "num_steps": self.num_steps,
            "timestep": self.timestep,
            "sigma": self.sigma,
            "source": self.source,
            "decoder": self.decoder,
            "layout": self.layout,
            "elapsed_s": round(self.elapsed_s, 3),
        }
        shown = {key: str(value) for key, value in values.items() if value is not None}
        return {**shown, **_versions()}

    def to_bytes(self, format: ImageFormat = "png") -> bytes:
        """`image`, encoded.

        Args:
            format: `"png"`, `"jpeg"` or `"webp"`.

        Raises:
            ValueError: `format` is none of these.
        """
        if format not in get_args(ImageFormat):
            expected = ", ".join(map(repr, get_args(ImageFormat)))
            raise ValueError(f"format must be one of {expected}, got {format!r}; pass one of them")
        buffer = io.BytesIO()
        self.image.save(buffer, format=format)
        return buffer.getvalue()

    def to_data_url(self, format: ImageFormat = "png") -> str:
        """`image` as a `data:image/...;base64,` URL, for an HTML `<img src>`."""
        encoded = base64.b64encode(self.to_bytes(format)).decode("ascii")
        return f"data:image/{format};base64,{encoded}"


def as_grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All pictures in one, uint8 (H', W', 3); cells that have no picture are black.

    Args:
        images: uint8; (B, H, W, 3) becomes a near-square grid, (B, F, H, W, 3) B contact sheets
            one below the other: one row each for F up to 8, near-square above. F = 1 is as
            (B, H, W, 3).
    """
    if images.ndim == 4:
        return _tiled(images, _near_square(len(images)))
    frames = images.shape[1]
    if frames == 1:
        return as_grid(images[:, 0])
    columns = frames if frames <= MAX_ROW_FRAMES else _near_square(frames)
    return np.concatenate([_tiled(clip, columns) for clip in images])


def _near_square(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _tiled(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


@functools.cache
def _versions() -> dict[str, str]:
    """Looked up once: each time, three files are parsed, in Python."""
    found = {}
    for package in ("sd-progress", "diffusers", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
