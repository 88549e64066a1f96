"""Owns looking into a VAE: round trips, channels, principal components, ways between latents."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from . import factors
from .decoders import LinearDecoder
from .factors import Factors, VaeKey, describe_vae
from .latent_space import Space
from .pixels import to_uint8
from .scores import Pair, reduced, scored
from .synthetic import dead_leaves
from .vae import VaeDecoder, VaeEncoder

__all__ = [
    "WAYS",
    "ChannelStatistics",
    "Components",
    "Lab",
    "RoundTrip",
    "Usage",
    "Way",
    "channel_statistics",
    "colour_map",
    "contributions",
    "interpolated",
    "latent_pixels",
    "principal_components",
    "psnr",
    "round_trip",
    "ssim",
    "walked",
]

Way = Literal["linear", "spherical"]
WAYS: Final[tuple[Way, ...]] = ("linear", "spherical")

SSIM_SIDE: Final = 11  # of the Gaussian window, whose deviation is 1.5 pixels
REFERENCE_SIDE: Final = 128
REFERENCE_COUNT: Final = 2
MOST_DISTANCES: Final = 2**24  # at once, between latents and a codebook


@dataclass(frozen=True, eq=False)
class Lab:
    """A VAE, with its latents in both spaces: its own, and the one that a sampler works in.

    Sampler-space latents are `(latents - centre) * gain`; a diffusion model expects N(0, 1) there.

    Attributes:
        space: the VAE and its shapes.
        key: what the VAE says of itself.
        gain: (C,) float64.
        centre: (C,) float64.
    """

    space: Space
    key: VaeKey
    gain: NDArray[np.float64]
    centre: NDArray[np.float64]

    @classmethod
    def of(cls, vae: nn.Module) -> Lab:
        """What `vae` is, from its config and from encoding one small picture.

        Raises:
            TypeError: it is no autoencoder of pictures.
        """
        space, key = Space.of(vae), describe_vae(vae)
        gain, centre = (_per_channel(values, space.channels) for values in key.normalisation)
        return cls(space, key, gain, centre)

    @property
    def vae(self) -> nn.Module:
        """The VAE itself."""
        return self.space.vae

    def picture(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """(1, 3, H, W) float in [-1, 1], cut around its middle to whole latents.

        Args:
            image: of any mode.
            size: width and height to bring it to first, by cutting and resizing; None leaves it.

        Raises:
            ValueError: it is smaller than one latent.
        """
        image = image.convert("RGB")
        ratio = self.space.ratio
        width, height = (side // ratio * ratio for side in size or image.size)
        if not width or not height:
            raise ValueError(
                f"image must be at least {ratio} pixels a side for this VAE, got "
                f"{'x'.join(map(str, size or image.size))}; pass a larger one"
            )
        if size is not None:
            image = _covering(image, width, height)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels = np.array(image)[top : top + height, left : left + width]
        return torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1

    def encode(self, picture: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latents of a picture; of a video VAE, those of a short clip that stands still.

        Args:
            picture: (1, 3, H, W) in [-1, 1].
            generator: draws from the posterior; None takes its mean.

        Returns:
            (1, C, h, w) or (1, C, f, h, w) float32 on the CPU.
        """
        return VaeEncoder(self.vae).encode(self._batch(picture), generator).cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """(1, C, h, w) or (1, C, f, h, w) -> (1, 3, H, W) float32, not clamped: the first frame."""
        decoded = VaeDecoder(self.vae).decode_float(latents)
        frame = decoded if decoded.ndim == 4 else decoded[:, :, 0]
        colours = frame[:1, :3] if frame.shape[1] >= 3 else frame[:1, :1].expand(-1, 3, -1, -1)
        return colours.cpu()

    def shown(self, latents: Tensor) -> Image.Image:
        """What `decode` makes of them, as a picture."""
        return Image.fromarray(to_uint8(self.decode(latents))[0])

    def to_sampler(self, latents: Tensor) -> Tensor:
        """VAE space -> sampler space; any (B, C, ...)."""
        gain, centre = self._columns(latents)
        return (latents - centre) * gain

    def from_sampler(self, latents: Tensor) -> Tensor:
        """Sampler space -> VAE space; any (B, C, ...)."""
        gain, centre = self._columns(latents)
        return latents / gain + centre

    def references(self, seed: int = 0) -> list[Tensor]:
        """A few synthetic pictures, (1, 3, H, W), that any VAE of photographs should do well on."""
        ratio = self.space.ratio
        side = max(-(-REFERENCE_SIDE // ratio), 8) * ratio
        generator = torch.Generator().manual_seed(seed)
        return list(dead_leaves(REFERENCE_COUNT, side, generator).split(1))

    def _batch(self, picture: Tensor) -> Tensor:
        if not self.space.is_video:
            return picture
        return picture[:, :, None].repeat(1, 1, self.space.frames, 1, 1)

    def _columns(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * (latents.ndim - 2))
        gain, centre = (
            torch.from_numpy(values).to(latents.device, latents.dtype).reshape(shape)
            for values in (self.gain, self.centre)
        )
        return gain, centre


def _per_channel(values: NDArray[np.float64], channels: int) -> NDArray[np.float64]:
    """(C,), whatever a VAE states: one number, C, or those of each channel's frames or patches."""
    if len(values) % channels == 0:
        return np.asarray(values.reshape(channels, -1).mean(axis=1), np.float64)
    return np.full(channels, values.mean())


def _covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resized, bicubically, to cover so many pixels with as few as possible to cut."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# --- the round trip


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """A picture, encoded and decoded.

    Attributes:
        picture: (1, 3, H, W) in [-1, 1].
        latents: (1, C, h, w) or (1, C, f, h, w), VAE space.
        decoded: (1, 3, H, W), not clamped.
        encode_s: how long encoding took.
        decode_s: how long decoding took.
        peak_bytes: the most memory in use: on a GPU by torch since the beginning, else by the
            process in all its life; None where neither can be known.
    """

    picture: Tensor
    latents: Tensor
    decoded: Tensor
    encode_s: float
    decode_s: float
    peak_bytes: int | None

    @property
    def psnr_db(self) -> float:
        """Of the picture that is shown, whose colours are clamped; 100 for no difference."""
        return psnr(self.decoded, self.picture)

    @property
    def ssim(self) -> float:
        """Structural similarity: 1 for no difference."""
        return ssim(self.decoded, self.picture)

    @property
    def difference(self) -> NDArray[np.float32]:
        """(H, W): the largest of the three colours' differences, in levels of 255."""
        off = (self.decoded.nan_to_num(0.0).clamp(-1, 1) - self.picture).abs() * 127.5
        return cast("NDArray[np.float32]", off[0].amax(dim=0).numpy())

    @property
    def saturated(self) -> float:
        """The share of the decoder's values that had to be clamped by more than two levels."""
        return float((self.decoded.nan_to_num(0.0).abs() > 1 + 2 / 127.5).float().mean())

    @property
    def not_finite(self) -> int:
        """How many values are NaN or infinite, of latents and picture."""
        return int(sum((~x.isfinite()).sum() for x in (self.latents, self.decoded)))


def round_trip(lab: Lab, picture: Tensor, generator: torch.Generator | None = None) -> RoundTrip:
    """Encode and decode a picture, and watch the clock and the memory.

    Args:
        lab: the VAE.
        picture: (1, 3, H, W) in [-1, 1].
        generator: draws from the posterior; None takes its mean.
    """
    is_cuda = lab.space.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(lab.space.device)
    began_s = time.perf_counter()
    latents = lab.encode(picture, generator)
    encoded_s = time.perf_counter()
    decoded = lab.decode(latents)
    decoded_s = time.perf_counter()
    peak = torch.cuda.max_memory_allocated(lab.space.device) if is_cuda else _process_peak()
    decoded = at_size_of(picture, decoded)
    return RoundTrip(picture, latents, decoded, encoded_s - began_s, decoded_s - encoded_s, peak)


def at_size_of(picture: Tensor, decoded: Tensor) -> Tensor:
    """Some VAEs draw every picture at one size."""
    size = picture.shape[-2:]
    if decoded.shape[-2:] == size:
        return decoded
    return functional.interpolate(decoded, size, mode="bicubic", antialias=True)


def _process_peak() -> int | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def psnr(drawn: Tensor, wanted: Tensor) -> float:
    """In dB, of (B, 3, H, W) in [-1, 1]; what is drawn is clamped; 100 for no difference."""
    error = (drawn.nan_to_num(0.0).clamp(-1, 1) - wanted).double().square().mean() / 4
    return float(-10 * error.clamp_min(1e-10).log10())


def ssim(drawn: Tensor, wanted: Tensor) -> float:
    """Mean structural similarity of (1, 3, H, W) in [-1, 1], over the colours.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
    2004, with their Gaussian window of 11 by 11, where it lies wholly inside the picture.
    """
    side = min(SSIM_SIDE, *(side - 1 + side % 2 for side in wanted.shape[-2:]))
    line = torch.exp(-((torch.arange(side, dtype=torch.double) - side // 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def smooth(values: Tensor) -> Tensor:
        return functional.conv2d(values, window[None, None])

    x, y = (
        (v[0].double().nan_to_num(0.0).clamp(-1, 1) / 2 + 0.5)[:, None] for v in (drawn, wanted)
    )
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    spread = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float((likeness / spread).mean())


# --- channels


@dataclass(frozen=True)
class ChannelStatistics:
    """Of one latent channel, in sampler space, where a diffusion model expects N(0, 1)."""

    mean: float
    deviation: float
    low: float
    high: float


def channel_statistics(lab: Lab, latents: Tensor) -> list[ChannelStatistics]:
    """One for each channel of VAE-space latents (1, C, ...)."""
    rows = lab.to_sampler(latents.double()).movedim(1, 0).flatten(1)
    return [
        ChannelStatistics(
            float(row.mean()), float(row.std(correction=0)), float(row.min()), float(row.max())
        )
        for row in rows
    ]


def walked(lab: Lab, latents: Tensor, direction: NDArray[np.float64], step: float) -> Tensor:
    """Latents moved, everywhere alike, in sampler space.

    Args:
        lab: the VAE.
        latents: (1, C, ...), VAE space.
        direction: (C,); one channel's is 1 there and 0 elsewhere.
        step: how many times `direction`; 0 gives the very same latents.
    """
    if step == 0:
        return latents
    shape = (-1, *(1,) * (latents.ndim - 2))
    moved = torch.from_numpy(step * direction / lab.gain).reshape(shape)
    return latents + moved.to(latents.dtype)


# --- colour


def colour_map(lab: Lab) -> Factors:
    """The linear map that is known for the VAE, or the best affine one for some pictures."""
    known = factors.find(lab.vae)
    if known is not None:
        return known
    pairs = [_still_pair(lab, picture) for picture in lab.references()]
    latents = torch.cat([pair.latents.movedim(1, -1).flatten(0, -2) for pair in pairs]).double()
    colours = [reduced(pair.pictures, pair.latents, 1) for pair in pairs]
    wanted = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in colours]).double()
    with_one = functional.pad(latents, (0, 1), value=1.0)
    table = np.linalg.lstsq(with_one.numpy(), wanted.numpy(), rcond=None)[0]
    found = Factors.from_table(table[:-1], table[-1], name="fitted")
    gains = [scored(found, pair, 1).gain_db for pair in pairs]
    text = f"fitted now on {len(pairs)} synthetic pictures, {np.mean(gains):.1f} dB above flat ones"
    return Factors(found.weight, found.bias, "fitted", text)


def _still_pair(lab: Lab, picture: Tensor) -> Pair:
    latents = lab.encode(picture)
    return Pair(picture, latents if latents.ndim == 4 else latents[:, :, 0])


def contributions(
    lab: Lab, colours: Factors, steps: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """What each channel does to colour, by a map, where all others are at their centre.

    Args:
        lab: the VAE.
        colours: a map for it.
        steps: sampler-space values of the channel.

    Returns:
        (C, 3) RGB, in levels of 255, for one step up from the centre; and the colours themselves,
        (C, len(steps), 3) uint8.
    """
    side, channels = colours.kernel_size, lab.space.channels
    values = torch.zeros(channels, len(steps) + 2, channels)
    for channel in range(channels):
        values[channel, :, channel] = torch.tensor([*steps, 0.0, 1.0])
    rows = lab.from_sampler(values.reshape(-1, channels))
    flat = rows[:, :, None, None].expand(-1, -1, side, side).contiguous()
    drawn = LinearDecoder(colours).decode_float(flat).mean(dim=(-2, -1))
    drawn = drawn.reshape(channels, len(steps) + 2, 3)
    levels = (drawn[:, -1] - drawn[:, -2]).double() * 127.5
    return levels.numpy(), to_uint8(drawn[:, :-2].movedim(-1, 1)[..., None])[:, :, 0]


# --- principal components


@dataclass(frozen=True, eq=False)
class Components:
    """The principal components of latent pixels in sampler space, the largest first.

    Attributes:
        mean: (C,).
        axes: (K, C), of length 1, each with its largest entry positive.
        variances: (K,), with N - 1 in the denominator.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    variances: NDArray[np.float64]

    @property
    def explained(self) -> NDArray[np.float64]:
        """(K,): how much of all variance the first one, two, three, ... have together."""
        total = self.variances.sum()
        return np.cumsum(self.variances) / (total if total > 0 else 1.0)


def principal_components(rows: NDArray[np.float64]) -> Components:
    """Of N samples of C channels each.

    Args:
        rows: (N, C), N at least 2.

    Raises:
        ValueError: there are fewer, or one is not finite.
    """
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"rows must be at least 2 and finite, got {len(rows)}"
            f"{'' if np.isfinite(rows).all() else ' with NaN or infinity'}; "
            "pass a larger picture, or see what is wrong with the VAE by a round trip"
        )
    mean = rows.mean(axis=0)
    _, spread, axes = np.linalg.svd(rows - mean, full_matrices=False)
    largest = np.abs(axes).argmax(axis=1)
    signs = np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)
    return Components(mean, axes * signs[:, None], spread**2 / (len(rows) - 1))


def latent_pixels(lab: Lab, latents: Sequence[Tensor]) -> NDArray[np.float64]:
    """(N, C): every pixel of every (1, C, ...) of them, in sampler space."""
    rows = [lab.to_sampler(z.double()).movedim(1, -1).flatten(0, -2) for z in latents]
    return cast("NDArray[np.float64]", torch.cat(rows).numpy())


def nearest(lab: Lab, latents: Sequence[Tensor], count: int) -> list[int]:
    """The numbers of those that are most like the first, which is the first of them.

    Compared are the means of four by four parts, so that sizes may differ.

    Args:
        lab: the VAE.
        latents: (1, C, h, w) or (1, C, f, h, w) each, VAE space.
        count: how many, at most.
    """
    pictures = [lab.to_sampler(z.double()) for z in latents]
    pictures = [z.mean(dim=2) if z.ndim == 5 else z for z in pictures]
    parts = [functional.adaptive_avg_pool2d(z, 4) for z in pictures]
    away = [float((part - parts[0]).square().mean()) for part in parts]
    return sorted(range(len(away)), key=lambda number: (number > 0, away[number]))[:count]


# --- ways from one picture to another


def interpolated(lab: Lab, first: Tensor, last: Tensor, count: int, way: Way) -> Iterator[Tensor]:
    """Latents on the way from one picture's to another's, in sampler space; the ends are theirs.

    Args:
        lab: the VAE.
        first: (1, C, ...), VAE space.
        last: of the same shape.
        count: how many, at least 2, with both ends.
        way: `"linear"`, or `"spherical"`, which keeps the length that a sampler's latents have.

    Raises:
        ValueError: the shapes differ, or there are fewer than 2.
    """
    if first.shape != last.shape or count < 2:
        raise ValueError(
            f"last must be {tuple(first.shape)} like first, and count at least 2, got "
            f"{tuple(last.shape)} and {count}; bring both pictures to one size"
        )
    start, end = (lab.to_sampler(x.double()) for x in (first, last))
    yield first
    for number in range(1, count - 1):
        share = number / (count - 1)
        weights = (1 - share, share) if way == "linear" else _spherical(start, end, share)
        mixed = weights[0] * start + weights[1] * end
        yield lab.from_sampler(mixed).to(first.dtype)
    yield last


def _spherical(start: Tensor, end: Tensor, share: float) -> tuple[float, float]:
    """Source: Shoemake, "Animating rotation with quaternion curves", 1985."""
    lengths = float(start.norm() * end.norm())
    cosine = float((start * end).sum()) / lengths if lengths else 1.0
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    if np.sin(angle) < 1e-4:  # no way to tell which way around
        return 1 - share, share
    return tuple(float(np.sin(part * angle) / np.sin(angle)) for part in (1 - share, share))  # type: ignore[return-value]


# --- tokens


@dataclass(frozen=True, eq=False)
class Usage:
    """Which entries of a codebook a picture's latents are nearest to.

    Attributes:
        codebook: (K, D).
        ids: (h, w), or (f, h, w) of a clip.
        counts: (K,): how often each entry occurs.
    """

    codebook: Tensor
    ids: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, vae: nn.Module, latents: Tensor) -> Usage:
        """Of (1, D, h, w) or (1, D, f, h, w), as the VAE encodes them.

        Raises:
            TypeError: the VAE has no codebook.
        """
        codebook = _codebook(vae)
        if codebook is None:
            raise TypeError(
                f"vae must have a codebook, as a VQModel has, got {type(vae).__name__}; "
                "its latents are no tokens"
            )
        ids = _nearest(latents, codebook).numpy()
        return cls(codebook, ids[0], np.bincount(ids.ravel(), minlength=len(codebook)))

    @property
    def dead(self) -> int:
        """How many entries do not occur."""
        return int((self.counts == 0).sum())

    @property
    def perplexity(self) -> float:
        """How many entries, were they equally frequent, would be as hard to guess."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def levels(self) -> list[dict[float, int]]:
        """How often each level of each dimension occurs, where the codebook is a grid of levels.

        That is what a finite scalar quantiser has: each number is rounded by itself. [] of others.
        """
        columns = [column.unique(return_inverse=True) for column in self.codebook.T]
        if math.prod(len(values) for values, _ in columns) != len(self.codebook):
            return []
        counts = torch.from_numpy(self.counts)
        used = [
            torch.zeros(len(values), dtype=torch.int64).index_add_(0, where, counts)
            for values, where in columns
        ]
        return [
            dict(zip(values.tolist(), each.tolist(), strict=True))
            for (values, _), each in zip(columns, used, strict=True)
        ]

    def most_used(self, count: int) -> NDArray[np.int64]:
        """The ids of so many entries, the most frequent first."""
        return np.argsort(-self.counts, kind="stable")[:count].astype(np.int64)

    def with_most_used(self, latents: Tensor, count: int) -> Tensor:
        """The latents, each replaced by the nearest of so many most used entries."""
        few = self.codebook[torch.from_numpy(self.most_used(count))]
        return few[_nearest(latents, few)].movedim(-1, 1)


def _codebook(vae: nn.Module) -> Tensor | None:
    """(K, D) float32 on the CPU: a learned one, or the grid of a finite scalar quantiser."""
    for name in ("quantize", "vquantizer", "regularization"):
        part = getattr(vae, name, None)
        for owner, field in (
            (getattr(part, "embedding", None), "weight"),
            (part, "implicit_codebook"),
        ):
            found = getattr(owner, field, None)
            if isinstance(found, Tensor) and found.ndim == 2:
                return found.detach().float().cpu()
    return None


def _nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """(B, D, ...) -> (B, ...) int64."""
    rows = latents.float().cpu().movedim(1, -1)
    parts = rows.reshape(-1, rows.shape[-1]).split(max(1, MOST_DISTANCES // len(codebook)))
    found = torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in parts])
    return found.reshape(rows.shape[:-1])
