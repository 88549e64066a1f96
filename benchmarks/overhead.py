"""What a preview costs the run: ours beside what people do instead.

Real pipelines with random weights make the same run again and again, in turns with each kind of
preview. A round is one run of each. The time of a whole run, with the final decode and the waiting
for files, is divided by that of the same round's run with nothing attached. Printed are medians:

    ms per step      the whole run, divided by its steps
    ratio            to nothing attached, of whole runs; "once more" shows what chance makes of it,
                     and in brackets is where the median of endless rounds is, 19 times of 20
    ms in callback   of one callback; if that waits for the device, the waiting too
    syncs per step   how often CUDA is waited for, beyond nothing attached
    extra MiB        peak memory beyond nothing attached, the least of all rounds (of CUDA; of this
                     process on a CPU with Linux, where a few MiB more or less mean nothing)

On a GPU the models have their published sizes, in bfloat16. On a CPU they are shrunken, in float32,
and what is not (files, the tiny decoder) weighs more there than in earnest. Weights are what the
layers start with, which keeps outputs finite; prompts are embeddings.

    python benchmarks/overhead.py                          # everything
    python benchmarks/overhead.py --models sd15 --rounds 3
    python benchmarks/overhead.py --models flux --ways sd-progress "docs recipe"
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import json
import math
import os
import platform
import queue
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import TypeVar

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from sd_progress import Factors, PngFolderWriter, PreviewCallback
from sd_progress.boundary import OnError

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
Show = Callable[[Tensor, int], None]
"""(latents as the run steps them, step index): shows them."""

NOTHING, AGAIN = "nothing attached", "nothing, once more"
OURS, THEIRS = "sd-progress", "docs recipe"
BUDGETED = "sd-progress, budget 0.02"
OUR_PNGS, THEIR_PNGS = "sd-progress, PNGs", "docs recipe, 512 px"
TINY = "tiny decoder"
PROCESSOR = VaeImageProcessor()
RESET = Path("/proc/self/clear_refs")
NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer"))
NO_TEXTS = {**NO_TEXT, **dict.fromkeys(("text_encoder_2", "tokenizer_2"))}
DOCS_TABLE = "diffusers_docs/SDXL_255"
DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    # Random networks give little. Taken for v, that leaves latents at unit variance, as real ones
    # are; taken for the noise, it would blow them up until every picture is only black and white.
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Place:
    """Where models are built, how large, and for how many steps."""

    device: torch.device
    dtype: torch.dtype
    is_small: bool
    steps: int

    def sized(self, real: T, small: T) -> T:
        """The setting for this size."""
        return small if self.is_small else real

    def made(self, cls: type[Module], **config: object) -> Module:
        """A module with random weights, made on the device and in the dtype right away."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(0)
        try:
            with self.device:
                return cls(**config).eval()
        finally:
            torch.set_default_dtype(before)

    def prompts(self, *shape: int, name: str = "prompt_embeds") -> dict[str, Tensor]:
        """Embeddings of a prompt and of a negative one, as arguments."""
        numbers = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(1))
        positive, negative = numbers.to(self.device, self.dtype)
        return {name: positive, f"negative_{name}": negative}


@dataclass(frozen=True, eq=False)
class Model:
    """A pipeline, what it is called with, and what the ways need to know of it.

    Attributes:
        size: width and height in pixels.
        table: of the published factors, for latents as the pipeline steps them.
        inputs: what else the pipeline is called with.
        shown: latents as the callback has them -> (B, C, h, w), of a video its middle frame.
        to_vae: the same -> what `vae.decode` is given, of a video the first latent frame.
    """

    name: str
    place: Place
    pipe: diffusers.DiffusionPipeline
    size: tuple[int, int]
    table: str
    inputs: dict[str, object]
    shown: Callable[[Tensor], Tensor]
    to_vae: Callable[[Tensor], Tensor]


