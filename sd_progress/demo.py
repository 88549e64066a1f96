"""Owns the way to the demo model: a small, complete pipeline that the package carries."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEMO_PROMPT: Final = "a house in a meadow by day with the sun, snowy mountains and pine trees"
DEMO_GUIDANCE: Final = 3.0  # little, because much of it overdoes the first guesses


def demo_model_path() -> Path:
    """Folder of the demo model, for `DiffusionPipeline.from_pretrained`; nothing is downloaded.

    A complete `StableDiffusionPipeline` in diffusers' own format that paints 128x128 landscapes
    from captions, in seconds on a laptop's processor.
    """
    return Path(__file__).with_name("demo_model")
