"""Owns what turns a run's latents into VAE-space ones, the tensor `vae.decode` is given.

A layout is a row of data: a name, a few operations, and the pipelines known to use it. It is looked
up once for each pipeline; no name is looked at during a run. A pipeline that no row knows is
inferred from shapes (inference.py). `register` adds a layout in one line.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from torch import Tensor

from . import operations as op
from .inference import INFERRED_READS, infer
from .operations import Function, Operation, Reading, VaeStatistics

__all__ = [
    "COMBINED",
    "INFERRED",
    "NOT_SHOWN",
    "ROWS",
    "Layout",
    "LayoutError",
    "LayoutRegistry",
    "Row",
    "default_registry",
    "layout_for",
    "reason_not_shown",
    "register",
    "vae_of",
]

VAE_ATTRIBUTES = ("vae", "movq", "vqvae", "vqgan")

Shows = Literal["image", "video", "audio"]
Space = Literal["latents", "pixels"]


class LayoutError(ValueError):
    """Latents cannot be brought into VAE space; the message says how to register a layout."""


@dataclass(frozen=True, eq=False)
class Row:
    """One layout.

    Attributes:
        name: short, for frames and tables.
        operations: what is done to the latents, in order; the result is what `vae.decode` gets.
        pipelines: class names that are known to use it.
        shows: what the pictures are of; audio is drawn as a spectrogram.
        space: `"pixels"` where the latents are the picture itself, in [-1, 1].
        stepped: brings what the scheduler steps to the callback's layout, where they differ.
        latents: the local variable that holds the step's result, where the callback is given
            something else.
        part: the local variable that says which frame is stepped, where each is, by a copy of the
            scheduler of its own.
        kept: the local variables of a mask (1 where the run paints) and of the latents that are put
            back everywhere else after each step.
        least_ndim: of the latents; fewer axes are an embedding that the pipeline steps first.
        picked: which of the VAE-space latents are shown.
        drawn: what else is done for the quick picture, but not for `vae.decode`.
        decode: keyword arguments for `vae.decode`.
        decode_range: of what `vae.decode` returns.
        frames: the local variable that says how many frames of a video are in the batch, where the
            latents do not have an axis for them.
        steps: how many steps of the scheduler make one of the pipeline; the last one counts.
        is_in_parts: whether a long video is made part by part, each with a loop of its own.
        limits: what is to be known of such previews, for the table of supported pipelines.
    """

    name: str
    operations: tuple[Operation, ...]
    pipelines: frozenset[str] = frozenset()
    shows: Shows = "image"
    space: Space = "latents"
    stepped: Operation | None = None
    latents: str | None = None
    part: str | None = None
    kept: tuple[str, str] | None = None
    least_ndim: int = 3
    frames: str | None = None
    steps: int = 1
    picked: Operation | None = None
    drawn: Operation | None = None
    decode: Mapping[str, object] = field(default_factory=dict)
    decode_range: tuple[float, float] = (-1.0, 1.0)
    is_in_parts: bool = False
    limits: str = ""

    @property
    def has_own_colours(self) -> bool:
        """Whether a linear map of the VAE would be of no use: sound, token ids, pixels."""
        is_of_tokens = op.codebook_entries in (*self.operations, self.drawn)
        return self.shows == "audio" or self.space == "pixels" or is_of_tokens

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """The names of what the operations read of a run, each once."""
        extra = (self.stepped, self.picked, self.drawn)
        used = (*self.operations, *(one for one in extra if one is not None))
        names = [name for one in used for name in one.reads]
        return tuple(dict.fromkeys(names if self.frames is None else [*names, self.frames]))


@dataclass(frozen=True, eq=False)
class Shown:
    """VAE-space latents that are shown.

    Attributes:
        latents: (B, C, h, w), or (B, C, F, h, w), or (B * F, C, h, w).
        frames: F of the last form; None in the others.
    """

    latents: Tensor
    frames: int | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """A row, with the statistics of one VAE.

    Attributes:
        row: what is done.
        pipeline: class name, for messages.
        statistics: of the pipeline's VAE.
    """

    row: Row
    pipeline: str
    statistics: VaeStatistics

    @property
    def name(self) -> str:
        """The row's name; `"inferred"` where no row names the pipeline."""
        return self.row.name

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of what is to be read of the run at each step."""
        return self.row.reads

    def to_vae(self, latents: Tensor, values: Mapping[str, object] | None = None) -> Tensor:
        """What the pipeline would give `vae.decode`, were this its last step.

        Args:
            latents: as the callback holds them; any device and float type, or token ids.
            values: what was read of the run, by the names in `reads`.

        Returns:
            (B, C, h, w) or (B, C, F, h, w) float32, on the device of `latents`; ids stay whole
            numbers. In pixel space the picture itself, in [-1, 1].

        Raises:
            LayoutError: the latents do not have this layout, or it could not be inferred.
        """
        reading = self._reading(values)
        result = latents.float() if latents.is_floating_point() else latents
        try:
            for operation in self.row.operations:
                result = operation(result, reading)
        except Exception as error:
            raise LayoutError(self._message(latents, f" ({error})")) from error
        self._check(latents, result)
        return result

    def to_callback(
        self, stepped: Tensor, latents: Tensor, values: Mapping[str, object] | None = None
    ) -> Tensor:
        """What the scheduler stepped, as the callback would have it.

        Args:
            stepped: float32, as the scheduler steps it, for example x0.
            latents: as the callback holds them; what was not stepped is taken from there.
            values: what was read of the run.

        Raises:
            LayoutError: the two do not belong together.
        """
        if self.row.stepped is None or stepped.shape == latents.shape:
            return stepped
        try:
            return self.row.stepped(stepped, self._reading(values, latents.to(stepped)))
        except Exception as error:
            raise LayoutError(self._message(stepped, f" ({error})")) from error

    def to_shown(
        self, vae_latents: Tensor, latents: Tensor, values: Mapping[str, object] | None = None
    ) -> Shown:
        """What is shown of VAE-space latents, picture by picture.

        Args:
            vae_latents: what `to_vae` returned for `latents`.
            latents: as the callback holds them.
            values: what was read of the run.
        """
        if self.row.picked is not None:
            vae_latents = self.row.picked(vae_latents, self._reading(values, latents))
        frames = None if self.row.frames is None else (values or {}).get(self.row.frames)
        if latents.ndim == 5 and vae_latents.ndim == 4 and len(vae_latents) > len(latents):
            frames = len(vae_latents) // len(latents)  # a video for an image VAE
        is_known = isinstance(frames, int) and vae_latents.ndim == 4 and frames > 1
        return Shown(vae_latents, cast(int, frames) if is_known else None)

    def to_drawn(self, shown: Tensor, values: Mapping[str, object] | None = None) -> Tensor:
        """What the quick picture is made of: (B, C, h, w) or (B, C, F, h, w)."""
        if self.row.drawn is None:
            return shown
        return self.row.drawn(shown, self._reading(values))

    def _reading(
        self, values: Mapping[str, object] | None, latents: Tensor | None = None
    ) -> Reading:
        return Reading(self.statistics, values or {}, latents)

    def _check(self, latents: Tensor, result: Tensor) -> None:
        if self.row.shows == "audio" or not result.is_floating_point():
            return
        channels = self.statistics.latent_channels if self.row.space == "latents" else None
        if result.ndim not in (4, 5) or channels not in (None, result.shape[1]):
            raise LayoutError(self._message(latents))

    def _message(self, latents: Tensor, reason: str = "") -> str:
        shape, channels = tuple(latents.shape), self.statistics.latent_channels or "C"
        got = f"latents must become (B, {channels}, h, w) for {self.pipeline}, got {shape}"
        if self.row is INFERRED:
            got += ", a layout that nobody knows and that cannot be inferred"
        else:
            got += f", which the layout {self.name!r} does not fit{reason}"
        return (
            f"{got}; register one in two lines: `from sd_progress import layouts` and "
            f"`layouts.register('{self.pipeline}', 'FluxPipeline')` if it is laid out like that "
            "one, or a function (latents, reading) -> latents in that one's place"
        )


def _infer(latents: Tensor, reading: Reading) -> Tensor:
    found = infer(latents, reading)
    if found is None:
        raise ValueError("no layout fits")
    return found


INFERRED = Row("inferred", (Operation(_infer, INFERRED_READS),), least_ndim=0)
_PIXELS = Row("pixels", (op.as_they_are,), space="pixels")


def _names(text: str) -> frozenset[str]:
    return frozenset(f"{name}Pipeline" for name in text.split())


# Which pipeline does what was read off, and replayed on, diffusers 0.42.1. Some traps are data
# here: only some SDXL pipelines heed latents_mean and latents_std, Stable Diffusion 3 inpainting
# decodes without the shift that it encoded with, and Cosmos 2.5 keeps 1/std in one pipeline and std
# in the other.
ROWS = (
    # --- images, (B, C, h, w)
    Row(
        "scaled",
        (op.scaled,),
        _names(
            "StableDiffusion StableDiffusionImg2Img StableDiffusionInpaint "
            "StableDiffusionControlNet StableDiffusionControlNetImg2Img "
            "StableDiffusionControlNetInpaint StableDiffusionControlNetXS StableDiffusionAdapter "
            "StableDiffusionPAG StableDiffusionPAGImg2Img StableDiffusionPAGInpaint "
            "StableDiffusionControlNetPAG StableDiffusionControlNetPAGInpaint "
            "StableDiffusionDepth2Img StableDiffusionImageVariation StableDiffusionInstructPix2Pix "
            "StableDiffusionLatentUpscale StableDiffusionUpscale StableDiffusionGLIGEN "
            "StableDiffusionGLIGENTextImage StableDiffusionPanorama StableDiffusionSAG "
            "StableDiffusionAttendAndExcite StableDiffusionDiffEdit StableDiffusionLDM3D "
            "StableDiffusionModelEditing StableDiffusionPix2PixZero "
            "CycleDiffusion SemanticStableDiffusion PaintByExample "
            "VersatileDiffusionDualGuided VersatileDiffusionImageVariation "
            "VersatileDiffusionTextToImage TextToVideoZero TextToVideoZeroSDXL "
            "StableUnCLIP StableUnCLIPImg2Img StableDiffusion3Inpaint "
            "StableDiffusionXLAdapter StableDiffusionXLControlNetInpaint "
            "StableDiffusionXLControlNetUnionInpaint StableDiffusionXLControlNetXS "
            "AltDiffusion AltDiffusionImg2Img BlipDiffusion BlipDiffusionControlNet "
            "CogView3Plus CogView4 CogView4Control HunyuanDiT HunyuanDiTControlNet HunyuanDiTPAG "
            "HunyuanImage Kolors KolorsImg2Img KolorsPAG Lumina AuraFlow OmniGen PixArtAlpha "
            "PixArtSigma PixArtSigmaPAG Sana SanaControlNet SanaPAG LatentConsistencyModel "
            "LatentConsistencyModelImg2Img MarigoldDepth MarigoldNormals LDM LDMTextToImage"
        )
        | {
            "LEditsPPPipelineStableDiffusion",
            "LEditsPPPipelineStableDiffusionXL",
            "StableDiffusionInpaintPipelineLegacy",
            "StableDiffusionPipelineSafe",
        },
    ),
    Row(
        "shifted",
        (op.shifted,),
        _names(
            "StableDiffusion3 StableDiffusion3Img2Img StableDiffusion3ControlNet "
            "StableDiffusion3ControlNetInpainting StableDiffusion3PAG StableDiffusion3PAGImg2Img "
            "StableDiffusion3Modular HiDreamImage Lumina2 DreamLite DreamLiteMobile PRX ZImage "
            "ZImageImg2Img ZImageInpaint ZImageControlNet ZImageControlNetInpaint ZImageOmni "
            "ZImageModular"
        ),
    ),
    Row(
        "standardised_or_scaled",
        (op.standardised_or_scaled,),
        _names(
            "StableDiffusionXL StableDiffusionXLImg2Img StableDiffusionXLInpaint "
            "StableDiffusionXLInstructPix2Pix StableDiffusionXLControlNet "
            "StableDiffusionXLControlNetImg2Img StableDiffusionXLControlNetUnion "
            "StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLPAG "
            "StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint "
            "StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img "
            "StableDiffusionXLModular"
        ),
    ),
    Row("standardised", (op.standardised,), _names("GlmImage")),
    Row(
        "scaled_over_sigma_data",
        (op.over_sigma_data, op.scaled),
        _names("SanaSprint SanaSprintImg2Img"),
    ),
    Row(
        "movq",
        (op.as_they_are,),
        _names(
            "Kandinsky KandinskyImg2Img KandinskyInpaint KandinskyV22 KandinskyV22Controlnet "
            "KandinskyV22ControlnetImg2Img KandinskyV22Img2Img KandinskyV22Inpaint Kandinsky3 "
            "Kandinsky3Img2Img"
        ),
        decode={"force_not_quantize": True},
    ),
    Row("quantised", (op.as_they_are,), _names("LDMSuperResolution")),
    Row(
        "vqgan",
        (op.scaled_by("self.vqgan.config.scale_factor"),),
        _names("StableCascadeDecoder WuerstchenDecoder"),
        decode_range=(0.0, 1.0),
    ),
    Row("guided", (op.conditional_half, op.scaled), _names("DiT")),
    Row("targets", (op.one_target_each, op.scaled), _names("MarigoldIntrinsics")),
    Row(
        "channels_last",
        (
            op.first_channels("num_channels_latents"),
            op.first_axes_joined,
            op.permuted(0, 3, 1, 2),
            op.scaled,
        ),
        _names("Kandinsky5T2I Kandinsky5I2I"),
        stepped=op.as_they_are,
    ),
    Row(
        "refiner",
        (op.scaled, op.frames_from_channels),
        _names("HunyuanImageRefiner"),
    ),
    Row(
        "patches_batch_normed",
        (op.batch_normed, op.unpatchified),
        _names("ErnieImage ErnieImageModular"),
    ),
    Row(
        "batch_normed_by_patch",
        (op.patchified, op.standardised, op.unpatchified),
        _names("BriaFibo2"),
    ),
    # --- images, packed into tokens
    Row(
        "packed",
        (op.packed_2x2, op.shifted),
        _names(
            "Flux FluxImg2Img FluxInpaint FluxControl FluxControlImg2Img FluxControlInpaint "
            "FluxControlNet FluxControlNetImg2Img FluxFill FluxKontext FluxKontextInpaint Chroma "
            "ChromaImg2Img ChromaInpaint LongCatImage OvisImage Bria FluxModular"
        ),
    ),
    Row(
        "packed_calculated",
        (
            op.unpacked("calculated_height", "calculated_width", "self.vae_scale_factor"),
            op.shifted,
        ),
        _names("LongCatImageEdit"),
    ),
    Row(
        "packed_global",
        (op.unpacked("global_height", "global_width", "self.vae_scale_factor"), op.shifted),
        _names("FluxControlNetInpaint"),
    ),
    Row(
        "packed_rows",
        (op.last_row_unpacked, op.shifted),
        _names("VisualClozeGeneration"),
        limits="the row of pictures that is being painted, not cut to the target",
    ),
    Row(
        "packed_standardised",
        (op.packed_2x2, op.as_one_frame, op.standardised),
        _names(
            "QwenImage QwenImageImg2Img QwenImageInpaint QwenImageControlNet "
            "QwenImageControlNetInpaint QwenImageEdit QwenImageEditInpaint QwenImageEditPlus "
            "QwenImage21 QwenImageModular QwenImageEditModular QwenImage21Modular"
        ),
    ),
    Row(
        "packed_layers",
        (
            op.unpacked("height", "width", "layers", "self.vae_scale_factor"),
            op.standardised,
            op.layers_in_batch,
        ),
        _names("QwenImageLayered"),
        limits="layers side by side, without their transparency",
    ),
    Row(
        "packed_by_patch_size",
        (op.unpacked("height", "width", "patch_size", "self.vae_scale_factor"), op.standardised),
        _names("NucleusMoEImage"),
    ),
    Row("packed_by_size", (op.unpacked("height", "width"), op.standardised), _names("Krea2")),
    Row(
        "packed_or_flat",
        (op.unpacked_if_patched, op.as_one_frame, op.standardised),
        _names("BriaFibo BriaFiboEdit"),
    ),
    Row(
        "placed_batch_normed",
        (op.placed_by("latent_ids"), op.standardised, op.unpatchified),
        _names("Flux2 Flux2Klein Flux2KleinKV Flux2Modular"),
    ),
    Row(
        "placed_batch_normed_inpaint",
        (op.placed_by("latent_image_ids"), op.standardised, op.unpatchified),
        _names("Flux2KleinInpaint"),
    ),
    Row(
        "tokens_batch_normed",
        (op.tokens_standardised, op.unpacked_channels_last),
        _names("Ideogram4 Ideogram4Modular"),
    ),
    Row(
        "slots",
        (op.first_axes_joined, op.standardised),
        _names("JoyImageEdit"),
        picked=op.last_slot,
    ),
    Row("patches_of_target", (op.target_unpacked, op.standardised), _names("JoyImageEditPlus")),
    # --- pixels, token ids, flat vectors
    replace(
        _PIXELS,
        pipelines=_names(
            "DDIM DDPM PNDM RePaint ConsistencyModel KarrasVe IF IFImg2Img IFInpainting "
            "IFSuperResolution IFImg2ImgSuperResolution IFInpaintingSuperResolution PRXPixel "
            "UnCLIP UnCLIPImageVariation"
        ),
    ),
    Row(
        "token_ids",
        (op.as_they_are,),
        _names("Amused AmusedImg2Img AmusedInpaint"),
        drawn=op.codebook_entries,
        decode_range=(0.0, 1.0),
        limits="colours are those of the codebook's main directions; masked tokens are grey",
    ),
    Row(
        "token_sequence",
        (op.codebook_entries,),
        _names("VQDiffusion"),
        least_ndim=2,
        decode={"force_not_quantize": True},
        limits="colours are those of the codebook's main directions; masked tokens are grey",
    ),
    Row("flat", (op.image_part, op.scaled), _names("UniDiffuser"), least_ndim=2),
    # --- videos, (B, C, F, h, w)
    Row(
        "video_scaled",
        (op.scaled,),
        _names(
            "Allegro EasyAnimate EasyAnimateControl EasyAnimateInpaint HunyuanVideo "
            "HunyuanVideo15 HunyuanVideo15ImageToVideo HunyuanVideo15Modular "
            "HunyuanSkyreelsImageToVideo"
        ),
        shows="video",
    ),
    Row(
        "video_scaled_by_pipeline",
        (op.divided_by("self.vae_scaling_factor"),),
        _names("HunyuanVideoImageToVideo"),
        shows="video",
        stepped=op.behind_first_frame,
    ),
    Row(
        "video_standardised",
        (op.standardised,),
        _names(
            "Wan WanVideoToVideo LucyEdit SkyReelsV2 SkyReelsV2ImageToVideo MotifVideo "
            "MotifVideoImage2Video ChronoEdit SanaVideo SanaImageToVideo WanModular"
        ),
        shows="video",
        stepped=op.behind_first_frame,
    ),
    Row(
        "video_with_condition",
        (op.with_condition_frame, op.standardised),
        _names("WanImageToVideo"),
        shows="video",
    ),
    Row(
        "video_standardised_scaled",
        (op.standardised_or_scaled,),
        _names("Mochi SanaWM") | {"SanaWMLTX2Refiner"},
        shows="video",
        stepped=op.tokens_in_place,
    ),
    Row(
        "video_standardised_over_sigma_data",
        (op.standardised_over_sigma_data,),
        _names("Cosmos2TextToImage Cosmos2VideoToWorld"),
        shows="video",
    ),
    Row(
        "video_stepped_twice",
        (op.standardised_over_sigma_data,),
        _names("CosmosTextToWorld CosmosVideoToWorld"),
        shows="video",
        steps=2,
    ),
    Row(
        "video_cosmos_2_5",
        (op.standardised_with("self.latents_mean", "self.latents_std", is_inverse=True),),
        _names("Cosmos2_5_PredictBase"),
        shows="video",
    ),
    Row(
        "video_cosmos_2_5_chunk",
        (op.standardised_with("self.latents_mean", "self.latents_std", is_inverse=False),),
        _names("Cosmos2_5_Transfer"),
        shows="video",
        is_in_parts=True,
        limits="the part of the video that is being painted",
    ),
    Row(
        "video_cosmos_3",
        (
            op.with_batch,
            op.standardised_with(
                "self._vae_latents_mean", "self._vae_latents_inv_std", is_inverse=True
            ),
        ),
        _names("Cosmos3Omni"),
        shows="video",
        stepped=op.without_extra_batch,
        limits="not the sound",
    ),
    Row(
        "video_behind_reference",
        (op.without_first(1), op.standardised),
        _names("WanAnimate"),
        shows="video",
        is_in_parts=True,
        limits="the part of the video that is being painted",
    ),
    Row(
        "video_behind_references",
        (op.without_first("num_reference_images"), op.standardised),
        _names("WanVACE"),
        shows="video",
    ),
    Row(
        "video_frames",
        (op.frames_in_batch, op.scaled),
        _names(
            "AnimateDiff AnimateDiffControlNet AnimateDiffSDXL AnimateDiffSparseControlNet "
            "AnimateDiffVideoToVideo AnimateDiffVideoToVideoControlNet AnimateDiffPAG PIA "
            "TextToVideoSD VideoToVideoSD Latte"
        ),
        shows="video",
        stepped=op.frames_from_batch,
        frames="frames",
    ),
    Row(
        "video_frames_apart",
        (op.scaled,),
        _names("I2VGenXL"),
        shows="video",
        frames="num_frames",
    ),
    Row(
        "video_history",
        (op.section_with_history, op.scaled),
        _names("HunyuanVideoFramepack"),
        shows="video",
        is_in_parts=True,
    ),
    Row(
        "video_chunk",
        (op.standardised,),
        _names("Helios HeliosPyramid HeliosModular"),
        shows="video",
        is_in_parts=True,
        limits="the part of the video that is being painted",
    ),
    Row(
        "video_windows",
        (op.after_earlier_windows, op.standardised),
        _names("SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingVideoToVideo"),
        shows="video",
        is_in_parts=True,
        part="idx",
    ),
    Row(
        "video_windows_between_images",
        (op.after_earlier_windows, op.without_end_frames, op.standardised),
        _names("SkyReelsV2DiffusionForcingImageToVideo"),
        shows="video",
        is_in_parts=True,
        part="idx",
    ),
    # --- videos, other axes
    Row(
        "frames_first",
        (op.first_axes_joined, op.scaled),
        _names("StableVideoDiffusion"),
        shows="video",
    ),
    Row(
        "frames_first_scaled_by_pipeline",
        (
            op.without_first("additional_frames", axis=1),
            op.permuted(0, 2, 1, 3, 4),
            op.divided_by("self.vae_scaling_factor_image"),
        ),
        _names(
            "CogVideoX CogVideoXFunControl CogVideoXImageToVideo CogVideoXVideoToVideo ConsisID"
        ),
        shows="video",
    ),
    Row(
        "frames_first_with_context",
        (op.with_context_frames, op.permuted(0, 2, 1, 3, 4), op.standardised),
        _names("AnyFlow"),
        shows="video",
    ),
    Row(
        "frames_first_chunks",
        (op.chunk_in_its_place, op.permuted(0, 2, 1, 3, 4), op.standardised),
        _names("AnyFlowFAR"),
        shows="video",
        is_in_parts=True,
    ),
    Row(
        "video_channels_last",
        (op.first_channels("num_channels_latents"), op.permuted(0, 4, 1, 2, 3), op.scaled),
        _names("Kandinsky5T2V"),
        shows="video",
        stepped=op.as_they_are,
    ),
    Row(
        "video_channels_last_behind_image",
        (
            op.first_channels("num_channels_latents"),
            op.first_frames_normalised,
            op.permuted(0, 4, 1, 2, 3),
            op.scaled,
        ),
        _names("Kandinsky5I2V"),
        shows="video",
        stepped=op.behind_first_frame_of_channels,
    ),
    Row(
        "video_channels_last_before_condition",
        (op.without_tail_condition, op.permuted(0, 4, 1, 2, 3), op.scaled),
        _names("Kandinsky6TI2VA"),
        shows="video",
        limits="not the sound",
    ),
    Row(
        "video_tiles",
        (op.permuted(0, 4, 1, 2, 3), op.scaled),
        _names("Kandinsky6SR"),
        shows="video",
        is_in_parts=True,
        limits="the tiles that are being painted",
    ),
    # --- videos, packed into tokens
    Row(
        "video_tokens",
        (op.video_tokens, op.standardised_or_scaled),
        _names("LTX LTX2"),
        shows="video",
    ),
    Row(
        "video_tokens_behind_image",
        (op.video_tokens, op.standardised_or_scaled),
        _names("LTXImageToVideo LTX2ImageToVideo"),
        shows="video",
        stepped=op.packed_behind_first_frame,
    ),
    Row(
        "video_tokens_behind_conditions",
        (op.without_leading_tokens, op.video_tokens, op.standardised_or_scaled),
        _names("LTXCondition"),
        shows="video",
    ),
    Row(
        "video_tokens_before_conditions",
        (op.without_trailing_tokens, op.video_tokens, op.standardised_or_scaled),
        _names("LTX2Condition LTX2HDR LTX2InContext"),
        shows="video",
        limits="not the sound",
    ),
    Row(
        "video_tokens_canvas",
        (op.canvas_trimmed, op.standardised_or_scaled),
        _names("LTX2DFR LTX2DFRTemporalRefine"),
        shows="video",
        limits="not the sound",
    ),
    Row(
        "video_tokens_window",
        (op.window_tokens, op.window_behind_others, op.standardised_or_scaled),
        _names("LTXI2VLongMultiPrompt"),
        shows="video",
        is_in_parts=True,
        latents="latents_packed",
        kept=("cond_mask_tokens", "window_latents_packed"),
    ),
    # --- audio, drawn
    Row(
        "mel_latents",
        (op.scaled,),
        _names("AudioLDM2 AudioLDM MusicLDM"),
        shows="audio",
        drawn=op.time_across,
        limits="a picture of the sound's latents: time runs to the right, pitch upwards",
    ),
    Row(
        "audio_latents",
        (op.as_they_are,),
        _names("StableAudio StableAudio3 StableAudio3AudioToAudio StableAudio3Inpaint"),
        shows="audio",
        drawn=op.channels_down,
        limits="a picture of the sound's latents: time runs to the right, channels down",
    ),
    Row(
        "audio_latents_transposed",
        (op.permuted(0, 2, 1),),
        _names("AceStep LongCatAudioDiT"),
        shows="audio",
        drawn=op.channels_down,
        limits="a picture of the sound's latents: time runs to the right, channels down",
    ),
)

# Pipelines that hand everything to others, whose layouts are used.
COMBINED = _names(
    "KandinskyCombined KandinskyImg2ImgCombined KandinskyInpaintCombined KandinskyV22Combined "
    "KandinskyV22Img2ImgCombined KandinskyV22InpaintCombined StableCascadeCombined VisualCloze "
    "WuerstchenCombined"
)

NOT_SHOWN: Mapping[str, frozenset[str]] = {
    "its latents are an embedding, of which there is no picture": _names(
        "KandinskyPrior KandinskyV22Prior KandinskyV22PriorEmb2Emb StableCascadePrior "
        "WuerstchenPrior"
    ),
    "it has no denoising loop": _names(
        "FluxPriorRedux LTXLatentUpsample LTX2LatentUpsample LTX2VideoDiffusionDecode "
        "VersatileDiffusion"
    ),
    "its scheduler has no `step` to listen to, or is stepped without it": _names(
        "ScoreSdeVe StableDiffusionParadigms"
    ),
    "it makes text": _names("DiffusionGemma LLaDA2"),
    "it makes proteins": _names("RFD4Proteina"),
    "its latents are a 3-D scene that must be rendered": _names("ShapE ShapEImg2Img"),
    "its latents are the sound wave itself": _names("DanceDiffusion SpectrogramDiffusion"),
    "it makes sound by way of pictures, with a class of its own for each": _names("AudioDiffusion"),
    "it runs on ONNX, with numpy arrays in the place of tensors": _names(
        "OnnxStableDiffusion OnnxStableDiffusionImg2Img OnnxStableDiffusionInpaint "
        "OnnxStableDiffusionUpscale StableDiffusionOnnx"
    )
    | {"OnnxStableDiffusionInpaintPipelineLegacy"},
}


class LayoutRegistry:
    """Rows by pipeline class name. What is registered last wins."""

    def __init__(self, rows: Iterable[Row] = ROWS) -> None:
        """A registry of `rows`."""
        self._rows: dict[str, Row] = {}
        self._by_pipeline: dict[str, Row] = {}
        for row in rows:
            self._add(row)

    def register(self, pipeline: str | type, layout: Row | str | Function) -> None:
        """Use a layout for a pipeline, and for the classes that derive from it.

        Args:
            pipeline: the class, or its name.
            layout: a `Row`; the name of a row, or of a pipeline that is laid out the same; or a
                function `(latents, reading) -> latents` to what `vae.decode` is given, which reads
                height and width as `reading.integer("height")`.

        Raises:
            ValueError: no row and no known pipeline has that name.
        """
        name = pipeline if isinstance(pipeline, str) else pipeline.__name__
        row = self._row(layout)
        self._by_pipeline[name] = row

    def row_for(self, names: Iterable[str]) -> Row | None:
        """The row of the first of these class names that one is known for."""
        return next((self._by_pipeline[name] for name in names if name in self._by_pipeline), None)

    def _row(self, layout: Row | str | Function) -> Row:
        if isinstance(layout, Row):
            return layout
        if not isinstance(layout, str):
            function = layout
            reads = function.reads if isinstance(function, Operation) else INFERRED_READS
            return Row("registered", (Operation(function, reads),))
        found = self._rows.get(layout) or self._by_pipeline.get(layout)
        if found is None:
            raise ValueError(
                f"layout must be the name of a row or of a known pipeline, got {layout!r}; "
                f"rows are {', '.join(self._rows)}"
            )
        return found

    def _add(self, row: Row) -> None:
        self._rows[row.name] = row
        self._by_pipeline.update(dict.fromkeys(row.pipelines, row))


@functools.cache
def default_registry() -> LayoutRegistry:
    """The registry behind this module's functions, built at first use."""
    return LayoutRegistry()


