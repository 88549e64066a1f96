"""Where frames go: read back with other readers, with real queues, processes and full disks."""

import asyncio
import errno
import gc
import json
import multiprocessing
import os
import queue
import re
import signal
import struct
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sd_progress import writers
from sd_progress.frame import Frame
from sd_progress.writers import (
    AnimationWriter,
    CallableWriter,
    ContactSheetWriter,
    PngFolderWriter,
    QueueWriter,
    Writer,
    writer_for,
)

GROWING = (".gif", ".png", ".webp")
RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def picture(colour=None, size=(32, 24), seed=0):
    """(1, H, W, 3) uint8: one colour, or noise; `size` is (width, height)."""
    if colour is not None:
        return np.full((1, size[1], size[0], 3), colour, np.uint8)
    return np.random.default_rng(seed).integers(0, 256, (1, size[1], size[0], 3), np.uint8)


def frame(step_index=0, num_steps=4, colour=None, size=(32, 24), source="denoised"):
    images = picture(colour, size, seed=step_index + 1)
    return Frame(images, step_index, num_steps, 981.0, 14.6, source, "linear:sd1", 0.5, None)


def clip_frame(step_index=0, colours=(RED, GREEN, BLUE), clips=1, **options):
    """(B, F, H, W, 3): clips that go through the colours, or through noise where one is None."""
    single = frame(step_index, **options)
    size = single.images.shape[2:0:-1]
    noise_or_colour = [picture(colour, size, seed=i)[0] for i, colour in enumerate(colours)]
    return replace(single, images=np.stack([np.stack(noise_or_colour)] * clips))


def write_run(writer, count=3, **options):
    frames = [frame(i, count, **options) for i in range(count)]
    for each in frames:
        writer.write(each)
    writer.close()
    return frames


def names(folder):
    """All names in the folder, hidden ones too."""
    return sorted(path.name for path in Path(folder).iterdir())


def gif_delays(data):
    """The delays of a GIF's pictures in ms, by walking its blocks; every block must be whole."""
    skip_table = lambda flags: 3 << (flags & 7) + 1 if flags & 0x80 else 0  # noqa: E731
    offset, delays = 13 + skip_table(data[10]), []
    while data[offset] != ord(";"):
        if data[offset] == ord("!"):
            if data[offset + 1] == 0xF9:
                delays.append(10 * struct.unpack_from("<H", data, offset + 4)[0])
            offset += 2
        else:
            assert data[offset] == ord(",")
            offset += 11 + skip_table(data[offset + 9])
        while data[offset]:
            offset += 1 + data[offset]
        offset += 1
    return delays


def pillow_frames(path):
    with Image.open(path) as file:
        for index in range(file.n_frames):
            file.seek(index)
            yield np.asarray(file.convert("RGB"), int), round(file.info["duration"])


def ffmpeg_frames(path, size):
    """What ffmpeg says of a video, and its frames (N, H, W, 3)."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24"]
    run = subprocess.run([*command, "-"], capture_output=True, check=True)
    frames = np.frombuffer(run.stdout, np.uint8).astype(int)
    return run.stderr.decode(), frames.reshape(-1, size[1], size[0], 3)


def python(code, *arguments):
    """Another Python process that has this module's names."""
    command = [sys.executable, "-c", f"from test_writers import *\n{code}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


# PNG folders


def test_a_png_folder_names_its_files_by_step(tmp_path):
    """Noise is step_000, the first step step_001, the finished picture final."""
    writer = PngFolderWriter(tmp_path / "deep" / "steps")
    for step_index, source in ((-1, "noisy"), (0, "denoised"), (3, "denoised"), (3, "final")):
        writer.write(frame(step_index, source=source))
    writer.close()
    assert names(writer.path) == ["final.png", "step_000.png", "step_001.png", "step_004.png"]


def test_step_numbers_are_as_wide_as_the_runs_last(tmp_path):
    """Names sort in the order of the steps also in a run of a thousand."""
    writer = PngFolderWriter(tmp_path)
    writer.write(frame(8, num_steps=1000))
    writer.close()
    assert names(tmp_path) == ["step_0009.png"]


def test_a_png_has_the_exact_pixels_and_says_where_they_are_from(tmp_path):
    """Another reader finds the frame's pixels, and its metadata as text chunks."""
    written = write_run(PngFolderWriter(tmp_path), count=1)[0]
    with Image.open(tmp_path / "step_001.png") as file:
        assert file.text == written.metadata()
        assert file.text["timestep"] == "981.0"
    np.testing.assert_array_equal(imageio.imread(tmp_path / "step_001.png"), written.images[0])


def test_a_png_folder_enlarges_by_a_whole_factor(tmp_path):
    """With nearest, each pixel becomes a square; the shorter side reaches the minimum."""
    written = write_run(PngFolderWriter(tmp_path, min_side_px=50), count=1)[0]
    enlarged = imageio.imread(tmp_path / "step_001.png")
    np.testing.assert_array_equal(enlarged, np.kron(written.images[0], np.ones((3, 3, 1), int)))


def test_a_second_run_goes_to_a_new_folder(tmp_path):
    """One writer's runs never mix, and a process that comes later does not join them."""
    writer = PngFolderWriter(tmp_path / "v1.5")
    write_run(writer, count=2)
    untouched = (tmp_path / "v1.5").stat().st_mtime_ns
    write_run(writer, count=1)
    assert writer.path == tmp_path / "v1.5-2"
    write_run(PngFolderWriter(tmp_path / "v1.5"), count=1)
    assert (tmp_path / "v1.5").stat().st_mtime_ns == untouched
    assert [len(names(tmp_path / name)) for name in ("v1.5", "v1.5-2", "v1.5-3")] == [2, 1, 1]


def test_a_folder_with_other_things_is_used(tmp_path):
    """Only an earlier run's pictures send a run elsewhere."""
    (tmp_path / "notes.txt").write_text("mine")
    writer = PngFolderWriter(tmp_path)
    write_run(writer, count=1)
    assert writer.path == tmp_path
    assert names(tmp_path) == ["notes.txt", "step_001.png"]


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    """The folder is taken by the first write, not by the first picture that is seen."""
    first, second = PngFolderWriter(tmp_path / "steps"), PngFolderWriter(tmp_path / "steps")
    first.write(frame(0))
    (first.path / "step_001.png").unlink()
    second.write(frame(0))
    assert (first.path.name, second.path.name) == ("steps", "steps-2")
    first.close()
    second.close()


def test_the_lock_of_a_killed_process_only_costs_the_name(tmp_path):
    """A stale lock sends the run to the next folder, instead of making it wait."""
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / ".sd-progress.lock").touch()
    writer = PngFolderWriter(tmp_path / "steps")
    write_run(writer, count=1)
    assert names(writer.path) == ["step_001.png"]
    assert writer.path.name == "steps-2"


