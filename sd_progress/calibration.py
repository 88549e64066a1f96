"""Owns fitting the map from a VAE's latents to colours, and whether it is good enough."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from .factors import Factors, describe_vae
from .fingerprint import fingerprint
from .latent_space import FEWEST_PICTURES, HELD_OUT_EVERY, Pictures, Source, Space, picture_files
from .regression import Equations, Maker, Shape, best_ridge, with_network
from .scores import Pair, Score, scored
from .share import Share

__all__ = [
    "LEAST_GAIN_DB",
    "CalibrationError",
    "Pictures",
    "Score",
    "calibrate",
    "picture_files",
    "round_trip",
    "score",
]

# What must at least be won over showing each picture as one flat colour, its own mean.
LEAST_GAIN_DB: Final = 3.0


class CalibrationError(RuntimeError):
    """A map was fitted, or was not, and must not be shown; the message says why."""


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
    space = Space.of(vae)
    if upscale > space.ratio:
        raise ValueError(
            f"upscale must be at most {space.ratio} for this VAE, got {upscale}; "
            "that is its full resolution"
        )
    share = Share(group)
    pictures = Source.of(images, space, seed, share)
    shape = Shape(space.channels, kernel_size, upscale, degree)
    equations = Equations.of(shape, space.device)
    held_out: list[Pair] = []
    rows: list[tuple[Tensor, Tensor]] = []  # of a network only, which sees them many times
    began_s, seen = time.perf_counter(), 0
    bar = tqdm(
        pictures, "calibrate", len(pictures), unit="batch", leave=False, disable=not progress
    )
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
    make = Maker(shape, name, words, describe_vae(vae), fingerprint(vae))
    best, ridge = best_ridge(make, equations, held_out, share)
    if hidden_units:
        best = with_network(shape, best, rows, held_out, hidden_units, seed)
    found = share.mean([scored(best, pair, upscale) for pair in held_out])
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
    space = Space.of(vae)
    if factors.latent_channels != space.channels:
        raise ValueError(
            f"factors must have {space.channels} latent channels for this VAE, got "
            f"{factors.latent_channels}; pass factors that were fitted for it"
        )
    source = Source.of(images, space, seed, Share(None), few=images is None)
    scores = [scored(factors, space.pair(batch), factors.upscale) for batch in source]
    return Share(None).mean(scores)


def round_trip(vae: nn.Module, seed: int = 1) -> Score:
    """How near the VAE's own decoder comes to a few synthetic pictures that it encoded.

    At the resolution of the latents, which is what a preview shows.
    """
    space = Space.of(vae)
    source = Source.of(None, space, seed, Share(None), few=True)
    return Share(None).mean([space.round_trip(space.pair(batch)) for batch in source])


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
