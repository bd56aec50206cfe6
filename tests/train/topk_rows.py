"""`topk` rows in memory, and what they are made from, for the tests of losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows


def rows_of(
    logits: np.ndarray,
    *,
    k: int,
    temperatures: tuple[float | str, ...] = (1.0, 2.0, 4.0),
    labels: Sequence[np.ndarray] = (),
) -> TeacherRows:
    """The `topk` rows of logits (N, C, ...), with the logits of up to two labels (N,), as tensors."""
    encoding = TopK(tuple(logits.shape[1:]), k, temperatures, len(labels))
    encoded = encoding.encode(logits, np.stack(labels, 1).astype(np.int64) if labels else None)
    count = len(logits)
    rows = TeacherRows(
        encoding, encoded.arrays, np.arange(count), np.zeros(count, np.uint16), None, np.ones(count, bool)
    )
    rows = replace(rows, label=np.asarray(labels[0], np.int64)) if labels else rows
    if len(labels) == 2:
        rows = replace(rows, label_b=np.asarray(labels[1], np.int64), mix_ratio=np.full(count, 0.5, "f4"))
    return rows.tensors()


def is_kept(rows: TeacherRows) -> np.ndarray:
    """(N, C, ...) bool, from the classes and labels alone."""
    shape = (len(rows), *rows.encoding.row_shape)
    mask = np.zeros(shape, bool)
    np.put_along_axis(mask, rows.arrays["topk_classes"].long().numpy(), True, axis=1)
    for labels in (rows.label, rows.label_b):
        if labels is not None:
            known = np.flatnonzero(labels.numpy() >= 0)
            mask[known, labels.numpy()[known]] = True
    return mask


def true_tail(rows: TeacherRows, logits: np.ndarray, temperature: Any) -> np.ndarray:
    """(N, ...) float64 logsumexp of the classes not kept, from all logits relative to the largest."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    if temperature == "z2":
        temperature = np.maximum(2 * rows.arrays["logit_std"].double().numpy(), np.finfo("f4").tiny)[:, None]
    x = np.where(is_kept(rows), -math.inf, z / temperature)
    top = x.max(axis=1)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - safe[:, None]).sum(axis=1)) + safe


def as_stored(logits: np.ndarray, rows: TeacherRows) -> torch.Tensor:
    """(N, C, ...) float64 logits relative to the largest, with the stored values where classes are kept."""
    relative = logits.astype("f8") - logits.max(axis=1, keepdims=True)
    return torch.from_numpy(np.where(is_kept(rows), relative.astype("f2").astype("f8"), relative))
