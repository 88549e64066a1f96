"""What all tests share: one thread, no calibration unless asked for, a cache of their own."""

import os
import tempfile

import torch

# The tiny models of the tests only lose by sharing a core with another.
torch.set_num_threads(1)

# Their random VAEs are nothing to calibrate, and the user's cache is not theirs.
os.environ["SD_PROGRESS_CALIBRATE"] = "never"
os.environ["SD_PROGRESS_CACHE"] = tempfile.mkdtemp(prefix="sd-progress-tests-")
