"""The two means of several teachers' rows: of logits, and of softmax(z / T)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.rows import TeacherRows
from kdcache.train.distributions import is_topk
from kdcache.train.kept import kept, topk_encoding
from kdcache.train.row_weights import per_position
from kdcache.train.sparse import teacher_log_probs


def mean_logits(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum over m of w_m z_m; a teacher of weight 0 adds nothing, and a class that one masks (-inf) is masked.

    Args:
        logits: of each of M teachers (N, C, ...) float32.
        weights: (N, M), of each row summing to 1 or all 0.

    Returns:
        (N, C, ...).

    >>> mean_logits([torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])], torch.tensor([[0.25, 0.75]]))
    tensor([[1.5000, 0.5000]])
    """
    total: Tensor | None = None
    for number, own in enumerate(logits):
        weight = per_position(weights[:, number], own)
        part = torch.where(weight > 0, own * weight, 0.0)  # 0 * -inf is NaN
        total = part if total is None else total + part
    assert total is not None
    return total


def mean_soft_targets(given: Sequence[TeacherRows], weights: Tensor, encoding: SoftTargets) -> dict[str, Any]:
    """log of sum over m of w_m softmax(z_m / T), as arrays of `encoding`.

    Rows with all logits serve any T and give all classes. Beside `topk` rows, which have to hold T, k of the classes
    that all teachers of the row keep are kept, the most likely ones, and the mass of all others is one number: exactly
    the mean of the dense rows, summed up so.

    Args:
        given: N rows of each of M teachers, of tensors.
        weights: (N, M), of each row summing to 1 or all 0; or (N, M, C), of each class, for rows with all logits.
        encoding: of the result, with its T.

    Returns:
        `log_probs` (N, C, ...) float32; or (N, k), `kept_classes` (N, k) int64 and `log_rest` (N,). Rows of weight 0
        are 0.

    Raises:
        UsageError: `topk` rows that do not hold T, or rows that are soft targets themselves.
    """
    if encoding.has_all_classes:
        of_rows = [_log_softmax(one, encoding.temperature) for one in given]
        if weights.ndim == 3:
            log_w = weights.log()
            both = torch.stack([log_p + log_w[:, number] for number, log_p in enumerate(of_rows)])
            mean = both.logsumexp(dim=0).log_softmax(dim=1)
        else:
            mean = _log_mean(of_rows, weights)
        taught = per_position(weights.reshape(len(weights), -1).sum(dim=1) > 0, mean)
        return {"log_probs": torch.where(taught, mean, 0.0)}
    return _bucketed_mean(given, weights, encoding)


def check_stored(stored: Sequence[float | str], temperature: float, *, name: str) -> None:
    """Refuses `topk` rows of which the soft targets at a temperature are not known exactly.

    Args:
        stored: temperatures at which the rows hold their tail, calibrated.
        temperature: of the soft targets.
        name: of the cache.

    Raises:
        UsageError: naming the temperatures that are stored.
    """
    if temperature not in stored:
        shown = ", ".join(t if isinstance(t, str) else f"{t:g}" for t in stored)
        raise UsageError(
            f"the mean of soft targets at temperature {temperature:g} needs the tail of the topk rows of {name} at "
            f"that temperature, and they hold {shown} (a calibration divides what was stored): use one of these "
            "(--temperature), or caches with all logits"
        )


def _log_softmax(rows: TeacherRows, temperature: float) -> Tensor:
    logits = rows.dense()
    found: Tensor = (logits if temperature == 1 else logits / temperature).log_softmax(dim=1)
    return found


def _log_mean(log_probs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """log of sum over m of w_m p_m; of one teacher its log p to the bit."""
    log_w = weights.log()
    parts = [
        torch.where(per_position(weights[:, number] > 0, one), one + per_position(log_w[:, number], one), -math.inf)
        for number, one in enumerate(log_probs)
    ]
    return torch.stack(parts).logsumexp(dim=0)


def _bucketed_mean(given: Sequence[TeacherRows], weights: Tensor, encoding: SoftTargets) -> dict[str, Any]:
    count, classes = len(weights), encoding.num_classes
    votes = weights > 0
    known, of_class, bucket = [], [], []
    for number, rows in enumerate(given):
        if is_topk(rows):
            check_stored(topk_encoding(rows).temperatures, encoding.temperature, name=f"teacher {number + 1}")
            slots = kept(rows)
            log_p, _ = teacher_log_probs(rows, slots, encoding.temperature)
            # One column more, for slots that hold no class.
            at = slots.classes if slots.is_empty is None else slots.classes.masked_fill(slots.is_empty, classes)
            own = log_p.new_full((count, classes + 1), -math.inf).scatter_(1, at, log_p[:, :-1])[:, :-1]
            holds = torch.zeros(count, classes + 1, dtype=torch.bool, device=own.device).scatter_(1, at, True)[:, :-1]
            known.append(holds | ~votes[:, number, None])
            bucket.append(log_p[:, -1])
        else:
            own = _log_softmax(rows, encoding.temperature)
            known.append(torch.ones_like(own, dtype=torch.bool))
            bucket.append(torch.full_like(own[:, 0], -math.inf))
        of_class.append(own)
    is_common = torch.stack(known).all(dim=0)
    mean = _log_mean(of_class, weights)
    # Finite, so that a class of probability 0 comes before one that is not common.
    ranked = mean.clamp(min=-1e30).masked_fill(~is_common, -math.inf)
    top, chosen = ranked.topk(encoding.k, dim=1)
    is_empty = torch.isneginf(top)
    taken = torch.zeros(count, classes + 1, dtype=torch.bool, device=mean.device)
    taken = taken.scatter_(1, chosen.masked_fill(is_empty, classes), True)[:, :-1]
    rest = [
        torch.logaddexp(one.masked_fill(taken, -math.inf).logsumexp(dim=1), tail)
        for one, tail in zip(of_class, bucket, strict=True)
    ]
    taught = votes.any(dim=1)
    log_probs = mean.gather(1, chosen).masked_fill(is_empty, -math.inf)
    return {
        "log_probs": torch.where(taught[:, None], log_probs, 0.0),
        "kept_classes": torch.where(is_empty | ~taught[:, None], chosen[:, :1], chosen),
        "log_rest": torch.where(taught, _log_mean(rest, weights), 0.0),
    }