def image_vae(place: Place, **config: object) -> diffusers.AutoencoderKL:
    """The autoencoder of Stable Diffusion and its kin, 8x down."""
    return place.made(
        diffusers.AutoencoderKL,
        block_out_channels=place.sized((128, 256, 512, 512), (8, 16, 32, 32)),
        norm_num_groups=place.sized(32, 8),
        layers_per_block=place.sized(2, 1),
        mid_block_add_attention=not place.is_small,  # else most of what a small one costs
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **config,
    )


def image_model(
    name: str, place: Place, pipe: diffusers.DiffusionPipeline, side_px: int, **inputs: object
) -> Model:
    """A model with latents of 4 channels, which the callback has as they are."""
    scale, size = pipe.vae.config.scaling_factor, (side_px, side_px)
    return Model(name, place, pipe, size, DOCS_TABLE, inputs, lambda x: x, lambda x: x / scale)


def sd15(place: Place) -> Model:
    """Stable Diffusion 1.5."""
    text = place.sized(768, 64)
    unet = place.made(
        diffusers.UNet2DConditionModel,
        sample_size=64,
        block_out_channels=place.sized((320, 640, 1280, 1280), (32, 64, 128, 128)),
        attention_head_dim=place.sized(8, (1, 1, 2, 2)),
        cross_attention_dim=text,
    )
    parts = {"vae": image_vae(place), "unet": unet, "safety_checker": None, **NO_TEXT}
    scheduler = diffusers.DPMSolverMultistepScheduler(**DIFFUSION)
    pipe = diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, feature_extractor=None, requires_safety_checker=False
    )
    return image_model("sd15", place, pipe, 512, **place.prompts(77, text))


