"""Owns how VAE-space latents become pixels: the linear map, principal components, the full VAE."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import FunctionType
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from . import factors
from .boundary import warn
from .factors import Factors


@runtime_checkable
class Decoder(Protocol):
    """VAE-space latents to pixels; called from one worker thread.

    In the order of the steps; where it lags behind and a target wants the newest, that comes first.
    """

    @property
    def name(self) -> str:
        """What `Frame.decoder` says, for example `"linear:sd1"`."""

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU, VAE-space -> (B, H, W, 3) uint8 RGB."""


class _Group(Protocol):
    onload_device: torch.device


class _GroupHook(Protocol):
    group: _Group


class LinearDecoder:
    """RGB by one small convolution, a few thousand times cheaper than the VAE.

    Args:
        factors: the linear map.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self._weight = torch.from_numpy(np.ascontiguousarray(factors.weight))
        self._bias = torch.from_numpy(np.ascontiguousarray(factors.bias))

    @property
    def name(self) -> str:
        """`"linear:"` and the name of the factors."""
        return f"linear:{self.factors.name}"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, h * upscale, w * upscale, 3) uint8.

        Raises:
            ValueError: the channel count is not the factors'.
        """
        if latents.shape[1] != self.factors.latent_channels:
            raise ValueError(
                f"latents must be (B, {self.factors.latent_channels}, h, w) for factors "
                f"{self.factors.name!r}, got {tuple(latents.shape)}; pass decoder='auto'"
            )
        margin = self.factors.kernel_size // 2
        # replicated, because a border of zeros is grey only in sampler space
        padded = functional.pad(latents.float(), (margin,) * 4, mode="replicate")
        rgb = functional.conv2d(padded, self._weight, self._bias)  # (B, 3 * s * s, h, w)
        return to_uint8(functional.pixel_shuffle(rgb, self.factors.upscale))


class PixelDecoder:
    """Nothing to decode: pipelines in pixel space step the picture itself."""

    name = "pixels"

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, 3, H, W) float, nominally [-1, 1] -> (B, H, W, 3) uint8; one channel is grey."""
        colours = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
        return to_uint8(colours.float())


class PcaDecoder:
    """The first three principal components of the latents as RGB: an honest stand-in.

    Shapes are right, colours mean nothing. The components are those of all latents seen so far in
    the run, each kept pointing the way it did before, so colours do not flicker.
    """

    name = "pca"

    def __init__(self) -> None:
        self._count = 0.0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None
        self._axes: Tensor | None = None

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float on the CPU -> (B, h, w, 3) uint8; of one channel, in grey."""
        pixels = latents.double().movedim(1, -1)  # (B, h, w, C)
        rows = pixels.reshape(-1, pixels.shape[-1])
        finite = rows[rows.isfinite().all(dim=1)]
        mean, axes, spread = self._components(finite if len(finite) else torch.zeros_like(rows))
        rgb = (pixels - mean) @ axes / (2.5 * spread)  # two and a half deviations fill the range
        if rgb.shape[-1] == 1:
            rgb = rgb.expand(*rgb.shape[:-1], 3)
        missing = 3 - rgb.shape[-1]
        return to_uint8(functional.pad(rgb, (0, missing)).movedim(-1, 1).float())

    def _components(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), up to three axes (C, 3) and their standard deviations (3,), of all so far."""
        if self._sum is None or self._products is None or len(self._sum) != rows.shape[1]:
            self._count, self._axes = 0.0, None
            self._sum = torch.zeros(rows.shape[1], dtype=torch.double, device="cpu")
            self._products = torch.outer(self._sum, self._sum)
        self._count += len(rows)
        self._sum += rows.sum(dim=0)
        self._products += rows.T @ rows
        mean = self._sum / self._count
        variances, axes = torch.linalg.eigh(self._products / self._count - mean.outer(mean))
        variances, axes = variances.flip(0)[:3], axes.flip(1)[:, :3]
        if self._axes is not None:
            axes = axes * torch.where((axes * self._axes).sum(dim=0) < 0, -1.0, 1.0)
        self._axes = axes
        return mean, axes, variances.clamp_min(1e-12).sqrt()


class VaeDecoder:
    """The pipeline's own VAE, in the middle of its run, leaving no trace on it.

    Runs on the caller's thread and stream. Weights that rest elsewhere, or in a half precision that
    overflows (`force_upcast`), are lent copies for the time of the decode; the very same storages
    are put back afterwards. Offload hooks of the pipeline are not woken.
    """

    name = "vae"

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae

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
        device, dtype = _execution_device(self._vae), _decode_dtype(self._vae)
        hooked = _streams_weights(self._vae)
        placed = latents.to(device, dtype if latents.is_floating_point() else latents.dtype)
        with torch.no_grad(), _own_random_state(device), _uncompiled(), ExitStack() as stack:
            if not hooked:
                stack.enter_context(_lent_weights(self._vae, device, dtype))
            decode = _decode_method(self._vae, hooked=hooked)
            extra = {**_arguments_for(self._vae, placed), **(arguments or {})}
            (images, *_) = decode(_long_enough(self._vae, placed), **extra, return_dict=False)
        images = images if images.ndim == 4 else images[:, :, 0]
        images = images[:, :3].float().cpu()
        if not images.isfinite().all():
            raise FloatingPointError(
                f"vae.decode must give finite values, got NaN or infinity in {dtype}; "
                "load the VAE in bfloat16 or float32, or leave vae_every out"
            )
        low, high = value_range
        return to_uint8((images - low) / (high - low) * 2 - 1)


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


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) float, nominally [-1, 1] -> (B, H, W, 3) uint8 RGB; NaN becomes mid-grey."""
    levels = (images.nan_to_num(0.0) / 2 + 0.5).clamp(0, 1) * 255
    pixels = levels.round().to(torch.uint8).movedim(1, -1).contiguous()
    return cast(NDArray[np.uint8], pixels.numpy())


