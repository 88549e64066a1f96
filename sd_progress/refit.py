"""Owns making the linear map better from the run's own full decodes."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .decoders import Decoder, LinearDecoder, PcaDecoder
from .factors import Factors
from .pixels import to_uint8

# How much the map is held to what it was, in the features' own units.
PRIOR: Final = 1e-3
# What earlier decodes count for beside a new one: the picture has changed since.
FORGET: Final = 0.5
MOST_ROWS: Final = 8192  # of one decode, evenly spread
KERNEL_WITHOUT_PRIOR: Final = 3


class RefitDecoder:
    """A linear map that is drawn nearer to each full decode of the run; one for each run.

    Recursive least squares: what is left of the decoded picture after the map is fitted by a
    small convolution, held towards zero, from all decodes so far, the newest counting most.
    Without a map to start from, the principal components are shown until the first full decode.

    Args:
        prior: the map to start from, or None.
    """

    def __init__(self, prior: Factors | None) -> None:
        self._prior = prior
        self._first: Decoder = PcaDecoder() if prior is None else LinearDecoder(prior)
        self._kernel_size = KERNEL_WITHOUT_PRIOR if prior is None else prior.kernel_size
        self._upscale = 1 if prior is None else prior.upscale
        self._products: Tensor | None = None
        self._targets: Tensor | None = None
        self._correction: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """That of the map, with `+refit` after its kind as soon as it has learned."""
        if self._correction is None:
            return self._first.name
        if self._prior is None:
            return "linear+refit"
        return f"{self._prior.kind}+refit:{self._prior.name}"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, h * upscale, w * upscale, 3) uint8."""
        if self._correction is None:
            return self._first.decode(latents)
        weight, bias = self._correction
        padded = _padded(latents.float(), self._kernel_size)
        added = functional.pixel_shuffle(functional.conv2d(padded, weight, bias), self._upscale)
        return to_uint8(self._base(latents) + added)

    def learn(self, latents: Tensor, images: NDArray[np.uint8]) -> None:
        """Take a full decode in.

        Args:
            latents: (B, C, h, w) float on the CPU, as for `decode`.
            images: (B, H, W, 3) uint8, what the VAE made of them.
        """
        wanted = self._reduced(images, latents)
        missing = functional.pixel_unshuffle(wanted - self._base(latents).double(), self._upscale)
        features = functional.unfold(
            _padded(latents.double(), self._kernel_size), self._kernel_size
        )
        rows = functional.pad(features.movedim(1, -1).flatten(0, 1), (0, 1), value=1.0)
        answers = missing.flatten(2).movedim(1, -1).flatten(0, 1)
        step = -(-len(rows) // MOST_ROWS)
        rows, answers = rows[::step], answers[::step]
        if not (rows.isfinite().all() and answers.isfinite().all()):
            return
        products, targets = rows.T @ rows / len(rows), rows.T @ answers / len(rows)
        if self._products is not None and self._targets is not None:
            products, targets = products + FORGET * self._products, targets + FORGET * self._targets
        self._products, self._targets = products, targets
        held = PRIOR * products.diagonal() + 1e-9
        solved = torch.linalg.solve(products + held.diag(), targets).float()
        size = (-1, latents.shape[1], self._kernel_size, self._kernel_size)
        self._correction = solved[:-1].T.reshape(size).contiguous(), solved[-1].contiguous()

    def _base(self, latents: Tensor) -> Tensor:
        """The map as it was, (B, 3, h * upscale, w * upscale); mid-grey where there was none."""
        if isinstance(self._first, LinearDecoder):
            return self._first.decode_float(latents)
        return torch.zeros(len(latents), 3, *latents.shape[-2:], device="cpu")

    def _reduced(self, images: NDArray[np.uint8], latents: Tensor) -> Tensor:
        size = tuple(side * self._upscale for side in latents.shape[-2:])
        pictures = torch.from_numpy(images).movedim(-1, 1).double() / 127.5 - 1
        return functional.interpolate(pictures, size, mode="area")


def _padded(latents: Tensor, kernel_size: int) -> Tensor:
    return functional.pad(latents, (kernel_size // 2,) * 4, mode="replicate")
