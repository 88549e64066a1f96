"""Measure the demo model: reconstruction, obedience to captions, speed, size; exit 1 on a miss."""

from __future__ import annotations

import argparse
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from demo_scenes import PALETTES, SIZE, Colour, Scene, describe, draw, facets, random_scene
from diffusers import AutoencoderKL, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

Picture = NDArray[np.uint8]  # (H, W, 3)

FIRST_HELD_OUT: Final = 2_000_000  # neither trained on nor looked at in training
RECONSTRUCTED: Final = 100
CAPTIONS: Final = 50
STEPS: Final = 20
LEAST_PSNR_DB: Final = 28.0
LEAST_AGREEMENT: Final = 0.9
MOST_SECONDS: Final = 5.0
MOST_MEGABYTES: Final = 8.0


# ---- probes: stated colour rules, each the same for drawn and for generated pictures ------------


def seen_time(picture: Picture, scene: Scene) -> str:
    """Time of day: whose zenith colour is nearest to the median of rows 2 to 11."""
    top = np.median(picture[2:12].reshape(-1, 3), axis=0)
    return min(PALETTES, key=lambda time: _distance(top, PALETTES[time].zenith))


def seen_ground(picture: Picture, scene: Scene) -> str:
    """Sea, meadow or desert: each pixel of rows 86 to 127 votes for the nearest ground colour.

    The colours are those of the time of day in the caption. A shore may cover half of the sea,
    so a quarter of the votes is enough for it.
    """
    palette = PALETTES[scene.time]
    shades = {
        "sea": _between(palette.far_sea, palette.near_sea),
        "meadow": _between(palette.far_meadow, palette.near_meadow),
        "desert": _between(palette.far_sand, palette.near_sand),
    }
    pixels = picture[86:].reshape(-1, 3)
    away = np.stack([_distances(pixels, colours).min(0) for colours in shades.values()])
    votes = np.bincount(away.argmin(0), minlength=3) / len(pixels)
    return "sea" if votes[0] > 0.25 else ("meadow", "desert")[int(votes[2] > votes[1])]


def seen_light(picture: Picture, scene: Scene) -> str:
    """Sun or moon: some 7x7 window of rows 0 to 72 is mostly of its colour."""
    matches = _distances(picture[:73].reshape(-1, 3), [PALETTES[scene.time].light])[0] < 32
    windows = np.lib.stride_tricks.sliding_window_view(matches.reshape(73, SIZE), (7, 7))
    return "light" if windows.mean((2, 3)).max() >= 0.6 else "none"


def _between(first: Colour, last: Colour) -> list[Colour]:
    """Five shades from one colour to another."""
    shades = np.linspace(first, last, 5).round().astype(int).tolist()
    return [cast("Colour", tuple(shade)) for shade in shades]


def _distance(first: Sequence[float] | NDArray[np.float64], last: Sequence[float]) -> float:
    return float(np.linalg.norm(np.subtract(first, last)))


def _distances(pixels: Picture, colours: list[Colour]) -> NDArray[np.float64]:
    """How far (N, 3) pixels are from each colour: (colours, N)."""
    away: NDArray[np.float64] = np.linalg.norm(
        pixels[None].astype(float) - np.array(colours)[:, None], axis=2
    )
    return away


@dataclass(frozen=True)
class Probe:
    """A question to a picture, and what the scene says the answer is."""

    name: str
    seen: Callable[[Picture, Scene], str]
    true: Callable[[Scene], str]


PROBES: Final = (
    Probe("time of day", seen_time, lambda scene: scene.time),
    Probe("sea, meadow or desert", seen_ground, lambda scene: scene.ground),
    Probe("sun or moon", seen_light, lambda s: "none" if s.light == "none" else "light"),
)


def agreement(probe: Probe, pictures: Sequence[Picture], scenes: Sequence[Scene]) -> float:
    """The share of pictures in which a probe sees what the scene says."""
    pairs = zip(pictures, scenes, strict=True)
    return statistics.mean(probe.seen(picture, s) == probe.true(s) for picture, s in pairs)


