"""Owns what is known of each pipeline class of diffusers: what is shown, and how to attach it.

Everything that is printed, the tables and `docs/supported.md`, is made of the same entries. They
come from the layouts and from the lists below, which were read off diffusers' source; diffusers is
not imported.
"""

from __future__ import annotations

import difflib
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from .layouts import COMBINED, NOT_SHOWN, ROWS, Row, Shows

__all__ = [
    "DIFFUSERS_VERSION",
    "PipelineSupport",
    "details",
    "markdown",
    "matching",
    "pipelines",
    "summary",
    "table",
]

Attachment = Literal["callback", "legacy callback", "with block only"]
Source = Literal["denoised", "noisy"]
Group = Literal["image", "video", "audio", "modular", "not shown", "deprecated"]

DIFFUSERS_VERSION: Final = "0.42.1"
"""The lists are of this version."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LEGACY_CALLBACK = _set(
    """
    AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline AudioLDM2Pipeline
    AudioLDMPipeline ConsistencyModelPipeline CycleDiffusionPipeline IFImg2ImgPipeline
    IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline IFInpaintingSuperResolutionPipeline
    IFPipeline IFSuperResolutionPipeline KandinskyCombinedPipeline
    KandinskyImg2ImgCombinedPipeline KandinskyImg2ImgPipeline KandinskyInpaintCombinedPipeline
    KandinskyInpaintPipeline KandinskyPipeline KandinskyV22ControlnetImg2ImgPipeline
    KandinskyV22ControlnetPipeline MusicLDMPipeline OnnxStableDiffusionImg2ImgPipeline
    OnnxStableDiffusionInpaintPipeline OnnxStableDiffusionInpaintPipelineLegacy
    OnnxStableDiffusionPipeline OnnxStableDiffusionUpscalePipeline PaintByExamplePipeline
    PixArtAlphaPipeline PixArtSigmaPAGPipeline PixArtSigmaPipeline
    SemanticStableDiffusionPipeline SpectrogramDiffusionPipeline StableAudioPipeline
    StableDiffusionAdapterPipeline StableDiffusionAttendAndExcitePipeline
    StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline
    StableDiffusionGLIGENTextImagePipeline StableDiffusionImageVariationPipeline
    StableDiffusionInpaintPipelineLegacy StableDiffusionLatentUpscalePipeline
    StableDiffusionModelEditingPipeline StableDiffusionOnnxPipeline
    StableDiffusionParadigmsPipeline StableDiffusionPipelineSafe
    StableDiffusionPix2PixZeroPipeline StableDiffusionSAGPipeline StableDiffusionUpscalePipeline
    StableDiffusionXLAdapterPipeline StableDiffusionXLInstructPix2PixPipeline
    StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline TextToVideoSDPipeline
    TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline UniDiffuserPipeline
    VersatileDiffusionDualGuidedPipeline VersatileDiffusionImageVariationPipeline
    VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline VQDiffusionPipeline
    """
)
_NO_CALLBACK = _set(
    """
    AudioDiffusionPipeline BlipDiffusionControlNetPipeline BlipDiffusionPipeline
    DanceDiffusionPipeline DDIMPipeline DDPMPipeline DiTPipeline DreamLiteMobilePipeline
    DreamLitePipeline FluxPriorReduxPipeline HunyuanVideo15ImageToVideoPipeline
    HunyuanVideo15Pipeline I2VGenXLPipeline Kandinsky6SRPipeline KandinskyPriorPipeline
    KandinskyV22PriorEmb2EmbPipeline KarrasVePipeline LDMPipeline LDMSuperResolutionPipeline
    LDMTextToImagePipeline LongCatImageEditPipeline LongCatImagePipeline
    LTX2LatentUpsamplePipeline LTX2VideoDiffusionDecodePipeline LTXLatentUpsamplePipeline
    MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline PNDMPipeline
    RePaintPipeline SanaWMLTX2Refiner ScoreSdeVePipeline ShapEImg2ImgPipeline ShapEPipeline
    UnCLIPImageVariationPipeline UnCLIPPipeline VersatileDiffusionPipeline
    """
)
_DEPRECATED = _set(
    """
    AltDiffusionImg2ImgPipeline AltDiffusionPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline
    AmusedPipeline AudioDiffusionPipeline AudioLDMPipeline BlipDiffusionPipeline
    CycleDiffusionPipeline DanceDiffusionPipeline I2VGenXLPipeline KarrasVePipeline LDMPipeline
    MusicLDMPipeline OnnxStableDiffusionInpaintPipelineLegacy PaintByExamplePipeline PIAPipeline
    PNDMPipeline RePaintPipeline ScoreSdeVePipeline SemanticStableDiffusionPipeline
    SpectrogramDiffusionPipeline StableDiffusionAttendAndExcitePipeline
    StableDiffusionControlNetXSPipeline StableDiffusionDiffEditPipeline
    StableDiffusionGLIGENPipeline StableDiffusionGLIGENTextImagePipeline
    StableDiffusionInpaintPipelineLegacy StableDiffusionLDM3DPipeline
    StableDiffusionModelEditingPipeline StableDiffusionPanoramaPipeline
    StableDiffusionParadigmsPipeline StableDiffusionPipelineSafe
    StableDiffusionPix2PixZeroPipeline StableDiffusionSAGPipeline
    StableDiffusionXLControlNetXSPipeline TextToVideoSDPipeline TextToVideoZeroPipeline
    TextToVideoZeroSDXLPipeline UnCLIPImageVariationPipeline UnCLIPPipeline UniDiffuserPipeline
    VersatileDiffusionDualGuidedPipeline VersatileDiffusionImageVariationPipeline
    VersatileDiffusionPipeline VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline
    VQDiffusionPipeline WuerstchenCombinedPipeline WuerstchenDecoderPipeline
    WuerstchenPriorPipeline
    """
)

# Whose frames are noisy by default: a scheduler without a closed form for x0, or one that is heard
# only in part, because the pipeline steps copies of it, or view by view.
_NOISY = _set(
    """
    StableDiffusionPanoramaPipeline TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline
    VQDiffusionPipeline
    """
)

# Pipelines that differ from the others of their row.
_SHOWS: Mapping[str, Shows] = {
    "Cosmos2TextToImagePipeline": "image",
    "TextToVideoZeroPipeline": "video",
    "TextToVideoZeroSDXLPipeline": "video",
}
_LIMITS: Mapping[str, str] = {
    "LTX2ImageToVideoPipeline": "not the sound",
    "LTX2Pipeline": "not the sound",
    "TextToVideoZeroPipeline": "the frames side by side, not as a clip",
    "TextToVideoZeroSDXLPipeline": "the frames side by side, not as a clip",
    "SanaWMLTX2Refiner": "the part of the video that is being painted",
    "UniDiffuserPipeline": "not the text",
}

_COMBINED = Row("combined", (), COMBINED, limits="only the stages that make pictures")

_PREVIEW = 'preview = PreviewCallback(pipe, "steps/", "denoise.gif")'
_EXAMPLES: Mapping[Attachment, tuple[str, str]] = {
    "callback": (_PREVIEW, "pipe(..., callback_on_step_end=preview)"),
    "legacy callback": (_PREVIEW, "pipe(..., callback=preview)"),
    "with block only": (
        'with PreviewCallback(pipe, "steps/", "denoise.gif"):',
        "    pipe(...)",
    ),
}
_SOURCES: Mapping[Source, str] = {
    "denoised": "what the model expects it to become",
    "noisy": "what the pipeline works on, because what it is to become cannot be had",
}
_GROUPS: Mapping[Group, str] = {
    "image": "Images",
    "video": "Videos",
    "audio": "Sound, drawn as a picture",
    "modular": "Modular pipelines, and all that derive from them",
    "not shown": "Not shown",
    "deprecated": "Deprecated by diffusers",
}
_COLUMNS = 100

_INFERRED = """\
A pipeline that is not known is inferred:
- A class that derives from a known one is laid out like it.
- Any other is brought into its VAE's space by the shape of its latents and the VAE's config. Its
  frames say layout="inferred". Without a VAE the latents are taken for the picture itself.
