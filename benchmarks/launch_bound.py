"""What previews cost a run whose steps are all Python: where a GPU waits for the next launch.

Small models on a fast GPU are done with each operation before Python has launched the next one.
Then nothing that previews do in other threads is free: only one thread at a time runs Python. Here
the same is had without a GPU. A Stable Diffusion 3 with layers of next to no width computes
on one core; the others have nothing to do. Whole runs, in turns; the time of each is divided by
that of the same round's run with nothing attached. Printed are medians.

    python benchmarks/launch_bound.py
    python benchmarks/launch_bound.py --rounds 30 --steps 50
"""

from __future__ import annotations

import argparse
import functools
import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from backlog import pipeline
from diffusers import SD3Transformer2DModel
from overhead import (
    BUDGETED,
    NOTHING,
    OURS,
    WAYS,
    Model,
    Place,
    WatchedPreview,
    count,
    image_model,
    measured,
)

Targets = Callable[[Path], Sequence[object]]
TARGETS: dict[str, Targets] = {
    "a function that does nothing": lambda folder: [lambda frame: None],
    "a queue of one": lambda folder: [queue.Queue[object](1)],
    "PNGs": lambda folder: [folder / "steps"],
    "a GIF": lambda folder: [folder / "run.gif"],
    OURS: lambda folder: [folder / "steps", folder / "run.gif", queue.Queue[object](1)],
}


def slight_model(steps: int) -> Model:
    """Stable Diffusion 3 with its 64x64 latents of 16 channels, and layers of next to no width."""
    place = Place(torch.device("cpu"), torch.float32, is_small=True, steps=steps)
    pipe = pipeline()
    width = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    pipe.transformer = place.made(
        SD3Transformer2DModel,
        sample_size=64,
        patch_size=8,
        num_layers=24,
        attention_head_dim=8,
        num_attention_heads=2,
        **width,
    )
    inputs = place.prompts(77, 16) | place.prompts(16, name="pooled_prompt_embeds")
    inputs["output_type"] = "latent"
    return image_model("slight", place, pipe, 64, **inputs)  # its VAE keeps the size


def previewed(
    targets: Targets, model: Model, folder: Path, *, budget: float | None = None
) -> WatchedPreview:
    """A callback with these targets, all settings as they come."""
    options = {"calibrate": "never", "budget": budget}  # random weights
    return WatchedPreview(model.pipe, *targets(folder), **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all targets in turns, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=count, default=30, help="of a run (default: 30)")
    parser.add_argument("--rounds", type=count, default=15, help="default: 15")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = slight_model(args.steps)
    ways = {name: functools.partial(previewed, targets) for name, targets in TARGETS.items()}
    ways[BUDGETED] = functools.partial(previewed, TARGETS[OURS], budget=0.02)
    scores = measured(model, {NOTHING: WAYS[NOTHING], **ways}, args.rounds)
    print(f"{args.steps} steps, {args.rounds} rounds, torch {torch.__version__}")
    print("| target | ms per step | ratio | ms in callback | frames of a run |")
    print("|---|---:|---:|---:|---:|")
    for name, score in scores.items():
        whole = f"{1e3 * median(score.seconds) / args.steps:.2f} | {score.ratio(scores[NOTHING])}"
        inside = f"{1e3 * median(score.watch.seconds):.2f}" if score.watch.seconds else "-"
        frames = [preview.stats.frames for preview in score.watch.previews]
        print(f"| {name} | {whole} | {inside} | {median(frames) if frames else '-'} |")


if __name__ == "__main__":
    main()
