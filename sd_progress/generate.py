"""Owns what the commands do: load a model, watch one run of it, and say what came out."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils import is_accelerate_available
from numpy.typing import NDArray
from PIL import Image

from .arguments import UsageError
from .callback import PreviewCallback
from .frame import Frame
from .pixels import finished_images
from .run import PreviewSource
from .schedulers import exchanged
from .writers import AnimationWriter, ContactSheetWriter, PngFolderWriter, Writer, writer_for

CLIP_FRAME_MS: Final = 62  # 16 frames a second, as most video models are trained
DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    """What to make and where; None leaves the choice to the model, or to `out`.

    Attributes:
        size: width and height in pixels.
        device: `"auto"`, or what `torch.device` takes.
        dtype: `"auto"` or a key of `DTYPES`.
        out: folder for whatever has no place of its own.
        steps_folder: where the PNGs go, if not into `out`.
        animation: the animation's file, if not in `out`.
        terminal: whether to show the newest frame there; `"auto"` does where that is possible.
    """

    model: str
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int | None
    size: tuple[int, int] | None
    guidance: float | None
    scheduler: str | None
    device: str
    dtype: str
    out: Path
    steps_folder: Path | None
    animation: Path | None
    terminal: Literal["auto"] | bool
    every: int
    vae_every: int | None
    source: PreviewSource
    decoder: str
    budget: float | None


def generate(task: Task) -> None:
    """Make one picture, or one clip, and watch it; print what was made.

    Raises:
        UsageError: the task cannot be done as it is.
        KeyboardInterrupt: the user had enough; what was made until then is there and told of.
    """
    pipe = load(task)
    arguments = call_arguments(pipe, task)
    made = Products(task)
    view = _terminal_view(task)
    if view:  # its line of progress says the same
        pipe.set_progress_bar_config(disable=True)
    try:
        preview = PreviewCallback(
            pipe,
            *made.writers,
            *view,
            every=task.every,
            vae_every=task.vae_every,
            source=task.source,
            decoder=task.decoder,
            budget=task.budget,
            final=True,
        )
    except ValueError as error:  # the other options are checked already
        raise UsageError(f"--preview_{one_line(error)}") from error
    _make_folder(task.out)
    print(f'Painting "{task.prompt}" (seed {task.seed}, {pipe.device}).', flush=True)
    began_s = time.monotonic()
    try:
        with preview:
            result = pipe(**arguments, **preview.as_argument())
    except KeyboardInterrupt:
        print(f"\nStopped {made.progress}.\n{made}", flush=True)
        raise
    except ValueError as error:
        if made.last is None:  # raised by the pipeline's own check of its arguments
            raise UsageError(one_line(error)) from error
        raise
    made.save(finished_images(result[0]))
    print(f"Done in {time.monotonic() - began_s:.1f} s.\n{made}", flush=True)


class Products:
    """What a run leaves behind. Also the last of its own writers, to know how far the run came."""

    def __init__(self, task: Task) -> None:
        self._picture = _unused(task.out / "picture.png")
        self._animation = AnimationWriter(task.animation or task.out / "denoise.gif")
        self._filmstrip = Filmstrip(task.out / "filmstrip.png", task.source)
        self._steps = PngFolderWriter(task.steps_folder or task.out / "steps")
        self.writers = (self._steps, self._animation, self._filmstrip, self)
        self.last: Frame | None = None

    def write(self, frame: Frame) -> None:
        """Remember the newest frame."""
        self.last = frame

    def close(self) -> None:
        """There is nothing to complete."""

    def save(self, finished: NDArray[np.uint8] | None) -> None:
        """Save the finished picture or clip, in full size, without any preview's approximation."""
        if finished is None:
            return
        if finished.ndim == 4:
            Image.fromarray(finished[0]).save(self._picture)
            return
        self._picture = _unused(self._picture.with_name("clip.webp"))
        first, *others = map(Image.fromarray, finished[0])
        first.save(
            self._picture,
            save_all=True,
            append_images=others,
            duration=CLIP_FRAME_MS,
            loop=0,
            quality=90,
        )

    @property
    def progress(self) -> str:
        """How far the run came, in words."""
        if self.last is None:
            return "before the first step"
        return f"after step {self.last.step_index + 1} of {self.last.num_steps}"

    def __str__(self) -> str:
        """One line for each thing that is there."""
        things = {
            self._picture.stem.partition("-")[0]: self._picture,
            "animation": self._animation.path,
            "filmstrip": self._filmstrip.path,
            "steps": self._steps.path,
        }
        there = {name: path for name, path in things.items() if path is not None and path.exists()}
        return "\n".join(f"  {name:<10} {_told(path)}" for name, path in there.items())


