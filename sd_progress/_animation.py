"""Owns the animated file formats: GIF, APNG and WebP that grow on disk, and MP4 through ffmpeg."""

from __future__ import annotations

import io
import struct
import tempfile
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageStat
from PIL.PngImagePlugin import PngInfo

from ._files import publish, temporary_path, write_temporary
from ._resize import Size


@dataclass(frozen=True)
class Timing:
    """What holds for a whole file.

    Attributes:
        tick_ms: the duration that a format with a constant frame rate counts in.
        hold_last_ms: how long the last frame stays.
        loop: how often all of them play; 0 is forever.
    """

    tick_ms: int
    hold_last_ms: int
    loop: int


class Animation(Protocol):
    """One animated file while it is written; `path` is None until it exists."""

    side_multiple: ClassVar[int]

    def __init__(self, wanted: Path, timing: Timing) -> None: ...
    @property
    def path(self) -> Path | None: ...
    def add(self, image: Image.Image, duration_ms: int) -> None: ...
    def finish(self) -> None: ...


class GrowingFile:
    """A file that ends in a fixed trailer and is complete after every `append`.

    What is new is written behind the trailer, where readers do not look; then its beginning
    replaces the trailer. Whoever reads, and whoever is killed, has the old file or the new one.
    """

    def __init__(self, wanted: Path, data: bytes, trailer: bytes) -> None:
        self.path = publish(write_temporary(wanted.parent, data + trailer), wanted)
        self._trailer = trailer
        self._end = len(data)
        self._handle = self.path.open("r+b", buffering=0)

    def append(self, data: bytes) -> int:
        """Add `data` before the trailer; the length of the file is returned."""
        visible = len(self._trailer)
        grown = data + self._trailer
        try:
            self.patch(self._end + visible, grown[visible:])
        except OSError:
            self._handle.truncate(self._end + visible)
            raise
        self.patch(self._end, grown[:visible])
        self._end += len(data)
        return self._end + visible

    def patch(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`, all of it."""
        self._handle.seek(offset)
        rest = memoryview(data)
        while rest:
            rest = rest[self._handle.write(rest) :]

    def close(self) -> None:
        self._handle.close()


class GrowingAnimation(ABC):
    """What GIF, APNG and WebP have in common: a header, one block per frame, a trailer."""

    side_multiple: ClassVar[int] = 1
    trailer: ClassVar[bytes] = b""

    def __init__(self, wanted: Path, timing: Timing) -> None:
        self.wanted = wanted
        self.timing = timing
        self.frames = 0
        self.last_offset = 0  # of the last frame's block
        self.file: GrowingFile | None = None

    @property
    def path(self) -> Path | None:
        return None if self.file is None else self.file.path

    def add(self, image: Image.Image, duration_ms: int) -> None:
        block = self.block(image, duration_ms)
        if self.file is None:
            header = self.header(image, block)
            self.file = GrowingFile(self.wanted, header + block, self.trailer)
            self.last_offset, self.frames = len(header), 1
        else:
            size = self.file.append(block)
            self.last_offset = size - len(self.trailer) - len(block)
            self.frames += 1
            self.settle(self.file, size)

    def finish(self) -> None:
        if self.file is None:
            return
        try:
            self.hold(self.file)
        finally:
            self.file.close()

    @abstractmethod
    def header(self, image: Image.Image, block: bytes) -> bytes:
        """What stands before the first block."""

    @abstractmethod
    def block(self, image: Image.Image, duration_ms: int) -> bytes:
        """One frame, encoded."""

    def settle(self, file: GrowingFile, size: int) -> None:  # noqa: B027 (a GIF need not)
        """Tell the header that the file has one more frame and `size` bytes."""

    @abstractmethod
    def hold(self, file: GrowingFile) -> None:
        """Give the last frame its longer time."""


class Gif(GrowingAnimation):
    """GIF89a; source: https://www.w3.org/Graphics/GIF/spec-gif89a.txt .

    Each frame has 255 colours, its own or those of the frame before it if they fit. Where it is
    near enough to what is shown already, or to what that was made of, it is transparent: most of a
    picture that is nearly done, which then does not flicker.
    """

    trailer = b";"
    _shown: Image.Image | None = None  # in the colours of its frames
    _meant: Image.Image | None = None  # what it was made of

    def __init__(self, wanted: Path, timing: Timing) -> None:
        super().__init__(wanted, timing)
        self._colours = _Colours()
        self._scratch = _scratch_file()
        weakref.finalize(self, self._scratch.close)

    def header(self, image: Image.Image, block: bytes) -> bytes:
        screen = struct.pack("<6sHH3B", b"GIF89a", *image.size, 0x70, 0, 0)
        if self.timing.loop == 1:
            return screen
        repeats = max(0, self.timing.loop - 1)  # 0 is forever; else how often after the first time
        return screen + struct.pack("<3s11sBBHB", b"!\xff\x0b", b"NETSCAPE2.0", 3, 1, repeats, 0)

    def block(self, image: Image.Image, duration_ms: int) -> bytes:
        is_noise, flags = _is_noise(image), GIF_KEEP
        shown = picture = self._colours.of(image, is_noise=is_noise)
        # nothing of one noise is near another
        if self._shown is not None and self._meant is not None and not is_noise:
            before, shown = self._shown.convert("RGB"), picture.convert("RGB")
            near = _within(image, before, GIF_UNSEEN_LEVELS)
            same = ImageChops.lighter(near, _within(image, self._meant, GIF_UNCHANGED_LEVELS))
            picture.paste(GIF_TRANSPARENT, mask=same)
            shown.paste(before, mask=same)
            image = image.copy()
            image.paste(self._meant, mask=same)
            flags |= GIF_HAS_TRANSPARENT
        self._shown, self._meant = shown, image
        control = struct.pack("<3sBHBB", b"!\xf9\x04", flags, duration_ms // 10, GIF_TRANSPARENT, 0)
        return control + _gif_picture(picture, self._scratch)

    def hold(self, file: GrowingFile) -> None:
        file.patch(self.last_offset + 4, struct.pack("<H", self.timing.hold_last_ms // 10))


# Both were found by `benchmarks/animation.py`, as was the way colours are chosen: an octree takes a
# hundredth of the time of Pillow's other ways, and is no worse.
GIF_UNSEEN_LEVELS = 6
GIF_UNCHANGED_LEVELS = 2
GIF_NOISE_LEVELS = 6.0
GIF_WORSE_COLOURS = 1.05
GIF_OTHER_NOISE_LEVELS = 8.0
GIF_TRANSPARENT = 255
GIF_KEEP, GIF_HAS_TRANSPARENT = 1 << 2, 1


class _Colours:
    """255 colours for one picture after the other, chosen anew when they do not fit any more.

    They come from a sample of the pixels. Pillow remembers which colour is nearest to what, for as
    long as a palette is used: with a new one for each frame, finding that out anew is most of what
    a GIF costs.
    """

    def __init__(self) -> None:
        self._palette: Image.Image | None = None
        self._error = 0.0  # of the sample that they were made of
        self._noise: _NoiseColours | None = None

    def of(self, image: Image.Image, *, is_noise: bool) -> Image.Image:
        """`image` in 255 colours; dithered, unless it is noise, which has no bands to hide."""
        sample = image.resize(
            (min(64, image.width), min(64, image.height)), Image.Resampling.NEAREST
        )
        if is_noise:
            self._palette = None
            if self._noise is None or not self._noise.fit(sample):
                self._noise = _NoiseColours(sample)
            return self._noise.of(image)
        self._noise = None
        if self._palette is None or not self._fit(sample, self._palette):
            self._palette = sample.quantize(255, Image.Quantize.FASTOCTREE)
            self._error = _error(sample, self._palette)
        return image.quantize(palette=self._palette, dither=Image.Dither.FLOYDSTEINBERG)

    def _fit(self, sample: Image.Image, palette: Image.Image) -> bool:
        return _error(sample, palette) <= GIF_WORSE_COLOURS * self._error


class _NoiseColours:
    """255 colours for noise, found through a table of 16 levels of each channel.

    Noise has pixels of all colours, so that Pillow would have nothing to remember for long.
    """

    def __init__(self, sample: Image.Image) -> None:
        palette = sample.quantize(255, Image.Quantize.FASTOCTREE).getpalette() or []
        colours = np.array(palette, np.float32).reshape(-1, 3)[:255]
        middles = 16 * np.arange(16, dtype=np.float32) + 7.5
        red, green, blue = np.square(middles[:, None] - colours.T[:, None])  # (16, colours)
        green_blue = green[:, None] + blue
        table = np.stack([(one + green_blue).argmin(-1) for one in red])
        self._table = table.astype(np.uint8).reshape(-1)
        self._palette = self._means(sample, colours).round().astype(np.uint8).tobytes()
        self._spread = _spread(sample)

    def fit(self, sample: Image.Image) -> bool:
        """Of noise no two samples are alike, but they are of the same kind for some time."""
        return bool(np.abs(_spread(sample) - self._spread).max() <= GIF_OTHER_NOISE_LEVELS)

    def of(self, image: Image.Image) -> Image.Image:
        """`image` in these colours."""
        picture = Image.fromarray(self._found(np.asarray(image)))
        picture.putpalette(self._palette)
        return picture

    def _found(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) -> (H, W): which of the colours each pixel gets."""
        levels = pixels >> 4
        places = levels[..., 0].astype(np.intp)
        for channel in (1, 2):
            places <<= 4
            places |= levels[..., channel]
        return self._table.take(places)

    def _means(self, sample: Image.Image, colours: NDArray[np.float32]) -> NDArray[np.float64]:
        """Of the pixels that get each colour; the colour itself where none does."""
        pixels = np.asarray(sample)
        found = self._found(pixels).reshape(-1)
        counts = np.bincount(found, minlength=len(colours))
        sums = [np.bincount(found, levels, len(colours)) for levels in pixels.reshape(-1, 3).T]
        means = np.stack(sums, axis=1) / np.maximum(counts, 1)[:, None]
        return np.where(counts[:, None] > 0, means, colours)


def _error(image: Image.Image, palette: Image.Image) -> float:
    """Mean difference, in levels, when shown without dither."""
    shown = image.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
    return sum(ImageStat.Stat(ImageChops.difference(image, shown)).mean)


def _spread(image: Image.Image) -> NDArray[np.float64]:
    """Mean and standard deviation of each channel, in levels."""
    levels, pixels = np.arange(256), image.width * image.height
    shares = np.array(image.histogram()).reshape(3, 256) / pixels
    mean = shares @ levels
    return np.concatenate([mean, np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0.0))])


def _is_noise(image: Image.Image) -> bool:
    """Whether neighbours differ much, on average over some of the rows."""
    rows = image.resize((image.width, min(32, image.height)), Image.Resampling.NEAREST)
    levels = np.asarray(rows).astype(np.int16)
    return bool(image.width > 1 and np.abs(np.diff(levels, axis=1)).mean() > GIF_NOISE_LEVELS)


def _within(image: Image.Image, other: Image.Image, levels: int) -> Image.Image:
    """A mask of the pixels that differ by no more than so many levels in any channel."""
    red, green, blue = ImageChops.difference(image, other).split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return most.point([255 if level <= levels else 0 for level in range(256)])


def _scratch_file() -> IO[bytes]:
    """A file without a name, or memory where none can be had."""
    try:
        return tempfile.TemporaryFile(prefix="sd-progress-", buffering=0)
    except OSError:
        return io.BytesIO()


def _gif_picture(image: Image.Image, scratch: IO[bytes]) -> bytes:
    """Image descriptor, colour table and pixels of a palette image, from Pillow's one-frame GIF.

    Into a file, Pillow encodes without holding up the run's thread; into memory, all of Python
    waits for it.
    """
    image.putpalette(bytes(image.getpalette() or ()).ljust(768, b"\0"))  # one table has all 256
    scratch.seek(0)
    image.save(scratch, "GIF", interlace=False, optimize=False)
    size = scratch.tell()
    scratch.seek(0)
    data = scratch.read(size)
    start = _GIF_TABLE.stop
    while data[start : start + 1] == b"!":  # an extension: sub-blocks up to an empty one
        start += 2
        while data[start]:
            start += 1 + data[start]
        start += 1
    return data[start : start + 9] + b"\x87" + data[_GIF_TABLE] + data[start + 10 : -1]


_GIF_TABLE = slice(13, 13 + 768)


class Apng(GrowingAnimation):
    """Animated PNG; source: https://www.w3.org/TR/png-3/#apng-frame-based-animation ."""

    trailer = b"\0\0\0\0IEND\xaeB`\x82"

    def header(self, image: Image.Image, block: bytes) -> bytes:
        head = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + self._frame_count(1)

    def block(self, image: Image.Image, duration_ms: int) -> bytes:
        sequence = max(0, 2 * self.frames - 1)  # the first picture's own chunk has no number
        self._size = image.size
        pixels = b"".join(_png_chunks(png_bytes(image), b"IDAT"))
        control = self._control(sequence, duration_ms)
        if sequence == 0:
            return control + _png_chunk(b"IDAT", pixels)
        return control + _png_chunk(b"fdAT", struct.pack(">I", sequence + 1) + pixels)

    def settle(self, file: GrowingFile, size: int) -> None:
        file.patch(33, self._frame_count(self.frames))

    def hold(self, file: GrowingFile) -> None:
        sequence = max(0, 2 * self.frames - 3)
        file.patch(self.last_offset, self._control(sequence, self.timing.hold_last_ms))

    def _frame_count(self, frames: int) -> bytes:
        return _png_chunk(b"acTL", struct.pack(">II", frames, self.timing.loop))

    def _control(self, sequence: int, duration_ms: int) -> bytes:
        place = struct.pack(">5I", sequence, *self._size, 0, 0)
        return _png_chunk(b"fcTL", place + struct.pack(">HHBB", duration_ms, 1000, 0, 0))


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_chunks(png: bytes, name: bytes) -> Iterator[bytes]:
    offset = 8
    while offset < len(png):
        length = int.from_bytes(png[offset : offset + 4], "big")
        if png[offset + 4 : offset + 8] == name:
            yield png[offset + 8 : offset + 8 + length]
        offset += 12 + length


class Webp(GrowingAnimation):
    """Animated WebP; source: https://developers.google.com/speed/webp/docs/riff_container .

    Its length stands in its first bytes, and readers do not look beyond it.
    """

    def header(self, image: Image.Image, block: bytes) -> bytes:
        canvas = bytes([2, 0, 0, 0]) + _int24(image.width - 1) + _int24(image.height - 1)
        chunks = _riff_chunk(b"VP8X", canvas)
        chunks += _riff_chunk(b"ANIM", struct.pack("<IH", 0, self.timing.loop))
        return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks) + len(block), b"WEBP") + chunks

    def block(self, image: Image.Image, duration_ms: int) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=90, method=4)
        place = _int24(0) * 2 + _int24(image.width - 1) + _int24(image.height - 1)
        control = place + _int24(duration_ms) + b"\x02"  # 2: replaces the one before
        return _riff_chunk(b"ANMF", control + buffer.getvalue()[12:])

    def settle(self, file: GrowingFile, size: int) -> None:
        file.patch(4, struct.pack("<I", size - 8))

    def hold(self, file: GrowingFile) -> None:
        file.patch(self.last_offset + 20, _int24(self.timing.hold_last_ms))


