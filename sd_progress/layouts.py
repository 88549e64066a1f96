"""Owns what turns a callback's latents into VAE-space ones, the tensor `vae.decode` is given.

A layout is a row of data: a name, one function over a few VAE statistics, and the pipelines known
to use it. The function is found once, when a callback is made; no name is looked at during a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VAE_ATTRIBUTES = ("vae", "movq", "vqvae", "vqgan")


@dataclass(frozen=True, eq=False)
class VaeStatistics:
    """What a VAE's config says of its latent space.

    Attributes:
        latent_channels: C; None where the config does not say.
        scaling_factor: latents were multiplied by it after encoding.
        shift_factor: latents were shifted by it before scaling; None where there is none.
        latents_mean: (1, C, 1, 1) float32; None where there is none.
        latents_std: (1, C, 1, 1) float32; None where there is none.
    """

    latent_channels: int | None = None
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: Tensor | None = None
    latents_std: Tensor | None = None

    @classmethod
    def of(cls, vae: object) -> VaeStatistics:
        """Read a diffusers autoencoder's config; what it lacks keeps the defaults above."""
        config = getattr(vae, "config", None)

        def read(name: str) -> object:
            return getattr(config, name, None)

        def number(name: str) -> float | None:
            value = read(name)
            return float(value) if isinstance(value, int | float) else None

        def column(name: str) -> Tensor | None:
            value = read(name)
            if value is None:
                return None
            return torch.tensor(value, device="cpu").float().reshape(1, -1, 1, 1)

        channels = read("latent_channels")
        scaling_factor = number("scaling_factor")
        return cls(
            latent_channels=channels if isinstance(channels, int) else None,
            scaling_factor=1.0 if scaling_factor is None else scaling_factor,
            shift_factor=number("shift_factor"),
            latents_mean=column("latents_mean"),
            latents_std=column("latents_std"),
        )


Operation = Callable[[Tensor, VaeStatistics], Tensor]
"""(B, C, h, w) float32 as the pipeline steps it, statistics -> (B, C, h, w) VAE-space."""


@dataclass(frozen=True)
class Row:
    """One layout: its operation, and the pipelines that are known to use it."""

    name: str
    operation: Operation
    pipelines: frozenset[str]


@dataclass(frozen=True, eq=False)
class Layout:
    """A row, with the statistics of one VAE.

    Attributes:
        name: the row's name; `"inferred"` where no row names the pipeline.
        pipeline: class name, for messages.
    """

    name: str
    pipeline: str
    operation: Operation
    statistics: VaeStatistics

    def to_vae(self, latents: Tensor) -> Tensor:
        """What the pipeline would give `vae.decode`, were this its last step.

        Args:
            latents: (B, C, h, w) float, as the callback holds them; any device.

        Returns:
            (B, C, h, w) float32, on the device of `latents`.

        Raises:
            ValueError: the latents are of another rank, or of another channel count than the VAE's.
        """
        channels = self.statistics.latent_channels
        if latents.ndim != 4 or channels not in (None, latents.shape[1]):
            wanted = f"(B, {channels or 'C'}, h, w)"
            raise ValueError(
                f"latents must be {wanted} for {self.pipeline}, got {tuple(latents.shape)}; "
                "this pipeline's layout is not known yet: preview without it, or ask for it"
            )
        return self.operation(latents.float(), self.statistics)


def scaled(latents: Tensor, statistics: VaeStatistics) -> Tensor:
    """Latents / scaling_factor."""
    return latents / statistics.scaling_factor


def shifted(latents: Tensor, statistics: VaeStatistics) -> Tensor:
    """Latents / scaling_factor + shift_factor."""
    return latents / statistics.scaling_factor + (statistics.shift_factor or 0.0)


def standardised(latents: Tensor, statistics: VaeStatistics) -> Tensor:
    """Latents * latents_std + latents_mean."""
    assert statistics.latents_mean is not None
    assert statistics.latents_std is not None
    return latents * statistics.latents_std.to(latents) + statistics.latents_mean.to(latents)


