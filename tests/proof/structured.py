"""The kinds of damage that disks, copies and people do in one piece: rows, blocks and shards in the wrong place.

Each kind is a function of a sound cache (`damage.Subject`) and a random generator, and returns new contents of files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from damage import Damage, Subject

from kdcache.format.arrays import ArrayLayout
from kdcache.format.checksums import header_digest
from kdcache.format.identity import canonical_json, fingerprint
from kdcache.format.manifest import seal
from kdcache.format.schema import CRC_ARRAY

Kind = Callable[[Subject, np.random.Generator], Damage]
SECTOR, PAGE = 512, 4096
CHUNK_ROWS = 256
BLOCKS = {"sector": SECTOR, "page": PAGE, "half a MiB": 1 << 19, "MiB": 1 << 20, "chunk of 256 rows": 0}


@dataclass(frozen=True)
class Place:
    """Some bytes of a file: of the sound cache, or of another dump (`dump` counts from 0)."""

    file: str
    start: int
    stop: int
    dump: int | None = None

    def read(self, subject: Subject) -> bytes:
        files = subject.files if self.dump is None else subject.others[self.dump].files
        return files[self.file][self.start : self.stop]


def put_all(subject: Subject, changes: list[tuple[Place, bytes]]) -> Damage:
    """Writes bytes to places."""
    files: dict[str, bytearray] = {}
    for place, data in changes:
        assert len(data) == place.stop - place.start
        files.setdefault(place.file, bytearray(subject.files[place.file]))[place.start : place.stop] = data
    return {name: bytes(data) for name, data in files.items()}


# Rows: some arrays of a row, in which `row_crc`, the id and the view may be among them or not.


def swapped_rows(subject: Subject, rng: np.random.Generator) -> Damage:
    """Two rows change places: of one shard, of two, of two views."""
    return _swap(subject, rng, _some_arrays(subject, rng))


def swapped_whole_rows(subject: Subject, rng: np.random.Generator) -> Damage:
    """Two rows change places with all that is theirs."""
    return _swap(subject, rng, [*subject.arrays_of(subject.containers[0])])


def _swap(subject: Subject, rng: np.random.Generator, arrays: list[str]) -> Damage:
    first, second = _places(subject, _row(subject, rng), arrays), _places(subject, _row(subject, rng), arrays)
    pairs = list(zip(first, second, strict=True))
    return put_all(subject, [c for a, b in pairs for c in ((a, b.read(subject)), (b, a.read(subject)))])


def zeroed_rows(subject: Subject, rng: np.random.Generator) -> Damage:
    """1 to 20 rows become zeros."""
    arrays, (name, row) = _some_arrays(subject, rng), _row(subject, rng)
    rows = range(row, min(row + int(rng.integers(1, 21)), subject.arrays_of(name)[CRC_ARRAY].rows))
    places = [place for n in rows for place in _places(subject, (name, n), arrays)]
    return put_all(subject, [(place, bytes(place.stop - place.start)) for place in places])


def duplicated_rows(subject: Subject, rng: np.random.Generator) -> Damage:
    """A row stands in another's place as well."""
    arrays = _some_arrays(subject, rng)
    return _copy(subject, _places(subject, _row(subject, rng), arrays), _places(subject, _row(subject, rng), arrays))


def stale_rows(subject: Subject, rng: np.random.Generator) -> Damage:
    """1 to 20 rows are those of an older dump, with the same ids and the same header."""
    arrays, (name, row), dump = _some_arrays(subject, rng), _row(subject, rng), _dump(subject, rng)
    rows = range(row, min(row + int(rng.integers(1, 21)), subject.arrays_of(name)[CRC_ARRAY].rows))
    places = [place for n in rows for place in _places(subject, (name, n), arrays)]
    return put_all(subject, [(p, Place(p.file, p.start, p.stop, dump).read(subject)) for p in places])


def rows_moved_with_their_checksums(subject: Subject, rng: np.random.Generator) -> Damage:
    """A whole row, its checksum among it, goes to another position, shard, view or dump: each is sound by itself."""
    names = set(subject.arrays_of(subject.containers[0]))
    arrays = sorted(names - set(rng.permutation(["sample_id", "view", ""])[: int(rng.integers(3))].tolist()))
    source, target = _row(subject, rng), _row(subject, rng)
    dump = _dump(subject, rng) if rng.random() < 0.4 else None
    if rng.random() < 0.3 and dump is not None:
        source = target  # of another dump, but in its own place
    places = [Place(p.file, p.start, p.stop, dump) for p in _places(subject, source, arrays)]
    return _copy(subject, places, _places(subject, target, arrays))


# Blocks: what a disk or a file system moves as one piece. `size` is a key of BLOCKS.