def _riff_chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _int24(value: int) -> bytes:
    return value.to_bytes(3, "little")


class Mp4:
    """H.264 in yuv420p with its index in front, which browsers play; encoded by ffmpeg.

    One frame rate, one frame per tick: what stays longer is sent as often as fits best.
    """

    side_multiple: ClassVar[int] = 2

    def __init__(self, wanted: Path, timing: Timing) -> None:
        self.path: Path | None = None
        self._wanted = wanted
        self._timing = timing
        self._temporary = temporary_path(wanted.parent)
        self._ffmpeg: Generator[None, bytes | None, None] | None = None
        self._last = b""
        self._last_ticks = 0
        self._frames = 0

    def add(self, image: Image.Image, duration_ms: int) -> None:
        if self._ffmpeg is None:
            self._ffmpeg = self._started(image.size)
        self._last = image.tobytes()
        self._last_ticks = max(1, round(duration_ms / self._timing.tick_ms))
        self._send(self._last_ticks)

    def finish(self) -> None:
        if self._ffmpeg is None:
            return
        try:
            ticks = round(self._timing.hold_last_ms / self._timing.tick_ms)
            self._send(max(0, ticks - self._last_ticks))
            self._stop()
            self._check()
            self.path = publish(self._temporary, self._wanted)
        finally:
            self._stop()
            self._temporary.unlink(missing_ok=True)

    def _started(self, size: Size) -> Generator[None, bytes | None, None]:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        self._wanted.parent.mkdir(parents=True, exist_ok=True)
        ffmpeg: Generator[None, bytes | None, None] = imageio_ffmpeg.write_frames(
            str(self._temporary),
            size,
            fps=1000 / self._timing.tick_ms,
            quality=8,
            macro_block_size=self.side_multiple,
            ffmpeg_log_level="fatal",
            output_params=["-movflags", "+faststart", "-f", "mp4"],
        )
        ffmpeg.send(None)
        return ffmpeg

    def _send(self, times: int) -> None:
        assert self._ffmpeg is not None
        for _ in range(times):
            try:
                self._ffmpeg.send(self._last)
            except (OSError, StopIteration) as error:
                expected = (
                    f"ffmpeg must stay alive to encode {self._wanted.name}, got its early end"
                )
                raise OSError(f"{expected}; look whether the disk is full") from error
            self._frames += 1

    def _stop(self) -> None:
        if self._ffmpeg is not None:
            self._ffmpeg.close()
            self._ffmpeg = None

    def _check(self) -> None:
        """Ask ffmpeg what is in the file, because its writing fails in silence."""
        import imageio_ffmpeg

        try:
            found = imageio_ffmpeg.count_frames_and_secs(str(self._temporary))[0]
        except (OSError, RuntimeError):
            found = 0
        if found != self._frames:
            expected = f"{self._wanted.name} must hold {self._frames} frames"
            raise OSError(f"{expected}, got {found}; look whether the disk is full")


FORMATS: dict[str, type[Animation]] = {
    ".gif": Gif,
    ".webp": Webp,
    ".png": Apng,
    ".apng": Apng,
    ".mp4": Mp4,
}


def png_bytes(image: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """`image` as a PNG, with `text` as its text chunks."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    # runs only: of pictures a little smaller than what searches further, and several times faster
    image.save(buffer, "PNG", pnginfo=chunks, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
