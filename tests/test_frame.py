"""What a frame says and shows."""

import base64
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from sd_progress.frame import Frame, as_grid


def frame(images=None, **values):
    defaults = {
        "step_index": 0,
        "num_steps": 4,
        "timestep": 751.0,
        "sigma": None,
        "source": "denoised",
        "decoder": "linear:sd1",
        "elapsed_s": 0.5,
        "eta_s": 1.5,
    }
    images = np.zeros((1, 2, 3, 3), np.uint8) if images is None else images
    return Frame(images, **{**defaults, **values})


def test_progress():
    """None of the steps at the initial noise, all of them at the last."""
    assert [frame(step_index=k).progress for k in (-1, 0, 3)] == [0.0, 0.25, 1.0]
    assert [frame(step_index=k).is_last for k in (-1, 2, 3)] == [False, False, True]


def test_a_batch_is_a_near_square_grid():
    """Three pictures make two rows of two, the fourth cell black."""
    images = np.stack([np.full((2, 3, 3), 50 * (k + 1), np.uint8) for k in range(3)])
    grid = as_grid(images)
    assert grid.shape == (4, 6, 3)
    assert [grid[0, 0, 0], grid[0, 3, 0], grid[2, 0, 0], grid[2, 3, 0]] == [50, 100, 150, 0]


def test_a_video_is_a_row_for_each_clip():
    """(B, F, H, W, 3) gives B rows of F."""
    images = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    grid = as_grid(images)
    assert grid.shape == (8, 15, 3)
    np.testing.assert_array_equal(grid[4:, 5:10], images[1, 1])


def clips(count, frames):
    """(B, F, 1, 1, 3): every picture is one pixel, and no two are the same."""
    values = np.arange(1, count * frames + 1, dtype=np.uint8).reshape(count, frames, 1, 1, 1)
    return values.repeat(3, axis=-1)


def values(picture):
    """The red of each pixel, as rows."""
    return np.asarray(picture)[..., 0].tolist()


def test_a_long_video_is_a_near_square_sheet_for_each_clip():
    """More than 8 frames are wrapped, clip below clip, and what is left of a sheet is black."""
    assert frame(clips(1, 8)).image.size == (8, 1)
    assert values(frame(clips(2, 10)).image) == [
        *([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]),
        *([11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 0, 0]),
    ]


def test_clips_of_one_frame_are_laid_out_as_images():
    """Four of them make two rows of two, not a column."""
    assert values(frame(clips(4, 1)).image) == [[1, 2], [3, 4]]


def test_a_clip_is_a_picture_of_all_clips_for_each_frame():
    """F pictures in order, each with the B clips as a grid."""
    pictures = frame(clips(3, 2)).clip()
    assert [values(picture) for picture in pictures] == [[[1, 3], [5, 0]], [[2, 4], [6, 0]]]
    assert {picture.mode for picture in pictures} == {"RGB"}


@pytest.mark.parametrize(("frames", "middle"), [(1, 1), (4, 3), (5, 3)])
def test_the_middle_is_frame_f_halves(frames, middle):
    """Frame F // 2 of every clip; the only one where F is 1."""
    assert values(frame(clips(2, frames)).middle) == [[middle, frames + middle]]


def test_images_are_a_clip_of_one():
    """For them `middle` and the one picture of `clip` are `image`; clips alone are video."""
    images = frame(clips(1, 3)[0])
    assert values(images.middle) == values(images.image) == [[1, 2], [3, 0]]
    assert [values(picture) for picture in images.clip()] == [[[1, 2], [3, 0]]]
    assert [each.is_video for each in (images, frame(clips(2, 1)))] == [False, True]


def test_metadata_is_text_without_what_is_not_known():
    """Values that are None are left out, versions are there."""
    metadata = frame().metadata()
    assert metadata["timestep"] == "751.0"
    assert "sigma" not in metadata
    assert {"diffusers", "torch", "sd-progress"} <= set(metadata)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_bytes_and_data_url(format):
    """Both decode to the picture, in the format asked for."""
    shown = frame(np.full((1, 8, 8, 3), 200, np.uint8))
    url = shown.to_data_url(format)
    head, encoded = url.split(",")
    assert head == f"data:image/{format};base64"
    assert base64.b64decode(encoded) == shown.to_bytes(format)
    picture = Image.open(io.BytesIO(shown.to_bytes(format)))
    assert picture.format.lower() == format
    assert np.asarray(picture).mean() == pytest.approx(200, abs=1)


def test_a_wrong_format_is_refused():
    """The message names the ones there are."""
    with pytest.raises(ValueError, match="format must be one of 'png', 'jpeg', 'webp', got 'bmp'"):
        frame().to_bytes("bmp")


def test_a_frame_in_another_process_cannot_stop_the_run():
    """It travels without the way back, and says so."""
    stopped = []
    made = frame(output="what the pipeline returned", _stop=lambda: stopped.append(1))
    sent = pickle.loads(pickle.dumps(made))
    made.stop()
    assert stopped == [1]
    assert sent.output is None
    with pytest.raises(RuntimeError, match="frame must be one of a run in this process"):
        sent.stop()
