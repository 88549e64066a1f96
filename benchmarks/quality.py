r"""How good each way from latents to RGB is, and what it costs: affine, powers, a network, the VAE.

Each picture is encoded once by the VAE; each way decodes the latents; what it draws is compared
with the picture. Two fits are measured: on synthetic pictures alone, as `calibrate` makes them,
and, with `--split N`, on the first N of the pictures, scored on the others.

PSNR (dB, more is better), SSIM (more is better) and CIEDE2000 (difference of colours as the eye
sees it, less is better) are means over pictures:

  own    against the picture, area-averaged to the way's own resolution
  full   against the picture itself; what is smaller is enlarged bicubically
  small  at one pixel per latent, where all ways can be compared; larger ones are area-averaged

"perfect, small" is the picture area-averaged to one pixel per latent: about as good, at full size,
as a way can be that draws one pixel per latent. k is how many latents a side go into a pixel,
s how many pixels a side are drawn for a latent, 1 where it is not told.

The package's demo model, on landscapes that it was not trained on:

    python benchmarks/quality.py --split 45 --out demo

Another VAE of diffusers, a folder or a Hub id, by itself or in the subfolder `vae` of a pipeline,
on your photographs, with its published rows and its tiny autoencoder beside it:

    python benchmarks/quality.py --vae black-forest-labs/FLUX.1-schnell --images PHOTOS \
        --split 45 --published flux invoke/FLUX --tiny madebyollin/taef1 --out flux1

The tiny autoencoder of FLUX.2's latents, from github.com/madebyollin/taesd, with a grid of pictures
that may be shown where the photographs may not:

    python benchmarks/quality.py --vae TAEF2 --published flux2 sdcpp/Flux2 --images PHOTOS \
        --split 45 --grid made --out flux2

Tables are printed, as Markdown; `--out PREFIX` writes PREFIX-plot.png and PREFIX-grid.png. The maps
in the grid are those of the synthetic pictures, which is what `calibrate` gives by itself.
Needs `pip install "sd-progress[quality]"`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Final

import numpy as np
import torch
from diffusers import AutoModel
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from tqdm.auto import tqdm

from sd_progress import demo_model_path, factors
from sd_progress.calibration import calibrate, picture_files
from sd_progress.decoders import LinearDecoder
from sd_progress.factors import Factors, describe_vae
from sd_progress.pixels import to_uint8
from sd_progress.synthetic import dead_leaves
from sd_progress.vae import VaeDecoder, VaeEncoder

Picture = NDArray[np.uint8]  # (H, W, 3)
Floats = NDArray[np.float32]  # (H, W, 3) in [0, 1]

FITS: Final[dict[str, dict[str, int]]] = {
    "affine, k=1": {"kernel_size": 1},
    "affine, k=3": {"kernel_size": 3},
    "affine, k=5": {"kernel_size": 5},
    "affine, k=5, s=2": {"kernel_size": 5, "upscale": 2},
    "affine, k=5, s=8": {"kernel_size": 5, "upscale": 8},
    "quadratic, k=1": {"kernel_size": 1, "degree": 2},
    "quadratic, k=5": {"kernel_size": 5, "degree": 2},
    "cubic, k=1": {"kernel_size": 1, "degree": 3},
    "cubic, k=5": {"kernel_size": 5, "degree": 3},
    "MLP 64, k=1": {"kernel_size": 1, "hidden_units": 64},
    "MLP 64, k=5": {"kernel_size": 5, "hidden_units": 64},
}
PERFECT: Final = "perfect, small"
COLOURS: Final = {
    "row": "tab:gray",
    "affine": "tab:blue",
    "quadratic": "tab:orange",
    "cubic": "tab:red",
    "MLP": "tab:purple",
    "tiny": "tab:green",
    "VAE": "black",
    PERFECT: "tab:gray",
}
IN_GRID: Final = (
    *("affine, k=1", "affine, k=3", "affine, k=5", "affine, k=5, s=2", "affine, k=5, s=8"),
    *("quadratic, k=1", "cubic, k=1", "MLP 64, k=5"),
)
LARGEST_SIDE_PX: Final = 512  # larger pictures are reduced, as `calibrate` does
FIRST_SEED: Final = 2_000_000  # of scenes and leaves that nothing was trained or fitted on
GRID_ROWS: Final = 4


# --- what is measured


@dataclass(frozen=True)
class Example:
    """One picture, cut to whole latents, and its latents (1, C, h, w)."""

    picture: Picture
    latents: Tensor

    @property
    def ratio(self) -> int:
        """Pixels a side per latent."""
        return self.picture.shape[0] // self.latents.shape[-2]


@dataclass(frozen=True)
class Likeness:
    """How near one drawn picture comes to what it should be."""

    psnr_db: float
    ssim: float
    ciede2000: float


@dataclass(frozen=True)
class Marks:
    """What one way gets for one picture."""

    own: Likeness
    full: Likeness
    small_psnr_db: float


@dataclass(frozen=True)
class Way:
    """One way from latents to a picture.

    Attributes:
        name: for tables and plots.
        draw: (1, C, h, w) to (h * s, w * s, 3).
        parameters: how many numbers it has.
        fit_s: what fitting took, encoding included; None where nothing was fitted here.
    """

    name: str
    draw: Callable[[Tensor], Picture]
    parameters: int
    fit_s: float | None = None


@dataclass(frozen=True)
class Result:
    """What came of one way: marks for each picture, and the median milliseconds of a frame."""

    way: Way
    marks: Sequence[Marks]
    ms: float

    def of_last(self, count: int) -> Result:
        """The same for the last pictures only."""
        return replace(self, marks=self.marks[-count:])

    @property
    def own(self) -> Likeness:
        """Mean over pictures."""
        return mean_of([marks.own for marks in self.marks])

    @property
    def full(self) -> Likeness:
        """Mean over pictures."""
        return mean_of([marks.full for marks in self.marks])

    @property
    def small_psnr_db(self) -> float:
        """Mean over pictures."""
        return fmean(marks.small_psnr_db for marks in self.marks)


def mean_of(all_of_them: Sequence[Likeness]) -> Likeness:
    """Of each measure by itself."""
    names = [field.name for field in fields(Likeness)]
    return Likeness(*(fmean(getattr(one, name) for one in all_of_them) for name in names))


# --- the autoencoders


class Taef2(nn.Module):
    """The TAESD project's tiny autoencoder for FLUX.2's latents: pictures in [-1, 1], MIT licence.

    Args:
        folder: with `taef2_encoder.pth` and `taef2_decoder.pth`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=32, scaling_factor=1.0)
        self.encoder, self.decoder = taef2_encoder(), taef2_decoder()
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            state = torch.load(folder / f"taef2_{name}.pth", map_location="cpu", weights_only=True)
            part.load_state_dict(state)

    def encode(self, images: Tensor) -> SimpleNamespace:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 32, H / 8, W / 8), without FLUX.2's statistics."""
        return SimpleNamespace(latents=self.encoder(images / 2 + 0.5))

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """(B, 32, h, w) -> (B, 3, 8 * h, 8 * w), nominally [-1, 1]."""
        return (self.decoder(latents) * 2 - 1,)


