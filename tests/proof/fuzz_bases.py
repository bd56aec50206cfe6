"""The sound caches that mutants are made of: small, and between them every array, id type and chunk index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_doors
import numpy as np

from kdcache.format.encoding import Encoding
from kdcache.format.encodings import EncodingChoice
from kdcache.format.factored import Factored
from kdcache.format.identity import as_sample_ids
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store import posix
from kdcache.store.cache import open as open_cache
from kdcache.store.dump import open_dump
from kdcache.store.head_writer import head_content, place_head
from kdcache.store.incoming import consecutive
from kdcache.store.merge import merge
from kdcache.store.plan import Plan

PROVENANCE = {
    "teacher": {"spec": "networks:wide", "state_sha256": "0" * 64, "parameters": 1234},
    "data": {"name": "digits:train", "rows": 12, "files": [{"name": "x.npz", "bytes": 5}]},
    "precision": {"amp": "none", "threads": 2},
    "teacher_seen": "no",
    "versions": {"kdcache": "1", "hdf5": "2"},
}


@dataclass(frozen=True)
class Base:
    """A cache on the disk with everything that is known of it: `files` by name below `path` ("" for one file)."""

    path: Path
    schema: RowSchema
    views: tuple[int, ...]
    samples: int
    ids: np.ndarray
    files: dict[str, bytes]
    rows: fuzz_doors.Rows

    @classmethod
    def of(cls, path: Path, ids: np.ndarray) -> Base:
        with open_cache(path) as cache:
            rows = fuzz_doors.as_rows(cache.gather(np.arange(len(cache))))
            catalog = cache.catalog
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".lock")
        files = {("" if path.is_file() else str(p.relative_to(path))): p.read_bytes() for p in found}
        return cls(path, catalog.schema, catalog.views, catalog.samples, ids, files, rows)

    def write(self, path: Path, changes: dict[str, bytes]) -> Path:
        """A copy under `path` in which some files are others; nothing that a reader has mapped is written to."""
        for name, data in {**self.files, **changes}.items():
            target = path / name if name else path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_bytes(data)
        return path


def make_dump(
    path: Path,
    *,
    rows: int,
    shard_rows: int,
    dtype: str = "float16",
    row_shape: tuple[int, ...] = (3,),
    ids: Any = None,
    labels: bool = True,
    views: tuple[int, ...] = (0,),
    names: tuple[str, ...] | None = None,
    is_mixed: bool = False,
    top_k: int | None = None,
    features: int | None = None,
) -> Base:
    """A folder cache; of the largest logits with `top_k`, with a head of its own with `features`."""
    rng = np.random.default_rng(rows)
    stored = as_sample_ids(np.arange(5, 5 + rows) if ids is None else ids)
    id_dtype = "<i8" if stored.dtype.kind == "i" else f"|S{stored.dtype.itemsize}"
    width = row_shape[0] if features is None else features
    head = None if features is None else head_content(rng.normal(size=(row_shape[0], width)), np.ones(row_shape[0]))
    encoding: Encoding
    if head is None:
        choice = EncodingChoice(dtype, top_k, None if top_k is None else (1.0, 3.0, "z2"))
        encoding = choice.of(row_shape, labels=int(labels) + int(is_mixed))
    else:
        encoding = Factored(row_shape, width, head.record.sha256)
    schema = RowSchema(encoding, id_dtype, has_labels=labels, has_digests=labels, is_mixed=is_mixed)
    classes = ClassList.of(row_shape[0], names)
    plan = Plan(schema, classes, shard_rows, rows, PROVENANCE, views, head=None if head is None else head.record)
    dump = open_dump(path, plan)
    if head is not None:
        place_head(dump, head)
    for number in range(dump.plan.shard_count):
        view, start, stop = dump.plan.span(number)
        index = number % dump.plan.shards_per_view
        container = dump.container(view, index, start, stop)
        logits = rng.normal(size=(stop - start, width, *row_shape[1:])).astype(np.float32)
        arrays = {"sample_id": stored[start:stop]}
        if labels:
            arrays["label"] = rng.integers(-1, row_shape[0], stop - start)
            arrays["input_digest"] = rng.integers(0, 2**63, stop - start, dtype=np.uint64)
        if is_mixed:
            arrays["label_b"] = rng.integers(-1, row_shape[0], stop - start)
            arrays["mix_ratio"] = rng.random(stop - start, np.float32)
        known = [arrays[name] for name in ("label", "label_b") if name in arrays]
        if isinstance(encoding, Factored):
            arrays |= encoding.encode_features(logits).arrays
        else:
            arrays |= encoding.encode(logits, np.stack(known, axis=1) if known else None).arrays
        container.append(arrays, view=view, positions=np.arange(start, stop))
        dump.commit(container, container.record(view=view, start=start, ids=consecutive(stored[start:stop])), index)
    records = dump.all_records()
    assert records is not None
    dump.finish(records, samples=rows)
    dump.leave()
    return Base.of(path, stored)


def make_folders(home: Path) -> list[Base]:
    """Folders: consecutive ids in two shards; text ids, mixed rows of two views; trailing dimensions, no labels.

    And top-k rows with the logits of two labels, int4 rows of an odd number of classes, factored rows with their head.
    """
    text = [f"class {n % 3}/{n}.png" for n in range(20)]
    return [
        make_dump(home / "a", rows=12, shard_rows=8, names=("cat", "dog", "é")),
        make_dump(home / "b", rows=20, shard_rows=20, dtype="float32", ids=text, views=(0, 3), is_mixed=True),
        make_dump(home / "c", rows=300, shard_rows=300, row_shape=(2, 2), labels=False, ids=np.arange(300) * 7 % 300),
        make_dump(home / "topk", rows=14, shard_rows=8, row_shape=(9,), top_k=3, views=(0, 2), is_mixed=True),
        make_dump(home / "int4", rows=12, shard_rows=8, row_shape=(11,), dtype="int4", labels=False),
        make_dump(home / "factored", rows=12, shard_rows=8, row_shape=(5,), features=4),
    ]


def make_files(home: Path) -> list[Base]:
    """One-file caches of the same rows, but of those that have no such form."""
    found = []
    for base in make_folders(home / "folders"):
        if isinstance(base.schema.encoding, Factored):
            continue
        path = home / f"{base.path.name}.h5"
        merge(base.path, path)
        found.append(Base.of(path, base.ids))
    return found


def without_fsync() -> None:
    """Thousands of small files need not reach the disk."""
    posix.fsync = lambda fd: None
    posix.fsync_folder = lambda folder: None
