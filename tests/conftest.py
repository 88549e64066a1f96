"""One thread for torch: the tiny models of the tests only lose by sharing a core with another."""

import torch

torch.set_num_threads(1)
