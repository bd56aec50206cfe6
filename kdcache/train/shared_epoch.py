"""The epoch that a data set is in, seen by DataLoader workers that live on: one number in shared memory."""

from __future__ import annotations

from typing import final

import torch

from kdcache.errors import UsageError

_NOT_SET = -1


@final
class SharedEpoch:
    """A number that the training process sets and its workers read, whatever their start method.

    Workers load ahead only within an epoch: a DataLoader hands out the next epoch's indices when it is iterated
    again, so `set` before that is seen by all of its items.
    """

    def __init__(self) -> None:
        self._cell = torch.full((1,), _NOT_SET, dtype=torch.int64)
        self._cell.share_memory_()  # type: ignore[no-untyped-call]

    def set(self, epoch: int) -> None:
        """Tells the epoch, from 0.

        Raises:
            UsageError: below 0.
        """
        check_epoch(epoch)
        self._cell[0] = epoch

    def get(self) -> int | None:
        """The epoch, None where nobody has told it."""
        epoch = int(self._cell[0])
        return None if epoch == _NOT_SET else epoch


def check_epoch(epoch: int) -> None:
    """Refuses what is no epoch.

    Raises:
        UsageError: below 0.
    """
    if epoch < 0:
        raise UsageError(f"an epoch is 0 or more, found {epoch}")