def swapped_chunks(subject: Subject, rng: np.random.Generator, size: str) -> Damage:
    """Two blocks change places, in one shard or in two."""
    array, first = _block(subject, rng, size)
    second = _like(subject, rng, size, array, first)
    return put_all(subject, [(first, second.read(subject)), (second, first.read(subject))])


def zeroed_chunks(subject: Subject, rng: np.random.Generator, size: str) -> Damage:
    """A block becomes zeros, as after a write that was lost."""
    _, place = _block(subject, rng, size)
    return put_all(subject, [(place, bytes(place.stop - place.start))])


def duplicated_chunks(subject: Subject, rng: np.random.Generator, size: str) -> Damage:
    """A block stands in another's place as well."""
    array, first = _block(subject, rng, size)
    return _copy(subject, [first], [_like(subject, rng, size, array, first)])


def stale_chunks(subject: Subject, rng: np.random.Generator, size: str) -> Damage:
    """A block is that of an older dump with the same header."""
    _, place = _block(subject, rng, size)
    return _copy(subject, [Place(place.file, place.start, place.stop, _dump(subject, rng))], [place])


def misdirected_writes(subject: Subject, rng: np.random.Generator) -> Damage:
    """The right bytes of one shard, at the right offset, in another one, which may be of another view."""
    sizes = [size for size in ("sector", "page") if has_room(subject, size)]
    source = _block(subject, rng, str(rng.choice(sizes)))[1]
    name = _other_file(subject, rng, source.file)
    stop = min(source.stop, len(subject.files[name]))
    return (
        {}
        if stop <= source.start
        else _copy(subject, [Place(source.file, source.start, stop)], [Place(name, source.start, stop)])
    )


def has_room(subject: Subject, size: str) -> bool:
    """Whether a file of the cache holds two whole blocks of a size."""
    names = subject.containers
    return any(sum(_room(subject, name, size, array) for name in names) > 1 for array in _arrays(subject, size))


# Files.


def swapped_shards(subject: Subject, rng: np.random.Generator) -> Damage:
    """Two shards, of one view or of two, have each other's names."""
    first, second = rng.choice(subject.containers, 2, replace=False).tolist()
    return {first: subject.files[second], second: subject.files[first]}


def missing_shards(subject: Subject, rng: np.random.Generator) -> Damage:
    """Some shards are gone, but not all of a view among others: without those the folder is a smaller cache."""
    by_view = [[name for name in subject.containers if name.split("-")[0] == first] for first in _views(subject)]
    while True:
        gone = set(rng.choice(subject.containers, int(rng.integers(1, len(subject.containers))), replace=False))
        if not any(gone >= set(names) for names in by_view):
            return {str(name): None for name in gone}


def _views(subject: Subject) -> list[str]:
    """What the names of the shards of each view begin with."""
    return sorted({name.split("-")[0] for name in subject.containers})


def stale_shards(subject: Subject, rng: np.random.Generator) -> Damage:
    """Some shards are those of another dump with the same header."""
    other = subject.others[_dump(subject, rng)].files
    chosen = rng.choice(subject.containers, int(rng.integers(1, len(subject.containers))), replace=False)
    return {str(name): other[str(name)] for name in chosen}


def manifests_of_another_dump(subject: Subject, rng: np.random.Generator) -> Damage:
    """The manifest lists the shards of another dump, and some of them, but not all, may be there."""
    other = subject.others[_dump(subject, rng)].files
    differ = [name for name in subject.containers if subject.files[name] != other[name]]
    chosen = rng.choice(differ, int(rng.integers(len(differ))), replace=False)
    return {"manifest.json": other["manifest.json"], **{str(name): other[str(name)] for name in chosen}}


