"""Which view of a sample an access takes: that of the epoch, or one at random.

In epoch e a student takes view e mod K, so that every epoch shows all samples in one view each and K epochs show all
views; where nobody tells the epoch, each access draws a view, from numbers of its own and never from the caller's
generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, final

import numpy as np
import torch

from kdcache.errors import UsageError
from kdcache.format.view_seed import MAX_SEED, check_views, view_seed
from kdcache.train.shared_epoch import SharedEpoch, check_epoch

ViewOrder: TypeAlias = Literal["epoch", "random"]
ORDERS: tuple[ViewOrder, ...] = ("epoch", "random")
VIEWS = "views= (--views)"


@final
class ViewChoice:
    """Chooses a view for each access; copies in DataLoader workers follow `set_epoch`, whatever their start method.

    Args:
        views: to choose from, in their order; None for views without end, of which an epoch takes the one of its
            number and a random access any.
        order: "epoch", "random", or None: by epoch once it was told, at random before.
        seed: makes a random choice a function of (seed, epoch, id), the same in every process and when a run goes on;
            without it each access draws anew, from the seed of its DataLoader worker (or of the process) and a count.

    Raises:
        UsageError: another order, or no view.
    """

    def __init__(self, views: Sequence[int] | None, order: ViewOrder | None, *, seed: int | None = None) -> None:
        if order not in (None, *ORDERS):
            raise UsageError(f"view_order must be {' or '.join(ORDERS)}, found {order!r}")
        if views is not None and not len(views):
            raise UsageError("no view is left to choose from")
        self.views = None if views is None else tuple(views)
        self.order = order
        self._seed = seed
        self._epoch = None if self.views is not None and len(self.views) == 1 else SharedEpoch()
        self._accesses = 0

    @property
    def is_fixed(self) -> bool:
        """Whether there is one view only, which every access takes."""
        return self._epoch is None

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, from 0; before the DataLoader is iterated.

        Raises:
            UsageError: below 0.
        """
        if self._epoch is None:
            check_epoch(epoch)
        else:
            self._epoch.set(epoch)

    def take(self, sample_ids: np.ndarray) -> list[int]:
        """The views that an access to some samples takes, one for each.

        Raises:
            UsageError: the order is by epoch, and nobody has told the epoch.
        """
        if self._epoch is None:
            assert self.views is not None
            return [self.views[0]] * len(sample_ids)
        epoch = self._epoch.get()
        if self.order != "random" and epoch is not None:
            return [epoch if self.views is None else self.views[epoch % len(self.views)]] * len(sample_ids)
        if self.order == "epoch" or (self._seed is not None and epoch is None):
            raise UsageError(
                "the view of this access depends on the epoch, and nobody has told it: call set_epoch(epoch) on the "
                "data set or the attached loader before each epoch, or choose view_order='random'"
            )
        return self._at_random(sample_ids, epoch)

    def _at_random(self, sample_ids: np.ndarray, epoch: int | None) -> list[int]:
        ids = sample_ids.tolist()
        if self._seed is not None:
            assert epoch is not None
            return [self._view(view_seed(self._seed, value, epoch, purpose="choice")) for value in ids]
        seed, first = torch.initial_seed() & MAX_SEED, self._accesses
        self._accesses += len(ids)
        return [
            self._view(view_seed(seed, value, number & 0xFFFFFFFF, purpose="choice"))
            for number, value in enumerate(ids, first)
        ]

    def _view(self, key: bytes) -> int:
        word = int.from_bytes(key[:8], "little")
        return word >> 32 if self.views is None else self.views[word * len(self.views) >> 64]


def own_choice(
    *,
    view: int | None = None,
    views: int | None = None,
    view_order: ViewOrder | None = None,
    seed: int | None = None,
) -> ViewChoice:
    """How a student without a cache chooses a view.

    Args:
        view: this one alone.
        views: 0 to `views` - 1; None for a new one in each epoch.
        view_order: see `ViewChoice`.
        seed: see `ViewChoice`.

    Raises:
        UsageError: a view beside a number of views or an order, or fewer than one view.
    """
    if view is not None:
        check_alone(views, view_order)
        return ViewChoice((view,), None)
    return ViewChoice(None if views is None else range(check_views(views, name=VIEWS)), view_order, seed=seed)


def check_alone(views: int | None, view_order: ViewOrder | None) -> None:
    """Refuses settings for several views beside `view=`.

    Raises:
        UsageError: one of them is given.
    """
    if views is not None or view_order is not None:
        raise UsageError("view= takes one view, views= and view_order= take several: give one or the other")
