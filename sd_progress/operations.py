"""Owns the small tensor functions that layouts are made of, and what they read of a run.

An `Operation` is one function `(latents, reading) -> latents`, with the names of what it reads: a
local variable of the pipeline's `__call__` (`"height"`), or an attribute of the pipeline
(`"self.vae_scale_factor"`, `"self._unpack_latents"`), or only whether there is one (`"image?"`).
The names are read in the step path, by `tap.py`; the functions run later, and know neither frames
nor pipelines.

Shapes: B batch, C latent channels, F frames, h w latent size, N tokens, p patch size. What each
pipeline does was read off, and replayed on, diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .factors import describe_vae


@dataclass(frozen=True, eq=False)
class VaeStatistics:
    """What a VAE says of its latent space.

    Attributes:
        latent_channels: C; None where it does not say.
        scaling_factor: latents were multiplied by it after encoding.
        shift_factor: latents were shifted by it before scaling.
        mean: `latents_mean`, per channel, or per channel of a 2x2 patch (FLUX.2's batch norm);
            (C,) float32; None where there is none.
        std: like `mean`.
        is_video: whether `decode` takes (B, C, F, h, w).
    """

    latent_channels: int | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    mean: Tensor | None = None
    std: Tensor | None = None
    is_video: bool = False

    @classmethod
    def of(cls, vae: object) -> VaeStatistics:
        """Read a diffusers autoencoder's config and buffers; None has neutral statistics."""
        key = describe_vae(vae)

        def column(values: tuple[float, ...] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, device="cpu")

        mean, std = column(key.latents_mean), column(key.latents_std)
        return cls(
            latent_channels=key.latent_channels,
            scaling_factor=key.scaling_factor,
            shift_factor=key.shift_factor,
            mean=mean,
            std=std,
            is_video=isinstance(vae, nn.Module) and any(p.ndim == 5 for p in vae.parameters()),
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read of a run at one step, besides its latents.

    Attributes:
        statistics: of the VAE.
        values: what the layout asked for, by its names; what was not there is missing.
        latents: as the callback has them; what operations for stepped tensors fill in from.
    """

    statistics: VaeStatistics = field(default_factory=VaeStatistics)
    values: Mapping[str, object] = field(default_factory=dict)
    latents: Tensor | None = None

    def __getitem__(self, name: str) -> object:
        if name not in self.values:
            raise ValueError(
                f"{name} must be a variable of the pipeline's call, got {sorted(self.values)}; "
                "this version of diffusers may name it otherwise: register a layout"
            )
        return self.values[name]

    def integer(self, name: str) -> int:
        """A whole number that was read."""
        return int(cast(int, self[name]))

    def number(self, name: str) -> float:
        """A number that was read."""
        return float(cast(float, self[name]))

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A tensor that was read, on the device and in the dtype of `like`."""
        return cast(Tensor, self[name]).to(like.device, like.dtype)

    def optional(self, name: str) -> object | None:
        """What was read, or None."""
        return self.values.get(name)


Function = Callable[[Tensor, Reading], Tensor]


@dataclass(frozen=True)
class Operation:
    """One tensor function, and what it reads of a run."""

    function: Function
    reads: tuple[str, ...] = ()

    def __call__(self, latents: Tensor, reading: Reading) -> Tensor:
        """Apply the function."""
        return self.function(latents, reading)


def operation(*reads: str) -> Callable[[Function], Operation]:
    """Make an `Operation` of a function that reads these names."""
    return lambda function: Operation(function, reads)


# --- normalisation: as the sampler has them -> as `vae.decode` is given them
#
# The first operation makes a new tensor, and the next ones work in it: of large latents, finding
# new memory takes several times as long as the arithmetic.


def _over_channels(values: Tensor, like: Tensor, axis: int = 1) -> Tensor:
    """(C,), or (C * frames,) of Cosmos 1.0, broadcastable over `like`."""
    shape = [1] * like.ndim
    if like.ndim == 5 and values.numel() > like.shape[1]:
        frames = values.reshape(1, like.shape[1], -1, 1, 1)
        return frames[:, :, : like.shape[2]].to(like)
    shape[axis] = -1
    return values.reshape(shape).to(like)


def _standardised(latents: Tensor, reading: Reading, divisor: float = 1.0, axis: int = 1) -> Tensor:
    mean, std = reading.statistics.mean, reading.statistics.std
    if mean is None or std is None:
        return latents / divisor
    std, mean = _over_channels(std, latents, axis), _over_channels(mean, latents, axis)
    return (latents * std).div_(divisor).add_(mean)


@operation()
def scaled(latents: Tensor, reading: Reading) -> Tensor:
    """Latents / scaling_factor."""
    return latents / reading.statistics.scaling_factor


@operation()
def shifted(latents: Tensor, reading: Reading) -> Tensor:
    """Latents / scaling_factor + shift_factor."""
    statistics = reading.statistics
    return (latents / statistics.scaling_factor).add_(statistics.shift_factor)


@operation()
def standardised(latents: Tensor, reading: Reading) -> Tensor:
    """Latents * latents_std + latents_mean; unchanged without statistics."""
    return _standardised(latents, reading)


@operation()
def standardised_or_scaled(latents: Tensor, reading: Reading) -> Tensor:
    """Latents * latents_std / scaling_factor + latents_mean; without statistics, scaled."""
    return _standardised(latents, reading, reading.statistics.scaling_factor)


@operation("self.scheduler.config.sigma_data")
def standardised_over_sigma_data(latents: Tensor, reading: Reading) -> Tensor:
    """Latents * latents_std / sigma_data + latents_mean: the Cosmos models."""
    return _standardised(latents, reading, reading.number("self.scheduler.config.sigma_data"))


@operation("self.scheduler.config.sigma_data")
def over_sigma_data(latents: Tensor, reading: Reading) -> Tensor:
    """Latents / the scheduler's sigma_data."""
    return latents / reading.number("self.scheduler.config.sigma_data")


@operation()
def tokens_standardised(latents: Tensor, reading: Reading) -> Tensor:
    """The same for tokens (B, N, C), whose channels come last."""
    return _standardised(latents, reading, axis=2)


def scaled_by(name: str) -> Operation:
    """Latents * a factor that the pipeline keeps."""
    return Operation(lambda latents, reading: latents * reading.number(name), (name,))


def divided_by(name: str) -> Operation:
    """Latents / a factor that the pipeline keeps."""
    return Operation(lambda latents, reading: latents / reading.number(name), (name,))


def standardised_with(mean: str, std: str, *, is_inverse: bool) -> Operation:
    """Latents * std + mean with statistics that the pipeline keeps; `is_inverse`: it keeps 1/std.

    Both are (C,) or (1, C, 1, 1, 1).
    """

    def apply(latents: Tensor, reading: Reading) -> Tensor:
        centre = _over_channels(reading.tensor(mean, latents).reshape(-1), latents)
        spread = _over_channels(reading.tensor(std, latents).reshape(-1), latents)
        return (latents / spread if is_inverse else latents * spread).add_(centre)

    return Operation(apply, (mean, std))


@operation("self.vae.bn.running_mean", "self.vae.bn.running_var")
def batch_normed(latents: Tensor, reading: Reading) -> Tensor:
    """Latents * sqrt(running_var + 1e-5) + running_mean, whatever eps the VAE says (Ernie)."""
    mean, variance = (
        _over_channels(reading.tensor(f"self.vae.bn.running_{name}", latents), latents)
        for name in ("mean", "var")
    )
    return (latents * torch.sqrt(variance + 1e-5)).add_(mean)


# --- axes


@operation()
def as_they_are(latents: Tensor, reading: Reading) -> Tensor:
    """Nothing is to be done."""
    return latents


def permuted(*axes: int) -> Operation:
    """Axes in another order."""
    return Operation(lambda latents, reading: latents.permute(axes))


@operation()
def as_one_frame(latents: Tensor, reading: Reading) -> Tensor:
    """(B, C, h, w) -> (B, C, 1, h, w): an image for a video VAE; a video stays as it is."""
    return latents.unsqueeze(2) if latents.ndim == 4 else latents


@operation()
def frames_in_batch(latents: Tensor, reading: Reading) -> Tensor:
    """(B, C, F, h, w) -> (B * F, C, h, w): a video for an image VAE; that may be so already."""
    return latents.transpose(1, 2).flatten(0, 1) if latents.ndim == 5 else latents


@operation()
def first_axes_joined(latents: Tensor, reading: Reading) -> Tensor:
    """(B, F, ...) -> (B * F, ...)."""
    return latents.flatten(0, 1)


@operation()
def with_batch(latents: Tensor, reading: Reading) -> Tensor:
    """(C, F, h, w) -> (1, C, F, h, w), where a pipeline has no batch axis."""
    return latents.unsqueeze(0) if latents.ndim == 4 else latents


@operation()
def unpatchified(latents: Tensor, reading: Reading) -> Tensor:
    """(B, 4C, h, w) -> (B, C, 2h, 2w)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels // 4, 2, 2, height, width)
    return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)


@operation()
def patchified(latents: Tensor, reading: Reading) -> Tensor:
    """(B, C, 2h, 2w) -> (B, 4C, h, w)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    shape = (batch, 4 * channels, height // 2, width // 2)
    return patches.permute(0, 1, 3, 5, 2, 4).reshape(shape)


# --- what is not of the picture


def without_first(count: str | int, *, axis: int = 2) -> Operation:
    """Drop leading frames (reference frames, conditions); how many may be read."""

    def apply(latents: Tensor, reading: Reading) -> Tensor:
        drop = count if isinstance(count, int) else int(cast(int, reading.optional(count) or 0))
        return latents.narrow(axis, drop, latents.shape[axis] - drop)

    return Operation(apply, () if isinstance(count, int) else (count,))


def first_channels(count: str) -> Operation:
    """(..., C + conditions) -> (..., C), channels last; how many are the picture's is read."""
    return Operation(lambda x, reading: x[..., : reading.integer(count)], (count,))


@operation("tail_cond")
def without_tail_condition(latents: Tensor, reading: Reading) -> Tensor:
    """(B, F + 1, h, w, C) -> (B, F, h, w, C) where the last frame is a condition (Kandinsky 6)."""
    return latents[:, :-1] if reading.optional("tail_cond") else latents


@operation("guidance_scale")
def conditional_half(latents: Tensor, reading: Reading) -> Tensor:
    """(2B, ...) -> (B, ...) where the batch is doubled for guidance (DiT)."""
    return latents.chunk(2)[0] if reading.number("guidance_scale") > 1 else latents


@operation("self.n_targets")
def one_target_each(latents: Tensor, reading: Reading) -> Tensor:
    """(B, targets * C, h, w) -> (B * targets, C, h, w) (Marigold's intrinsics)."""
    targets = reading.integer("self.n_targets")
    return latents.reshape(latents.shape[0] * targets, -1, *latents.shape[2:])


@operation("self.config.expand_timesteps", "first_frame_mask", "condition")
def with_condition_frame(latents: Tensor, reading: Reading) -> Tensor:
    """The condition where the mask is 0 (Wan 2.2's 5B image-to-video)."""
    if not reading.optional("self.config.expand_timesteps"):
        return latents
    mask = reading.tensor("first_frame_mask", latents)
    return (1 - mask) * reading.tensor("condition", latents) + mask * latents


@operation("video_latents", "context_length")
def with_context_frames(latents: Tensor, reading: Reading) -> Tensor:
    """The context's frames are what they were (AnyFlow); (B, F, C, h, w)."""
    if reading.optional("video_latents") is None:
        return latents
    generated = latents[:, reading.integer("context_length") :]
    context = reading.tensor("video_latents", latents).expand(len(latents), -1, -1, -1, -1)
    return torch.cat([context, generated], dim=1)


@operation("self.normalize_first_frame")
def first_frames_normalised(latents: Tensor, reading: Reading) -> Tensor:
    """The first frames brought to the statistics of those behind them (Kandinsky 5)."""
    normalise = cast(Callable[[Tensor], object], reading["self.normalize_first_frame"])
    result = normalise(latents)
    return result if isinstance(result, Tensor) else latents


# --- windows of a longer video


@operation("output", "chunk_partition", "chunk_idx")
def chunk_in_its_place(latents: Tensor, reading: Reading) -> Tensor:
    """One chunk (B, f, C, h, w) put into the video so far (B, F, C, h, w) (AnyFlow FAR)."""
    lengths = cast(Sequence[int], reading["chunk_partition"])
    start = sum(lengths[: reading.integer("chunk_idx")])
    video = reading.tensor("output", latents).clone()
    video[:, start : start + latents.shape[1]] = latents
    return video


@operation("is_long_video", "accumulated_latents", "overlap_history_latent_frames")
def after_earlier_windows(latents: Tensor, reading: Reading) -> Tensor:
    """One window (B, C, f, h, w) behind the video so far, without its overlap (SkyReels V2)."""
    if not reading.optional("is_long_video") or reading.optional("accumulated_latents") is None:
        return latents
    earlier = reading.tensor("accumulated_latents", latents)
    new = latents[:, :, reading.integer("overlap_history_latent_frames") :]
    return torch.cat([earlier, new], dim=2)


@operation("last_image?", "prefix_video_latents_frames")
def without_end_frames(latents: Tensor, reading: Reading) -> Tensor:
    """The frames of the last image, which come last, are not part of the video (SkyReels V2)."""
    extra = reading.integer("prefix_video_latents_frames") if reading.optional("last_image?") else 0
    return latents[:, :, : latents.shape[2] - extra]


@operation(
    "sampling_type",
    "is_last_section",
    "image_latents",
    "history_latents",
    "total_generated_latent_frames",
    "latent_window_size",
    "history_video?",
)
def section_with_history(latents: Tensor, reading: Reading) -> Tensor:
    """One section (B, C, f, h, w) and as much of its neighbours as is decoded (Framepack)."""
    is_inverted = "INVERTED" in str(reading["sampling_type"]).upper()
    is_last = bool(reading.optional("is_last_section"))
    if is_inverted and is_last:
        latents = torch.cat([reading.tensor("image_latents", latents), latents], dim=2)
    frames = reading.integer("total_generated_latent_frames") + latents.shape[2]
    history = reading.tensor("history_latents", latents)
    shown = 2 * reading.integer("latent_window_size")
    if is_inverted:
        real = torch.cat([latents, history], dim=2)[:, :, :frames]
        section = slice(0, shown + 1 if is_last else shown)
    else:
        real = torch.cat([history, latents], dim=2)[:, :, -frames:]
        section = slice(-shown, None)
    return real[:, :, section] if reading.optional("history_video?") else real


# --- packed images


def unpack_2x2(latents: Tensor, height: int, width: int, vae_scale_factor: int) -> Tensor:
    """(B, N, 4C) -> (B, C, h, w), from the size in pixels; as FLUX packs."""
    batch, _, channels = latents.shape
    rows, columns = (int(side) // (2 * vae_scale_factor) for side in (height, width))
    patches = latents.reshape(batch, rows, columns, channels // 4, 2, 2)
    shape = (batch, channels // 4, 2 * rows, 2 * columns)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def unpacked(
    *names: str, method: str = "_unpack_latents", otherwise: Callable[..., Tensor] | None = None
) -> Operation:
    """Tokens to (B, C, h, w) or (B, C, F, h, w), by the pipeline's own method.

    Args:
        *names: what the method is given after the latents.
        method: the pipeline's method; modular pipelines have none.
        otherwise: what to use where there is none.
    """
    own = f"self.{method}"

    def apply(latents: Tensor, reading: Reading) -> Tensor:
        function = reading.optional(own) or otherwise or reading[own]
        arguments = [reading[name] for name in names]
        return cast(Callable[..., Tensor], function)(latents, *arguments)

    return Operation(apply, (own, *names))


packed_2x2 = unpacked("height", "width", "self.vae_scale_factor", otherwise=unpack_2x2)


@operation(
    "do_patching",
    "height",
    "width",
    "self.vae_scale_factor",
    "self._unpack_latents",
    "self._unpack_latents_no_patch",
)
def unpacked_if_patched(latents: Tensor, reading: Reading) -> Tensor:
    """(B, N, C) -> (B, C, h, w), of 2x2 patches or of single pixels (Bria FIBO)."""
    name = "_unpack_latents" if reading.optional("do_patching") else "_unpack_latents_no_patch"
    unpack = cast(Callable[..., Tensor], reading[f"self.{name}"])
    return unpack(latents, *map(reading.integer, ("height", "width", "self.vae_scale_factor")))


def placed_by(ids: str) -> Operation:
    """(B, N, C) -> (B, C, h, w), each token at the place that its id says (FLUX.2).

    The ids are (B, N, 4) or (N, 4): time, row, column, layer.
    """

    def apply(latents: Tensor, reading: Reading) -> Tensor:
        places = cast(Tensor, reading[ids]).to(latents.device)
        places = places[..., : latents.shape[1], :].long()
        places = places.expand(len(latents), *places.shape[-2:])
        rows, columns = (int(places[..., axis].max()) + 1 for axis in (1, 2))
        flat = places[..., 1] * columns + places[..., 2]  # (B, N)
        index = flat[..., None].expand_as(latents)
        grid = latents.new_zeros(len(latents), rows * columns, latents.shape[2])
        grid = grid.scatter(1, index, latents)
        return grid.transpose(1, 2).reshape(len(latents), -1, rows, columns)

    return Operation(apply, (ids,))


@operation("grid_h", "grid_w", "self.patch_size")
def unpacked_channels_last(latents: Tensor, reading: Reading) -> Tensor:
    """(B, N, p * p * C) -> (B, C, h, w), channels last in the patch (Ideogram 4)."""
    rows, columns, patch = map(reading.integer, ("grid_h", "grid_w", "self.patch_size"))
    patches = latents.reshape(len(latents), rows, columns, patch, patch, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(
        len(latents), -1, rows * patch, columns * patch
    )


@operation()
def layers_in_batch(latents: Tensor, reading: Reading) -> Tensor:
    """(B, C, 1 + layers, h, w) -> (B * layers, C, 1, h, w), without the composite (Qwen)."""
    layers = latents[:, :, 1:].transpose(1, 2)
    return layers.flatten(0, 1).unsqueeze(2)


@operation("processor_output", "batch_size", "self.vae_scale_factor", "self._unpack_latents")
def last_row_unpacked(latents: Tensor, reading: Reading) -> Tensor:
    """(B, N, 4C), several rows of pictures -> (B, C, h, w) of the last row (VisualCloze)."""
    unpack = cast(Callable[..., Sequence[Tensor]], reading["self._unpack_latents"])
    sizes = cast(Mapping[str, Sequence[object]], reading["processor_output"])["image_size"]
    prompts, factor = reading.integer("batch_size"), reading["self.vae_scale_factor"]
    rows = [
        unpack(one[None], sizes[number % prompts], factor)[-1] for number, one in enumerate(latents)
    ]
    return torch.cat(rows)


@operation("shape_list")
def target_unpacked(latents: Tensor, reading: Reading) -> Tensor:
    """(B, N, C, pt, ph, pw), target patches first -> (B, C, F, h, w) (JoyImage Edit Plus)."""
    shapes = cast(Sequence[Sequence[Sequence[int]]], reading["shape_list"])
    return torch.cat([_patches_joined(one, *shapes[n][0]) for n, one in enumerate(latents)])


def _patches_joined(patches: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """(N, C, pt, ph, pw) -> (1, C, F, h, w)."""
    _, channels, *patch = patches.shape
    grid = patches[: frames * rows * columns].reshape(frames, rows, columns, channels, *patch)
    shape = (1, channels, frames * patch[0], rows * patch[1], columns * patch[2])
    return grid.permute(3, 0, 4, 1, 5, 2, 6).reshape(shape)


@operation()
def frames_from_channels(latents: Tensor, reading: Reading) -> Tensor:
    """(B, 2C, F, h, w) -> (B, C, 2F - 1, h, w) (HunyuanImage's refiner)."""
    batch, channels, frames, height, width = latents.shape
    split = latents.transpose(1, 2).reshape(batch, 2 * frames, channels // 2, height, width)
    return split.transpose(1, 2)[:, :, 1:]


# --- packed videos

_VIDEO_PATCHES = ("self.transformer_spatial_patch_size", "self.transformer_temporal_patch_size")
_VIDEO_GRID = ("latent_num_frames", "latent_height", "latent_width", *_VIDEO_PATCHES)

video_tokens = unpacked(*_VIDEO_GRID)
window_tokens = unpacked("w_T_eff", "w_H_eff", "w_W_eff", *_VIDEO_PATCHES)


@operation("out_latents", "first_window_latents", "prev_overlap_len", "overlap_lat", "adain_factor")
def window_behind_others(latents: Tensor, reading: Reading) -> Tensor:
    """One window (B, C, f, h, w) faded into the video so far, as LTX's long videos are joined."""
    new = latents[:, :, : latents.shape[2] - reading.integer("prev_overlap_len")]
    if reading.optional("out_latents") is None:
        return new
    new, so_far = new[:, :, 1:], reading.tensor("out_latents", latents)
    factor = float(cast(float, reading.optional("adain_factor") or 0.0))
    if factor > 0 and reading.optional("first_window_latents") is not None:
        new = _towards(new, reading.tensor("first_window_latents", latents), factor)
    before, tail = so_far[:, :, : -new.shape[2]], so_far[:, :, -new.shape[2] :]
    overlap = reading.integer("overlap_lat") - 1
    if overlap <= 1:
        return torch.cat([before, tail, new], dim=2)
    fading = torch.linspace(1, 0, overlap + 2)[1:-1].reshape(1, 1, -1, 1, 1).to(latents)
    mixed = fading * tail[:, :, -overlap:] + (1 - fading) * new[:, :, :overlap]
    return torch.cat([before, tail[:, :, :-overlap], mixed, new[:, :, overlap:]], dim=2)


def _towards(latents: Tensor, reference: Tensor, factor: float) -> Tensor:
    """Each channel's mean and deviation moved towards the reference's, by `factor` of the way."""
    (std, mean), (std_there, mean_there) = (
        torch.std_mean(x, dim=(2, 3, 4), keepdim=True) for x in (latents, reference)
    )
    spread = torch.lerp(std, std_there, factor).clamp_min(1e-6)
    return (latents - mean) / (std + 1e-6) * spread + torch.lerp(mean, mean_there, factor)


@operation("is_conditioning_image_or_video", "extra_conditioning_num_latents")
def without_leading_tokens(latents: Tensor, reading: Reading) -> Tensor:
    """Drop the condition's tokens, which come first (LTX Condition)."""
    if not reading.optional("is_conditioning_image_or_video"):
        return latents
    return latents[:, reading.integer("extra_conditioning_num_latents") :]


@operation("latent_num_frames", "latent_height", "latent_width")
def without_trailing_tokens(latents: Tensor, reading: Reading) -> Tensor:
    """Drop the conditions' tokens, which come last (LTX-2 Condition and its kin)."""
    frames, height, width = map(
        reading.integer, ("latent_num_frames", "latent_height", "latent_width")
    )
    return latents[:, : frames * height * width]


_CANVAS = (
    "canvas_frames",
    "requested_frames",
    "height",
    "width",
    "self.vae_temporal_compression_ratio",
    "self.vae_spatial_compression_ratio",
    "self._unpack_video_latents",
)


@operation(*_CANVAS)
def canvas_trimmed(latents: Tensor, reading: Reading) -> Tensor:
    """(B, N, C) -> (B, C, F, h, w) of the frames that were asked for (LTX-2 DFR)."""
    canvas, requested, height, width, shorter, smaller = map(reading.integer, _CANVAS[:-1])
    frames, wanted = ((count - 1) // shorter + 1 for count in (canvas, requested))
    rows, columns = height // smaller, width // smaller
    unpack = cast(Callable[..., Tensor], reading["self._unpack_video_latents"])
    return unpack(latents[:, : frames * rows * columns], frames, rows, columns)[:, :, :wanted]


# --- token ids, and flat vectors


@operation("self.vqvae")
def codebook_entries(latents: Tensor, reading: Reading) -> Tensor:
    """(B, N) or (B, h, w) ids -> (B, C, h, w) codebook vectors; NaN where an id is masked."""
    vqvae = reading["self.vqvae"]
    book = vqvae.quantize.embedding.weight.detach().to(latents.device)  # type: ignore[attr-defined]
    return _looked_up(latents, book, _side(latents))


def _side(ids: Tensor) -> tuple[int, ...]:
    if ids.ndim == 3:
        return tuple(ids.shape[1:])
    side = int(ids.shape[1] ** 0.5)
    return side, ids.shape[1] // side


def _looked_up(ids: Tensor, book: Tensor, grid: tuple[int, ...]) -> Tensor:
    is_masked = (ids < 0) | (ids >= len(book))
    entries = book[ids.masked_fill(is_masked, 0).long()].float()
    entries = entries.masked_fill(is_masked[..., None], float("nan"))
    return entries.reshape(len(ids), *grid, -1).movedim(-1, 1)


@operation("height", "width", "self.mode", "self._split", "self._split_joint")
def image_part(latents: Tensor, reading: Reading) -> Tensor:
    """(B, D) -> (B, C, h, w): the VAE's part of a flat vector (UniDiffuser)."""
    is_joint = reading["self.mode"] == "joint"
    split = cast(
        Callable[..., Sequence[Tensor]], reading["self._split_joint" if is_joint else "self._split"]
    )
    return split(latents, reading["height"], reading["width"])[0]


# --- VAE space -> what is shown of it


@operation()
def last_slot(latents: Tensor, reading: Reading) -> Tensor:
    """(B * slots, C, F, h, w) -> (B, C, F, h, w), the slots that are painted (JoyImage Edit)."""
    slots = len(latents) // len(_context(reading))
    return latents[slots - 1 :: slots]


@operation()
def time_across(latents: Tensor, reading: Reading) -> Tensor:
    """(B, C, time, mel) -> (B, C, mel, time), high tones up."""
    return latents.transpose(2, 3).flip(2)


@operation()
def channels_down(latents: Tensor, reading: Reading) -> Tensor:
    """(B, C, time) -> (B, 1, C, time)."""
    return latents.unsqueeze(1)


# --- what the scheduler steps -> what the callback has: the rest is taken from there


def _context(reading: Reading) -> Tensor:
    if reading.latents is None:
        raise ValueError("latents must be known to complete what was stepped, got none")
    return reading.latents


@operation()
def frames_from_batch(stepped: Tensor, reading: Reading) -> Tensor:
    """(B * F, C, h, w) -> (B, C, F, h, w)."""
    whole = _context(reading)
    split = stepped.reshape(whole.shape[0], whole.shape[2], *stepped.shape[1:])
    return split.transpose(1, 2)


@operation()
def behind_first_frame(stepped: Tensor, reading: Reading) -> Tensor:
    """(B, C, F - 1, h, w) -> (B, C, F, h, w), with the first frame as it is."""
    return torch.cat([_context(reading)[:, :, :1], stepped], dim=2)


@operation("num_channels_latents")
def behind_first_frame_of_channels(stepped: Tensor, reading: Reading) -> Tensor:
    """(B, F - 1, h, w, C) -> (B, F, h, w, C), with the first frame as it is (Kandinsky 5)."""
    first = _context(reading)[:, :1, ..., : reading.integer("num_channels_latents")]
    return torch.cat([first, stepped], dim=1)


@operation(*video_tokens.reads, "self._pack_latents")
def packed_behind_first_frame(stepped: Tensor, reading: Reading) -> Tensor:
    """(B, C, F - 1, h, w) -> (B, N, C), with the first frame as it is (LTX image-to-video)."""
    whole = _context(reading)  # unpacked already where the scheduler is about to step it
    whole = video_tokens(whole, reading) if whole.ndim == 3 else whole
    whole = torch.cat([whole[:, :, :1], stepped], dim=2)
    pack = cast(Callable[..., Tensor], reading["self._pack_latents"])
    return pack(whole, *(reading[name] for name in _VIDEO_PATCHES))


@operation()
def without_extra_batch(stepped: Tensor, reading: Reading) -> Tensor:
    """(1, B, ...) -> (B, ...) (Cosmos 3)."""
    return stepped.squeeze(0)


@operation()
def tokens_in_place(stepped: Tensor, reading: Reading) -> Tensor:
    """(B, F * h * w, C) -> (B, C, F, h, w) (SANA's world model)."""
    return stepped.transpose(1, 2).reshape(_context(reading).shape)
