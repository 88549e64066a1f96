"""Owns pictures and their latents: what a VAE is calibrated on, made or opened as needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from .factors import describe_vae
from .scores import Pair, Score, compared, reduced
from .share import Share
from .synthetic import dead_leaves
from .vae import VaeDecoder, VaeEncoder

HELD_OUT_EVERY: Final = 4
LARGEST_SIDE: Final = 512  # of the user's pictures; larger ones are reduced
FEWEST_LATENTS: Final = 12  # a side, of a synthetic picture
FEWEST_PICTURES: Final = 8

Picture = Tensor | Image.Image | str | os.PathLike[str]
Pictures = Tensor | Sequence[Picture] | str | os.PathLike[str]


@dataclass(frozen=True)
class Space:
    """A VAE's latent space, as far as fitting needs it."""

    vae: nn.Module
    channels: int
    ratio: int  # pixels a side per latent
    frames: int  # of a clip whose last latent frame is like most of a video; 1 for pictures
    is_video: bool
    device: torch.device
    can_encode: bool

    @classmethod
    def of(cls, vae: nn.Module) -> Space:
        """What one small picture, encoded (or one of zeros, decoded), says of the VAE.

        Raises:
            TypeError: it is no autoencoder of pictures.
        """
        encoder = VaeEncoder(vae)
        if not encoder.exists:
            return cls._without_encoder(vae)
        is_video = encoder.takes_video
        side = 128
        frames = 1 + _temporal_ratio(vae) if is_video else 1
        shape = (1, 3, frames, side, side) if is_video else (1, 3, side, side)
        latents = encoder.encode(torch.zeros(shape, device="cpu"))
        if latents.ndim != len(shape):
            raise TypeError(
                f"vae must encode pictures to (B, C, h, w), got {tuple(latents.shape)}; "
                "calibrate needs an image or video autoencoder"
            )
        ratio = round(side / latents.shape[-1])
        return cls(vae, latents.shape[1], ratio, frames, is_video, latents.device, True)

    @classmethod
    def _without_encoder(cls, vae: nn.Module) -> Space:
        key = describe_vae(vae)
        if key.latent_channels is None or not callable(getattr(vae, "decode", None)):
            raise TypeError(
                f"vae must be an autoencoder of pictures, got {type(vae).__name__}; pass pipe.vae"
            )
        side = 16
        latents = torch.zeros(1, key.latent_channels, side, side, device="cpu")
        problem = TypeError(
            f"vae must have an encoder if it is one of videos, got {type(vae).__name__} without; "
            "pass factors that were fitted with it"
        )
        try:
            pictures = VaeDecoder(vae).decode_float(latents)
        except (IndexError, RuntimeError, ValueError) as error:  # there is no axis of frames
            raise problem from error
        if pictures.ndim != 4:
            raise problem
        ratio = round(pictures.shape[-1] / side)
        return cls(vae, key.latent_channels, ratio, 1, False, pictures.device, False)

    def pair(self, batch: Tensor) -> Pair:
        """Pictures, (B, 3, H, W) or (B, 3, F, H, W), or latents where there is no encoder."""
        if not self.can_encode:
            decoded = VaeDecoder(self.vae).decode_float(batch)
            return Pair(decoded[:, :3].clamp(-1, 1), batch.to(decoded.device))
        latents = VaeEncoder(self.vae).encode(batch)
        if not self.is_video:
            return Pair(batch.to(latents.device), latents)
        # the first latent frame holds one picture, the others the mean of several
        groups = [batch[:, :, 0], batch[:, :, 1:].mean(dim=2)]
        pictures = torch.cat(groups[: latents.shape[2]]).to(latents.device)
        return Pair(pictures, torch.cat(latents.unbind(2)[:2]))

    def round_trip(self, pair: Pair) -> Score:
        """What the VAE's own decoder makes of the latents of one of them."""
        latents = pair.latents[:1]
        whole = latents[:, :, None] if self.is_video else latents
        decoded = VaeDecoder(self.vae).decode_float(whole)
        picture = decoded[:, :3, 0] if decoded.ndim == 5 else decoded[:, :3]
        return compared(reduced(picture, latents, 1), reduced(pair.pictures[:1], latents, 1))


def _temporal_ratio(vae: nn.Module) -> int:
    """Frames per latent frame, as far as the VAE says it."""
    for name in ("temporal_compression_ratio", "scale_factor_temporal"):
        # config first: diffusers warns about config values that are read as attributes
        for owner in (getattr(vae, "config", None), vae):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 4