def finished_images(output: object, *, is_raw: bool = False) -> NDArray[np.uint8] | None:
    """A pipeline's own pictures or clips, of any `output_type`.

    Args:
        output: PIL pictures, lists of them, an array or a tensor.
        is_raw: whether a tensor is what the decoder returned, in [-1, 1] and not in [0, 1].

    Returns:
        (B, H, W, 3) or (B, F, H, W, 3) uint8; None for latents, for what is no picture, and for
        pictures of different sizes.
    """
    if isinstance(output, list) and output:
        if all(isinstance(x, Image.Image) for x in output):
            return _stacked([np.asarray(picture.convert("RGB")) for picture in output])
        clips = [finished_images(clip) for clip in output if isinstance(clip, list)]
        known = [clip for clip in clips if clip is not None]
        return _stacked(known) if len(known) == len(output) else None
    if isinstance(output, np.ndarray) and output.ndim in (4, 5) and output.shape[-1] == 3:
        return finished_images(torch.from_numpy(output).movedim(-1, -3))
    if isinstance(output, Tensor) and output.ndim in (4, 5) and output.shape[-3] == 3:
        values = output.detach().float().cpu().flatten(0, -4)
        pixels = to_uint8(values if is_raw else values * 2 - 1)
        return pixels.reshape(*output.shape[:-3], *pixels.shape[1:])
    return None


