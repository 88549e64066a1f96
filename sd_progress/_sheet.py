"""Owns contact sheets: pictures in rows, each with a label under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from ._resize import resized

_GREY: Final = (118, 124, 134, 255)  # readable on a white page and on a dark one
_SMALLEST_TEXT_PX: Final = 8


@dataclass(frozen=True)
class Cell:
    """One picture; with an empty label on all of them, the sheet has no room for any."""

    picture: Image.Image
    label: str


def with_longer_side(image: Image.Image, side_px: int) -> Image.Image:
    """RGB, enlarged or reduced, bicubically."""
    scale = side_px / max(image.size)
    return resized(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def sheet(cells: Sequence[Cell], columns: int, gap_px: int) -> Image.Image:
    """RGBA; each picture centred in its cell, its label below it."""
    columns = min(columns, len(cells))
    width = max(cell.picture.width for cell in cells)
    height = max(cell.picture.height for cell in cells)
    text_px = max(11, height // 10) if any(cell.label for cell in cells) else 0
    pitch = width + gap_px, height + gap_px + 2 * text_px
    rows = -(-len(cells) // columns)
    made = Image.new("RGBA", (columns * pitch[0] - gap_px, rows * pitch[1] - gap_px))
    for index, cell in enumerate(cells):
        left, top = index % columns * pitch[0], index // columns * pitch[1]
        inset = (width - cell.picture.width) // 2, (height - cell.picture.height) // 2
        made.paste(cell.picture, (left + inset[0], top + inset[1]))
        if cell.label:
            middle = left + width // 2, top + height + text_px
            font = _font(cell.label, width, text_px)
            ImageDraw.Draw(made).text(middle, cell.label, _GREY, font, anchor="mm")
    return made


def _font(label: str, width: int, text_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """As large as wanted, or as the label fits under its picture."""
    sizes = range(text_px, min(text_px, _SMALLEST_TEXT_PX), -1)
    fonts = map(ImageFont.load_default, sizes)
    smallest = ImageFont.load_default(min(text_px, _SMALLEST_TEXT_PX))
    return next((font for font in fonts if font.getlength(label) <= width), smallest)
