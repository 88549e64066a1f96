"""Tiny real pipelines, random and built offline from configs: at least one of every layout.

`CASES` maps a pipeline's class name to its builder; `build(name, guidance=...)` gives a `Case`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

FAMILIES = ("images", "packed", "video", "tokens")
CASES = {}


def joined(decodes):
    """All decodes of a run, one after the other, as one tensor: chunks of frames, or of a batch."""
    return torch.cat(decodes)


def last(decodes):
    """Only the last decode of a run."""
    return decodes[-1]


@dataclass(frozen=True, eq=False)
class Case:
    """A pipeline, what to call it with, and which of its decodes the last frame shows.

    `decoder` is the path of the module whose `decode` is given VAE-space latents; None where the
    pipeline works on pixels. With a denoiser that knows x0, the `settled` last denoised frames have
    what is decoded at the end, to `tolerance`; 0 where no x0 can be shown.
    """

    pipe: object
    call: dict[str, object]
    decoder: str | None = "vae"
    decoded: Callable[[list[Tensor]], Tensor] = joined
    settled: int = 2
    tolerance: float = 1e-3


def case(*names):
    """Register `build(cls, guidance)` for pipelines of diffusers, by class name."""

    def registered(builder):
        for name in names:
            assert name not in CASES, name
            CASES[name] = builder
        return builder

    return registered


def build(name, *, guidance=True):
    """The case of a pipeline; the same every time, and new objects every time."""
    torch.manual_seed(0)
    built = CASES[name](getattr(diffusers, name.partition(":")[0]), guidance)
    if hasattr(built.pipe, "set_progress_bar_config"):
        built.pipe.set_progress_bar_config(disable=True)
    return built


def generator(seed=3):
    """A seeded generator for a call."""
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=5):
    """Seeded normal numbers, for embeddings."""
    return torch.randn(*shape, generator=generator(seed))


def statistics(channels, seed=7):
    """Random `latents_mean` and `latents_std` of a VAE's config, as lists."""
    mean, std = noise(2, channels, seed=seed)
    return {"latents_mean": mean.tolist(), "latents_std": (std.abs() + 0.5).tolist()}


def filled(module, std=0.2):
    """Give parameters that start at zero (output layers, mostly) random values."""
    numbers = generator(11)
    for parameter in module.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=std, generator=numbers)
    return module.eval()


def load_families():
    """Import all builders, which fills CASES."""
    for family in FAMILIES:
        importlib.import_module(f"zoo.{family}")
    return CASES


def run(case, **extra):
    """Call the pipeline; returns its output and what it gave `decode`, in order."""
    decodes = []
    module = None
    if case.decoder is not None:
        module = case.pipe
        for name in case.decoder.split("."):
            module = getattr(module, name)
        decode = module.decode

        def record(z, *args, **kwargs):
            decodes.append(z.detach().clone())
            return decode(z, *args, **kwargs)

        module.decode = record
    try:
        output = case.pipe(**case.call, **extra)
    finally:
        if module is not None:
            del module.decode
    return output, decodes
