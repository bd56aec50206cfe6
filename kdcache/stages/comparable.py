"""What of a teacher's logits a cache can be compared with: of top-k rows what is kept, of int8 and int4 their grid."""

from __future__ import annotations

import math

import numpy as np

from kdcache.format.quantized import Quantized
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows

_HALF_UNIT = 2.0**-11  # of float16, relative to the value; that of float32 is far below


def comparable(again: np.ndarray, stored: TeacherRows) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays that are equal where a teacher gives again what is stored, one column for each value compared.

    Of `topk` these are the K largest, the labels' logits and the mean of the others. Of int8 and int4 a value may lie
    anywhere within half a step of what is stored: what lies there is compared with itself.

    Args:
        again: (N, C, ...) float raw logits, computed again.
        stored: N rows as NumPy.

    Returns:
        (N, M, ...) float64 computed and stored values; -inf in both for what there is not.
    """
    exact, encoding = again.astype(np.float64), stored.encoding
    if isinstance(encoding, TopK):
        return _of_what_is_kept(exact, encoding, stored)
    held = stored.dense().astype(np.float64)
    if not isinstance(encoding, Quantized):
        return exact, held
    row_max = stored.arrays["row_max"][:, None].astype(np.float64)
    with np.errstate(invalid="ignore"):
        slack = stored.arrays["row_scale"][:, None] / 2 + _HALF_UNIT * (np.abs(held - row_max) + np.abs(row_max))
    return exact, np.where(np.isfinite(held), np.clip(exact, held - slack, held + slack), held)


def _of_what_is_kept(exact: np.ndarray, encoding: TopK, stored: TeacherRows) -> tuple[np.ndarray, np.ndarray]:
    arrays = stored.arrays
    classes = encoding.class_index(arrays)
    kept = [np.take_along_axis(exact, classes, axis=1)]
    held = [arrays["topk_logits"].astype(np.float64)]
    is_tail = np.ones(exact.shape, bool)
    np.put_along_axis(is_tail, classes, False, axis=1)
    if encoding.labels:
        held.append(arrays["label_logits"].astype(np.float64))
        rows = np.arange(len(exact))
        for labels in (stored.label, stored.label_b)[: encoding.labels]:
            assert labels is not None  # the schema binds the labels kept to those stored
            label = np.clip(labels, -1, encoding.num_classes - 1)  # a class beyond C stands in no file of ours
            known = label >= 0
            kept.append(np.where(known, exact[rows, label], -math.inf)[:, None])
            is_tail[rows[known], label[known]] = False
    count = is_tail.sum(axis=1)
    total = np.where(is_tail, exact, 0).sum(axis=1)
    kept.append(np.divide(total, count, out=np.full(total.shape, -math.inf), where=count > 0)[:, None])
    held.append(arrays["tail_mean"][:, None].astype(np.float64))
    return np.concatenate(kept, axis=1), np.concatenate(held, axis=1) + arrays["row_max"][:, None]
