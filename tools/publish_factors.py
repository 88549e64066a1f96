r"""Calibrate the maps that the package carries for well-known VAEs, from the VAEs themselves.

Each VAE is loaded at the newest revision, and a map is fitted on synthetic pictures and scored on
others. It goes to sd_progress/data/NAME-calibrated.safetensors, in the place of an earlier one, and
a table of all that are there, with where each comes from, to docs/calibrated.md. A map that scores
no better than the published row of its family is not kept. A model that fails is told, and the
others go on; the exit code is then 1.

All of them, from the Hub (some have to be agreed to there: `hf auth login` first):

    python tools/publish_factors.py

Two of them, from the Hub; and one of a folder of yours, a pipeline's or that of a VAE alone:

    python tools/publish_factors.py --only sdxl flux2
    python tools/publish_factors.py --only mine=./my-model --out-dir maps --table maps/table.md

The models, each under its NAME:

{models}
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import diffusers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import ModelCardData

from sd_progress import factors
from sd_progress.calibrate_command import Comparison, load_vae
from sd_progress.calibration import calibrate
from sd_progress.factors import Factors
from sd_progress.generate import DTYPES, device_named, one_line

ROOT: Final = Path(__file__).parents[1]
SUFFIX: Final = "-calibrated.safetensors"
NOT_STATED: Final = "not stated"


@dataclass(frozen=True)
class Model:
    """Where one VAE is found.

    Attributes:
        name: of the row, before "-calibrated".
        where: a Hub id, or a folder.
        subfolder: with the VAE; None looks for it.
        family: in vae_families.json, whose published row is compared; None for what is found.
    """

    name: str
    where: str
    subfolder: str | None = None
    family: str | None = None


# One for each class and latent space of vae_families.json. Where models share a VAE's encoder, as
# Stable Diffusion 1 and 2 do, one stands for all: what is found by VAE cannot tell them apart.
MODELS: Final = (
    Model("sd1", "stable-diffusion-v1-5/stable-diffusion-v1-5", "vae", "sd1"),
    Model("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "vae", "sdxl"),
    Model("sd3", "stabilityai/stable-diffusion-3.5-medium", "vae", "sd3"),
    Model("flux", "black-forest-labs/FLUX.1-schnell", "vae", "flux"),
    Model("cogview4", "zai-org/CogView4-6B", "vae", "cogview4"),
    Model("flux2", "black-forest-labs/FLUX.2-klein-4B", "vae", "flux2"),
    Model("wan21", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae", "wan21"),
    Model("qwen_image", "Qwen/Qwen-Image", "vae", "wan21"),
    Model("wan22", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae", "wan22"),
    Model("ltx2", "Lightricks/LTX-2", "vae", "ltx2"),
    Model("minimax_h3", "MiniMaxAI/MiniMax-H3", "vae", "minimax_h3"),
)


@dataclass(frozen=True)
class Origin:
    """Which VAE it was: what of it can be written into the package."""

    model: str
    revision: str
    licence: str

    @classmethod
    def of(cls, model: Model) -> Origin:
        """Of a folder by its card, if it has one; else as the Hub says."""
        folder = Path(model.where)
        if folder.is_dir():
            card = folder / "README.md"
            data = ModelCard.load(card).data if card.is_file() else None
            return cls(folder.resolve().name, "a folder", _licence(data))
        info = HfApi().model_info(model.where)
        return cls(model.where, info.sha or NOT_STATED, _licence(info.card_data))

    @property
    def pinned(self) -> str | None:
        """What to ask the Hub for; None for a folder."""
        return None if self.revision in ("a folder", NOT_STATED) else self.revision


def _licence(card: ModelCardData | None) -> str:
    """The name, where there is one beside "other"."""
    stated = getattr(card, "license_name", None) or getattr(card, "license", None)
    return str(stated or NOT_STATED)


def published(model: Model, args: argparse.Namespace) -> tuple[Factors, float]:
    """A new row for the package, and the decibels of the row that is published already.

    It records no `vae_hash`: like a published row it is for everything that has these latents, in
    half precision as well, and for what was fine-tuned.

    Raises:
        ValueError: it is no better than the published row, or there is no such model.
        RuntimeError: no map could be fitted.
    """
    origin, device = Origin.of(model), device_named(args.device)
    place = {"subfolder": model.subfolder, "revision": origin.pinned}
    vae = load_vae(model.where, DTYPES[args.dtype], **place).to(device)
    made = calibrate(
        vae,
        kernel_size=args.kernel_size,
        upscale=args.upscale,
        images=args.images,
        name=f"{model.name}-calibrated",
        seed=args.seed,
        progress=True,
    )
    row = None if model.family is None else factors.by_name(model.family)
    comparison = Comparison.of(made, vae, args.images, args.seed, row)
    before_db, row = comparison.before.psnr_db, comparison.row
    assert made.psnr_db is not None
    if row is not None and factors.is_published(row) and made.psnr_db <= before_db:
        raise ValueError(
            f"the map must be better than the published row {row.name!r} with {before_db:.1f} dB, "
            f"got {made.psnr_db:.1f} dB; pass a larger --kernel_size"
        )
    details = {
        "model": origin.model,
        "revision": origin.revision,
        "weights": (made.vae_hash or NOT_STATED)[:16],
        "licence of the VAE": origin.licence,
        "before": "none" if row is None else f"{before_db:.1f} dB with {row.name}",
        "diffusers": diffusers.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    told = "; ".join([made.provenance, *(f"{name}: {value}" for name, value in details.items())])
    return replace(made, provenance=told, licence="Apache-2.0", vae_hash=None), before_db


def details_of(row: Factors) -> Mapping[str, str]:
    """What `published` wrote into the provenance."""
    parts = (part.partition(": ") for part in row.provenance.split("; "))
    return {name: value for name, _, value in parts}


def table(rows: Sequence[Factors]) -> str:
    """All rows, with how good they are and where they come from, as Markdown."""
    columns = ("model", "revision", "weights", "licence of the VAE", "before", "diffusers", "date")
    head = ("row", "VAE", "map", "numbers", "held out", "fitted on", *columns)
    lines = [head, ("---",) * len(head)]
    for row in rows:
        details = details_of(row)
        shape = f"{row.kernel_size}x{row.kernel_size} to {row.upscale}x{row.upscale}"
        lines.append(
            (
                row.name,
                "" if row.vae_key is None else row.vae_key.class_name,
                shape,
                str(row.parameters),
                f"{row.psnr_db} dB",
                details.get("sd-progress calibrate", ""),
                *(details.get(name, "") for name in columns),
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def chosen(only: Sequence[str] | None) -> list[Model]:
    """The models that are asked for: all, or each `NAME` or `NAME=MODEL`.

    Raises:
        ValueError: there is no such name.
    """
    known = {model.name: model for model in MODELS}
    models = []
    for text in known if only is None else only:
        name, _, where = text.partition("=")
        if not name or not (where or name in known):
            names = ", ".join(known)
            raise ValueError(f"--only must be NAME=FOLDER, or one of {names}; got {text!r}")
        model = known.get(name, Model(name, where))
        models.append(replace(model, where=where, subfolder=None) if where else model)
    return models


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the rows and the table, and say how it went.

    Returns:
        The exit code: 0, 1 where a model failed.
    """
    models = "\n".join(f"    {model.name:<12} {model.where}" for model in MODELS)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(models=models),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME[=FOLDER]", help="these alone (default: all)")
    add("--kernel_size", type=int, default=5, metavar="K", help="latents a side (default: 5)")
    add("--upscale", type=int, default=2, metavar="S", help="pixels a side per latent (default: 2)")
    add("--images", type=Path, metavar="DIR", help="to fit on (default: synthetic pictures)")
    add("--seed", type=int, default=0, help="of the synthetic pictures (default: 0)")
    add("--device", default="auto", help="(default: auto, the fastest there is)")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="of the VAE (default: fp32)")
    data = ROOT / "sd_progress" / "data"
    add("--out-dir", type=Path, default=data, metavar="DIR", help="(default: in the package)")
    page = ROOT / "docs" / "calibrated.md"
    add("--table", type=Path, default=page, metavar="FILE.md", help="(default: docs/calibrated.md)")
    args = parser.parse_args(arguments)
    try:
        models_asked = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, model in enumerate(models_asked, 1):
        print(f"[{number}/{len(models_asked)}] {model.name}: {model.where}", flush=True)
        began_s = time.monotonic()
        try:
            row, before_db = published(model, args)
            path = args.out_dir / f"{model.name}{SUFFIX}"
            factors.save(row, path)
        except Exception as error:  # whatever is wrong with one, the others are not to suffer
            failed.append(model.name)
            print(f"  failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
            continue
        took_s = time.monotonic() - began_s
        print(f"  {row.psnr_db} dB, before {before_db:.1f} dB, {took_s:.0f} s: {path}", flush=True)
    rows = [factors.load(path) for path in sorted(args.out_dir.glob(f"*{SUFFIX}"))]
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(f"{table(rows)}\n", encoding="utf-8")
    print(f"{args.table}: {len(rows)} rows" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
