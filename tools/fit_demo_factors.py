"""Fit the linear map that previews the demo model, and write it into the package.

Scenes are drawn, encoded by the demo model's own VAE, and the map from a neighbourhood of latents
to the pixels under its centre is solved for in closed form (ridge regression on the normal
equations, in float64). The score is measured on scenes that were not fitted on.

    python tools/fit_demo_factors.py

The neighbourhood is wide (11 by 11), because this VAE keeps its colours in the context: what is one
latent to a sunset is another to a night.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from demo_scenes import draw, random_scene
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from sd_progress import Factors, demo_model_path
from sd_progress.decoders import LinearDecoder
from sd_progress.factors import describe_vae, save

FIRST_FITTED: Final = 3_000_000
FIRST_SCORED: Final = 3_500_000
BATCH: Final = 16


def encoded(vae: AutoencoderKL, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scenes from seed `first` on: pictures (B, 3, H, W) in [-1, 1], their VAE-space latents."""
    for start in tqdm(range(first, first + count, BATCH), unit="batch", leave=False):
        drawn = [np.asarray(draw(random_scene(start + k))) for k in range(BATCH)]
        pictures = torch.from_numpy(np.stack(drawn)).movedim(-1, 1) / 127.5 - 1
        with torch.no_grad():
            yield pictures, vae.encode(pictures).latent_dist.mode()


def fit(
    vae: AutoencoderKL, *, scenes: int, kernel_size: int, upscale: int, ridge: float
) -> Factors:
    """The best map of `kernel_size` by `kernel_size` latents to `upscale` by `upscale` pixels."""
    products: Tensor | float = 0.0
    targets: Tensor | float = 0.0
    rows = 0
    for pictures, latents in encoded(vae, FIRST_FITTED, scenes):
        seen = _neighbourhoods(latents, kernel_size)  # (N, C * k * k + 1)
        wanted = _cells(pictures, latents.shape[-1], upscale)  # (N, 3 * s * s)
        products, targets, rows = (
            products + seen.T @ seen,
            targets + seen.T @ wanted,
            rows + len(seen),
        )
    assert isinstance(products, Tensor)
    assert isinstance(targets, Tensor)
    penalty = torch.full((len(products),), ridge * rows, dtype=torch.double)
    penalty[-1] = 0  # the bias is free
    solved = torch.linalg.solve(products + penalty.diag(), targets)
    channels = (len(solved) - 1) // kernel_size**2
    weight = solved[:-1].T.reshape(-1, channels, kernel_size, kernel_size)
    return Factors(
        weight.float().numpy(),
        solved[-1].float().numpy(),
        name="demo",
        provenance=f"ridge regression on {scenes} drawn scenes, tools/fit_demo_factors.py",
        licence="Apache-2.0",
        vae_key=describe_vae(vae),
    )


def score(vae: AutoencoderKL, factors: Factors, scenes: int) -> float:
    """Mean PSNR in dB of the map's pictures against the scenes, at the map's own resolution."""
    decoder, scores = LinearDecoder(factors), []
    for pictures, latents in encoded(vae, FIRST_SCORED, scenes):
        images = torch.from_numpy(decoder.decode(latents)).movedim(-1, 1) / 255
        scene = functional.interpolate(pictures / 2 + 0.5, images.shape[-2:], mode="area")
        errors = (images - scene).square().flatten(1).mean(1)
        scores.append(-10 * errors.log10())
    return float(torch.cat(scores).mean())


def _neighbourhoods(latents: Tensor, kernel_size: int) -> Tensor:
    margin = kernel_size // 2
    padded = functional.pad(latents.double(), (margin,) * 4, mode="replicate")
    seen = functional.unfold(padded, kernel_size).movedim(1, -1).flatten(0, 1)
    return functional.pad(seen, (0, 1), value=1.0)


def _cells(pictures: Tensor, latent_width: int, upscale: int) -> Tensor:
    scale = latent_width * upscale / pictures.shape[-1]
    smaller = functional.interpolate(pictures.double(), scale_factor=scale, mode="area")
    return functional.pixel_unshuffle(smaller, upscale).flatten(2).movedim(1, -1).flatten(0, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, score, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="pipeline folder")
    default = demo_model_path().parent / "data" / "demo.safetensors"
    parser.add_argument("--out", type=Path, default=default, help="(default: in the package)")
    parser.add_argument("--scenes", type=int, default=512, help="to fit on (default: 512)")
    parser.add_argument("--kernel-size", type=int, default=11, help="latents across (default: 11)")
    parser.add_argument("--upscale", type=int, default=4, help="pixels per latent (default: 4)")
    parser.add_argument("--ridge", type=float, default=1e-4, help="per row (default: 1e-4)")
    args = parser.parse_args(arguments)
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae").eval()
    shape = {"kernel_size": args.kernel_size, "upscale": args.upscale}
    factors = fit(vae, scenes=args.scenes, ridge=args.ridge, **shape)
    factors = replace(factors, psnr_db=round(score(vae, factors, scenes=96), 2))
    save(factors, args.out)
    print(f"{args.out}: {factors.weight.size} weights, {factors.psnr_db} dB on 96 other scenes")


if __name__ == "__main__":
    main()
