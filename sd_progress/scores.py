"""Owns saying how near drawn pictures come to what they should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from .decoders import Decoder, LinearDecoder
from .factors import Factors

BEST_DB: Final = 100.0
# Of flat pictures: those that really are flat must not outweigh all others.
BEST_FLAT_DB: Final = 40.0


@dataclass(frozen=True)
class Score:
    """How near some pictures come to what they should be, means over pictures in dB of PSNR.

    Attributes:
        psnr_db: of the pictures.
        flat_db: of the best single colour for each picture, which is no preview at all.
    """

    psnr_db: float
    flat_db: float

    @property
    def gain_db(self) -> float:
        """What is won over flat pictures."""
        return self.psnr_db - self.flat_db

    def __str__(self) -> str:
        return f"{self.psnr_db:.1f} dB, where flat pictures have {self.flat_db:.1f} dB"


@dataclass(frozen=True)
class Pair:
    """Pictures (B, 3, H, W) in [-1, 1] and their latents (B, C, h, w), on one device."""

    pictures: Tensor
    latents: Tensor


def scored(factors: Factors, pair: Pair, upscale: int) -> Score:
    """How near a map comes to the pictures, at its own resolution."""
    drawn = LinearDecoder(factors).decode_float(pair.latents.cpu())
    return compared(drawn, reduced(pair.pictures, pair.latents, upscale).cpu())


def scored_decoder(decoder: Decoder, pair: Pair) -> Score:
    """How near any decoder comes to the pictures, at one pixel per latent."""
    latents = pair.latents.float().cpu()
    drawn = torch.from_numpy(decoder.decode(latents)).movedim(-1, 1) / 127.5 - 1
    return compared(reduced(drawn, latents, 1), reduced(pair.pictures.cpu(), latents, 1))


def compared(drawn: Tensor, wanted: Tensor) -> Score:
    """Both (B, 3, H, W) in [-1, 1]."""
    flat = wanted.mean(dim=(-2, -1), keepdim=True).expand_as(wanted)
    psnr_db = _psnr(drawn.nan_to_num(0.0).clamp(-1, 1), wanted, BEST_DB)
    return Score(psnr_db, _psnr(flat, wanted, BEST_FLAT_DB))


def _psnr(drawn: Tensor, wanted: Tensor, best_db: float) -> float:
    errors = (drawn - wanted).square().flatten(1).mean(dim=1) / 4
    return float((-10 * errors.clamp_min(10 ** (-best_db / 10)).log10()).mean())


def reduced(pictures: Tensor, latents: Tensor, upscale: int) -> Tensor:
    """Averaged to `upscale` pixels a side per latent."""
    height, width = (side * upscale for side in latents.shape[-2:])
    if pictures.shape[-2:] == (height, width):
        return pictures
    return functional.interpolate(pictures, (height, width), mode="area")