def test_a_step_of_a_video_is_a_contact_sheet(tmp_path):
    """One PNG with every frame of every clip, and the metadata as ever."""
    written = clip_frame(clips=2, size=(8, 6))
    writer = PngFolderWriter(tmp_path)
    writer.write(written)
    writer.close()
    sheet = imageio.imread(tmp_path / "step_001.png")
    assert sheet.shape == (2 * 6, 3 * 8, 3)
    assert sheet[9, 4::8].tolist() == [list(RED), list(GREEN), list(BLUE)]
    with Image.open(tmp_path / "step_001.png") as file:
        assert file.text == written.metadata()


def test_a_step_of_a_video_is_a_folder_of_frames_where_asked(tmp_path):
    """A folder for each step, with as many files as the step has frames, and their pixels."""
    writer = PngFolderWriter(tmp_path, video="frames")
    steps = [clip_frame(0, [None]), clip_frame(3, [None] * 3), clip_frame(3, source="final")]
    for each in steps:
        writer.write(each)
    writer.close()
    assert names(tmp_path) == ["final", "step_001", "step_004"]
    for folder, written in zip(("step_001", "step_004", "final"), steps, strict=True):
        found = [imageio.imread(path) for path in sorted((tmp_path / folder).glob("frame_*.png"))]
        np.testing.assert_array_equal(found, written.images[0])


def test_a_frame_of_a_video_says_which_it_is(tmp_path):
    """The step's metadata and the frame's index; clips are side by side, and enlarged."""
    written = clip_frame(clips=2, size=(8, 6))
    writer = PngFolderWriter(tmp_path, video="frames", min_side_px=12)
    writer.write(written)
    writer.close()
    assert names(tmp_path / "step_001") == ["frame_000.png", "frame_001.png", "frame_002.png"]
    with Image.open(tmp_path / "step_001" / "frame_001.png") as file:
        assert file.text == {**written.metadata(), "frame_index": "1"}
        assert file.getcolors() == [(2 * 16 * 12, GREEN)]


def test_frame_numbers_are_as_wide_as_the_last(tmp_path):
    """Names sort in the order of the frames also in a clip of more than a thousand."""
    writer = PngFolderWriter(tmp_path, video="frames")
    writer.write(clip_frame(colours=[RED] * 1001, size=(1, 1)))
    writer.close()
    found = names(tmp_path / "step_001")
    assert (len(found), found[9], found[-1]) == (1001, "frame_0009.png", "frame_1000.png")


def test_images_need_no_folder_of_frames(tmp_path):
    """A run of images is one PNG a step, whatever is asked of videos."""
    write_run(PngFolderWriter(tmp_path, video="frames"), count=2)
    assert names(tmp_path) == ["step_001.png", "step_002.png"]


@pytest.mark.parametrize("video", ["sheet", "frames"])
def test_a_folder_with_an_earlier_runs_clips_is_left_alone(tmp_path, video):
    """Frames of single steps, or of the finished video alone, send the next run elsewhere."""
    for name, source in (("steps", "denoised"), ("steps-2", "final")):
        writer = PngFolderWriter(tmp_path / "steps", video="frames")
        writer.write(clip_frame(source=source))
        writer.close()
        assert writer.path.name == name
    writer = PngFolderWriter(tmp_path / "steps", video=video)
    writer.write(clip_frame())
    assert (writer.path.name, names(tmp_path / "steps")) == ("steps-3", ["step_001"])
    writer.close()


def test_a_folder_of_frames_is_never_overwritten(tmp_path):
    """A step that is already there is an OSError; its files stay, and nothing is left over."""
    writer = PngFolderWriter(tmp_path, video="frames")
    writer.write(clip_frame(colours=[RED, RED]))
    with pytest.raises(OSError, match="step_001"):
        writer.write(clip_frame(colours=[BLUE]))
    writer.close()
    assert names(tmp_path) == ["step_001"]
    assert names(tmp_path / "step_001") == ["frame_000.png", "frame_001.png"]
    assert (imageio.imread(tmp_path / "step_001" / "frame_000.png") == RED).all()


def test_a_full_disk_leaves_no_part_of_a_clip(tmp_path):
    """A step's frames appear all or not at all, and what came before is still there."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
writer = PngFolderWriter(sys.argv[1], video="frames")
writer.write(clip_frame(0, size=(256, 256)))
try:
    writer.write(clip_frame(1, [RED, None], size=(256, 256)))
except OSError as error:
    print(error.errno == errno.EFBIG)
writer.close()
"""
    assert python(code, tmp_path).communicate()[0] == "True\n"
    assert names(tmp_path) == ["step_001"]
    assert len(names(tmp_path / "step_001")) == 3