class Filmstrip(ContactSheetWriter):
    """The run in one picture; with `source="both"`, the noisy row above the denoised one."""

    def __init__(self, path: Path, source: PreviewSource) -> None:
        """See `ContactSheetWriter`."""
        self._is_stacked = source == "both"
        super().__init__(path, max_side_px=384 if self._is_stacked else 192, label=_step)

    def write(self, frame: Frame) -> None:
        """Add a frame, which shows two pictures side by side if it shows both."""
        if self._is_stacked:
            left_and_right = np.split(frame.images, 2, axis=-2)
            frame = replace(frame, images=np.concatenate(left_and_right, axis=-3))
        super().write(frame)


def _step(frame: Frame) -> str:
    return "finished" if frame.source == "final" else f"step {frame.step_index + 1}"


def load(task: Task) -> DiffusionPipeline:
    """The task's pipeline, on its device, with its scheduler.

    Raises:
        UsageError: there is no such model, device or scheduler.
    """
    return load_pipeline(task.model, task.device, task.dtype, task.scheduler)


def load_pipeline(
    model: str, device: str = "auto", dtype: str = "auto", scheduler: str | None = None
) -> DiffusionPipeline:
    """A pipeline, on its device, with its own scheduler or another.

    Args:
        model: a model id of the Hugging Face Hub, or a folder.
        device: `"auto"`, or what `torch.device` takes.
        dtype: `"auto"` or a key of `DTYPES`.
        scheduler: as for `schedulers.exchanged`; None leaves the model's own.

    Raises:
        UsageError: there is no such model, device or scheduler.
    """
    where = device_named(device)
    is_folder = is_model_folder(model, "model_index.json")
    try:
        with quietly(is_quick=is_folder):
            pipe = _from_pretrained(model, dtype_named(dtype, where))
    except (OSError, ValueError) as error:
        raise UsageError(no_model(model, one_line(error))) from error
    if scheduler is not None:
        try:
            pipe.scheduler = exchanged(pipe.scheduler, scheduler)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    pipe.set_progress_bar_config(desc="denoising")
    return pipe.to(where)


def call_arguments(pipe: DiffusionPipeline, task: Task) -> dict[str, object]:
    """What the pipeline is called with, besides the callback.

    Raises:
        UsageError: the pipeline does not take something that was asked for.
    """
    return arguments_for(
        pipe,
        prompt=task.prompt,
        negative_prompt=task.negative_prompt,
        steps=task.steps,
        size=task.size,
        guidance=task.guidance,
        seed=task.seed,
    )


def arguments_for(
    pipe: DiffusionPipeline,
    *,
    prompt: str,
    negative_prompt: str | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    count: int = 1,
) -> dict[str, object]:
    """What a pipeline is called with; None leaves something to the model, or to chance.

    Args:
        pipe: what is going to be called.
        prompt: what to paint.
        negative_prompt: what to keep out of it.
        steps: of the denoising loop.
        size: width and height in pixels.
        guidance: how strictly to follow the prompt.
        seed: of the noise that it starts from.
        count: how many pictures of the prompt.

    Raises:
        UsageError: the pipeline does not take something that was asked for; the message begins with
            the flag's name.
    """
    kind = type(pipe).__name__
    taken = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in taken:
        expected = "--model must be a pipeline that makes pictures or videos of a prompt"
        raise UsageError(f"{expected}, got a {kind}; choose another model")
    _check_steps(pipe, steps)
    _check_size(pipe, size)
    width, height = size or (None, None)
    asked = (
        ("--negative_prompt", "negative_prompt", negative_prompt),
        ("--steps", "num_inference_steps", steps),
        ("--size", "width", width),
        ("--size", "height", height),
        ("--guidance", "guidance_scale", guidance),
        ("--count", "num_images_per_prompt", None if count == 1 else count),
    )
    arguments: dict[str, object] = {"prompt": prompt}
    for flag, name, value in asked:
        if value is not None and name not in taken:
            raise UsageError(f"{flag} must be left out for a {kind}, got {value!r}; it takes none")
        if value is not None:
            arguments[name] = value
    if seed is not None and "generator" in taken:
        # on the CPU, so that a seed is the same picture on every device
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    return arguments


