"""What `topk` rows say of the teacher without its other logits: exact at a stored temperature, else with a bound.

The probability of a kept class needs the normaliser alone, and that is the kept logits and the tail's logsumexp. So
captured mass, negative log-likelihood of the label, confidence of the top class and the target part of DKD are exact;
entropy and Brier score are not, for they need every class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.kept import Kept, kept, topk_encoding
from kdcache.train.log_pair import Pair, against_others
from kdcache.train.tail import Tail, Temperature, tail_logsumexp, temperature_of


@dataclass(frozen=True, eq=False)
class Measured:
    """A value of each row, float64 (float32 on a device without), and by how much it may be off.

    Attributes:
        value: (N, ...).
        error: (N, ...), or None where the value is exact.
    """

    value: Tensor
    error: Tensor | None


def captured_mass(rows: TeacherRows, temperature: Temperature = 1.0) -> Measured:
    """The teacher's probability of the classes that are kept: 1 minus the mass of the tail.

    Args:
        rows: N `topk` rows of tensors.
        temperature: above 0, "z2", or (N, ...) of each row.

    Returns:
        (N, ...) in [0, 1].

    Raises:
        UsageError: another encoding, or no temperature.
    """
    head, tail, _ = _parts(rows, temperature)
    return _between(tail, lambda at: torch.sigmoid(head.logsumexp(dim=1) - at))


def confidence(rows: TeacherRows, temperature: Temperature = 1.0) -> Measured:
    """The teacher's probability of its top class, for calibration errors. Arguments are those of `captured_mass`."""
    head, tail, _ = _parts(rows, temperature)
    return _between(tail, lambda at: (head[:, 0] - torch.logaddexp(head.logsumexp(dim=1), at)).exp())


def label_log_prob(rows: TeacherRows, temperature: Temperature = 1.0, *, labels: Tensor | None = None) -> Measured:
    """The teacher's log-probability of the label, whose negative mean is its NLL; 0 without a label or a teacher.

    Args:
        rows: N `topk` rows of tensors.
        temperature: above 0, "z2", or (N, ...) of each row.
        labels: (N, ...) int64, -1 = none; by default the rows' own, whose logits are always kept.

    Returns:
        (N, ...) nats, at most 0.

    Raises:
        UsageError: another encoding, no temperature, or rows without labels.
        MismatchError: a label whose logit the row does not keep.
    """
    labels = _but_blank(_labels(rows, labels), rows.has_teacher)
    head, tail, slots = _parts(rows, temperature)
    own = _pick(head, label_slot(slots, labels))

    def at_tail(at: Tensor) -> Tensor:
        return torch.where(labels >= 0, own - torch.logaddexp(head.logsumexp(dim=1), at), 0.0)

    return _between(tail, at_tail)


def top_class(rows: TeacherRows) -> Tensor:
    """(N, ...) int64, the teacher's most likely class, the first of equals.

    Raises:
        UsageError: another encoding.
    """
    found: Tensor = topk_encoding(rows).top_class(rows.arrays)
    return found


def label_slot(slots: Kept, labels: Tensor) -> Tensor:
    """(N, ...) int64, which slot holds the label; 0 where there is none.

    Looks at the data, for which a GPU waits.

    Args:
        slots: of N rows.
        labels: (N, ...) int64, -1 = none.

    Raises:
        MismatchError: a label that no slot holds.
    """
    is_it = slots.classes == labels.unsqueeze(1)
    if slots.is_empty is not None:
        is_it = is_it & ~slots.is_empty
    missing = ~is_it.any(dim=1) & (labels >= 0)
    if bool(missing.any()):
        raise MismatchError(
            f"{int(missing.sum())} labels, for example {int(labels[missing][0])}, are neither among the K classes that "
            "their row keeps nor its stored label, so its logit is not known. topk rows keep the logits of the labels "
            "that the dump saw: pass those, or use rows with all logits (--dtype float16, int8 or int4)"
        )
    return is_it.to(torch.uint8).argmax(dim=1)


def target_pair(both: Pair, rows: TeacherRows, labels: Tensor | None = None) -> Pair:
    """The label against all other classes, on both sides: what the target part of DKD compares.

    Both logarithms are sums over outcomes, none is 1 minus the other, so that neither loses digits.

    Args:
        both: of `topk_pair` of these rows.
        rows: N `topk` rows.
        labels: (N, ...) int64, -1 = none; by default the rows' own.

    Returns:
        M = 2 outcomes (N, 2, ...); `has_teacher` (N, ...) leaves out rows without a label.

    Raises:
        UsageError: rows without labels.
        MismatchError: a label whose logit the row does not keep.

    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022 (arXiv:2203.08679), equation 5.
    """
    labels = _labels(rows, labels)
    if both.has_teacher is not None:
        labels = _but_blank(labels, both.has_teacher)
    slot = label_slot(kept(rows), labels).unsqueeze(1)
    has_label = labels >= 0
    if both.has_teacher is not None:
        has_label = has_label & both.has_teacher.reshape(-1, *[1] * (labels.ndim - 1))
    return replace(
        both,
        log_p=against_others(both.log_p, slot)[0],
        log_q=against_others(both.log_q, slot)[0],
        has_teacher=has_label,
        is_bucketed=True,
    )


def _parts(rows: TeacherRows, temperature: Temperature) -> tuple[Tensor, Tail, Kept]:
    """Kept logits / T (N, M, ...), the tail, and the slots."""
    divisor = temperature_of(rows, temperature)
    slots = kept(rows, dtype=divisor.dtype)
    tail = tail_logsumexp(rows, temperature, slots=slots, dtype=divisor.dtype)
    return slots.logits / (divisor.unsqueeze(1) if divisor.ndim else divisor), tail, slots


def _between(tail: Tail, function: Callable[[Tensor], Tensor]) -> Measured:
    """A monotone function of the tail: at its middle, with the larger distance to either end."""
    value = function(tail.middle)
    if tail.half_width is None:
        return Measured(value, None)
    low, high = (function(tail.middle + side * tail.half_width) for side in (-1, 1))
    return Measured(value, torch.maximum((low - value).abs(), (high - value).abs()))


def _labels(rows: TeacherRows, labels: Tensor | None) -> Tensor:
    found = rows.label if labels is None else labels
    if found is None:
        raise UsageError("these rows have no labels (the dump saw none): pass labels, which must be among the kept")
    return found.long()


def _pick(values: Tensor, slot: Tensor) -> Tensor:
    """(N, ...) the value in a slot (N, ...) of (N, M, ...)."""
    return values.gather(1, slot.unsqueeze(1)).squeeze(1)


def _but_blank(labels: Tensor, has_teacher: Tensor) -> Tensor:
    """Labels (N, ...), -1 in rows without a teacher, which keep no label's logit and do not count."""
    return torch.where(has_teacher.reshape(-1, *[1] * (labels.ndim - 1)), labels, -1)