# ---- what is measured ---------------------------------------------------------------------------


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes that training never saw."""
    return [random_scene(FIRST_HELD_OUT + index) for index in range(count)]


def spoken(scene: Scene) -> str:
    """A caption that says all there is in a scene."""
    return describe(facets(scene), random.Random(f"evaluate {scene.seed}"))


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, scenes: Sequence[Scene]) -> float:
    """Mean dB over the scenes, between the drawn picture and what the VAE makes of it, in uint8."""
    found = []
    for scene in tqdm(scenes, "reconstruct"):
        drawn = np.asarray(draw(scene))
        x = torch.from_numpy(drawn.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        again = ((y.clamp(-1, 1) + 1) * 127.5).round()[0].permute(1, 2, 0).numpy()
        found.append(-10 * np.log10(np.mean((again - drawn) ** 2) / 255**2))
    return float(np.mean(found))


def generate(pipeline: StableDiffusionPipeline, caption: str, seed: int) -> tuple[Picture, float]:
    """One picture in `STEPS` steps of the saved scheduler, and the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    image = pipeline(caption, num_inference_steps=STEPS, generator=generator).images[0]
    return np.asarray(image), time.perf_counter() - started


def megabytes(folder: Path) -> float:
    """Size of all weights."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6


def labelled_grid(pictures: Sequence[Picture], captions: Sequence[str]) -> Image.Image:
    """All pictures, ten in a row, each with its caption below."""
    columns, wide, high = 10, SIZE + 6, SIZE + 58
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * wide, rows * high), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(9)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * wide + 3, index // columns * high + 3
        grid.paste(Image.fromarray(picture), (left, top))
        pen.text((left, top + SIZE + 1), textwrap.fill(caption, 28), "black", font, spacing=1)
    return grid


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every number with what is required of it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/evaluate_demo_model.py --out demo-model.png",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parents[1] / "sd_progress" / "demo_model",
        help="folder of the saved pipeline (default: the one in the package)",
    )
    parser.add_argument("--out", type=Path, help="write the pictures with their captions here, PNG")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    if not evaluate(pipeline, options.model, options.out):
        raise SystemExit(1)


def evaluate(pipeline: StableDiffusionPipeline, folder: Path, out: Path | None) -> bool:
    """Measure, print, and say whether everything that is required was reached."""
    psnr = reconstruction_psnr(pipeline.vae, held_out_scenes(RECONSTRUCTED))
    scenes = held_out_scenes(CAPTIONS)
    captions = [spoken(scene) for scene in scenes]
    generated = [generate(pipeline, text, k) for k, text in enumerate(tqdm(captions, "generate"))]
    pictures = [picture for picture, _ in generated]
    seconds = statistics.median(taken for _, taken in generated)
    if out is not None:
        labelled_grid(pictures, captions).save(out)
    size = megabytes(folder)
    print(f"VAE reconstruction     {psnr:.2f} dB, mean of {RECONSTRUCTED} held-out scenes (>= 28)")
    drawn = [np.asarray(draw(scene)) for scene in scenes]
    shares = []
    for probe in PROBES:
        shares.append(agreement(probe, pictures, scenes))
        on_drawn = agreement(probe, drawn, scenes)
        by_chance = agreement(probe, [*drawn[1:], drawn[0]], scenes)
        print(
            f"{probe.name:<23}{shares[-1]:.0%} of {CAPTIONS} generated pictures"
            f" ({on_drawn:.0%} of drawn ones, {by_chance:.0%} of drawn ones in the wrong order)"
        )
    mean = statistics.mean(shares)
    print(f"all probes             {mean:.1%} agreement with the caption (>= 90 %)")
    print(f"{STEPS} steps               {seconds:.2f} s at {SIZE}x{SIZE}, median (<= 5)")
    print(f"weights                {size:.2f} MB (<= 8)")
    return (
        psnr >= LEAST_PSNR_DB
        and mean >= LEAST_AGREEMENT
        and seconds <= MOST_SECONDS
        and size <= MOST_MEGABYTES
    )


if __name__ == "__main__":
    main()
