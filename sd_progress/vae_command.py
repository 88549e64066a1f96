"""Owns `sd-progress vae`: what the lab computes, as pictures in a folder and lines of text."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from . import _charts, factors
from ._animation import FORMATS, Timing, png_bytes
from ._files import publish, write_temporary
from ._sheet import Cell, sheet, with_longer_side
from .arguments import UsageError
from .calibrate_command import load_vae
from .decoders import PCADecoder
from .diagnosis import Finding, diagnosed, diagnosed_latents
from .generate import device_named, dtype_named, one_line
from .lab import (
    WAYS,
    Lab,
    RoundTrip,
    Usage,
    channel_statistics,
    colour_map,
    contributions,
    interpolated,
    latent_pixels,
    nearest,
    principal_components,
    round_trip,
    walked,
)
from .pixels import to_uint8

BROKEN: Final = 3  # the exit code

_CELL_PX: Final = 256
_GAP_PX: Final = 10
_FRAME_MS: Final = 100
_STEPS: Final = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # shown side by side
_WORST: Final = 16.0  # levels that are white in a heat map, unless there are worse


@dataclass(frozen=True)
class Task:
    """What all of the commands need.

    Attributes:
        model: a Hub id or a folder, of a pipeline or of a VAE.
        device: `"auto"`, or what `torch.device` takes.
        dtype: `"auto"` or a key of `generate.DTYPES`.
        out: the folder for what is made; nothing in it is overwritten.
        size: width and height that pictures are brought to; None leaves each of them.
        suffix: of animations, a key of `_animation.FORMATS`.
        token_env: the environment variable that holds a token of the Hub; None needs none.
    """

    model: str
    device: str
    dtype: str
    out: Path
    size: tuple[int | None, int | None] = (None, None)
    suffix: str = ".gif"
    token_env: str | None = None

    def lab(self) -> Lab:
        """The model's VAE.

        Raises:
            UsageError: there is none, or it is none of pictures.
        """
        device = device_named(self.device)
        token = _token(self.token_env)
        vae = load_vae(self.model, dtype_named(self.dtype, device), token=token).to(device)
        try:
            return Lab.of(vae)
        except (TypeError, NotImplementedError, RuntimeError) as error:
            expected = "--model must have an autoencoder of pictures"
            raise UsageError(f"{expected}, got {self.model!r}; {one_line(error)}") from error

    def picture(self, lab: Lab, path: Path) -> Tensor:
        """A file's picture, (1, 3, H, W); a line says so if it had to be cut.

        Raises:
            UsageError: it cannot be read, or is too small, or the VAE has no encoder.
        """
        if not lab.space.can_encode:
            raise UsageError(
                f"--model must have an encoder, got {type(lab.vae).__name__} without; "
                "only `vae roundtrip --latents` and `vae factors` can do without one"
            )
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            expected = "IMAGE must be a picture that can be read"
            raise UsageError(f"{expected}, got {str(path)!r}; {one_line(error)}") from error
        size = self._size(image)
        try:
            picture = lab.picture(image, size)
        except ValueError as error:
            raise UsageError(str(error).replace("image", "IMAGE", 1)) from error
        height, width = picture.shape[-2:]
        if (width, height) != (size or image.size):
            wanted = "x".join(map(str, size or image.size))
            _say(
                "note", f"{wanted} rounded down to {width}x{height}, multiples of {lab.space.ratio}"
            )
        return picture

    def encoded(self, lab: Lab, path: Path) -> tuple[Tensor, Tensor]:
        """A file's picture, and its latents.

        Raises:
            UsageError: they are not finite, or what `picture` raises.
        """
        picture = self.picture(lab, path)
        latents = lab.encode(picture)
        if not latents.isfinite().all():
            raise UsageError(
                f"--model must encode to finite latents, got NaN or infinity from {self.model!r}; "
                "`sd-progress vae roundtrip` says what is wrong with it"
            )
        return picture, latents

    def _size(self, image: Image.Image) -> tuple[int, int] | None:
        width, height = self.size
        if width is None and height is None:
            return None
        if width is None:
            width = max(1, round(image.width * cast(int, height) / image.height))
        if height is None:
            height = max(1, round(image.height * width / image.width))
        return width, height

    def save(self, name: str, image: Image.Image) -> None:
        """A PNG in the folder, and a line that says where."""
        with _writing(self.out):
            path = publish(write_temporary(self.out, png_bytes(image)), self.out / f"{name}.png")
        _say(name, str(path))

    def animate(self, name: str, pictures: Iterable[Image.Image]) -> None:
        """An animation that goes back and forth, and a line that says where it is."""
        forth = list(pictures)
        with _writing(self.out):
            file = FORMATS[self.suffix](
                self.out / f"{name}{self.suffix}", Timing(_FRAME_MS, _FRAME_MS, 0)
            )
            for picture in [*forth, *forth[-2:0:-1]]:
                file.add(picture, _FRAME_MS)
            file.finish()
        _say(name, str(file.path))


def _token(variable: str | None) -> str | None:
    token = None if variable is None else os.environ.get(variable)
    if variable is not None and not token:
        expected = "--token_env must name an environment variable that holds a token of the Hub"
        raise UsageError(f"{expected}, got {variable!r}, which is not set; export it first")
    return token


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A folder that cannot be written to is the user's mistake."""
    try:
        yield
    except OSError as error:
        expected = "--out must be a folder that can be written to"
        raise UsageError(f"{expected}, got {str(out)!r}; {one_line(error)}") from error


