r"""What was tried to make the linear preview better, beside the plain affine map of 5x5 latents.

Each idea is fitted like the plain map, by least squares with a ridge that pictures held out choose,
on synthetic pictures alone and, with `--split N`, on the first N of the pictures. It draws one
pixel per latent, and is scored on the pictures (with a split, on the others): PSNR in dB, and
CIEDE2000, the difference of colours as the eye sees it, where less is better. "numbers" is how many
the map has; where there are many, previews cost more.

On the demo model's VAE, with landscapes that it was not trained on:

    python benchmarks/fit_ideas.py --split 45

On the tiny autoencoder of FLUX.2's latents, with your photographs:

    python benchmarks/fit_ideas.py --vae TAEF2 --images PHOTOS --split 45

Needs `pip install "sd-progress[quality]"`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from quality import averaged, drawn_scenes, encoded, load_vae
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from sd_progress import demo_model_path
from sd_progress.calibration import picture_files
from sd_progress.latent_space import HELD_OUT_EVERY
from sd_progress.regression import RIDGES
from sd_progress.synthetic import dead_leaves

SYNTHETIC, SIDE_PX = 32, 192
LUMA = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]).double()

Features = Callable[[Tensor], Tensor]
"""(1, C, h, w) float64 -> (N, M), without the constant."""


@dataclass(frozen=True)
class Sample:
    """Latents (1, C, h, w) float64, and the picture at one pixel per latent, (N, 3) in [0, 1]."""

    latents: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Idea:
    """One way to fit.

    Attributes:
        features: of the samples that it is fitted on: what goes into the map.
        weights: (N, 3) colours -> (N,), how much each pixel counts.
        axes: (3, 3), of the colours, along which each output has a ridge of its own; None has one
            ridge for all.
        parts: by which number each pixel is drawn by a map of its own; of the samples.
    """

    features: Callable[[Sequence[Sample]], Features]
    weights: Callable[[Tensor], Tensor] | None = None
    axes: Tensor | None = None
    parts: Callable[[Sequence[Sample]], Features] | None = None


def around(kernel_size: int) -> Callable[[Sequence[Sample]], Features]:
    """The latents of a neighbourhood."""
    return lambda samples: lambda latents: unfolded(latents, kernel_size)


def unfolded(latents: Tensor, kernel_size: int) -> Tensor:
    """(1, C, h, w) -> (h * w, C * k * k)."""
    padded = functional.pad(latents, (kernel_size // 2,) * 4, mode="replicate")
    return functional.unfold(padded, kernel_size)[0].T


def principal(samples: Sequence[Sample], kernel_size: int, count: int) -> Features:
    """The first components of a neighbourhood, of unit variance: what neighbours have in common."""
    rows = torch.cat([unfolded(sample.latents, kernel_size) for sample in samples])
    mean = rows.mean(dim=0)
    variances, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    axes = axes[:, -count:] / variances[-count:].clamp_min(1e-9).sqrt()
    return lambda latents: (unfolded(latents, kernel_size) - mean) @ axes


def with_products(count: int, kernel_size: int) -> Callable[[Sequence[Sample]], Features]:
    """Also all products of two of a neighbourhood's first components."""

    def made(samples: Sequence[Sample]) -> Features:
        components = principal(samples, kernel_size, count)
        pairs = list(itertools.combinations_with_replacement(range(count), 2))
        first, second = (list(side) for side in zip(*pairs, strict=True))

        def features(latents: Tensor) -> Tensor:
            few = components(latents)
            return torch.cat([unfolded(latents, 5), few[:, first] * few[:, second]], dim=1)

        return features

    return made


def with_waves(count: int) -> Callable[[Sequence[Sample]], Features]:
    """Also cosines of random directions: a kernel machine (Rahimi and Recht, 2007)."""

    def made(samples: Sequence[Sample]) -> Features:
        components = principal(samples, 5, 24)
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(24, count, generator=generator).double() / 24**0.5
        phases = torch.rand(count, generator=generator).double() * 2 * torch.pi

        def features(latents: Tensor) -> Tensor:
            waves = (components(latents) @ directions + phases).cos()
            return torch.cat([unfolded(latents, 5), waves], dim=1)

        return features

    return made


