"""`topk` rows in other classes: the kept logits get other class numbers; merging and dropping touch kept ones only.

The tail's logsumexp at T = 4 cannot tell what the merged logit of two of its classes would be, nor what is left without
one. So a class that is merged or dropped must be among the K largest of each row; then nothing of the tail changes but
what it is relative to, and the rows are exactly those of a mapped teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.format.identity import show_id
from kdcache.format.topk import Z2, TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.row_weights import per_position


def lacking(rows: TeacherRows, encoding: TopK, classes: Sequence[int]) -> Tensor:
    """(N,) bool, which rows do not have all of some classes among their K largest; none without a teacher does.

    Args:
        rows: N rows of tensors.
        encoding: of the rows.
        classes: of the teacher.
    """
    wanted = torch.zeros(encoding.num_classes, dtype=torch.bool, device=rows.has_teacher.device)
    wanted[list(classes)] = True
    found = wanted[encoding.class_index(rows.arrays)].sum(dim=1)  # each class comes once
    is_short: Tensor = rows.has_teacher & (found < len(classes)).reshape(len(rows), -1).any(dim=1)
    return is_short


def mapped_topk(
    rows: TeacherRows,
    encoding: TopK,
    targets: Sequence[int],
    merged: Mapping[int, Sequence[int]],
    *,
    num_classes: int,
) -> TeacherRows:
    """The rows in the student's classes; labels stay the teacher's.

    Where classes are merged or dropped, "z2" is no stored temperature any more and `logit_std` is NaN: the standard
    deviation of the mapped logits is not known.

    Args:
        rows: N rows of tensors.
        encoding: of the rows.
        targets: (C,) of each class of the teacher the student's, or -1.
        merged: by class of the student the members that become it.
        num_classes: of the student.

    Raises:
        MismatchError: a row does not keep a class that is merged or dropped; it is named.
        UsageError: no kept class, or no stored temperature, would be left.
    """
    single = [n for n, target in enumerate(targets) if target < 0 or target in merged]
    arrays, k, temperatures = dict(rows.arrays), encoding.k, encoding.temperatures
    top, table = encoding.class_index(arrays), torch.tensor(targets, device=rows.has_teacher.device)
    classes = table[top]
    if single:
        check_kept(rows, encoding, single)
        gone = sum(len(group) - 1 for group in merged.values()) + sum(target < 0 for target in targets)
        k, temperatures = k - gone, tuple(t for t in temperatures if t != Z2)
        if k < 1 or not temperatures:
            raise UsageError(
                f"a class map takes {gone} of the {encoding.k} classes that each row keeps and leaves the temperatures "
                f"{temperatures}: use a cache with all logits (--dtype float16)"
            )
        arrays = _merged(rows, encoding, classes, merged, temperatures, k=k)
        classes = arrays["topk_classes"]
    if len({*targets} - {-1}) < num_classes:
        # Some classes outside the kept ones are -inf: their mean is, and what is above it cannot be told.
        arrays["tail_mean"] = torch.full_like(arrays["tail_mean"], -math.inf)
    # Rows without a teacher are K times class 0.
    arrays["topk_classes"] = torch.where(per_position(rows.has_teacher, classes), classes, 0)
    made = TopK((num_classes, *encoding.row_shape[1:]), k, temperatures, encoding.labels)
    return replace(rows, encoding=made, arrays=arrays)


def check_kept(rows: TeacherRows, encoding: TopK, single: Sequence[int]) -> None:
    """Refuses rows whose tail holds a class that is merged or dropped.

    Raises:
        MismatchError: naming the first row.
    """
    wrong = lacking(rows, encoding, single)
    if not bool(wrong.any()):
        return
    first = int(wrong.nonzero()[0])
    own = {int(n) for n in encoding.class_index(rows.arrays)[first].flatten().tolist()}
    absent = next((n for n in single if n not in own), single[0])
    raise MismatchError(
        f"the class map merges or drops the class {absent} of the teacher, and the topk row of sample "
        f"{show_id(rows.sample_id[first])} (and of {int(wrong.sum()) - 1} others here) has it in its tail, where it "
        "cannot be told from others: use a cache with all logits (--dtype float16), or with a larger --top-k than "
        f"{encoding.k}"
    )


def _merged(
    rows: TeacherRows,
    encoding: TopK,
    classes: Tensor,
    merged: Mapping[int, Sequence[int]],
    temperatures: Sequence[float | str],
    *,
    k: int,
) -> dict[str, Any]:
    """The arrays with k slots, and everything relative to the new largest logit, which may be another one."""
    given = rows.arrays
    logits = given["topk_logits"].float()
    is_left = classes >= 0
    made = logits.clone()
    for target in merged:
        members = classes == target
        total = logits.masked_fill(~members, -math.inf).logsumexp(dim=1, keepdim=True)
        first = members & (members.cumsum(dim=1) == 1)
        made = torch.where(first, total, made)
        is_left = is_left & (~members | first)
    # Largest first, and what is gone behind all others; its -inf may be that of a masked class that stays.
    order = made.masked_fill(~is_left, -math.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~is_left).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))[:, :k]
    made, classes = made.gather(1, order), classes.gather(1, order)
    shift = made[:, 0]
    shift = torch.where(torch.isfinite(shift) & per_position(rows.has_teacher, shift), shift, 0.0)
    stays = [index for index, t in enumerate(encoding.temperatures) if t in temperatures]
    divisors = torch.tensor([float(t) for t in temperatures], device=logits.device)
    arrays = dict(given)
    arrays["topk_logits"] = made - shift.unsqueeze(1)
    arrays["topk_classes"] = classes
    arrays["row_max"] = given["row_max"] + shift
    arrays["tail_mean"] = given["tail_mean"] - shift
    arrays["logit_std"] = torch.full_like(given["logit_std"], math.nan)
    spread = divisors.reshape(1, -1, *[1] * (shift.ndim - 1))
    arrays["tail_logsumexp"] = given["tail_logsumexp"][:, stays] - shift.unsqueeze(1) / spread
    if encoding.labels:
        # Of a merged class the slot is empty, since it is among the largest; what stands there is not read.
        arrays["label_logits"] = (given["label_logits"].float() - shift.unsqueeze(1)).clamp(max=0)
    return arrays