def _say(name: str, text: str) -> None:
    print(f"  {name:<12} {text}", flush=True)


# --- sd-progress vae roundtrip


def show_round_trip(
    task: Task, image: Path | None, latents: Path | None, space: str, seed: int | None
) -> int:
    """Encode and decode a picture, or decode latents; 3 if the VAE, or they, are broken.

    Args:
        task: the model, and where pictures go.
        image: a picture; None where there are latents.
        latents: a `.safetensors` or `.pt` file with one tensor; None for a picture.
        space: of these latents, `"vae"` or `"sampler"`.
        seed: draws from the posterior; None takes its mean.

    Raises:
        UsageError: something cannot be read or written, or both or neither are given.
    """
    if (image is None) == (latents is None):
        raise UsageError("IMAGE or --latents must be given, and not both; see --help")
    lab = task.lab()
    _introduce(lab, task.model)
    findings = (
        _round_trip_of_picture(task, lab, image, seed)
        if image is not None
        else _decode_of_latents(task, lab, cast(Path, latents), space)
    )
    for finding in findings:
        print(f"sd-progress: {finding}", file=sys.stderr)
    return BROKEN if findings else 0


def _introduce(lab: Lab, model: str) -> None:
    dtype = next((p.dtype for p in lab.vae.parameters()), torch.float32)
    print(f"{lab.key} of {model} ({lab.space.device}, {str(dtype).removeprefix('torch.')})")


def _round_trip_of_picture(task: Task, lab: Lab, image: Path, seed: int | None) -> list[Finding]:
    picture = task.picture(lab, image)
    generator = None if seed is None else torch.Generator(lab.space.device).manual_seed(seed)
    trip = round_trip(lab, picture, generator)
    _tell(lab, trip)
    findings = diagnosed(lab, trip)
    _say("verdict", ", ".join(finding.fault for finding in findings) or "nothing is wrong")
    decoded = Image.fromarray(to_uint8(trip.decoded)[0])
    worst = max(_WORST, float(trip.difference.max()))
    heat = _charts.heat(trip.difference, worst)
    task.save("decoded", decoded)
    task.save("difference", heat)
    cells = (
        (Image.fromarray(to_uint8(picture)[0]), "picture"),
        (decoded, f"decoded, {trip.psnr_db:.1f} dB"),
        (heat, f"difference, white is {worst:.0f}/255"),
    )
    task.save("side-by-side", _on_white([_cell(*cell) for cell in cells], columns=3))
    return findings


