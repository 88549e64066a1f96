"""Owns what several processes that calibrate together tell each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from .scores import Score


@dataclass(frozen=True)
class Share:
    """This process's part of the work."""

    group: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        """This process's number."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def add_up(self, *tensors: Tensor) -> None:
        """Make each tensor the sum over all processes, in place."""
        for tensor in tensors if self.group is not None else ():
            dist.all_reduce(tensor, group=self.group)

    def total(self, number: int) -> int:
        """The sum over all processes."""
        return round(self._sum([float(number)])[0])

    def mean(self, scores: Iterable[Score]) -> Score:
        """The mean over all scores of all processes."""
        scores = list(scores)
        flat = math.fsum(s.flat_db for s in scores)
        sums = self._sum([math.fsum(s.psnr_db for s in scores), flat, float(len(scores))])
        return Score(sums[0] / max(sums[2], 1), sums[1] / max(sums[2], 1))

    def _sum(self, numbers: list[float]) -> list[float]:
        if self.group is None:
            return numbers
        backend = dist.get_backend(self.group)
        summed = torch.tensor(
            numbers, dtype=torch.float64, device="cuda" if "nccl" in backend else "cpu"
        )
        dist.all_reduce(summed, group=self.group)
        return cast("list[float]", summed.tolist())
