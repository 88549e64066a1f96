"""Owns the linear latent-to-RGB maps: their data, provenance, lookup by VAE, load and save."""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = [
    "Factors",
    "FactorsRegistry",
    "Hidden",
    "Polynomial",
    "VaeKey",
    "by_name",
    "default_registry",
    "describe_vae",
    "explain_unknown",
    "find",
    "is_published",
    "load",
    "names",
    "register",
    "save",
]

Array = NDArray[np.float32]

FORMAT = "sd_progress.factors"
FORMAT_VERSION = "1"
FORMAT_VERSION_WITH_EXTRA = "2"  # what reads only version 1 would leave the extra part out

# Statistics come as buffers in the VAE's dtype; bfloat16 rounds to one part in 256.
STATISTICS_RTOL = 4e-3
STATISTICS_ATOL = 1e-3
SCALE_RTOL = 1e-4

MOST_CHANNELS_FOR_ALL_CUBES = 16

# Classes whose own latents are a diffusion model's sampler-space latents, whatever the model.
SAMPLER_SPACE_CLASSES = frozenset({"AutoencoderTiny"})


@dataclass(frozen=True)
class VaeKey:
    """What a VAE is, as far as its latent space goes; never a file name.

    Attributes:
        class_name: the diffusers class, for example `"AutoencoderKL"`.
        latent_channels: C of what `decode` takes; None where the VAE does not say.
        scaling_factor: 1.0 where the VAE has none.
        shift_factor: 0.0 where the VAE has none.
        latents_mean: per channel (per channel of a 2x2 patch for FLUX.2); None where it has none.
        latents_std: like `latents_mean`.
    """

    class_name: str
    latent_channels: int | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def matches(self, other: VaeKey) -> bool:
        """Whether both have one latent space, up to the rounding of half-precision buffers."""
        return (
            self.class_name == other.class_name
            and self.latent_channels == other.latent_channels
            and math.isclose(self.scaling_factor, other.scaling_factor, rel_tol=SCALE_RTOL)
            and math.isclose(self.shift_factor, other.shift_factor, rel_tol=SCALE_RTOL)
            and _statistics_match(self.latents_mean, other.latents_mean)
            and _statistics_match(self.latents_std, other.latents_std)
        )

    @property
    def normalisation(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(gain, centre), each (C,) or (1,): sampler-space latents are `(z - centre) * gain`."""
        if self.latents_mean is None or self.latents_std is None:
            return np.array([self.scaling_factor]), np.array([self.shift_factor])
        return self.scaling_factor / np.array(self.latents_std), np.array(self.latents_mean)

    def __str__(self) -> str:
        statistics = "" if self.latents_mean is None else ", latents_mean and latents_std"
        return (
            f"{self.class_name} with latent_channels={self.latent_channels}, "
            f"scaling_factor={self.scaling_factor:g}, shift_factor={self.shift_factor:g}"
            f"{statistics}"
        )


@dataclass(frozen=True, eq=False)
class Polynomial:
    """Products of a pixel's own latents, for maps of degree 2 or 3.

    Attributes:
        weight: (3*s*s, M) float32, one column for each of `monomials(latent_channels, degree)`.
        degree: the largest number of factors in a product, 2 or 3.

    Raises:
        ValueError: the degree is neither, or a number is not finite.
    """

    weight: Array
    degree: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _finite("weight", self.weight))
        if self.degree not in (2, 3):
            raise ValueError(f"degree must be 2 or 3, got {self.degree!r}; leave extra out for 1")

    @property
    def kind(self) -> str:
        """How frames call a decoder of this kind."""
        return "quadratic" if self.degree == 2 else "cubic"

    @property
    def arrays(self) -> dict[str, Array]:
        """What a file holds of it."""
        return {"polynomial": self.weight}

    def check(self, latent_channels: int, kernel_size: int) -> None:
        """Raise ValueError where it does not fit a map of so many latent channels."""
        count = len(monomials(latent_channels, self.degree))
        if self.weight.ndim != 2 or self.weight.shape[1] != count:
            raise ValueError(
                f"extra.weight must be (3*s*s, {count}) for {latent_channels} latent channels and "
                f"degree {self.degree}, got {self.weight.shape}; fit it again"
            )


@dataclass(frozen=True, eq=False)
class Hidden:
    """One hidden layer of a small network beside the linear map.

    Attributes:
        weight: (3*s*s, H) float32, from the hidden units to the outputs.
        kernel: (H, C, k, k) float32, from a neighbourhood of latents to the hidden units.
        bias: (H,) float32, of the hidden units, which are `relu(conv2d(latents, kernel) + bias)`.

    Raises:
        ValueError: a number is not finite.
    """

    weight: Array
    kernel: Array
    bias: Array

    kind = "mlp"

    def __post_init__(self) -> None:
        for field in ("weight", "kernel", "bias"):
            object.__setattr__(self, field, _finite(field, getattr(self, field)))

    @property
    def arrays(self) -> dict[str, Array]:
        """What a file holds of it."""
        return {
            "hidden.weight": self.weight,
            "hidden.kernel": self.kernel,
            "hidden.bias": self.bias,
        }

    def check(self, latent_channels: int, kernel_size: int) -> None:
        """Raise ValueError where it does not fit a map of such a neighbourhood."""
        units = len(self.bias)
        wanted = (units, latent_channels, kernel_size, kernel_size)
        if self.kernel.shape != wanted or self.weight.shape[1:] != (units,):
            raise ValueError(
                f"extra.kernel must be {wanted} and extra.weight (3*s*s, {units}), got "
                f"{self.kernel.shape} and {self.weight.shape}; fit it again"
            )


def monomials(channels: int, degree: int) -> list[tuple[int, ...]]:
    """The products of 2 to `degree` latents of one pixel, each as the channels that it multiplies.

    All of them; of degree 3 in more than 16 channels, only those of at most two different ones.
    """
    pairs = list(itertools.combinations_with_replacement(range(channels), 2))
    if degree < 3:
        return list(pairs)
    if channels > MOST_CHANNELS_FOR_ALL_CUBES:
        return [*pairs, *((i, i, j) for i in range(channels) for j in range(channels))]
    return [*pairs, *itertools.combinations_with_replacement(range(channels), 3)]


@dataclass(frozen=True, eq=False)
class Factors:
    """One small convolution from VAE-space latents to RGB, nominally [-1, 1].

    The picture is `pixel_shuffle(conv2d(latents, weight) + bias, upscale)`, with the latents'
    borders replicated, not filled with zeros: zero is no neutral value in VAE space. What `extra`
    makes of the latents is added before the shuffle.

    Attributes:
        weight: (3*s*s, C, k, k) float32, for latents as `vae.decode` is given them. Output channel
            `c*s*s + dy*s + dx` is colour c of sub-pixel (dy, dx), as in `torch.pixel_shuffle`.
        bias: (3*s*s,) float32.
        name: short, for frames and messages, for example `"sd1"`.
        provenance: where the numbers come from.
        licence: under what terms.
        psnr_db: against pictures that were not fitted on, at output resolution; None where nobody
            measured it.
        vae_key: the VAE that these factors are for; None where it is not recorded.
        extra: what goes beyond an affine map; None for most.
        vae_hash: `fingerprint` of the very weights that they were fitted for; None where it is not
            recorded.

    Raises:
        ValueError: a shape does not fit, k is even, or a number is not finite.
    """

    weight: Array
    bias: Array
    name: str
    provenance: str = ""
    licence: str = ""
    psnr_db: float | None = None
    vae_key: VaeKey | None = None
    extra: Polynomial | Hidden | None = None
    vae_hash: str | None = None

    def __post_init__(self) -> None:
        for field in ("weight", "bias"):
            object.__setattr__(self, field, np.array(getattr(self, field), np.float32, order="C"))
        _check_weight(self.weight)
        _check_bias(self.bias, len(self.weight))
        for field in ("weight", "bias"):
            _finite(field, getattr(self, field))
        if self.extra is not None:
            self.extra.check(self.latent_channels, self.kernel_size)
            if len(self.extra.weight) != len(self.weight):
                raise ValueError(
                    f"extra.weight must have {len(self.weight)} rows like weight, got "
                    f"{len(self.extra.weight)}; fit it again"
                )

    @classmethod
    def from_table(
        cls,
        table: ArrayLike,
        bias: ArrayLike = (0.0, 0.0, 0.0),
        *,
        name: str,
        provenance: str = "",
        licence: str = "",
        psnr_db: float | None = None,
        vae_key: VaeKey | None = None,
    ) -> Factors:
        """The classic form: one RGB triple per latent channel.

        Args:
            table: (C, 3); RGB in [-1, 1] is `latents @ table + bias`, latents in VAE space.
            bias: (3,).
            name: see `Factors`, like the rest.
            provenance: where the numbers come from.
            licence: under what terms.
            psnr_db: measured quality, if any.
            vae_key: the VAE that the table is for.

        Raises:
            ValueError: `table` is not (C, 3), or what `Factors` raises.
        """
        rows = np.asarray(table, np.float32)
        if rows.ndim != 2 or rows.shape[1] != 3:
            raise ValueError(f"table must be (C, 3), got {rows.shape}; one RGB row per channel")
        return cls(
            weight=rows.T[:, :, None, None],
            bias=np.asarray(bias, np.float32),
            name=name,
            provenance=provenance,
            licence=licence,
            psnr_db=psnr_db,
            vae_key=vae_key,
        )

    @property
    def kind(self) -> str:
        """How frames call its decoder: `"linear"`, `"quadratic"`, `"cubic"` or `"mlp"`."""
        return "linear" if self.extra is None else self.extra.kind

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        extra = {} if self.extra is None else self.extra.arrays
        return sum(array.size for array in (self.weight, self.bias, *extra.values()))

    @property
    def latent_channels(self) -> int:
        """C, the latent channels that the map takes."""
        return int(self.weight.shape[1])

    @property
    def kernel_size(self) -> int:
        """k, odd: how many latent pixels a side go into one output pixel."""
        return int(self.weight.shape[2])

    @property
    def upscale(self) -> int:
        """s: output pixels a side per latent pixel."""
        return math.isqrt(len(self.weight) // 3)


class FactorsRegistry:
    """Factors by name, and by the VAE that they are for. What is registered last wins."""

    def __init__(self, rows: Iterable[Factors] = ()) -> None:
        """A registry of `rows`; those that carry a `vae_key` are also found by VAE."""
        self._by_name: dict[str, Factors] = {}
        self._by_key: list[tuple[VaeKey, Factors]] = []
        self._fits: set[str] = set()  # made for one VAE of ours, whose latents no other shares
        self._published: list[Factors] = []
        for factors in rows:
            self._add(factors, factors.vae_key)

    @classmethod
    def shipped(cls) -> FactorsRegistry:
        """A new registry of everything in the package: published rows and our own fits."""
        registry = cls()
        for factors, keys in _published_rows():
            registry._by_name[factors.name] = factors
            registry._by_key += [(key, factors) for key in keys]
            registry._published.append(factors)
        for factors in _shipped_fits():
            registry._add(factors, factors.vae_key)
            registry._fits.add(factors.name)
        return registry

    def register(self, factors: Factors, vae: object = None) -> None:
        """Use `factors` for `vae` from now on, and under their own name.

        Args:
            factors: the linear map; replaces what had its name, or its VAE, before.
            vae: a VAE, or its `VaeKey`; left out, `factors.vae_key`.

        Raises:
            ValueError: there is no VAE to register for, or its channels differ from the factors'.
        """
        key = factors.vae_key if vae is None else describe_vae(vae)
        if key is None:
            raise ValueError(
                f"vae must be given for factors {factors.name!r}, got None; "
                "pass the VAE that they are for, or set their vae_key"
            )
        if key.latent_channels not in (None, factors.latent_channels):
            raise ValueError(
                f"factors must have {key.latent_channels} latent channels for {key}, got "
                f"{factors.latent_channels}; pass factors that were fitted for this VAE"
            )
        self._add(replace(factors, vae_key=key), key)

    def find(self, vae: object, *, vae_hash: str | None = None) -> Factors | None:
        """The factors for a VAE, or None if its latent space is not known.

        Args:
            vae: any diffusers autoencoder, or its `VaeKey`.
            vae_hash: `fingerprint` of its weights; given, what was fitted for other weights, which
                only look alike, is passed over.
        """
        key = describe_vae(vae)
        rows = (row for known, row in reversed(self._by_key) if known.matches(key))
        return next(
            (row for row in rows if None in (vae_hash, row.vae_hash) or row.vae_hash == vae_hash),
            None,
        )

    def is_published(self, factors: Factors) -> bool:
        """Whether they are a published table, and not a fit of ours or of the user's."""
        return any(row is factors for row in self._published)

    def by_name(self, name: str, vae: object = None) -> Factors:
        """The factors called `name`.

        Args:
            name: a short name (`"sd1"`) or a published row's own (`"keturn/SD1_4"`).
            vae: what they will decode. Only a distilled VAE (`AutoencoderTiny`) makes a difference:
                its latents are sampler-space, and the factors come back converted to that.

        Raises:
            ValueError: there is no such name; the message lists the closest.
        """
        if name not in self._by_name:
            close = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.4)
            hint = " or ".join(map(repr, close or self.names()))
            raise ValueError(f"name must be a factors row, got {name!r}; did you mean {hint}?")
        factors = self._by_name[name]
        return factors if vae is None else _in_space_of(factors, describe_vae(vae))

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._by_name))

    def explain_unknown(self, vae: object) -> str:
        """What to tell the user about a VAE that `find` does not know: what happens, what to do."""
        key = describe_vae(vae)
        fitting = self._names_of_families(key.latent_channels)
        options = f"decoder={' or '.join(map(repr, fitting))} if the latents are that VAE's, "
        reason = ""
        if key.class_name in SAMPLER_SPACE_CLASSES:
            reason = ", a distilled VAE that does not say whose latents it decodes"
        return (
            f"vae must be one whose latents are known, got {key}{reason}; the preview shows the "
            f"first three principal components, not true colours: pass {options if fitting else ''}"
            "decoder=Factors(...), or vae_every=N for full decodes, "
            "or call sd_progress.factors.register(factors, vae) once"
        )

    def _names_of_families(self, latent_channels: int | None) -> list[str]:
        rows = {row.name: row.latent_channels for _, row in self._by_key}
        fitting = {name for name, channels in rows.items() if channels == latent_channels}
        return sorted(fitting - self._fits)

    def _add(self, factors: Factors, key: VaeKey | None) -> None:
        self._by_name[factors.name] = factors
        if key is not None:
            self._by_key.append((key, factors))


