"""The arrays that a batch is gathered into: new ones, or the caller's, checked before a byte is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.arrays import ArraySpec
from kdcache.format.schema import CRC_ARRAY, RowSchema
from kdcache.store.rows import TeacherRows


def empty_rows(schema: RowSchema, count: int) -> TeacherRows:
    """Uninitialised NumPy rows of a schema."""
    return TeacherRows(
        encoding=schema.encoding,
        arrays={s.name: np.empty(s.shape(count), s.dtype) for s in schema.encoding.specs},
        sample_id=np.empty(count, schema.id_dtype),
        view=np.empty(count, np.uint16),
        label=np.empty(count, np.int64) if schema.has_labels else None,
        has_teacher=np.empty(count, bool),
        input_digest=np.empty(count, np.uint64) if schema.has_digests else None,
        label_b=np.empty(count, np.int64) if schema.is_mixed else None,
        mix_ratio=np.empty(count, np.float32) if schema.is_mixed else None,
    )


def check_buffer(out: TeacherRows, schema: RowSchema) -> None:
    """Refuses a caller's buffer that is not of NumPy arrays of this schema (7 us; a batch of 256 takes 50).

    Raises:
        UsageError: an array is missing, too many, a tensor, not contiguous, or of another type or shape.
    """
    specs = (*(s for s in schema.specs if s.name != CRC_ARRAY), ArraySpec("has_teacher", "|b1"))
    found = {**out.arrays, **{n: getattr(out, n) for n in ("sample_id", "view", "has_teacher")}}
    optional = {n: getattr(out, n) for n in ("label", "label_b", "mix_ratio", "input_digest")}
    found |= {n: a for n, a in optional.items() if a is not None}
    if len(found) != len(specs) or not all(_fits(found.get(s.name), s, len(out)) for s in specs):
        raise UsageError(
            "out does not fit this cache: pass what gather returned for the same cache, as NumPy arrays (not tensors)"
        )


def first_rows(out: TeacherRows, count: int) -> TeacherRows:
    """The first `count` rows of a buffer: the buffer itself, if it has exactly that many.

    Raises:
        UsageError: it has fewer.
    """
    if len(out) < count:
        raise UsageError(f"out has room for {len(out)} rows, {count} were asked for")
    return out if len(out) == count else out.take(slice(0, count))


def _fits(array: Any, spec: ArraySpec, rows: int) -> bool:
    if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.shape != spec.shape(rows):
        return False
    return array.flags.c_contiguous and array.flags.writeable


def blank(rows: TeacherRows, missing: np.ndarray) -> None:
    """Makes the rows where `missing` (N,) bool is True those of samples without a teacher: zeros, label -1."""
    for array in rows.arrays.values():
        array[missing] = 0
    rows.sample_id[missing] = 0 if rows.sample_id.dtype.kind == "i" else b""
    rows.has_teacher[missing] = False
    if rows.label is not None:
        rows.label[missing] = -1
    if rows.input_digest is not None:
        rows.input_digest[missing] = 0
    if rows.label_b is not None and rows.mix_ratio is not None:
        rows.label_b[missing], rows.mix_ratio[missing] = -1, 1
