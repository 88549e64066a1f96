"""Owns saying how near drawn pictures come to what they should be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from .decoders import LinearDecoder
from .factors import Factors


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


def compared(drawn: Tensor, wanted: Tensor) -> Score:
    """Both (B, 3, H, W) in [-1, 1]."""
    flat = wanted.mean(dim=(-2, -1), keepdim=True).expand_as(wanted)
    return Score(_psnr(drawn.nan_to_num(0.0).clamp(-1, 1), wanted), _psnr(flat, wanted))


def _psnr(drawn: Tensor, wanted: Tensor) -> float:
    errors = (drawn - wanted).square().flatten(1).mean(dim=1) / 4
    return float((-10 * errors.clamp_min(1e-10).log10()).mean())


def reduced(pictures: Tensor, latents: Tensor, upscale: int) -> Tensor:
    """Averaged to `upscale` pixels a side per latent."""
    height, width = (side * upscale for side in latents.shape[-2:])
    if pictures.shape[-2:] == (height, width):
        return pictures
    return functional.interpolate(pictures, (height, width), mode="area")