- Latents that fit nothing are one warning and no preview. The run goes on in any case."""
_REGISTER = "If the pictures look wrong, name a pipeline that has its latents laid out the same:"
_PAGE = """\
# Which pipelines are shown

Made by `sd-progress models --markdown > docs/supported.md`; not to be edited by hand. The same \
is printed by `sd-progress models`, and `sd-progress models NAME` tells about one.

{summary}

Which class a model is: `type(pipe).__name__`.

## How to attach a preview

`from sd_progress import PreviewCallback`, and then, by what the tables have under *attach*:

{examples}

All of them can be in a `with` block, where most need not be given the callback; SkyReels V2 \
diffusion forcing and Panorama must be, because they step copies of their scheduler.

Frames show what the model expects the picture to become (`denoised`), unless the tables say \
noisy. Combined pipelines hand everything to others, whose layouts are used.

## Pipelines that are not in the tables

{inferred}

{register}

{registering}

{tables}"""


@dataclass(frozen=True)
class PipelineSupport:
    """What is known of one pipeline class.

    Attributes:
        name: of the class.
        shows: what the pictures are of; None where nothing is shown.
        layout: the layout's name; `"combined"` where it hands everything to other pipelines, whose
            layouts are used; `""` where nothing is shown.
        attached: `"callback"` is passed as `callback_on_step_end`, `"legacy callback"` as
            `callback`; with `"with block only"` the call is made in a `with` block.
        source: which of the latents a frame shows by default; None where nothing is shown.
        limits: what a preview does not show; `""` where there is nothing to say.
        is_deprecated: whether diffusers has deprecated it.
        reason: why nothing is shown; `""` where something is.
    """

    name: str
    shows: Shows | None
    layout: str
    attached: Attachment
    source: Source | None
    limits: str
    is_deprecated: bool
    reason: str

    @property
    def is_modular(self) -> bool:
        """Whether it is made of blocks; such pipelines are none of diffusers' `pipelines`."""
        return _is_modular(self.name)

    @property
    def group(self) -> Group:
        """The table it is in."""
        if self.is_deprecated:
            return "deprecated"
        return "modular" if self.is_modular else self.shows or "not shown"