def with_bends(samples: Sequence[Sample]) -> Features:
    """Also each latent under the pixel, cut off above and below its usual values."""
    rows = torch.cat([unfolded(sample.latents, 1) for sample in samples])
    mean, deviation = rows.mean(dim=0), rows.std(dim=0)

    def features(latents: Tensor) -> Tensor:
        scaled = (unfolded(latents, 1) - mean) / deviation
        bends = [(scaled - 1).relu(), (-scaled - 1).relu()]
        return torch.cat([unfolded(latents, 5), *bends], dim=1)

    return features


def clusters(count: int) -> Callable[[Sequence[Sample]], Features]:
    """Which of some kinds of neighbourhood it is, by k-means of the first components."""

    def made(samples: Sequence[Sample]) -> Features:
        components = principal(samples, 5, 8)
        rows = torch.cat([components(sample.latents) for sample in samples])
        generator = torch.Generator().manual_seed(0)
        centres = rows[torch.randperm(len(rows), generator=generator)[:count]]
        for _ in range(20):
            nearest = torch.cdist(rows, centres).argmin(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
            counts = nearest.bincount(minlength=count).clamp_min(1)
            centres = sums / counts[:, None]
        return lambda latents: torch.cdist(components(latents), centres).argmin(dim=1)

    return made


def saturation(colours: Tensor) -> Tensor:
    """Pixels count by how far they are from grey."""
    return 0.1 + (colours.amax(dim=1) - colours.amin(dim=1))


IDEAS: dict[str, Idea] = {
    "affine, k=5": Idea(around(5)),
    "affine, k=7": Idea(around(7)),
    "affine, k=9": Idea(around(9)),
    "k=5, a ridge for light and each colour": Idea(around(5), axes=LUMA),
    "k=5, colourful pixels count more": Idea(around(5), weights=saturation),
    "k=5, bent latents": Idea(with_bends),
    "k=5, products of 12 components of 1x1": Idea(with_products(12, 1)),
    "k=5, products of 12 components of 3x3": Idea(with_products(12, 3)),
    "k=5, products of 12 components of 5x5": Idea(with_products(12, 5)),
    "k=5, products of 24 components of 5x5": Idea(with_products(24, 5)),
    "k=5, 256 random waves": Idea(with_waves(256)),
    "k=5, one map for each of 4 kinds": Idea(around(5), parts=clusters(4)),
}


@dataclass(frozen=True)
class Solution:
    """A map: (M + 1, 3) for each part, and what goes into it."""

    features: Features
    parts: Features | None
    solved: Tensor

    def draw(self, latents: Tensor) -> Tensor:
        """(1, C, h, w) -> (N, 3) in [0, 1]."""
        rows = functional.pad(self.features(latents), (0, 1), value=1.0)
        if self.parts is None:
            return (rows @ self.solved[0]).clamp(0, 1)
        every = torch.stack([rows @ one for one in self.solved])  # (parts, N, 3)
        chosen = self.parts(latents)[None, :, None].expand(1, -1, 3)
        return every.gather(0, chosen)[0].clamp(0, 1)


def solution(idea: Idea, samples: Sequence[Sample]) -> Solution:
    """The fit with the ridge that draws every fourth sample best, along each axis."""
    held = samples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    kept = [sample for sample in samples if not any(sample is other for other in held)]
    features = idea.features(kept)
    parts = None if idea.parts is None else idea.parts(kept)
    axes = torch.eye(3).double() if idea.axes is None else idea.axes
    sums = [summed(idea, features, parts, kept, part) for part in range(count_of(parts, kept))]
    solved = torch.stack([ridged(sums, ridge) for ridge in RIDGES])  # (ridges, parts, M + 1, 3)
    errors = []
    for one in solved:
        drawn = [Solution(features, parts, one).draw(sample.latents) for sample in held]
        wrong = torch.cat(drawn) - torch.cat([sample.wanted for sample in held])
        errors.append((wrong @ axes.T).square().mean(dim=0))
    best = torch.stack(errors).argmin(dim=0)
    if idea.axes is None:
        best = torch.stack(errors).sum(dim=1).argmin().expand(3)
    along = torch.stack([(solved[best[k]] @ axes.T)[..., k] for k in range(3)], dim=-1)
    return Solution(features, parts, along @ axes.inverse().T)


def count_of(parts: Features | None, samples: Sequence[Sample]) -> int:
    """How many parts there are."""
    if parts is None:
        return 1
    return 1 + max(int(parts(sample.latents).max()) for sample in samples)


def summed(
    idea: Idea, features: Features, parts: Features | None, samples: Sequence[Sample], part: int
) -> tuple[Tensor, Tensor]:
    """The normal equations of the pixels of one part."""
    products = targets = None
    for sample in samples:
        rows = functional.pad(features(sample.latents), (0, 1), value=1.0)
        wanted = sample.wanted
        if parts is not None:
            is_here = parts(sample.latents) == part
            rows, wanted = rows[is_here], wanted[is_here]
        weighted = rows if idea.weights is None else rows * idea.weights(wanted)[:, None]
        new = weighted.T @ rows, weighted.T @ wanted
        products = new[0] if products is None else products + new[0]
        targets = new[1] if targets is None else targets + new[1]
    assert products is not None
    assert targets is not None
    return products, targets


def ridged(sums: Sequence[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """(parts, M + 1, 3)."""
    solved = []
    for products, targets in sums:
        penalty = ridge * products.diagonal() + 1e-12 * products.diagonal().mean()
        penalty[-1] = 0
        solved.append(torch.linalg.solve(products + penalty.diag(), targets))
    return torch.stack(solved)


def sampled(vae: torch.nn.Module, sources: Sequence[Path | Image.Image]) -> list[Sample]:
    """Pictures, encoded, and averaged to one pixel per latent."""
    samples = []
    for example in encoded(vae, sources):
        small = averaged(example.picture, *example.latents.shape[-2:])
        samples.append(
            Sample(example.latents.double(), torch.from_numpy(small).double().reshape(-1, 3))
        )
    return samples


def leaves() -> list[Image.Image]:
    """What `calibrate` makes."""
    made = dead_leaves(SYNTHETIC, SIDE_PX, torch.Generator().manual_seed(0))
    pixels = ((made / 2 + 0.5) * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def likeness(found: Solution, samples: Sequence[Sample]) -> tuple[float, float]:
    """PSNR and CIEDE2000, means over pictures."""
    psnrs, colours = [], []
    for sample in samples:
        shape = (*sample.latents.shape[-2:], 3)
        drawn = found.draw(sample.latents).reshape(shape).float().numpy()
        wanted = sample.wanted.reshape(shape).float().numpy()
        psnrs.append(-10 * np.log10(max(np.square(drawn - wanted).mean(), 1e-10)))
        colours.append(deltaE_ciede2000(rgb2lab(drawn), rgb2lab(wanted)).mean())
    return fmean(psnrs), fmean(colours)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and score each idea, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", default=str(demo_model_path()), help="default: the demo model's")
    parser.add_argument("--images", type=Path, help="a folder of pictures")
    parser.add_argument("--split", type=int, default=0, help="fit on the first so many, too")
    args = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    vae = load_vae(args.vae)
    pictures = drawn_scenes(60) if args.images is None else picture_files(args.images)
    scored, synthetic = sampled(vae, pictures), sampled(vae, leaves())
    split = f" {args.split} pictures: PSNR | CIEDE2000 |" if args.split else ""
    print(f"| idea | PSNR | CIEDE2000 |{split} numbers |")
    print("|---|" + "---:|" * (5 if args.split else 3))
    for name, idea in tqdm(IDEAS.items(), "ideas", leave=False):
        found = solution(idea, synthetic)
        cells = ["{:.2f} | {:.2f}".format(*likeness(found, scored))]
        if args.split:
            other = solution(idea, scored[: args.split])
            cells.append("{:.2f} | {:.2f}".format(*likeness(other, scored[args.split :])))
        print(f"| {name} | {' | '.join(cells)} | {found.solved.numel():,} |", flush=True)


if __name__ == "__main__":
    main()