def sdxl(place: Place) -> Model:
    """Stable Diffusion XL."""
    text, pooled, time_width = place.sized((2048, 1280, 256), (64, 32, 8))
    unet = place.made(
        diffusers.UNet2DConditionModel,
        sample_size=128,
        block_out_channels=place.sized((320, 640, 1280), (32, 64, 128)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=place.sized((1, 2, 10), (1, 1, 2)),
        attention_head_dim=place.sized((5, 10, 20), (1, 1, 2)),
        cross_attention_dim=text,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + pooled,
    )
    parts = {"vae": image_vae(place, scaling_factor=0.13025), "unet": unet, **NO_TEXTS}
    scheduler = diffusers.EulerDiscreteScheduler(**DIFFUSION)
    pipe = diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    prompts = place.prompts(77, text) | place.prompts(pooled, name="pooled_prompt_embeds")
    return image_model("sdxl", place, pipe, 1024, **prompts)


def flux(place: Place) -> Model:
    """FLUX.1 [dev], whose latents are packed into tokens."""
    text, pooled = place.sized((4096, 768), (64, 32))
    narrow = {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    small = {"num_layers": 1, "num_single_layers": 2, **narrow}
    widths = {"joint_attention_dim": text, "pooled_projection_dim": pooled}
    space = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    vae = image_vae(place, use_quant_conv=False, use_post_quant_conv=False, **space)
    config = {"guidance_embeds": True, **widths, **place.sized({}, small)}
    transformer = place.made(diffusers.FluxTransformer2DModel, **config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, vae, transformer=transformer, **NO_TEXTS)
    prompts = place.prompts(512, text) | place.prompts(pooled, name="pooled_prompt_embeds")

    def unpacked(tokens: Tensor) -> Tensor:
        latents: Tensor = pipe._unpack_latents(tokens, 1024, 1024, pipe.vae_scale_factor)
        return latents

    def to_vae(tokens: Tensor) -> Tensor:
        return unpacked(tokens) / space["scaling_factor"] + space["shift_factor"]

    model = image_model("flux", place, pipe, 1024, **prompts)
    return replace(model, table="sdcpp/Flux", shown=unpacked, to_vae=to_vae)


def wan(place: Place) -> Model:
    """Wan 2.1, 1.3B, which makes videos."""
    text = place.sized(4096, 64)
    real = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    small = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 4}
    config = {"text_dim": text, **place.sized(real, small)}
    transformer = place.made(diffusers.WanTransformer3DModel, **config)
    config = place.sized({}, {"base_dim": 8, "num_res_blocks": 1})
    vae = place.made(diffusers.AutoencoderKLWan, **config)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    parts = {"scheduler": diffusers.UniPCMultistepScheduler(**flow), "vae": vae, **NO_TEXT}
    pipe = diffusers.WanPipeline(transformer=transformer, **parts)
    size, frames = place.sized(((832, 480), 33), ((416, 240), 9))
    inputs = {**place.prompts(512, text), "num_frames": frames}

    def middle(latents: Tensor) -> Tensor:
        return latents[:, :, latents.shape[2] // 2]

    def to_vae(latents: Tensor) -> Tensor:
        std = latents.new_tensor(vae.config.latents_std)[:, None, None, None]
        mean = latents.new_tensor(vae.config.latents_mean)[:, None, None, None]
        return latents[:, :, :1] * std + mean

    return Model("wan", place, pipe, size, "sdcpp/Wan21", inputs, middle, to_vae)


MODELS: dict[str, Callable[[Place], Model]] = {"sd15": sd15, "sdxl": sdxl, "flux": flux, "wan": wan}


# --- ways: what is called after each step of one run; at its end nothing is left to close


class Watch:
    """Put around each callback, to time it; in a mode, CUDA warns or raises if it is waited for."""

    def __init__(self, mode: str = "default") -> None:
        self.seconds: list[float] = []
        self.previews: list[PreviewCallback] = []
        self._mode = mode

    def __enter__(self) -> None:
        if self._mode != "default":
            torch.cuda.set_sync_debug_mode(self._mode)
        self._began_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds.append(time.perf_counter() - self._began_s)
        if self._mode != "default":
            torch.cuda.set_sync_debug_mode("default")


class WatchedPreview(PreviewCallback):
    """Ours, watched from outside."""

    watch: Watch

    def __call__(self, *given: object) -> object:  # type: ignore[override]
        """What diffusers calls after each step."""
        with self.watch:
            return super().__call__(*given)  # type: ignore[call-overload]


Way = Callable[[Model, Path], Show | WatchedPreview | None]


def nothing(model: Model, folder: Path) -> None:
    """No callback at all."""


def ours(
    model: Model, folder: Path, *, on_error: OnError = "warn", budget: float | None = None
) -> WatchedPreview:
    """A folder of PNGs, a GIF and a bounded queue, all settings as they come."""
    newest = queue.Queue[object](1)
    pngs, gif = folder / "steps", folder / "run.gif"
    options = {"calibrate": "never", "on_error": on_error, "budget": budget}  # random weights
    return WatchedPreview(model.pipe, pngs, gif, newest, **options)


def our_pngs(model: Model, folder: Path) -> WatchedPreview:
    """The pictures that the documentation's recipe makes, of the size of the final one."""
    weights, biases = published(model.table)
    # the recipe's are for scaled latents and give levels; ours for the VAE's, and give [-1, 1]
    table = np.transpose(weights) / 127.5 * model.pipe.vae.config.scaling_factor
    factors = Factors.from_table(table, np.array(biases) / 127.5 - 1, name=model.table)
    writer = PngFolderWriter(folder, min_side_px=min(model.size), resample="smooth")
    return WatchedPreview(model.pipe, writer, source="noisy", decoder=factors, calibrate="never")


def docs_recipe(model: Model, folder: Path, *, size: tuple[int, int] | None = None) -> Show:
    """As in the diffusers documentation, "Display image after each generation step"."""
    weights, biases = published(model.table)

    def show(latents: Tensor, index: int) -> None:
        x = model.shown(latents)[0]  # (C, h, w)
        matrix = torch.tensor(weights, dtype=x.dtype).to(x.device)
        offset = torch.tensor(biases, dtype=x.dtype).to(x.device)
        rgb = torch.einsum("...lxy,rl -> ...rxy", x, matrix) + offset[:, None, None]
        pixels = rgb.clamp(0, 255).byte().cpu().numpy().transpose(1, 2, 0)
        image = Image.fromarray(pixels)
        image = image if size is None else image.resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"step_{index + 1:03}.png")

    return show


def synchronous(model: Model, folder: Path) -> Show:
    """As in user interfaces: off the device, mapped, enlarged, a JPEG for whoever listens."""
    weights, biases = map(torch.tensor, published(model.table))
    listener: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def show(latents: Tensor, index: int) -> None:
        x = model.shown(latents)[0].to("cpu", torch.float32)  # (C, h, w)
        levels = x.movedim(0, -1) @ weights.T + biases  # (h, w, 3)
        image = Image.fromarray(levels.clamp(0, 255).byte().numpy())
        jpeg = io.BytesIO()
        image.resize(model.size, Image.Resampling.BICUBIC).save(jpeg, "JPEG")
        listener.put(jpeg.getvalue())

    return show


def tiny_decoder(model: Model, folder: Path) -> Show:
    """A distilled decoder of the size at which they are published."""
    channels = model.pipe.vae.config.latent_channels
    tiny = model.place.made(diffusers.AutoencoderTiny, latent_channels=channels)

    def show(latents: Tensor, index: int) -> None:
        x = model.shown(latents).to(model.place.dtype)
        save(tiny.decode(x, return_dict=False)[0], folder, index)

    return show


def save(decoded: Tensor, folder: Path, index: int) -> None:
    """What a decoder returned, of a clip the first frame, as diffusers makes pictures of it."""
    images = decoded if decoded.ndim == 4 else decoded[:, :, 0]
    PROCESSOR.postprocess(images)[0].save(folder / f"step_{index + 1:03}.png")


def full_vae(model: Model, folder: Path) -> Show:
    """The pipeline's own decoder; of a video for its first latent frame."""

    def show(latents: Tensor, index: int) -> None:
        x = model.to_vae(latents).to(model.place.dtype)
        save(model.pipe.vae.decode(x, return_dict=False)[0], folder, index)

    return show


WAYS: dict[str, Way] = {
    NOTHING: nothing,
    AGAIN: nothing,
    OURS: ours,
    BUDGETED: functools.partial(ours, budget=0.02),
    THEIRS: docs_recipe,
    "synchronous previewer": synchronous,
    TINY: tiny_decoder,
    "full VAE": full_vae,
}
SAME_PNGS: dict[str, Way] = {
    NOTHING: nothing,
    OUR_PNGS: our_pngs,
    THEIR_PNGS: functools.partial(docs_recipe, size=(512, 512)),
}


def published(name: str) -> tuple[list[list[float]], list[float]]:
    """Weights, 3 rows of C, and biases, for levels 0 to 255."""
    file = resources.files("sd_progress").joinpath("data", "published_factors.json")
    row = json.loads(file.read_text(encoding="utf-8"))["tables"][name]
    scale, offset = {"0..255": (1.0, 0.0), "-1..1": (127.5, 127.5)}[row["units"]]
    weights: list[list[float]] = (scale * np.array(row["factors"]).T).tolist()
    return weights, [scale * bias + offset for bias in row["bias"]]


# --- measuring


@dataclass
class Score:
    """What was measured of one way, in all rounds; waiting for CUDA in a run of its own."""

    watch: Watch = field(default_factory=Watch)
    seconds: list[float] = field(default_factory=list)
    peaks_mib: list[float] = field(default_factory=list)
    syncs: int | None = None

    def ratio(self, other: Score) -> str:
        """Of whole runs, round by round: the median, and where that of endless rounds is.

        The interval is between order statistics (95 percent, by the sign test).
        """
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        outside = math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios)))
        shown = f"{median(ratios):.3f}"
        if outside < 1:  # too few rounds to tell
            return shown
        return f"{shown} ({ratios[outside - 1]:.3f} to {ratios[-outside]:.3f})"


