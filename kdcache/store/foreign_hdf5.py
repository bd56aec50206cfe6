"""HDF5 that somebody else wrote, in the process that reads it: plain arrays of this file, and nothing that points away.

libhdf5 follows links into other files, reads raw data from any path that a file names, loads plug-ins for filters it
does not know, and returns fill values for chunks that are not there. Each of these is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5i, h5l, h5o, h5p, h5z

from kdcache.errors import DataError
from kdcache.store.foreign_column import Column, listed, plain_dtype

DESCRIPTORS = 1  # libhdf5 opens the file by the name of its descriptor
_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_SZIP, h5z.FILTER_LZF}
_PLUGINS = {
    305: "LZO",
    307: "bzip2",
    32001: "Blosc",
    32004: "LZ4",
    32008: "bitshuffle",
    32013: "ZFP",
    32015: "Zstandard",
    32026: "Blosc2",
}
_MAX_DEPTH = 16
_MAX_VISITED = 5000
_CACHE_SLOTS = 10_007


def open_source(fd: int, format: str, *, memory_bytes: int) -> Hdf5Source:
    """The file behind a descriptor."""
    return Hdf5Source(h5py.File(f"/dev/fd/{fd}", "r", locking=False), memory_bytes)


class Hdf5Source:
    """An HDF5 file; arrays have paths as names: `outputs/logits`."""

    def __init__(self, file: h5py.File, memory_bytes: int) -> None:
        self._file = file
        self._memory_bytes = memory_bytes

    def column(self, name: str) -> Column | None:
        """The array of that path; None if there is none.

        Raises:
            DataError: it, or a group on the way to it, is a link, or it is not a plain array.
        """
        found = self._find(name)
        if found is None:
            return None
        properties = found.get_create_plist()
        _refuse_elsewhere(name, properties)
        _refuse_filters(name, properties)
        access, path = self._access(found, properties), h5i.get_name(found)
        del found  # while it is open, opening it again changes nothing
        dataset = h5py.Dataset(h5d.open(self._file.id, path, access))
        dtype = _dtype_of(name, dataset)
        if dataset.shape is None:
            raise DataError(f"array {name} is empty (a null data space)")
        _refuse_chunks(name, dataset.id, properties, self._memory_bytes)
        _refuse_gaps(name, dataset.id, properties, dataset.shape, self._file.id.get_filesize())
        return Column(
            name,
            dataset.shape,
            dtype,
            lambda rows: _blocks(dataset, rows),
            properties.get_chunk()[0] if properties.get_layout() == h5d.CHUNKED else 1,
        )

    def listing(self, limit: int) -> list[dict[str, Any]]:
        """Arrays that hard links lead to, breadth first; groups that contain themselves end at a depth of 16."""
        found: list[dict[str, Any]] = []
        groups, visited = [("", self._file["/"].id, 0)], 0
        while groups and len(found) < limit:
            path, group, depth = groups.pop(0)
            for index in range(group.get_num_objs()):
                visited += 1
                if visited > _MAX_VISITED or len(found) >= limit:
                    return found
                key = group.get_objname_by_idx(index)
                name = path + key.decode("utf-8", "replace")
                if group.links.get_info(key).type != h5l.TYPE_HARD:
                    found.append(listed(name, (), "link"))
                    continue
                item = h5o.open(group, key)
                if isinstance(item, h5g.GroupID) and depth < _MAX_DEPTH:
                    groups.append((f"{name}/", item, depth + 1))
                elif isinstance(item, h5d.DatasetID):
                    found.append(listed(name, item.shape or (), _describe_dtype(item)))
        return found

    def _find(self, name: str) -> h5d.DatasetID | None:
        """The data set at the end of a path of hard links."""
        here = self._file["/"].id
        for part in filter(None, name.split("/")):
            key = part.encode()
            if not isinstance(here, h5g.GroupID) or not here.links.exists(key):
                return None
            _refuse_link(name, here, key)
            here = h5o.open(here, key)
        return here if isinstance(here, h5d.DatasetID) else None

    def _access(self, dataset: h5d.DatasetID, properties: h5p.PropDCID) -> h5p.PropDAID:
        """How to open it: with room for a whole stripe of chunks, so that none is unpacked twice."""
        access = h5p.create(h5p.DATASET_ACCESS)
        if properties.get_layout() == h5d.CHUNKED and dataset.shape:
            chunk = properties.get_chunk()
            across = [math.ceil(size / step) for size, step in zip(dataset.shape[1:], chunk[1:], strict=True)]
            stripe = math.prod(chunk) * dataset.get_type().get_size() * math.prod(across)
            access.set_chunk_cache(_CACHE_SLOTS, min(2 * stripe, self._memory_bytes // 2), 1.0)
        return access


def _refuse_link(name: str, group: h5g.GroupID, key: bytes) -> None:
    kind = group.links.get_info(key).type
    if kind == h5l.TYPE_SOFT:
        target = group.links.get_val(key).decode("utf-8", "replace")
        raise DataError(f"array {name} is behind a soft link to {target}; name that array itself")
    if kind != h5l.TYPE_HARD:
        raise DataError(f"array {name} is behind a link into another file, which is not followed; import that file")


def _refuse_elsewhere(name: str, properties: h5p.PropDCID) -> None:
    if properties.get_layout() == h5d.VIRTUAL:
        raise DataError(f"array {name} is a virtual data set, put together from other files; copy it into one file")
    if properties.get_external_count():
        raise DataError(f"array {name} keeps its bytes in another file (external storage), which is not opened")


def _refuse_filters(name: str, properties: h5p.PropDCID) -> None:
    filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    for number in filters:
        if number not in _FILTERS:
            label = f"{number} ({_PLUGINS[number]})" if number in _PLUGINS else str(number)
            raise DataError(
                f"array {name} is stored with the HDF5 filter {label}; plug-ins are not loaded, and gzip, shuffle, "
                "fletcher32, szip and lzf are known. Write a copy without it: h5repack -f GZIP=4 OLD NEW"
            )
    if len(set(filters)) != len(filters):
        raise DataError(f"array {name} is stored with the same HDF5 filter twice, as no tool does; it is refused")


def _refuse_chunks(name: str, dataset: h5d.DatasetID, properties: h5p.PropDCID, memory_bytes: int) -> None:
    """libhdf5 unpacks whole chunks, into buffers that it doubles, and of a failure says only that a filter failed."""
    if properties.get_layout() == h5d.CHUNKED and properties.get_nfilters():
        chunk_bytes = math.prod(properties.get_chunk()) * dataset.get_type().get_size()
        if 3 * chunk_bytes > memory_bytes:
            raise MemoryError(f"array {name} has chunks of {chunk_bytes} bytes")


def _refuse_gaps(
    name: str, dataset: h5d.DatasetID, properties: h5p.PropDCID, shape: tuple[int, ...], file_bytes: int
) -> None:
    """Rows that were never written would be read as fill values; bytes that several chunks share come from nobody."""
    stored = dataset.get_storage_size()
    if stored > file_bytes:
        raise DataError(f"array {name} claims {stored} stored bytes in a file of {file_bytes}; the file is damaged")
    if math.prod(shape) == 0:
        return
    if properties.get_layout() == h5d.CHUNKED:
        expected = math.prod(math.ceil(size / step) for size, step in zip(shape, properties.get_chunk(), strict=True))
        found = dataset.get_num_chunks()
        if found != expected:
            raise DataError(f"array {name} has {found} of its {expected} chunks; the other rows were never written")
    elif stored == 0:
        raise DataError(f"array {name} has a shape of {shape} and no data; its rows were never written")


def _dtype_of(name: str, dataset: h5py.Dataset) -> np.dtype[Any]:
    text = h5py.check_string_dtype(dataset.dtype)
    if text is not None and text.length is None:
        return np.dtype(object)
    if h5py.check_ref_dtype(dataset.dtype) or h5py.check_vlen_dtype(dataset.dtype):
        raise DataError(f"array {name} holds references or rows of varying length; expected plain numbers or text")
    return plain_dtype(name, dataset.dtype)


def _describe_dtype(dataset: h5d.DatasetID) -> str:
    try:
        dtype = dataset.dtype
    except (TypeError, ValueError):
        return "unknown"
    return "text" if h5py.check_string_dtype(dtype) is not None else str(dtype)


def _blocks(dataset: h5py.Dataset, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, len(dataset), rows):
        yield dataset[start : start + rows]
