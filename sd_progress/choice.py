"""Owns which decoder the previews of a pipeline get, and calibrating its VAE where that pays."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Final, Literal, cast, get_args

from torch import nn

from . import cache, factors
from .boundary import warn
from .calibration import LEAST_GAIN_DB, CalibrationError, calibrate, round_trip, score
from .decoders import ChannelsDecoder, Decoder, LinearDecoder, PCADecoder
from .factors import Factors
from .fingerprint import fingerprint
from .refit import RefitDecoder
from .tiny_decoder import TinyDecoder
from .vae import VaeEncoder, execution_device

Calibrate = Literal["auto", "always", "never"]

TINY_PREFIX: Final = "tiny:"
CALIBRATE_VARIABLE: Final = "SD_PROGRESS_CALIBRATE"
# What the first preview of an unknown VAE may cost on a CPU, once; then it is kept.
MOST_SECONDS: Final = 60.0
# Published tables win little on the hard pictures of the check; those of other VAEs lose much.
WORST_GAIN_DB: Final = -2.0

_log = logging.getLogger(__name__)


def decoder_maker(
    decoder: str | Factors | Decoder,
    vae: object,
    *,
    is_colour_known: bool,
    calibrate: Calibrate = "auto",
    refits: bool = False,
) -> Callable[[], Decoder]:
    """What gives each run its decoder: those that learn start anew, all others are shared.

    Args:
        decoder: `"auto"`, `"pca"`, `"channels"`, the name of factors, a file of factors, `"tiny:"`
            and the Hub id or the folder of an `AutoencoderTiny`, a `Factors` or a `Decoder`.
        vae: the autoencoder whose latents are decoded; None in pixel space.
        is_colour_known: whether the pictures have their colours from elsewhere, so that a VAE
            without a linear map is nothing to warn of.
        calibrate: whether the VAE may be run now, to fit a map or to check one.
        refits: whether full decodes will come, which a linear map can learn from.

    Raises:
        TypeError: `decoder` is none of these.
        ValueError: there are no factors of that name, or they are another VAE's.
    """
    when = _when(calibrate)
    if decoder == "auto":
        found = None if vae is None else _automatic(vae, when, is_colour_known=is_colour_known)
        return _maker_of(found, refits=refits and vae is not None)
    if decoder == "pca":
        return PCADecoder
    if decoder == "channels":
        return ChannelsDecoder
    if isinstance(decoder, str) and decoder.startswith(TINY_PREFIX):
        decoder = TinyDecoder(decoder.removeprefix(TINY_PREFIX))
    if isinstance(decoder, TinyDecoder):
        return functools.partial(_itself, _bound(decoder, vae, when))
    if isinstance(decoder, str | Factors):
        given = _named(decoder, vae) if isinstance(decoder, str) else decoder
        if when != "never":
            _check_pair(given, vae)
        return _maker_of(given, refits=refits)
    if isinstance(decoder, Decoder):
        return functools.partial(_itself, decoder)
    raise TypeError(
        f"decoder must be 'auto', the name of factors, a Factors or a Decoder, got "
        f"{type(decoder).__name__}; a Decoder has `name` and `decode(latents)`"
    )


def _when(calibrate: str) -> Calibrate:
    """The argument, or the environment's word where that is left at `"auto"`."""
    said = os.environ.get(CALIBRATE_VARIABLE, "auto") if calibrate == "auto" else calibrate
    if said not in get_args(Calibrate):
        name = "calibrate" if said == calibrate else CALIBRATE_VARIABLE
        raise ValueError(
            f"{name} must be 'auto', 'always' or 'never', got {said!r}; "
            "'auto' calibrates where it is quick or nothing is known of the VAE"
        )
    return cast(Calibrate, said)


def _maker_of(found: Factors | None, *, refits: bool) -> Callable[[], Decoder]:
    if refits:
        return functools.partial(RefitDecoder, found)
    return PCADecoder if found is None else functools.partial(_itself, LinearDecoder(found))


def _itself(decoder: Decoder) -> Decoder:
    return decoder


def _named(name: str, vae: object) -> Factors:
    if name.endswith(".safetensors"):
        return factors.load(name)
    try:
        return factors.by_name(name, vae)
    except ValueError as error:
        raise ValueError(
            f"decoder must be 'auto', 'pca', 'channels', 'tiny:MODEL', a .safetensors file or the "
            f"name of factors; {error}"
        ) from None


# --- "auto"


