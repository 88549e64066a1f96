"""Memory of a run whose files are slow: many steps of large latents, and a writer that sleeps.

A scheduler steps latents in a loop of its own, faster than any model denoises four pictures of a
megapixel. One target sleeps at each frame; another is a queue that holds one. Printed are the
resident memory beyond that of the same loop without a preview, what waited in memory and on disk,
whether the slow target got every frame in order, and how old the queue's frame was, in steps, as
each step ended.

    python benchmarks/backlog.py
    python benchmarks/backlog.py --steps 200 --step-ms 20
    python benchmarks/backlog.py --step-ms 0    # more than can be drawn: see what is left out
"""

from __future__ import annotations

import argparse
import queue
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tqdm.auto import tqdm

from sd_progress import Frame, PreviewCallback
from sd_progress.run import MAX_WAITING_BYTES

SHAPE = (4, 16, 128, 128)
MIB = 2**20


class Sleeper:
    """A writer that is slower than the run."""

    def __init__(self, seconds: float) -> None:
        self.steps: list[int] = []
        self._seconds = seconds

    def write(self, frame: Frame) -> None:
        """Sleep, then note the frame, and that it is whole."""
        time.sleep(self._seconds)
        assert frame.images.shape == (4, 128, 128, 3)
        assert frame.images.any()
        self.steps.append(frame.step_index)

    def close(self) -> None:
        """Do nothing."""


def pipeline(channels: int = 16) -> StableDiffusion3Pipeline:
    """One with so many latent channels; only its scheduler is used."""
    vae = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4,),
        norm_num_groups=1,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    names = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    return StableDiffusion3Pipeline(
        vae=vae,
        transformer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(names),
    )


def resident_mib(name: str = "VmRSS") -> float:
    """Memory of this process now; `"VmHWM"` is its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1024


def loop(
    pipe: StableDiffusion3Pipeline, steps: int, step_s: float, newest: queue.Queue[Frame]
) -> list[int]:
    """Step random latents; how many steps behind the queue's frame was, after each step."""
    scheduler, behind = pipe.scheduler, []
    scheduler.set_timesteps(steps, mu=1.0)
    latents, output = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    for index, timestep in enumerate(tqdm(scheduler.timesteps, mininterval=1, leave=False)):
        time.sleep(step_s)
        if newest.queue:
            behind.append(index - 1 - newest.queue[0].step_index)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return behind


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the loop without and with the preview, print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--step-ms", type=float, default=5, help="what a step takes besides (default: 5)"
    )
    parser.add_argument("--sleep-ms", type=float, default=50, help="what a frame takes the writer")
    args = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    pipe, newest, sleeper = pipeline(), queue.Queue[Frame](1), Sleeper(args.sleep_ms / 1e3)
    loop(pipe, min(args.steps, 50), 0.0, newest)
    with PreviewCallback(pipe, Sleeper(0.0), newest):
        loop(pipe, 10, 0.0, newest)
    before_mib = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    with PreviewCallback(pipe, sleeper, newest) as preview:
        began_s = time.perf_counter()
        behind = loop(pipe, args.steps, args.step_ms / 1e3, newest)
        loop_s = time.perf_counter() - began_s
        at_end_mib = resident_mib("VmHWM") - before_mib
        while not newest.queue or newest.queue[0].step_index < args.steps - 1:
            time.sleep(0.01)
            if preview.stats.left_out:  # the last one may be among them
                break
    stats = preview.stats
    peak_mib, limit_mib = resident_mib("VmHWM") - before_mib, MAX_WAITING_BYTES / MIB
    latents_mib = 4 * torch.Size(SHAPE).numel() / MIB
    print(f"{args.steps} steps of {SHAPE} latents, {latents_mib:.0f} MiB each, in {loop_s:.1f} s")
    print(f"memory beyond before: {at_end_mib:.0f} MiB in the loop, {peak_mib:.0f} MiB in all")
    print(f"limit of what waits: {limit_mib:.0f} MiB; beyond it: {peak_mib - limit_mib:.0f} MiB")
    print(f"waited in memory: at most {stats.peak_backlog_bytes / MIB:.0f} MiB")
    print(f"waited on disk: {stats.spilled_bytes / MIB:.0f} MiB")
    is_whole = sleeper.steps == list(range(args.steps))
    print(f"the slow target got {len(sleeper.steps)} frames, all and in order: {is_whole}")
    print(f"left out: {stats.left_out}; dropped by the queue's target: {stats.dropped}")
    print(f"the queue's frame was behind by {median(behind):.0f} steps, at most {max(behind)}")
    print(f"time in the run's thread: {1e3 * stats.step_path_s / stats.steps:.2f} ms a step")


if __name__ == "__main__":
    main()