def _stacked(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    return np.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else None


def decoder_maker(
    decoder: str | Factors | Decoder, vae: object, *, is_colour_known: bool
) -> Callable[[], Decoder]:
    """What gives each run its decoder: principal components start anew, all others are shared.

    Args:
        decoder: `"auto"`, the name of factors, a `Factors` or a `Decoder`.
        vae: the autoencoder whose latents are decoded; None in pixel space.
        is_colour_known: whether the pictures have their colours from elsewhere, so that a VAE
            without a linear map is nothing to warn of.

    Raises:
        TypeError: `decoder` is none of these.
        ValueError: there are no factors of that name.
    """
    if decoder == "auto":
        found = None if vae is None else factors.find(vae)
        if found is None and vae is not None and not is_colour_known:
            warn(factors.explain_unknown(vae))
        return PcaDecoder if found is None else functools.partial(_itself, LinearDecoder(found))
    return functools.partial(_itself, _decoder(decoder, vae))


def _itself(decoder: Decoder) -> Decoder:
    return decoder


def _decoder(decoder: str | Factors | Decoder, vae: object) -> Decoder:
    if isinstance(decoder, Factors):
        return LinearDecoder(decoder)
    if isinstance(decoder, str):
        return _named_decoder(decoder, vae)
    if isinstance(decoder, Decoder):
        return decoder
    raise TypeError(
        f"decoder must be 'auto', the name of factors, a Factors or a Decoder, got "
        f"{type(decoder).__name__}; a Decoder has `name` and `decode(latents)`"
    )


def _named_decoder(name: str, vae: object) -> Decoder:
    try:
        return LinearDecoder(factors.by_name(name, vae))
    except ValueError as error:
        raise ValueError(f"decoder must be 'auto' or the name of factors; {error}") from None


def vae_decoder(vae: object) -> VaeDecoder:
    """The full decoder of a pipeline's autoencoder.

    Raises:
        ValueError: the pipeline has none.
    """
    if not isinstance(vae, nn.Module):
        raise ValueError(
            f"vae_every must be None for a pipeline without a VAE, got {type(vae).__name__} as "
            "its VAE; leave vae_every out"
        )
    return VaeDecoder(vae)


def _decode_method(vae: nn.Module, *, hooked: bool) -> Callable[..., Sequence[Tensor]]:
    """`vae.decode`; where no hooks bring its weights, past the one that offloads the denoiser."""
    decode = getattr(type(vae), "decode")  # noqa: B009 - nn.Module's type has none
    return functools.partial(decode if hooked else _without_forward_hook(decode), vae)


def _without_forward_hook(decode: FunctionType) -> Callable[..., Sequence[Tensor]]:
    """What `apply_forward_hook` decorated; before diffusers 0.42 only its closure knows."""
    plain = getattr(decode, "__wrapped__", None)
    if plain is None and "apply_forward_hook" in decode.__qualname__:
        plain = inspect.getclosurevars(decode).nonlocals["method"]
    return cast(Callable[..., Sequence[Tensor]], plain or decode)


def _decoder_parts(vae: nn.Module) -> Iterator[nn.Module]:
    """The submodules that decoding uses; the encoder may stay where it is."""
    for name, child in vae.named_children():
        if name not in ("encoder", "quant_conv"):
            yield child


def _tensors(vae: nn.Module) -> Iterator[Tensor]:
    yield from vae.parameters(recurse=False)
    yield from vae.buffers(recurse=False)
    for part in _decoder_parts(vae):
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


def _execution_device(vae: nn.Module) -> torch.device:
    """Where its inputs must be: with offload hooks, not where its weights rest."""
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    found = _group_onload_device(vae) if found is None else found
    return next(_tensors(vae)).device if found is None else torch.device(found)


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


def _decode_dtype(vae: nn.Module) -> torch.dtype:
    dtype = next((p.dtype for p in _tensors(vae) if p.is_floating_point()), torch.float32)
    upcast = bool(getattr(getattr(vae, "config", None), "force_upcast", False))
    return torch.float32 if dtype == torch.float16 and upcast else dtype


def _streams_weights(vae: nn.Module) -> bool:
    """Whether hooks bring the weights in during the decode (sequential and group offload)."""
    return any(tensor.is_meta for tensor in _tensors(vae)) or any(True for _ in _group_hooks(vae))


@contextlib.contextmanager
def _lent_weights(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """For the time of the block, the decoder's weights are on `device`, the floating ones `dtype`.

    `tensor.data` is swapped rather than `vae.to()` called: afterwards every tensor has the storage
    it had, so nothing is rounded, nothing is moved twice, and no hook is involved.
    """
    rest: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in _tensors(vae):
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
