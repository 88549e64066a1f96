"""Time that previews take of the run's own thread, and memory that they keep, step by step.

A scheduler steps latents in a loop of its own, with convolutions in all threads of torch in
between, as a denoiser would do. PNGs, a GIF and a queue are attached. Printed are, for each shape,
the median and the 90th percentile of the time that a step spends in our code, listening to the
scheduler included, and, in a run of its own, what lines of the package have allocated after some of
the steps (those of the thread that draws, too).

    python benchmarks/step_path.py
"""

from __future__ import annotations

import argparse
import gc
import itertools
import queue
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from backlog import pipeline
from diffusers import StableDiffusion3Pipeline
from torch.nn import functional
from tqdm.auto import tqdm

from sd_progress import PreviewCallback

SHAPES = ((2, 4, 64, 64), (1, 16, 128, 128))


def denoise(seconds: float) -> None:
    """Keep all threads of torch busy for so long."""
    images, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        functional.conv2d(images, weight, padding=1)


def stepped(
    pipe: StableDiffusion3Pipeline, shape: Sequence[int], steps: int, after: Callable[[int], None]
) -> None:
    """Step random latents; `after` each step, say so."""
    pipe.scheduler.set_timesteps(steps, mu=1.0)
    latents, output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    for index, timestep in enumerate(tqdm(pipe.scheduler.timesteps, mininterval=1, leave=False)):
        latents = pipe.scheduler.step(output, timestep, latents, return_dict=False)[0]
        after(index)


def times_ms(shape: Sequence[int], steps: int) -> list[float]:
    """Of each step but the first, which starts the threads, and the last, which waits for files."""
    pipe, totals = pipeline(channels=shape[1]), [0.0]
    with tempfile.TemporaryDirectory() as name:
        targets = Path(name, "steps"), Path(name, "run.gif"), queue.Queue[object](1)
        with PreviewCallback(pipe, *targets) as preview:

            def after(index: int) -> None:
                totals.append(preview.stats.step_path_s)
                denoise(0.1)

            stepped(pipe, shape, steps, after)
    return [1e3 * (b - a) for a, b in itertools.pairwise(totals[1:-1])]


def allocated(shape: Sequence[int], steps: int) -> dict[int, int]:
    """Bytes, after a quarter, a half and all of the steps."""
    pipe, found = pipeline(channels=shape[1]), dict[int, int]()
    ours = tracemalloc.Filter(inclusive=True, filename_pattern="*/sd_progress/*")
    tracemalloc.start()
    with PreviewCallback(pipe, lambda frame: None) as preview:

        def after(index: int) -> None:
            if index + 1 in (steps // 4, steps // 2, steps - 1):
                while preview.stats.frames <= index:
                    time.sleep(0.01)
                gc.collect()
                traces = tracemalloc.take_snapshot().filter_traces([ours]).traces
                found[index + 1] = sum(trace.size for trace in traces)

        stepped(pipe, shape, steps, after)
    tracemalloc.stop()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each shape, print a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    for shape in SHAPES:
        times = sorted(times_ms(shape, args.steps))
        late = times[len(times) * 9 // 10]
        print(f"{shape}: median {median(times):.2f} ms a step, 90th percentile {late:.2f} ms")
    for step, size in allocated(SHAPES[0], 4 * args.steps).items():
        print(f"after {step} steps: {size} bytes allocated by lines of sd_progress")


if __name__ == "__main__":
    main()
