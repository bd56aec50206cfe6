"""`npz:FILE`: arrays `x`, optionally `y`, `sample_id` and `classes`, as `numpy.savez` writes them.

An uncompressed array is mapped, not read: 60,000 rows of 3x32x32 cost no memory of their own, and forked workers share
the pages. (A spawned worker receives a copy.) Sizes are compared with the file before anything is allocated, so that
a header which promises terabytes, or a zip bomb, is an error.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.format.identity import as_sample_ids
from kdcache.stages.data_arrays import ArrayDataset, input_rule
from kdcache.stages.loaded_data import (
    NO_LABEL,
    LoadedData,
    check_labels,
    check_not_empty,
    check_unique_ids,
    data_provenance,
    describe_file,
)
from kdcache.stages.specs import one_line

USAGE = "npz:FILE"

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_DEFLATE_RATIO = 1032  # of the format itself: 258 bytes from 2 bits
_MIN_MAPPED_BYTES = 1 << 20


def load_npz(rest: str) -> LoadedData:
    """The data set in an .npz file.

    Arrays: `x` (N, ...) uint8 (becomes float32 in [0, 1]), floats (float32) or other integers (int64); `y` (N,) or
    (N, ...) integers, -1 = no label, absent = no labels at all; `sample_id` (N,) integers or text, absent = 0 to N-1;
    `classes` (C,) text, absent = the number of classes is not known.

    Raises:
        UsageError: no such file.
        DataError: not an .npz file, arrays that are missing, damaged or do not fit together, duplicate ids, labels
            out of range.
    """
    path = Path(rest)
    name = path.name
    if not path.is_file():
        raise UsageError(f"npz: there is no file {rest}; expected {USAGE}")
    arrays = read_npz(path, ("x", "y", "sample_id", "classes"), name=name)
    if "x" not in arrays:
        raise DataError(f"{name}: no array x; expected x, and optionally y, sample_id and classes")
    inputs = arrays["x"]
    if inputs.ndim < 2:
        raise DataError(f"{name}: x has the shape {inputs.shape}; expected (N, ...), one row per sample")
    divisor, rule = input_rule(inputs.dtype, name=name)
    rows = len(inputs)
    check_not_empty(rows, name=name)
    sample_ids = _sample_ids(arrays.get("sample_id"), rows, name=name)
    classes = _classes(arrays.get("classes"), name=name)
    labels = np.full(rows, NO_LABEL, np.int64)
    if "y" in arrays:
        num_classes = None if classes is None else len(classes)
        labels = check_labels(arrays["y"], num_classes=num_classes, sample_ids=sample_ids, name=name)
    dataset = ArrayDataset(inputs, labels, sample_ids, classes=classes, divisor=divisor)
    provenance = data_provenance(
        name=name,
        rows=rows,
        id_scheme="array sample_id" if "sample_id" in arrays else "position in the file",
        sample_ids=sample_ids,
        inputs=rule,
        classes=classes,
        files=[describe_file(path)],
    )
    return LoadedData(dataset, name, None if classes is None else len(classes), classes, sample_ids, provenance)


def read_npz(path: Path, wanted: Sequence[str], *, name: str) -> dict[str, np.ndarray]:
    """Those of the wanted arrays that an .npz file holds; large uncompressed ones in C order are mapped read-only.

    Mapped bytes are not compared with the zip's CRC, which would read them all; what is read is.

    Nothing is ever unpickled: arrays of objects are refused.

    Args:
        path: the file.
        wanted: names of arrays; others in the file are not looked at.
        name: for the messages.

    Raises:
        DataError: the file is not what `numpy.savez` or `numpy.savez_compressed` writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members):
                raise DataError(f"{name}: two arrays have one name")
            found = {member.filename: member for member in members}
            return {key: _read(archive, found[f"{key}.npy"], path) for key in wanted if f"{key}.npy" in found}
    except KDCacheError:
        raise
    # zipfile, zlib and NumPy's header parser raise a dozen types between them on damaged files.
    except Exception as error:
        raise DataError(f"{name}: not a readable .npz file ({one_line(error)}); write it with numpy.savez") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    where = f"{path.name}, array {member.filename.removesuffix('.npy')}"
    stored = member.compress_type == zipfile.ZIP_STORED
    if not stored and member.compress_type != zipfile.ZIP_DEFLATED:
        raise DataError(f"{where}: zip method {member.compress_type}; expected stored or deflated")
    limit = member.compress_size * (1 if stored else _MAX_DEFLATE_RATIO) + (0 if stored else 1024)
    if member.compress_size > path.stat().st_size or member.file_size > limit:
        raise DataError(
            f"{where}: {member.file_size} bytes cannot come from {member.compress_size}; the file is damaged"
        )
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        header_bytes = stream.tell()
        if dtype.hasobject or dtype.kind not in "biufSU":
            raise DataError(f"{where}: elements of type {dtype}; expected numbers or text, never objects")
        payload_bytes = math.prod(shape) * dtype.itemsize
        if any(size < 0 for size in shape) or header_bytes + payload_bytes != member.file_size:
            raise DataError(f"{where}: {shape} of {dtype} does not fit {member.file_size} bytes; the file is damaged")
        if stored and not fortran and payload_bytes >= _MIN_MAPPED_BYTES:
            offset = _data_offset(path, member) + header_bytes
            return np.memmap(path, dtype, "r", offset, shape)
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version}")


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes start; the lengths in the local header may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != zipfile.stringFileHeader:  # type: ignore[attr-defined]
        raise ValueError("no local header")
    return int(member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)


def _sample_ids(values: np.ndarray | None, rows: int, *, name: str) -> np.ndarray:
    if values is None:
        return np.arange(rows, dtype=np.int64)
    if values.ndim != 1 or len(values) != rows:
        raise DataError(f"{name}: x has {rows} rows, sample_id the shape {values.shape}; expected ({rows},)")
    try:
        sample_ids = as_sample_ids(np.array(values))  # in memory, also where the file is mapped
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    check_unique_ids(sample_ids, name=name)
    return sample_ids


def _classes(values: np.ndarray | None, *, name: str) -> tuple[str, ...] | None:
    if values is None:
        return None
    if values.ndim != 1 or values.dtype.kind not in "SU" or not len(values):
        raise DataError(f"{name}: classes is {values.shape} of {values.dtype}; expected (C,) text, one name per class")
    classes = tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist())
    if len(set(classes)) < len(classes):
        raise DataError(f"{name}: two classes have one name; expected {len(classes)} different names")
    return classes