def pipelines() -> tuple[PipelineSupport, ...]:
    """All pipelines that are known, by name: current, deprecated and modular ones."""
    rows = (*ROWS, _COMBINED)
    shown = [_shown(name, row) for row in rows for name in row.pipelines]
    not_shown = [_not_shown(name, why) for why, names in NOT_SHOWN.items() for name in names]
    return tuple(sorted([*shown, *not_shown], key=lambda entry: entry.name.lower()))


def matching(text: str) -> tuple[PipelineSupport, ...]:
    """The pipeline of that name, or all that have `text` in theirs; case does not matter."""
    wanted = text.strip().lower()
    exact = tuple(entry for entry in pipelines() if entry.name.lower() == wanted)
    return exact or tuple(entry for entry in pipelines() if wanted in entry.name.lower())


def summary() -> str:
    """How many pipelines are shown, in two lines."""
    known = [entry for entry in pipelines() if not entry.is_modular]
    current = [entry.shows for entry in known if not entry.is_deprecated]
    deprecated = [entry.shows for entry in known if entry.is_deprecated]
    kinds = ", ".join(f"{current.count(kind)} {kind}" for kind in ("image", "video", "audio"))
    return (
        f"diffusers {DIFFUSERS_VERSION}: {_number_shown(current)} of {len(current)} current "
        f"pipelines are shown ({kinds}), {current.count(None)} are not.\n"
        f"Also shown: {_number_shown(deprecated)} of {len(deprecated)} deprecated ones, and "
        f"{len(pipelines()) - len(known)} modular pipelines with all that derive from them."
    )


