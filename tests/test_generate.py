"""What the commands do, where it needs no run."""

import pytest
import torch

from sd_progress.arguments import UsageError
from sd_progress.generate import device_named, one_line


def test_auto_is_a_device_that_is_here():
    """The fastest that there is can hold a tensor."""
    device = device_named("auto")
    assert torch.zeros(1, device=device).device.type == device.type


def test_a_device_that_is_not_here_is_told_with_those_that_are():
    """The processor always is."""
    with pytest.raises(UsageError, match=r"one of this machine's: .*cpu; got 'warp:3'"):
        device_named("warp:3")


def test_one_line_of_a_message():
    """Messages of libraries span lines."""
    assert one_line(ValueError("first\n   second\n")) == "first second"
