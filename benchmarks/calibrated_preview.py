"""How near calibrated previews of a run come to the VAE's own pictures, and what refitting wins.

A model paints some pictures, seed by seed. After each step the VAE decodes the predicted x0 in
full; that picture, area-averaged to one pixel per latent, is what a preview should look like.

  published  the map that the package has for this VAE
  k=1, 3, 5  maps that `calibrate` fits on synthetic pictures, once
  refit      k = 5, after it has seen one full decode of the same run (`vae_every` does that)

The last table column is what a user of `vae_every` wins: the mean over the steps after the decode.

    python benchmarks/calibrated_preview.py
    python benchmarks/calibrated_preview.py --model FOLDER --seeds 4 --decode-after 10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from denoised_preview import PROMPTS, psnr_db
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from sd_progress import Frame, PreviewCallback, calibrate, demo_model_path, factors
from sd_progress.decoders import Decoder, LinearDecoder
from sd_progress.refit import RefitDecoder
from sd_progress.vae import VaeDecoder

FIRST_SEED = 100


def latents_of_runs(pipe: DiffusionPipeline, seeds: int, steps: int) -> list[list[Tensor]]:
    """For each seed, the predicted x0 after each step: (1, C, h, w), as `vae.decode` takes it."""
    runs = []
    for seed in tqdm(range(seeds), "paint", leave=False):
        frames: list[Frame] = []
        pipe(
            PROMPTS[seed % len(PROMPTS)],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(FIRST_SEED + seed),
            callback_on_step_end=PreviewCallback(
                pipe, frames.append, keep_latents=True, calibrate="never"
            ),
        )
        runs.append([frame.latents for frame in frames if frame.latents is not None])
    return runs


def scores(decoder: Decoder, latents: Sequence[Tensor], pictures: Sequence[np.ndarray]) -> list:
    """PSNR in dB of each, at one pixel per latent."""
    return [
        psnr_db(decoder.decode(one), picture, one.shape[-1])[0]
        for one, picture in zip(latents, pictures, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Paint, decode, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--decode-after", type=int, default=5, help="steps (default: 5)")
    args = parser.parse_args(arguments)
    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    vae, decoded = VaeDecoder(pipe.vae), args.decode_after - 1
    maps = {f"k={k}": calibrate(pipe.vae, kernel_size=k) for k in (1, 3, 5)}
    published = factors.find(pipe.vae)
    if published is not None:
        maps = {f"the package's {published.name!r}": published, **maps}
    runs = latents_of_runs(pipe, args.seeds, args.steps)
    pictures = [[vae.decode(latents) for latents in run] for run in tqdm(runs, "decode")]
    print(f"{args.seeds} seeds, {args.steps} steps; PSNR against the full decode, mean in dB")
    print(f"{'':<24}last step  steps {args.decode_after + 1} to {args.steps}")
    rows: dict[str, list[list[float]]] = {
        name: [
            scores(LinearDecoder(found), run, seen)
            for run, seen in zip(runs, pictures, strict=True)
        ]
        for name, found in maps.items()
    }
    rows["k=5, refit"] = []
    for run, seen in zip(runs, pictures, strict=True):
        learner = RefitDecoder(maps["k=5"])
        learner.learn(run[decoded], seen[decoded])
        rows["k=5, refit"].append(scores(learner, run, seen))
    after = {}
    for name, found_db in rows.items():
        after[name] = fmean(db for run in found_db for db in run[decoded + 1 :])
        print(f"{name:<24}{fmean(run[-1] for run in found_db):9.2f}  {after[name]:13.2f}")
    print(f"refitting after one decode wins {after['k=5, refit'] - after['k=5']:.2f} dB")


if __name__ == "__main__":
    main()
