"""Owns the closed-form solution: features of latents, normal equations, and a network beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional

from .decoders import products
from .factors import Factors, Hidden, Polynomial, VaeKey, monomials
from .scores import Pair, reduced, scored
from .share import Share

RIDGES: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ROWS_AT_ONCE: Final = 8192
NETWORK_STEPS: Final = 1500
NETWORK_ROWS: Final = 2048
NETWORK_RATE: Final = 3e-3


@dataclass(frozen=True)
class Shape:
    """What goes into the map and what comes out."""

    channels: int
    kernel_size: int
    upscale: int
    degree: int

    @property
    def affine(self) -> int:
        """Features that are latents of the neighbourhood."""
        return self.channels * self.kernel_size**2

    @property
    def features(self) -> int:
        """All of them, with the constant."""
        more = len(monomials(self.channels, self.degree)) if self.degree > 1 else 0
        return self.affine + more + 1

    @property
    def outputs(self) -> int:
        """Numbers per latent: three colours of each sub-pixel."""
        return 3 * self.upscale**2

    def rows(self, pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
        """(N, features) and (N, outputs), float64 where the device has it, some rows at a time."""
        dtype = torch.float32 if pair.latents.device.type == "mps" else torch.float64
        wanted = functional.pixel_unshuffle(
            reduced(pair.pictures, pair.latents, self.upscale), self.upscale
        )
        for latents, targets in zip(pair.latents.split(1), wanted.split(1), strict=True):
            features = self.features_of(latents.to(dtype))
            flat = targets.to(dtype).flatten(2).movedim(1, -1).flatten(0, 1)
            yield from zip(features.split(ROWS_AT_ONCE), flat.split(ROWS_AT_ONCE), strict=True)

    def features_of(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B * h * w, features)."""
        margin = self.kernel_size // 2
        padded = functional.pad(latents, (margin,) * 4, mode="replicate")
        parts = [functional.unfold(padded, self.kernel_size)]  # (B, C * k * k, h * w)
        if self.degree > 1:
            parts.append(products(latents, self.degree).flatten(2))
        parts.append(torch.ones_like(parts[0][:, :1]))
        return torch.cat(parts, dim=1).movedim(1, -1).flatten(0, 1)


@dataclass(frozen=True)
class Equations:
    """The normal equations: sums over all rows, so that rows need not be kept."""

    products: Tensor  # (M, M)
    targets: Tensor  # (M, O)

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> Equations:
        """Of no rows yet."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return cls(
            torch.zeros(shape.features, shape.features, dtype=dtype, device=device),
            torch.zeros(shape.features, shape.outputs, dtype=dtype, device=device),
        )

    def with_more(self, shape: Shape, pairs: Iterable[Pair], share: Share) -> Equations:
        """With the rows of more pictures."""
        more = Equations.of(shape, self.products.device)
        for pair in pairs:
            for features, targets in shape.rows(pair):
                more.add(features, targets)
        share.add_up(more.products, more.targets)
        return Equations(self.products + more.products, self.targets + more.targets)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take (N, M) and (N, O) in."""
        self.products.addmm_(features.T, features)
        self.targets.addmm_(features.T, targets)

    def solved(self, ridge: float) -> Tensor:
        """(M, O); each feature is penalised in its own unit, the constant not at all."""
        is_single = self.products.dtype == torch.float32  # where the device has no float64
        products = self.products.double().cpu() if is_single else self.products
        penalty = ridge * products.diagonal() + 1e-12 * products.diagonal().mean()
        penalty[-1] = 0
        system = products + penalty.diag()
        return cast(Tensor, torch.linalg.solve(system, self.targets.to(products)).cpu())


