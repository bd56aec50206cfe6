"""Which rows an optimiser step takes: a pure function of the seed and the step's number.

Nothing here has a state that could be lost: a run that resumes at step 1,234 asks for step 1,234. The
order is global. Every rank draws the same batch and takes its slice of it, so that the world size and
the number of accumulation pieces change which process computes a row, never which rows make a step.
The price is a permutation of all rows in every rank (8 bytes a row).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from kdcache.errors import UsageError


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of an epoch: (rows,) int64, the same on every machine.

    Rows are sorted by raw numbers of PCG64, whose stream NumPy promises to keep. It makes no such
    promise about `Generator.permutation`, and a seed must outlive an upgrade. (0.1 s a million rows.)
    """
    order = np.argsort(np.random.PCG64((seed, epoch)).random_raw(rows), kind="stable")
    order.setflags(write=False)  # it is shared through the cache
    return order


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of every step.

    Args:
        positions: (N,) int64 positions in the data set that take part, N > 0.
        batch_size: rows of a step, over all ranks and accumulation pieces.
        seed: of the shuffling, >= 0.
        pieces_per_rank: forward passes a rank divides its share of a step into.
        drop_last: leave out the short batch at an epoch's end.
    """

    positions: np.ndarray
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    pieces_per_rank: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise UsageError(
                f"there are {len(self.positions)} rows to train on and a batch takes {self.batch_size}: "
                "not one step; check the data, or lower the batch size or keep the last batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        full, rest = divmod(len(self.positions), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that a step belongs to."""
        return step // self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """The positions in the data set that make the step `step` (from 0), over all ranks: (n,) int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        chosen = permutation(self.seed, epoch, len(self.positions))[start : start + self.batch_size]
        rows: np.ndarray = self.positions[chosen]
        return rows

    def pieces(self, step: int) -> list[np.ndarray]:
        """This rank's share of a step, one array of positions for each forward pass.

        Lower ranks get the larger shares, so that rank 0 is never without rows. In a short last batch
        a rank can have no piece at all.
        """
        share = np.array_split(self.rows(step), self.world_size)[self.rank]
        return [piece for piece in np.array_split(share, self.pieces_per_rank) if len(piece)]


class StepSampler(Sampler[list[int]]):
    """A DataLoader's `batch_sampler` over the pieces of the steps `start <= step < stop`.

    Both are set anew for each epoch, in the main process (workers never see the sampler).
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.start = 0
        self.stop = 0

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for piece in self.order.pieces(step):
                yield piece.tolist()

    def __len__(self) -> int:
        return sum(len(self.order.pieces(step)) for step in range(self.start, self.stop))
