"""Owns small charts and maps, drawn with Pillow alone: histograms, curves, bars, heat, swatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

_FINE: Final = 2  # drawn so many times larger, then reduced, for smooth lines
_INK: Final = (60, 64, 72)
_FAINT: Final = (222, 225, 230)
_BLUE: Final = (92, 134, 190)
_RED: Final = (206, 84, 60)
_TEXT_PX: Final = 13
# Black to white by way of what glows: as bright as it is large, so that grey prints tell it, too.
_HEAT: Final = ((0, 0, 0), (74, 12, 92), (182, 42, 72), (240, 120, 30), (252, 215, 90), (255,) * 3)
_LONGEST_BARS: Final = 512


def heat(values: NDArray[np.float32], top: float) -> Image.Image:
    """(H, W) as colours: 0 is black, `top` and beyond are white."""
    places = np.clip(values / max(top, 1e-9), 0, 1) * (len(_HEAT) - 1)
    stops = np.array(_HEAT, np.float64)
    below = np.minimum(places.astype(np.int64), len(_HEAT) - 2)
    share = (places - below)[..., None]
    return Image.fromarray((stops[below] * (1 - share) + stops[below + 1] * share).astype(np.uint8))


class Chart:
    """A white area with a frame, x and y each from 0 to 1 inside of it, and words around it."""

    def __init__(self, width: int, height: int, left: int = 14, bottom: int = 22) -> None:
        """Of so many pixels, with room for labels on the left and at the bottom."""
        self._box = (left, 10, width - 10, height - bottom)
        size = width * _FINE, height * _FINE
        self._image = Image.new("RGB", size, "white")
        self._draw = ImageDraw.Draw(self._image)
        self.line([(0, 0), (1, 0)], _INK)

    def bar(self, left: float, right: float, top: float) -> None:
        """Filled, from the bottom up."""
        (x0, y0), (x1, y1) = self._place(left, top), self._place(right, 0)
        self._draw.rectangle((x0, min(y0, y1), max(x0, x1 - 1), y1), _BLUE)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour = _RED) -> None:
        """From point to point."""
        self._draw.line([self._place(*point) for point in points], colour, width=_FINE)

    def dot(self, x: float, y: float) -> None:
        """A small disc."""
        cx, cy = self._place(x, y)
        self._draw.ellipse((cx - 6, cy - 6, cx + 6, cy + 6), _RED)

    def level(self, y: float, label: str) -> None:
        """A faint line all across, with its value on the left."""
        self.line([(0, y), (1, y)], _FAINT)
        self._write((self._box[0] - 4) * _FINE, self._place(0, y)[1], label, "rm")

    def under(self, x: float, label: str) -> None:
        """A word below the chart; at its right end, it ends there."""
        anchor = "rt" if x >= 1 else "mt"
        self._write(self._place(x, 0)[0], (self._box[3] + 4) * _FINE, label, anchor)

    def image(self) -> Image.Image:
        """What was drawn."""
        width, height = self._image.size
        return self._image.resize((width // _FINE, height // _FINE), Image.Resampling.BOX)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self._box
        return (left + x * (right - left)) * _FINE, (bottom - y * (bottom - top)) * _FINE

    def _write(self, x: float, y: float, text: str, anchor: str) -> None:
        font = ImageFont.load_default(_TEXT_PX * _FINE)
        self._draw.text((x, y), text, _INK, font, anchor=anchor)


def histogram(values: NDArray[np.float64], width: int, height: int = 110) -> Image.Image:
    """How often which sampler-space value occurs, from -4 to 4, and how often in N(0, 1): red."""
    counts, edges = np.histogram(np.clip(values, -4, 4), bins=48, range=(-4, 4))
    shares = counts / max(1, len(values)) / (edges[1] - edges[0])
    top = max(float(shares.max()), 0.42)
    chart = Chart(width, height)
    for share, left, right in zip(shares, edges[:-1], edges[1:], strict=True):
        if share:
            chart.bar((left + 4) / 8, (right + 4) / 8, float(share) / top)
    normal = [
        (x / 8 + 0.5, np.exp(-x * x / 2) / np.sqrt(2 * np.pi)) for x in np.arange(-4, 4.1, 0.1)
    ]
    chart.line([(float(x), float(y) / top) for x, y in normal])
    for x in (-4, -2, 0, 2, 4):
        chart.under((x + 4) / 8, f"{x}")
    return chart.image()


def curve(shares: Sequence[float], width: int = 480, height: int = 300) -> Image.Image:
    """Shares from 0 to 1 of the first one, two, three, ... things."""
    chart = Chart(width, height, left=52)
    for level in (0.25, 0.5, 0.75, 1.0):
        chart.level(level, f"{level:.0%}")
    count = len(shares)
    points = [((number + 0.5) / count, float(share)) for number, share in enumerate(shares)]
    chart.line(points)
    every = -(-count // 16)
    for number, (x, y) in enumerate(points):
        if count <= 64:
            chart.dot(x, y)
        if number % every == 0:
            chart.under(x, f"{number + 1}")
    return chart.image()


def ranking(counts: NDArray[np.int64], width: int = 480, height: int = 220) -> Image.Image:
    """Counts as bars, the largest first, at most so many as can be told apart."""
    ranked = np.sort(counts)[::-1][:_LONGEST_BARS]
    chart = Chart(width, height, left=52)
    top = max(1, int(ranked[0]))
    for share in (0.5, 1.0):
        chart.level(round(top * share) / top, f"{round(top * share)}")
    for number, count in enumerate(ranked):
        if count:
            chart.bar(number / len(ranked), (number + 1) / len(ranked), int(count) / top)
    for share in (0.0, 0.5, 1.0):
        chart.under(share, f"{round(share * (len(ranked) - 1)) + 1}")
    return chart.image()


def swatches(colours: NDArray[np.uint8], side: int = 44) -> Image.Image:
    """(N, 3) colours as squares in a row."""
    return Image.fromarray(colours[None]).resize(
        (len(colours) * side, side), Image.Resampling.NEAREST
    )


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other, on white, centred."""
    size = max(x.width for x in pictures), sum(x.height for x in pictures)
    made, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        made.paste(picture, ((size[0] - picture.width) // 2, top))
        top += picture.height
    return made