@dataclass(frozen=True)
class Maker:
    """Solutions as factors."""

    shape: Shape
    name: str
    words: str
    vae_key: VaeKey
    vae_hash: str | None

    def __call__(self, solved: Tensor, ridge: float) -> Factors:
        """The map of a solution (M, O)."""
        shape, affine = self.shape, self.shape.affine
        kernel = (-1, shape.channels, shape.kernel_size, shape.kernel_size)
        extra = None
        if shape.degree > 1:
            extra = Polynomial(solved[affine:-1].T.float().numpy(), shape.degree)
        return Factors(
            solved[:affine].T.reshape(kernel).float().numpy(),
            solved[-1].float().numpy(),
            name=self.name,
            provenance=_provenance(self.words, ridge),
            vae_key=self.vae_key,
            extra=extra,
            vae_hash=self.vae_hash,
        )

    def network(self, equations: Equations, ridge: float, kernel: Tensor, bias: Tensor) -> Factors:
        """The map of equations whose features are latents, hidden units and the constant."""
        solved, affine = equations.solved(ridge), self.shape.affine
        hidden = Hidden(
            solved[affine:-1].T.float().numpy(), kernel.cpu().numpy(), bias.cpu().numpy()
        )
        plain = self(torch.cat([solved[:affine], solved[-1:]]), ridge)
        words = f"{self.words}, {len(bias)} hidden units"
        return replace(plain, extra=hidden, provenance=_provenance(words, ridge))


def _provenance(words: str, ridge: float) -> str:
    return f"sd-progress calibrate: {words}, ridge {ridge:g}"


def best_ridge(
    make: Maker, equations: Equations, held_out: Sequence[Pair], share: Share
) -> tuple[Factors, float]:
    """The map that draws the held-out pictures best, and its ridge."""
    best, highest, chosen = None, -math.inf, RIDGES[0]
    for ridge in RIDGES:
        factors = make(equations.solved(ridge), ridge)
        found = share.mean(scored(factors, pair, make.shape.upscale) for pair in held_out)
        if best is None or found.psnr_db > highest:
            best, highest, chosen = factors, found.psnr_db, ridge
    assert best is not None
    return best, chosen


def with_network(
    make: Maker,
    affine: Factors,
    rows: Sequence[tuple[Tensor, Tensor]],
    held_out: Sequence[Pair],
    hidden_units: int,
    seed: int,
) -> Factors:
    """The affine map and a hidden layer: trained together, the outputs then solved for.

    Where that draws the held-out pictures no better, the affine map alone.
    """
    features, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
    inputs = features[:, :-1]
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0).clamp_min(1e-6)
    solved = torch.cat(
        [torch.from_numpy(affine.weight).flatten(1).T, torch.from_numpy(affine.bias)[None]]
    )
    rest = targets - features @ solved.to(features)
    kernel, bias = _trained((inputs - mean) / deviation, rest, hidden_units, seed)
    kernel = kernel / deviation
    bias = bias - kernel @ mean
    units = (inputs @ kernel.T + bias).relu()
    more = torch.cat([inputs, units, features[:, -1:]], dim=1).double()
    equations = Equations(more.T @ more, more.T @ targets.double())
    kernels = kernel.reshape(-1, *affine.weight.shape[1:])
    candidates = [affine, *(make.network(equations, r, kernels, bias) for r in RIDGES)]

    def psnr_db(factors: Factors) -> float:
        found = Share(None).mean(scored(factors, pair, make.shape.upscale) for pair in held_out)
        return found.psnr_db

    return max(candidates, key=psnr_db)


def _trained(inputs: Tensor, rest: Tensor, units: int, seed: int) -> tuple[Tensor, Tensor]:
    """Kernel (H, features) and bias (H,) of hidden units that explain the rest of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(
        units, inputs.shape[1], generator=generator, device="cpu", dtype=torch.float32
    )
    kernel = (made * math.sqrt(2 / inputs.shape[1])).to(inputs)
    bias, out = inputs.new_zeros(units), inputs.new_zeros(rest.shape[1], units)
    with torch.inference_mode(False), torch.enable_grad():
        inputs, rest = inputs.clone(), rest.clone()
        parameters = [tensor.clone().requires_grad_() for tensor in (kernel, bias, out)]
        optimizer = torch.optim.Adam(parameters, NETWORK_RATE)
        for step in range(NETWORK_STEPS):
            share = step / NETWORK_STEPS
            optimizer.param_groups[0]["lr"] = NETWORK_RATE * (0.5 + 0.5 * math.cos(math.pi * share))
            chosen = torch.randint(len(inputs), (NETWORK_ROWS,), generator=generator, device="cpu")
            chosen = chosen.to(inputs.device)
            hidden = functional.linear(inputs[chosen], parameters[0], parameters[1]).relu()
            loss = functional.mse_loss(functional.linear(hidden, parameters[2]), rest[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return parameters[0].detach(), parameters[1].detach()