def table(entries: Iterable[PipelineSupport]) -> str:
    """The names of these pipelines, by what is shown and how it is attached, for a terminal."""
    return "\n\n".join(
        "\n".join([f"{title} ({len(members)})", *_blocks(members)])
        for title, members in _grouped(entries).items()
    )


def details(text: str) -> str:
    """All that is known of some pipelines, or what it means that none is known.

    Args:
        text: a class name, or a part of one; case does not matter.
    """
    found = matching(text)
    if not found:
        return _unknown(text)
    alike: dict[PipelineSupport, list[str]] = {}
    for entry in found:
        alike.setdefault(replace(entry, name=""), []).append(entry.name)
    blocks = [_block(names, facts) for facts, names in alike.items()]
    return "\n\n".join([*blocks, *_how_to_attach(facts for facts in alike if facts.shows)])


def markdown() -> str:
    """The page `docs/supported.md`."""
    examples = (f"- {kind}:\n\n{_code(lines, '  ')}" for kind, lines in _EXAMPLES.items())
    tables = (
        f"## {title} ({len(members)})\n\n{_markdown_table(members)}"
        for title, members in _grouped(pipelines()).items()
    )
    return _PAGE.format(
        summary=summary().replace("\n", " "),
        examples="\n\n".join(examples),
        inferred=_INFERRED.replace("\n-", "\n\n-", 1),
        register=_REGISTER,
        registering=_code(_registering("MyPipeline")),
        tables="\n\n".join(tables),
    )


# One entry ------------------------------------------------------------------------------------


def _shown(name: str, row: Row) -> PipelineSupport:
    return PipelineSupport(
        name=name,
        shows=_SHOWS.get(name, row.shows),
        layout=row.name,
        attached=_attachment(name),
        source="noisy" if name in _NOISY else "denoised",
        limits=_LIMITS.get(name, row.limits),
        is_deprecated=name in _DEPRECATED,
        reason="",
    )


def _not_shown(name: str, reason: str) -> PipelineSupport:
    return PipelineSupport(
        name=name,
        shows=None,
        layout="",
        attached=_attachment(name),
        source=None,
        limits="",
        is_deprecated=name in _DEPRECATED,
        reason=reason,
    )


def _attachment(name: str) -> Attachment:
    if name in _NO_CALLBACK or _is_modular(name):
        return "with block only"
    return "legacy callback" if name in _LEGACY_CALLBACK else "callback"


def _is_modular(name: str) -> bool:
    return name.endswith("ModularPipeline")


# Tables ---------------------------------------------------------------------------------------


def _number_shown(shows: Sequence[Shows | None]) -> int:
    return len(shows) - shows.count(None)


def _grouped(entries: Iterable[PipelineSupport]) -> dict[str, list[PipelineSupport]]:
    """By title, without empty groups."""
    entries = tuple(entries)
    groups = {
        title: [entry for entry in entries if entry.group == group]
        for group, title in _GROUPS.items()
    }
    return {title: members for title, members in groups.items() if members}


def _blocks(entries: Iterable[PipelineSupport]) -> list[str]:
    """One for each way to attach and each remark: a heading, and the names below it."""
    names: dict[str, list[str]] = {}
    for entry in sorted(entries, key=_remarks_and_attachment):
        names.setdefault(_heading(entry), []).append(entry.name)
    return [f"{_filled(f'  {heading}', 2)}\n{_in_columns(names[heading])}" for heading in names]


def _remarks_and_attachment(entry: PipelineSupport) -> tuple[str, int]:
    return _remarks(entry), list(_EXAMPLES).index(entry.attached) if entry.shows else 0


