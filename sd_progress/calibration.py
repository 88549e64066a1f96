"""Owns fitting the map from a VAE's latents to colours, in closed form, and scoring it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .decoders import LinearDecoder, products
from .factors import Factors, Hidden, Polynomial, VaeKey, describe_vae, monomials
from .fingerprint import fingerprint
from .synthetic import dead_leaves
from .vae import VaeDecoder, VaeEncoder

__all__ = ["CalibrationError", "Score", "calibrate", "picture_files", "round_trip", "score"]

RIDGES: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT_EVERY: Final = 4
# What must at least be won over showing each picture as one flat colour, its own mean.
LEAST_GAIN_DB: Final = 3.0
LARGEST_SIDE: Final = 512  # of the user's pictures; larger ones are reduced
FEWEST_LATENTS: Final = 12  # a side, of a synthetic picture
FEWEST_PICTURES: Final = 8
ROWS_AT_ONCE: Final = 8192
NETWORK_STEPS: Final = 1500
NETWORK_ROWS: Final = 2048
NETWORK_RATE: Final = 3e-3


class CalibrationError(RuntimeError):
    """A map was fitted, or was not, and must not be shown; the message says why."""


@dataclass(frozen=True)
class Score:
    """How near some pictures come to what they should be, means over pictures in dB of PSNR.

    Attributes:
        psnr_db: of the pictures.
        flat_db: of the best single colour for each picture, which is no preview at all.
    """

    psnr_db: float
    flat_db: float

    @property
    def gain_db(self) -> float:
        """What is won over flat pictures."""
        return self.psnr_db - self.flat_db

    def __str__(self) -> str:
        return f"{self.psnr_db:.1f} dB, where flat pictures have {self.flat_db:.1f} dB"


Pictures = Tensor | Sequence[Image.Image | Path] | str | os.PathLike[str]
_Picture = Tensor | Image.Image | Path


def calibrate(
    vae: nn.Module,
    *,
    kernel_size: int = 5,
    upscale: int = 1,
    degree: int = 1,
    hidden_units: int = 0,
    images: Pictures | None = None,
    name: str = "calibrated",
    seed: int = 0,
    limit_s: float | None = None,
    least_gain_db: float = LEAST_GAIN_DB,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Factors:
    """The best map from a VAE's latents to colours, fitted in closed form, in seconds.

    Pictures are encoded by the VAE itself, and the ridge regression from each neighbourhood of
    latents to the pixels under its centre is solved for in float64. A quarter of the pictures is
    held out: they choose the ridge and give the score. The VAE is left as it was, also its weights'
    places and dtypes, and no global random state is touched.

    A VAE without an encoder is fitted to what it decodes from made-up latents.

    Args:
        vae: any image or video autoencoder of diffusers, on any device.
        kernel_size: odd; how many latents a side go into one pixel.
        upscale: 1, 2, 4, ...: pixels a side per latent, up to the VAE's own ratio.
        degree: 1 for an affine map; 2 or 3 adds products of the latents under the pixel.
        hidden_units: of a network of one hidden layer beside the affine map; 0 for none.
        images: what to fit on: (B, 3, H, W) float in [-1, 1], PIL pictures, or a folder of them;
            left out, synthetic pictures.
        name: for frames and messages.
        seed: of the synthetic pictures and of the network.
        limit_s: seconds after which no further picture is encoded.
        least_gain_db: what the map must win over flat pictures; `-math.inf` takes any map.
        progress: whether to show a progress bar on stderr.
        group: processes that each encode their share, as `torch.distributed` calls it; all of them
            must call this function, and all get the same map.

    Returns:
        The map, with its score on held-out pictures (`psnr_db`) and its `vae_hash`.

    Raises:
        ValueError: an option is out of range, or there are too few pictures.
        TypeError: `vae` is no autoencoder.
        CalibrationError: the map is no better than flat pictures, or the VAE's own decoder does not
            give back what it encoded.
    """
    _check(vae, kernel_size, upscale, degree, hidden_units, group)
    space = _Space.of(vae)
    if upscale > space.ratio:
        raise ValueError(
            f"upscale must be at most {space.ratio} for this VAE, got {upscale}; "
            "that is its full resolution"
        )
    share = _Share.of(group)
    pictures = _Source.of(images, space, seed, share)
    shape = _Shape(space.channels, kernel_size, upscale, degree)
    equations = _Equations.of(shape, space.device)
    held_out: list[_Pair] = []
    rows: list[tuple[Tensor, Tensor]] = []  # of a network only, which sees them many times
    began_s, seen = time.perf_counter(), 0
    bar = tqdm(pictures, "calibrate", len(pictures), unit="batch", disable=not progress)
    for number, batch in enumerate(bar):
        pair = space.pair(batch)
        seen += len(pair.latents)
        if (number * share.count + share.rank) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
            held_out.append(pair)
        else:
            for features, targets in shape.rows(pair):
                equations.add(features, targets)
                if hidden_units:
                    rows.append((features.float(), targets.float()))
        is_late = limit_s is not None and time.perf_counter() - began_s > limit_s
        if is_late and held_out and seen >= FEWEST_PICTURES:
            break
    share.add_up(equations.products, equations.targets)
    words = f"{share.total(seen)} {pictures.words}"
    make = _Maker(shape, name, words, describe_vae(vae), fingerprint(vae))
    best, ridge = _best_ridge(make, equations, held_out, share)
    if hidden_units:
        best = _with_network(shape, best, rows, held_out, hidden_units, seed)
    found = share.mean([_scored(best, pair, upscale) for pair in held_out])
    own = share.mean([space.round_trip(pair) for pair in held_out[:1]])
    if not (found.gain_db >= least_gain_db and own.gain_db >= least_gain_db):
        raise CalibrationError(_refusal(vae, found, own, least_gain_db))
    if not hidden_units:  # the score stays that of the fit without them
        best = make(equations.with_more(shape, held_out, share).solved(ridge), ridge)
    return replace(best, psnr_db=round(found.psnr_db, 2))


def score(factors: Factors, vae: nn.Module, images: Pictures | None = None, seed: int = 1) -> Score:
    """How near a map comes to pictures that the VAE encodes, at the map's own resolution.

    Args:
        factors: the map.
        vae: the VAE that encodes.
        images: as in `calibrate`; left out, a few synthetic pictures.
        seed: of the synthetic pictures.

    Raises:
        ValueError: the channels of the two differ.
    """
    space = _Space.of(vae)
    if factors.latent_channels != space.channels:
        raise ValueError(
            f"factors must have {space.channels} latent channels for this VAE, got "
            f"{factors.latent_channels}; pass factors that were fitted for it"
        )
    source = _Source.of(images, space, seed, _Share(None), few=images is None)
    scores = [_scored(factors, space.pair(batch), factors.upscale) for batch in source]
    return _mean(scores)


def round_trip(vae: nn.Module, seed: int = 1) -> Score:
    """How near the VAE's own decoder comes to a few synthetic pictures that it encoded.

    At the resolution of the latents, which is what a preview shows.
    """
    space = _Space.of(vae)
    source = _Source.of(None, space, seed, _Share(None), few=True)
    return _mean([space.round_trip(space.pair(batch)) for batch in source])


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All files in a folder that look like pictures, by name.

    Raises:
        ValueError: it is no folder, or there is no picture in it.
    """
    known = Image.registered_extensions()
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    found = [file for file in files if file.suffix.lower() in known]
    if not found:
        raise ValueError(
            f"images must be a folder with pictures, got {os.fspath(folder)!r}; "
            "leave it out to fit on synthetic ones"
        )
    return found


