"""Pictures of another size."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_progress._resize import resized


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("capability", ["as it is", "DEFAULT"])
@pytest.mark.parametrize("size", [(64, 64), (40, 17), (7, 90), (5, 3), (1, 1)])
def test_pictures_are_resized_as_pillow_does_it(size, capability, monkeypatch):
    """Larger, smaller, or both: within two levels, by torch or by Pillow itself."""
    if capability != "as it is":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    image = noise(20, 15)
    wanted = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.int16)
    made = resized(image, size)
    assert made.size == size
    assert made.mode == "RGB"
    assert np.abs(np.asarray(made) - wanted).max() <= (2 if capability == "as it is" else 0)


def test_a_picture_of_that_size_is_returned_as_it_is():
    """Nothing is computed, nothing copied."""
    image = noise(4, 3)
    assert resized(image, (4, 3)) is image
