"""What calibration costs, once, and what the fitted map costs, each frame.

The VAE has the size of Stable Diffusion's (83 million parameters) and random weights, which take as
long as trained ones; its map is of no use. Printed are the seconds, the memory beyond what the VAE
itself takes, and how long it takes to recognise a VAE that was calibrated before. Then, for some
sizes of latents, the median milliseconds of a frame: by the map as previews use it, the same in
torch's own convolution, and by a `TinyDecoder` of TAESD's size.

    python benchmarks/calibrate.py
    python benchmarks/calibrate.py --device cuda
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from sd_progress import Factors, TinyDecoder, calibrate
from sd_progress.decoders import LinearDecoder
from sd_progress.fingerprint import fingerprint

SIZES = ((1, 4, 64, 64), (1, 16, 128, 128), (1, 32, 128, 128))


def stable_diffusions_vae() -> AutoencoderKL:
    """Of the size and shape of Stable Diffusion's, untrained."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).eval()


def peak_mib(device: torch.device) -> float:
    """Of the device's memory, or of the process'."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's part included."""
    began_s = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began_s


def median_ms(call: Callable[[], object], frames: int) -> float:
    """Of some frames, after two that do not count."""
    times = [seconds(call, torch.device("cpu")) for _ in range(frames + 2)]
    return 1e3 * median(times[2:])


def convolved(factors: Factors, latents: Tensor) -> Tensor:
    """The map by one call of torch's."""
    padded = functional.pad(latents, (factors.kernel_size // 2,) * 4, mode="replicate")
    weight, bias = torch.from_numpy(factors.weight), torch.from_numpy(factors.bias)
    return functional.conv2d(padded, weight, bias)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="of the VAE (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--frames", type=int, default=21, help="that are timed (default: 21)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    device = torch.device(args.device)
    vae = stable_diffusions_vae().to(device)
    before_mib, fitted = peak_mib(device), []
    took_s = seconds(lambda: fitted.append(calibrate(vae, least_gain_db=-math.inf)), device)
    print(f"calibrate, {args.device}, {args.threads} threads: {took_s:.1f} s, ", end="")
    print(f"{peak_mib(device) - before_mib:.0f} MiB ({fitted[0].provenance})")
    fingerprint(vae)
    print(f"recognise: {1e3 * seconds(lambda: fingerprint(vae), device):.0f} ms")
    print("\n| latents | map, k = 5, ms | torch's conv2d, ms | tiny decoder, ms |")
    print("|---|---:|---:|---:|")
    for size in SIZES:
        latents, made = torch.randn(size), np.random.default_rng(0)
        factors = Factors(made.normal(0, 0.05, (3, size[1], 5, 5)), np.zeros(3), name="random")
        linear = LinearDecoder(factors)
        tiny = TinyDecoder(AutoencoderTiny(latent_channels=size[1]).to(device).eval())
        cells = (
            median_ms(partial(linear.decode_float, latents), args.frames),
            median_ms(partial(convolved, factors, latents), args.frames),
            median_ms(partial(tiny.decode, latents), 3),
        )
        print(f"| {size} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
