"""Owns the guess for pipelines that no layout is known for: from shapes, the VAE, and the size."""

from __future__ import annotations

import math

from torch import Tensor

from . import operations as op
from .operations import Reading

_SIZE = ("height", "width")
_VIDEO_GRID = ("latent_num_frames", "latent_height", "latent_width")
INFERRED_READS = (*_SIZE, "num_frames", *_VIDEO_GRID)


def infer(latents: Tensor, reading: Reading) -> Tensor | None:
    """Latents of any known kind of layout -> VAE space.

    Plain and channels-last images, images patchified or packed in 1x1 or 2x2 patches, videos in any
    order of axes or as tokens, for image and video VAEs; normalised as the VAE's config and buffers
    say.

    Args:
        latents: as the pipeline steps them.
        reading: the VAE's statistics; height and width in pixels, number of frames and the sides of
            the latent grid where the call has them.

    Returns:
        (B, C, h, w) or (B, C, F, h, w); None where no layout fits the shape.
    """
    channels = reading.statistics.latent_channels
    if channels is None:
        return None
    aligned = _channels_second(latents, channels, reading)
    if aligned is None:
        return None
    patch = math.isqrt(aligned.shape[1] // channels)
    if patch > 1 and aligned.ndim == 5:
        return None
    if _is_per_patch(reading, channels):  # batch-norm statistics of 2x2 patches
        if patch == 1:
            aligned, patch = op.patchified(aligned, reading), 2
        aligned = op.standardised(aligned, reading)
    image = op.unpatchified(aligned, reading) if patch == 2 else aligned
    return _normalised(_for_vae(image, reading), reading, channels)


def _channels_second(latents: Tensor, channels: int, reading: Reading) -> Tensor | None:
    """(B, C, ...), or (B, 4C, ...) where 2x2 patches are in the channels; None if it is neither."""
    known = (channels, 4 * channels)
    if latents.ndim == 3 and latents.shape[2] in known:
        return _on_grid(latents, reading)
    if latents.ndim == 4:
        axes = (axis for axis in (1, 3) if latents.shape[axis] in known)
    elif latents.ndim == 5:
        axes = (axis for axis in (1, 2, 4) if latents.shape[axis] == channels)
    else:
        return None
    axis = next(axes, None)
    return None if axis is None else latents.movedim(axis, 1)


def _on_grid(tokens: Tensor, reading: Reading) -> Tensor | None:
    """(B, N, D) -> (B, D, rows, columns), with the aspect ratio of the picture; or with frames."""
    count, frames = tokens.shape[1], reading.optional("num_frames")
    if reading.statistics.is_video and isinstance(frames, int) and frames > 1:
        return _on_video_grid(tokens, reading)
    height, width = (reading.optional(name) for name in _SIZE)
    if not isinstance(height, int) or not isinstance(width, int) or height < 1 or width < 1:
        return None
    rows = round(math.sqrt(count * height / width))
    if rows < 1 or count % rows or abs(count // rows - rows * width / height) >= 1:
        return None
    return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, count // rows)


def _on_video_grid(tokens: Tensor, reading: Reading) -> Tensor | None:
    """(B, N, D) -> (B, D, F, h, w), where the call has these as numbers and N is their product."""
    grid = [side for name in _VIDEO_GRID if isinstance(side := reading.optional(name), int)]
    if len(grid) != len(_VIDEO_GRID) or math.prod(grid) != tokens.shape[1]:
        return None
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def _is_per_patch(reading: Reading, channels: int) -> bool:
    mean = reading.statistics.mean
    return mean is not None and mean.numel() == 4 * channels


def _for_vae(latents: Tensor, reading: Reading) -> Tensor:
    if latents.ndim == 4 and reading.statistics.is_video:
        return op.as_one_frame(latents, reading)
    if latents.ndim == 5 and not reading.statistics.is_video:
        return op.frames_in_batch(latents, reading)
    return latents


def _normalised(latents: Tensor, reading: Reading, channels: int) -> Tensor:
    statistics = reading.statistics
    if _is_per_patch(reading, channels):
        return latents
    if statistics.mean is None or statistics.std is None:
        return op.shifted(latents, reading)
    return op.standardised_or_scaled(latents, reading)
