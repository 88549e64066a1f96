"""Fit the linear map that previews the demo model, and write it into the package.

As `sd-progress calibrate` does it, on drawn scenes; scored on others.

    python tools/fit_demo_factors.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from demo_scenes import draw, random_scene
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from sd_progress import calibrate, demo_model_path
from sd_progress.calibration import score
from sd_progress.factors import save

FIRST_FITTED: Final = 3_000_000
FIRST_SCORED: Final = 3_500_000
SCORED: Final = 96


def scenes(first: int, count: int) -> list[Image.Image]:
    """Drawn from consecutive seeds."""
    return [draw(random_scene(first + number)) for number in tqdm(range(count), "draw")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, score, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="pipeline folder")
    default = demo_model_path().parent / "data" / "demo.safetensors"
    parser.add_argument("--out", type=Path, default=default, help="(default: in the package)")
    parser.add_argument("--scenes", type=int, default=512, help="to fit on (default: 512)")
    parser.add_argument("--kernel-size", type=int, default=5, help="latents across (default: 5)")
    parser.add_argument("--upscale", type=int, default=4, help="pixels per latent (default: 4)")
    args = parser.parse_args(arguments)
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae").eval()
    fitted = calibrate(
        vae,
        images=scenes(FIRST_FITTED, args.scenes),
        kernel_size=args.kernel_size,
        upscale=args.upscale,
        name="demo",
        progress=True,
    )
    found = score(fitted, vae, images=scenes(FIRST_SCORED, SCORED))
    shipped = replace(
        fitted,
        provenance=f"{args.scenes} drawn scenes, tools/fit_demo_factors.py",
        licence="Apache-2.0",
        psnr_db=round(found.psnr_db, 2),
        vae_hash=None,  # a half-precision copy has another, and is the same model
    )
    save(shipped, args.out)
    print(f"{args.out}: {shipped.parameters} numbers, {found} on {SCORED} other scenes")


if __name__ == "__main__":
    main()