def _heading(entry: PipelineSupport) -> str:
    remarks = _remarks(entry)
    if not entry.shows:
        return remarks
    return f"{entry.attached} ({remarks})" if remarks else entry.attached


def _in_columns(names: Sequence[str]) -> str:
    """In their order from top to bottom, in as many columns as there is room for."""
    for rows in range(1, len(names) + 1):
        columns = [names[start : start + rows] for start in range(0, len(names), rows)]
        widths = [max(map(len, column)) for column in columns]
        if 4 + sum(widths) + 2 * (len(widths) - 1) <= _COLUMNS:
            break
    padded = (
        [f"{name:<{width}}" for name in column]
        for column, width in zip(columns, widths, strict=True)
    )
    lines = itertools.zip_longest(*padded, fillvalue="")
    return "\n".join(f"    {'  '.join(line)}".rstrip() for line in lines)


def _attach_column(entry: PipelineSupport) -> str:
    return entry.attached if entry.shows else ""


def _remarks(entry: PipelineSupport) -> str:
    """What the title of the entry's group does not say."""
    is_of_mixed_group = entry.group in ("modular", "deprecated")
    remarks = (
        entry.shows or "not shown" if is_of_mixed_group else "",
        "noisy" if entry.source == "noisy" else "",
        entry.limits,
        entry.reason,
    )
    return "; ".join(filter(None, remarks))


def _filled(text: str, indent: int = 0) -> str:
    return textwrap.fill(
        text.rstrip(), _COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _markdown_table(entries: Sequence[PipelineSupport]) -> str:
    """With a row for each; columns that would be empty are left out."""
    columns = {
        "pipeline": [entry.name for entry in entries],
        "attach": [_attach_column(entry) for entry in entries],
        "layout": [entry.layout for entry in entries],
        "remarks": [_remarks(entry) for entry in entries],
    }
    used = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [used, ["---"] * len(used), *zip(*used.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _code(lines: Iterable[str], indent: str = "") -> str:
    return textwrap.indent("\n".join(["```python", *lines, "```"]), indent)


# Details --------------------------------------------------------------------------------------


def _block(names: Sequence[str], facts: PipelineSupport) -> str:
    shows = f"nothing: {facts.reason}"
    if facts.source is not None:
        shows = f"{facts.shows}, {facts.source}: {_SOURCES[facts.source]}"
    labelled = {
        "shows": shows,
        "limits": facts.limits,
        "attach": _attach_column(facts),
        "layout": facts.layout,
        "status": "deprecated by diffusers" if facts.is_deprecated else "",
    }
    lines = (f"  {label:<6}  {text}" for label, text in labelled.items() if text)
    return "\n".join([_filled(", ".join(names)), *(_filled(line, 10) for line in lines)])


def _how_to_attach(entries: Iterable[PipelineSupport]) -> list[str]:
    """A heading and an example for each kind there is; nothing without entries."""
    kinds = {entry.attached for entry in entries}
    examples = [
        "\n".join([f"{kind}:", *(f"    {line}" for line in lines)])
        for kind, lines in _EXAMPLES.items()
        if kind in kinds
    ]
    heading = "How to attach it, after `from sd_progress import PreviewCallback`:"
    return [heading, *examples] if examples else []


def _unknown(text: str) -> str:
    close = difflib.get_close_matches(text, [entry.name for entry in pipelines()], n=1)
    return "\n\n".join(
        [
            f"No known pipeline has {text!r} in its name."
            + "".join(f" Did you mean {name}?" for name in close)
            + "\nNames are those of classes: `type(pipe).__name__`.",
            _INFERRED,
            _REGISTER,
            textwrap.indent("\n".join(_registering(text)), "    "),
        ]
    )


def _registering(text: str) -> tuple[str, str, str]:
    name = text if text.isidentifier() else "MyPipeline"
    return ("from sd_progress import layouts", "", f'layouts.register("{name}", "FluxPipeline")')
