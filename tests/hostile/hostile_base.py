"""Sound caches of 600 rows, and the tools that turn them into hostile ones with all checksums and hashes put right.

An attacker has these tools too: no checksum of the format needs a secret.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t

from kdcache.format.arrays import ArraySpec
from kdcache.format.checksums import header_digest, payload_sha256, row_crcs, rows_digest
from kdcache.format.dense import Dense
from kdcache.format.hdf5_header import build_layout
from kdcache.format.hdf5_parser import parse
from kdcache.format.identity import canonical_json, fingerprint
from kdcache.format.lookup3 import lookup3
from kdcache.format.manifest import parse_shard
from kdcache.format.schema import RowSchema
from kdcache.store.writer import Writer

ROWS, CLASSES, SHARD_ROWS = 600, 64, 256
SCHEMA = RowSchema(Dense((CLASSES,), "float16"), "<i8", has_labels=True, has_digests=True)
NAMES = [f"class {n}" for n in range(CLASSES)]
PROVENANCE = {"teacher": {"spec": "models:wide"}, "data": {"name": "digits"}, "licence": "cc-by-4.0"}

Arrays = dict[str, np.ndarray]


def open_writer(path: Path, **settings: Any) -> Writer:
    """The writer of the sound caches; `settings` go to it."""
    return Writer(path, **{"classes": NAMES, "shard_rows": SHARD_ROWS, "provenance": PROVENANCE, **settings})


def write_rows(writer: Writer, rows: int = ROWS, first: int = 0, columns: int = CLASSES) -> None:
    """Writes rows from number `first` on, with logits of as many classes as there are columns."""
    rng = np.random.default_rng(first)
    logits = rng.integers(-600, 600, (rows, columns)).astype(np.float32) / 64
    ids = np.arange(first, first + rows)
    writer.write(ids, logits, ids % columns, input_digests=ids.astype(np.uint64) * 0x0101010101)


def write_sound(path: Path, columns: int = CLASSES, **settings: Any) -> Path:
    """A cache of 600 rows as the library writes it."""
    with open_writer(path, **settings) as writer:
        write_rows(writer, columns=columns)
    return path


@functools.cache
def sound_file() -> bytes:
    """The bytes of the one-file cache."""
    with tempfile.TemporaryDirectory() as folder:
        return write_sound(Path(folder, "teacher.h5")).read_bytes()


@functools.cache
def _sound_folder() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return files_of(write_sound(Path(folder, "teacher")))


@functools.cache
def _sound_dump() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        writer = open_writer(Path(folder, "teacher"))
        write_rows(writer, 300)
        writer.abandon()
        return files_of(Path(folder, "teacher"))


def files_of(root: Path) -> dict[str, bytes]:
    """The files of a cache by name, the lock file left out."""
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name != ".lock"}


def sound_manifest() -> dict[str, Any]:
    """The manifest of the folder cache, to be changed."""
    value: dict[str, Any] = json.loads(_sound_folder()["manifest.json"])
    return value


def sound_shard(number: int = 0) -> bytes:
    """The bytes of a shard of the folder cache."""
    return _sound_folder()[f"shards/v000-{number:05d}.h5"]


# --------------------------------------------------------------------------- writing


def put_file(folder: Path, data: bytes, name: str = "teacher.h5") -> Path:
    """`data` as a one-file cache."""
    (folder / name).write_bytes(data)
    return folder / name


def put_folder(folder: Path, manifest: dict[str, Any] | bytes | None = None, **shards: bytes) -> Path:
    """The folder cache, with another manifest (a dictionary is sealed first) or other shards (`v000_00000=...`)."""
    root = folder / "teacher"
    (root / "shards").mkdir(parents=True)
    files = dict(_sound_folder())
    if manifest is not None:
        files["manifest.json"] = manifest if isinstance(manifest, bytes) else sealed(manifest)
    for name, data in shards.items():
        files[f"shards/{name.replace('_', '-')}.h5"] = data
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def put_dump(folder: Path) -> Path:
    """A dump in progress: a plan, and one shard of 256 rows with its commit record."""
    root = folder / "teacher"
    (root / "shards").mkdir(parents=True)
    for name, data in _sound_dump().items():
        (root / name).write_bytes(data)
    return root


def sealed(value: dict[str, Any]) -> bytes:
    """The text of a changed manifest with root hash and seal put right."""
    body = {k: v for k, v in value.items() if k not in ("created", "root", "seal")}
    root = fingerprint(body)
    ends = {"root": root, "seal": fingerprint([value.get("created"), root])}
    return canonical_json({**value, **ends}).encode() + b"\n"


def put_manifest(folder: Path, *path: Any, value: Any) -> Path:
    """The folder cache with one field of its manifest changed, hashes right."""
    manifest = sound_manifest()
    target = manifest
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return put_folder(folder, manifest)


def put_shard(folder: Path, data: bytes, number: int = 0) -> Path:
    """The folder cache with other bytes in a shard, and a manifest that lists just these."""
    manifest = sound_manifest()
    record = manifest["shards"][number]
    arrays = parse_shard({**record, "size": max(len(data), record["size"])}, SCHEMA, where="base").arrays
    record["size"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    if len(data) >= max(array.stop for array in arrays.values()):
        record["header_blake2b"] = header_digest(lambda o, n: data[o : o + n], arrays, len(data))
    return put_folder(folder, manifest, **{f"v000_{number:05d}": data})


# --------------------------------------------------------------------------- containers


def rows_of(data: bytes) -> Arrays:
    """The arrays of a container, to be changed."""
    parsed = parse(lambda o, n: data[o : o + n], len(data), name="base")
    return {
        name: np.frombuffer(data, a.dtype, int(np.prod(a.shape)), a.offset).reshape(a.shape).copy()
        for name, a in parsed.arrays.items()
    }


def header_of(data: bytes) -> dict[str, Any]:
    """The header of a container, to be changed."""
    value: dict[str, Any] = json.loads(parse(lambda o, n: data[o : o + n], len(data), name="base").attribute)
    return value


def container(arrays: Arrays, header: dict[str, Any] | str) -> bytes:
    """A container of these arrays; the digests in a header that has them are put right."""
    rows = len(next(iter(arrays.values())))
    specs = [ArraySpec(name, a.dtype.str, a.shape[1:]) for name, a in arrays.items()]
    text = header if isinstance(header, str) else canonical_json(header)
    image = _laid_out(specs, rows, text, arrays)
    if isinstance(header, dict) and {"payload_sha256", "rows_blake2b"} <= set(header):
        layout = build_layout(specs, rows, text)

        def read(offset: int, length: int) -> bytes:
            return image[offset : offset + length]

        digests = {"payload_sha256": payload_sha256(read, layout.arrays)}
        if {"sample_id", "row_crc"} <= set(arrays):
            digests["rows_blake2b"] = rows_digest(read, layout.arrays)
        image = _laid_out(specs, rows, canonical_json({**header, **digests}), arrays)
    return image


def _laid_out(specs: list[ArraySpec], rows: int, text: str, arrays: Arrays) -> bytes:
    layout = build_layout(specs, rows, text)
    image = bytearray(layout.size)
    pieces = [(layout.arrays[name].offset, array.tobytes()) for name, array in arrays.items()]
    for offset, data in [*layout.metadata, *pieces]:
        image[offset : offset + len(data)] = data
    return bytes(image)


def file_with(**changes: Any) -> bytes:
    """The one-file cache with other fields in its header."""
    data = sound_file()
    return container(rows_of(data), {**header_of(data), **changes})


def checksummed(arrays: Arrays, *, view: int = 0, first: int = 0) -> Arrays:
    """Arrays of the schema with their row checksums put right."""
    stored = [arrays[name] for name in SCHEMA.crc_names]
    arrays["row_crc"] = row_crcs(stored, view=view, positions=first + np.arange(len(arrays["view"])))
    return arrays


# --------------------------------------------------------------------------- patched bytes


def resealed(image: bytearray) -> bytes:
    """A changed image with the checksums of its superblock and object headers put right."""
    struct.pack_into("<I", image, 44, lookup3(bytes(image[:44])))
    start = image.find(b"OHDR\x02")
    while start >= 0:
        stop = start + 8 + int.from_bytes(image[start + 6 : start + 8], "little")
        if stop + 4 <= len(image):
            struct.pack_into("<I", image, stop, lookup3(bytes(image[start:stop])))
        start = image.find(b"OHDR\x02", start + 4)
    return bytes(image)


def patched(old: bytes, new: bytes, *, array: str | None = None) -> bytes:
    """The one-file cache with `old` replaced by `new` of equal length, from the header of `array` on."""
    image = bytearray(sound_file())
    position = image.index(old, 0 if array is None else object_header(bytes(image), array))
    image[position : position + len(new)] = new
    assert len(old) == len(new)
    return resealed(image)


def object_header(data: bytes, name: str) -> int:
    """Address of the header of an array."""
    link = bytes([1, 0, len(name)]) + name.encode()
    position = data.index(link) + len(link)
    return int.from_bytes(data[position : position + 8], "little")


def offset_of(name: str, data: bytes | None = None) -> int:
    """Where an array lies in the one-file cache."""
    data = sound_file() if data is None else data
    return parse(lambda o, n: data[o : o + n], len(data), name="base").arrays[name].offset


def with_archive(data: bytes) -> bytes:
    """With a zip archive in the largest gap between two things of a container."""
    parsed = parse(lambda o, n: data[o : o + n], len(data), name="base")
    known = sorted([*parsed.headers, *((a.offset, a.stop) for a in parsed.arrays.values())])
    _, start = max((start - stop, stop) for (_, stop), (start, _) in pairwise(known))
    archive = b"PK\x05\x06" + bytes(17) + b"x"
    return data[:start] + archive + data[start + len(archive) :]


# --------------------------------------------------------------------------- libhdf5


@functools.cache
def _roomy_file() -> bytes:
    """The one-file cache with two arrays more, whose removed links leave room for other ones in the root group."""
    arrays = {**rows_of(sound_file()), "spare_" * 9: np.zeros(ROWS, "<u2"), "spara_" * 9: np.zeros(ROWS, "<u2")}
    return container(arrays, header_of(sound_file()))


def edited(edit: Callable[[h5py.File], object], *, keep_logits: bool = False) -> bytes:
    """The one-file cache after libhdf5 has edited it; by default its logits are gone, for `edit` to make others."""
    buffer = io.BytesIO(_roomy_file())
    # Aligned as our writer aligns arrays of this size, so that it is something else that is refused.
    settings = {"alignment_threshold": 16_384, "alignment_interval": 4096}
    with h5py.File(buffer, "r+", libver=("v110", "v110"), **settings) as file:
        for name in ("spare_" * 9, "spara_" * 9, *(() if keep_logits else ("logits",))):
            del file[name]
        edit(file)
    return blanked(completed(buffer.getvalue()))


def completed(data: bytes) -> bytes:
    """With the room at the end that libhdf5 allocates without writing."""
    return data.ljust(int.from_bytes(data[28:36], "little"), b"\0")


def blanked(data: bytes) -> bytes:
    """Without what removed links leave in the padding of the root group, which would be refused first."""
    image = bytearray(data)
    for start, length in _root_padding(data):
        image[start : start + length] = bytes(length)
    return resealed(image)


def with_root_message(kind: int, flags: int, body: bytes) -> bytes:
    """The one-file cache with one message more in its root group, in the place of padding."""
    image = bytearray(edited(lambda file: None, keep_logits=True))
    start, length = max(_root_padding(image), key=lambda span: span[1])
    rest = length - len(body) - 4
    content = struct.pack("<BHB", kind, len(body), flags) + body + struct.pack("<BHB", 0, rest, 0)
    image[start - 4 : start + len(body) + 4] = content
    return resealed(image)


def _root_padding(data: bytes | bytearray) -> list[tuple[int, int]]:
    """(start, length) of the content of each padding message in the root group."""
    found, position, stop = [], 56, 56 + int.from_bytes(data[54:56], "little")
    while stop - position >= 4:
        length = int.from_bytes(data[position + 1 : position + 3], "little")
        if data[position] == 0:
            found.append((position + 4, length))
        position += 4 + length
    return found


def create(file: h5py.File, name: str = "logits", **change: Any) -> h5py.Dataset:
    """Creates an array as our writer does, but for `change`."""
    properties = h5p.create(h5p.DATASET_CREATE)
    shape = change.get("shape", (ROWS, CLASSES))
    if "layout" in change:
        properties.set_layout(change["layout"])
    else:
        properties.set_chunk(change.get("chunk", (256, CLASSES)))
    properties.set_alloc_time(change.get("alloc", h5d.ALLOC_TIME_EARLY))
    properties.set_fill_time(change.get("fill", h5d.FILL_TIME_NEVER))
    properties.set_obj_track_times(bool(change.get("times", False)))
    properties.set_attr_creation_order(change.get("attribute_order", 0))
    for number, flags, values in change.get("filters", ()):
        properties.set_filter(number, flags, values)
    if "fill_value" in change:
        properties.set_fill_value(np.array(change["fill_value"], "<f2"))
    kind = change.get("kind") or h5t.py_create(np.dtype(str(change.get("dtype", "<f2"))))
    space = change.get("space") or h5s.create_simple(shape, change.get("max_shape"))
    return h5py.Dataset(h5d.create(file.id, name.encode(), kind, space, properties))


def set_text(file: h5py.File, text: bytes, *, name: bytes = b"kdcache", charset: int = h5t.CSET_UTF8) -> None:
    """Another root attribute in the place of ours: fixed-length text."""
    del file.attrs["kdcache"]
    kind = utf8_text(len(text))
    kind.set_cset(charset)
    h5a.create(file.id, name, kind, h5s.create(h5s.SCALAR)).write(np.array(text, f"S{len(text)}"), mtype=kind)


def utf8_text(length: int) -> h5t.TypeStringID:
    """The type of our header: fixed-length UTF-8, NUL-padded."""
    kind = h5t.C_S1.copy()
    kind.set_size(length)
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    return kind


def changed(value: Any, **changes: Any) -> Any:
    """A deep copy of a dictionary with other entries."""
    return {**copy.deepcopy(value), **changes}
