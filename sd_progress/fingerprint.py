"""Owns telling one VAE's weights from another's, quickly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLES = 1024  # values looked at of each tensor
IGNORED = ("_name_or_path", "_diffusers_version")  # of a config: where it lay, not what it is


def fingerprint(vae: nn.Module) -> str | None:
    """A hash of a VAE's config and weights; the same wherever the weights rest.

    Up to 1024 values of each tensor are looked at, evenly spread, because training changes them
    all: a hash of every byte takes a second for a large VAE, this one milliseconds. Weights
    of another dtype have another hash.

    Returns:
        64 hexadecimal digits; None where weights cannot be read (offloaded to disk).
    """
    vae = getattr(vae, "_orig_mod", vae)  # torch.compile's wrapper
    state = {**dict(vae.named_parameters()), **dict(vae.named_buffers())}
    if not state or any(tensor.is_meta for tensor in state.values()):
        return None
    digest = hashlib.sha256(json.dumps([type(vae).__name__, _config(vae)]).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    for sample in _samples([tensor for _, tensor in sorted(state.items())]):
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _config(vae: nn.Module) -> dict[str, str]:
    config = getattr(vae, "config", None)
    items = dict(config) if isinstance(config, Mapping) else vars(config) if config else {}
    return {name: repr(items[name]) for name in sorted(items) if name not in IGNORED}


def _samples(tensors: list[Tensor]) -> list[Tensor]:
    """Of each device, one copy to the CPU instead of one of each tensor."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // SAMPLES))
        by_device.setdefault(tensor.device, []).append(flat[::step].to(torch.float32))
    return [torch.cat(samples).cpu() for samples in by_device.values()]
