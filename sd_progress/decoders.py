"""Owns how VAE-space latents become pixels on the cheap: linear maps, principal components."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .factors import Array, Factors, Hidden, Polynomial, monomials
from .pixels import rounded, to_uint8

# Where one product of matrices is faster than a convolution; measured on two cores of a CPU.
MOST_TAPS: Final = 80  # outputs times kernel
FEWEST_CHANNELS: Final = 16


@runtime_checkable
class Decoder(Protocol):
    """VAE-space latents to pixels; called from one worker thread.

    In the order of the steps; where it lags behind and a target wants the newest, that comes first.
    """

    @property
    def name(self) -> str:
        """What `Frame.decoder` says, for example `"linear:sd1"`."""

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU, VAE-space -> (B, H, W, 3) uint8 RGB."""


class LinearDecoder:
    """RGB by one small convolution, a few thousand times cheaper than the VAE.

    Args:
        factors: the map; what its `extra` adds is computed, too.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self._to_levels = _convolution(127.5 * factors.weight, 127.5 * factors.bias + 127.5)
        self._convolve = _convolution(factors.weight, factors.bias)
        self._more = _extra_part(factors.extra, factors.latent_channels)

    @property
    def name(self) -> str:
        """The kind of the factors, a colon, and their name, for example `"linear:sd1"`."""
        return f"{self.factors.kind}:{self.factors.name}"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, h * upscale, w * upscale, 3) uint8.

        Raises:
            ValueError: the channel count is not the factors'.
        """
        if self._more is not None:
            return to_uint8(self.decode_float(latents))
        levels = self._to_levels(self._padded(latents))
        upscale = self.factors.upscale
        return rounded(levels if upscale == 1 else functional.pixel_shuffle(levels, upscale))

    def decode_float(self, latents: Tensor) -> Tensor:
        """What `decode` rounds: (B, 3, h * upscale, w * upscale) float32, nominally [-1, 1]."""
        padded = self._padded(latents)
        rgb = self._convolve(padded)  # (B, 3 * s * s, h, w)
        if self._more is not None:
            rgb = rgb + self._more(latents.float(), padded)
        return functional.pixel_shuffle(rgb, self.factors.upscale)

    def _padded(self, latents: Tensor) -> Tensor:
        if latents.shape[1] != self.factors.latent_channels:
            raise ValueError(
                f"latents must be (B, {self.factors.latent_channels}, h, w) for factors "
                f"{self.factors.name!r}, got {tuple(latents.shape)}; pass decoder='auto'"
            )
        margin = self.factors.kernel_size // 2
        # replicated, because a border of zeros is grey only in sampler space
        bare = latents.float()
        return functional.pad(bare, (margin,) * 4, mode="replicate") if margin else bare


def _convolution(weights: Array, biases: Array) -> Callable[[Tensor], Tensor]:
    """`conv2d` with factors' weight and bias, as fast as this machine does it.

    From many channels to few outputs, all taps at once as one product of matrices, then shifted and
    added, take less than half of the time of torch's `conv2d` on one core of a CPU.
    """
    weight, bias = torch.from_numpy(weights), torch.from_numpy(biases)
    outputs, channels, side, _ = weight.shape
    if side == 1 or outputs * side**2 > MOST_TAPS or channels < FEWEST_CHANNELS:
        return lambda padded: functional.conv2d(padded, weight, bias)
    taps = weight.permute(2, 3, 0, 1).reshape(-1, channels).contiguous()

    def convolve(padded: Tensor) -> Tensor:
        batch, _, height, width = padded.shape
        height, width = height - side + 1, width - side + 1
        rgb = bias[:, None, None].expand(batch, -1, height, width).clone()
        for one, drawn in zip(padded, rgb, strict=True):
            planes = (taps @ one.flatten(1)).view(side, side, outputs, *one.shape[1:])
            for y, x in itertools.product(range(side), repeat=2):
                drawn += planes[y, x, :, y : y + height, x : x + width]
        return rgb

    return convolve