def test_a_killed_process_leaves_whole_clips(tmp_path):
    """After SIGKILL in the middle of a step, the steps that are there have all their frames."""
    code = """
writer = PngFolderWriter(sys.argv[1], video="frames")
for i in range(10_000):
    writer.write(clip_frame(i, [None] * 30, size=(128, 128)))
"""
    with python(code, tmp_path) as process:
        while len(names(tmp_path)) < 5:  # the lock, three steps, and the beginning of a fourth
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    steps = list(tmp_path.glob("step_*"))
    assert len(steps) >= 3
    assert [len(names(step)) for step in steps] == [30] * len(steps)


# Animations


@pytest.mark.parametrize("suffix", GROWING)
def test_an_animation_is_complete_after_every_frame(tmp_path, suffix):
    """Another reader finds as many whole frames as were written, before the run is closed."""
    writer = AnimationWriter(tmp_path / f"run{suffix}", min_side_px=None)
    for count in range(1, 5):
        writer.write(frame(count - 1))
        assert len(list(pillow_frames(writer.path))) == count
    writer.close()
    assert names(tmp_path) == [f"run{suffix}"]


@pytest.mark.parametrize(("suffix", "error"), [(".gif", 25), (".png", 0), (".webp", 25)])
def test_an_animation_shows_what_was_written(tmp_path, suffix, error):
    """Each frame's pixels come back: exactly from APNG, nearly from GIF and WebP."""
    writer = AnimationWriter(tmp_path / f"run{suffix}", min_side_px=None, resample="nearest")
    gradient = np.linspace([0, 0, 255], [255, 128, 0], 48)[:, None].repeat(64, 1)
    shown = [gradient, gradient[::-1], gradient[:, ::-1] // 2]
    for i, pixels in enumerate(shown):
        writer.write(Frame(pixels[None].astype(np.uint8), i, 3, None, None, "noisy", "", 0.0, None))
    writer.close()
    for (found, _), pixels in zip(pillow_frames(writer.path), shown, strict=True):
        assert np.abs(found - pixels.astype(np.uint8)).max() <= error


def gif_of(tmp_path, *shown):
    """A GIF of these pictures, and its size after each."""
    writer = AnimationWriter(tmp_path / "run.gif", min_side_px=None)
    sizes = []
    for i, pixels in enumerate(shown):
        writer.write(Frame(pixels[None], i, len(shown), None, None, "noisy", "", 0.0, None))
        sizes.append(writer.path.stat().st_size)
    writer.close()
    return writer.path, sizes


def smooth(height=96, width=128):
    """A gradient in all three channels."""
    across = np.linspace([20, 60, 200], [220, 160, 40], width)[None].repeat(height, 0)
    return (across + np.linspace(0, 30, height)[:, None, None]).astype(np.uint8)


def test_what_does_not_change_in_a_gif_does_not_flicker(tmp_path):
    """A change that nobody sees is not written: the same pixels stay, for next to no bytes."""
    first = smooth()
    path, sizes = gif_of(tmp_path, first, first + 2, first + 60)
    shown = [pixels for pixels, _ in pillow_frames(path)]
    np.testing.assert_array_equal(shown[0], shown[1])
    assert np.abs(shown[2] - (first + 60)).mean() < 4
    assert sizes[1] - sizes[0] < (sizes[2] - sizes[1]) / 3


def test_a_gif_of_a_smooth_picture_has_no_bands(tmp_path):
    """Dithered: on average over a few pixels it is nearer than any of its colours."""
    picture = smooth()
    path, _ = gif_of(tmp_path, picture)
    ((shown, _),) = pillow_frames(path)
    blocks = (shown - picture.astype(int)).reshape(24, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(blocks).mean() < 0.5 * np.abs(shown - picture.astype(int)).mean()


@pytest.mark.parametrize("suffix", GROWING)
def test_the_last_frame_is_held(tmp_path, suffix):
    """Every frame has its duration, and the last one of a complete run a longer one."""
    writer = AnimationWriter(tmp_path / f"run{suffix}", duration_ms=50, hold_last_ms=700)
    write_run(writer, count=4)
    assert [duration for _, duration in pillow_frames(writer.path)] == [50, 50, 50, 700]


def test_a_gif_of_noise_has_colours_as_good_as_pillows(tmp_path):
    """Whether or not the kind of noise changes, and of few colours or many."""
    kinds = [
        np.random.default_rng(k).normal(128, spread, (96, 96, 3))
        for k, spread in enumerate((20, 21, 60, 60, 90))
    ]
    pictures = [kind.clip(0, 255).astype(np.uint8) for kind in kinds]
    pictures.append((pictures[0] > 128).astype(np.uint8) * 200)
    writer = AnimationWriter(tmp_path / "noise.gif", min_side_px=None)
    for index, pixels in enumerate(pictures):
        writer.write(replace(frame(index, len(pictures)), images=pixels[None]))
    writer.close()
    for pixels, shown in zip(pictures, imageio.imread(tmp_path / "noise.gif"), strict=True):
        own = Image.fromarray(pixels).quantize(255, Image.Quantize.FASTOCTREE).convert("RGB")
        error, others = (np.square(x - pixels.astype(float)).mean() for x in (shown, own))
        assert error <= 1.1 * others + 1


def test_a_gif_needs_no_folder_for_temporary_files(tmp_path, monkeypatch):
    """It is the same file without."""
    for name, folder in (("with.gif", tmp_path), ("without.gif", tmp_path / "missing")):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        writer = AnimationWriter(tmp_path / name)
        for index in range(3):
            writer.write(frame(index))
        writer.close()
    assert (tmp_path / "with.gif").read_bytes() == (tmp_path / "without.gif").read_bytes()


def test_a_gif_has_no_byte_out_of_place(tmp_path):
    """Walked block by block, the file ends with its trailer; so it does after one frame."""
    writer = AnimationWriter(tmp_path / "run.gif", duration_ms=120)
    writer.write(frame(0))
    assert gif_delays(writer.path.read_bytes()) == [120]
    writer.write(frame(1))
    writer.close()
    data = writer.path.read_bytes()
    assert gif_delays(data) == [120, 1500]
    assert data.endswith(b"\0;")


@pytest.mark.parametrize("suffix", GROWING)
def test_a_reader_at_any_moment_finds_a_whole_file(tmp_path, suffix):
    """What is on disk between any two writes of the operating system is a playable file."""
    wanted, seen = tmp_path / f"run{suffix}", []
    writer = AnimationWriter(wanted, min_side_px=None)
    writer.write(frame(0))

    class Watched:
        """The file, looked at by Pillow after each single write."""

        def __init__(self, handle):
            self.seek, self.truncate, self.close = handle.seek, handle.truncate, handle.close
            self._write = handle.write

        def write(self, data):
            count = self._write(data)
            seen.append(len(list(pillow_frames(wanted))))
            return count

    file = writer._open.file
    file._handle = Watched(file._handle)
    writer.write(frame(1))
    writer.close()
    assert seen[0] == 1
    assert seen[-1] == 2


@pytest.mark.parametrize(("loop", "repeats"), [(0, b"\0\0"), (1, None), (3, b"\2\0")])
def test_a_gif_plays_as_often_as_asked(tmp_path, loop, repeats):
    """The application block counts the times after the first; without it, a GIF plays once."""
    writer = AnimationWriter(tmp_path / "run.gif", loop=loop)
    write_run(writer)
    _, found, rest = writer.path.read_bytes().partition(b"NETSCAPE2.0\3\1")
    assert (rest[:2] if found else None) == repeats


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_apng_and_a_webp_play_as_often_as_asked(tmp_path, suffix):
    """Both formats count how often the animation plays in all."""
    writer = AnimationWriter(tmp_path / f"run{suffix}", loop=3)
    write_run(writer)
    with Image.open(writer.path) as file:
        assert file.info["loop"] == 3


def test_an_existing_file_is_left_alone(tmp_path):
    """A name that is taken, by whatever, sends the run to the next one."""
    (tmp_path / "run.gif").write_bytes(b"precious")
    writer = AnimationWriter(tmp_path / "run.gif")
    write_run(writer)
    write_run(writer)
    assert names(tmp_path) == ["run-2.gif", "run-3.gif", "run.gif"]
    assert (tmp_path / "run.gif").read_bytes() == b"precious"


def test_a_file_system_without_links_works_too(tmp_path, monkeypatch):
    """Where hard links are refused, files appear under the first free name all the same."""

    def refuse(source, target):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "run.gif").write_bytes(b"precious")
    write_run(AnimationWriter(tmp_path / "run.gif"))
    assert (tmp_path / "run.gif").read_bytes() == b"precious"
    assert len(gif_delays((tmp_path / "run-2.gif").read_bytes())) == 3
    assert names(tmp_path) == ["run-2.gif", "run.gif"]


def test_the_first_frame_makes_the_canvas(tmp_path):
    """It is enlarged until its shorter side is long enough; later frames are fitted into it."""
    writer = AnimationWriter(tmp_path / "run.png", min_side_px=48)
    writer.write(frame(0, colour=RED))
    writer.write(frame(1, colour=RED, size=(128, 96)))
    writer.write(frame(2, colour=RED, size=(16, 96)))
    writer.close()
    small, large, narrow = (pixels for pixels, _ in pillow_frames(writer.path))
    assert small.shape == large.shape == (48, 64, 3)
    assert (large == RED).all()
    assert (narrow[:, 32] == RED).all()
    assert (narrow[:, (0, -1)] == 0).all()


@pytest.mark.parametrize("suffix", [*GROWING, ".mp4"])
def test_an_animation_keeps_no_frame(tmp_path, suffix):
    """Memory does not grow with the run: a frame that is written is forgotten."""
    writer = AnimationWriter(tmp_path / f"run{suffix}")
    given = frame(0)
    forgotten = weakref.ref(given)
    writer.write(given)
    del given
    gc.collect()
    assert forgotten() is None
    writer.close()


def test_an_mp4_plays_in_browsers(tmp_path):
    """H.264 in yuv420p, even sides, the index in front, the last frame repeated; no leftovers."""
    writer = AnimationWriter(tmp_path / "run.mp4", hold_last_ms=500, min_side_px=None)
    write_run(writer, count=3, size=(33, 25), colour=RED)
    data = writer.path.read_bytes()
    about, frames = ffmpeg_frames(writer.path, (34, 26))
    assert re.search(r"Video: h264 .*yuv420p.* 34x26.* 10 fps", about)
    assert frames.shape == (3 - 1 + 5, 26, 34, 3)
    assert np.abs(frames - np.array(RED)).max() < 16
    assert data.find(b"moov") < data.find(b"mdat")
    assert names(tmp_path) == ["run.mp4"]


def test_an_mp4_without_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    """The missing extra is named at construction, before the run."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sd-progress\[mp4\]"'):
        writer_for(tmp_path / "run.mp4")


def main_colours(path):
    """What each frame of an animation shows most."""
    with Image.open(path) as file:
        for index in range(file.n_frames):
            file.seek(index)
            yield max(file.convert("RGB").getcolors(1 << 20))[1]


def test_an_animation_of_a_video_has_the_middle_frames(tmp_path):
    """One frame a step, from the middle of its clip; of a clip of one, that one."""
    writer = AnimationWriter(tmp_path / "run.png")
    for i, colours in enumerate([(RED,), (RED, GREEN, BLUE), (RED, RED, BLUE, GREEN)]):
        writer.write(clip_frame(i, colours))
    writer.close()
    assert list(main_colours(writer.path)) == [RED, GREEN, BLUE]


@pytest.mark.parametrize("suffix", GROWING)
def test_every_steps_clip_plays_where_asked(tmp_path, suffix):
    """All frames of all steps, each for its time; a still for a picture's; the last is held."""
    wanted = tmp_path / f"run{suffix}"
    options = {"duration_ms": 200, "clip_frame_ms": 40, "hold_last_ms": 700}
    writer = AnimationWriter(wanted, video="clip", **options)
    for i, frames in enumerate((1, 3, 2)):
        writer.write(clip_frame(i, [None] * frames))
        assert len(list(pillow_frames(wanted))) == (1, 4, 6)[i]
    writer.close()
    assert [duration for _, duration in pillow_frames(wanted)] == [200, 40, 40, 40, 40, 700]


def test_frames_of_clips_are_shown_in_order(tmp_path):
    """Step after step; clips of a batch side by side; a picture's time is the default."""
    writer = AnimationWriter(tmp_path / "run.png", video="clip", min_side_px=None, duration_ms=60)
    writer.write(clip_frame(0, clips=2))
    writer.write(clip_frame(1, (BLUE, RED), clips=2))
    writer.close()
    assert list(main_colours(writer.path)) == [RED, GREEN, BLUE, BLUE, RED]
    assert imageio.imread(writer.path, index=None).shape == (5, 24, 2 * 32, 3)
    assert [duration for _, duration in pillow_frames(writer.path)] == [60] * 4 + [1500]


def test_a_clip_is_fitted_into_the_first_frames_canvas(tmp_path):
    """A decoded clip after latent pixels, of another length, has the size of the first."""
    writer = AnimationWriter(tmp_path / "run.png", video="clip", min_side_px=48)
    writer.write(clip_frame(0, [RED], size=(32, 24)))
    writer.write(clip_frame(1, [GREEN, BLUE], size=(256, 192)))
    writer.close()
    assert imageio.imread(writer.path, index=None).shape == (3, 48, 64, 3)
    assert list(main_colours(writer.path)) == [RED, GREEN, BLUE]


def test_a_mosaic_is_a_contact_sheet_for_each_step(tmp_path):
    """One frame a step, with all the frames of its clip."""
    writer = AnimationWriter(tmp_path / "run.png", video="mosaic", min_side_px=None)
    for i in range(2):
        writer.write(clip_frame(i, clips=2, size=(8, 6)))
    writer.close()
    frames = imageio.imread(writer.path, index=None)
    assert frames.shape == (2, 2 * 6, 3 * 8, 3)
    assert frames[1, 9, 4::8].tolist() == [list(RED), list(GREEN), list(BLUE)]


def test_an_mp4_of_clips_has_their_frame_rate(tmp_path):
    """A frame per `clip_frame_ms`; a still and the held last frame are repeated to their time."""
    options = {"duration_ms": 100, "clip_frame_ms": 50, "hold_last_ms": 200}
    writer = AnimationWriter(tmp_path / "run.mp4", video="clip", min_side_px=None, **options)
    writer.write(clip_frame(0, [RED]))
    writer.write(clip_frame(1, [GREEN, BLUE, GREEN]))
    writer.close()
    about, frames = ffmpeg_frames(writer.path, (32, 24))
    assert " 20 fps" in about
    shown = [RED] * 2 + [GREEN, BLUE] + [GREEN] * 4
    assert np.abs(frames.mean(axis=(1, 2)) - shown).max() < 16


def test_an_mp4_that_holds_a_still_counts_all_of_it(tmp_path):
    """The frames that a still already has are a part of the time it is held."""
    options = {"duration_ms": 100, "clip_frame_ms": 20, "hold_last_ms": 200}
    writer = AnimationWriter(tmp_path / "run.mp4", video="clip", min_side_px=None, **options)
    writer.write(clip_frame(colours=[RED]))
    writer.close()
    assert len(ffmpeg_frames(writer.path, (32, 24))[1]) == 10


@pytest.mark.parametrize("suffix", [*GROWING, ".mp4"])
def test_images_are_animated_as_ever(tmp_path, suffix):
    """A run of images gives the same file, whatever is asked of videos."""
    every = [{"video": "middle"}, {"video": "mosaic"}, {"video": "clip", "clip_frame_ms": 20}]
    for i, options in enumerate(every):
        write_run(AnimationWriter(tmp_path / f"{i}{suffix}", **options), count=2)
    first, *others = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert others == [first, first]


# Contact sheets


def test_a_contact_sheet_is_evenly_chosen_from_any_number(tmp_path):
    """First and last frame are on it, and what is between them has even distances."""
    writer = ContactSheetWriter(tmp_path / "sheet.png", max_frames=5, max_side_px=10, gap_px=2)
    for i in range(101):
        writer.write(frame(i, num_steps=101, colour=(2 * i, 0, 0), size=(8, 8)))
    kept = [each for each in gc.get_objects() if type(each) is Image.Image]
    assert len([each for each in kept if each.size == (10, 10)]) <= 4 * 5 + 1
    writer.close()
    sheet = imageio.imread(writer.path).astype(int)
    assert sheet.shape == (10, 5 * 10 + 4 * 2, 4)
    reds = sheet[5, 5::12, 0]
    assert (reds[0], reds[-1]) == (0, 200)
    assert np.abs(np.diff(reds) - 50).max() <= 16


def test_a_contact_sheet_is_a_grid_where_columns_are_given(tmp_path):
    """Rows are filled from the left; a JPEG's gaps and empty cells are white."""
    writer = ContactSheetWriter(tmp_path / "sheet.jpg", columns=2, max_side_px=64, gap_px=16)
    write_run(writer, count=3, colour=BLUE, size=(64, 64))
    sheet = imageio.imread(writer.path).astype(int)
    assert sheet.shape == (144, 144, 3)
    assert np.abs(sheet[112, 32] - BLUE).max() < 10
    assert sheet[112, 112].min() == sheet[72, 72].min() == 255


def test_a_contact_sheet_has_labels_where_asked(tmp_path):
    """A label makes room under the pictures and is drawn there; without one there is no room."""
    shape = {}
    for name, label in (("bare", None), ("labelled", lambda frame: f"step {frame.step_index}")):
        writer = ContactSheetWriter(tmp_path / f"{name}.png", max_side_px=100, label=label)
        write_run(writer, colour=RED, size=(100, 100))
        shape[name] = imageio.imread(writer.path)
    assert shape["bare"].shape[0] == 100 < shape["labelled"].shape[0]
    assert shape["labelled"][100:, :, 3].any()


def test_a_long_label_stays_under_its_picture(tmp_path):
    """It is written smaller, so that both of its ends can be read."""
    writer = ContactSheetWriter(
        tmp_path / "a.png", max_side_px=100, label=lambda frame: "label " * 4
    )
    write_run(writer, colour=RED, size=(100, 100))
    text = imageio.imread(writer.path)[100:, :100, 3]
    inked = np.flatnonzero(text.any(axis=0))
    assert 0 < inked[0] < inked[-1] < 99


def test_a_contact_sheet_has_the_middle_frames_of_videos(tmp_path):
    """One picture a step, whatever the number of its frames."""
    writer = ContactSheetWriter(tmp_path / "sheet.png", max_side_px=8, gap_px=0)
    for i, colours in enumerate([(RED,), (RED, GREEN, RED), (RED, RED, BLUE, RED, RED)]):
        writer.write(clip_frame(i, colours, size=(8, 8)))
    writer.close()
    sheet = imageio.imread(writer.path)
    assert sheet.shape == (8, 3 * 8, 4)
    assert sheet[4, 4::8, :3].tolist() == [list(RED), list(GREEN), list(BLUE)]


# All that write files


FILES = [
    (PngFolderWriter, "steps"),
    (AnimationWriter, "run.gif"),
    (AnimationWriter, "run.webp"),
    (AnimationWriter, "run.png"),
    (AnimationWriter, "run.mp4"),
    (ContactSheetWriter, "sheet.png"),
]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_closing_without_a_frame_makes_nothing(tmp_path, kind, name):
    """Construction and `close` touch no disk; closing a run twice is harmless."""
    writer = kind(tmp_path / "folder" / name)
    writer.close()
    assert names(tmp_path) == []
    assert writer.path is None
    write_run(writer)
    writer.close()
    assert names(tmp_path / "folder") == [name]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_folder_that_cannot_be_made_raises(tmp_path, kind, name):
    """A file in the way of the folder is an OSError of `write` or `close`, and stays as it is."""
    (tmp_path / "folder").write_text("a file")
    writer = kind(tmp_path / "folder" / name)
    with pytest.raises(OSError, match="folder"):
        write_run(writer)
    writer.close()
    assert names(tmp_path) == ["folder"]


def test_a_full_disk_leaves_what_was_written(tmp_path):
    """No temporary file stays, and what was complete before is still complete."""
    code = """
import resource
from contextlib import suppress
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
for name in sys.argv[2].split():
    writer = writer_for(sys.argv[1] + "/" + name)
    try:
        writer.write(frame(0, colour=RED, size=(256, 256)))
        for i in range(1, 30):
            writer.write(frame(i, size=(256, 256)))
        writer.close()
    except OSError as error:
        print(name, error.errno == errno.EFBIG or "full" in str(error), flush=True)
    with suppress(OSError):
        writer.close()
"""
    targets = "steps/ run.gif run.png run.webp run.mp4"
    process = python(code, tmp_path, targets)
    output, _ = process.communicate(timeout=60)
    assert output.splitlines() == [f"{name} True" for name in targets.split()]
    assert names(tmp_path) == ["run.gif", "run.png", "run.webp", "steps"]
    assert names(tmp_path / "steps") == ["step_001.png"]
    assert (tmp_path / "run.gif").read_bytes().endswith(b"\0;")
    for suffix in GROWING:
        assert [hold for _, hold in pillow_frames(tmp_path / f"run{suffix}")] == [1500]


def test_a_killed_process_leaves_playable_files(tmp_path):
    """After SIGKILL in the middle of a run, all that was written can be read."""
    code = """
targets = "steps", "run.gif", "run.png", "run.webp"
all_writers = [writer_for(f"{sys.argv[1]}/{target}") for target in targets]
for i in range(10_000):
    for writer in all_writers:
        writer.write(frame(i, 10_000))
    print(i, flush=True)
"""
    with python(code, tmp_path) as process:
        while process.stdout.readline().strip() != "5":
            pass
        process.send_signal(signal.SIGKILL)
    assert len(gif_delays((tmp_path / "run.gif").read_bytes())) >= 6
    for suffix in GROWING:
        assert len(list(pillow_frames(tmp_path / f"run{suffix}"))) >= 6
    assert all(imageio.imread(path).any() for path in (tmp_path / "steps").glob("*.png"))


def test_processes_that_share_a_target_get_one_each(tmp_path):
    """Runs of two processes and two threads at the same moment end in four places, all whole."""
    code = """
from threading import Barrier, Thread
places, barrier = [], Barrier(2)
def run():
    folder, gif = writer_for(sys.argv[1] + "/steps"), writer_for(sys.argv[1] + "/run.gif")
    barrier.wait()
    for writer in (folder, gif):
        write_run(writer)
        places.append(writer.path.name)
threads = [Thread(target=run) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(places))
"""
    processes = [python(code, tmp_path) for _ in range(2)]
    places = [place for process in processes for place in json.loads(process.communicate()[0])]
    assert sorted(places) == names(tmp_path)
    assert len(places) == 8
    assert all(len(names(path)) == 3 for path in tmp_path.glob("steps*"))
    assert all(len(gif_delays(path.read_bytes())) == 3 for path in tmp_path.glob("*.gif"))


# Queues


@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue, queue.LifoQueue])
def test_a_queue_gets_every_frame(kind):
    """N frames are N items, and nothing else is put."""
    given = kind()
    written = write_run(writer_for(given), count=3)
    found = [given.get_nowait() for _ in range(given.qsize())]
    assert sorted(map(id, found)) == sorted(map(id, written))


