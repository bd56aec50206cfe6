"""What a caller hands over, in the form that a cache stores: logits, labels, ids, classes, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.errors import CorruptCacheError, DataError, KDCacheError, LogitsError, UsageError
from kdcache.format.encoding import label_count
from kdcache.format.identity import canonical_json, show_id
from kdcache.format.manifest import ClassList, parse_provenance
from kdcache.format.schema import RowSchema
from kdcache.format.strict_json import load_json


def as_float_array(logits: Any) -> np.ndarray:
    """Logits as a NumPy array of a type NumPy knows; tensors come to the CPU, bfloat16 becomes float32.

    Raises:
        LogitsError: not an array of floats.
    """
    if hasattr(logits, "detach"):  # a tensor, without importing torch
        tensor = logits.detach()
        logits = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).cpu().numpy()
    values = _as_array(logits, LogitsError, "logits")
    if values.dtype.kind != "f":
        raise LogitsError(f"logits must be floating point, found {type(logits).__name__} of {values.dtype}")
    return values


def check_labels(labels: Any, ids: np.ndarray, classes: int) -> np.ndarray | None:
    """(N,) int64 labels in [-1, C), or None where none were given.

    Raises:
        DataError: another length, not integers, or out of range; the message names the sample.
    """
    if labels is None:
        return None
    values = _as_array(labels.detach().cpu() if hasattr(labels, "detach") else labels, DataError, "labels")
    if values.shape != (len(ids),) or values.dtype.kind not in "iu":
        raise DataError(f"labels have shape {values.shape} and type {values.dtype}, expected ({len(ids)},) integers")
    count = label_count(classes)
    wrong = np.flatnonzero((values < -1) | (values >= count))
    if wrong.size:
        first = wrong[0]
        raise DataError(
            f"sample {show_id(ids[first])} has label {values[first]}, expected 0 to {count - 1}, or -1 for none"
        )
    return values.astype(np.int64)


def as_digests(digests: Any, rows: int) -> np.ndarray | None:
    """(N,) uint64 input digests, or None where none were given.

    Raises:
        DataError: another length, or not unsigned 64-bit integers.
    """
    if digests is None:
        return None
    values = _as_array(digests.detach().cpu() if hasattr(digests, "detach") else digests, DataError, "input_digests")
    if values.shape != (rows,) or values.dtype.kind not in "iu" or (values.dtype.kind == "i" and (values < 0).any()):
        raise DataError(
            f"input_digests have shape {values.shape} and type {values.dtype}, expected ({rows},) integers from 0 on"
        )
    return values.astype(np.uint64)


def _as_array(values: Any, kind: type[KDCacheError], what: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise kind(f"{what} are not an array of one shape: {error}") from None


def fit_ids(ids: np.ndarray, schema: RowSchema) -> np.ndarray:
    """Ids in the stored type.

    Raises:
        DataError: of another kind, or text that is too long for it.
    """
    if (ids.dtype.kind == "i") != (schema.id_dtype == "<i8"):
        raise DataError(f"sample ids changed from {schema.id_dtype} to {ids.dtype}; use one kind")
    if ids.dtype.itemsize > np.dtype(schema.id_dtype).itemsize:
        lengths = np.char.str_len(ids)
        if int(lengths.max()) > np.dtype(schema.id_dtype).itemsize:
            raise DataError(
                f"the sample id {show_id(ids[int(lengths.argmax())])} is longer than the {schema.id_dtype[2:]} bytes "
                "that the first batch asked for; pass id_bytes= with the length of the longest id"
            )
    return ids.astype(schema.id_dtype)


def consecutive(ids: np.ndarray) -> tuple[int, int] | None:
    """(first, last) where ids are consecutive integers, else None."""
    if ids.dtype.kind != "i" or not len(ids):
        return None
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 != len(ids) or not bool((np.diff(ids) == 1).all()):
        return None
    return first, last


def class_list(classes: int | Sequence[str]) -> ClassList:
    """A class list from a count or from the ordered names.

    Raises:
        UsageError: neither of the two.
    """
    if isinstance(classes, (int, np.integer)) and not isinstance(classes, bool):
        return ClassList.of(int(classes), None)
    if isinstance(classes, (str, bytes)) or not isinstance(classes, Sequence):
        raise UsageError(f"classes must be a count or a sequence of names, found {classes!r:.80}")
    return ClassList.of(len(classes), tuple(str(c) for c in classes))


def plain_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    """Provenance as it will be read back: tuples become lists, keys become text.

    Raises:
        UsageError: values that JSON does not have, or teacher and data that are not dictionaries.
    """
    try:
        text = canonical_json(provenance).encode()
        return parse_provenance(load_json(text, where="provenance"), where="provenance")
    except (TypeError, ValueError, CorruptCacheError) as error:
        raise UsageError(
            f"provenance must hold plain nested values (text, numbers, lists, dictionaries): {error}"
        ) from None
