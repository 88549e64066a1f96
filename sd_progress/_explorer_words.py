# ruff: noqa: RUF001 - Chinese has punctuation of its own
"""Owns the explorer's words, in English and Chinese, and which of them somebody can read."""

from __future__ import annotations

from typing import Final, Literal

from .diagnosis import Fault
from .exploration import Encoded, Normalisation, UnusableError, View, Why

__all__ = ["CHOICES", "WORDS", "Language", "complaint", "language_of", "numbers", "verdict"]

Language = Literal["en", "zh"]
CHOICES: Final = (("English", "en"), ("中文", "zh"))

WORDS: Final[dict[Language, dict[str, str]]] = {
    "en": {
        "title": "## VAE explorer\nA diffusion model paints latents, not pixels. See what a VAE "
        "makes of a picture, and what breaks when its latents are not what they should be.",
        "file": "A picture: drop it here, or click",
        "sample": "Take the sample",
        "model": "Model: demo, an id of the Hugging Face Hub, or a folder",
        "load": "Load",
        "knobs": "### What happens to the latents",
        "factor": "Factor: as if the scaling factor were wrong by so much",
        "shift": "Shift, in deviations",
        "normalisation": "Normalisation, on the way to the decoder",
        "right": "undone, as it should be",
        "left-out": "left out",
        "twice": "undone twice",
        "channels": "Channels to turn up or down",
        "gain": "Their gain: 0 silences them",
        "reset": "All knobs back",
        "picture": "Picture",
        "preview": "Linear preview",
        "tiny": "Tiny decoder",
        "decoded": "Decoded by the VAE",
        "difference": "Difference",
        "sheet": "Latent channels, in sampler space",
        "waiting": "Give a picture, or take the sample.",
    },
    "zh": {
        "title": "## VAE 探索器\n扩散模型绘制的不是像素，而是潜变量（latents）。看看 VAE 如何编码"
        "一张图片，以及潜变量出错时会发生什么。",
        "file": "图片：拖到这里，或点击选择",
        "sample": "使用示例图片",
        "model": "模型：demo、Hugging Face Hub 的 id，或一个文件夹",
        "load": "加载",
        "knobs": "### 对潜变量做什么",
        "factor": "倍数：相当于缩放系数（scaling factor）错了这么多倍",
        "shift": "平移，以标准差为单位",
        "normalisation": "送入解码器前的反归一化",
        "right": "正确地做一次",
        "left-out": "忘了做",
        "twice": "做了两次",
        "channels": "要调节的通道",
        "gain": "这些通道的增益：0 为静音",
        "reset": "全部复位",
        "picture": "原图",
        "preview": "线性预览",
        "tiny": "小型解码器",
        "decoded": "VAE 解码结果",
        "difference": "差异",
        "sheet": "潜变量各通道（采样空间）",
        "waiting": "请上传一张图片，或使用示例图片。",
    },
}
_COMPLAINTS: Final[dict[Language, dict[Why, str]]] = {
    "en": {
        "no-picture": "This file is no picture that can be read. PNG, JPEG and WebP will do.",
        "too-large": "This picture is too large: at most 50 megapixels. Reduce it first.",
        "too-small": "This picture is too small for the VAE. Take a larger one.",
        "no-model": "This model cannot be loaded. Give a model id such as owner/name, or a folder "
        "made by save_pretrained.",
        "no-encoder": "This model's VAE has no encoder, and so cannot take a picture.",
        "failed": "The model could not do this with the picture. Try a smaller one, or a larger.",
    },
    "zh": {
        "no-picture": "这个文件不是可以读取的图片。请使用 PNG、JPEG 或 WebP。",
        "too-large": "图片太大：最多 5000 万像素。请先缩小。",
        "too-small": "图片对这个 VAE 来说太小。请换一张大一些的。",
        "no-model": "无法加载这个模型。请填写形如 owner/name 的模型 id，或由 save_pretrained 生成的"
        "文件夹。",
        "no-encoder": "这个模型的 VAE 没有编码器，不能处理图片。",
        "failed": "模型无法处理这张图片。请换一张更小或更大的。",
    },
}
_FAULTS: Final[dict[Fault, str]] = {
    "nan-weight": "权重中有 NaN 或无穷大。请重新下载，或使用更早的检查点",
    "fp16-overflow": "float16 溢出。请使用 bfloat16 或 float32",
    "not-finite": "结果中有 NaN 或无穷大，权重不可用",
    "swapped-channels": "颜色通道的顺序被调换",
    "untrained": "结果并不比一片纯色更接近原图，权重与配置不匹配",
    "scaling-factor": "采样空间的潜变量标准差远离 1，缩放系数不对",
    "other-latents": "这些潜变量不是这个 VAE 的",
}


