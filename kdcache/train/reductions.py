"""From values of single rows to a loss: which rows count, their weights, and the mean that survives an empty batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.train.row_weights import per_position, weight_per_position

Reduction: TypeAlias = Literal["mean", "sum", "none"]


@final
@dataclass(frozen=True, eq=False)
class RowTerms:
    """A loss row by row, before weights.

    Attributes:
        values: (N, ...) with a gradient; anything where a row does not count.
        counts: (N,) or (N, ...) bool, rows that the loss can say something about; None for all.
    """

    values: Tensor
    counts: Tensor | None = None

    def counted(self) -> Tensor:
        """(N, ...) bool."""
        none = torch.zeros(self.values.shape, dtype=torch.bool, device=self.values.device)
        if self.counts is None:
            return ~none
        return per_position(self.counts, none).expand(none.shape) if self.counts.ndim == 1 else self.counts


def reduce_rows(rows: RowTerms, *, sample_weight: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """sum_i w_i value_i / sum_i w_i over the rows that count; 0 with a gradient graph where none does.

    Args:
        rows: (N, ...) values.
        sample_weight: (N,) or (N, ...), not negative; all 1 by default.
        reduction: "mean" divides by the weights of the rows that count, "sum" does not divide, "none" gives the
            terms w_i value_i (N, ...).

    Raises:
        UsageError: another reduction, or weights of another shape.
    """
    check_reduction(reduction)
    weight = rows.counted().to(rows.values.dtype)
    if sample_weight is not None:
        weight = weight * weight_per_position(sample_weight, weight)
    # 0 * inf would be NaN, and a value that does not count may be infinite.
    terms = torch.where(weight != 0, rows.values, 0.0) * weight
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else safe_mean(terms.sum(), weight.sum())


def check_reduction(reduction: str) -> None:
    """Refuses what is not mean, sum or none.

    Raises:
        UsageError: naming it.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be mean, sum or none, found {reduction!r}")


def safe_mean(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """numerator / denominator, and 0 with the numerator's graph where nothing was summed."""
    if isinstance(denominator, Tensor):
        return numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return numerator / (denominator or 1.0)
