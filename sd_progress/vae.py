"""Owns running the user's own VAE, in the middle of a run or before it, leaving no trace on it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import FunctionType
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .pixels import to_uint8


class _Group(Protocol):
    onload_device: torch.device


class _GroupHook(Protocol):
    group: _Group


class VaeDecoder:
    """The pipeline's own VAE, in the middle of its run, leaving no trace on it.

    Runs on the caller's thread and stream. Weights that rest elsewhere, or in a half precision that
    overflows (`force_upcast`), are lent copies for the time of the decode; the very same storages
    are put back afterwards. Offload hooks of the pipeline are not woken.
    """

    name = "vae"

    def __init__(self, vae: nn.Module) -> None:
        self._vae = _uncompiled_module(vae)

    def can_decode(self, latents: Tensor) -> bool:
        """Whether all latents are finite, or ids of entries: masked tokens are not, until the end.

        An id beyond the codebook is no mere error on an accelerator, which it can take down.
        """
        if latents.is_floating_point():
            return bool(latents.isfinite().all())
        entries = getattr(getattr(self._vae, "config", None), "num_vq_embeddings", 0)
        return bool(((latents >= 0) & (latents < entries)).all())

    def decode(
        self,
        latents: Tensor,
        arguments: Mapping[str, object] | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> NDArray[np.uint8]:
        """The first picture of each: of a video VAE, its first frame.

        Args:
            latents: (B, C, h, w), or (B, C, F, h, w) of a video VAE, VAE-space, any device; token
                ids (B, h, w) for a VAE that takes those.
            arguments: more keyword arguments for `vae.decode`.
            value_range: of what `vae.decode` returns.

        Returns:
            (B, H, W, 3) uint8, full resolution.

        Raises:
            FloatingPointError: the VAE made values that are not finite.
        """
        decoded = self.decode_float(latents, arguments)
        images = (decoded if decoded.ndim == 4 else decoded[:, :, 0])[:, :3].cpu()
        if not images.isfinite().all():
            raise FloatingPointError(
                f"vae.decode must give finite values, got NaN or infinity in "
                f"{_work_dtype(self._vae, _decoder_parts)}; "
                "load the VAE in bfloat16 or float32, or leave vae_every out"
            )
        low, high = value_range
        return to_uint8((images - low) / (high - low) * 2 - 1)

    def decode_float(
        self, latents: Tensor, arguments: Mapping[str, object] | None = None
    ) -> Tensor:
        """What `vae.decode` returns, in float32 where the VAE runs; arguments as for `decode`."""
        with _at_work(self._vae, "decode", _decoder_parts) as (decode, device, dtype):
            placed = latents.to(device, dtype if latents.is_floating_point() else latents.dtype)
            extra = {**_arguments_for(self._vae, placed), **(arguments or {})}
            if "return_dict" in _parameters(getattr(type(self._vae), "decode")):  # noqa: B009
                extra["return_dict"] = False
            decoded = decode(_long_enough(self._vae, placed), **extra)
        images = decoded if isinstance(decoded, Tensor) else decoded[0]
        return cast(Tensor, images.float())


class VaeEncoder:
    """The pipeline's own VAE, encoding pictures of ours, as `VaeDecoder` decodes its latents.

    Args:
        vae: any image or video autoencoder of diffusers.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._vae = _uncompiled_module(vae)

    @property
    def exists(self) -> bool:
        """Whether the VAE can encode at all, and its weights can be reached."""
        has_method = callable(getattr(self._vae, "encode", None))
        return has_method and getattr(self._vae, "encoder", None) is not None

    @property
    def takes_video(self) -> bool:
        """Whether it encodes (B, 3, F, H, W) instead of (B, 3, H, W)."""
        encoder = cast(nn.Module, self._vae.encoder)
        return any(_is_conv3d(type(module)) for module in encoder.modules())

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean of the posterior, as `vae.decode` takes it.

        Args:
            images: (B, 3, H, W), or (B, 3, F, H, W) of a video VAE, float in [-1, 1], any device.
            generator: draws from the posterior instead, where the VAE has one.

        Returns:
            (B, C, h, w) or (B, C, f, h, w) float32, where the VAE runs.

        Raises:
            TypeError: the VAE's latents are none that a map could be fitted to.
        """
        with _at_work(self._vae, "encode", _encoder_parts) as (encode, device, dtype):
            encoded = encode(images.to(device, dtype))
        if isinstance(encoded, tuple) and isinstance(encoded[0], Tensor):  # of VidTok's tokens
            return encoded[0].float()
        for name in ("latent_dist", "latents", "latent"):
            found = getattr(encoded, name, None)
            if isinstance(found, Tensor):
                return found.float()
            if found is not None:
                drawn = found.mode() if generator is None else found.sample(generator)
                return cast(Tensor, drawn).float()
        raise TypeError(
            f"vae.encode must return latent_dist, latents or latent, got "
            f"{type(encoded).__name__}; calibrate needs a diffusers autoencoder"
        )


def _uncompiled_module(vae: nn.Module) -> nn.Module:
    """What `torch.compile` has wrapped."""
    return cast(nn.Module, getattr(vae, "_orig_mod", vae))


def _is_conv3d(kind: type) -> bool:
    """Also what only calls itself so: one video encoder's convolutions look at each frame alone."""
    return issubclass(kind, nn.Conv3d) or kind.__name__.endswith("Conv3d")


