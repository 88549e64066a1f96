"""Owns fitting the map from a VAE's latents to colours, and whether it is good enough."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from .decoders import Decoder
from .factors import Factors, Hidden, describe_vae
from .fingerprint import fingerprint
from .latent_space import FEWEST_PICTURES, HELD_OUT_EVERY, Pictures, Source, Space, picture_files
from .regression import Equations, Maker, Shape, best_ridge, with_network
from .scores import BEST_FLAT_DB, Pair, Score, scored, scored_decoder
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
            give back what it encoded, or the latents are not finite.
    """
    _check(vae, kernel_size, upscale, degree, hidden_units, group)
    space = Space.of(vae)
    if upscale > space.ratio:
        raise ValueError(
            f"upscale must be at most {space.ratio} for this VAE, got {upscale}; "
            "that is its full resolution"
        )
    share = Share(group)
    shape = Shape(space.channels, kernel_size, upscale, degree)
    pictures = Source.of(images, space, seed, share)
    seen = _Seen(shape, space, keeps_rows=hidden_units > 0)
    began_s = time.perf_counter()
    for batch in tqdm(
        pictures, "calibrate", len(pictures), unit="batch", leave=False, disable=not progress
    ):
        seen.take(space.pair(batch), share)
        if seen.own and group is None:  # of a group the others would wait for this process
            _check_round_trip(vae, share.mean(seen.own), least_gain_db)
        if limit_s is not None and seen.is_enough and time.perf_counter() - began_s > limit_s:
            break
    share.add_up(seen.equations.products, seen.equations.targets)
    whole = seen.equations.with_more(shape, seen.held_out, share)
    _check_finite(vae, whole)
    if not share.total(len(seen.own)):
        raise ValueError(
            f"images must show something, got {share.total(seen.pictures)} that have one colour "
            "each; pass others, or leave it out to fit on synthetic ones"
        )
    _check_round_trip(vae, share.mean(seen.own), least_gain_db)
    words = f"{share.total(seen.pictures)} {pictures.words}"
    make = Maker(shape, name, words, describe_vae(vae), fingerprint(vae))
    best, ridge = best_ridge(make, seen.equations, seen.held_out, share)
    if hidden_units:
        best = with_network(make, best, seen.rows, seen.held_out, hidden_units, seed)
    found = share.mean(scored(best, pair, upscale) for pair in seen.held_out)
    if not found.gain_db >= least_gain_db:
        raise CalibrationError(
            f"the map must win {least_gain_db:g} dB over flat pictures, got {found} for "
            f"{type(vae).__name__}; pass a larger kernel_size, or images like those that it was "
            "trained on"
        )
    if not isinstance(best.extra, Hidden):  # the score stays that of the fit without them
        best = make(whole.solved(ridge), ridge)
    return replace(best, psnr_db=round(found.psnr_db, 2))


class _Seen:
    """What is kept of the pictures that were encoded so far.

    Attributes:
        equations: of all but those held out.
        held_out: every so many pairs.
        rows: those of the equations; of a network only, which sees them many times.
        own: what the VAE itself makes of the first picture that is not flat.
        pictures: how many there were.
    """

    def __init__(self, shape: Shape, space: Space, *, keeps_rows: bool) -> None:
        self._shape, self._space, self._keeps_rows = shape, space, keeps_rows
        self.equations = Equations.of(shape, space.device)
        self.held_out: list[Pair] = []
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.own: list[Score] = []
        self.pictures = self._batches = 0

    @property
    def is_enough(self) -> bool:
        """Whether a map could be fitted; some of many processes hold none out."""
        return self._batches >= HELD_OUT_EVERY and self.pictures >= FEWEST_PICTURES

    def take(self, pair: Pair, share: Share) -> None:
        """Take one more batch in."""
        if not self.own:
            own = self._space.round_trip(pair)
            self.own += [own] if own.flat_db < BEST_FLAT_DB else []
        number, self._batches = self._batches, self._batches + 1
        self.pictures += len(pair.latents)
        if (number * share.count + share.rank) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
            self.held_out.append(pair)
            return
        for features, targets in self._shape.rows(pair):
            self.equations.add(features, targets)
            if self._keeps_rows:
                self.rows.append((features.float(), targets.float()))


def score(
    drawer: Factors | Decoder, vae: nn.Module, images: Pictures | None = None, seed: int = 1
) -> Score:
    """How near a map or a decoder comes to pictures that the VAE encodes.

    Args:
        drawer: the map, scored at its own resolution; or a decoder, scored at one pixel per latent.
        vae: the VAE that encodes.
        images: as in `calibrate`; left out, a few synthetic pictures.
        seed: of the synthetic pictures.

    Raises:
        ValueError: the channels of the two differ.
    """
    space = Space.of(vae)
    source = Source.of(images, space, seed, Share(None), few=images is None)
    pairs = (space.pair(batch) for batch in source)
    if not isinstance(drawer, Factors):
        return Share(None).mean(scored_decoder(drawer, pair) for pair in pairs)
    if drawer.latent_channels != space.channels:
        raise ValueError(
            f"factors must have {space.channels} latent channels for this VAE, got "
            f"{drawer.latent_channels}; pass factors that were fitted for it"
        )
    return Share(None).mean(scored(drawer, pair, drawer.upscale) for pair in pairs)


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
    for name, value in (("kernel_size", kernel_size), ("upscale", upscale)):
        if not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value!r}; pass an int")
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


def _check_finite(vae: nn.Module, equations: Equations) -> None:
    if not (equations.products.isfinite().all() and equations.targets.isfinite().all()):
        raise CalibrationError(
            f"vae must make finite values, got NaN or infinity from {type(vae).__name__}; "
            "load it in bfloat16 or float32"
        )


def _check_round_trip(vae: nn.Module, own: Score, least_gain_db: float) -> None:
    if own.gain_db < least_gain_db:  # what is not finite is told of otherwise
        raise CalibrationError(
            f"vae must give back what it encodes, got {own} from {type(vae).__name__}; "
            "its weights seem to be untrained or broken"
        )