def test_a_full_queue_has_the_newest_frames():
    """The oldest are dropped and counted, and whoever joins the queue does not wait for them."""
    given = queue.Queue(maxsize=2)
    writer = QueueWriter(given)
    write_run(writer, count=5)
    assert writer.dropped == 3
    assert [given.get_nowait().step_index for _ in range(2)] == [3, 4]
    assert given.unfinished_tasks == 2


def test_an_end_is_put_after_each_run_that_had_frames():
    """A consumer can tell where a run ends; a run without frames has no end."""
    given = queue.Queue()
    writer = QueueWriter(given, end=None)
    writer.close()
    write_run(writer, count=1)
    writer.close()
    assert [given.get_nowait() is None for _ in range(given.qsize())] == [False, True]


def test_a_full_thing_that_gives_nothing_back_loses_the_newest():
    """With `put_nowait` alone nothing can be dropped for the new frame; nobody waits."""

    class Pipe:
        def put_nowait(self, item):
            raise queue.Full

    writer = writer_for(Pipe())
    write_run(writer, count=3)
    assert writer.dropped == 3


async def _received(given, count):
    return [(await given.get()).step_index for _ in range(count)]


def test_an_asyncio_queue_is_fed_from_another_thread():
    """A coroutine gets the frames in order while the run goes on in a worker thread."""

    async def main():
        given = asyncio.Queue()
        writer = writer_for(given)
        run = asyncio.create_task(asyncio.to_thread(write_run, writer, 4))
        found = await asyncio.wait_for(_received(given, 4), timeout=10)
        await run
        return found, writer.dropped

    assert asyncio.run(main()) == ([0, 1, 2, 3], 0)


