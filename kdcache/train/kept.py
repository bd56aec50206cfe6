"""The classes that a `topk` row keeps, as slots of equal number: the K largest, then one slot for each label.

A label that is among the K largest, that the other label repeats, or that a row does not have leaves its slot empty:
each class is counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.topk import TopK
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
        return Kept(classes, top, None, float(encoding.num_classes - encoding.k))
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
    return Kept(
        torch.cat([classes, their_classes], dim=1),
        torch.cat([top, own], dim=1),
        torch.cat([torch.zeros_like(classes, dtype=torch.bool), missing], dim=1),
        (encoding.num_classes - encoding.k - (~missing).sum(dim=1)).to(dtype),
    )