@functools.cache
def default_registry() -> FactorsRegistry:
    """The registry behind this module's functions, built at first use."""
    return FactorsRegistry.shipped()


def register(factors: Factors, vae: object = None) -> None:
    """`FactorsRegistry.register` of the default registry."""
    default_registry().register(factors, vae)


def find(vae: object, *, vae_hash: str | None = None) -> Factors | None:
    """`FactorsRegistry.find` of the default registry."""
    return default_registry().find(vae, vae_hash=vae_hash)


def is_published(factors: Factors) -> bool:
    """`FactorsRegistry.is_published` of the default registry."""
    return default_registry().is_published(factors)


def by_name(name: str, vae: object = None) -> Factors:
    """`FactorsRegistry.by_name` of the default registry."""
    return default_registry().by_name(name, vae)


def names() -> tuple[str, ...]:
    """`FactorsRegistry.names` of the default registry."""
    return default_registry().names()


def explain_unknown(vae: object) -> str:
    """`FactorsRegistry.explain_unknown` of the default registry."""
    return default_registry().explain_unknown(vae)


# --- what a VAE is


def describe_vae(vae: object) -> VaeKey:
    """What a VAE is: plain reads of its class, its config and its small buffers.

    Reads statistics off an accelerator if that is where they are: for construction, not for steps.

    Args:
        vae: any autoencoder, compiled or not; a `VaeKey` is returned as it is.

    Returns:
        The key; with None and neutral values for whatever the VAE does not say.
    """
    if isinstance(vae, VaeKey):
        return vae
    vae = getattr(vae, "_orig_mod", vae)  # torch.compile's wrapper
    channels = (_number(_read(vae, name)) for name in ("latent_channels", "z_dim", "latent_dim"))
    latent_channels = next((int(count) for count in channels if count is not None), None)
    scaling_factor = _number(_read(vae, "scaling_factor"))
    mean, std = _statistics(vae)
    return VaeKey(
        class_name=_class_name(vae),
        latent_channels=latent_channels,
        scaling_factor=1.0 if scaling_factor is None else scaling_factor,
        shift_factor=_number(_read(vae, "shift_factor")) or 0.0,
        latents_mean=mean,
        latents_std=std,
    )


