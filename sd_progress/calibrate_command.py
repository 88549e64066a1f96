"""Owns `sd-progress calibrate`: a map is fitted for a model's VAE, kept, and shown."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, cast

import diffusers
import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from . import factors
from ._animation import png_bytes
from ._files import publish, temporary_path, write_temporary
from ._sheet import Cell, sheet, with_longer_side
from .arguments import UsageError
from .calibration import CalibrationError, calibrate, picture_files
from .decoders import Decoder, LinearDecoder, PCADecoder
from .factors import Factors
from .generate import (
    device_named,
    dtype_named,
    is_model_folder,
    loading_options,
    no_model,
    one_line,
    quietly,
)
from .latent_space import HELD_OUT_EVERY, Source, Space
from .layouts import VAE_ATTRIBUTES
from .pixels import to_uint8
from .scores import Pair, Score, compared, reduced
from .share import Share
from .vae import VaeDecoder

_ROWS: Final = 4  # of the picture
_SIDE_PX: Final = 256
_GAP_PX: Final = 8
_JOINING: Final = timedelta(minutes=30)  # the first process may have a model to download


@dataclass(frozen=True)
class Task:
    """What to calibrate, how, and where to put it.

    Attributes:
        model: a Hub id or a folder, of a pipeline or of a VAE.
        images: a folder; None for synthetic pictures.
        device: `"auto"`, or what `torch.device` takes.
        dtype: `"auto"` or a key of `generate.DTYPES`.
        out: the map's file, unless one is there already.
        picture: the file of what it looks like; None puts it beside `out`.
    """

    model: str
    images: Path | None
    kernel_size: int
    upscale: int
    degree: int
    hidden_units: int
    seed: int
    device: str
    dtype: str
    out: Path
    picture: Path | None


def calibrate_model(task: Task) -> None:
    """Fit a map, write it and what it looks like, and print how good it is.

    Of several processes, the first one checks and loads before the others do, so that what is
    wrong is told once; and it alone writes and prints.

    Raises:
        UsageError: the task cannot be done as it is, or the map would be of no use.
    """
    processes = Processes.of(os.environ)
    device = _device(task.device, processes)
    if processes.is_first:
        _check(task, processes)
        vae = _loaded(task, device)
        print(f"Calibrating {type(vae).__name__} of {task.model} ({vae.device}).", flush=True)
    with processes.joined(device) as group:
        if not processes.is_first:
            vae = _loaded(task, device)
        began_s = time.monotonic()
        found = _calibrated(task, vae, group, processes)
        took_s = time.monotonic() - began_s
    if processes.is_first:
        comparison = Comparison.of(found, vae, task.images, task.seed)
        out, picture = _written(task, found, comparison)
        print(f"Done in {took_s:.1f} s.\n{_told(found, comparison)}")
        print(f"  map        {out}\n  picture    {picture}")
        print(f'To use it: PreviewCallback(pipe, "steps/", decoder="{out}")', flush=True)


# --- the model


def load_vae(
    model: str,
    dtype: torch.dtype,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """A model's autoencoder, on the CPU.

    Args:
        model: a Hub id or a folder, of a pipeline or of an autoencoder alone.
        dtype: of its weights.
        subfolder: where in the model it is; None looks for it.
        revision: of a Hub id; None takes the newest.
        token: of the Hub; None takes the one that this machine is logged in with.

    Raises:
        UsageError: there is no such model, or it has no autoencoder.
    """
    is_folder = is_model_folder(model, "model_index.json", "config.json")
    try:
        with quietly(is_quick=is_folder):
            hub = {"revision": revision, "token": token}
            place = {"subfolder": subfolder or _subfolder(model, hub), **hub}
            config = AutoencoderKL.load_config(model, **place)  # of any class
            kind = config.get("_class_name", config.get("model_type"))
            if not hasattr(getattr(diffusers, str(kind), None), "decode"):
                raise UsageError(
                    f"--model must be a pipeline or an autoencoder of diffusers, got {model!r}, "
                    f"which is a {kind}; choose another model"
                )
            return cast(
                nn.Module, AutoModel.from_pretrained(model, **place, **loading_options(dtype))
            )
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(no_model(model, one_line(error))) from error


def _subfolder(model: str, hub: Mapping[str, str | None]) -> str | None:
    """Where a pipeline has its autoencoder; None for what is no pipeline."""
    try:
        index = DiffusionPipeline.load_config(model, **hub)
    except OSError:
        return None
    for name in VAE_ATTRIBUTES:
        if index.get(name, (None, None))[1] is not None:
            return name
    raise UsageError(
        f"--model must have an autoencoder, got {model!r}, a {index.get('_class_name')} without "
        f"{', '.join(VAE_ATTRIBUTES)}; its previews need no map, or there can be none"
    )


def _loaded(task: Task, device: torch.device) -> nn.Module:
    return load_vae(task.model, dtype_named(task.dtype, device)).to(device)


# --- several processes


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, as `torchrun` says."""

    rank: int
    local_rank: int
    count: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Processes:
        """From its environment variables; one process where there are none."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if not set(names) <= set(environment):
            return cls(0, 0, 1)
        return cls(*(int(environment[name]) for name in names))

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[dist.ProcessGroup | None]:
        """The group of all of them; None where there is only one."""
        if self.count == 1:
            yield None
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_JOINING)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


def _device(name: str, processes: Processes) -> torch.device:
    device = device_named(name)
    if processes.count == 1:
        return device
    if device.type not in ("cuda", "cpu") or device.index is not None:
        raise UsageError(
            f"--device must be auto, cuda or cpu under torchrun, got {name!r}, which is {device}; "
            "each process takes a GPU of its own"
        )
    return torch.device("cuda", processes.local_rank) if device.type == "cuda" else device


# --- before and after


def _check(task: Task, processes: Processes) -> None:
    """What can be known before anything is loaded."""
    if task.hidden_units and processes.count > 1:
        raise UsageError(
            f"--hidden_units must be 0 under torchrun, got {task.hidden_units}; "
            "run the command without it"
        )
    if task.images is not None:
        try:
            picture_files(task.images)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    for flag, path in (("--out", task.out), ("--picture", _picture(task))):
        folder = next(folder for folder in path.parents if folder.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(
                f"{flag} must be a file that can be made, got {str(path)!r}; "
                f"{str(folder)!r} is no folder that can be written to"
            )


def _calibrated(
    task: Task, vae: nn.Module, group: dist.ProcessGroup | None, processes: Processes
) -> Factors:
    try:
        return calibrate(
            vae,
            kernel_size=task.kernel_size,
            upscale=task.upscale,
            degree=task.degree,
            hidden_units=task.hidden_units,
            images=task.images,
            name=task.out.stem,
            seed=task.seed,
            progress=processes.is_first,
            group=group,
        )
    except CalibrationError as error:
        if not processes.is_first:  # all have the same one
            raise SystemExit(2) from error
        raise UsageError(f"no map was fitted: {error}") from error
    except TypeError as error:
        expected = "--model must have an autoencoder of pictures"
        raise UsageError(f"{expected}, got {task.model!r}; {one_line(error)}") from error
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    except OSError as error:
        expected = "--images must be pictures that can be read"
        raise UsageError(f"{expected}, got {str(task.images)!r}; {one_line(error)}") from error


def _picture(task: Task) -> Path:
    return task.out.with_suffix(".png") if task.picture is None else task.picture


def _written(task: Task, found: Factors, comparison: Comparison) -> tuple[Path, Path]:
    """Both files, under their own names or with a number added."""
    wanted = _picture(task)
    try:
        task.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(task.out.parent)
        factors.save(found, temporary)
        out = publish(temporary, task.out)
        picture = publish(write_temporary(wanted.parent, png_bytes(comparison.sheet())), wanted)
    except (OSError, SafetensorError) as error:
        expected = "--out and --picture must be files that can be made"
        raise UsageError(
            f"{expected}, got {str(task.out)!r} and {str(wanted)!r}; {one_line(error)}"
        ) from error
    return out, picture


def _told(found: Factors, comparison: Comparison) -> str:
    """One line each for what it was fitted on, what it is and how good it is."""
    taps, pixels = found.kernel_size, found.upscale
    before = "principal components, whose colours mean nothing"
    if comparison.row is not None:
        before = f"{comparison.before.psnr_db:.1f} dB with {comparison.row.name!r}"
    lines = {
        "fitted on": found.provenance.partition(": ")[2],
        "draws": f"{pixels}x{pixels} pixels of {taps}x{taps} latents, {found.kind}, "
        f"{found.parameters} numbers",
        "held out": f"{found.psnr_db:.1f} dB on {comparison.count} pictures, where one colour each "
        f"has {comparison.before.flat_db:.1f} dB",
        "before": before,
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items())


@dataclass(frozen=True)
class Comparison:
    """A map beside what was shown before, on the pictures that were held out.

    In the end `calibrate` fits the map to these, too: where pictures are few, its decibels in the
    cells are a little better than its `psnr_db`, which it had before that.

    Attributes:
        row: what was found for the VAE before; None for principal components.
        before: how good that is, at the map's own resolution.
        count: how many pictures were held out.
        cells: of the first of them, one after the other: the picture, before, after, the VAE.
    """

    row: Factors | None
    before: Score
    count: int
    cells: tuple[Cell, ...]

    @classmethod
    def of(
        cls,
        found: Factors,
        vae: nn.Module,
        images: Path | None,
        seed: int,
        row: Factors | None = None,
    ) -> Comparison:
        """Draw and score them all.

        Args:
            found: the map.
            vae: what it was fitted for.
            images: that it was fitted on, as `calibrate` was given them.
            seed: as `calibrate` was given it.
            row: what to compare with; left out, what is found for the VAE.
        """
        space = Space.of(vae)
        row = factors.find(vae) if row is None else row
        before: Decoder = PCADecoder() if row is None else LinearDecoder(row)
        columns = (before, LinearDecoder(found), _WholeVae(space))
        names = ("pca" if row is None else row.name, "new map", "VAE")
        count, scores = 0, []
        cells: list[Cell] = []
        batches = held_out(space, images, seed)
        for batch in tqdm(batches, "compare", len(batches), unit="batch", leave=False):
            pair = space.pair(batch)
            scores.append(_drawn(before, pair, found.upscale)[1])
            count += len(pair.latents)
            for one in _singly(pair)[: _ROWS - len(cells) // (len(columns) + 1)]:
                drawn = [_drawn(decoder, one, found.upscale) for decoder in columns]
                cells.append(_cell(to_uint8(one.pictures.cpu()), one, "picture"))
                for name, (pixels, score) in zip(names, drawn, strict=True):
                    cells.append(_cell(pixels, one, f"{name} {score.psnr_db:.1f} dB"))
        return cls(row, Share(None).mean(scores), count, tuple(cells))

    def sheet(self) -> Image.Image:
        """All cells, a row for each picture, on white."""
        made = sheet(self.cells, columns=4, gap_px=_GAP_PX)
        white = Image.new("RGB", (made.width + 2 * _GAP_PX, made.height + 2 * _GAP_PX), "white")
        white.paste(made, (_GAP_PX, _GAP_PX), made)
        return white


def held_out(space: Space, images: Path | None, seed: int) -> Source | list[Tensor]:
    """The batches that `calibrate` scores on."""
    every = slice(HELD_OUT_EVERY - 1, None, HELD_OUT_EVERY)
    if images is None:
        return list(Source.of(None, space, seed, Share(None)))[every]
    return Source(picture_files(images)[every], space, "pictures")


class _WholeVae:
    """The VAE itself, as a decoder of single frames."""

    name = "vae"

    def __init__(self, space: Space) -> None:
        self._space = space

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) -> (B, H, W, 3)."""
        whole = latents[:, :, None] if self._space.is_video else latents
        decoded = VaeDecoder(self._space.vae).decode_float(whole)
        return to_uint8((decoded[:, :, 0] if decoded.ndim == 5 else decoded)[:, :3].cpu())