def test_a_busy_event_loop_gets_the_newest_frames():
    """A bounded asyncio queue bounds what waits for the loop, and drops the oldest of all."""

    async def main():
        given = asyncio.Queue(maxsize=2)
        writer = QueueWriter(given)
        write_run(writer, count=6)  # in the loop's own thread: nothing can be handed over yet
        waiting = len(writer._feeder._waiting)
        await asyncio.sleep(0)
        await asyncio.to_thread(writer.write, frame(6))
        return waiting, await _received(given, 2), writer.dropped

    assert asyncio.run(main()) == (2, [5, 6], 5)


def test_an_asyncio_queue_needs_its_loop():
    """Outside a running loop it is refused at once; a loop that is gone is named."""

    async def made():
        return QueueWriter(asyncio.Queue())

    with pytest.raises(ValueError, match="queue must be given while its event loop runs, got"):
        writer_for(asyncio.Queue())
    writer = asyncio.run(made())
    with pytest.raises(RuntimeError, match="got one whose loop is closed; keep the loop running"):
        writer.write(frame())


def _consume(given, results):
    for _ in range(3):
        found = given.get(timeout=30)
        results.put((found.step_index, found.images.sum()))


def test_a_multiprocessing_queue_reaches_another_process():
    """A spawned process gets the frames with their pixels."""
    context = multiprocessing.get_context("spawn")
    given, results = context.Queue(), context.Queue()
    consumer = context.Process(target=_consume, args=(given, results))
    consumer.start()
    written = write_run(writer_for(given), count=3)
    found = [results.get(timeout=60) for _ in range(3)]
    consumer.join(timeout=60)
    assert found == [(each.step_index, each.images.sum()) for each in written]
    assert consumer.exitcode == 0
    _dispose(given, results)