class Block(nn.Module):
    """Three convolutions beside a shortcut; with a pool, more channels come in first."""

    def __init__(self, *, has_pool: bool = False, channels: int = 64) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.pool = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.GroupNorm(4, 4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )
        if not has_pool:
            self.pool = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w), the same out."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Latents to within three of zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return torch.tanh(x / 3) * 3


def taef2_encoder() -> nn.Sequential:
    """Pictures in [0, 1] -> latents."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), Block()]
    for stage in range(3):
        layers.append(nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False))
        layers += [Block(has_pool=stage == 2) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(64, 32, 3, padding=1))


def taef2_decoder() -> nn.Sequential:
    """Latents -> pictures in [0, 1]."""
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    layers += [Block(has_pool=True) for _ in range(3)]
    for stage in range(3):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
        layers += [Block() for _ in range(3 if stage < 2 else 1)]
    return nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))


def load_vae(where: str) -> nn.Module:
    """An autoencoder of diffusers, alone or in the subfolder `vae`, or a folder with taef2's files.

    Args:
        where: a folder or a Hub id.

    Raises:
        TypeError: it is one of videos.
    """
    folder = Path(where)
    if (folder / "taef2_encoder.pth").exists():
        vae: nn.Module = Taef2(folder)
    elif (folder / "config.json").exists():
        vae = AutoModel.from_pretrained(where)
    else:
        try:
            vae = AutoModel.from_pretrained(where, subfolder="vae")
        except OSError:  # the repository of a VAE alone
            vae = AutoModel.from_pretrained(where)
    if VaeEncoder(vae).takes_video:
        raise TypeError(
            f"--vae must be an autoencoder of pictures, got {type(vae).__name__}; "
            "those of videos are not measured here"
        )
    return vae.eval()


def drawn_scenes(count: int) -> list[Image.Image]:
    """Landscapes of the kind that the demo model paints, which it was not trained on."""
    sys.path.append(str(Path(__file__).parents[1] / "tools"))
    from demo_scenes import draw, random_scene

    return [draw(random_scene(FIRST_SEED + number)) for number in range(count)]


def opened(source: Path | Image.Image) -> Image.Image:
    """RGB, reduced where it is large."""
    picture = (Image.open(source) if isinstance(source, Path) else source).convert("RGB")
    picture.thumbnail((LARGEST_SIDE_PX, LARGEST_SIDE_PX), Image.Resampling.BOX)
    return picture


def encoded(vae: nn.Module, sources: Sequence[Path | Image.Image]) -> list[Example]:
    """Each picture and its latents, cut to what whole latents cover."""
    encoder = VaeEncoder(vae)
    ratio = 128 // encoder.encode(torch.zeros(1, 3, 128, 128)).shape[-1]
    examples = []
    for source in tqdm(sources, "encode", unit="picture", leave=False):
        pixels = np.asarray(opened(source))
        height, width = (side // ratio * ratio for side in pixels.shape[:2])
        picture = pixels[:height, :width]
        images = torch.from_numpy(picture.copy()).movedim(-1, 0)[None] / 127.5 - 1
        examples.append(Example(picture, encoder.encode(images).cpu()))
    return examples


# --- the ways


def by_factors(name: str, found: Factors, fit_s: float | None = None) -> Way:
    """A map, as previews use it."""
    decoder = LinearDecoder(found)
    return Way(name, lambda latents: decoder.decode(latents)[0], found.parameters, fit_s)


def by_vae(name: str, vae: nn.Module) -> Way:
    """A whole VAE."""
    decoder = VaeDecoder(vae)
    parts = [getattr(vae, part, None) for part in ("decoder", "post_quant_conv")]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    return Way(name, lambda latents: decoder.decode(latents)[0], parameters)


def by_tiny(tiny: nn.Module, vae: nn.Module) -> Way:
    """A distilled decoder of the same latents; those of diffusers take them in sampler space."""
    way, key = by_vae("tiny decoder", tiny), describe_vae(vae)
    if describe_vae(tiny).class_name not in factors.SAMPLER_SPACE_CLASSES:
        return way
    if key.latents_mean is not None:
        raise ValueError(
            f"--tiny must be given for a VAE without latents_mean, got {key}; leave it out"
        )
    scale, shift = key.scaling_factor, key.shift_factor
    return Way(way.name, lambda latents: way.draw((latents - shift) * scale), way.parameters)


def by_rows(vae: nn.Module, named: Sequence[str]) -> list[Way]:
    """The maps that the package carries: the one that it finds for the VAE, and those named.

    Raises:
        ValueError: one has another number of channels.
    """
    found = factors.find(vae)
    rows = {} if found is None else {found.name: found}
    rows.update({name: factors.by_name(name, vae) for name in named})
    channels = describe_vae(vae).latent_channels
    for name, row in rows.items():
        if row.latent_channels != channels:
            raise ValueError(
                f"--published must have {channels} latent channels, got {name!r} with "
                f"{row.latent_channels}; name rows for this VAE"
            )
    return [by_factors(f"row {name}", row) for name, row in rows.items()]


def fitted(vae: nn.Module, ratio: int, images: Sequence[Path | Image.Image] | None) -> list[Way]:
    """All fits, on these pictures or, for None, on synthetic ones; bad ones, too."""
    wanted = {name: one for name, one in FITS.items() if one.get("upscale", 1) <= ratio}
    ways = []
    for name, options in (bar := tqdm(wanted.items(), "fit", leave=False)):
        bar.set_postfix_str(name)
        began_s = time.perf_counter()
        found = calibrate(vae, images=images, least_gain_db=-math.inf, **options)
        ways.append(by_factors(name, found, time.perf_counter() - began_s))
    return ways


# --- scoring


def averaged(picture: Picture, height: int, width: int) -> Floats:
    """In [0, 1], area-averaged to a size that divides the picture's."""
    rows, columns = picture.shape[0] // height, picture.shape[1] // width
    cells = picture.reshape(height, rows, width, columns, 3)
    return np.asarray(cells.mean(axis=(1, 3)) / 255, np.float32)