_Parts = Callable[[nn.Module], Iterator[nn.Module]]


@contextlib.contextmanager
def _at_work(
    vae: nn.Module, method: str, parts: _Parts
) -> Iterator[tuple[Callable[..., Any], torch.device, torch.dtype]]:
    """A method of the VAE, ready to be called, and where and in what its inputs must be."""
    device, dtype = execution_device(vae, parts), _work_dtype(vae, parts)
    hooked = _streams_weights(vae, parts)
    with torch.no_grad(), _own_random_state(device), _uncompiled(), ExitStack() as stack:
        if not hooked:
            stack.enter_context(_lent_weights(vae, device, dtype, parts))
        yield _method(vae, method, hooked=hooked), device, dtype


def _arguments_for(vae: nn.Module, latents: Tensor) -> dict[str, object]:
    """What some decoders want to be told besides, by the names of their parameters."""
    wanted = _parameters(getattr(type(vae), "decode"))  # noqa: B009 - nn.Module's type has none
    config = getattr(vae, "config", None)
    given: dict[str, object] = {}
    if "num_frames" in wanted:  # of each clip, for a VAE that takes frames as a batch
        given["num_frames"] = 1
    if "temb" in wanted and getattr(config, "timestep_conditioning", False):
        given["temb"] = latents.new_zeros(len(latents))  # of a finished picture
    if "shape" in wanted and not latents.is_floating_point():
        channels = getattr(config, "latent_channels", None)
        given["shape"] = (*latents.shape, channels)
        given["force_not_quantize"] = True
    return given


@functools.cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _long_enough(vae: nn.Module, latents: Tensor) -> Tensor:
    """One latent frame twice, for the one decoder that cannot take it alone."""
    is_short = latents.ndim == 5 and latents.shape[2] == 1
    repeats = 2 if is_short and type(vae).__name__ == "AutoencoderKLAllegro" else 1
    return latents.repeat_interleave(repeats, dim=2) if repeats > 1 else latents


def vae_decoder(vae: object, *, is_needed: bool) -> VaeDecoder | None:
    """The full decoder of a pipeline's autoencoder; None if it has none.

    Raises:
        ValueError: the pipeline has none, and it is needed.
    """
    if not isinstance(vae, nn.Module):
        if not is_needed:
            return None
        raise ValueError(
            f"vae_every must be None for a pipeline without a VAE, got {type(vae).__name__} as "
            "its VAE; leave vae_every out"
        )
    return VaeDecoder(vae)