def language_of(accepted: str) -> Language:
    """What of the two a browser would rather have, by its Accept-Language; English for neither."""
    ranked: list[tuple[float, Language]] = []
    for entry in accepted.lower().split(","):
        tag, _, rank = entry.strip().partition(";q=")
        try:
            weight = float(rank or 1)
        except ValueError:
            continue
        primary = tag.split("-")[0]
        if primary in WORDS and weight > 0:
            ranked.append((weight, "zh" if primary == "zh" else "en"))
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else "en"


def complaint(error: UnusableError, language: Language) -> str:
    """Why something will not do, and what will; the detail is in English."""
    return f"{_COMPLAINTS[language][error.why]} ({error.detail})"


def verdict(seen: Encoded, language: Language) -> str:
    """What is wrong with the model itself; Markdown."""
    if not seen.findings:
        return {"en": "Nothing is wrong with this VAE.", "zh": "这个 VAE 没有问题。"}[language]
    lines = []
    for finding in seen.findings:
        text = finding.text if language == "en" else f"{_FAULTS[finding.fault]}。（{finding.text}）"
        lines.append(f"- `{finding.fault}`: {text}")
    return "\n".join(lines)


def numbers(seen: Encoded, view: View, language: Language) -> str:
    """How faithful the picture is, now and without knobs, and the channels; Markdown."""
    is_english = language == "en"
    now, untouched = view.trip, seen.trip
    names = ("now", "knobs untouched") if is_english else ("现在", "未调节时")
    rows = [f"| | {names[0]} | {names[1]} |", "|---|---|---|"]
    for name, value, before in (
        ("PSNR", f"{now.psnr_db:.2f} dB", f"{untouched.psnr_db:.2f} dB"),
        ("SSIM", f"{now.ssim:.4f}", f"{untouched.ssim:.4f}"),
        (
            "largest difference" if is_english else "最大差异",
            f"{now.difference.max():.0f} / 255",
            f"{untouched.difference.max():.0f} / 255",
        ),
        (
            "beyond the range" if is_english else "超出颜色范围",
            f"{now.saturated:.1%}",
            f"{untouched.saturated:.1%}",
        ),
    ):
        rows.append(f"| {name} | {value} | {before} |")
    shape = tuple(now.latents.shape)
    height, width = now.picture.shape[-2:]
    head = (
        f"Picture {width}x{height}, latents {shape}. The difference is white from "
        f"{view.worst:.0f} of 255 levels on."
        if is_english
        else f"图片 {width}x{height}，潜变量 {shape}。差异图中白色为 {view.worst:.0f}/255 级以上。"
    )
    return "\n\n".join([head, "\n".join(rows), _channels(view, is_english)])


def _channels(view: View, is_english: bool) -> str:
    head = (
        "| channel | mean | deviation | least | most |"
        if is_english
        else "| 通道 | 均值 | 标准差 | 最小 | 最大 |"
    )
    rows = [
        f"| {number} | {of.mean:.2f} | {of.deviation:.2f} | {of.low:.2f} | {of.high:.2f} |"
        for number, of in enumerate(view.statistics)
    ]
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def normalisation_choices(language: Language) -> list[tuple[str, Normalisation]]:
    """For a radio: what is shown, and what it stands for."""
    words = WORDS[language]
    kinds: tuple[Normalisation, ...] = ("right", "left-out", "twice")
    return [(words[kind], kind) for kind in kinds]
