"""Preview any diffusers run while it happens: as PNGs, an animation, or a queue of frames.

`PreviewCallback(pipe, "steps/", "denoise.gif")` is what most people need, as the
`callback_on_step_end` of any pipeline. The linear maps are in `sd_progress.factors`.
"""

from .arguments import add_preview_arguments, preview_from_args
from .boundary import PreviewWarning
from .callback import PreviewCallback
from .decoders import Decoder
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

__all__ = [
    "AnimationWriter",
    "CallableWriter",
    "ContactSheetWriter",
    "Decoder",
    "Factors",
    "Frame",
    "PngFolderWriter",
    "PreviewCallback",
    "PreviewWarning",
    "QueueWriter",
    "Writer",
    "add_preview_arguments",
    "demo_model_path",
    "preview_from_args",
    "writer_for",
]
