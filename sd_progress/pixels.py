"""Owns what pictures of any kind become: uint8 RGB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) float, nominally [-1, 1] -> (B, H, W, 3) uint8 RGB; NaN becomes mid-grey."""
    return rounded((images / 2).add_(0.5).mul_(255))


def rounded(levels: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) float, nominally [0, 255] -> (B, H, W, 3) uint8; `levels` may be changed.

    In few operations: before and after each of them, the run's thread may have to wait.
    """
    whole = levels.nan_to_num_(127.5, 255.0, 0.0).clamp_(0, 255).round_().to(torch.uint8)
    return cast(NDArray[np.uint8], np.ascontiguousarray(whole.numpy().transpose(0, 2, 3, 1)))


def finished_images(output: object, *, is_raw: bool = False) -> NDArray[np.uint8] | None:
    """A pipeline's own pictures or clips, of any `output_type`.

    Args:
        output: PIL pictures, lists of them, an array or a tensor.
        is_raw: whether a tensor is what the decoder returned, in [-1, 1] and not in [0, 1].

    Returns:
        (B, H, W, 3) or (B, F, H, W, 3) uint8; None for latents, for what is no picture, and for
        pictures of different sizes.
    """
    if isinstance(output, list) and output:
        if all(isinstance(x, Image.Image) for x in output):
            return _stacked([np.asarray(picture.convert("RGB")) for picture in output])
        clips = [finished_images(clip) for clip in output if isinstance(clip, list)]
        known = [clip for clip in clips if clip is not None]
        return _stacked(known) if len(known) == len(output) else None
    if isinstance(output, np.ndarray) and output.ndim in (4, 5) and output.shape[-1] == 3:
        return finished_images(torch.from_numpy(output).movedim(-1, -3))
    if isinstance(output, Tensor) and output.ndim in (4, 5) and output.shape[-3] == 3:
        values = output.detach().float().cpu().flatten(0, -4)
        pixels = to_uint8(values if is_raw else values * 2 - 1)
        return pixels.reshape(*output.shape[:-3], *pixels.shape[1:])
    return None


def _stacked(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    return np.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else None
