"""Owns the `sd-progress` command: what can be typed. What is then done is in generate.py."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
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

`sd-progress demo --help` explains every flag, and so do `run --help` and `models --help`.
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
_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """The `sd-progress` command.

    Args:
        argv: the words after the command's name; None takes the process' own.

    Returns:
        The exit code: 0, 2 where what was asked for cannot be done, 130 after Ctrl-C.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
        else:
            with _plain_warnings():
                args.action(args)
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
        dest="command", metavar="demo | run | models", title="commands"
    )
    _add_demo(commands)
    _add_run(commands)
    _add_models(commands)
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
    run.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_FOLDER",
        help="a model id of the Hugging Face Hub, or a folder made by save_pretrained",
    )
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
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where everything goes that has no place of its own; nothing is overwritten "
        f"(default: {out}, with a number added if need be)",
    )
    parser.set_defaults(action=_generate, default_out=out)
    add_preview_arguments(parser)


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
        every=args.preview_every,
        vae_every=args.preview_vae_every,
        source=args.preview_source,
        budget=args.preview_budget,
    )
    generate(task)


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