def _method(vae: nn.Module, name: str, *, hooked: bool) -> Callable[..., Any]:
    """The VAE's own; where no hooks bring its weights, past the one that offloads the denoiser."""
    method = getattr(type(vae), name)
    return functools.partial(method if hooked else _without_forward_hook(method), vae)


def _without_forward_hook(method: FunctionType) -> Callable[..., Any]:
    """What `apply_forward_hook` decorated; before diffusers 0.42 only its closure knows."""
    plain = getattr(method, "__wrapped__", None)
    if plain is None and "apply_forward_hook" in method.__qualname__:
        plain = inspect.getclosurevars(method).nonlocals["method"]
    return cast(Callable[..., Any], plain or method)


def _decoder_parts(vae: nn.Module) -> Iterator[nn.Module]:
    """The submodules that decoding uses; the encoder may stay where it is."""
    return (part for name, part in vae.named_children() if name not in ("encoder", "quant_conv"))


def _encoder_parts(vae: nn.Module) -> Iterator[nn.Module]:
    """The submodules that encoding uses."""
    others = ("decoder", "post_quant_conv")
    return (part for name, part in vae.named_children() if name not in others)


def _tensors(vae: nn.Module, parts: _Parts) -> Iterator[Tensor]:
    yield from vae.parameters(recurse=False)
    yield from vae.buffers(recurse=False)
    for part in parts(vae):
        yield from part.parameters()
        yield from part.buffers()


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """What a decoder draws (some draw noise) is not drawn from the run's random state."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _uncompiled() -> AbstractContextManager[object]:
    """A preview's shapes must not make the run's compiled decoder compile itself anew."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return cast(AbstractContextManager[object], torch.compiler.set_stance("force_eager"))


def execution_device(vae: nn.Module, parts: _Parts = _decoder_parts) -> torch.device:
    """Where its inputs must be: with offload hooks, not where its weights rest."""
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    found = _group_onload_device(vae) if found is None else found
    return next(_tensors(vae, parts)).device if found is None else torch.device(found)


def _group_onload_device(vae: nn.Module) -> torch.device | None:
    for hook in _group_hooks(vae):
        return hook.group.onload_device
    return None


def _group_hooks(vae: nn.Module) -> Iterator[_GroupHook]:
    """The hooks of diffusers' group offloading, which bring the weights in group by group."""
    for module in vae.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and "group_offloading" in registry.hooks:
            yield registry.hooks["group_offloading"]


def _work_dtype(vae: nn.Module, parts: _Parts) -> torch.dtype:
    dtype = next((p.dtype for p in _tensors(vae, parts) if p.is_floating_point()), torch.float32)
    upcast = bool(getattr(getattr(vae, "config", None), "force_upcast", False))
    return torch.float32 if dtype == torch.float16 and upcast else dtype


def _streams_weights(vae: nn.Module, parts: _Parts) -> bool:
    """Whether hooks bring the weights in during the call (sequential and group offload)."""
    return any(tensor.is_meta for tensor in _tensors(vae, parts)) or any(
        True for _ in _group_hooks(vae)
    )


@contextlib.contextmanager
def _lent_weights(
    vae: nn.Module, device: torch.device, dtype: torch.dtype, parts: _Parts
) -> Iterator[None]:
    """For the time of the block, these parts' weights are on `device`, the floating ones `dtype`.

    `tensor.data` is swapped rather than `vae.to()` called: afterwards every tensor has the storage
    it had, so nothing is rounded, nothing is moved twice, and no hook is involved.
    """
    rest: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in _tensors(vae, parts):
            wanted = dtype if _needs_upcast(tensor, dtype) else tensor.dtype
            if tensor.device != device or tensor.dtype != wanted:
                rest.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device, wanted)
        yield
    finally:
        for tensor, data in rest:
            tensor.data = data


def _needs_upcast(tensor: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and tensor.dtype == torch.float16