def standardised_or_scaled(latents: Tensor, statistics: VaeStatistics) -> Tensor:
    """Latents * latents_std / scaling_factor + latents_mean if both are configured, else scaled."""
    if statistics.latents_mean is None or statistics.latents_std is None:
        return scaled(latents, statistics)
    std, mean = statistics.latents_std.to(latents), statistics.latents_mean.to(latents)
    return latents * std / statistics.scaling_factor + mean


def _names(text: str) -> frozenset[str]:
    return frozenset(f"{name}Pipeline" for name in text.split())


# Which pipeline does what was read off, and replayed on, diffusers 0.42.1. Two traps are data here:
# only some SDXL pipelines heed latents_mean and latents_std, and Stable Diffusion 3 inpainting
# decodes without the shift that it encoded with.
ROWS = (
    Row(
        "scaled",
        scaled,
        _names(
            "StableDiffusion StableDiffusionImg2Img StableDiffusionInpaint "
            "StableDiffusionControlNet StableDiffusionControlNetImg2Img "
            "StableDiffusionControlNetInpaint StableDiffusionControlNetXS StableDiffusionAdapter "
            "StableDiffusionPAG StableDiffusionPAGImg2Img StableDiffusionPAGInpaint "
            "StableDiffusionControlNetPAG StableDiffusionControlNetPAGInpaint "
            "StableDiffusionDepth2Img StableDiffusionImageVariation StableDiffusionInstructPix2Pix "
            "StableDiffusionLatentUpscale StableDiffusionUpscale StableDiffusionGLIGEN "
            "StableDiffusionGLIGENTextImage StableDiffusionPanorama StableDiffusionSAG "
            "StableUnCLIP StableUnCLIPImg2Img StableDiffusion3Inpaint "
            "StableDiffusionXLAdapter StableDiffusionXLControlNetInpaint "
            "StableDiffusionXLControlNetUnionInpaint StableDiffusionXLControlNetXS "
            "AltDiffusion AltDiffusionImg2Img BlipDiffusion BlipDiffusionControlNet "
            "CogView3Plus CogView4 CogView4Control HunyuanDiT HunyuanDiTControlNet HunyuanDiTPAG "
            "HunyuanImage Kolors KolorsImg2Img KolorsPAG Lumina AuraFlow OmniGen PixArtAlpha "
            "PixArtSigma PixArtSigmaPAG Sana SanaControlNet SanaPAG"
        ),
    ),
    Row(
        "shifted",
        shifted,
        _names(
            "StableDiffusion3 StableDiffusion3Img2Img StableDiffusion3ControlNet "
            "StableDiffusion3ControlNetInpainting StableDiffusion3PAG StableDiffusion3PAGImg2Img "
            "HiDreamImage Lumina2 ZImage ZImageImg2Img ZImageInpaint ZImageControlNet "
            "ZImageControlNetInpaint ZImageOmni DreamLite DreamLiteMobile PRX"
        ),
    ),
    Row(
        "standardised_or_scaled",
        standardised_or_scaled,
        _names(
            "StableDiffusionXL StableDiffusionXLImg2Img StableDiffusionXLInpaint "
            "StableDiffusionXLInstructPix2Pix StableDiffusionXLControlNet "
            "StableDiffusionXLControlNetImg2Img StableDiffusionXLControlNetUnion "
            "StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLPAG "
            "StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint "
            "StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img"
        ),
    ),
    Row("standardised", standardised, _names("GlmImage")),
)


def vae_of(pipe: object) -> object | None:
    """The pipeline's autoencoder, unwrapped from `torch.compile`; None in pixel space."""
    found = (getattr(pipe, name, None) for name in VAE_ATTRIBUTES)
    vae = next((module for module in found if module is not None), None)
    return getattr(vae, "_orig_mod", vae)


def layout_for(pipe: object) -> Layout:
    """The layout of a pipeline's latents.

    A class that derives from a known pipeline is laid out as its parent. A class that no row knows
    is taken to scale and shift as its VAE's config says, and the layout is named `"inferred"`.
    """
    statistics = VaeStatistics.of(vae_of(pipe))
    names = [cls.__name__ for cls in type(pipe).__mro__]
    row = next((row for name in names for row in ROWS if name in row.pipelines), None)
    name, operation = (row.name, row.operation) if row is not None else ("inferred", shifted)
    return Layout(name, names[0], operation, statistics)