def test_a_full_multiprocessing_queue_has_the_newest_frame():
    """Also while an older one is still on its way to the pipe."""
    given = multiprocessing.get_context("spawn").Queue(maxsize=1)
    writer = writer_for(given)
    write_run(writer, count=4, size=(256, 256))
    assert given.get(timeout=10).step_index == 3
    assert writer.dropped == 3
    _dispose(given)


def test_a_closed_queue_raises():
    """The consumer is gone for good, which the run's boundary has to hear."""
    given = multiprocessing.get_context("spawn").Queue()
    writer = writer_for(given)
    given.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.write(frame())
    given.join_thread()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="queues cannot be shut down before 3.13")
def test_a_queue_that_was_shut_down_raises():
    """At once for a thread's queue, with the next frame for an asyncio one."""
    given = queue.Queue()
    given.shutdown()
    with pytest.raises(queue.ShutDown, match=r"^$"):
        writer_for(given).write(frame())

    async def main():
        given = asyncio.Queue()
        writer = writer_for(given)
        given.shutdown()
        writer.write(frame())
        await asyncio.sleep(0)
        writer.write(frame())

    with pytest.raises(asyncio.QueueShutDown, match=r"^$"):
        asyncio.run(main())


def _dispose(*queues):
    for each in queues:
        each.close()
        each.join_thread()