def _singly(pair: Pair) -> list[Pair]:
    parts = zip(pair.pictures.split(1), pair.latents.split(1), strict=True)
    return [Pair(picture, latents) for picture, latents in parts]


def _drawn(decoder: Decoder, pair: Pair, upscale: int) -> tuple[NDArray[np.uint8], Score]:
    """What a decoder makes of the latents, and how near it comes at this many pixels per latent."""
    drawn = decoder.decode(pair.latents.float().cpu())
    wanted = reduced(pair.pictures, pair.latents, upscale).cpu()
    size = wanted.shape[-2:]
    images = torch.from_numpy(drawn).movedim(-1, 1) / 127.5 - 1
    if images.shape[-1] > size[-1]:
        images = functional.interpolate(images, size, mode="area")
    elif images.shape[-1] < size[-1]:
        images = functional.interpolate(images, size, mode="bicubic")
    return drawn, compared(images, wanted)


def _cell(pixels: NDArray[np.uint8], pair: Pair, label: str) -> Cell:
    """At the size of all others, whatever was drawn."""
    size = pair.pictures.shape[-1], pair.pictures.shape[-2]
    image = Image.fromarray(pixels[0]).resize(size, Image.Resampling.BICUBIC)
    return Cell(with_longer_side(image, _SIDE_PX), label)
