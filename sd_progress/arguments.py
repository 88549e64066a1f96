"""Owns the preview flags that any script can take over, `--write_intermediates` and its kin."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from .frame import Source

if TYPE_CHECKING:
    from .callback import PreviewCallback
    from .tap import Pipeline

_ANIMATIONS: Final = ".gif, .webp, .png (animated) or .mp4"


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says in one line why."""


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a script the preview flags, in a group of their own in its `--help`.

    They are `--write_intermediates DIR`, `--preview_gif PATH`, `--preview_terminal`,
    `--preview_every N`, `--preview_vae_every N`, `--preview_source`, `--preview_decoder NAME` and
    `--preview_budget SHARE`; dashes work as well as underscores. `preview_from_args` makes a
    callback of what the user asked for.

    Args:
        parser: gets one more argument group. Call `parser.set_defaults(preview_gif="run.gif")`
            or the like afterwards to have previews without asking for them.
    """
    group = parser.add_argument_group(
        "previews", "watch the picture come into being; the result is the same with and without"
    )
    group.add_argument(
        *spellings("write_intermediates"),
        type=Path,
        metavar="DIR",
        help="write a PNG of every step into this folder; it is made if it is not there",
    )
    group.add_argument(
        *spellings("preview_gif"),
        type=_animation,
        metavar="PATH",
        help=f"write the steps as one animation, by suffix {_ANIMATIONS}",
    )
    group.add_argument(
        *spellings("preview_terminal"),
        action="store_true",
        default=False,
        help="show the newest step in the terminal, in place (default: %(default)s)",
    )
    group.add_argument(
        "--no-preview_terminal",
        *spellings("no_preview_terminal"),
        action="store_false",
        dest="preview_terminal",
        help="do not",
    )
    group.add_argument(
        *spellings("preview_every"),
        type=whole_number("preview_every", 1, "1 shows every step"),
        default=1,
        metavar="N",
        help="show every Nth step, and the last one in any case (default: %(default)s)",
    )
    group.add_argument(
        *spellings("preview_vae_every"),
        type=whole_number("preview_vae_every", 1, "leave it out to have none"),
        metavar="N",
        help="decode every Nth preview with the model's own VAE: sharp and in full size, but "
        "slow; all others are quick approximations (default: none)",
    )
    group.add_argument(
        *spellings("preview_source"),
        choices=[source for source in get_args(Source) if source != "final"],
        default="denoised",
        help="denoised: what the model expects the picture to become; noisy: what it works on; "
        "both: side by side (default: %(default)s)",
    )
    group.add_argument(
        *spellings("preview_decoder"),
        default="auto",
        metavar="NAME",
        help="what turns latents into colours: auto finds or fits a map for the model's VAE; or "
        "the name or the .safetensors file of a map, tiny:ID_OR_FOLDER of a distilled decoder, "
        "pca, or channels, which shows each latent channel in grey (default: %(default)s)",
    )
    group.add_argument(
        *spellings("preview_budget"),
        type=_share,
        metavar="SHARE",
        help="show fewer steps where all would cost more than this share of the run, for example "
        "0.02 (default: no limit)",
    )


def preview_from_args(pipe: Pipeline, args: argparse.Namespace) -> PreviewCallback | None:
    """The callback that the flags ask for, to pass as `callback_on_step_end`.

    Args:
        pipe: the pipeline that is going to run.
        args: from a parser that went through `add_preview_arguments`.

    Returns:
        None when none of `--write_intermediates`, `--preview_gif` and `--preview_terminal` was
        given, which pipelines understand as no callback.

    Raises:
        ModuleNotFoundError: `--preview_terminal` without the `terminal` extra.
    """
    if args.write_intermediates is None and args.preview_gif is None and not args.preview_terminal:
        return None
    from .callback import PreviewCallback
    from .writers import AnimationWriter, PngFolderWriter

    pngs = [] if args.write_intermediates is None else [PngFolderWriter(args.write_intermediates)]
    gifs = [] if args.preview_gif is None else [AnimationWriter(args.preview_gif)]
    return PreviewCallback(
        pipe,
        *pngs,
        *gifs,
        *(["terminal"] if args.preview_terminal else []),
        every=args.preview_every,
        vae_every=args.preview_vae_every,
        source=args.preview_source,
        decoder=args.preview_decoder,
        budget=args.preview_budget,
    )


def spellings(name: str) -> tuple[str, ...]:
    """A flag's option strings, underscores (the flag's `dest`) before dashes, each once."""
    return tuple(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def whole_number(name: str, least: int, advice: str) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on, in 64 bits; `advice` ends its message."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            expected = f"--{name} must be a whole number from {least} on"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}; {advice}")
        return value

    return parsed


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        expected = "--preview_budget must be a number above 0 and up to 1"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}; 0.02 is two percent")
    return value


def _animation(text: str) -> Path:
    from .writers import AnimationWriter

    try:
        AnimationWriter(text)  # does nothing but check the path
    except ModuleNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        expected = f"--preview_gif must be a path ending in {_ANIMATIONS}"
        advice = "for PNGs in a folder use --write_intermediates"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}; {advice}") from None
    return Path(text)