def _class_name(vae: object) -> str:
    """Of the nearest diffusers class, so that a user's subclass is what it inherits from."""
    bases = type(vae).__mro__
    known = (b.__name__ for b in bases if b.__module__.startswith("diffusers.models.autoencoders."))
    return next((name for name in known if not name.endswith("Mixin")), bases[0].__name__)


def _read(vae: object, name: str) -> object:
    # Config first: diffusers warns about config values that are read as attributes.
    config = getattr(vae, "config", None)
    if isinstance(config, Mapping) and name in config:
        return config[name]
    return getattr(config, name, None) or getattr(vae, name, None)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _statistics(vae: object) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    running = getattr(vae, "bn", None)
    mean, variance = (_floats(getattr(running, f"running_{n}", None)) for n in ("mean", "var"))
    if mean is None or variance is None:
        return _floats(_read(vae, "latents_mean")), _floats(_read(vae, "latents_std"))
    eps = _number(_read(vae, "batch_norm_eps")) or _number(getattr(running, "eps", None)) or 0.0
    return mean, tuple(math.sqrt(max(value + eps, 0.0)) for value in variance)


def _floats(values: object) -> tuple[float, ...] | None:
    if values is None or getattr(values, "is_meta", False):  # meta: offloaded, no values here
        return None
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    try:
        return tuple(np.asarray(values, np.float64).ravel().tolist())
    except (TypeError, ValueError):
        return None