def _tell(lab: Lab, trip: RoundTrip) -> None:
    """One line each for size, statistics, faithfulness and cost."""
    _say("picture", f"{trip.picture.shape[-1]}x{trip.picture.shape[-2]}")
    _tell_latents(lab, trip.latents)
    frame = trip.latents if trip.latents.ndim == 4 else trip.latents[:, :, :1]
    numbers = trip.picture.numel() / frame.numel()
    _say("compressed", f"{numbers:.0f} numbers of the picture to 1 latent")
    _say("PSNR", f"{trip.psnr_db:.2f} dB")
    _say("SSIM", f"{trip.ssim:.4f}")
    _say("largest", f"{trip.difference.max():.0f} of 255 levels off")
    _say("saturated", f"{trip.saturated:.2%} of the decoder's values lie beyond the range")
    _say("not finite", f"{trip.not_finite} values")
    _say("time", f"{trip.encode_s:.2f} s to encode, {trip.decode_s:.2f} s to decode")
    if trip.peak_bytes is not None:
        what = "torch" if lab.space.device.type == "cuda" else "the whole process"
        _say("memory", f"{trip.peak_bytes / 2**20:.0f} MiB at the most, of {what}")


def _tell_latents(lab: Lab, latents: Tensor) -> None:
    _say("latents", f"{tuple(latents.shape)}, {lab.space.ratio}x{lab.space.ratio} pixels each")
    _say("channel", "mean, deviation, least, most in sampler space, where N(0, 1) is expected")
    for number, of in enumerate(channel_statistics(lab, latents)):
        numbers = (of.mean, of.deviation, of.low, of.high)
        _say(f"  {number}", " ".join(f"{value:7.2f}" for value in numbers))


def _decode_of_latents(task: Task, lab: Lab, path: Path, space: str) -> list[Finding]:
    given = _read_latents(path)
    axes = 5 if lab.space.is_video else 4
    while given.ndim < axes:
        given = given[None] if given.ndim == 3 else given[:, :, None]
    fits = given.shape[1:2] == (lab.space.channels,)
    other = None
    if fits:
        spaces = {"vae": given, "sampler": lab.from_sampler(given)}
        given = spaces.pop(space)
        (other,) = spaces.values()
        _tell_latents(lab, given)
    findings = diagnosed_latents(lab, given, other)
    _say("verdict", ", ".join(x.fault for x in findings) or "they look like this VAE's own")
    if fits and given.ndim == axes:
        task.save("decoded", lab.shown(given))
    return findings


