"""What an animated file costs, and how good it is: ours beside what people use otherwise.

The demo model makes three runs at the size asked for: previews by the linear map (enlarged), by the
full VAE, and of the noisy latents. Their frames are written by each way in turn, several times
over; printed are the medians of time, and of the ratio to `imageio.v3.imwrite` in the same round.

PSNR is against the frames that were handed over. "blurred" is the same after a slight blur of
both, as the eye does it: bands in smooth areas cost it, dither does not.

    python benchmarks/animation.py
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from sd_progress import AnimationWriter, Frame, PreviewCallback, demo_model_path
from sd_progress.demo import DEMO_GUIDANCE, DEMO_PROMPT

Frames = NDArray[np.uint8]
BASELINE = "imageio GIF"


def frames_of(kind: str, size_px: int, steps: int) -> Frames:
    """(steps, H, W, 3) uint8: what an animation of this kind of preview is given."""
    pipe = DiffusionPipeline.from_pretrained(demo_model_path())
    pipe.set_progress_bar_config(desc=kind)
    frames: list[Frame] = []
    preview = PreviewCallback(
        pipe,
        frames.append,
        vae_every=1 if kind == "full VAE" else None,
        source="noisy" if kind == "noisy" else "denoised",
    )
    pipe(
        DEMO_PROMPT,
        height=size_px,
        width=size_px,
        num_inference_steps=steps,
        guidance_scale=DEMO_GUIDANCE,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=preview,
    )
    size = (size_px, size_px)
    return np.stack(
        [np.asarray(frame.image.resize(size, Image.Resampling.BICUBIC)) for frame in frames]
    )


def by_imageio(frames: Frames, path: Path) -> None:
    """Imageio's own way, as its documentation has it."""
    iio.imwrite(path, frames, duration=100)


def by_pillow(frames: Frames, path: Path) -> None:
    """Pillow's own way."""
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, duration=100)


def by_us(frames: Frames, path: Path) -> None:
    """Frame by frame, playable after each."""
    writer = AnimationWriter(path, min_side_px=None, hold_last_ms=100)
    for index, frame in enumerate(frames):
        writer.write(
            Frame(frame[None], index, len(frames), None, None, "denoised", "linear", 0.0, None)
        )
    writer.close()


WAYS: dict[str, tuple[Callable[[Frames, Path], None], str]] = {
    BASELINE: (by_imageio, ".gif"),
    "Pillow GIF": (by_pillow, ".gif"),
    "our GIF": (by_us, ".gif"),
    "Pillow WebP": (by_pillow, ".webp"),
    "our WebP": (by_us, ".webp"),
    "Pillow APNG": (by_pillow, ".png"),
    "our APNG": (by_us, ".apng"),
    "our MP4": (by_us, ".mp4"),
}


def psnr_db(a: Frames, b: Frames) -> float:
    """Of all pixels."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def blurred(frames: Frames) -> Frames:
    """Each frame as seen from a little further off."""
    slight = ImageFilter.GaussianBlur(1.5)
    return np.stack([np.asarray(Image.fromarray(frame).filter(slight)) for frame in frames])


def read_back(path: Path, count: int) -> Frames:
    """(count, H, W, 3), by a reader that is not ours."""
    if path.suffix == ".mp4":
        return np.stack(list(iio.imiter(path, plugin="FFMPEG")))[:count]
    with Image.open(path) as image:
        seen = []
        for index in range(count):
            image.seek(index)
            seen.append(np.asarray(image.convert("RGB")))
    return np.stack(seen)


def timed(way: str, frames: Frames, folder: Path) -> tuple[float, Path]:
    """Seconds, and the file."""
    write, suffix = WAYS[way]
    path = folder / f"run{suffix}"
    path.unlink(missing_ok=True)
    began_s = time.perf_counter()
    write(frames, path)
    return time.perf_counter() - began_s, path


def compare(frames: Frames, rounds: int) -> dict[str, tuple[float, float, int, float, float]]:
    """Median seconds, median ratio to the baseline, bytes, PSNR, PSNR blurred; for each way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    made: dict[str, tuple[int, float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in tqdm(range(rounds), desc="rounds", leave=False):
            for way in WAYS:
                taken_s, path = timed(way, frames, Path(name))
                seconds[way].append(taken_s)
                if number == 0:
                    seen = read_back(path, len(frames))
                    soft = psnr_db(blurred(frames), blurred(seen))
                    made[way] = path.stat().st_size, psnr_db(frames, seen), soft
    ratio = functools.partial(_median_ratio, seconds[BASELINE])
    return {way: (median(seconds[way]), ratio(seconds[way]), *made[way]) for way in WAYS}


def _median_ratio(baseline: Sequence[float], others: Sequence[float]) -> float:
    return median(one / other for one, other in zip(baseline, others, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the frames, write them in each way, print a table for each kind of preview."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default: 512)")
    parser.add_argument("--steps", type=int, default=30, help="frames (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken")
    args = parser.parse_args(arguments)
    for kind in ("linear", "full VAE", "noisy"):
        frames = frames_of(kind, args.size, args.steps)
        print(f"\n{kind}: {len(frames)} frames of {args.size}x{args.size}")
        print("| way | seconds | times faster | KiB | PSNR dB | blurred dB |")
        print("|---|---:|---:|---:|---:|---:|")
        for way, (taken_s, faster, size, psnr, soft) in compare(frames, args.rounds).items():
            kib = size / 1024
            print(f"| {way} | {taken_s:.2f} | {faster:.1f} | {kib:.0f} | {psnr:.1f} | {soft:.1f} |")


if __name__ == "__main__":
    main()
