"""The classes that a `topk` row keeps, as slots of equal number: the K largest, then one slot for each label.

A label that is among the K largest, that the other label repeats, or that a row does not have leaves its slot empty:
each class is counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.topk import Z2, TopK, z2_temperature
from kdcache.store.rows import TeacherRows


@dataclass(frozen=True, eq=False)
class Kept:
    """M = K + L slots of N rows.

    Attributes:
        classes: (N, M, ...) int64; of an empty slot the row's first class.
        logits: (N, M, ...) minus `row_max`; -inf in an empty slot, as for a masked class.
        is_empty: (N, M, ...) bool, broadcast over positions; None where no slot can be.
        tail_count: (N, ...) float, or a number where all rows have as many, of the classes that no slot holds.
    """

    classes: Tensor
    logits: Tensor
    is_empty: Tensor | None
    tail_count: Tensor | float


def topk_encoding(rows: TeacherRows) -> TopK:
    """The encoding of `topk` rows.

    Raises:
        UsageError: rows of another encoding.
    """
    if not isinstance(rows.encoding, TopK):
        raise UsageError(f"these rows are encoded as {rows.encoding.name}, expected topk")
    return rows.encoding


def kept(rows: TeacherRows, *, dtype: torch.dtype = torch.float32) -> Kept:
    """The slots of `topk` rows (of tensors).

    Args:
        rows: N rows; `label` and `label_b` are the labels they were stored with.
        dtype: of the logits.

    Raises:
        UsageError: rows of another encoding, or whose labels were taken away.
    """
    encoding = topk_encoding(rows)
    top, classes = rows.arrays["topk_logits"].to(dtype), encoding.class_index(rows.arrays)
    if not encoding.labels:
        return _but_blank(Kept(classes, top, None, float(encoding.num_classes - encoding.k)), rows.has_teacher)
    labels = [label for label in (rows.label, rows.label_b) if label is not None][: encoding.labels]
    if len(labels) != encoding.labels:
        raise UsageError(
            f"these rows keep the logits of {encoding.labels} labels each, but hold {len(labels)} labels: pass the "
            "rows as the cache returned them (label and label_b say which classes those logits are)"
        )
    empty: list[Tensor] = []
    for number, label in enumerate(labels):
        repeats = (classes == label[:, None]).any(dim=1) | (label < 0)
        empty.append(repeats | (label == labels[0]) if number else repeats)
    missing = torch.stack(empty, dim=1)
    own = rows.arrays["label_logits"].to(dtype).masked_fill(missing, -math.inf)
    # Beyond the last class no label of ours lies: a hostile file must not end the process.
    their_classes = torch.stack(labels, dim=1).clamp(max=encoding.num_classes - 1)
    their_classes = torch.where(missing, classes[:, :1], their_classes)
    slots = Kept(
        torch.cat([classes, their_classes], dim=1),
        torch.cat([top, own], dim=1),
        torch.cat([torch.zeros_like(classes, dtype=torch.bool), missing], dim=1),
        (encoding.num_classes - encoding.k - (~missing).sum(dim=1)).to(dtype),
    )
    return _but_blank(slots, rows.has_teacher)


def without_labels(rows: TeacherRows, hidden: Tensor) -> TeacherRows:
    """The rows that a dump without some of the labels would have made.

    Of `topk` rows the label's logit goes where it would be then: into the tail, whose sum leaves it out. Taken away
    alone, the label would take its probability with it.

    Args:
        rows: N rows of tensors, of any encoding, with one label each or none.
        hidden: (N,) bool, whose label is taken away.
    """
    if rows.label is None:
        return rows
    made = replace(rows, label=rows.label.masked_fill(hidden, -1))
    if not isinstance(rows.encoding, TopK) or not rows.encoding.labels:
        return made
    arrays, slots = rows.arrays, kept(rows)
    assert slots.is_empty is not None
    moved = hidden & ~slots.is_empty[:, -1]
    own = slots.logits[:, -1].masked_fill(~moved, -math.inf)
    tail, mean, count = arrays["tail_logsumexp"], arrays["tail_mean"], slots.tail_count
    assert isinstance(count, Tensor)
    divisors = (z2_temperature(arrays["logit_std"]) if t == Z2 else float(t) for t in rows.encoding.temperatures)
    sums = torch.stack([torch.logaddexp(tail[:, at], own / t) for at, t in enumerate(divisors)], dim=1)
    longer = torch.where(count > 0, mean + (own - mean) / (count + 1), own)
    changed = {
        "tail_logsumexp": sums,
        "tail_mean": torch.where(moved, torch.where(torch.isneginf(mean) & (count > 0), mean, longer), mean),
        "label_logits": arrays["label_logits"].masked_fill(hidden[:, None], -math.inf),
    }
    return replace(made, arrays={**arrays, **changed})


def _but_blank(slots: Kept, has_teacher: Tensor) -> Kept:
    """Rows without a teacher are zeros, K times class 0: all their slots but the first are empty.

    Their student's probabilities are then those of class 0 and of all others, and sum to 1.
    """
    if has_teacher.device.type == "cpu" and bool(has_teacher.all()):  # on a GPU a look would stall the stream
        return slots
    shape = [len(has_teacher), *[1] * (slots.classes.ndim - 1)]
    blank = (~has_teacher).reshape(shape).expand(slots.classes.shape).clone()
    blank[:, 0] = False
    is_empty = blank if slots.is_empty is None else slots.is_empty | blank
    count = torch.as_tensor(slots.tail_count, dtype=slots.logits.dtype, device=has_teacher.device)
    return replace(
        slots,
        classes=torch.where(blank, slots.classes[:, :1], slots.classes),
        logits=slots.logits.masked_fill(blank, -math.inf),
        is_empty=is_empty,
        tail_count=count.expand(slots.classes[:, 0].shape),
    )