def enlarged(picture: Picture, height: int, width: int) -> Picture:
    """Bicubically, as a viewer would do it."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def psnr_db(drawn: Floats, wanted: Floats) -> float:
    """Both in [0, 1]."""
    return float(-10 * np.log10(max(np.square(drawn - wanted).mean(), 1e-10)))


def compared(drawn: Floats, wanted: Floats) -> Likeness:
    """Both in [0, 1]."""
    ssim = structural_similarity(drawn, wanted, channel_axis=-1, data_range=1.0)
    colour = deltaE_ciede2000(rgb2lab(drawn), rgb2lab(wanted)).mean()
    return Likeness(psnr_db(drawn, wanted), float(ssim), float(colour))


def marked(drawn: Picture, example: Example) -> Marks:
    """What is drawn from an example's latents, against its picture."""
    height, width = example.picture.shape[:2]
    small_height, small_width = example.latents.shape[-2:]
    wanted = averaged(example.picture, height, width)
    at_full = enlarged(drawn, height, width).astype(np.float32) / 255
    full = compared(at_full, wanted)
    own = full
    if drawn.shape != example.picture.shape:
        own = compared(drawn.astype(np.float32) / 255, averaged(example.picture, *drawn.shape[:2]))
    small = averaged(drawn, small_height, small_width)
    return Marks(own, full, psnr_db(small, averaged(example.picture, small_height, small_width)))


