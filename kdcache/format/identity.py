"""Identities: sample ids, fingerprints of configurations, digests of inputs.

A cached row belongs to a sample because their ids are equal, never because of a position in a loader.
An id is an int64 or a byte string of at most 1,024 bytes; text becomes UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from kdcache.errors import DataError, UsageError

MAX_ID_BYTES = 1024


def as_sample_ids(values: Any) -> np.ndarray:
    """Sample ids as a cache stores them.

    Args:
        values: integers, or text or byte strings, as any sequence, array or tensor of N elements.

    Returns:
        (N,) int64, or (N,) fixed-length bytes (`S<n>`). Uniqueness is not checked here.

    Raises:
        DataError: one id instead of a sequence, mixed kinds, floats, empty ids, ids ending in a NUL byte, ids
            above 1,024 bytes, text that is not Unicode.

    >>> as_sample_ids(["cat/1.png", "dog/12.png"])
    array([b'cat/1.png', b'dog/12.png'], dtype='|S10')
    """
    array = values if isinstance(values, np.ndarray) else None
    if array is None and hasattr(values, "numpy"):  # a tensor, without importing torch
        array = values.detach().cpu().numpy()
    if array is None:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise DataError(f"sample ids must be a sequence of ids, found one {type(values).__name__}: {values!r:.80}")
        return _from_sequence(list(values))
    if array.ndim != 1:
        raise DataError(f"sample ids must be one-dimensional, found shape {array.shape}")
    if array.dtype.kind in "iu":
        if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
            raise DataError("sample ids must fit int64: found an id of 2**63 or above")
        return array.astype("<i8", copy=False)
    if array.dtype.kind == "S":
        _check_bytes(array)
        return array
    return _from_sequence(array.tolist())


def _from_sequence(values: list[Any]) -> np.ndarray:
    if not values:
        return np.empty(0, "<i8")
    if all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        try:
            return np.array(values, "<i8")
        except OverflowError:
            raise DataError("sample ids must fit int64: found a larger one") from None
    if all(isinstance(v, (str, bytes)) for v in values):
        try:
            encoded = [v.encode("utf-8", "surrogateescape") if isinstance(v, str) else bytes(v) for v in values]
        except UnicodeEncodeError as error:
            raise DataError(f"the sample id {error.object!r:.80} is not Unicode text: {error.reason}") from None
        longest = max(map(len, encoded))
        if min(map(len, encoded)) == 0:
            raise DataError("sample ids must not be empty")
        if longest > MAX_ID_BYTES:
            raise DataError(f"sample ids are limited to {MAX_ID_BYTES} bytes, found one of {longest}")
        if any(v.endswith(b"\0") for v in encoded):
            raise DataError("sample ids must not end in a NUL byte")
        return np.array(encoded, f"S{longest}")
    kinds = sorted({type(v).__name__ for v in values})
    raise DataError(f"sample ids must all be integers or all be strings, found {', '.join(kinds)}")


def _check_bytes(array: np.ndarray) -> None:
    if array.dtype.itemsize > MAX_ID_BYTES:
        raise DataError(f"sample ids are limited to {MAX_ID_BYTES} bytes, found {array.dtype}")
    if array.size and not bool((array != b"").all()):
        raise DataError("sample ids must not be empty")


def show_id(sample_id: Any) -> str:
    """A sample id for people: an integer as such, bytes as quoted text."""
    if isinstance(sample_id, (bytes, np.bytes_)):
        return repr(bytes(sample_id).decode("utf-8", "replace"))
    return str(sample_id)


def show_ids(sample_ids: Iterable[Any], limit: int = 5) -> str:
    """The first few ids, comma separated, with `...` where more follow."""
    ids = list(sample_ids)
    return ", ".join(map(show_id, ids[:limit])) + (", ..." if len(ids) > limit else "")


def input_digest(value: Any) -> int:
    """64-bit digest of the element type, the shape and the bytes of one model input.

    The first 8 bytes of a sha256, for which processors have instructions: 85 us for a 224 x 224 x 3 image of bytes,
    where BLAKE2b takes 120.

    Args:
        value: a tensor, an array, a PIL image or a number.

    Returns:
        An unsigned 64-bit integer; equal inputs give equal digests on every machine.

    Raises:
        DataError: the value is not an array of plain numbers.
    """
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    given = np.asarray(value)
    if given.dtype.kind not in "biufc":
        raise DataError(f"an input digest needs numbers, found {type(value).__name__} of {given.dtype}")
    array = np.ascontiguousarray(given, given.dtype.newbyteorder("<"))
    state = hashlib.sha256(f"{array.dtype.str}{given.shape}\0".encode())
    state.update(array.reshape(-1).view(np.uint8).data)
    return int.from_bytes(state.digest()[:8], "little")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a configuration."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def names_sha256(names: Iterable[str]) -> str:
    """sha256 (hex) of the ordered class names."""
    return fingerprint(list(names))


def as_root(text: str) -> str:
    """A root hash as somebody typed or sent it, in the form that caches have.

    Raises:
        UsageError: not 64 hexadecimal digits; an empty text would otherwise pass as "no check".
    """
    root = text.strip().lower()
    if len(root) != 64 or set(root) - set("0123456789abcdef"):
        raise UsageError(
            f"--expect-root {text!r:.80} is no root hash: expected 64 hexadecimal digits, as `kdcache inspect` prints"
        )
    return root


def ids_sha256(sample_ids: np.ndarray) -> str:
    """sha256 (hex) of the ordered sample ids with their element type."""
    head = sample_ids.dtype.newbyteorder("<").str.encode()
    return hashlib.sha256(head + np.ascontiguousarray(sample_ids).tobytes()).hexdigest()
