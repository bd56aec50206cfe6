"""Which arrays a shard holds, in which order, and what its header says about them (format 1).

Only row-aligned arrays stand at the root of a file, so that plain h5py, h5dump, xarray and
`datasets.load_dataset("hdf5")` read a shard unmodified. The largest array comes first: it can then be
hashed while it is written, and only the few bytes a row behind it are read back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.format.arrays import ArrayLayout, ArraySpec
from kdcache.format.encoding import Encoding
from kdcache.format.encodings import encoding_from_json
from kdcache.format.hdf5_messages import PAGED_ARRAY_BYTES, alignment
from kdcache.format.topk import TopK

FORMAT_VERSION = 1
MAX_ATTRIBUTE_BYTES = 60_000
MAX_VIEWS = 65_536
MAX_ROWS = 2**48 - 1
CRC_ARRAY = "row_crc"
MAX_ROW_BYTES = 1 << 32
MAX_GAP_BYTES = 2 << 20
_ID_DTYPE = re.compile(r"<i8|\|S([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class RowSchema:
    """What every row of a cache consists of."""

    encoding: Encoding
    id_dtype: str
    has_labels: bool
    has_digests: bool
    is_mixed: bool = False

    @cached_property
    def specs(self) -> tuple[ArraySpec, ...]:
        """All arrays of a shard in file order."""
        optional = []
        if self.has_labels:
            optional.append(ArraySpec("label", "<i8"))
        if self.is_mixed:
            optional += [ArraySpec("label_b", "<i8"), ArraySpec("mix_ratio", "<f4")]
        if self.has_digests:
            optional.append(ArraySpec("input_digest", "<u8"))
        fixed = (ArraySpec("view", "<u2"), ArraySpec(CRC_ARRAY, "<u4"))
        return (*self.encoding.specs, ArraySpec("sample_id", self.id_dtype), *optional, *fixed)

    @cached_property
    def _by_name(self) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in self.specs}

    @property
    def crc_names(self) -> tuple[str, ...]:
        """Arrays under a row's checksum, in its order: identity first, then the encoding's arrays."""
        names = [s.name for s in self.specs if s.name not in (CRC_ARRAY, "view")]
        payload = [s.name for s in self.encoding.specs]
        return (*(n for n in names if n not in payload), *reversed(payload))

    @property
    def labels_kept(self) -> int:
        """Labels whose logits `topk` keeps: `label` and `label_b`, and none of dense prediction, whose are maps."""
        return 0 if len(self.encoding.row_shape) > 1 else int(self.has_labels) + int(self.is_mixed)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all arrays."""
        return sum(s.row_bytes for s in self.specs)

    @property
    def payload_row_bytes(self) -> int:
        """Bytes of one row of the encoding's arrays alone (without identity and checksum)."""
        return sum(s.row_bytes for s in self.encoding.specs)

    def to_json(self) -> dict[str, Any]:
        """The part of headers and manifests that describes a row."""
        return {
            "encoding": self.encoding.to_json(),
            "id": self.id_dtype,
            "labels": self.has_labels,
            "digests": self.has_digests,
            **({"mixed": True} if self.is_mixed else {}),
        }

    def check_arrays(self, arrays: Mapping[str, ArrayLayout], rows: int, size: int, *, where: str) -> None:
        """Refuses a layout that is not this schema's: names, types, shapes, ranges inside the file.

        And what our writer would not lay out: an array that cannot be mapped where it starts (it would be copied into
        memory), or a gap beyond the padding of a chunk and the headers (all of it is hashed when the file is opened).

        Raises:
            CorruptCacheError: naming the array and what is wrong with it.
        """
        check_layout(self._by_name, arrays, rows, size, where=where)


def check_layout(
    expected: Mapping[str, ArraySpec], arrays: Mapping[str, ArrayLayout], rows: int, size: int, *, where: str
) -> None:
    """Refuses a layout that is not exactly these arrays, by name: see `RowSchema.check_arrays`.

    Raises:
        CorruptCacheError: naming the array and what is wrong with it.
    """
    if arrays.keys() != expected.keys():
        raise CorruptCacheError(f"{where}: arrays {sorted(arrays)!r:.200}, expected {sorted(expected)}")
    spans = [(0, 0, "")]
    for name, layout in arrays.items():
        spec = expected[name]
        if layout.dtype != spec.dtype or layout.shape != spec.shape(rows):
            found = f"{layout.dtype!r:.30} {layout.shape!r:.80}"
            raise CorruptCacheError(f"{where}: array {name} is {found}, expected {spec.dtype} {spec.shape(rows)}")
        start, stop = layout.offset, layout.stop
        if start < 0 or stop > size:
            raise CorruptCacheError(f"{where}: array {name} lies outside the file of {size} bytes")
        if stop - start >= PAGED_ARRAY_BYTES and start % alignment(stop - start):
            raise CorruptCacheError(f"{where}: array {name} starts at byte {start}, which is misaligned")
        spans.append((start, stop, name))
    for (_, stop, first), (start, _, second) in pairwise([*sorted(spans), (size, size, "")]):
        if start < stop:
            raise CorruptCacheError(f"{where}: arrays {first} and {second} overlap")
        if start - stop > MAX_GAP_BYTES:
            raise CorruptCacheError(f"{where}: {start - stop} bytes from byte {stop} on belong to no array")


def schema_from_json(value: Mapping[str, Any], *, where: str) -> RowSchema:
    """The schema that a header or manifest describes.

    Raises:
        CorruptCacheError: a field is missing or of another type, the encoding is not known, or its rows are too long.
    """
    try:
        encoding = encoding_from_json(value["encoding"])
        id_dtype, labels, digests = value["id"], value["labels"], value["digests"]
    except KeyError as error:
        raise CorruptCacheError(f"{where}: the field {error} is missing") from None
    except UsageError as error:
        raise CorruptCacheError(f"{where}: {error}") from None
    match = _ID_DTYPE.fullmatch(id_dtype) if isinstance(id_dtype, str) else None
    if match is None or (match[1] and int(match[1]) > 1024):
        raise CorruptCacheError(f"{where}: sample ids of type {id_dtype!r:.50}, expected <i8 or |S1 to |S1024")
    if type(labels) is not bool or type(digests) is not bool:
        raise CorruptCacheError(f"{where}: labels and digests must be true or false")
    if "mixed" in value and (value["mixed"] is not True or not labels):
        raise CorruptCacheError(f"{where}: mixed stands there only as true, and only beside labels")
    schema = RowSchema(encoding, id_dtype, labels, digests, "mixed" in value)
    if isinstance(encoding, TopK) and encoding.labels != schema.labels_kept:
        raise CorruptCacheError(
            f"{where}: the encoding keeps the logits of {encoding.labels} labels a row, expected {schema.labels_kept}"
        )
    if schema.row_bytes >= MAX_ROW_BYTES:
        raise CorruptCacheError(f"{where}: a row of {schema.row_bytes} bytes, HDF5 stores less than {MAX_ROW_BYTES}")
    return schema
