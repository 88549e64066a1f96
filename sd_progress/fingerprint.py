"""Owns telling one VAE's weights from another's, quickly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLES = 1024  # values looked at of each tensor


def fingerprint(vae: nn.Module) -> str | None:
    """A hash of a VAE's config and weights; the same wherever the weights rest.

    Up to 1024 values of each tensor are looked at, evenly spread, because training changes them
    all: a hash of every byte takes a second for a large VAE, this one milliseconds. Weights
    of another dtype have another hash.

    Returns:
        64 hexadecimal digits; None where weights cannot be read (offloaded to disk, quantised).
    """
    vae = getattr(vae, "_orig_mod", vae)  # torch.compile's wrapper
    found = [*vae.named_parameters(), *vae.named_buffers()]
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in found}  # compiled parts
    if not state or any(tensor.is_meta for tensor in state.values()):
        return None
    names = sorted(state)
    digest = hashlib.sha256(json.dumps([type(vae).__name__, _config(vae)]).encode())
    for name in names:
        digest.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
    try:
        samples = _samples([state[name] for name in names])
    except (NotImplementedError, RuntimeError, TypeError):  # tensors that know no such operations
        return None
    for sample in samples:
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _config(vae: nn.Module) -> dict[str, str]:
    """What it is, without where it lay and what wrote it; a file has lists for tuples."""
    config = getattr(vae, "config", None)
    items = dict(config) if isinstance(config, Mapping) else vars(config) if config else {}
    names = sorted(name for name in items if not name.startswith("_"))
    return {name: json.dumps(items[name], default=repr) for name in names}


def _samples(tensors: list[Tensor]) -> list[Tensor]:
    """Of each tensor, in their order; of each device, one copy to the CPU instead of many."""
    by_device: dict[torch.device, list[int]] = {}
    samples = []
    for number, tensor in enumerate(tensors):
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // SAMPLES))
        samples.append(flat[::step].to(torch.float32))
        by_device.setdefault(tensor.device, []).append(number)
    for numbers in by_device.values():
        lengths = [len(samples[number]) for number in numbers]
        copied = torch.cat([samples[number] for number in numbers]).cpu().split(lengths)
        for number, sample in zip(numbers, copied, strict=True):
            samples[number] = sample
    return samples
