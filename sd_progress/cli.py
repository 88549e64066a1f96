"""Owns the `sd-progress` command: what can be typed. What is then done is in other modules."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final, NoReturn, TextIO

from .arguments import UsageError, add_preview_arguments, spellings, whole_number
from .demo import DEMO_GUIDANCE, DEMO_PROMPT, demo_model_path
from .schedulers import SHORT_NAMES

_EXAMPLES: Final = """\
examples:
  sd-progress demo
  sd-progress demo "a house in a meadow at night with a full moon" --seed 3
  sd-progress demo --preview_gif dusk.webp --preview_source both
  sd-progress run --model owner/name --prompt "a lighthouse in a storm" --steps 30
  sd-progress run --model ./my-model --prompt "a red fox" --scheduler euler_a --size 768x512
  sd-progress models
  sd-progress models flux
  sd-progress calibrate --model owner/name --out name.safetensors
  sd-progress vae roundtrip photo.jpg
  sd-progress explore
  sd-progress serve
  sd-progress worker --redis redis://127.0.0.1

`sd-progress demo --help` explains every flag, and so do the other commands' own.
"""
_MODELS: Final = """\
Which pipelines of diffusers are shown, of what, and how a preview is attached to them.

The name of a pipeline is that of its class. To find it:

  pipe = DiffusionPipeline.from_pretrained("owner/name")
  print(type(pipe).__name__)

Each list of names is headed by how a preview is attached, and in brackets what else is to be known:

  callback         preview = PreviewCallback(pipe, "steps/")
                   pipe(..., callback_on_step_end=preview)
  legacy callback  preview = PreviewCallback(pipe, "steps/")
                   pipe(..., callback=preview)
  with block only  with PreviewCallback(pipe, "steps/"):
                       pipe(...)

Frames show what the model expects the picture to become, unless the brackets say noisy.
"""
_MODELS_MORE: Final = (
    "`sd-progress models NAME` tells all about one; `sd-progress models --help` how to read this."
)
_MODELS_EXAMPLES: Final = """\
examples:
  sd-progress models               all that diffusers has not deprecated
  sd-progress models --all         those as well
  sd-progress models FluxPipeline  all about one, and how to attach it
  sd-progress models wan           all about those with "wan" in their name
"""
_CALIBRATE: Final = """\
Fit the map that turns a model's latents into the colours of its previews.

A callback does this by itself where it is quick, or where nothing is known of the model's VAE. Here
it is done once, with care, and kept in a file:

  sd-progress calibrate --model owner/name --out name.safetensors
  PreviewCallback(pipe, "steps/", decoder="name.safetensors")

Only the VAE is loaded. It encodes pictures, and what leads from the latents back to the pictures is
solved for. A quarter of the pictures is held out, for the score that is printed, and for a picture
beside the file: what was shown before, what is shown now, and what the VAE itself shows.
"""
_CALIBRATE_EXAMPLES: Final = """\
examples:
  sd-progress calibrate --model owner/name --out name.safetensors
  sd-progress calibrate --model ./my-vae --images photos/ --upscale 2 --out my-vae.safetensors
  sd-progress calibrate --model owner/name --kernel_size 1 --degree 2 --out small.safetensors

on four GPUs, each with its share of the pictures:
  torchrun --nproc_per_node 4 -m sd_progress calibrate --model owner/name --images photos/ \\
      --out name.safetensors

Some hundred pictures like those that the model makes are best; the synthetic ones come a few
decibels short of that. Pictures larger than 512 pixels are reduced.
"""
_SERVE: Final = """\
Paint for others: a page to watch pictures form, and the OpenAI images API with partial images.

Runs wait in line for one model, which paints them one after the other in this process. Open the
address that is printed, or ask as any client of the OpenAI API does:

  client = OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="none")
  client.images.generate(prompt="the sea at sunset", stream=True, partial_images=3, model="any")

Only this machine can ask, unless --host says otherwise; then a token must be sent along.
docs/server.md tells of events, limits and metrics.