def _check(
    vae: object,
    kernel_size: int,
    upscale: int,
    degree: int,
    hidden_units: int,
    group: dist.ProcessGroup | None,
) -> None:
    if not isinstance(vae, nn.Module):
        raise TypeError(f"vae must be an autoencoder, got {type(vae).__name__}; pass pipe.vae")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size!r}; pass 1, 3, 5 or 7")
    if upscale < 1:
        raise ValueError(f"upscale must be at least 1, got {upscale!r}; pass 1, 2, 4 or 8")
    if degree not in (1, 2, 3):
        raise ValueError(f"degree must be 1, 2 or 3, got {degree!r}; 1 is an affine map")
    if hidden_units < 0 or (hidden_units and degree > 1):
        raise ValueError(
            f"hidden_units must be at least 0, and 0 for degree {degree}, got {hidden_units!r}; "
            "pass one of the two"
        )
    if hidden_units and group is not None:
        raise ValueError(
            f"hidden_units must be 0 with a group, got {hidden_units!r}; fit it in one process"
        )


# --- what is encoded


@dataclass(frozen=True)
class _Pair:
    """Pictures (B, 3, H, W) in [-1, 1] and their latents (B, C, h, w), on one device."""

    pictures: Tensor
    latents: Tensor


@dataclass(frozen=True)
class _Space:
    """A VAE's latent space, as far as fitting needs it."""

    vae: nn.Module
    channels: int
    ratio: int  # pixels a side per latent
    frames: int  # of a clip whose last latent frame is like most of a video; 1 for pictures
    is_video: bool
    device: torch.device
    can_encode: bool

    @classmethod
    def of(cls, vae: nn.Module) -> _Space:
        encoder = VaeEncoder(vae)
        if not encoder.exists:
            return cls._without_encoder(vae)
        is_video = encoder.takes_video
        side = 128
        frames = 1 + _temporal_ratio(vae) if is_video else 1
        shape = (1, 3, frames, side, side) if is_video else (1, 3, side, side)
        latents = encoder.encode(torch.zeros(shape, device="cpu"))
        if latents.ndim != len(shape):
            raise TypeError(
                f"vae must encode pictures to (B, C, h, w), got {tuple(latents.shape)}; "
                "calibrate needs an image or video autoencoder"
            )
        ratio = round(side / latents.shape[-1])
        return cls(vae, latents.shape[1], ratio, frames, is_video, latents.device, True)

    @classmethod
    def _without_encoder(cls, vae: nn.Module) -> _Space:
        key = describe_vae(vae)
        if key.latent_channels is None or not callable(getattr(vae, "decode", None)):
            raise TypeError(
                f"vae must be an autoencoder of pictures, got {type(vae).__name__}; pass pipe.vae"
            )
        side = 16
        decoder = VaeDecoder(vae)
        pictures = decoder.decode_float(torch.zeros(1, key.latent_channels, side, side))
        if pictures.ndim != 4:
            raise TypeError(
                f"vae must have an encoder if it is one of videos, got {type(vae).__name__} "
                "without; pass factors that were fitted with it"
            )
        ratio = round(pictures.shape[-1] / side)
        return cls(vae, key.latent_channels, ratio, 1, False, pictures.device, False)

    def pair(self, batch: Tensor) -> _Pair:
        """Pictures, (B, 3, H, W) or (B, 3, F, H, W), or latents where there is no encoder."""
        if not self.can_encode:
            decoded = VaeDecoder(self.vae).decode_float(batch)
            return _Pair(decoded[:, :3].clamp(-1, 1), batch.to(decoded.device))
        latents = VaeEncoder(self.vae).encode(batch)
        if not self.is_video:
            return _Pair(batch.to(latents.device), latents)
        # the first latent frame holds one picture, the others the mean of several
        groups = [batch[:, :, 0], batch[:, :, 1:].mean(dim=2)]
        pictures = torch.cat(groups[: latents.shape[2]]).to(latents.device)
        return _Pair(pictures, torch.cat(latents.unbind(2)[:2]))

    def round_trip(self, pair: _Pair) -> Score:
        """What the VAE's own decoder makes of the latents of one of them."""
        latents = pair.latents[:1]
        whole = latents[:, :, None] if self.is_video else latents
        decoded = VaeDecoder(self.vae).decode_float(whole)
        picture = decoded[:, :3, 0] if decoded.ndim == 5 else decoded[:, :3]
        return _compared(_reduced(picture, latents, 1), _reduced(pair.pictures[:1], latents, 1))