# Targets and options


class _CallableWriter:
    def __call__(self, frame):
        raise AssertionError

    def write(self, frame):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("steps", PngFolderWriter),
        ("steps/", PngFolderWriter),
        ("out/v1.5", PngFolderWriter),
        ("denoise.gif/", PngFolderWriter),
        (Path("runs.2026-01-01"), PngFolderWriter),
        (".", PngFolderWriter),
        ("run.gif", AnimationWriter),
        (Path("RUN.WEBP"), AnimationWriter),
        ("run.png", AnimationWriter),
        ("run.apng", AnimationWriter),
        ("v1.5/run.mp4", AnimationWriter),
        (queue.Queue(), QueueWriter),
        (print, CallableWriter),
        (_CallableWriter(), _CallableWriter),
    ],
)
def test_a_target_finds_its_writer(target, kind):
    """Paths by their suffix, queues and functions by what they can do, writers as they are."""
    writer = writer_for(target)
    assert type(writer) is kind
    assert isinstance(writer, Writer)


def test_an_existing_folder_is_a_folder_whatever_its_name(tmp_path):
    """A folder that is there beats its own suffix."""
    (tmp_path / "run.gif").mkdir()
    assert type(writer_for(tmp_path / "run.gif")) is PngFolderWriter


@pytest.mark.parametrize("path", ["run.avi", "out/run.jpg", Path("steps.zip")])
def test_an_unknown_suffix_is_refused(path):
    """The message has the known ones, and the way to a folder of that name."""
    match = r"path must end in one of \.gif, \.webp, .*, got '.*'; .* end the path in '/'"
    with pytest.raises(ValueError, match=match):
        writer_for(path)


