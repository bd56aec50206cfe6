"""The encoding `topk` on a device: the arithmetic of `kdcache.format.topk`, its sums in float32.

What is kept is equal to the last bit, the tail's statistics to a few units of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kdcache.format.encoding import FLOAT16_LOWEST, FLOAT32_MAX
from kdcache.format.topk import LEAST_STD, Z2, TopK, z2_temperature
from kdcache.train.ranking import as_stored_classes, largest_classes


def encode_topk(
    encoding: TopK, exact: Tensor, row_max: Tensor, labels: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The arrays of float32 logits (N, C, ...) with maxima (N, ...), and how many of the values kept were clamped.

    Args:
        encoding: the target.
        exact: (N, C, ...) float32.
        row_max: (N, ...) float32.
        labels: (N, L) int64, -1 = none; None: no row has one. One that is no class is taken for another here, and
            refused by whoever stores it.
    """
    top = row_max.unsqueeze(1)
    classes = largest_classes(exact, encoding.k)
    kept = exact.gather(1, classes)
    stored, clamped = _as_float16(kept - top, kept)
    arrays = {
        "topk_logits": stored,
        "topk_classes": as_stored_classes(classes, encoding.num_classes),
        "row_max": row_max,
    }
    left_out, count = classes, classes.new_full((len(exact),), encoding.num_classes - encoding.k)
    if encoding.labels:
        if labels is None:
            labels = classes.new_full((len(exact), encoding.labels), -1)
        known, index = labels >= 0, labels.clamp(0, encoding.num_classes - 1)
        own = torch.where(known, exact.gather(1, index), -math.inf)
        is_new = known & (index.unsqueeze(2) != classes.unsqueeze(1)).all(dim=2)
        if encoding.labels == 2:
            is_new[:, 1] &= index[:, 1] != torch.where(known[:, 0], index[:, 0], -1)
        arrays["label_logits"], low = _as_float16(own - top, own, counted=is_new)
        clamped = clamped + low
        left_out = torch.cat([classes, torch.where(known, index, classes[:, :1])], dim=1)
        count = count - is_new.sum(dim=1)
    shifted = exact - top
    std = _std(exact, shifted)
    tail = shifted.scatter(1, left_out, -math.inf)
    arrays["tail_logsumexp"] = torch.stack([(tail / t).logsumexp(dim=1) for t in _of_rows(encoding, std)], dim=1)
    count = count.reshape(-1, *[1] * (row_max.dim() - 1))
    share = (1 / count.clamp(min=1)).unsqueeze(1)  # multiplied before the sum, which may overflow
    mean = (shifted.scatter(1, left_out, 0) * share).sum(dim=1)
    arrays["tail_mean"] = torch.where(count > 0, mean, -math.inf)
    arrays["logit_std"] = std
    return arrays, clamped


def _as_float16(shifted: Tensor, exact: Tensor, *, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits relative to the maximum, and how many of them (of the counted ones) were clamped."""
    low = (shifted < FLOAT16_LOWEST) & torch.isfinite(exact)
    return torch.where(low, FLOAT16_LOWEST, shifted).half(), (low if counted is None else low & counted).sum()


def _of_rows(encoding: TopK, std: Tensor) -> Iterator[Tensor | float]:
    """The temperatures as what divides rows (N, C, ...)."""
    for temperature in encoding.temperatures:
        yield z2_temperature(std).unsqueeze(1) if temperature == Z2 else float(temperature)


def _std(exact: Tensor, shifted: Tensor) -> Tensor:
    """(N, ...) standard deviation (ddof 0) of the finite logits, as a share of their range: squares may overflow."""
    finite = torch.isfinite(exact)
    values = torch.where(finite, shifted.clamp(min=-FLOAT32_MAX), 0.0)
    span = values.amin(dim=1).neg_().clamp_(min=LEAST_STD)
    values /= span.unsqueeze(1)
    count = finite.sum(dim=1)
    mean = (values.sum(dim=1) / count).unsqueeze(1)
    squares = torch.where(finite, values - mean, 0.0).square_().sum(dim=1)
    return span * (squares / count).sqrt_()
