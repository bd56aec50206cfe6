"""How much of each term a row gets: the a_i of the loss, from who has a label and who has a teacher.

a_i = alpha where a row has both, 1 with a teacher only, 0 with a label only; a row with neither counts for
nothing. Where all rows are alike the weights are plain numbers, which saves about ten small kernels a step
(50-70 us of 280-360 at 256 x 10 on a CPU). Finding that out looks at the data on the CPU only: on a GPU a look would
stall the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdcache.errors import UsageError


@dataclass(frozen=True)
class RowWeights:
    """Weights of CE_i and KL_i, and the sum of the w_i that count: numbers where rows are alike, else (N, ...)."""

    ce: torch.Tensor | float
    kl: torch.Tensor | float
    total: torch.Tensor | float


def row_weights(
    shape: tuple[int, ...],
    *,
    alpha: float,
    labels: torch.Tensor | None,
    has_teacher: torch.Tensor | bool,
    sample_weight: torch.Tensor | None,
    like: torch.Tensor,
) -> RowWeights:
    """The weights (N, ...) of both terms; the temperature's factor is not in them.

    Args:
        shape: (N, ...), rows and positions.
        alpha: weight of the KD term where a row has label and teacher.
        labels: (N, ...) int64, -1 = no label; None where no row has one.
        has_teacher: (N,) bool; or True or False for all rows.
        sample_weight: (N,) or (N, ...), or None for 1.
        like: a tensor of the dtype and device to compute in.

    Raises:
        UsageError: `sample_weight` has another shape.
    """
    if sample_weight is None:
        alike = _alike(labels, has_teacher, alpha)
        if alike is not None:
            return RowWeights(ce=1.0 - alike, kl=alike, total=float(math.prod(shape)))
    none = torch.zeros(shape, dtype=torch.bool, device=like.device)
    labelled = none if labels is None else labels >= 0
    if isinstance(has_teacher, torch.Tensor):
        taught = per_position(has_teacher, none).expand(shape)
    else:
        taught = ~none if has_teacher else none
    weight = like.new_ones(()) if sample_weight is None else weight_per_position(sample_weight, none).to(like.dtype)
    kl = weight * taught * torch.where(labelled, like.new_full((), alpha), 1.0)
    ce = weight * labelled * torch.where(taught, like.new_full((), 1.0 - alpha), 1.0)
    return RowWeights(ce=ce, kl=kl, total=(weight * (taught | labelled)).sum())


def weighted(term: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """term * weight, 0 where the weight is 0: a masked class can make the term infinite, and 0 * inf is NaN."""
    if isinstance(weight, torch.Tensor):
        term = torch.where(weight != 0, term, 0.0)
    return term * weight


def per_position(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) values as (N, 1, ...), to be broadcast over the positions of `like` (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _alike(labels: torch.Tensor | None, has_teacher: torch.Tensor | bool, alpha: float) -> float | None:
    """The a_i that all rows share, or None where they differ or cannot be looked at without a stall."""
    if isinstance(has_teacher, torch.Tensor):
        if has_teacher.device.type != "cpu" or not bool(has_teacher.all()):
            return None
        has_teacher = True
    if labels is None:
        return 1.0 if has_teacher else None
    if labels.device.type != "cpu" or not bool((labels >= 0).all()):
        return None
    return alpha if has_teacher else 0.0


def weight_per_position(sample_weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) or (N, ...) weights, to be broadcast over the rows and positions of `like` (N, ...).

    Raises:
        UsageError: another shape.
    """
    if sample_weight.ndim == 1 and len(sample_weight) == len(like):
        return per_position(sample_weight, like)
    if sample_weight.shape == like.shape:
        return sample_weight
    raise UsageError(
        f"sample_weight has shape {tuple(sample_weight.shape)}, expected ({len(like)},) or {tuple(like.shape)}"
    )