@pytest.mark.parametrize("target", [3, None, b"steps", ["steps/"], _CallableWriter])
def test_what_can_take_no_frames_is_refused(target):
    """Numbers, lists and classes (in place of instances) are a TypeError at once."""
    match = "target must be a path, a queue, a callable or a writer, got .*; .*"
    with pytest.raises(TypeError, match=match):
        writer_for(target)


def test_an_open_file_is_refused(tmp_path):
    """It has `write` and `close`, but wants bytes."""
    with (
        (tmp_path / "run.gif").open("wb") as file,
        pytest.raises(TypeError, match=r"got BufferedWriter; pass .* the path of the file"),
    ):
        writer_for(file)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AnimationWriter("a.gif", duration_ms=5), "duration_ms must be an int from 20 to"),
        (lambda: AnimationWriter("a.gif", hold_last_ms=0), "hold_last_ms must be .*, got 0; "),
        (lambda: AnimationWriter("a.gif", loop=-1), "loop must be .*, got -1; "),
        (lambda: AnimationWriter("a.gif", min_side_px=0), "min_side_px must be .*, got 0; "),
        (lambda: AnimationWriter("a.gif", resample="cubic"), "resample must be 'nearest' or"),
        (lambda: AnimationWriter("a.gif", video="sheet"), "video must be 'middle' or 'clip' or"),
        (lambda: AnimationWriter("a.gif", clip_frame_ms=40), "clip_frame_ms must be None with vi"),
        (
            lambda: AnimationWriter("a.gif", video="clip", clip_frame_ms=5),
            "clip_frame_ms must be an int from 20 to 60000, got 5; ",
        ),
        (lambda: PngFolderWriter("a", video="clip"), "video must be 'sheet' or 'frames', got 'cl"),
        (lambda: PngFolderWriter("a", min_side_px=1.5), r"min_side_px must be .*, got 1\.5; "),
        (lambda: PngFolderWriter(""), "folder must be a path, got ''; "),
        (lambda: ContactSheetWriter("a.gif"), r"path must end in one of \.png, \.jpg, \.jpeg, got"),
        (lambda: ContactSheetWriter("a.png", max_frames=1), "max_frames must be .*, got 1; "),
        (lambda: ContactSheetWriter("a.png", columns=0), "columns must be .*, got 0; "),
    ],
)
def test_a_wrong_option_raises_at_construction(make, match):
    """Before the run, in the form: what it must be, what it is, what to do."""
    with pytest.raises(ValueError, match=match):
        make()


def test_a_callable_gets_every_frame():
    """The function is called with the very frames, in order."""
    found = []
    assert write_run(writer_for(found.append)) == found


def test_an_async_function_is_refused():
    """Nobody would await it."""

    async def show(frame):
        pass

    with pytest.raises(TypeError, match=r"got an async function; pass an asyncio\.Queue"):
        writer_for(show)


def test_a_queue_writer_wants_a_queue():
    """A list is no queue."""
    with pytest.raises(TypeError, match="queue must be an object with put_nowait, got list"):
        QueueWriter([])


def test_all_names_exist_and_are_sorted():
    """`__all__` is what is there."""
    assert writers.__all__ == sorted(writers.__all__)
    assert all(hasattr(writers, name) for name in writers.__all__)