def _extra_part(
    extra: Polynomial | Hidden | None, channels: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What is added to the affine part: a function of the latents, bare and padded."""
    if extra is None:
        return None
    weight = torch.from_numpy(extra.weight)[:, :, None, None]
    if isinstance(extra, Polynomial):
        degree = extra.degree
        return lambda bare, padded: functional.conv2d(products(bare, degree), weight)
    kernel, bias = torch.from_numpy(extra.kernel), torch.from_numpy(extra.bias)
    return lambda bare, padded: functional.conv2d(
        functional.conv2d(padded, kernel, bias).relu(), weight
    )


def products(latents: Tensor, degree: int) -> Tensor:
    """(B, C, h, w) -> (B, M, h, w): the `monomials` of each pixel."""
    columns = _padded_monomials(latents.shape[1], degree).to(latents.device)
    with_one = functional.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0)
    first, second, third = (with_one[:, column] for column in columns.unbind(1))
    return first.mul_(second) if degree == 2 else first.mul_(second).mul_(third)


@functools.cache
def _padded_monomials(channels: int, degree: int) -> Tensor:
    """(M, 3) channel numbers; `channels` itself, where a one stands, for the absent factor."""
    rows = [(*row, channels)[:3] for row in monomials(channels, degree)]
    return torch.tensor(rows, device="cpu")


class PixelDecoder:
    """Nothing to decode: pipelines in pixel space step the picture itself."""

    name = "pixels"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, 3, H, W) float, nominally [-1, 1] -> (B, H, W, 3) uint8; one channel is grey."""
        colours = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
        return to_uint8(colours.float())


class ChannelsDecoder:
    """Each latent channel in grey, side by side: for those who study latents.

    The channels of one picture share black and white: two and a half deviations of all of them.
    """

    name = "channels"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, rows * h, columns * w, 3) uint8, by channel."""
        batch, channels, height, width = latents.shape
        columns = math.ceil(math.sqrt(channels))
        rows = math.ceil(channels / columns)
        values = latents.float().nan_to_num(0.0, 0.0, 0.0)
        centre = values.mean(dim=(1, 2, 3), keepdim=True)
        spread = values.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
        grey = (values - centre) / (2.5 * spread)
        missing = rows * columns - channels
        cells = functional.pad(grey, (0, 0, 0, 0, 0, missing), value=-1.0)
        sheet = cells.reshape(batch, rows, columns, height, width).transpose(2, 3)
        return to_uint8(
            sheet.reshape(batch, 1, rows * height, columns * width).expand(-1, 3, -1, -1)
        )


class PCADecoder:
    """The first three principal components of the latents as RGB: an honest stand-in.

    Shapes are right, colours mean nothing. The components are those of all latents seen so far in
    the run, each kept pointing the way it did before, so colours do not flicker.
    """

    name = "pca"

    def __init__(self) -> None:
        self._count = 0.0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None
        self._axes: Tensor | None = None

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, h, w, 3) uint8; of one channel, in grey."""
        pixels = latents.double().movedim(1, -1)  # (B, h, w, C)
        rows = pixels.reshape(-1, pixels.shape[-1])
        finite = rows[rows.isfinite().all(dim=1)]
        mean, axes, spread = self._components(finite if len(finite) else torch.zeros_like(rows))
        rgb = (pixels - mean) @ axes / (2.5 * spread)  # two and a half deviations fill the range
        if rgb.shape[-1] == 1:
            rgb = rgb.expand(*rgb.shape[:-1], 3)
        missing = 3 - rgb.shape[-1]
        return to_uint8(functional.pad(rgb, (0, missing)).movedim(-1, 1).float())

    def _components(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), up to three axes (C, 3) and their standard deviations (3,), of all so far."""
        if self._sum is None or self._products is None or len(self._sum) != rows.shape[1]:
            self._count, self._axes = 0.0, None
            self._sum = torch.zeros(rows.shape[1], dtype=torch.double, device="cpu")
            self._products = torch.outer(self._sum, self._sum)
        self._count += len(rows)
        self._sum += rows.sum(dim=0)
        self._products += rows.T @ rows
        mean = self._sum / self._count
        variances, axes = torch.linalg.eigh(self._products / self._count - mean.outer(mean))
        variances, axes = variances.flip(0)[:3], axes.flip(1)[:, :3]
        if self._axes is not None:
            axes = axes * torch.where((axes * self._axes).sum(dim=0) < 0, -1.0, 1.0)
        self._axes = axes
        return mean, axes, variances.clamp_min(1e-12).sqrt()
