"""Owns saying what is wrong with a VAE, by name, from what it does to a picture."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from .factors import SAMPLER_SPACE_CLASSES
from .lab import Lab, RoundTrip, psnr, round_trip

__all__ = ["Fault", "Finding", "diagnosed", "diagnosed_latents"]

Fault = Literal[
    "nan-weight",
    "fp16-overflow",
    "not-finite",
    "swapped-channels",
    "untrained",
    "scaling-factor",
    "other-latents",
]

# What is more than flat pictures, and what a permutation must win to be believed.
LEAST_GAIN_DB: Final = 1.0
# Root mean squares of a picture's sampler-space latents: of pictures with contrast, those of good
# VAEs were found between 0.85 and 1.12, and a factor of two takes all of them out of this.
LEAST_RMS: Final = 0.7
MOST_RMS: Final = 1.43
# What synthetic pictures must have, too: 0.63 with the demo model, which never saw the like.
CLEARLY_LOW_RMS: Final = 0.55
CLEARLY_HIGH_RMS: Final = 1.15
LEAST_CONTRAST: Final = 0.05  # deviation, of colours in [-1, 1]
# How much of latents is lost when they are decoded and encoded again: of a VAE's own 0.1 to 2 %,
# of another's a third and more.
MOST_LOST: Final = 0.2
CLEARLY_LESS: Final = 0.5
RED_GREEN_BLUE: Final = "RGB"


@dataclass(frozen=True)
class Finding:
    """What is wrong, by name, and in a sentence what to do."""

    fault: Fault
    text: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.text}"


def diagnosed(lab: Lab, trip: RoundTrip) -> list[Finding]:
    """What is wrong with a VAE, from one round trip and, where that is needed, from some more.

    What follows from another fault is not told: NaN in the picture says nothing of colours.
    """
    for look in (_bad_weights, _not_finite, _bad_fit):
        found = look(lab, trip)
        if found:
            return found
    return _bad_scale(lab, trip)


# --- numbers that are none


def _bad_weights(lab: Lab, trip: RoundTrip) -> list[Finding]:
    named = itertools.chain(lab.vae.named_parameters(), lab.vae.named_buffers())
    bad = {name: int((~x.isfinite()).sum()) for name, x in named if x.is_floating_point()}
    bad = {name: count for name, count in bad.items() if count}
    if not bad:
        return []
    names = ", ".join(f"{name} ({count})" for name, count in itertools.islice(bad.items(), 4))
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    halves = any(p.dtype == torch.float16 for p in lab.vae.parameters())
    cure = ", or float32 shows that they are only too large for float16" if halves else ""
    return [
        Finding(
            "nan-weight",
            f"weights must be finite, got NaN or infinity in {names}{more}; "
            "the file is damaged, or training diverged: download it again or take an earlier one"
            f"{cure}",
        )
    ]


def _not_finite(lab: Lab, trip: RoundTrip) -> list[Finding]:
    if not trip.not_finite:
        return []
    dtype = next((p.dtype for p in lab.vae.parameters() if p.is_floating_point()), torch.float32)
    where = first_not_finite(lab, trip.picture)
    what = f"{trip.not_finite} values must be finite, got NaN or infinity, first in {where}"
    if dtype != torch.float16:
        text = f"{what}, in {str(dtype).removeprefix('torch.')}; the weights are of no use"
        return [Finding("not-finite", text)]
    again = round_trip(Lab.of(copy.deepcopy(lab.vae).float()), trip.picture)
    if again.not_finite:
        return [Finding("not-finite", f"{what}, in float32 too; the weights are of no use")]
    cure = "load the VAE in bfloat16 or float32, or set force_upcast in its config"
    return [Finding("fp16-overflow", f"{what}, in float16 only, whose largest is 65504; {cure}")]


def first_not_finite(lab: Lab, picture: Tensor) -> str:
    """The name of the first layer that makes NaN or infinity of a picture."""
    found: list[str] = []
    with _watched(lab.vae, found):
        lab.decode(lab.encode(picture))
    return found[0] if found else "encode or decode itself"


@contextlib.contextmanager
def _watched(vae: nn.Module, found: list[str]) -> Iterator[None]:
    """While the block runs, names of layers whose output is not finite are appended to `found`."""

    def looking(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return look

    layers = [(name, part) for name, part in vae.named_modules() if not [*part.children()]]
    handles = [part.register_forward_hook(looking(name)) for name, part in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- pictures that do not come back


def _bad_fit(lab: Lab, trip: RoundTrip) -> list[Finding]:
    """Nothing comes back, or with its colours exchanged."""
    pairs = [(trip.decoded, trip.picture)]
    if _is_flat(trip.picture) or _gain_db(*pairs[0]) < LEAST_GAIN_DB or _best_order(pairs)[1]:
        again = (round_trip(lab, picture) for picture in lab.references())
        pairs += [(other.decoded, other.picture) for other in again]
    pairs = [pair for pair in pairs if not _is_flat(pair[1])]
    order, won_db = _best_order(pairs)
    gains = [_gain_db(drawn[:, list(order)], wanted) for drawn, wanted in pairs]
    if won_db and max(gains) > LEAST_GAIN_DB:
        names = "".join(RED_GREEN_BLUE[channel] for channel in order)
        return [
            Finding(
                "swapped-channels",
                f"colours must come back in the order RGB, got {names}, which fits the picture "
                f"{won_db:.1f} dB better; the encoder or the decoder was converted from a file "
                "with another order: exchange the input channels of encoder.conv_in or the output "
                "channels of decoder.conv_out",
            )
        ]
    if max(gains) < LEAST_GAIN_DB:
        return [
            Finding(
                "untrained",
                f"the round trip must be nearer to the picture than one flat colour, got "
                f"{max(gains):+.1f} dB; the weights are untrained, or do not belong to this config",
            )
        ]
    return []


def _best_order(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[tuple[int, ...], float]:
    """The order of colours that fits best, and by how much; that as it is, unless clearly worse."""
    orders = list(itertools.permutations(range(3)))
    fits = {
        order: sum(psnr(drawn[:, list(order)], wanted) for drawn, wanted in pairs) / len(pairs)
        for order in orders
    }
    best = max(orders, key=fits.__getitem__)
    won_db = fits[best] - fits[orders[0]]
    return (best, won_db) if won_db > LEAST_GAIN_DB else (orders[0], 0.0)


def _gain_db(drawn: Tensor, wanted: Tensor) -> float:
    """Over the best flat colour."""
    flat = wanted.mean(dim=(-2, -1), keepdim=True).expand_as(wanted)
    return psnr(drawn, wanted) - psnr(flat, wanted)


def _is_flat(picture: Tensor) -> bool:
    return float(picture.std(dim=(-2, -1)).mean()) < LEAST_CONTRAST


def _is_grey(picture: Tensor) -> bool:
    """Colour takes some of the channels, which are idle without."""
    return float((picture.amax(dim=1) - picture.amin(dim=1)).mean()) < LEAST_CONTRAST


# --- latents that no sampler would expect


def _bad_scale(lab: Lab, trip: RoundTrip) -> list[Finding]:
    if _is_flat(trip.picture) or _is_grey(trip.picture) or not _has_scale(lab):
        return []
    rms = _rms(lab, [trip.latents])
    if LEAST_RMS < rms < MOST_RMS:
        return []
    others = _rms(lab, [lab.encode(picture) for picture in lab.references()])
    if others > CLEARLY_LOW_RMS if rms < 1 else others < CLEARLY_HIGH_RMS:
        return []  # it is the picture that is unusual
    if lab.key.latents_mean is None:
        wanted = lab.key.scaling_factor / rms
        cure = f"a scaling_factor of about {wanted:.2g} would fit"
        stated = f"scaling_factor={lab.key.scaling_factor:g}"
        if lab.key.shift_factor:
            stated += f" and shift_factor={lab.key.shift_factor:g}"
    else:
        cure = "they may be those of another VAE"
        stated = "its latents_mean and latents_std"
    return [
        Finding(
            "scaling-factor",
            f"latents must have a deviation of about 1 in sampler space, got {rms:.2f} with "
            f"{stated}; correct the VAE's config, {cure}",
        )
    ]


def _has_scale(lab: Lab) -> bool:
    """Tokens have none, and some VAEs leave it to the pipeline."""
    key = lab.key
    stated = key.scaling_factor != 1 or key.latents_mean is not None
    return has_no_codebook(lab.vae) and (stated or key.class_name in SAMPLER_SPACE_CLASSES)


def has_no_codebook(vae: nn.Module) -> bool:
    """Whether its latents are numbers and not tokens."""
    return not any(getattr(vae, name, None) is not None for name in ("quantize", "regularization"))


def _rms(lab: Lab, latents: Sequence[Tensor]) -> float:
    values = torch.cat([lab.to_sampler(z.double()).flatten() for z in latents])
    return float(values.square().mean().sqrt())


# --- latents from elsewhere


def diagnosed_latents(
    lab: Lab, latents: Tensor, other_space: Tensor | None = None
) -> list[Finding]:
    """Whether latents look like this VAE's own.

    Decoded and encoded again, a VAE's own latents come back almost as they were; another's do not.

    Args:
        lab: the VAE.
        latents: (1, C, ...), VAE space.
        other_space: what they would be if they were in sampler space, or the other way around.
    """
    problem = _wrong_shape(lab, latents)
    if problem:
        return [Finding("other-latents", problem)]
    if not latents.isfinite().all():
        return [Finding("not-finite", "latents must be finite, got NaN or infinity in the file")]
    if not lab.space.can_encode:
        return []
    lost = lost_share(lab, latents)
    own = max(lost_share(lab, lab.encode(picture)) for picture in lab.references())
    if lost <= max(MOST_LOST, 2 * own):
        return []
    hint = ""
    if other_space is not None and lost_share(lab, other_space) < CLEARLY_LESS * MOST_LOST:
        hint = "; they do look like its own in the other space: pass --space"
    return [
        Finding(
            "other-latents",
            f"latents must be this VAE's, got some of which {min(lost, 9.99):.0%} are lost when "
            f"they are decoded and encoded again, where of its own {own:.1%} are{hint or '; '}"
            f"{'' if hint else 'decode them with the VAE that made them'}",
        )
    ]


def _wrong_shape(lab: Lab, latents: Tensor) -> str | None:
    axes = 5 if lab.space.is_video else 4
    if latents.ndim == axes and latents.shape[1] == lab.space.channels:
        return None
    shape = "(1, C, f, h, w)" if lab.space.is_video else "(1, C, h, w)"
    return (
        f"latents must be {shape} with C = {lab.space.channels} for this VAE, got "
        f"{tuple(latents.shape)}; decode them with the VAE that made them, or unpack them first"
    )


def lost_share(lab: Lab, latents: Tensor) -> float:
    """How much of the latents' variance does not come back from decoding and encoding them."""
    decoded = lab.decode(latents).clamp(-1, 1)
    again = lab.encode(decoded)
    frames = min(again.shape[2], latents.shape[2]) if latents.ndim == 5 else None
    if frames is not None:  # a clip that stands still has only its first frame's latents
        again, latents = again[:, :, :1], latents[:, :, :1]
    if again.shape != latents.shape:
        return 0.0
    axes = tuple(range(2, latents.ndim))
    spread = (latents - latents.mean(dim=axes, keepdim=True)).square().mean()
    return float((again - latents).square().mean() / spread.clamp_min(1e-12))