def _statistics_match(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return len(ours) == len(theirs) and np.allclose(
        ours, theirs, rtol=STATISTICS_RTOL, atol=STATISTICS_ATOL
    )


# --- the published rows


class _Smoothed(TypedDict, total=False):
    smooth_matrix: list[list[float]]


class _Table(_Smoothed):
    """One published table; `published_factors.json` says what is in it."""

    factors: list[list[float]]
    bias: list[float] | None
    source: str
    note: str
    units: Literal["-1..1", "0..1", "0..255"]
    licence: str


class _Family(TypedDict):
    """One VAE that published tables are for; `vae_families.json` says what is in it."""

    classes: list[str]
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    latents_mean: list[float] | None
    latents_std: list[float] | None
    default: str


class _Detail(TypedDict, total=False):
    """What a published table needs besides itself."""

    family: str
    input: Literal["sampler", "vae"]
    patch_size: int
    psnr_db: float
    caveat: str


# (scale, offset) from a table's output range to [-1, 1].
_TO_SIGNED = {"-1..1": (1.0, 0.0), "0..1": (2.0, -1.0), "0..255": (1 / 127.5, -1.0)}


def _published_rows() -> Iterator[tuple[Factors, list[VaeKey]]]:
    """Every row under its own name, then every family's default with the keys that it serves."""
    tables = cast("dict[str, _Table]", _read_json("published_factors.json")["tables"])
    ours = _read_json("vae_families.json")
    families = cast("dict[str, _Family]", ours["families"])
    details = cast("dict[str, _Detail]", ours["rows"])
    rows = {
        name: _published_row(name, table, details[name], families[details[name]["family"]])
        for name, table in tables.items()
    }
    for factors in rows.values():
        yield factors, []
    for name, family in families.items():
        default = rows[family["default"]]
        provenance = f"{default.name}: {default.provenance}"
        yield replace(default, name=name, provenance=provenance), _keys_of(family)


def _published_row(name: str, table: _Table, detail: _Detail, family: _Family) -> Factors:
    """The table as VAE-space factors, in [-1, 1]."""
    key = _keys_of(family)[0]
    scale, offset = _TO_SIGNED[table["units"]]
    matrix = np.array(table["factors"], np.float64).T * scale  # (3, C)
    bias = np.array(table["bias"] or [0.0, 0.0, 0.0], np.float64) * scale + offset
    if detail.get("input", "sampler") == "sampler":
        gain, centre = key.normalisation
        matrix, bias = _with_input(matrix, bias, gain, -gain * centre)
    notes = (table["source"], table["note"].strip("; "), detail.get("caveat"))
    return Factors(
        weight=_kernel(matrix, table, detail.get("patch_size", 1)),
        bias=bias.astype(np.float32),
        name=name,
        provenance="; ".join(filter(None, notes)),
        licence=table["licence"],
        psnr_db=detail.get("psnr_db"),
        vae_key=key,
    )


def _kernel(matrix: NDArray[np.float64], table: _Table, patch_size: int) -> Array:
    """(3, C), or (3, C*p*p) for patches of p by p latents, as a kernel (3, C, k, k)."""
    smooth = np.array(table.get("smooth_matrix", [[1.0]]), np.float64)
    if patch_size > 1:
        return _overlapping_patches(matrix, patch_size)
    kernel: Array = np.einsum("oc,yx->ocyx", matrix, smooth).astype(np.float32)
    return kernel


def _overlapping_patches(matrix: NDArray[np.float64], p: int) -> Array:
    """A table for p by p patches, as the mean over all the patches that cover a pixel.

    Args:
        matrix: (3, C*p*p), channel `c*p*p + dy*p + dx`, one RGB triple for the whole patch.
        p: latent pixels a side.

    Returns:
        (3, C, 2p-1, 2p-1).
    """
    patch = matrix.reshape(3, -1, p, p)
    kernel = np.zeros((3, patch.shape[1], 2 * p - 1, 2 * p - 1))
    for top in range(p):
        for left in range(p):
            kernel[:, :, top : top + p, left : left + p] += patch / (p * p)
    return kernel.astype(np.float32)


def _keys_of(family: _Family) -> list[VaeKey]:
    """One per class that decodes the family's latent space."""
    mean, std = family["latents_mean"], family["latents_std"]
    return [
        VaeKey(
            class_name=class_name,
            latent_channels=family["latent_channels"],
            scaling_factor=family["scaling_factor"],
            shift_factor=family["shift_factor"],
            latents_mean=None if mean is None else tuple(mean),
            latents_std=None if std is None else tuple(std),
        )
        for class_name in family["classes"]
    ]


def _shipped_fits() -> Iterator[Factors]:
    for entry in sorted(resources.files(__package__).joinpath("data").iterdir(), key=str):
        if entry.name.endswith(".safetensors"):
            with resources.as_file(entry) as path:
                yield load(path)


def _read_json(name: str) -> dict[str, object]:
    text = resources.files(__package__).joinpath("data", name).read_text(encoding="utf-8")
    return cast("dict[str, object]", json.loads(text))


# --- latent spaces


def _with_input(
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    gain: NDArray[np.float64],
    offset: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The map of x as a map of z, where `x = gain * z + offset`.

    Args:
        weight: (O, C) or (O, C, k, k), for x.
        bias: (O,), for x.
        gain: (C,) or (1,).
        offset: (C,) or (1,).
    """
    trailing = (1,) * (weight.ndim - 2)
    constant = (weight * offset.reshape(1, -1, *trailing)).reshape(len(weight), -1).sum(axis=1)
    return weight * gain.reshape(1, -1, *trailing), bias + constant


def _in_space_of(factors: Factors, key: VaeKey) -> Factors:
    """`factors` for `key`, whose latents are sampler-space ones if it is a distilled VAE."""
    if key.class_name not in SAMPLER_SPACE_CLASSES or factors.vae_key is None:
        return factors
    if factors.vae_key.class_name in SAMPLER_SPACE_CLASSES:
        return factors
    if factors.extra is not None:
        raise ValueError(
            f"name must be an affine map for a distilled VAE, got {factors.name!r} of kind "
            f"{factors.kind!r}; calibrate the distilled VAE itself"
        )
    # z = x / gain + centre of the full VAE, and x = (z' - centre') * gain' of the distilled one.
    gain, centre = factors.vae_key.normalisation
    tiny_gain, tiny_centre = key.normalisation
    weight, bias = _with_input(
        factors.weight.astype(np.float64),
        factors.bias.astype(np.float64),
        tiny_gain / gain,
        centre - tiny_centre * tiny_gain / gain,
    )
    return replace(
        factors, weight=weight.astype(np.float32), bias=bias.astype(np.float32), vae_key=key
    )


# --- files


def save(factors: Factors, path: str | os.PathLike[str]) -> None:
    """Write `factors` as safetensors with metadata; the file appears whole or not at all.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        extra = {} if factors.extra is None else factors.extra.arrays
        arrays = {"weight": factors.weight, "bias": factors.bias, **extra}
        save_file(arrays, partial, _metadata(factors))
        partial.replace(target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load(path: str | os.PathLike[str]) -> Factors:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a factors file, or a key of it is missing or wrong.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"path must be a safetensors file, got {os.fspath(path)!r} ({error}); "
            "write it with sd_progress.factors.save"
        ) from error
    try:
        return _factors_from(arrays, metadata)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"path must be a factors file, got {os.fspath(path)!r} ({problem}); "
            "write it with sd_progress.factors.save"
        ) from error


def _metadata(factors: Factors) -> dict[str, str]:
    key = factors.vae_key
    return {
        "format": FORMAT,
        "format_version": _version_of(factors),
        "name": factors.name,
        "provenance": factors.provenance,
        "licence": factors.licence,
        "kernel_size": str(factors.kernel_size),
        "upscale": str(factors.upscale),
        "psnr_db": json.dumps(factors.psnr_db),
        "vae_key": json.dumps(None if key is None else asdict(key)),
        "kind": factors.kind,
        "vae_hash": json.dumps(factors.vae_hash),
    }


def _version_of(factors: Factors) -> str:
    return FORMAT_VERSION if factors.extra is None else FORMAT_VERSION_WITH_EXTRA


def _factors_from(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Factors:
    known = (FORMAT_VERSION, FORMAT_VERSION_WITH_EXTRA)
    if metadata["format"] != FORMAT or metadata["format_version"] not in known:
        raise ValueError(
            f"format must be {FORMAT} {' or '.join(known)}, got {metadata['format']} "
            f"{metadata['format_version']}"
        )
    key = json.loads(metadata["vae_key"])
    return Factors(
        weight=arrays["weight"],
        bias=arrays["bias"],
        name=metadata["name"],
        provenance=metadata["provenance"],
        licence=metadata["licence"],
        psnr_db=json.loads(metadata["psnr_db"]),
        vae_key=None if key is None else _key_from(key),
        extra=_extra_from(arrays, metadata.get("kind", "linear")),
        vae_hash=json.loads(metadata.get("vae_hash", "null")),
    )


def _extra_from(arrays: Mapping[str, Array], kind: str) -> Polynomial | Hidden | None:
    if kind == "linear":
        return None
    if kind == Hidden.kind:
        return Hidden(arrays["hidden.weight"], arrays["hidden.kernel"], arrays["hidden.bias"])
    return Polynomial(arrays["polynomial"], {"quadratic": 2, "cubic": 3}[kind])


def _key_from(fields: Mapping[str, object]) -> VaeKey:
    tuples = {name: tuple(v) for name, v in fields.items() if isinstance(v, list)}
    return VaeKey(**{**fields, **tuples})  # type: ignore[arg-type]


def _finite(name: str, values: ArrayLike) -> Array:
    array = np.array(values, np.float32, order="C")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity; fit it again")
    return array


def _check_weight(weight: Array) -> None:
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"weight must be (3*s*s, C, k, k) with k odd, got {weight.shape}; "
            "a classic (C, 3) table goes through Factors.from_table"
        )
    outputs = len(weight)
    if outputs == 0 or outputs != 3 * math.isqrt(outputs // 3) ** 2:
        raise ValueError(
            f"weight must have 3*s*s outputs, got {outputs}; pass 3, 12, 27, 48, ... rows"
        )


def _check_bias(bias: Array, outputs: int) -> None:
    if bias.shape != (outputs,):
        raise ValueError(
            f"bias must be ({outputs},) like weight's outputs, got {bias.shape}; "
            "pass zeros where there is none"
        )
