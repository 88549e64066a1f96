"""Owns the pictures that a VAE is calibrated on where there are no photographs."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

# Found by measuring: fits on these pictures alone, scored on sixty photographs.
TEMPLATES: Final = 16  # arrangements of leaves; pictures that share one differ in all colours
LAYERS: Final = 6.0  # leaves over each point
SMALLEST_RADIUS: Final = 2.0  # pixels
LARGEST_RADIUS: Final = 0.5  # of the picture's side
FAVOUR_LARGE: Final = 1.4  # how much more an octave of sizes covers than the next smaller one
SQUARES: Final = 0.4  # the share of leaves with corners
BLUR_RADIUS: Final = 3


def dead_leaves(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Overlapping shapes of all sizes, with the edges, colours and textures of natural pictures.

    Sizes follow an inverse power law, which makes pictures that look the same at every scale, as
    natural ones do (the dead-leaves model: Lee, Mumford and Huang, 2001). Contrast, saturation and
    sharpness differ from picture to picture.

    Args:
        count: pictures.
        size: pixels a side.
        generator: of the CPU; the only randomness used.

    Returns:
        (count, 3, size, size) float32 in [-1, 1], on the CPU.
    """
    leaves, kinds = _templates(min(TEMPLATES, count), size, generator)
    top = leaves[torch.arange(count, device="cpu") % len(leaves)]
    contrast = 0.1 + 0.5 * _uniform(generator, count, 1)
    colours, roughness, shading = _surfaces(count, kinds, contrast, generator)
    grain = _natural_noise(count, 3, size, 1.0, generator)
    grain = grain[:, :1] + 0.3 * grain
    shade = _natural_noise(count, 1, size, 2.0, generator)
    pictures = (
        _painted(colours, top, size)
        + _painted(roughness, top, size) * grain
        + _painted(shading, top, size) * shade
    )
    return _blurred(_mirrored(pictures, generator), generator).clamp(-1, 1)


def _templates(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Which leaf is on top of each pixel, (count, size * size) int64, and how many there are."""
    radii = _radii(size, generator)
    numbers = _uniform(generator, 5, count, len(radii))
    left, upper = numbers[0] * size, numbers[1] * size
    cosine, sine = (numbers[2] * math.tau).cos(), (numbers[2] * math.tau).sin()
    aspect, is_square = 0.4 + 0.6 * numbers[3], numbers[4] < SQUARES
    first = (torch.arange(count, device="cpu") * size * size)[:, None, None]
    top = torch.full((count * size * size,), len(radii), device="cpu")
    for leaf, radius in enumerate(radii.tolist()):
        reach = math.ceil(radius)
        around = torch.arange(-reach, reach + 1, device="cpu")
        x = left[:, leaf].long()[:, None] + around  # (count, 2 * reach + 1)
        y = upper[:, leaf].long()[:, None] + around
        dx, dy = (x - left[:, leaf, None])[:, None, :], (y - upper[:, leaf, None])[:, :, None]
        c, s = cosine[:, leaf, None, None], sine[:, leaf, None, None]
        along = (dx * c + dy * s).abs()
        across = (dy * c - dx * s).abs() / aspect[:, leaf, None, None]
        away = torch.where(
            is_square[:, leaf, None, None],
            1.25 * torch.maximum(along, across),
            torch.hypot(along, across),
        )
        on_picture = ((x >= 0) & (x < size))[:, None, :] & ((y >= 0) & (y < size))[:, :, None]
        where = first + y[:, :, None] * size + x[:, None, :]
        top[where[(away < radius) & on_picture]] = leaf
    return top.view(count, size * size), len(radii) + 1


def _radii(size: int, generator: torch.Generator) -> Tensor:
    """Of all leaves in one picture, in the order in which they fall."""
    largest = max(LARGEST_RADIUS * size, 2 * SMALLEST_RADIUS)
    octaves = max(1, round(math.log2(largest / SMALLEST_RADIUS)))
    ratio = (largest / SMALLEST_RADIUS) ** (1 / octaves)
    drawn = []
    for octave in range(octaves):
        low = SMALLEST_RADIUS * ratio**octave
        few, many = (low * ratio) ** -2, low**-2
        area = 0.7 * math.pi * 2 * math.log(ratio) / (many - few)
        share = FAVOUR_LARGE ** (octave - octaves / 2) / octaves
        leaves = max(1, round(LAYERS * share * size * size / area))
        drawn.append((many - _uniform(generator, leaves) * (many - few)).rsqrt())
    radii = torch.cat(drawn)
    return radii[torch.randperm(len(radii), generator=generator, device="cpu")]


def _surfaces(
    count: int, kinds: int, contrast: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each leaf: colour (count, 3, kinds), grain and shading (count, 1, kinds)."""
    saturation = 0.2 * _uniform(generator, count, 1)
    brightness = 0.7 * _uniform(generator, count, 1) - 0.35
    tint = 0.15 * _normal(generator, 2, count, 1)
    luma = brightness + contrast * (2 * _uniform(generator, count, kinds) - 1)
    magenta = tint[0] + 0.6 * saturation * _normal(generator, count, kinds)
    warmth = tint[1] + saturation * _normal(generator, count, kinds)  # from blue to yellow
    red = luma + 0.5 * warmth + 0.5 * magenta
    colours = torch.stack([red, luma - 0.5 * magenta, luma - warmth + 0.2 * magenta], dim=1)
    rough = 0.4 * _uniform(generator, count, 1) * _uniform(generator, count, kinds).square()
    shading = 0.3 * contrast * _normal(generator, count, kinds)
    return colours, rough[:, None], shading[:, None]


def _painted(values: Tensor, top: Tensor, size: int) -> Tensor:
    """Each leaf's (B, C, kinds) on its pixels: (B, C, size, size)."""
    pixels = values.gather(2, top[:, None].expand(-1, values.shape[1], -1))
    return pixels.reshape(*pixels.shape[:2], size, size)


def _natural_noise(
    count: int, channels: int, size: int, exponent: float, generator: torch.Generator
) -> Tensor:
    """Noise whose amplitude falls with frequency, of unit variance: (count, channels, size, size).

    With an exponent of 1 it has the spectrum of natural pictures.
    """
    across, down = (
        frequencies(size, device="cpu", dtype=torch.float32)
        for frequencies in (torch.fft.rfftfreq, torch.fft.fftfreq)
    )
    amplitude = torch.hypot(down[:, None], across[None])
    amplitude[0, 0] = math.inf  # no mean
    white = _normal(generator, count, channels, size, size)
    noise: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) / amplitude**exponent, s=(size, size))
    return noise / noise.std(dim=(-2, -1), keepdim=True)


def _mirrored(pictures: Tensor, generator: torch.Generator) -> Tensor:
    for axis in (-1, -2):
        is_flipped = _uniform(generator, len(pictures), 1, 1, 1) < 0.5
        pictures = torch.where(is_flipped, pictures.flip(axis), pictures)
    return pictures


def _blurred(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """From sharp to a little out of focus, each picture by its own measure."""
    deviation = 0.25 + _uniform(generator, len(pictures), 1)
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device="cpu")
    kernel = torch.exp(-(offsets**2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    planes = functional.pad(pictures.flatten(0, 1)[None], (BLUR_RADIUS,) * 4, mode="replicate")
    planes = functional.conv2d(planes, kernel[:, None, None, :], groups=planes.shape[1])
    planes = functional.conv2d(planes, kernel[:, None, :, None], groups=planes.shape[1])
    return planes.view_as(pictures)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
