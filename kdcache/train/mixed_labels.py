"""Labels of mixed inputs (MixUp, CutMix): two classes and the share of the first.

The cross-entropy of such a row is ratio * CE(first) + (1 - ratio) * CE(second) (Zhang et al., 2018; Yun et al., 2019).
Rows from a cache bring `label_b` and `mix_ratio` themselves; `MixedLabels` serves training without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch.utils.data._utils.collate import default_collate_fn_map


@final
@dataclass(frozen=True)
class MixedLabel:
    """The labels of one mixed item: two class numbers, -1 for none, and the share of the first."""

    first: int
    second: int
    ratio: float


@final
@dataclass(frozen=True, eq=False)
class MixedLabels:
    """The labels of a batch of mixed items: what `default_collate` makes of `MixedLabel`s.

    Attributes:
        first: (N,) int64, -1 where a row has no label.
        second: (N,) int64, the partner's.
        ratio: (N,) float32 in [0, 1], the share of the first.
    """

    first: torch.Tensor
    second: torch.Tensor
    ratio: torch.Tensor

    def __len__(self) -> int:
        return len(self.first)

    @property
    def known(self) -> torch.Tensor:
        """(N,) int64: the first label where both are known, else -1: which rows have a CE term."""
        both = (self.first >= 0) & ((self.second >= 0) | (self.ratio == 1))
        return torch.where(both, self.first, -1)

    def to(self, device: Any, *, non_blocking: bool = False) -> MixedLabels:
        """On a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MixedLabels:
        """In page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MixedLabels:
        return replace(self, first=function(self.first), second=function(self.second), ratio=function(self.ratio))


def collate_mixed(
    batch: Sequence[MixedLabel], *, collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None
) -> MixedLabels:
    """The labels of a batch (registered with `default_collate` when this module is imported)."""
    return MixedLabels(
        torch.tensor([label.first for label in batch], dtype=torch.int64),
        torch.tensor([label.second for label in batch], dtype=torch.int64),
        torch.tensor([label.ratio for label in batch], dtype=torch.float32),
    )


default_collate_fn_map[MixedLabel] = collate_mixed
