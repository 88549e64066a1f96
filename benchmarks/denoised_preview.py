"""How much sooner a denoised preview shows the picture than a noisy one.

The demo model paints 20 pictures, seed by seed; at one step of the run, the preview from the
predicted x0 and the preview from the noisy latents are compared with the finished picture, all at
latent resolution (one pixel per latent, the picture area-averaged).

    python benchmarks/denoised_preview.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from sd_progress import Frame, PreviewCallback, demo_model_path

PROMPTS = (
    "a sailing boat on the sea at sunset",
    "a house in a meadow by day with trees and the sun",
    "mountains at night with the moon and stars",
    "snowy mountains and a lake at dawn",
)


def small(images: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """(B, H, W, 3) uint8 -> (B, size, size, 3) in [0, 1], area-averaged."""
    batch, height, width, channels = images.shape
    cells = images.reshape(batch, size, height // size, size, width // size, channels)
    return np.asarray(cells.mean(axis=(2, 4)) / 255)


def psnr_db(images: NDArray[np.uint8], final: NDArray[np.uint8], size: int) -> list[float]:
    """Of each picture of the batch against the finished one, at latent resolution."""
    errors = np.square(small(images, size) - small(final, size)).mean(axis=(1, 2, 3))
    return [float(-10 * np.log10(error)) for error in errors]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)
    pipe = DiffusionPipeline.from_pretrained(args.model)
    frames: dict[str, list[Frame]] = {"denoised": [], "noisy": []}
    for source in ("denoised", "noisy"):
        pipe(
            [PROMPTS[seed % len(PROMPTS)] for seed in range(args.seeds)],
            num_inference_steps=args.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(args.seeds)],
            callback_on_step_end=PreviewCallback(
                pipe,
                frames[source].append,
                source=source,  # type: ignore[arg-type]
                keep_latents=True,
                final=True,
            ),
        )
    print(f"{args.seeds} seeds, {args.steps} steps; PSNR against the finished picture, mean in dB")
    print("step  denoised  noisy  closer by")
    for denoised, noisy in zip(frames["denoised"][:-1], frames["noisy"][:-1], strict=True):
        assert denoised.latents is not None
        size = denoised.latents.shape[-1]
        final = frames["denoised"][-1].images
        scores = [mean(psnr_db(frame.images, final, size)) for frame in (denoised, noisy)]
        step = f"{denoised.step_index + 1:4}"
        print(f"{step}  {scores[0]:8.2f}  {scores[1]:5.2f}  {scores[0] - scores[1]:9.2f}")


if __name__ == "__main__":
    main()