def register(pipeline: str | type, layout: Row | str | Function) -> None:
    """`LayoutRegistry.register` of the default registry."""
    default_registry().register(pipeline, layout)


def vae_of(pipe: object) -> object | None:
    """The pipeline's autoencoder, unwrapped from `torch.compile`; None in pixel space."""
    found = (getattr(pipe, name, None) for name in VAE_ATTRIBUTES)
    vae = next((module for module in found if module is not None), None)
    return getattr(vae, "_orig_mod", vae)


def layout_for(pipe: object) -> Layout | None:
    """The layout of a pipeline's latents; None where they are known to be no picture.

    A class that derives from a known pipeline is laid out as its parent. A class that no row knows
    is inferred: without a VAE the latents are taken for pixels.
    """
    vae = vae_of(pipe)
    names = [cls.__name__ for cls in type(pipe).__mro__]
    row = default_registry().row_for(names)
    if row is None:
        if reason_not_shown(*names) is not None:
            return None
        row = INFERRED if vae is not None else replace(_PIXELS, name=INFERRED.name)
    return Layout(row, names[0], VaeStatistics.of(vae))


def reason_not_shown(*names: str) -> str | None:
    """Why a pipeline of one of these class names has no preview; None if it has one."""
    return next((why for why, known in NOT_SHOWN.items() if not known.isdisjoint(names)), None)
