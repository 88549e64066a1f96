"""Owns what the explorer computes: a picture and knobs to pictures and numbers, without web."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, Literal, get_args

from PIL import Image, ImageOps
from torch import Tensor

from . import _charts
from .arguments import UsageError
from .decoders import LinearDecoder
from .demo import demo_model_path
from .diagnosis import Finding, diagnosed
from .factors import Factors
from .generate import one_line, quietly
from .lab import (
    ChannelStatistics,
    Lab,
    RoundTrip,
    at_size_of,
    channel_statistics,
    colour_map,
    round_trip,
)
from .pixels import to_uint8
from .tiny_decoder import TinyDecoder
from .vae_command import Task, channel_sheet

__all__ = [
    "DEMO",
    "NORMALISATIONS",
    "Encoded",
    "Knobs",
    "Model",
    "Models",
    "UnusableError",
    "View",
    "Why",
    "encoded",
    "open_picture",
    "sample",
    "turned",
    "viewed",
]

Why = Literal["no-picture", "too-large", "too-small", "no-model", "no-encoder", "failed"]
Normalisation = Literal["right", "left-out", "twice"]
NORMALISATIONS: Final[tuple[Normalisation, ...]] = get_args(Normalisation)
_TIMES: Final[dict[Normalisation, int]] = {"right": 1, "left-out": 0, "twice": 2}
MOST_PIXELS: Final = 50_000_000
MAX_SIDE_PX: Final = 512
DEMO: Final = "demo"  # what the demo model is called, wherever it lies
KEPT_MODELS: Final = 2
_WORST: Final = 16.0  # levels that are white in a heat map, unless there are worse


class UnusableError(Exception):
    """What somebody gave will not do.

    Attributes:
        why: for whoever words it.
        detail: in English, what exactly was found.
    """

    def __init__(self, why: Why, detail: str) -> None:
        super().__init__(f"{why}: {detail}")
        self.why, self.detail = why, detail


# --- pictures


def sample() -> Image.Image:
    """A small landscape that comes along, 128x128."""
    with resources.files("sd_progress").joinpath("data/sample.png").open("rb") as file:
        return Image.open(file).convert("RGB")


def open_picture(path: Path, max_side_px: int = MAX_SIDE_PX) -> Image.Image:
    """A file's picture, upright, in RGB, reduced to that side if it is larger.

    Raises:
        UnusableError: it is no picture, or one of more than `MOST_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise UnusableError("too-large", f"{opened.width}x{opened.height} pixels")
                image = ImageOps.exif_transpose(opened).convert("RGB")
    except Image.DecompressionBombError as error:
        raise UnusableError("too-large", one_line(error)) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # Pillow's, of broken files
        detail = one_line(error).replace(repr(str(path)), repr(path.name))
        raise UnusableError("no-picture", detail) from error
    image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    return image


# --- models


@dataclass(frozen=True, eq=False)
class Model:
    """A VAE, and what draws its latents for less.

    Attributes:
        name: a Hub id or a folder, or `DEMO`.
        lab: the VAE.
        colours: the linear map of previews.
        tiny: a distilled decoder; None where there is none, or only one for another VAE.
    """

    name: str
    lab: Lab
    colours: Factors
    tiny: TinyDecoder | None = None

    @classmethod
    def of(cls, name: str, lab: Lab, tiny: TinyDecoder | None = None) -> Model:
        """With the best map that is known or can be fitted now.

        Raises:
            UnusableError: the VAE cannot encode.
        """
        if not lab.space.can_encode:
            raise UnusableError("no-encoder", f"{type(lab.vae).__name__} only decodes")
        try:
            bound = None if tiny is None else tiny.for_vae(lab.vae)
        except ValueError:  # it was made for other latents
            bound = None
        return cls(name, lab, colour_map(lab), bound)


class Models:
    """Loads models, and keeps the last few; for one caller at a time.

    Args:
        device: `"auto"`, or what `torch.device` takes.
        dtype: `"auto"` or a key of `generate.DTYPES`.
        tiny: the Hub id or the folder of a distilled decoder.

    Raises:
        UsageError: there is no such decoder.
    """

    def __init__(
        self, device: str = "auto", dtype: str = "auto", *, tiny: str | None = None
    ) -> None:
        self._device, self._dtype = device, dtype
        try:
            with quietly(is_quick=False):
                self._tiny = None if tiny is None else TinyDecoder(tiny)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--{one_line(error)}") from error
        self._kept: OrderedDict[str, Model] = OrderedDict()

    def load(self, name: str) -> Model:
        """The model with that name.

        Raises:
            UnusableError: there is none, or it has no VAE of pictures that can encode.
        """
        name = name.strip()
        if name not in self._kept:
            try:
                self._kept[name] = self._loaded(name)
            except UnusableError:
                raise
            except Exception as error:  # of whatever is in such a folder
                raise UnusableError("no-model", one_line(error).replace("--model", "it")) from error
        self._kept.move_to_end(name)
        while len(self._kept) > KEPT_MODELS:
            self._kept.popitem(last=False)
        return self._kept[name]

    def _loaded(self, name: str) -> Model:
        if not name:
            raise UnusableError("no-model", "the name is empty")
        where = str(demo_model_path()) if name == DEMO else name
        lab = Task(where, self._device, self._dtype, Path()).lab()
        with quietly(is_quick=False):
            return Model.of(name, lab, self._tiny)


# --- what a model makes of a picture


@dataclass(frozen=True, eq=False)
class Encoded:
    """A picture, with what the model makes of it untouched.

    Attributes:
        model: the model's name.
        trip: there and back.
        findings: what is wrong with the model.
    """

    model: str
    trip: RoundTrip
    findings: tuple[Finding, ...]


def encoded(model: Model, image: Image.Image) -> Encoded:
    """Encode and decode a picture.

    Raises:
        UnusableError: it is smaller than one latent, or the model cannot do it.
    """
    try:
        picture = model.lab.picture(image)
    except ValueError as error:
        raise UnusableError("too-small", one_line(error)) from error
    try:
        trip = round_trip(model.lab, picture)
        return Encoded(model.name, trip, tuple(diagnosed(model.lab, trip)))
    except RuntimeError as error:  # out of memory, or smaller than what it folds
        raise UnusableError("failed", one_line(error)) from error


@dataclass(frozen=True)
class Knobs:
    """What is done to latents between encoder and decoder, in sampler space; nothing by default.

    Attributes:
        factor: all are multiplied by it, as if the scaling factor were wrong by that much.
        shift: is added to all, in deviations of N(0, 1).
        normalisation: whether the way back to VAE space is gone as it should be, not at all (what
            a sampler made goes straight to the decoder), or twice.
        channels: of these, and before the rest,
        gain: so much is kept; 0 sets them to their centre.
    """

    factor: float = 1.0
    shift: float = 0.0
    normalisation: Normalisation = "right"
    channels: tuple[int, ...] = ()
    gain: float = 0.0


def turned(lab: Lab, latents: Tensor, knobs: Knobs) -> Tensor:
    """Latents with the knobs turned; the very same where none is.

    Args:
        lab: the VAE.
        latents: (1, C, ...), VAE space.
        knobs: what to do; channels that the VAE does not have are left out.
    """
    channels = [number for number in knobs.channels if number < latents.shape[1]]
    if dataclasses.replace(knobs, channels=(), gain=0.0) == Knobs() and not channels:
        return latents
    values = lab.to_sampler(latents)
    values[:, channels] *= knobs.gain
    values = values * knobs.factor + knobs.shift
    for _ in range(_TIMES[knobs.normalisation]):
        values = lab.from_sampler(values)
    return values


@dataclass(frozen=True, eq=False)
class View:
    """What there is to see and to read.

    Attributes:
        picture: as the VAE was given it.
        preview: by the linear map, in the picture's size, with square pixels.
        tiny: by the distilled decoder; None without one.
        decoded: by the VAE.
        difference: black where decoded is like the picture, `worst` levels and more are white.
        channels: a sheet.
        trip: the picture and what came of the latents, with its numbers.
        statistics: of each channel.
        worst: of 255 levels.
    """

    picture: Image.Image
    preview: Image.Image
    tiny: Image.Image | None
    decoded: Image.Image
    difference: Image.Image
    channels: Image.Image
    trip: RoundTrip
    statistics: Sequence[ChannelStatistics]
    worst: float


def viewed(model: Model, seen: Encoded, knobs: Knobs) -> View:
    """Decode with the knobs turned, in every way there is.

    Raises:
        UnusableError: the model cannot do it.
    """
    lab, trip = model.lab, seen.trip
    latents = turned(lab, trip.latents, knobs)
    try:
        if latents is not trip.latents:
            decoded = at_size_of(trip.picture, lab.decode(latents))
            trip = dataclasses.replace(trip, latents=latents, decoded=decoded)
        still = latents if latents.ndim == 4 else latents[:, :, 0]
        tiny = None if model.tiny is None else Image.fromarray(model.tiny.decode(still)[0])
    except RuntimeError as error:
        raise UnusableError("failed", one_line(error)) from error
    picture = Image.fromarray(to_uint8(trip.picture)[0])
    preview = Image.fromarray(LinearDecoder(model.colours).decode(still)[0])
    worst = max(_WORST, float(trip.difference.max()))
    return View(
        picture=picture,
        preview=preview.resize(picture.size, Image.Resampling.NEAREST),
        tiny=tiny,
        decoded=Image.fromarray(to_uint8(trip.decoded)[0]),
        difference=_charts.heat(trip.difference, worst),
        channels=channel_sheet(lab, latents),
        trip=trip,
        statistics=channel_statistics(lab, latents),
        worst=worst,
    )