class Source:
    """Batches of pictures, made or opened one at a time; a length for the progress bar."""

    def __init__(self, batches: Sequence[Picture], space: Space, words: str) -> None:
        self._batches, self._space, self.words = batches, space, words

    @classmethod
    def of(
        cls, images: Pictures | None, space: Space, seed: int, share: Share, *, few: bool = False
    ) -> Source:
        """The user's pictures, or synthetic ones; this process's share of them.

        Raises:
            ValueError: there are too few, or none in the folder, or they are no pictures, or the
                VAE cannot encode them.
        """
        if images is None:
            return cls._made(space, seed, share, few=few)
        if not space.can_encode:
            raise ValueError(
                f"images must be None for a VAE without an encoder, got {type(images).__name__}; "
                "leave it out to fit on made-up latents"
            )
        if isinstance(images, str | os.PathLike):
            images = picture_files(images)
        if isinstance(images, Tensor):
            _check_tensor(images)
        batches: Sequence[Picture] = list(images.split(1) if isinstance(images, Tensor) else images)
        if len(batches) < HELD_OUT_EVERY * share.count:
            raise ValueError(
                f"images must be at least {HELD_OUT_EVERY * share.count} pictures, got "
                f"{len(batches)}; leave it out to fit on synthetic ones"
            )
        return cls(batches[share.rank :: share.count], space, "pictures")

    @classmethod
    def _made(cls, space: Space, seed: int, share: Share, *, few: bool) -> Source:
        generator = torch.Generator().manual_seed(seed)
        is_quick = space.device.type != "cpu"
        side = -(-(256 if is_quick else 192) // space.ratio) * space.ratio
        side = max(side, FEWEST_LATENTS * space.ratio)
        pixels = (96 * 256**2 if is_quick else 32 * 192**2) / space.frames
        count = 4 if few else max(2 * FEWEST_PICTURES, round(pixels / side**2))
        if not space.can_encode:
            latents = _made_up_latents(space, count, generator)
            batches = latents.split(4 if count > 4 else 1)
            return cls(batches[share.rank :: share.count], space, "decoded latents")
        margin = 2 * space.frames  # what a moving picture needs beside it
        pictures = dead_leaves(count, side + margin, generator)
        if space.frames > 1:
            batches = tuple(_moving(pictures, space.frames, generator).split(1))
        else:
            batches = pictures[..., :side, :side].split(4 if count > 4 else 1)
        return cls(batches[share.rank :: share.count], space, f"synthetic {side}x{side} pictures")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            if isinstance(batch, Tensor) and (batch.ndim == 5 or not self._space.can_encode):
                yield batch
            else:
                yield self._fit(batch)

    def _fit(self, picture: Picture) -> Tensor:
        """Cut to whole latents, reduced if large; for a video VAE, a clip that stands still."""
        if isinstance(picture, str | os.PathLike):
            with Image.open(picture) as opened:
                opened.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))
                picture = opened.convert("RGB")
        if isinstance(picture, Image.Image):
            small = picture.convert("RGB")
            small.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
            picture = torch.from_numpy(np.array(small)).movedim(-1, 0)[None] / 127.5 - 1
        ratio = self._space.ratio
        height, width = (side // ratio * ratio for side in picture.shape[-2:])
        if not height or not width:
            raise ValueError(
                f"images must be at least {ratio} pixels a side for this VAE, got "
                f"{tuple(picture.shape[-2:])}; pass larger ones"
            )
        picture = picture[..., :height, :width].float()
        if not self._space.is_video:
            return picture
        return picture[:, :, None].repeat(1, 1, self._space.frames, 1, 1)


def _check_tensor(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be (B, 3, H, W) float in [-1, 1], got {tuple(images.shape)} "
            f"{images.dtype}; bytes are `images / 127.5 - 1`"
        )
    if float(images.abs().amax()) > 1.5:  # a little beyond is a filter's overshoot
        raise ValueError(
            f"images must be in [-1, 1], got values up to {float(images.abs().amax()):g}; bytes "
            "are `images / 127.5 - 1`"
        )


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All files in a folder that look like pictures, by name.

    Raises:
        ValueError: it is no folder, or there is no picture in it.
    """
    known = {name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    found = [file for file in files if file.suffix.lower() in known]
    if not found:
        raise ValueError(
            f"images must be a folder with pictures, got {os.fspath(folder)!r}; "
            "leave it out to fit on synthetic ones"
        )
    return found


def _moving(pictures: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Clips that pan over larger pictures: (B, 3, H + 2F, W + 2F) to (B, 3, F, H, W)."""
    height, width = (side - 2 * frames for side in pictures.shape[-2:])
    speeds = torch.rand(len(pictures), 2, generator=generator, device="cpu") * 2
    clips = []
    for picture, speed in zip(pictures, speeds.tolist(), strict=True):
        corners = [(round(speed[0] * k), round(speed[1] * k)) for k in range(frames)]
        clips.append(
            torch.stack([picture[:, y : y + height, x : x + width] for y, x in corners], 1)
        )
    return torch.stack(clips)


def _made_up_latents(space: Space, count: int, generator: torch.Generator) -> Tensor:
    """Latents with the statistics that the VAE states, smooth in some places and rough in others.

    A diffusion model's latents have a standard deviation of one in sampler space.
    """
    key = describe_vae(space.vae)
    side = 24
    pictures = dead_leaves(-(-count * space.channels // 3), side * 2, generator)
    planes = functional.avg_pool2d(pictures, 2).reshape(-1, side, side)[: count * space.channels]
    noise = torch.randn(planes.shape, generator=generator, device="cpu", dtype=torch.float32)
    planes = planes + 0.2 * noise
    latents = planes.reshape(count, space.channels, side, side)
    latents = (latents - latents.mean()) / latents.std()
    statistics = (key.latents_mean or (), key.latents_std or ())
    if [len(values) for values in statistics] == [space.channels] * 2:
        mean, std = (
            torch.tensor(values, device="cpu", dtype=torch.float32)[:, None, None]
            for values in statistics
        )
        return latents * std + mean
    return latents / key.scaling_factor + key.shift_factor