With --redis, the jobs go to workers on any number of machines (`sd-progress worker`), and any
number of these web servers share them; docs/scaling.md tells how.
"""
_SERVE_EXAMPLES: Final = """\
examples:
  sd-progress serve
  sd-progress serve --model owner/name --device cuda --max_pixels 4194304
  SD_PROGRESS_TOKEN=... sd-progress serve --host 0.0.0.0
  sd-progress serve --redis redis://127.0.0.1
"""
_WORKER: Final = """\
Paint the jobs of a fleet: of all that is asked for at any `sd-progress serve` of the same Redis.

Start one for each GPU, on any machine. A job whose worker dies is begun anew by another. SIGTERM
and Ctrl-C let a job that is begun come to its end for --grace_s seconds, then give it back to the
others; a second signal gives it back at once. docs/scaling.md tells more.
"""
_WORKER_EXAMPLES: Final = """\
examples:
  sd-progress worker --redis redis://127.0.0.1
  sd-progress worker --redis rediss://user:password@host:6380/0 --model owner/name --device cuda:1
  SD_PROGRESS_REDIS=redis+sentinel://host,host-2/main sd-progress worker --model ./my-model
"""
_VAE: Final = """\
Look into a model's VAE: what it keeps of a picture, what its latents mean, what is wrong with it.