def grown_files(subject: Subject, rng: np.random.Generator) -> Damage:
    """Bytes behind the end, or in the middle: zeros, noise, or a part of the file again."""
    name = str(rng.choice([*subject.files]))
    data = subject.files[name]
    count = int(rng.choice([1, 2, 8, SECTOR, PAGE, int(rng.integers(1, 2_000))]))
    more = [bytes(count), rng.bytes(count), (data * (count // len(data) + 1))[:count]][int(rng.integers(3))]
    edges = [edge for spans in subject.regions_of(name).values() for span in spans for edge in span]
    at = int(rng.choice([len(data), len(data), int(rng.integers(len(data))), int(rng.choice(edges))]))
    return {name: data[:at] + more + data[at:]}


def resealed(subject: Subject, damage: Damage) -> bytes:
    """The manifest with the digests of damaged shards, and its own hashes, computed anew."""
    value = json.loads(subject.files["manifest.json"])
    for shard in value["shards"]:
        data = damage.get(f"shards/{shard['file']}")
        if data is not None:
            arrays = subject.arrays_of(f"shards/{shard['file']}")
            shard["sha256"] = hashlib.sha256(data).hexdigest()
            shard["header_blake2b"] = header_digest(partial(_part, data), arrays, len(data))
    body = {key: part for key, part in value.items() if key not in ("created", "root", "seal")}
    root = fingerprint(body)
    return canonical_json({**value, "root": root, "seal": seal(value["created"], root)}).encode() + b"\n"


def _part(data: bytes, offset: int, length: int) -> bytes:
    return data[offset : offset + length]


def lengths(subject: Subject, name: str) -> list[int]:
    """All lengths at which something ends: arrays, headers, slack, sectors and pages, and one byte to each side."""
    size = len(subject.files[name])
    edges = {edge for spans in subject.regions_of(name).values() for span in spans for edge in span}
    edges |= {*range(0, size, SECTOR if size < 64 << 10 else PAGE)}
    return sorted({n for edge in edges for n in (edge - 1, edge, edge + 1) if 0 <= n < size})


def effective(kind: Kind, subject: Subject, rng: np.random.Generator) -> Damage:
    """A damage of that kind that changes a byte: equal rows that change places do not."""
    for _ in range(100):
        damage = kind(subject, rng)
        if any(data != subject.files[name] for name, data in damage.items()):
            return damage
    raise AssertionError(f"{kind.__name__} changes nothing in {subject.recipe}")


def _some_arrays(subject: Subject, rng: np.random.Generator) -> list[str]:
    """The encoding's arrays, or also those that say whose they are, or also the checksum, or everything."""
    names = [*subject.arrays_of(subject.containers[0])]
    payload = [spec.name for spec in subject.catalog.schema.encoding.specs]
    few = [n for n in names if n not in ("sample_id", "view", CRC_ARRAY)]
    choices = [payload[:1], payload, few, [*few, CRC_ARRAY], [n for n in names if n != CRC_ARRAY], names]
    return choices[int(rng.integers(len(choices)))]


def _row(subject: Subject, rng: np.random.Generator) -> tuple[str, int]:
    name = str(rng.choice(subject.containers))
    return name, int(rng.integers(subject.arrays_of(name)[CRC_ARRAY].rows))


def _dump(subject: Subject, rng: np.random.Generator) -> int:
    return int(rng.integers(len(subject.others)))


def _places(subject: Subject, row: tuple[str, int], arrays: list[str]) -> list[Place]:
    name, number = row
    layouts = subject.arrays_of(name)
    return [_rows(layouts[array], name, number, number + 1) for array in arrays]


def _rows(layout: ArrayLayout, name: str, first: int, stop: int) -> Place:
    width = layout.spec.row_bytes
    return Place(name, layout.offset + first * width, layout.offset + stop * width)


def _copy(subject: Subject, sources: list[Place], targets: list[Place]) -> Damage:
    return put_all(subject, [(t, s.read(subject)) for s, t in zip(sources, targets, strict=True)])


def _block(subject: Subject, rng: np.random.Generator, size: str) -> tuple[str, Place]:
    """A random whole block of the size, and the array that it belongs to (of a chunk)."""
    array = str(rng.choice(_arrays(subject, size)))
    names = [name for name in subject.containers if _room(subject, name, size, array)]
    return array, _block_of(subject, rng, str(rng.choice(names)), size, array)


def _like(subject: Subject, rng: np.random.Generator, size: str, array: str, first: Place) -> Place:
    """Another block like it, in the same file or in another one that has room for it."""
    name = first.file if rng.random() < 0.5 else _other_file(subject, rng, first.file)
    return _block_of(subject, rng, name if _room(subject, name, size, array) else first.file, size, array)


def _arrays(subject: Subject, size: str) -> list[str]:
    return [""] if BLOCKS[size] else [*subject.arrays_of(subject.containers[0])]


def _room(subject: Subject, name: str, size: str, array: str) -> int:
    """How many whole blocks there are."""
    if BLOCKS[size]:
        return len(subject.files[name]) // BLOCKS[size]
    return subject.arrays_of(name)[array].rows // CHUNK_ROWS


def _block_of(subject: Subject, rng: np.random.Generator, name: str, size: str, array: str) -> Place:
    number = int(rng.integers(_room(subject, name, size, array)))
    if BLOCKS[size]:
        return Place(name, number * BLOCKS[size], (number + 1) * BLOCKS[size])
    return _rows(subject.arrays_of(name)[array], name, number * CHUNK_ROWS, (number + 1) * CHUNK_ROWS)


def _other_file(subject: Subject, rng: np.random.Generator, name: str) -> str:
    others = [other for other in subject.containers if other != name]
    return str(rng.choice(others)) if others else name