def _read_latents(path: Path) -> Tensor:
    """The one tensor in a file, float32, at least (C, h, w); of a batch, the first."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        expected = "--latents must be a .safetensors or .pt file that can be read"
        raise UsageError(f"{expected}, got {str(path)!r}; {one_line(error)}") from error
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].ndim not in (3, 4, 5):
        raise UsageError(
            f"--latents must hold one tensor of 3 to 5 axes, got {str(path)!r} with "
            f"{', '.join(str(tuple(getattr(x, 'shape', ()))) for x in tensors[:4])}; save it alone"
        )
    tensor = tensors[0].float()
    return tensor if tensor.ndim == 3 else tensor[:1]


# --- sd-progress vae channels and factors


def show_channels(task: Task, image: Path) -> None:
    """Each channel in grey, with its histogram."""
    lab = task.lab()
    _introduce(lab, task.model)
    _, latents = task.encoded(lab, image)
    _tell_latents(lab, latents)
    task.save("channels", channel_sheet(lab, latents))


def channel_sheet(lab: Lab, latents: Tensor) -> Image.Image:
    """Each channel of (1, C, ...) VAE-space latents in grey, above its histogram."""
    values = lab.to_sampler(latents)[0]
    planes = values if values.ndim == 3 else values[:, 0]
    cells = []
    for number, plane in enumerate(planes):
        grey = to_uint8((plane / 3).expand(3, -1, -1)[None])[0]  # three deviations fill the range
        shown = _large(Image.fromarray(grey))
        counted = _charts.histogram(plane.double().flatten().numpy(), _CELL_PX)
        cells.append(Cell(_charts.stacked([shown, counted]), f"channel {number}"))
    return _on_white(cells, columns=min(8, int(np.ceil(np.sqrt(len(cells))))))


def show_factors(task: Task, file: Path | None) -> None:
    """What each channel adds to colour, as numbers and swatches.

    Raises:
        UsageError: the file holds no factors for this VAE.
    """
    lab = task.lab()
    _introduce(lab, task.model)
    try:
        colours = colour_map(lab) if file is None else factors.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--factors must be a file of calibrate; {one_line(error)}") from error
    if colours.latent_channels != lab.space.channels:
        raise UsageError(
            f"--factors must be for {lab.space.channels} channels, got "
            f"{colours.latent_channels}; calibrate this VAE"
        )
    levels, shown = contributions(lab, colours, _STEPS)
    _say("map", f"{colours.name}: {colours.provenance or 'no provenance'}")
    _say("channel", "red, green, blue in levels of 255, for one deviation more")
    cells = []
    for number, (row, colour) in enumerate(zip(levels, shown, strict=True)):
        _say(f"  {number}", " ".join(f"{value:+7.1f}" for value in row))
        cells.append(
            Cell(_charts.swatches(colour), f"channel {number}: {_STEPS[0]:g} to {_STEPS[-1]:g}")
        )
    task.save("factors", _on_white(cells, columns=1 if len(cells) <= 8 else 4))


# --- sd-progress vae pca, interpolate and walk


def show_components(
    task: Task, images: Sequence[Path], count: int, frames: int, neighbours: int | None = None
) -> None:
    """Explained variance, and what each of the first directions does to the first picture.

    Args:
        task: what all of the commands need.
        images: of which the first is moved.
        count: of directions.
        frames: of an animation.
        neighbours: how many of the pictures count, those most like the first; None is all.
    """
    lab = task.lab()
    _introduce(lab, task.model)
    latents = [task.encoded(lab, image)[1] for image in images]
    if neighbours is not None:
        near = nearest(lab, latents, neighbours)
        _say("neighbours", ", ".join(images[number].name for number in near))
        latents = [latents[number] for number in near]
    try:
        found = principal_components(latent_pixels(lab, latents))
    except ValueError as error:
        raise UsageError(f"IMAGES must have latents to compare; {one_line(error)}") from error
    _say("component", "of all variance, together with those before it; its channels")
    for number, share in enumerate(found.explained):
        axis = " ".join(f"{value:+.2f}" for value in found.axes[number][:8])
        _say(f"  {number + 1}", f"{share:6.1%}   {axis}{' ...' if len(found.mean) > 8 else ''}")
    task.save("explained", _charts.curve([float(share) for share in found.explained]))
    rows = []
    for number in range(min(count, len(found.axes))):
        direction = found.axes[number] * np.sqrt(found.variances[number])
        task.animate(f"component-{number + 1}", _moved(lab, latents[0], direction, frames))
        rows += _row(lab, latents[0], direction, f"component {number + 1}: ")
    task.save("components", _on_white(rows, columns=len(_STEPS)))


def show_walk(task: Task, image: Path, channel: int, frames: int) -> None:
    """What one channel does to a picture.

    Raises:
        UsageError: there is no such channel.
    """
    lab = task.lab()
    _introduce(lab, task.model)
    if not 0 <= channel < lab.space.channels:
        raise UsageError(
            f"--channel must be from 0 to {lab.space.channels - 1} for this VAE, got {channel}; "
            "`vae channels` shows all of them"
        )
    _, latents = task.encoded(lab, image)
    direction = np.eye(lab.space.channels)[channel]
    name = f"channel-{channel}"
    task.animate(name, _moved(lab, latents, direction, frames))
    task.save(f"{name}-steps", _on_white(_row(lab, latents, direction, ""), len(_STEPS)))


def _moved(
    lab: Lab, latents: Tensor, direction: NDArray[np.float64], frames: int
) -> Iterator[Image.Image]:
    for step in np.linspace(_STEPS[0], _STEPS[-1], frames):
        yield lab.shown(walked(lab, latents, direction, float(step)))


def _row(lab: Lab, latents: Tensor, direction: NDArray[np.float64], text: str) -> list[Cell]:
    """A cell for each of the steps."""
    shown = [lab.shown(walked(lab, latents, direction, step)) for step in _STEPS]
    return [_cell(x, f"{text}{_signed(step)}", 160) for x, step in zip(shown, _STEPS, strict=True)]


def _signed(step: float) -> str:
    return f"{step:+g}" if step else "0"


def show_interpolation(task: Task, first: Path, last: Path, frames: int) -> None:
    """Both ways between two pictures, as animations and side by side; the second is cut to fit."""
    lab = task.lab()
    _introduce(lab, task.model)
    picture, start = task.encoded(lab, first)
    height, width = picture.shape[-2:]
    _, end = replace(task, size=(width, height)).encoded(lab, last)
    cells = []
    for way in WAYS:
        pictures = [lab.shown(z) for z in interpolated(lab, start, end, frames, way)]
        task.animate(way, pictures)
        chosen = np.linspace(0, frames - 1, min(frames, len(_STEPS))).round().astype(int)
        cells += [_cell(pictures[n], f"{way} {n / (frames - 1):.0%}", 160) for n in chosen]
    task.save("interpolation", _on_white(cells, columns=min(frames, len(_STEPS))))


# --- sd-progress vae tokens


def show_tokens(task: Task, image: Path, counts: Sequence[int]) -> None:
    """The token map, how often which entry is used, and what few entries can draw.

    Raises:
        UsageError: the VAE has no codebook.
    """
    lab = task.lab()
    _introduce(lab, task.model)
    picture, latents = task.encoded(lab, image)
    try:
        usage = Usage.of(lab.vae, latents)
    except TypeError as error:
        expected = "--model must have a VAE with a codebook"
        raise UsageError(f"{expected}, got {task.model!r}; {one_line(error)}") from error
    size = len(usage.counts)
    used = size - usage.dead
    _say(
        "latents",
        f"{usage.ids.size} tokens, each one of {size} entries of {usage.codebook.shape[1]}",
    )
    _say("used", f"{used} entries, {used / size:.1%}; {usage.dead} are not in this picture")
    _say("perplexity", f"{usage.perplexity:.1f}, as if so many were equally frequent")
    for number, used_levels in enumerate(usage.levels):
        shown = ", ".join(f"{level:+.2f} ({count}x)" for level, count in used_levels.items())
        _say(f"number {number}", shown)
    most = ", ".join(f"{entry} ({usage.counts[entry]}x)" for entry in usage.most_used(min(8, used)))
    _say("most used", most)
    ids = usage.ids if usage.ids.ndim == 2 else usage.ids[0]
    task.save("tokens", _token_map(usage, ids))
    task.save("usage", _charts.ranking(usage.counts))
    cells = [_cell(Image.fromarray(to_uint8(picture)[0]), "picture")]
    for count in sorted({min(count, used) for count in counts} | {used}):
        drawn = lab.decode(usage.with_most_used(latents, count))
        cells.append(_cell(Image.fromarray(to_uint8(drawn)[0]), f"{count} entries"))
    task.save("few-entries", _on_white(cells, columns=min(4, len(cells))))


def _token_map(usage: Usage, ids: NDArray[np.int64]) -> Image.Image:
    """Each token in its entry's colour; entries that are alike have colours that are alike."""
    entries = PCADecoder().decode(usage.codebook.T[None, :, :, None])[0, :, 0]
    return _large(Image.fromarray(entries[ids]))


# --- pictures


def _large(image: Image.Image) -> Image.Image:
    """Enlarged with square pixels, to about the size of a cell."""
    times = max(1, _CELL_PX // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _cell(image: Image.Image, label: str, side_px: int = _CELL_PX) -> Cell:
    return Cell(with_longer_side(image, side_px), label)


def _on_white(cells: Sequence[Cell], columns: int) -> Image.Image:
    made = sheet(cells, columns, _GAP_PX)
    white = Image.new("RGB", (made.width + 2 * _GAP_PX, made.height + 2 * _GAP_PX), "white")
    white.paste(made, (_GAP_PX, _GAP_PX), made)
    return white


__all__ = [
    "BROKEN",
    "Task",
    "channel_sheet",
    "show_channels",
    "show_components",
    "show_factors",
    "show_interpolation",
    "show_round_trip",
    "show_tokens",
    "show_walk",
]