A diffusion model paints latents: an eighth of the picture's width and height, and a few channels.
The VAE encodes pictures as latents and decodes latents as pictures. These commands take the VAE of
any model of diffusers (of images, of video, of tokens; the demo model where none is named), and
leave pictures in a folder and numbers on the screen. docs/lab.md shows them all, and what to learn
from them.
"""
_VAE_EXAMPLES: Final = """\
examples:
  sd-progress vae roundtrip photo.jpg --model owner/name
  sd-progress vae roundtrip --latents latents.safetensors --space sampler --model owner/name
  sd-progress vae channels photo.jpg
  sd-progress vae factors --model owner/name
  sd-progress vae pca photos/*.jpg --components 3
  sd-progress vae interpolate morning.png evening.png --format .webp
  sd-progress vae walk photo.jpg --channel 2
  sd-progress vae tokens photo.jpg --model owner/name-with-a-VQModel --keep 8 64

Each command's own --help explains it.
"""
_EXPLORE: Final = """\
Look into a model's VAE in the browser: latent channels, previews, the decoded picture, numbers; and
knobs that show what breaks when a factor, a shift, the normalisation or a channel is wrong.

Open the address that is printed, and drop a picture, or take the sample. The page is in English and
Chinese. Only this machine can ask, unless --host says otherwise; then a token must be given as the
password. Whoever is let in may load any model of the Hub and of this machine.

Needs Gradio: pip install "sd-progress[app]"
"""
_EXPLORE_EXAMPLES: Final = """\
examples:
  sd-progress explore
  sd-progress explore --model owner/name --device cuda
  sd-progress explore --model owner/name --tiny owner/tiny-decoder-for-it
"""
_ROUND_TRIP: Final = """\
Encode a picture and decode it again: what a VAE cannot keep, no diffusion model can paint.

Prints the shape of the latents; each channel's mean and deviation in sampler space, where a
diffusion model expects N(0, 1); PSNR (30 dB is good, 40 hard to tell apart) and SSIM (1 is
perfect); the largest error; what was NaN or beyond the range; time and memory. Writes the decoded
picture, where it differs, and both beside the original.

Ends with exit code 3, and says why, where the VAE is broken:

  nan-weight        a weight is NaN or infinite: the message names it
  fp16-overflow     fine in float32, NaN in float16: use bfloat16, float32 or force_upcast
  not-finite        NaN or infinity, in whatever number format
  swapped-channels  the colours come back in another order
  untrained         what comes back is no nearer than one flat colour
  scaling-factor    the latents' deviation in sampler space is far from 1
  other-latents     latents given by --latents are not this VAE's
"""
_CHANNELS: Final = """\
Show each latent channel in grey, three deviations from black to white, above its histogram.

The red line is N(0, 1), which a diffusion model starts from and is trained to end in.
"""
_FACTORS: Final = """\
Show what each latent channel adds to colour, as swatches from three deviations below its centre to
three above.

The colours are those of the linear map that is known for the VAE, or of one that is fitted now to
synthetic pictures; `sd-progress calibrate` fits a better one, for --factors.
"""
_PCA: Final = """\
Find the directions in which latents vary most, and move a picture along them.

The principal components are those of all latent pixels of all pictures, in sampler space. Writes
how much of the variance the first one, two, three, ... explain; and for each of the first few an
animation of the first picture, three deviations back and forth.
"""
_INTERPOLATE: Final = """\
Go from one picture's latents to another's, straight and along a sphere, and decode on the way.

Straight between two samples of N(0, 1) the latents become too small, and pictures pale; along a
sphere they keep their size. The ends are the two pictures as the VAE decodes them.
"""
_WALK: Final = """\
Change one latent channel of a picture, everywhere alike, by three deviations back and forth.
"""
_TOKENS: Final = """\
Show the tokens of a VAE that has a codebook: the map of them, which entries are used and how
often, and the picture drawn with only the most used ones.

Perplexity is how many entries, were all as frequent, would be as hard to guess. Entries that are
used in no picture are dead, and wasted; one picture alone does not tell.
"""
_LAST_PORT: Final = 65535
_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """The `sd-progress` command.

    Args:
        argv: the words after the command's name; None takes the process' own.

    Returns:
        The exit code: 0, 2 where what was asked for cannot be done, 3 where a VAE is broken, 130
        after Ctrl-C.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
        else:
            with _plain_warnings():
                return args.action(args) or 0
    except UsageError as error:
        print(f"sd-progress: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves it to `main` to end the program."""

    def error(self, message: str) -> NoReturn:
        """Raise it, without argparse's introduction where the message names its flag itself."""
        raise UsageError(re.sub(r"^argument .*?: (?=--)", "", message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sd-progress",
        description="Watch a diffusers run while it happens: PNGs, an animation, a filmstrip.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"sd-progress {metadata.version('sd-progress')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        dest="command",
        metavar="demo | run | models | calibrate | vae | serve | worker",
        title="commands",
    )
    _add_demo(commands)
    _add_run(commands)
    _add_models(commands)
    _add_calibrate(commands)
    _add_vae(commands)
    _add_explore(commands)
    _add_serve(commands)
    _add_worker(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = _command(commands, "demo", "paint a small landscape with the model that comes along")
    demo.add_argument(
        "prompt",
        nargs="?",
        default=DEMO_PROMPT,
        help="what to paint: time of day, sky, sun or moon, mountains, sea, meadow, desert, "
        "trees, a house, a boat (default: %(default)r)",
    )
    _add_generation_arguments(demo, steps="20", guidance=f"{DEMO_GUIDANCE:g}", out="demo-output")
    # little guidance, because much of it overdoes the first guesses
    demo.set_defaults(model=str(demo_model_path()), steps=20, guidance=3.0, preview_source="both")


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = _command(commands, "run", "run any text-to-image model of diffusers")
    _add_model_argument(run)
    run.add_argument("--prompt", required=True, help="what to paint")
    own = "the model's own"
    _add_generation_arguments(run, steps=own, guidance=own, out="run-output")


def _add_models(commands: argparse._SubParsersAction[_Parser]) -> None:
    models = commands.add_parser(
        "models",
        help="list which models are shown, and how a preview is attached",
        description=_MODELS,
        epilog=_MODELS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = models.add_mutually_exclusive_group()
    which.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a pipeline class or a part of its name, in upper or lower case; tells all about it",
    )
    which.add_argument("--all", action="store_true", help="list deprecated pipelines as well")
    which.add_argument(
        "--markdown", action="store_true", help="print everything as Markdown: docs/supported.md"
    )
    models.set_defaults(action=_print_models)


def _add_calibrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="fit the map that draws previews to a model's own VAE, and keep it in a file",
        description=_CALIBRATE,
        epilog=_CALIBRATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_model_argument(parser, "; of a pipeline, or of a VAE alone")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="a folder of pictures to fit on (default: synthetic ones)",
    )
    parser.add_argument(
        *spellings("kernel_size"),
        type=_kernel_size,
        default=5,
        metavar="K",
        help="how many latents a side go into one pixel, odd: 1 is quickest, 5 sees edges "
        "(default: %(default)s)",
    )
    parser.add_argument(
        *spellings("upscale"),
        type=whole_number("upscale", 1, "1, 2, 4 and 8 are usual"),
        default=1,
        metavar="S",
        help="pixels a side per latent, up to the VAE's own; 2 is sharper, and the file four times "
        "as large (default: %(default)s)",
    )
    parser.add_argument(
        "--degree",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="1 is an affine map; 2 and 3 add products of the latents under the pixel "
        "(default: %(default)s)",
    )
    parser.add_argument(
        *spellings("hidden_units"),
        type=whole_number("hidden_units", 0, "64 are usual"),
        default=0,
        metavar="N",
        help="of a small network beside an affine map, which takes longer to fit (default: none)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number("seed", 0, "try another"),
        default=0,
        metavar="N",
        help="of the synthetic pictures and of the network (default: %(default)s)",
    )
    _add_device_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        type=_file_ending_in("out", ".safetensors"),
        metavar="FILE.safetensors",
        help="where the map goes; what is there already is left alone, and a number added",
    )
    parser.add_argument(
        "--picture",
        type=_file_ending_in("picture", ".png"),
        metavar="FILE.png",
        help="where before and after are shown (default: beside the map, under its name)",
    )
    parser.set_defaults(action=_calibrate)


def _add_vae(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "vae",
        help="look into a model's VAE: what it keeps, what its latents mean, what is wrong with it",
        description=_VAE,
        epilog=_VAE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(action=lambda args: parser.print_help())
    kinds = parser.add_subparsers(
        dest="kind",
        metavar="roundtrip | channels | factors | pca | interpolate | walk | tokens",
        title="commands",
    )
    _add_round_trip(kinds)
    channels = _vae_command(kinds, "channels", "show each latent channel in grey", _CHANNELS)
    _add_picture(channels)
    factors = _vae_command(kinds, "factors", "show what each channel adds to colour", _FACTORS)
    factors.add_argument(
        "--factors",
        type=_file_ending_in("factors", ".safetensors"),
        metavar="FILE.safetensors",
        help="a map made by `sd-progress calibrate` (default: what is known, or fitted now)",
    )
    _add_components(kinds)
    between = _vae_command(kinds, "interpolate", "go from one picture to another", _INTERPOLATE)
    between.add_argument("first", type=Path, metavar="A", help="a picture")
    between.add_argument("last", type=Path, metavar="B", help="another, which is cut to A's size")
    _add_frames(between)
    walk = _vae_command(kinds, "walk", "change one latent channel of a picture", _WALK)
    _add_picture(walk)
    walk.add_argument(
        "--channel",
        type=whole_number("channel", 0, "`vae channels` shows all of them"),
        required=True,
        metavar="N",
        help="which, from 0",
    )
    _add_frames(walk)
    tokens = _vae_command(kinds, "tokens", "show the tokens of a VAE with a codebook", _TOKENS)
    _add_picture(tokens)
    tokens.add_argument(
        "--keep",
        type=whole_number("keep", 1, "8, 32 and 128 are usual"),
        nargs="+",
        default=[4, 16, 64],
        metavar="K",
        help="draw with only the K most used entries (default: 4 16 64)",
    )


def _add_round_trip(kinds: argparse._SubParsersAction[_Parser]) -> None:
    parser = _vae_command(kinds, "roundtrip", "encode, decode, and say what is wrong", _ROUND_TRIP)
    _add_picture(parser, nargs="?")
    parser.add_argument(
        "--latents",
        type=Path,
        metavar="FILE",
        help="decode these instead: a .safetensors or .pt file that holds one tensor",
    )
    parser.add_argument(
        "--space",
        choices=("vae", "sampler"),
        default="vae",
        help="of --latents: vae for what `vae.decode` is given, sampler for what a pipeline "
        'returns with output_type="latent" (default: %(default)s)',
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="draw the latents from the encoder's posterior instead of taking its mean",
    )
    parser.add_argument(
        "--seed",
        type=whole_number("seed", 0, "try another"),
        default=0,
        metavar="N",
        help="of --sample (default: %(default)s)",
    )


def _add_components(kinds: argparse._SubParsersAction[_Parser]) -> None:
    parser = _vae_command(kinds, "pca", "find the directions in which latents vary most", _PCA)
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="pictures; the first one is moved"
    )
    parser.add_argument(
        "--components",
        type=whole_number("components", 1, "3 are usual"),
        default=3,
        metavar="K",
        help="how many directions to move along (default: %(default)s)",
    )
    parser.add_argument(
        "--neighbours",
        type=whole_number("neighbours", 1, "leave it out to take all"),
        metavar="N",
        help="look only at the N pictures most like the first, itself among them: the directions "
        "of its neighbourhood (default: all)",
    )
    _add_frames(parser)


def _vae_command(
    kinds: argparse._SubParsersAction[_Parser], name: str, summary: str, text: str
) -> _Parser:
    parser = kinds.add_parser(
        name,
        help=summary,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default=str(demo_model_path()),
        metavar="ID_OR_FOLDER",
        help="a model id of the Hugging Face Hub, or a folder made by save_pretrained; of a "
        "pipeline, or of a VAE alone (default: the demo model)",
    )
    parser.add_argument(
        *spellings("token_env"),
        metavar="NAME",
        help="the environment variable that holds a token of the Hub, for models that need one "
        "(default: the one that `hf auth login` has kept)",
    )
    for side in ("width", "height"):
        parser.add_argument(
            f"--{side}",
            type=whole_number(side, 1, "512 is usual"),
            metavar="PX",
            help="bring pictures to this size first; rounded down to what the VAE takes "
            "(default: as they are)",
        )
    _add_device_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where pictures go; nothing is overwritten (default: vae-output, with a number added "
        "if need be)",
    )
    parser.set_defaults(action=_look_into_vae)
    return parser


def _add_picture(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("image", type=Path, nargs=nargs, metavar="IMAGE", help="a picture's file")


def _add_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frames",
        type=whole_number("frames", 2, "13 are usual"),
        default=13,
        metavar="N",
        help="of an animation, one way (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=(".gif", ".webp", ".png"),
        default=".gif",
        help="of animations: .png is lossless, .gif has 255 colours (default: %(default)s)",
    )


def _add_explore(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "explore",
        help="look into a model's VAE in the browser, and see what breaks",
        description=_EXPLORE,
        epilog=_EXPLORE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="a model id of the Hugging Face Hub, or a folder made by save_pretrained; of a "
        "pipeline, or of a VAE alone (default: the demo model)",
    )
    _add_device_arguments(parser)
    parser.add_argument(
        "--tiny",
        metavar="ID_OR_FOLDER",
        help="also show what a distilled decoder draws, of the VAEs that it fits (default: none)",
    )
    parser.add_argument(
        *spellings("max_side"),
        type=whole_number("max_side", 64, "512 is usual"),
        default=512,
        metavar="PX",
        help="larger pictures are reduced (default: %(default)s)",
    )
    _add_listening(
        parser,
        port=7860,
        port_type=whole_number("port", 1, "7860 is usual"),
        port_help="where to listen",
        token_help="what visitors must give as their password, with any name",
    )
    parser.set_defaults(action=_explore)


def _add_listening(
    parser: _Parser, *, port: int, port_type: Callable[[str], int], port_help: str, token_help: str
) -> None:
    """Where a service listens, and what it wants to be told first."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; any address but this machine's own needs a token "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=port_type,
        default=port,
        metavar="N",
        help=f"{port_help} (default: %(default)s)",
    )
    parser.add_argument(
        "--token",
        default=os.environ.get("SD_PROGRESS_TOKEN") or None,
        metavar="TEXT",
        help=f"{token_help}; others on this machine can read it in the list of processes, so "
        "better set SD_PROGRESS_TOKEN (default: none)",
    )


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="paint for browsers and for clients of the OpenAI images API",
        description=_SERVE,
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="a model id of the Hugging Face Hub, or a folder made by save_pretrained (default: "
        "the demo model)",
    )
    _add_device_arguments(parser)
    _add_listening(
        parser,
        port=8765,
        port_type=whole_number("port", 0, "0 is any that is free"),
        port_help="0 is any that is free",
        token_help="what clients must send as their api_key",
    )
    parser.add_argument(
        *spellings("allow_host"),
        action="append",
        default=[],
        metavar="NAME",
        help="a name, beside this machine's own, that requests may be for, as with a proxy before "
        "it; can be given again",
    )
    _add_redis_arguments(parser, "instead of painting here, have the workers of this Redis do it")
    _add_serve_limits(parser)
    parser.set_defaults(action=_serve)


def _add_worker(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "worker",
        help="paint the jobs of a fleet, from Redis",
        description=_WORKER,
        epilog=_WORKER_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_redis_arguments(parser, "where the jobs come from")
    parser.add_argument(
        "--model",
        metavar="ID_OR_FOLDER",
        help="a model id of the Hugging Face Hub, or a folder made by save_pretrained (default: "
        "the demo model)",
    )
    _add_device_arguments(parser)
    parser.add_argument(
        "--name",
        metavar="TEXT",
        help="no other worker that runs has it (default: of the machine and the process)",
    )
    parser.add_argument(
        *spellings("lease_s"),
        type=_seconds("lease_s"),
        default=30.0,
        metavar="S",
        help="a worker that gave no sign of life for so many seconds is taken for dead; the same "
        "for all workers (default: 30)",
    )
    parser.add_argument(
        *spellings("keep_s"),
        type=_seconds("keep_s"),
        default=900.0,
        metavar="S",
        help="how many seconds a run that is over can be read; most of Redis' memory goes there "
        "(default: 900)",
    )
    parser.add_argument(
        *spellings("grace_s"),
        type=_seconds("grace_s"),
        default=20.0,
        metavar="S",
        help="how many seconds a job may go on after SIGTERM (default: 20)",
    )
    parser.set_defaults(action=_work)


def _add_redis_arguments(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--redis",
        default=os.environ.get("SD_PROGRESS_REDIS") or None,
        metavar="URL",
        help=f"{text}; redis://host:port/0, rediss:// for TLS, redis+cluster:// or "
        "redis+sentinel://; where there is a password in it, better set SD_PROGRESS_REDIS",
    )
    parser.add_argument(
        "--prefix",
        default="sd-progress",
        metavar="TEXT",
        help="of all keys in Redis, for more than one fleet (default: %(default)s)",
    )


def _add_serve_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits", "what goes beyond is refused, and told why")
    limits = (
        ("max_pixels", 1024 * 1536, "of one picture"),
        ("max_steps", 150, "of one run"),
        ("max_count", 4, "pictures of one run"),
        ("max_prompt_chars", 4000, "characters of a prompt"),
        ("max_body_bytes", 65536, "bytes of a request"),
        ("max_waiting", 64, "runs that wait"),
        ("max_per_client", 16, "runs of one address that are not over"),
        ("max_viewers", 1000, "connections that events are sent to"),
    )
    for name, default, text in limits:
        group.add_argument(
            *spellings(name),
            type=whole_number(name, 1, f"{default} is usual"),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )


def _add_model_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_FOLDER",
        help=f"a model id of the Hugging Face Hub, or a folder made by save_pretrained{more}",
    )


def _command(commands: argparse._SubParsersAction[_Parser], name: str, summary: str) -> _Parser:
    sentence = f"{summary[0].upper()}{summary[1:]}, and watch it come into being."
    return commands.add_parser(name, help=summary, description=sentence, allow_abbrev=False)


def _add_generation_arguments(
    parser: argparse.ArgumentParser, *, steps: str, guidance: str, out: str
) -> None:
    group = parser.add_argument_group("picture")
    group.add_argument(
        *spellings("negative_prompt"), metavar="TEXT", help="what to keep out of the picture"
    )
    group.add_argument(
        "--seed",
        type=whole_number("seed", 0, "try another"),
        default=0,
        metavar="N",
        help="the same seed is the same picture (default: 0)",
    )
    group.add_argument(
        "--steps",
        type=whole_number("steps", 1, "20 to 50 are usual"),
        metavar="N",
        help=f"more steps take longer and look better, up to a point (default: {steps})",
    )
    group.add_argument(
        "--size",
        type=_size,
        metavar="N|WxH",
        help="pixels, for example 512 or 768x512 (default: the model's own)",
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help=f"how strictly to follow the prompt (default: {guidance})",
    )
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"{', '.join(SHORT_NAMES)}, or a class of diffusers (default: the model's own)",
    )
    _add_device_arguments(group)
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where everything goes that has no place of its own; nothing is overwritten "
        f"(default: {out}, with a number added if need be)",
    )
    parser.set_defaults(action=_generate, default_out=out)
    add_preview_arguments(parser)
    parser.set_defaults(preview_terminal="auto")


def _add_device_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cuda, cuda:1, mps, xpu or cpu (default: auto, the fastest there is)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="number format of the model (default: auto, what suits the device)",
    )


def _seconds(name: str) -> Callable[[str], float]:
    """An argparse type: a time."""

    def parsed(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < float("inf"):
                return float(text)
        expected = f"--{name} must be a number of seconds above 0"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}; for example 30")

    return parsed


def _kernel_size(text: str) -> int:
    size = whole_number("kernel_size", 1, "1, 3, 5 and 7 are usual")(text)
    if size % 2 == 0:
        raise argparse.ArgumentTypeError(
            f"--kernel_size must be odd, got {size}; pass {size - 1} or {size + 1}"
        )
    return size


def _file_ending_in(name: str, suffix: str) -> Callable[[str], Path]:
    """An argparse type: a path of a file."""

    def parsed(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix:
            expected = f"--{name} must be a file ending in {suffix}"
            example = path.with_suffix(suffix) if path.name else f"map{suffix}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}; for example {example}")
        return path

    return parsed


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.lower())
    if match is None:
        expected = "--size must be N or WxH in pixels"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}; for example 512 or 768x512")
    return int(match[1]), int(match[2] or match[1])


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as one line each, and spare the user what the libraries tell programmers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = _show_plainly
        yield


def _show_plainly(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"sd-progress: warning: {message}", file=sys.stderr)


def _generate(args: argparse.Namespace) -> None:
    from .generate import Task, generate

    task = Task(
        model=args.model,
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        steps=args.steps,
        size=args.size,
        guidance=args.guidance,
        scheduler=args.scheduler,
        device=args.device,
        dtype=args.dtype,
        out=_new_folder(args.default_out) if args.out is None else args.out,
        steps_folder=args.write_intermediates,
        animation=args.preview_gif,
        terminal=args.preview_terminal,
        every=args.preview_every,
        vae_every=args.preview_vae_every,
        source=args.preview_source,
        decoder=args.preview_decoder,
        budget=args.preview_budget,
    )
    generate(task)


def _calibrate(args: argparse.Namespace) -> None:
    from .calibrate_command import Task, calibrate_model

    task = Task(
        model=args.model,
        images=args.images,
        kernel_size=args.kernel_size,
        upscale=args.upscale,
        degree=args.degree,
        hidden_units=args.hidden_units,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        out=args.out,
        picture=args.picture,
    )
    calibrate_model(task)


def _look_into_vae(args: argparse.Namespace) -> int:
    from . import vae_command as lab

    task = lab.Task(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        out=_new_folder("vae-output") if args.out is None else args.out,
        size=(args.width, args.height),
        suffix=getattr(args, "format", ".gif"),
        token_env=args.token_env,
    )
    if args.kind == "roundtrip":
        seed = args.seed if args.sample else None
        return lab.show_round_trip(task, args.image, args.latents, args.space, seed)
    shows: dict[str, Callable[[], None]] = {
        "channels": lambda: lab.show_channels(task, args.image),
        "factors": lambda: lab.show_factors(task, args.factors),
        "pca": lambda: lab.show_components(
            task, args.images, args.components, args.frames, args.neighbours
        ),
        "interpolate": lambda: lab.show_interpolation(task, args.first, args.last, args.frames),
        "walk": lambda: lab.show_walk(task, args.image, args.channel, args.frames),
        "tokens": lambda: lab.show_tokens(task, args.image, args.keep),
    }
    shows[args.kind]()
    return 0


def _explore(args: argparse.Namespace) -> None:
    from .explore_command import Task, explore

    if args.port > _LAST_PORT:
        raise UsageError(f"--port must be at most {_LAST_PORT}, got {args.port}; 7860 is usual")
    task = Task(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        tiny=args.tiny,
        max_side_px=args.max_side,
        host=args.host,
        port=args.port,
        token=args.token,
    )
    try:
        explore(task)
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error


def _serve(args: argparse.Namespace) -> None:
    try:
        from .server import Settings
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error
    from .guard import is_loopback
    from .images_api import RequestLimits
    from .local import Limits
    from .serve_command import Task, serve

    if args.redis is not None and args.model is not None:
        expected = "--model must be left out with --redis"
        raise UsageError(f"{expected}, got {args.model!r}; give it to the workers")
    if args.port > _LAST_PORT:
        raise UsageError(f"--port must be at most {_LAST_PORT}, got {args.port}; 8765 is usual")
    settings = Settings(
        token=args.token,
        hosts=frozenset(map(str.lower, args.allow_host)) if is_loopback(args.host) else None,
        limits=RequestLimits(
            max_pixels=args.max_pixels,
            max_steps=args.max_steps,
            max_count=args.max_count,
            max_prompt_chars=args.max_prompt_chars,
        ),
        max_body_bytes=args.max_body_bytes,
        max_viewers=args.max_viewers,
    )
    task = Task(
        model=args.model,
        host=args.host,
        port=args.port,
        device=args.device,
        dtype=args.dtype,
        limits=Limits(max_waiting=args.max_waiting, max_per_client=args.max_per_client),
        settings=settings,
        redis=args.redis,
        prefix=args.prefix,
    )
    try:
        serve(task)
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error


def _work(args: argparse.Namespace) -> None:
    if args.redis is None:
        expected = "--redis must be the URL of a Redis server"
        raise UsageError(f"{expected}, got none; for example redis://127.0.0.1")
    try:
        from .worker_command import Task, work
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error
    task = Task(
        redis=args.redis,
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        name=args.name,
        prefix=args.prefix,
        lease_s=args.lease_s,
        keep_s=args.keep_s,
        grace_s=args.grace_s,
    )
    work(task)


def _print_models(args: argparse.Namespace) -> None:
    text = _models(args)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `| head`; what is left must not be flushed at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _models(args: argparse.Namespace) -> str:
    from . import supported

    if args.name is not None:
        return supported.details(args.name)
    if args.markdown:
        return supported.markdown()
    known = supported.pipelines()
    listed = known if args.all else [entry for entry in known if not entry.is_deprecated]
    return "\n".join([supported.summary(), _MODELS_MORE, "", supported.table(listed)])


def _new_folder(name: str) -> Path:
    """The first of `name`, `name-2`, ... that is not there yet."""
    names = (Path(f"{name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([Path(name)], names) if not path.exists())
