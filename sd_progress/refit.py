"""Owns making the linear map better from the run's own full decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .decoders import Decoder, LinearDecoder, PCADecoder
from .factors import Factors
from .pixels import to_uint8

# Measured on runs of the demo model, from good maps and bad ones.
PRIOR: Final = 1e-3  # how much the map is held to what it was, in the features' own units
FORGET: Final = 0.5  # what earlier decodes count for beside a new one: the picture has changed
REACH: Final = 0.1  # of the latents' variance: a change after which a decode tells 1 / e as much
MOST_ROWS: Final = 4096  # of one decode, evenly spread
KERNEL_WITHOUT_PRIOR: Final = 3
FOLDS: Final = 4  # quarters of the picture


@dataclass(frozen=True, eq=False)
class _Learned:
    """What one more decode has taught.

    Attributes:
        weight: (3 * s * s, C, k, k) float32, of the correction.
        bias: (3 * s * s,) float32.
        trust: the share of the correction that is believed of any picture, 0 to 1.
        latents: (B, C, h, w) float32, of the decode.
        rest: (B, 3, h * s, w * s) float32, what the corrected map still lacked there.
    """

    weight: Tensor
    bias: Tensor
    trust: float
    latents: Tensor
    rest: Tensor

    def nearness(self, latents: Tensor) -> Tensor | float:
        """(B, 1, 1, 1): 1 for the very latents of the decode, 0 for others."""
        if latents.shape != self.latents.shape:
            return 0.0
        axes = (1, 2, 3)
        variance = self.latents.var(dim=axes, keepdim=True).clamp_min(1e-12)
        change = (latents - self.latents).square().mean(dim=axes, keepdim=True) / variance
        return torch.exp(-change / REACH)


class RefitDecoder:
    """A linear map that is drawn nearer to each full decode of the run; one for each run.

    Recursive least squares: what is left of the decoded picture after the map is fitted by a
    small convolution, held towards zero, from all decodes so far, the newest counting most. What
    even that leaves is added pixel by pixel. Both fade as the run's latents move away from those
    that were decoded; of the convolution a share stays, which is the larger the better it draws
    the parts of the picture that it was not fitted on.

    Without a map to start from, the principal components are shown until the first full decode.

    Args:
        prior: the map to start from, or None.
    """

    def __init__(self, prior: Factors | None) -> None:
        self._prior = prior
        self._first: Decoder = PCADecoder() if prior is None else LinearDecoder(prior)
        self._kernel_size = KERNEL_WITHOUT_PRIOR if prior is None else prior.kernel_size
        self._upscale = 1 if prior is None else prior.upscale
        self._sums: tuple[Tensor, Tensor] | None = None
        self._learned: _Learned | None = None

    @property
    def name(self) -> str:
        """That of the map, with `+refit` after its kind as soon as it has learned."""
        if self._learned is None:
            return self._first.name
        if self._prior is None:
            return "linear+refit"
        return f"{self._prior.kind}+refit:{self._prior.name}"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, h * upscale, w * upscale, 3) uint8."""
        learned = self._learned
        if learned is None:
            return self._first.decode(latents)
        latents = latents.float()
        nearness = learned.nearness(latents)
        share = learned.trust + (1 - learned.trust) * nearness
        drawn = self._base(latents) + share * self._convolved(latents, learned.weight, learned.bias)
        if isinstance(nearness, Tensor):
            drawn = drawn + nearness * learned.rest
        return to_uint8(drawn)

    def learn(self, latents: Tensor, images: NDArray[np.uint8]) -> None:
        """Take a full decode in.

        Args:
            latents: (B, C, h, w) float on the CPU, as for `decode`.
            images: (B, H, W, 3) uint8, what the VAE made of them.
        """
        latents = latents.float()
        missing = self._reduced(images, latents) - self._base(latents)
        rows, answers, folds = self._rows(latents, missing)
        if not (rows.isfinite().all() and answers.isfinite().all()):
            return
        parts = [_sums(rows[folds == fold], answers[folds == fold]) for fold in range(FOLDS)]
        products, targets = (torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True))
        if self._sums is not None:
            products, targets = (
                new + FORGET * old for new, old in zip((products, targets), self._sums, strict=True)
            )
        self._sums = products, targets
        trust = 1.0
        if self._prior is not None:
            left = sum(
                (answers[folds == fold] - rows[folds == fold] @ _solved(products - p, targets - t))
                .square()
                .sum()
                for fold, (p, t) in enumerate(parts)
            )
            trust = max(0.0, 1 - float(left / answers.square().sum().clamp_min(1e-12))) ** 2
        solved = _solved(products, targets)
        shape = (-1, latents.shape[1], self._kernel_size, self._kernel_size)
        weight, bias = solved[:-1].T.reshape(shape).contiguous(), solved[-1].contiguous()
        rest = missing - self._convolved(latents, weight, bias)
        self._learned = _Learned(weight, bias, trust, latents, rest)

    def _rows(self, latents: Tensor, missing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Neighbourhoods with a constant (N, M), what is missing (N, O), and quarters (N,)."""
        batch, _, height, width = latents.shape
        features = functional.unfold(self._padded(latents), self._kernel_size)
        rows = functional.pad(features.movedim(1, -1).flatten(0, 1), (0, 1), value=1.0)
        wanted = functional.pixel_unshuffle(missing, self._upscale)
        answers = wanted.flatten(2).movedim(1, -1).flatten(0, 1)
        down, across = (torch.arange(side, device="cpu") * 2 // side for side in (height, width))
        folds = (2 * down[:, None] + across).flatten().repeat(batch)
        step = -(-len(rows) // MOST_ROWS)
        return rows[::step], answers[::step], folds[::step]

    def _base(self, latents: Tensor) -> Tensor:
        """The map as it was, (B, 3, h * upscale, w * upscale); mid-grey where there was none.

        Clamped as a picture is: what lies beyond white is not missing from a white pixel.
        """
        if isinstance(self._first, LinearDecoder):
            return self._first.decode_float(latents).clamp(-1, 1)
        return torch.zeros(len(latents), 3, *latents.shape[-2:], device="cpu")

    def _convolved(self, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        convolved = functional.conv2d(self._padded(latents), weight, bias)
        return functional.pixel_shuffle(convolved, self._upscale)

    def _padded(self, latents: Tensor) -> Tensor:
        return functional.pad(latents, (self._kernel_size // 2,) * 4, mode="replicate")

    def _reduced(self, images: NDArray[np.uint8], latents: Tensor) -> Tensor:
        size = tuple(side * self._upscale for side in latents.shape[-2:])
        pictures = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
        return functional.interpolate(pictures, size, mode="area")


def _sums(rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    return (rows.T @ rows).double(), (rows.T @ answers).double()


def _solved(products: Tensor, targets: Tensor) -> Tensor:
    """(M, O) float32."""
    held = PRIOR * products.diagonal() + 1e-9 * products.diagonal().mean() + 1e-9
    return cast(Tensor, torch.linalg.solve(products + held.diag(), targets).float())