def _terminal_view(task: Task) -> list[Writer]:
    """None or one."""
    if task.terminal == "auto":
        is_installed = importlib.util.find_spec("textual_image") is not None
        is_wanted = is_installed and sys.stdout.isatty()
    else:
        is_wanted = task.terminal
    try:
        return [writer_for("terminal")] if is_wanted else []
    except ModuleNotFoundError as error:
        raise UsageError(f"--preview_terminal: {error}") from error


def device_named(name: str) -> torch.device:
    """A device that is here; `"auto"` is the fastest.

    Raises:
        UsageError: there is no such device.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
        "cpu": True,
    }
    here = [kind for kind, is_available in found.items() if is_available]
    if name == "auto":
        return torch.device(here[0])
    if name.partition(":")[0] not in here:
        expected = f"--device must be auto or one of this machine's: {', '.join(here)}"
        raise UsageError(f"{expected}; got {name!r}")
    return torch.device(name)


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """A key of `DTYPES`, or for `"auto"` what suits the device."""
    return _best_dtype(device) if name == "auto" else DTYPES[name]


def one_line(error: Exception) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split())


def _check_steps(pipe: DiffusionPipeline, steps: int | None) -> None:
    most = pipe.scheduler.config.get("num_train_timesteps", 1000)
    if steps is not None and steps > most:
        raise UsageError(f"--steps must be at most {most}, got {steps}; 20 to 50 are usual")


def _check_size(pipe: DiffusionPipeline, size: tuple[int, int] | None) -> None:
    unit_px = getattr(pipe, "vae_scale_factor", 8)
    if size is not None and (size[0] % unit_px or size[1] % unit_px):
        near = "x".join(str(max(unit_px, round(side / unit_px) * unit_px)) for side in size)
        expected = f"--size must be multiples of {unit_px} pixels for this model"
        raise UsageError(f"{expected}, got {size[0]}x{size[1]}; try {near}")


def _best_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    has_bf16 = device.type == "xpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.bfloat16 if has_bf16 else torch.float16


def loading_options(dtype: torch.dtype) -> dict[str, object]:
    """What every `from_pretrained` of diffusers is given."""
    has_dtype = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40)
    return {
        "dtype" if has_dtype else "torch_dtype": dtype,
        "low_cpu_mem_usage": is_accelerate_available(),  # diffusers' default, without its warning
    }


def _from_pretrained(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    options = loading_options(dtype)
    try:
        return AutoPipelineForText2Image.from_pretrained(model, **options)
    except ValueError:  # a class that has no other tasks, and so is not in that table
        return DiffusionPipeline.from_pretrained(model, **options)


def is_model_folder(model: str, *files: str) -> bool:
    """Whether the model is a folder; a Hub id is not, and looks like `owner/name`.

    Raises:
        UsageError: it is a folder without any of these files, or one that is not there.
    """
    folder = Path(model)
    if any((folder / file).is_file() for file in files):
        return True
    if folder.exists():
        raise UsageError(no_model(model, f"it has no {' and no '.join(files)}"))
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise UsageError(no_model(model, "there is no such folder"))
    return False


def no_model(model: str, cause: str) -> str:
    """What to tell the user about a model that cannot be loaded."""
    expected = "--model must be a model id of the Hugging Face Hub or a diffusers folder"
    return f"{expected}, got {model!r}; {cause}"


@contextmanager
def quietly(*, is_quick: bool) -> Iterator[None]:
    """Without the libraries' notices, and without their progress bars for what is over at once."""
    loggers = diffusers.utils.logging, transformers.utils.logging
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        if is_quick:
            logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # of what diffusers, not the user, passes to the Hub's client
            warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
            yield
    finally:
        for logger, (verbosity, has_bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if has_bars:
                logger.enable_progress_bar()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected = "--out must be a folder that can be made"
        raise UsageError(f"{expected}, got {str(path)!r}; {one_line(error)}") from error


def _unused(path: Path) -> Path:
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def _told(path: Path) -> str:
    if not path.is_dir():
        return str(path)
    return f"{path}/ ({len(list(path.glob('*.png')))} PNGs)"