def _temporal_ratio(vae: nn.Module) -> int:
    """Frames per latent frame, as far as the VAE says it."""
    config = getattr(vae, "config", None)
    for name in ("temporal_compression_ratio", "scale_factor_temporal"):
        value = getattr(vae, name, None) or getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 4


class _Source:
    """Batches of pictures, made or opened one at a time; a length for the progress bar."""

    def __init__(self, batches: Sequence[_Picture], space: _Space, words: str) -> None:
        self._batches, self._space, self.words = batches, space, words

    @classmethod
    def of(
        cls, images: Pictures | None, space: _Space, seed: int, share: _Share, *, few: bool = False
    ) -> _Source:
        if images is None:
            return cls._made(space, seed, share, few=few)
        if isinstance(images, str | os.PathLike):
            images = picture_files(images)
        batches: Sequence[_Picture] = list(
            images.split(1) if isinstance(images, Tensor) else images
        )
        if len(batches) < HELD_OUT_EVERY * share.count:
            raise ValueError(
                f"images must be at least {HELD_OUT_EVERY * share.count} pictures, got "
                f"{len(batches)}; leave it out to fit on synthetic ones"
            )
        return cls(batches[share.rank :: share.count], space, "pictures")

    @classmethod
    def _made(cls, space: _Space, seed: int, share: _Share, *, few: bool) -> _Source:
        generator = torch.Generator().manual_seed(seed)
        is_quick = space.device.type != "cpu"
        side = -(-(256 if is_quick else 192) // space.ratio) * space.ratio
        side = max(side, FEWEST_LATENTS * space.ratio)
        pixels = (96 * 256**2 if is_quick else 32 * 192**2) / space.frames
        count = 4 if few else max(2 * FEWEST_PICTURES, round(pixels / side**2))
        if not space.can_encode:
            latents = _made_up_latents(space, count, generator)
            batches = latents.split(4 if count > 4 else 1)
            return cls(batches[share.rank :: share.count], space, "decoded latents")
        margin = 2 * space.frames  # what a moving picture needs beside it
        pictures = dead_leaves(count, side + margin, generator)
        if space.frames > 1:
            batches = tuple(_moving(pictures, space.frames, generator).split(1))
        else:
            batches = pictures[..., :side, :side].split(4 if count > 4 else 1)
        return cls(batches[share.rank :: share.count], space, f"synthetic {side}x{side} pictures")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            if isinstance(batch, Tensor) and (batch.ndim == 5 or not self._space.can_encode):
                yield batch
            else:
                yield self._fit(batch)

    def _fit(self, picture: Tensor | Image.Image | Path) -> Tensor:
        """Cut to whole latents, reduced if large; for a video VAE, a clip that stands still."""
        if isinstance(picture, Path):
            with Image.open(picture) as opened:
                opened.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))
                picture = opened.convert("RGB")
        if isinstance(picture, Image.Image):
            small = picture.convert("RGB")
            small.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
            picture = torch.from_numpy(np.array(small)).movedim(-1, 0)[None] / 127.5 - 1
        ratio = self._space.ratio
        height, width = (side // ratio * ratio for side in picture.shape[-2:])
        if not height or not width:
            raise ValueError(
                f"images must be at least {ratio} pixels a side for this VAE, got "
                f"{tuple(picture.shape[-2:])}; pass larger ones"
            )
        picture = picture[..., :height, :width].float()
        if not self._space.is_video:
            return picture
        return picture[:, :, None].repeat(1, 1, self._space.frames, 1, 1)


def _moving(pictures: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Clips that pan over larger pictures: (B, 3, H + 2F, W + 2F) to (B, 3, F, H, W)."""
    height, width = (side - 2 * frames for side in pictures.shape[-2:])
    speeds = torch.rand(len(pictures), 2, generator=generator, device="cpu") * 2
    clips = []
    for picture, speed in zip(pictures, speeds.tolist(), strict=True):
        corners = [(round(speed[0] * k), round(speed[1] * k)) for k in range(frames)]
        clips.append(
            torch.stack([picture[:, y : y + height, x : x + width] for y, x in corners], 1)
        )
    return torch.stack(clips)


def _made_up_latents(space: _Space, count: int, generator: torch.Generator) -> Tensor:
    """Latents with the statistics that the VAE states, smooth in some places and rough in others.

    A diffusion model's latents have a standard deviation of one in sampler space.
    """
    key = describe_vae(space.vae)
    side = 24
    pictures = dead_leaves(-(-count * space.channels // 3), side * 2, generator)
    planes = functional.avg_pool2d(pictures, 2).reshape(-1, side, side)[: count * space.channels]
    planes = planes + 0.2 * torch.randn(planes.shape, generator=generator, device="cpu")
    latents = planes.reshape(count, space.channels, side, side)
    latents = (latents - latents.mean()) / latents.std()
    statistics = (key.latents_mean or (), key.latents_std or ())
    if [len(values) for values in statistics] == [space.channels] * 2:
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        return latents * std + mean
    return latents / key.scaling_factor + key.shift_factor


@dataclass(frozen=True)
class _Share:
    """This process's part of the work."""

    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Share:
        return cls(group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def add_up(self, *tensors: Tensor) -> None:
        for tensor in tensors if self.group is not None else ():
            dist.all_reduce(tensor, group=self.group)

    def total(self, number: int) -> int:
        return round(self._sum([float(number)])[0])

    def mean(self, scores: Iterable[Score]) -> Score:
        scores = list(scores)
        flat = math.fsum(s.flat_db for s in scores)
        sums = self._sum([math.fsum(s.psnr_db for s in scores), flat, float(len(scores))])
        return Score(sums[0] / max(sums[2], 1), sums[1] / max(sums[2], 1))

    def _sum(self, numbers: list[float]) -> list[float]:
        if self.group is None:
            return numbers
        backend = dist.get_backend(self.group)
        summed = torch.tensor(
            numbers, dtype=torch.float64, device="cuda" if "nccl" in backend else "cpu"
        )
        dist.all_reduce(summed, group=self.group)
        return cast("list[float]", summed.tolist())


# --- what is solved


@dataclass(frozen=True)
class _Shape:
    """What goes into the map and what comes out."""

    channels: int
    kernel_size: int
    upscale: int
    degree: int

    @property
    def affine(self) -> int:
        """Features that are latents of the neighbourhood."""
        return self.channels * self.kernel_size**2

    @property
    def features(self) -> int:
        """All of them, with the constant."""
        more = len(monomials(self.channels, self.degree)) if self.degree > 1 else 0
        return self.affine + more + 1

    @property
    def outputs(self) -> int:
        return 3 * self.upscale**2

    def rows(self, pair: _Pair) -> Iterator[tuple[Tensor, Tensor]]:
        """(N, features) and (N, outputs), float64 where the device has it, some rows at a time."""
        dtype = torch.float32 if pair.latents.device.type == "mps" else torch.float64
        wanted = functional.pixel_unshuffle(
            _reduced(pair.pictures, pair.latents, self.upscale), self.upscale
        )
        for latents, targets in zip(pair.latents.split(1), wanted.split(1), strict=True):
            features = self.features_of(latents.to(dtype))
            flat = targets.to(dtype).flatten(2).movedim(1, -1).flatten(0, 1)
            yield from zip(features.split(ROWS_AT_ONCE), flat.split(ROWS_AT_ONCE), strict=True)

    def features_of(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B * h * w, features)."""
        margin = self.kernel_size // 2
        padded = functional.pad(latents, (margin,) * 4, mode="replicate")
        parts = [functional.unfold(padded, self.kernel_size)]  # (B, C * k * k, h * w)
        if self.degree > 1:
            parts.append(products(latents, self.degree).flatten(2))
        parts.append(torch.ones_like(parts[0][:, :1]))
        return torch.cat(parts, dim=1).movedim(1, -1).flatten(0, 1)


@dataclass(frozen=True)
class _Equations:
    """The normal equations: sums over all rows, so that rows need not be kept."""

    products: Tensor  # (M, M)
    targets: Tensor  # (M, O)

    @classmethod
    def of(cls, shape: _Shape, device: torch.device) -> _Equations:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return cls(
            torch.zeros(shape.features, shape.features, dtype=dtype, device=device),
            torch.zeros(shape.features, shape.outputs, dtype=dtype, device=device),
        )

    def with_more(self, shape: _Shape, pairs: Iterable[_Pair], share: _Share) -> _Equations:
        """With the rows of more pictures."""
        more = _Equations.of(shape, self.products.device)
        for pair in pairs:
            for features, targets in shape.rows(pair):
                more.add(features, targets)
        share.add_up(more.products, more.targets)
        return _Equations(self.products + more.products, self.targets + more.targets)

    def add(self, features: Tensor, targets: Tensor) -> None:
        self.products.addmm_(features.T, features)
        self.targets.addmm_(features.T, targets)

    def solved(self, ridge: float) -> Tensor:
        """(M, O); each feature is penalised in its own unit, the constant not at all."""
        is_single = self.products.dtype == torch.float32  # where the device has no float64
        products = self.products.double().cpu() if is_single else self.products
        penalty = ridge * products.diagonal() + 1e-12 * products.diagonal().mean()
        penalty[-1] = 0
        system = products + penalty.diag()
        return cast(Tensor, torch.linalg.solve(system, self.targets.to(products)).cpu())


@dataclass(frozen=True)
class _Maker:
    """Solutions as factors."""

    shape: _Shape
    name: str
    words: str
    vae_key: VaeKey
    vae_hash: str | None

    def __call__(self, solved: Tensor, ridge: float) -> Factors:
        shape, affine = self.shape, self.shape.affine
        kernel = (-1, shape.channels, shape.kernel_size, shape.kernel_size)
        extra = None
        if shape.degree > 1:
            extra = Polynomial(solved[affine:-1].T.float().numpy(), shape.degree)
        return Factors(
            solved[:affine].T.reshape(kernel).float().numpy(),
            solved[-1].float().numpy(),
            name=self.name,
            provenance=f"sd-progress calibrate: {self.words}, ridge {ridge:g}",
            vae_key=self.vae_key,
            extra=extra,
            vae_hash=self.vae_hash,
        )


def _best_ridge(
    make: _Maker, equations: _Equations, held_out: Sequence[_Pair], share: _Share
) -> tuple[Factors, float]:
    best, highest, chosen = None, -math.inf, RIDGES[0]
    for ridge in RIDGES:
        factors = make(equations.solved(ridge), ridge)
        found = share.mean(_scored(factors, pair, make.shape.upscale) for pair in held_out)
        if best is None or found.psnr_db > highest:
            best, highest, chosen = factors, found.psnr_db, ridge
    assert best is not None
    return best, chosen


def _with_network(
    shape: _Shape,
    affine: Factors,
    rows: Sequence[tuple[Tensor, Tensor]],
    held_out: Sequence[_Pair],
    hidden_units: int,
    seed: int,
) -> Factors:
    """The affine map and a hidden layer: trained together, the outputs then solved for."""
    features, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
    inputs = features[:, :-1]
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0).clamp_min(1e-6)
    solved = torch.cat(
        [torch.from_numpy(affine.weight).flatten(1).T, torch.from_numpy(affine.bias)[None]]
    )
    rest = targets - features @ solved.to(features)
    kernel, bias = _trained((inputs - mean) / deviation, rest, hidden_units, seed)
    kernel = kernel / deviation
    bias = bias - kernel @ mean
    units = (inputs @ kernel.T + bias).relu()
    more = torch.cat([inputs, units, features[:, -1:]], dim=1).double()
    equations = _Equations(more.T @ more, more.T @ targets.double())
    best, highest = affine, -math.inf
    for strength in RIDGES:
        final = equations.solved(strength)
        hidden = Hidden(
            final[shape.affine : -1].T.float().numpy(),
            kernel.reshape(-1, *affine.weight.shape[1:]).cpu().numpy(),
            bias.cpu().numpy(),
        )
        weight = final[: shape.affine].T.reshape(affine.weight.shape)
        factors = replace(
            affine, weight=weight.float().numpy(), bias=final[-1].float().numpy(), extra=hidden
        )
        found = _mean([_scored(factors, pair, shape.upscale) for pair in held_out])
        if found.psnr_db > highest:
            best, highest = factors, found.psnr_db
    return best


def _trained(inputs: Tensor, rest: Tensor, units: int, seed: int) -> tuple[Tensor, Tensor]:
    """Kernel (H, features) and bias (H,) of hidden units that explain the rest of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(units, inputs.shape[1], generator=generator, device="cpu")
    kernel = (made * math.sqrt(2 / inputs.shape[1])).to(inputs)
    bias, out = inputs.new_zeros(units), inputs.new_zeros(rest.shape[1], units)
    with torch.inference_mode(False), torch.enable_grad():
        inputs, rest = inputs.clone(), rest.clone()
        parameters = [tensor.clone().requires_grad_() for tensor in (kernel, bias, out)]
        optimizer = torch.optim.Adam(parameters, NETWORK_RATE)
        for step in range(NETWORK_STEPS):
            share = step / NETWORK_STEPS
            optimizer.param_groups[0]["lr"] = NETWORK_RATE * (0.5 + 0.5 * math.cos(math.pi * share))
            chosen = torch.randint(len(inputs), (NETWORK_ROWS,), generator=generator, device="cpu")
            chosen = chosen.to(inputs.device)
            hidden = functional.linear(inputs[chosen], parameters[0], parameters[1]).relu()
            loss = functional.mse_loss(functional.linear(hidden, parameters[2]), rest[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return parameters[0].detach(), parameters[1].detach()


# --- how good it is


def _scored(factors: Factors, pair: _Pair, upscale: int) -> Score:
    drawn = LinearDecoder(factors).decode_float(pair.latents.cpu())
    return _compared(drawn, _reduced(pair.pictures, pair.latents, upscale).cpu())


def _compared(drawn: Tensor, wanted: Tensor) -> Score:
    """Both (B, 3, H, W) in [-1, 1]."""
    flat = wanted.mean(dim=(-2, -1), keepdim=True).expand_as(wanted)
    return Score(_psnr(drawn.nan_to_num(0.0).clamp(-1, 1), wanted), _psnr(flat, wanted))


def _psnr(drawn: Tensor, wanted: Tensor) -> float:
    errors = (drawn - wanted).square().flatten(1).mean(dim=1) / 4
    return float((-10 * errors.clamp_min(1e-10).log10()).mean())


def _mean(scores: Sequence[Score]) -> Score:
    return _Share(None).mean(scores)


def _reduced(pictures: Tensor, latents: Tensor, upscale: int) -> Tensor:
    """Averaged to `upscale` pixels a side per latent."""
    height, width = (side * upscale for side in latents.shape[-2:])
    if pictures.shape[-2:] == (height, width):
        return pictures
    return functional.interpolate(pictures, (height, width), mode="area")


def _refusal(vae: nn.Module, found: Score, own: Score, least_gain_db: float) -> str:
    who = type(vae).__name__
    if not own.gain_db >= least_gain_db:
        return (
            f"vae must give back what it encodes, got {own} from {who}; "
            "its weights seem to be untrained or broken"
        )
    return (
        f"the map must win {least_gain_db:g} dB over flat pictures, got {found} for {who}; "
        "pass a larger kernel_size, or images like those that it was trained on"
    )