def measured(ways: Sequence[Way], examples: Sequence[Example], decodes: int) -> list[Result]:
    """Let each way draw each picture, and time it on the first."""
    results = []
    for way in (bar := tqdm(ways, "score", leave=False)):
        bar.set_postfix_str(way.name)
        marks = [marked(way.draw(example.latents), example) for example in examples]
        results.append(Result(way, marks, timed_ms(way, examples[0].latents, decodes)))
    return results


def timed_ms(way: Way, latents: Tensor, decodes: int) -> float:
    """Median of a frame's milliseconds, after one that does not count."""
    seconds = []
    for _ in range(decodes + 1):
        began_s = time.perf_counter()
        way.draw(latents)
        seconds.append(time.perf_counter() - began_s)
    return 1e3 * median(seconds[1:])


def perfect(examples: Sequence[Example]) -> Result:
    """The pictures themselves at one pixel per latent: a yardstick, no decoder."""
    marks = []
    for example in examples:
        small = averaged(example.picture, *example.latents.shape[-2:])
        marks.append(marked((small * 255).round().astype(np.uint8), example))
    return Result(Way(PERFECT, lambda latents: np.zeros((0, 0, 3), np.uint8), 0), marks, math.nan)


# --- printing and drawing


def print_table(results: Sequence[Result]) -> None:
    """A row for each way."""
    print(
        "| way | own PSNR | SSIM | CIEDE2000 | full PSNR | SSIM | CIEDE2000 | small PSNR ", end=""
    )
    print("| parameters | ms | fit s |")
    print("|---" + "|---:" * 10 + "|")
    for result in results:
        cells = [result.way.name, *cells_of(result.own), *cells_of(result.full)]
        cells += [f"{result.small_psnr_db:.2f}", f"{result.way.parameters:,}"]
        cells += [
            f"{result.ms:.2f}",
            "-" if result.way.fit_s is None else f"{result.way.fit_s:.0f}",
        ]
        if result.way.name == PERFECT:
            cells = [PERFECT, "-", "-", "-", *cells_of(result.full), "-", "-", "-", "-"]
        print("| " + " | ".join(cells) + " |")


