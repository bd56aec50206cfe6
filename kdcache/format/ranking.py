"""The k largest logits of each row, equal ones by the lower class number, so that every machine keeps the same.

A logit's bits, flipped so that they sort like the float, and behind them the class counted from the end make one
integer. No two of a row are equal: whatever partitions them finds the same k, which `argpartition` and `torch.topk` on
the floats do not promise.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_LOWER_HALF = 0xFFFFFFFF


def largest_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """The classes of the k largest logits, the largest first, equal ones in ascending order of their classes.

    Args:
        logits: (N, C, ...) float32 without NaN, C < 2**31.
        k: 1 to C.

    Returns:
        (N, k, ...) int64.

    >>> largest_classes(np.float32([[1, 5, 5, 3]]), 3).tolist()
    [[1, 2, 3]]
    """
    classes = logits.shape[1]
    bits = (logits + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0, which it equals
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(classes - 1, -1, -1).reshape(classes, *[1] * (logits.ndim - 2))
    if k < classes:
        keys = np.partition(keys, classes - k, axis=1)[:, classes - k :]
    found: np.ndarray = classes - 1 - (np.flip(np.sort(keys, axis=1), axis=1) & _LOWER_HALF)
    return found


def flaw_of_largest(arrays: Mapping[str, np.ndarray], logits: str, classes: str, num_classes: int) -> str | None:
    """What no writer stores in the largest logits of rows; None where they are sound.

    Args:
        arrays: of N rows.
        logits: name of the largest logits (N, K, ...), relative to `row_max`.
        classes: name of their classes (N, K, ...).
        num_classes: C.
    """
    ranked, values = np.sort(arrays[classes], axis=1), arrays[logits]
    if (ranked[:, -1] >= num_classes).any():
        return f"{classes} has a class beyond the last"
    if (ranked[:, 1:] == ranked[:, :-1]).any():
        return f"{classes} has a class twice in a row"
    if (values[:, 1:] > values[:, :-1]).any() or (values[:, 0] != 0).any():
        return f"{logits} do not descend from 0"
    return "row_max is infinite" if np.isinf(arrays["row_max"]).any() else None


def class_dtype(classes: int) -> str:
    """What class numbers are stored as: uint16 up to 65,536 classes, uint32 beyond."""
    return "<u2" if classes <= 1 << 16 else "<u4"