def run(model: Model, way: Way, score: Score, folder: Path | None = None) -> None:
    """A whole run, timed; without a folder its files are thrown away."""
    if folder is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            return run(model, way, score, Path(name))
    (width, height), steps = model.size, model.place.steps
    call = {**model.inputs, "width": width, "height": height, "num_inference_steps": steps}
    call["callback_on_step_end"] = watched(way(model, folder), score.watch)
    gc.collect()
    reset_peak(model.place.device)
    began_s = synchronized_s()
    model.pipe(**call, generator=torch.Generator().manual_seed(2))
    score.seconds.append(synchronized_s() - began_s)
    score.peaks_mib += peak_mib(model.place.device)
    return None


def watched(made: Show | WatchedPreview | None, watch: Watch) -> Callable[..., object] | None:
    """A callback for diffusers, with the watch around what was made."""
    if made is None:
        return None
    if isinstance(made, WatchedPreview):
        made.watch = watch
        watch.previews.append(made)
        return made

    def callback(
        pipe: object, index: int, timestep: object, callback_kwargs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        with watch:
            made(callback_kwargs["latents"], index)
        return callback_kwargs

    return callback


def synchronized_s() -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """The peak of memory becomes what is used now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access(RESET, os.W_OK):
        RESET.write_text("5")


def peak_mib(device: torch.device) -> list[float]:
    """What CUDA had handed out, or what was resident of this process; [] where nobody knows."""
    if device.type == "cuda":
        return [torch.cuda.max_memory_allocated() / 2**20]
    if device.type != "cpu" or not os.access(RESET, os.W_OK):
        return []
    status = Path("/proc/self/status").read_text()
    return [int(kib) / 2**10 for kib in re.findall(r"VmHWM:\s+(\d+) kB", status)]


def measured(model: Model, ways: Mapping[str, Way], rounds: int) -> dict[str, Score]:
    """All ways: once unmeasured, then in turns, then to see who waits for CUDA."""
    names, scores = list(ways), {name: Score() for name in ways}
    model.pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(names) * (rounds + 2), leave=False) as bar:

        def told(what: str, first: int = 0) -> Iterator[tuple[Way, Score]]:
            for name in names[first:] + names[:first]:
                bar.set_description(f"{model.name}, {what}: {name}")
                yield ways[name], scores[name]
                bar.update()

        for way, _ in told("warming up"):
            run(model, way, Score())
        for number in range(rounds):
            for way, score in told(f"round {number + 1}", number % len(names)):
                run(model, way, score)
        for way, score in told("waiting"):
            score.syncs = syncs(model, way)
    return scores


def syncs(model: Model, way: Way) -> int | None:
    """How often a run waits for CUDA."""
    if model.place.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(model, way, Score())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in told)


def strict_verdict(model: Model) -> str:
    """What becomes of 30 steps if CUDA raises where our callback waits for it."""
    longer = replace(model, place=replace(model.place, steps=30))
    try:
        run(longer, functools.partial(ours, on_error="raise"), Score(Watch("error")))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "no synchronisation"


def largest_difference(model: Model) -> int:
    """Between the two sides' PNGs of one run, in levels of 0 to 255."""
    pictures = []
    for name in (OUR_PNGS, THEIR_PNGS):
        with tempfile.TemporaryDirectory() as folder:
            run(model, SAME_PNGS[name], Score(), Path(folder))
            paths = sorted(Path(folder).glob("step_*.png"))
            pictures.append(np.stack([np.asarray(Image.open(path), np.int16) for path in paths]))
    return int(np.abs(pictures[0] - pictures[1]).max())


# --- printing


def print_table(scores: Mapping[str, Score], steps: int) -> None:
    """A row for each way."""
    print("| way | ms per step | ratio | ms in callback | syncs per step | extra MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    base = scores[NOTHING]
    for name, score in scores.items():
        whole = f"{1e3 * median(score.seconds) / steps:.1f} | {score.ratio(base)}"
        inside = f"{1e3 * median(score.watch.seconds):.2f}" if score.watch.seconds else "-"
        waits, extra = "-", "-"
        if score.syncs is not None and base.syncs is not None:
            waits = f"{(score.syncs - base.syncs) / steps:.2f}"
        if score.peaks_mib:
            extra = str(round(min(score.peaks_mib) - min(base.peaks_mib)))
        print(f"| {name} | {whole} | {inside} | {waits} | {extra} |")


def print_ours(model: Model, previews: Sequence[PreviewCallback]) -> None:
    """What our callback says of itself over all rounds, and whether it waits for CUDA."""
    stats = [preview.stats for preview in previews]
    frames, steps = sum(x.frames for x in stats), sum(x.steps for x in stats)
    own_ms = 1e3 * sum(x.step_path_s for x in stats) / steps
    worker_ms = 1e3 * sum(x.worker_s for x in stats) / frames
    backlog_kib = max(x.peak_backlog_bytes for x in stats) / 2**10
    print(f"{OURS}: {frames} frames of {steps} steps, {sum(x.dropped for x in stats)} dropped;")
    print(f"  {own_ms:.2f} ms of a step on the run's thread, {worker_ms:.1f} ms of a frame on the")
    print(f"  worker's; at most {backlog_kib:.0f} KiB waiting to be written")
    if model.place.device.type == "cuda":
        print(f'  30 steps under set_sync_debug_mode("error"): {strict_verdict(model)}')


def report(model: Model, wanted: Sequence[str], rounds: int) -> None:
    """Measure and print the ways."""
    width, height = model.size
    print(
        f"\n{model.name}: {width}x{height}, {model.place.steps} steps, {rounds} rounds", flush=True
    )
    skipped = {TINY} if "num_frames" in model.inputs else set()
    ways = {x: WAYS[x] for x in WAYS if x in {NOTHING, AGAIN, *wanted} - skipped}
    scores = measured(model, ways, rounds)
    print_table(scores, model.place.steps)
    for name in skipped.intersection(wanted):
        print(f"| {name} | - | - | - | - | - |")
    if OURS in scores:
        print_ours(model, scores[OURS].watch.previews)


def report_same_pngs(model: Model, rounds: int) -> None:
    """Measure and print both sides at the same pictures."""
    print(f"\n{model.name}, the same PNGs: noisy latents by {model.table}, enlarged", flush=True)
    scores = measured(model, SAME_PNGS, rounds)
    print_table(scores, model.place.steps)
    print(f"whole run, ours to theirs: {scores[OUR_PNGS].ratio(scores[THEIR_PNGS])}")
    print(f"pictures differ by at most {largest_difference(model)} of 255 levels")
    print("  (the recipe cuts off what is behind the point, we round)")


def machine() -> str:
    """What this runs on."""
    info = Path("/proc/cpuinfo")
    named = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts += [(named or [platform.processor()])[0], f"{os.cpu_count()} cores"]
    parts += [f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"]
    return ", ".join([*parts, f"{torch.get_num_threads()} threads"])


def count(text: str) -> int:
    """An argument that is a whole number, 1 or more."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}; pass a whole number")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for; a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--size", choices=("small", "real"), help="default: real on a GPU")
    parser.add_argument("--steps", type=count, help="of a run (default: 30 on a GPU, 10 on a CPU)")
    parser.add_argument("--rounds", type=count, default=7, help="default: 7")
    parser.add_argument("--threads", type=count, help="of torch (default on a CPU: 2)")
    args = parser.parse_args(arguments)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    is_cpu = device.type == "cpu"
    if is_cpu or args.threads:
        torch.set_num_threads(args.threads or 2)
    is_small = is_cpu if args.size is None else args.size == "small"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    place = Place(device, dtype, is_small, args.steps or (10 if is_cpu else 30))
    print(f"{machine()}, {dtype}, {'small' if is_small else 'real'} models")
    for name in args.models:
        gc.collect()  # the model before
        report(MODELS[name](place), args.ways, args.rounds)
    if "sd15" in args.models:
        report_same_pngs(sd15(place), args.rounds)


if __name__ == "__main__":
    main()