def cells_of(likeness: Likeness) -> list[str]:
    """For a table."""
    return [f"{likeness.psnr_db:.2f}", f"{likeness.ssim:.3f}", f"{likeness.ciede2000:.2f}"]


def print_both(synthetic: Sequence[Result], split: Sequence[Result]) -> None:
    """What is won where the fit has seen pictures of the same kind."""
    print("| way | small PSNR, synthetic | small PSNR, pictures | gain |")
    print("|---|---:|---:|---:|")
    for one, other in zip(synthetic, split, strict=True):
        before_db, after_db = one.small_psnr_db, other.small_psnr_db
        print(f"| {one.way.name} | {before_db:.2f} | {after_db:.2f} | {after_db - before_db:.2f} |")


def colour_of(name: str) -> str:
    """By kind of way."""
    return next(colour for start, colour in COLOURS.items() if name.startswith(start))


def plot(path: str, title: str, series: dict[str, Sequence[Result]]) -> None:
    """Write one line for each way: how good, at both sizes, and what a frame costs.

    Args:
        path: of the PNG.
        title: above it.
        series: for each fit, all ways, the same ones in the same order; the last one is filled.
    """
    names = [result.way.name for result in next(iter(series.values()))]
    figure, axes = pyplot.subplots(
        1, 3, figsize=(12, 0.6 + 0.36 * len(names)), sharey=True, layout="constrained"
    )
    figure.suptitle(title)
    for number, (label, results) in enumerate(series.items()):
        is_last = number == len(series) - 1
        for row, result in enumerate(results):
            colour = colour_of(result.way.name)
            style = {"color": colour, "markerfacecolor": colour if is_last else "white"}
            small, full = axes[0], axes[1]
            if result.way.name != PERFECT:
                small.plot(result.small_psnr_db, row, "o", zorder=2 + number, **style)
                if is_last:
                    cost(axes[2], row, result)
            full.plot(result.full.psnr_db, row, "o", zorder=2 + number, **style)
        marker = {"color": "black", "markerfacecolor": "black" if is_last else "white"}
        if len(series) > 1:
            axes[0].plot([], [], "o", label=label, **marker)
    axes[0].set_title("at one pixel per latent, PSNR in dB")
    axes[1].set_title("at full size, PSNR in dB")
    axes[2].set_title("milliseconds per frame")
    axes[2].set_xscale("log")
    axes[2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[2].margins(x=0.15)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def cost(axes: Axes, row: int, result: Result) -> None:
    """A bar with its number."""
    axes.barh(row, result.ms, color=colour_of(result.way.name), height=0.55)
    digits = 2 if result.ms < 10 else 0
    axes.annotate(
        f"{result.ms:.{digits}f}",
        (result.ms, row),
        (4, 0),
        textcoords="offset points",
        va="center",
    )


def grid(path: str, ways: Sequence[Way], examples: Sequence[Example]) -> None:
    """Write a row for each picture, and a column for each way, all at the picture's size."""
    columns = len(ways) + 1
    ratios = [example.picture.shape[0] / example.picture.shape[1] for example in examples]
    figure, axes = pyplot.subplots(
        len(examples),
        columns,
        figsize=(1.6 * columns, 1.6 * sum(ratios) + 0.3),
        height_ratios=ratios,
        squeeze=False,
        layout="constrained",
    )
    for row, example in zip(axes, examples, strict=True):
        height, width = example.picture.shape[:2]
        drawn = [enlarged(way.draw(example.latents), height, width) for way in ways]
        for axis, picture in zip(row, [example.picture, *drawn], strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, name in zip(axes[0], ["picture", *(way.name for way in ways)], strict=True):
        axis.set_title(name.replace(", ", "\n", 1), fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def made_pictures() -> list[Image.Image]:
    """Half of them fallen leaves, half of them landscapes; free to be shown."""
    leaves = dead_leaves(2, 256, torch.Generator().manual_seed(FIRST_SEED))
    scenes = [scene.resize((256, 256), Image.Resampling.LANCZOS) for scene in drawn_scenes(2)]
    return [*map(Image.fromarray, to_uint8(leaves)), *scenes]


def machine() -> str:
    """What this runs on."""
    info = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    processor = (found or [platform.processor()])[0]
    threads = torch.get_num_threads()
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}, {threads} threads"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, print tables, write pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vae", default=str(demo_model_path()), help="folder or Hub id (default: the demo's)")
    add("--images", help="a folder of pictures to score on (default: drawn landscapes)")
    add("--scenes", type=int, default=60, help="how many landscapes are drawn (default: 60)")
    add("--split", type=int, help="fit also on so many of them, and score on the others")
    add("--published", nargs="+", default=[], metavar="NAME", help="rows of sd_progress.factors")
    add("--tiny", help="folder or Hub id of a distilled decoder of the same latents")
    add("--decodes", type=int, default=21, help="that are timed for each way (default: 21)")
    add("--threads", type=int, default=2, help="of torch (default: 2)")
    add("--grid", choices=("held-out", "made"), default="held-out", help="pictures in the grid")
    add("--out", metavar="PREFIX", help="of the plot and the grid; left out, none are drawn")
    args = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    vae = load_vae(args.vae)
    sources: list[Path] | list[Image.Image] = (
        picture_files(args.images) if args.images else drawn_scenes(args.scenes)
    )
    if args.split is not None and not 4 <= args.split < len(sources):
        parser.error(f"--split must be 4 to {len(sources) - 1}, got {args.split}")
    examples = encoded(vae, sources)
    held_out = examples[args.split or 0 :]
    tiny = [by_tiny(load_vae(args.tiny), vae)] if args.tiny else []
    rows, ends = by_rows(vae, args.published), [*tiny, by_vae("VAE", vae)]
    height, width = examples[0].picture.shape[:2]
    print(f"{machine()}", flush=True)
    print(f"{describe_vae(vae)}; ms are those of a picture of {width}x{height}\n")

    before = measured(rows, examples, args.decodes)
    after = [perfect(examples), *measured(ends, examples, args.decodes)]
    from_synthetic = fitted(vae, examples[0].ratio, None)
    synthetic = [*before, *measured(from_synthetic, examples, args.decodes), *after]
    print(f"Fitted on synthetic pictures, scored on {len(examples)} pictures:\n")
    print_table(synthetic)
    series = {"fitted on synthetic pictures": synthetic}
    if args.split is not None:
        count = len(held_out)
        before, synthetic, after = (
            [result.of_last(count) for result in results] for results in (before, synthetic, after)
        )
        from_pictures = fitted(vae, examples[0].ratio, sources[: args.split])
        split = [*before, *measured(from_pictures, held_out, args.decodes), *after]
        print(f"\nFitted on {args.split} pictures, scored on {count} others:\n")
        print_table(split)
        print(f"\nBoth fits on these {count} pictures:\n")
        middle = slice(len(before), len(before) + len(from_pictures))
        print_both(synthetic[middle], split[middle])
        series = {"fitted on synthetic pictures": synthetic, f"on {args.split} pictures": split}
    if args.out:
        plot(f"{args.out}-plot.png", f"{type(vae).__name__}, {len(held_out)} pictures", series)
        shown = held_out[:: math.ceil(len(held_out) / GRID_ROWS)]
        if args.grid == "made":
            shown = encoded(vae, made_pictures())
        chosen = [way for way in from_synthetic if way.name in IN_GRID]
        grid(f"{args.out}-grid.png", [*rows, *chosen, *ends], shown)


if __name__ == "__main__":
    main()
