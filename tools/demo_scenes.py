"""Little landscapes and their captions: the endless data set that the demo model is trained on.

A `Scene` is what is in the picture, `draw` paints it, `caption` says it in one of many ways.
All three are functions of a seed alone, so a scene number is the whole data set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from PIL import Image, ImageDraw

Time = Literal["day", "dawn", "sunset", "night"]
Sky = Literal["clear", "clouds", "stars"]
Light = Literal["none", "sun", "full moon", "crescent moon"]
Ground = Literal["sea", "meadow", "desert"]
Mountains = Literal["none", "bare", "snowy"]
Trees = Literal["none", "round", "pine", "palm"]
Colour = tuple[int, int, int]
Point = tuple[float, float]

SIZE: Final = 128
OVERSAMPLING: Final = 3


@dataclass(frozen=True)
class Scene:
    """What is in one picture; `seed` decides where things stand."""

    seed: int
    time: Time
    sky: Sky
    light: Light
    ground: Ground
    mountains: Mountains
    trees: Trees
    house: bool
    boat: bool


@dataclass(frozen=True)
class Palette:
    """The colours of one time of day, from the top of the picture down."""

    zenith: Colour
    horizon: Colour
    cloud: Colour
    light: Colour
    far_mountain: Colour
    near_mountain: Colour
    snow: Colour
    far_meadow: Colour
    near_meadow: Colour
    far_sand: Colour
    near_sand: Colour
    far_sea: Colour
    near_sea: Colour
    leaf: Colour
    trunk: Colour
    wall: Colour
    roof: Colour
    window: Colour
    sail: Colour
    hull: Colour


PALETTES: Final[dict[Time, Palette]] = {
    "day": Palette(
        zenith=(72, 152, 232),
        horizon=(190, 230, 250),
        cloud=(252, 253, 255),
        light=(255, 221, 64),
        far_mountain=(150, 178, 212),
        near_mountain=(108, 134, 172),
        snow=(246, 250, 255),
        far_meadow=(156, 208, 100),
        near_meadow=(104, 176, 74),
        far_sand=(246, 220, 150),
        near_sand=(234, 194, 112),
        far_sea=(76, 164, 214),
        near_sea=(24, 104, 176),
        leaf=(42, 122, 66),
        trunk=(124, 84, 54),
        wall=(250, 240, 220),
        roof=(206, 72, 56),
        window=(92, 140, 176),
        sail=(255, 252, 244),
        hull=(170, 66, 48),
    ),
    "dawn": Palette(
        zenith=(150, 160, 222),
        horizon=(255, 214, 206),
        cloud=(255, 238, 238),
        light=(255, 246, 190),
        far_mountain=(196, 170, 206),
        near_mountain=(152, 132, 182),
        snow=(255, 236, 240),
        far_meadow=(180, 204, 138),
        near_meadow=(128, 172, 110),
        far_sand=(248, 214, 176),
        near_sand=(232, 188, 150),
        far_sea=(172, 176, 220),
        near_sea=(104, 124, 186),
        leaf=(70, 116, 92),
        trunk=(118, 86, 80),
        wall=(255, 232, 222),
        roof=(192, 94, 98),
        window=(126, 130, 172),
        sail=(255, 244, 240),
        hull=(146, 76, 84),
    ),
    "sunset": Palette(
        zenith=(92, 56, 124),
        horizon=(255, 152, 62),
        cloud=(240, 128, 108),
        light=(255, 232, 120),
        far_mountain=(158, 76, 104),
        near_mountain=(104, 52, 92),
        snow=(255, 196, 160),
        far_meadow=(132, 124, 56),
        near_meadow=(82, 90, 48),
        far_sand=(226, 142, 78),
        near_sand=(186, 102, 64),
        far_sea=(222, 122, 88),
        near_sea=(98, 62, 120),
        leaf=(48, 58, 46),
        trunk=(70, 42, 46),
        wall=(228, 168, 126),
        roof=(122, 42, 52),
        window=(255, 220, 120),
        sail=(255, 214, 170),
        hull=(78, 34, 50),
    ),
    "night": Palette(
        zenith=(12, 16, 46),
        horizon=(50, 62, 118),
        cloud=(74, 86, 134),
        light=(250, 244, 206),
        far_mountain=(40, 46, 88),
        near_mountain=(26, 30, 64),
        snow=(140, 152, 196),
        far_meadow=(34, 84, 68),
        near_meadow=(20, 60, 48),
        far_sand=(128, 112, 116),
        near_sand=(98, 84, 96),
        far_sea=(36, 58, 124),
        near_sea=(14, 28, 74),
        leaf=(10, 36, 36),
        trunk=(28, 22, 34),
        wall=(84, 86, 118),
        roof=(50, 34, 62),
        window=(255, 212, 96),
        sail=(176, 184, 214),
        hull=(48, 26, 42),
    ),
}


def random_scene(seed: int) -> Scene:
    """The scene with this number; the same number is always the same scene."""
    rng = random.Random(f"scene {seed}")
    time = rng.choice(_TIMES)
    ground = rng.choices(_GROUNDS, (4, 4, 2))[0]
    return Scene(
        seed=seed,
        time=time,
        sky=rng.choice(("clear", "clouds", "stars", "stars") if time == "night" else _BY_DAY),
        light=rng.choices(("none", *_LIGHTS[time]), (1, *[3 / len(_LIGHTS[time])] * 2))[0],
        ground=ground,
        mountains=rng.choice(("none", "none", "bare", "snowy")),
        trees=rng.choice(_TREES[ground]),
        house=rng.random() < (0.25 if ground == "sea" else 0.4),
        boat=ground == "sea" and rng.random() < 0.6,
    )


_TIMES: Final[tuple[Time, ...]] = ("day", "dawn", "sunset", "night")
_GROUNDS: Final[tuple[Ground, ...]] = ("sea", "meadow", "desert")
_BY_DAY: Final[tuple[Sky, ...]] = ("clear", "clouds")
_LIGHTS: Final[dict[Time, tuple[Light, Light]]] = {
    "day": ("sun", "sun"),
    "dawn": ("sun", "sun"),
    "sunset": ("sun", "sun"),
    "night": ("full moon", "crescent moon"),
}
_TREES: Final[dict[Ground, tuple[Trees, ...]]] = {
    "sea": ("none", "none", "none", "none", "round", "pine", "palm"),
    "meadow": ("none", "none", "round", "pine"),
    "desert": ("none", "palm"),
}


# ---- drawing ----------------------------------------------------------------------------------


class Canvas:
    """A Pillow image that is painted in picture units (128 across) and reduced at the end."""

    def __init__(self, image: Image.Image) -> None:
        """Paint over `image`, whose side is a multiple of `SIZE`."""
        self.image = image
        self.scale = image.width / SIZE
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill an ellipse around (x, y)."""
        box = [(x - rx) * self.scale, (y - ry) * self.scale]
        box += [(x + rx) * self.scale, (y + ry) * self.scale]
        self._draw.ellipse(box, fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def gradient(self, top: float, bottom: float, first: Colour, last: Colour) -> None:
        """Fill the rows from `top` to `bottom`, from one colour to another."""
        start, stop = round(top * self.scale), round(bottom * self.scale)
        share = np.linspace(0, 1, stop - start)[:, None, None]
        rows = np.array(first) * (1 - share) + np.array(last) * share  # (rows, 1, 3)
        strip = Image.fromarray(rows.round().astype(np.uint8))
        self.image.paste(strip.resize((self.image.width, stop - start)), (0, start))

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        """Let light fall off around (x, y)."""
        side = round(2 * radius * self.scale)
        falloff = Image.radial_gradient("L").resize((side, side))
        mask = falloff.point([max(0, round((180 - v) * strength)) for v in range(256)])
        corner = round((x - radius) * self.scale), round((y - radius) * self.scale)
        self.image.paste(Image.new("RGB", (side, side), colour), corner, mask)


def draw(scene: Scene) -> Image.Image:
    """Paint a scene: RGB, 128x128, edges smoothed by painting three times as large."""
    side = SIZE * OVERSAMPLING
    canvas = Canvas(Image.new("RGB", (side, side)))
    rng = random.Random(f"layout {scene.seed}")
    palette = PALETTES[scene.time]
    horizon = rng.uniform(74, 82)
    light_x = rng.uniform(24, 104)
    light_y = _light_height(scene, horizon, rng)
    canvas.gradient(0, horizon + 4, palette.zenith, palette.horizon)
    if scene.sky == "stars":
        _stars(canvas, palette, (light_x, light_y), rng)
    if scene.light != "none":
        _light(canvas, scene, palette, light_x, light_y)
    if scene.sky == "clouds":
        _clouds(canvas, palette, (light_x, light_y), rng)
    if scene.mountains != "none":
        _mountains(canvas, scene, palette, horizon, rng)
    if scene.ground == "sea":
        _sea(canvas, scene, palette, horizon, light_x, rng)
    else:
        _hills(canvas, scene, palette, horizon, rng)
    return canvas.image.reduce(OVERSAMPLING)


def _light_height(scene: Scene, horizon: float, rng: random.Random) -> float:
    """The sun stands low at dawn and sunset, but never behind mountains or clouds."""
    low = scene.time in ("dawn", "sunset") and scene.mountains == "none"
    return horizon - rng.uniform(16, 28) if low else rng.uniform(18, 32)


def _light(canvas: Canvas, scene: Scene, palette: Palette, x: float, y: float) -> None:
    if scene.light == "sun":
        radius = 10.5 if scene.time == "day" else 12.0
        canvas.glow(x, y, 36, palette.light, 0.8)
        canvas.ellipse(x, y, radius, radius, palette.light)
        return
    canvas.glow(x, y, 28, (120, 130, 180), 0.6)
    backdrop = canvas.image.copy()
    canvas.ellipse(x, y, 10, 10, palette.light)
    if scene.light == "crescent moon":
        mask = Image.new("L", backdrop.size)
        box = [(x - 4.0) * canvas.scale, (y - 12.5) * canvas.scale]
        box += [(x + 14.0) * canvas.scale, (y + 5.5) * canvas.scale]
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        canvas.image.paste(backdrop, (0, 0), mask)


def _stars(canvas: Canvas, palette: Palette, light: Point, rng: random.Random) -> None:
    """A dozen stars, kept apart from each other and from the moon."""
    placed = [light]
    while len(placed) < 13:
        star = rng.uniform(5, 123), rng.uniform(5, 58)
        if math.dist(star, light) > 20 and min(math.dist(star, other) for other in placed) > 14:
            placed.append(star)
    for x, y in placed[1:]:
        radius = rng.uniform(1.6, 2.2)
        canvas.ellipse(x, y, radius, radius, (236, 236, 220))


def _clouds(canvas: Canvas, palette: Palette, light: Point, rng: random.Random) -> None:
    """Two or three clouds beside the light."""
    wanted = rng.choice((2, 3))
    placed: list[Point] = []
    for _ in range(40):
        cloud = rng.uniform(8, 120), rng.uniform(14, 46)
        apart = all(abs(cloud[0] - x) > 34 or abs(cloud[1] - y) > 16 for x, y in placed)
        clear = abs(cloud[0] - light[0]) > 34 or abs(cloud[1] - light[1]) > 24
        if apart and clear and len(placed) < wanted:
            placed.append(cloud)
    for x, y in placed:
        size = rng.uniform(0.85, 1.15)
        for dx, dy, rx, ry in ((0, 0, 16, 5), (-6, -4, 7, 6), (4, -5, 9, 8)):
            canvas.ellipse(x + dx * size, y + dy * size, rx * size, ry * size, palette.cloud)


def _mountains(
    canvas: Canvas, scene: Scene, palette: Palette, horizon: float, rng: random.Random
) -> None:
    """A far range and a near one; snow lies on the peaks of both."""
    ranges = ((palette.far_mountain, 26, 32, 4), (palette.near_mountain, 14, 22, 3))
    for colour, lowest, highest, count in ranges:
        offset = rng.uniform(-20, 20)
        for index in range(count):
            x = (index + 0.5) * SIZE / count + offset + rng.uniform(-6, 6)
            height = rng.uniform(lowest, highest)
            _peak(canvas, scene, palette, colour, (x, horizon - height), height, horizon)


def _peak(
    canvas: Canvas,
    scene: Scene,
    palette: Palette,
    colour: Colour,
    top: Point,
    height: float,
    horizon: float,
) -> None:
    x, y = top
    slope = 1.05
    half = height * slope
    canvas.polygon([(x, y), (x + half, horizon + 1), (x - half, horizon + 1)], colour)
    if scene.mountains == "snowy":
        cap = height * 0.36
        edge = [(x + cap * slope, y + cap), (x + cap * 0.3, y + cap * 0.75)]
        edge += [(x, y + cap * 1.1), (x - cap * 0.35, y + cap * 0.75), (x - cap * slope, y + cap)]
        canvas.polygon([(x, y), *edge], palette.snow)


def _ridge(canvas: Canvas, height: Callable[[float], float], first: Colour, last: Colour) -> None:
    """Fill everything below a curve with a gradient."""
    curve = [(float(x), height(float(x))) for x in range(0, SIZE + 1, 2)]
    outline = [(x * canvas.scale, y * canvas.scale) for x, y in (*curve, (SIZE, SIZE), (0, SIZE))]
    mask = Image.new("L", canvas.image.size)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    layer = Canvas(canvas.image.copy())
    layer.gradient(min(y for _, y in curve), SIZE, first, last)
    canvas.image.paste(layer.image, (0, 0), mask)


def _wave(level: float, swing: float, rng: random.Random) -> Callable[[float], float]:
    """A gentle hill line around a level."""
    phase, length = rng.uniform(0, math.tau), rng.uniform(90, 140)
    return lambda x: level + swing * math.sin(phase + math.tau * x / length)


def _hills(
    canvas: Canvas, scene: Scene, palette: Palette, horizon: float, rng: random.Random
) -> None:
    """Two hill lines of a meadow or of dunes, and what stands on the front one."""
    if scene.ground == "meadow":
        far, near = palette.far_meadow, palette.near_meadow
        swings, darkest = (2.0, 4.0), _blend(near, palette.leaf, 0.4)
    else:
        far, near = palette.far_sand, palette.near_sand
        swings, darkest = (1.5, 6.0), _blend(near, palette.trunk, 0.25)
    _ridge(canvas, _wave(horizon, swings[0], rng), far, near)
    front = _wave(horizon + 20, swings[1], rng)
    _ridge(canvas, front, near, darkest)
    _on_land(canvas, scene, palette, front, (8, 120), rng)


def _sea(
    canvas: Canvas,
    scene: Scene,
    palette: Palette,
    horizon: float,
    light_x: float,
    rng: random.Random,
) -> None:
    """Water to the horizon, the light on it, a boat, and a shore if something stands there."""
    canvas.gradient(horizon, SIZE, palette.far_sea, palette.near_sea)
    shore_left = rng.random() < 0.5
    if scene.light != "none":
        for row in range(3):
            y = horizon + 7 + 8 * row
            colour = _blend(palette.far_sea, palette.light, 0.62 - 0.12 * row)
            canvas.ellipse(light_x, y, 10 - 1.5 * row, 1.6, colour)
    if scene.boat:
        x = rng.uniform(70, 104) if shore_left else rng.uniform(24, 58)
        _boat(canvas, palette, x, horizon + rng.uniform(14, 22))
    if scene.house or scene.trees != "none":
        shore = _shore(horizon, shore_left)
        near = palette.near_sand if scene.trees == "palm" else palette.near_meadow
        _ridge(canvas, shore, near, _blend(near, palette.trunk, 0.2))
        _on_land(canvas, scene, palette, shore, (8, 62) if shore_left else (66, 120), rng)


def _shore(horizon: float, left: bool) -> Callable[[float], float]:
    """A bank that rises from the water to one side."""

    def height(x: float) -> float:
        inland = (x if left else SIZE - x) / 88
        return horizon + 18 + 40 * inland**3

    return height


def _on_land(
    canvas: Canvas,
    scene: Scene,
    palette: Palette,
    land: Callable[[float], float],
    span: tuple[float, float],
    rng: random.Random,
) -> None:
    """Trees and a house on a hill line, beside each other."""
    left, right = span
    house_x = rng.uniform(left + 12, right - 12)
    places = [left + 5 + 15 * k + rng.uniform(-2, 2) for k in range(int((right - left) // 15))]
    if scene.house:
        places = [x for x in places if abs(x - house_x) > 20]
    else:
        house_x = -100.0
    count = min(len(places), rng.choice((2, 3, 4)))
    for x in sorted(rng.sample(places, count)) if scene.trees != "none" else []:
        _TREE_PAINTERS[scene.trees](canvas, palette, x, land(x) + 3, rng.uniform(0.9, 1.15))
    if scene.house:
        _house(canvas, palette, house_x, land(house_x) + 5)


def _round_tree(canvas: Canvas, palette: Palette, x: float, y: float, size: float) -> None:
    canvas.box(x - 1.5 * size, y - 12 * size, x + 1.5 * size, y, palette.trunk)
    canvas.ellipse(x, y - 18 * size, 8 * size, 9.5 * size, palette.leaf)


def _pine_tree(canvas: Canvas, palette: Palette, x: float, y: float, size: float) -> None:
    canvas.box(x - 1.5 * size, y - 6 * size, x + 1.5 * size, y, palette.trunk)
    for top, bottom, half in ((30, 15, 6), (22, 5, 8.5)):
        points = [(x, y - top * size), (x + half * size, y - bottom * size)]
        canvas.polygon([*points, (x - half * size, y - bottom * size)], palette.leaf)


def _palm_tree(canvas: Canvas, palette: Palette, x: float, y: float, size: float) -> None:
    top = y - 24 * size
    canvas.polygon(
        [(x - 2, y), (x + 2, y), (x + 3.2, top), (x + 0.8, top)],
        palette.trunk,
    )
    for dx, dy in ((-10, 5), (-9, -4), (0, -8), (9, -4), (10, 5)):
        tip = x + 2 + dx * size, top + dy * size
        canvas.polygon([(x + 2, top - 2.5), tip, (x + 2, top + 2.5)], palette.leaf)
    canvas.ellipse(x + 2, top, 3.5 * size, 3.0 * size, palette.leaf)


_TREE_PAINTERS: Final[dict[str, Callable[[Canvas, Palette, float, float, float], None]]] = {
    "round": _round_tree,
    "pine": _pine_tree,
    "palm": _palm_tree,
}


def _house(canvas: Canvas, palette: Palette, x: float, y: float) -> None:
    canvas.box(x - 12, y - 15, x + 12, y, palette.wall)
    canvas.polygon([(x - 15, y - 14), (x, y - 27), (x + 15, y - 14)], palette.roof)
    canvas.box(x - 8.5, y - 11, x - 3.5, y - 5.5, palette.window)
    canvas.box(x + 2.5, y - 10, x + 8, y, palette.roof)


def _boat(canvas: Canvas, palette: Palette, x: float, y: float) -> None:
    hull = [(x - 13, y - 5), (x + 13, y - 5), (x + 8, y + 1), (x - 8, y + 1)]
    canvas.polygon(hull, palette.hull)
    canvas.polygon([(x - 1, y - 28), (x - 1, y - 7), (x - 12, y - 7)], palette.sail)
    canvas.polygon([(x + 1.5, y - 24), (x + 1.5, y - 7), (x + 10, y - 7)], palette.sail)


def _blend(first: Colour, last: Colour, share: float) -> Colour:
    red, green, blue = (
        round(a * (1 - share) + b * share) for a, b in zip(first, last, strict=True)
    )
    return red, green, blue


# ---- captions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Ways to say one thing: as a keyword, inside "with ...", and where or when it all happens."""

    keywords: tuple[str, ...]
    things: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


WORDS: Final[dict[str, Words]] = {
    "day": Words(
        ("day", "daytime", "noon", "midday", "daylight", "afternoon"),
        settings=("by day", "during the day", "at noon", "at midday", "in daylight", "in the day"),
    ),
    "dawn": Words(
        ("dawn", "sunrise", "morning", "daybreak"),
        settings=("at dawn", "at sunrise", "in the early morning", "in the morning", "at daybreak"),
    ),
    "sunset": Words(
        ("sunset", "dusk", "evening", "twilight"),
        settings=("at sunset", "at dusk", "in the evening", "at twilight"),
    ),
    "night": Words(
        ("night", "midnight", "nighttime", "dark night"),
        settings=("at night", "by night", "at midnight", "in the night", "in the dark"),
    ),
    "clear": Words(
        ("clear sky", "clear", "cloudless sky"),
        ("a clear sky", "a cloudless sky", "clear skies"),
        ("under a clear sky",),
    ),
    "clouds": Words(
        ("clouds", "cloudy", "cloudy sky", "cloud"),
        ("clouds", "some clouds", "a few clouds", "a cloudy sky", "clouds in the sky"),
        ("under a cloudy sky", "under clouds"),
    ),
    "stars": Words(
        ("stars", "starry", "starry sky", "starlight"),
        ("stars", "many stars", "bright stars", "a starry sky", "stars in the sky"),
        ("under a starry sky", "under the stars"),
    ),
    "sun": Words(
        ("sun", "sunny", "sunshine", "the sun"),
        ("the sun", "a bright sun", "a shining sun", "a big sun", "the sun in the sky"),
        ("under the sun",),
    ),
    "full moon": Words(
        ("moon", "full moon", "moonlight", "round moon"),
        ("a moon", "the moon", "a full moon", "a round moon", "a bright moon"),
        ("under the moon", "under a full moon", "in the moonlight"),
    ),
    "crescent moon": Words(
        ("moon", "crescent moon", "crescent", "moonlight"),
        ("a moon", "the moon", "a crescent moon", "a thin moon", "a bright moon"),
        ("under the moon", "under a crescent moon", "in the moonlight"),
    ),
    "sea": Words(
        ("sea", "ocean", "water", "blue sea", "coast", "lake", "seaside", "shore", "beach"),
        ("the sea", "the ocean", "calm water", "a quiet sea", "a lake"),
        (
            *("by the sea", "at the sea", "on the coast", "by the water", "on a lake"),
            *("by the ocean", "on the shore", "at the beach"),
        ),
    ),
    "meadow": Words(
        ("meadow", "green meadow", "field", "grass", "hills", "fields", "grassland", "valley"),
        ("a meadow", "a green meadow", "green hills", "a field", "grass", "rolling hills"),
        ("in a meadow", "on a green meadow", "in a field", "on the grass", "on green hills"),
    ),
    "desert": Words(
        ("desert", "dunes", "sand", "sandy desert", "sand dunes"),
        ("a desert", "sand dunes", "the dunes", "a sandy desert", "sand"),
        ("in the desert", "in a desert", "among sand dunes", "on the sand"),
    ),
    "bare": Words(
        ("mountains", "mountain", "rocky mountains", "peaks", "bare mountains"),
        ("mountains", "high mountains", "distant mountains", "a mountain", "rocky mountains"),
        ("in front of mountains", "below the mountains", "in the mountains"),
    ),
    "snowy": Words(
        ("mountains", "snowy mountains", "snow", "white peaks", "snowy peaks"),
        ("mountains", "snowy mountains", "mountains with snow", "snow capped mountains"),
        ("in front of snowy mountains", "below snowy mountains", "in the mountains"),
    ),
    "round": Words(
        ("trees", "round trees", "tree", "leafy trees"),
        ("trees", "some trees", "a few trees", "round trees", "leafy trees"),
        ("among trees", "near the trees"),
    ),
    "pine": Words(
        ("trees", "pine trees", "pines", "fir trees", "tree", "forest"),
        ("trees", "some trees", "pine trees", "pines", "fir trees", "a few pine trees"),
        ("among pine trees", "near the pines"),
    ),
    "palm": Words(
        ("palm trees", "palms", "palm", "trees"),
        ("palm trees", "some palm trees", "palms", "a few palm trees", "trees"),
        ("among palm trees", "under palm trees"),
    ),
    "house": Words(
        ("house", "cottage", "cabin", "hut", "home"),
        ("a house", "a small house", "a cottage", "a cabin", "a little house", "a lonely hut"),
    ),
    "boat": Words(
        ("boat", "sailboat", "sailing boat", "ship", "sail"),
        ("a boat", "a sailing boat", "a sailboat", "a small boat", "a ship", "a boat on the water"),
    ),
}
OPENINGS: Final = (
    *("a painting of ", "a picture of ", "an illustration of ", "a drawing of ", "a view of "),
    *("a landscape with ", "a scene with ", "an image of ", "a photo of ", "there is "),
)
CLOSINGS: Final = (
    *(", beautiful", ", calm and peaceful", ", flat colours", ", flat vector art", ", minimal"),
    *(", digital art", ", very quiet", ", simple style", ", colorful", ", highly detailed", "."),
)


def facets(scene: Scene) -> list[str]:
    """What there is to say about a scene, as keys of `WORDS`."""
    seen: list[str] = [
        scene.time,
        scene.sky,
        scene.light,
        scene.ground,
        scene.mountains,
        scene.trees,
    ]
    seen += ["house"] * scene.house + ["boat"] * scene.boat
    return [facet for facet in seen if facet != "none"]


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in one of many ways; now and then something goes unsaid."""
    said = [f for f in facets(scene) if rng.random() < (0.4 if f == "clear" else 0.95)]
    text = describe(said or [scene.ground], rng)
    return _with_a_strange_word(text, rng) if rng.random() < 0.08 else text


def describe(said: list[str], rng: random.Random) -> str:
    """Say these facets, and nothing else, in one of many ways."""
    shuffled = rng.sample(said, len(said))
    text = rng.choice((_keywords, _sentence, _sentence))(shuffled, rng)
    if rng.random() < 0.3:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.2:
        text += rng.choice(CLOSINGS)
    return text


def _keywords(said: list[str], rng: random.Random) -> str:
    return rng.choice((", ", ", ", " ", " and ")).join(rng.choice(WORDS[f].keywords) for f in said)


def _sentence(said: list[str], rng: random.Random) -> str:
    """Like "a house by the sea at sunset with mountains and a boat", in any order."""
    settings: list[str] = []
    things: list[str] = []
    for facet in said:
        words = WORDS[facet]
        as_setting = rng.random() < (0.7 if facet in _PLACES else 0.2)
        if not words.things or (as_setting and words.settings and len(settings) < 3):
            settings.append(rng.choice(words.settings))
        else:
            things.append(rng.choice(words.things))
    if not things:
        return " ".join(settings)
    head = [things[0]] if rng.random() < 0.6 else []
    rest = _listed(things[len(head) :], rng)
    joint = rng.choice(("with", "and")) if head and rest else ""
    parts = [*head, *settings, joint, rest]
    if rng.random() < 0.2:
        parts = [", ".join([" ".join(settings), _listed(things, rng)]).lstrip(", ")]
    return " ".join(part for part in parts if part)


_PLACES: Final = ("sea", "meadow", "desert")


def _listed(things: list[str], rng: random.Random) -> str:
    if len(things) < 2:
        return "".join(things)
    return ", ".join(things[:-1]) + rng.choice((" and ", ", ")) + things[-1]


def _with_a_strange_word(text: str, rng: random.Random) -> str:
    """Put in a word that means nothing, as the captions of strangers do."""
    letters = "".join(rng.choices("abcdefghijklmnoprstuvwyz", k=rng.randint(3, 8)))
    words = text.split(" ")
    words.insert(rng.randint(0, len(words)), letters)
    return " ".join(words)


def vocabulary() -> list[str]:
    """Every word and every mark that `caption` can write, except the strange words."""
    lists = [(*w.keywords, *w.things, *w.settings) for w in WORDS.values()]
    phrases = [phrase for phrases in lists for phrase in phrases]
    text = " ".join([*phrases, *OPENINGS, *CLOSINGS, "with and , ."]).replace(",", " , ")
    return sorted(set(text.replace(".", " . ").split()))
