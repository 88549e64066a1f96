"""Preview any diffusers run while it happens: as PNGs, an animation, or a queue of frames.

`PreviewCallback(pipe, "steps/", "denoise.gif")` is what most people need, as the
`callback_on_step_end` of any pipeline. The linear maps are in `sd_progress.factors`, the layouts of
the pipelines' latents in `sd_progress.layouts`.
"""

import importlib
import typing

from .arguments import add_preview_arguments, preview_from_args
from .boundary import PreviewWarning
from .cost import Stats
from .demo import demo_model_path
from .factors import Factors
from .frame import Frame
from .writers import (
    AnimationWriter,
    CallableWriter,
    ContactSheetWriter,
    PngFolderWriter,
    QueueWriter,
    Writer,
    writer_for,
)

if typing.TYPE_CHECKING:
    from .calibration import CalibrationError, calibrate
    from .callback import PreviewCallback, RunCancelled
    from .decoders import ChannelsDecoder, Decoder, PCADecoder
    from .streaming import Phase, astream, stream
    from .tiny_decoder import TinyDecoder

__all__ = [
    "AnimationWriter",
    "CalibrationError",
    "CallableWriter",
    "ChannelsDecoder",
    "ContactSheetWriter",
    "Decoder",
    "Factors",
    "Frame",
    "PCADecoder",
    "Phase",
    "PngFolderWriter",
    "PreviewCallback",
    "PreviewWarning",
    "QueueWriter",
    "RunCancelled",
    "Stats",
    "TinyDecoder",
    "Writer",
    "add_preview_arguments",
    "astream",
    "calibrate",
    "demo_model_path",
    "preview_from_args",
    "stream",
    "writer_for",
]

_NEED_TORCH = {
    "CalibrationError": "calibration",
    "ChannelsDecoder": "decoders",
    "Decoder": "decoders",
    "PCADecoder": "decoders",
    "Phase": "streaming",
    "PreviewCallback": "callback",
    "RunCancelled": "callback",
    "TinyDecoder": "tiny_decoder",
    "astream": "streaming",
    "calibrate": "calibration",
    "stream": "streaming",
}


def __getattr__(name: str) -> object:
    """Load what needs torch when it is first asked for; `sd-progress --help` does without."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NEED_TORCH[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_TORCH})