def _automatic(vae: object, when: Calibrate, *, is_colour_known: bool) -> Factors | None:
    """The best map that there is, or that can be had now; what happened is logged."""
    published = factors.find(vae, vae_hash=_hash_of(vae))
    is_fit = published is not None and not factors.is_published(published)
    if is_fit and when != "always":
        return published
    if when == "never" or is_colour_known or not _can_calibrate(vae):
        if published is None and not is_colour_known:
            warn(factors.explain_unknown(vae))
        return published
    assert isinstance(vae, nn.Module)
    kept = None if when == "always" else _kept(vae)
    if kept is not None:
        return kept
    if when == "auto" and published is not None and execution_device(vae).type == "cpu":
        _log.info(
            "previews use the published map %r; calibrate='always' fits a better one, once",
            published.name,
        )
        return published
    return _calibrated(vae, published, None if when == "always" else MOST_SECONDS)


def _kept(vae: nn.Module) -> Factors | None:
    began_s, vae_hash = time.perf_counter(), fingerprint(vae)
    kept = None if vae_hash is None else cache.load(vae_hash)
    if kept is not None:
        _log.info(
            "previews use the calibration of %s kept in %s (%s dB), found in %.2f s",
            type(vae).__name__,
            cache.folder(),
            kept.psnr_db,
            time.perf_counter() - began_s,
        )
    return kept


def _calibrated(vae: nn.Module, published: Factors | None, limit_s: float | None) -> Factors | None:
    """A new map, kept for the next process; where it is refused, what there was before."""
    began_s = time.perf_counter()
    try:
        made = calibrate(vae, limit_s=limit_s, progress=True, name=_name_for(vae, published))
    except Exception as error:  # also a VAE that we cannot run: the user's run must go on
        reason = str(error)
        if not isinstance(error, CalibrationError):
            reason = f"{type(error).__name__}: {error}"
        shown = "principal components are" if published is None else f"{published.name!r} is"
        warn(f"no preview map was fitted: {reason}; {shown} shown instead")
        return published
    cache.keep(made)
    _log.info(
        "previews use a calibration of %s made now (%s dB), which took %.1f s",
        type(vae).__name__,
        made.psnr_db,
        time.perf_counter() - began_s,
    )
    return made


def _name_for(vae: nn.Module, published: Factors | None) -> str:
    return "calibrated" if published is None else f"{published.name}-calibrated"


def _can_calibrate(vae: object) -> bool:
    """Whether it is a whole autoencoder of colour pictures, whose weights can be read."""
    if not isinstance(vae, nn.Module) or not VaeEncoder(vae).exists:
        return False
    config = getattr(vae, "config", None)
    patch = getattr(config, "patch_size", None) or 1  # some count the pixels of a patch as channels
    has_colours = getattr(config, "in_channels", 3) in (3, 3 * patch**2)
    return has_colours and _hash_of(vae) is not None


def _hash_of(vae: object) -> str | None:
    return fingerprint(vae) if isinstance(vae, nn.Module) else None


# --- what was given


def _check_pair(given: Factors, vae: object) -> None:
    """Refuse a map that draws this VAE's latents worse than flat pictures would.

    A map that says it is this VAE's is believed. One that cannot be tried is let through.

    Raises:
        ValueError: the map is another VAE's.
    """
    if (
        not _can_calibrate(vae)
        or given.latent_channels != factors.describe_vae(vae).latent_channels
    ):
        return
    assert isinstance(vae, nn.Module)
    is_fit = given.vae_hash is not None
    if given.vae_hash == _hash_of(vae) or (not is_fit and _keys_match(given, vae)):
        return
    _check_drawing(given, vae, LEAST_GAIN_DB if is_fit else WORST_GAIN_DB)


def _bound(tiny: TinyDecoder, vae: object, when: Calibrate) -> TinyDecoder:
    """A distilled decoder, set up for the VAE and tried on it.

    Raises:
        ValueError: it was made for another VAE.
    """
    if vae is None:
        return tiny
    bound = tiny.for_vae(vae)
    if when != "never" and isinstance(vae, nn.Module):
        _check_drawing(bound, vae, LEAST_GAIN_DB)
    return bound


def _check_drawing(given: Factors | TinyDecoder, vae: nn.Module, least_gain_db: float) -> None:
    """Let it draw a few pictures that the VAE encoded; where even the VAE cannot, it may be right.

    Raises:
        ValueError: it draws worse than this.
    """
    try:
        found, own = score(given, vae), round_trip(vae)
    except Exception as error:
        _log.info("%r could not be tried on the VAE: %s", given.name, error)
        return
    if own.gain_db >= LEAST_GAIN_DB and found.gain_db < least_gain_db:
        kind = "map" if isinstance(given, Factors) else "distilled decoder"
        raise ValueError(
            f"decoder must be a {kind} of this VAE, got {given.name!r}, which draws it with "
            f"{found}; pass decoder='auto', or calibrate='never' to use it all the same"
        )


def _keys_match(given: Factors, vae: nn.Module) -> bool:
    key = factors.describe_vae(vae)
    known = factors.find(vae)
    is_its_row = (
        known is not None
        and known.weight.shape == given.weight.shape
        and bool((known.weight == given.weight).all())
    )
    return is_its_row or (given.vae_key is not None and given.vae_key.matches(key))
