"""Whether arrays of a foreign file can be what they are said to be: logits, labels, ids; and probabilities as logits.

A softmax cannot be undone beyond a shift of each row, which no softmax sees again: log-probabilities are logits, and
the logarithm of probabilities is. Probabilities that pose as logits would flatten every soft target, so rows that all
look like them are refused until the caller says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.errors import DataError, LogitsError
from kdcache.format.encoding import bad_rows
from kdcache.stages.import_options import LOG_PROBABILITIES, PROBABILITIES
from kdcache.store.foreign import ForeignArray

_SUM_TOLERANCE = 0.01  # float16 probabilities of 50,000 classes still sum to 1 this well
_TINY = float(np.finfo(np.float32).tiny)


def check_arrays(name: str, arrays: Mapping[str, ForeignArray]) -> None:
    """Refuses shapes and types that logits, labels and ids do not have.

    Args:
        name: of the file.
        arrays: by role.

    Raises:
        DataError: naming the array, what it is and what to do.
    """
    logits = arrays["logits"]
    _check_logits(name, logits)
    rows, classes = logits.shape[:2]
    for role in ("labels", "ids"):
        if role not in arrays:
            continue
        array = arrays[role]
        where, wanted = f"{name}: {role} {array.name}", "integers" if role == "labels" else "integers or text"
        if len(array.shape) == 2 and array.shape[1] == classes and role == "labels":
            raise DataError(f"{where} has shape {array.shape}, as one-hot labels do; save their argmax over axis 1")
        if array.shape != (rows,):
            raise DataError(f"{where} has shape {array.shape}, and {logits.name} has {rows} rows; expected ({rows},)")
        if array.dtype.kind not in ("iu" if role == "labels" else "iuS"):
            hint = "; round them where they were made" if array.dtype.kind == "f" else ""
            raise DataError(f"{where} holds {array.dtype}; expected {wanted}{hint}")


def _check_logits(name: str, logits: ForeignArray) -> None:
    where = f"{name}: logits {logits.name}"
    if logits.dtype.kind != "f":
        found = "text" if logits.dtype.kind == "S" else str(logits.dtype)
        raise DataError(f"{where} holds {found}; expected float16, bfloat16, float32 or float64")
    if not 2 <= len(logits.shape) <= 5:
        hint = "; save one logit a row as (N, 1)" if len(logits.shape) == 1 else ""
        raise DataError(f"{where} has shape {logits.shape}; expected (N, C) or (N, C, ...), one row a sample{hint}")
    if min(logits.shape) < 1:
        raise DataError(f"{where} has shape {logits.shape}; a cache needs at least one row and one class")


def looks_like_probabilities(values: np.ndarray) -> bool:
    """Whether all rows (N, C, ...) are in [0, 1] and sum to 1 over classes; never for a single class."""
    return values.shape[1] > 1 and not _not_probabilities(values).size


def looks_like_log_probabilities(values: np.ndarray) -> bool:
    """Whether the exponentials of all rows (N, C, ...) sum to 1 over classes; never for a single class."""
    return values.shape[1] > 1 and not _not_log_probabilities(values).size


def as_logits(values: np.ndarray, kind: str | None, *, where: str, first: int) -> np.ndarray:
    """Raw logits (N, C, ...) of rows of the given kind.

    Args:
        values: (N, C, ...) floats.
        kind: one of `KINDS`; None stands for logits.
        where: file and array, for the messages.
        first: number of the first row.

    Returns:
        The values as they are; float64 logarithms for probabilities, that of 0 being log(1.2e-38) = -87.3.

    Raises:
        LogitsError: NaN, +inf or a row of -inf alone; rows that are not of that kind; probabilities of one class.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN warns when it is looked at
        bad = bad_rows(values)
    if bad.size:
        raise LogitsError(f"{where}: row {first + bad[0]} holds NaN, +inf or -inf alone")
    if kind == LOG_PROBABILITIES:
        _refuse(_not_log_probabilities(values), "the exponentials do not sum to 1", where=where, first=first)
    if kind != PROBABILITIES:
        return values
    if values.shape[1] == 1:
        raise LogitsError(f"{where}: one class; save the logit log(p / (1 - p)), and import it as logits")
    _refuse(_not_probabilities(values), "not in [0, 1], or they do not sum to 1", where=where, first=first)
    logits: np.ndarray = np.log(np.maximum(values.astype(np.float64), _TINY))
    return logits


def _refuse(wrong: np.ndarray, what: str, *, where: str, first: int) -> None:
    if wrong.size:
        raise LogitsError(f"{where}: row {first + wrong[0]}: {what} over classes; leave out --kind, or name another")


def _not_probabilities(values: np.ndarray) -> np.ndarray:
    low, high = values.min(axis=1), values.max(axis=1)
    sums = values.sum(axis=1, dtype=np.float64)
    return _rows((low < 0) | (high > 1 + _SUM_TOLERANCE) | (np.abs(sums - 1) > _SUM_TOLERANCE))


def _not_log_probabilities(values: np.ndarray) -> np.ndarray:
    high = values.max(axis=1)
    sums = np.exp(np.minimum(values, 1.0).astype(np.float64)).sum(axis=1)
    return _rows((high > _SUM_TOLERANCE) | (np.abs(sums - 1) > _SUM_TOLERANCE))


def _rows(wrong: np.ndarray) -> np.ndarray:
    """Positions of rows (N, ...) with any mark."""
    return np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
