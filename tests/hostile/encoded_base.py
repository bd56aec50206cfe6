"""Sound folder caches of int8, int4, top-k, factored and soft-target rows, and what turns them into hostile ones."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_base import (
    CLASSES,
    NAMES,
    PROVENANCE,
    ROWS,
    SHARD_ROWS,
    container,
    files_of,
    header_of,
    rows_of,
    sealed,
    write_sound,
)
from hostile_places import FOLDER_ONLY

from kdcache.format.arrays import ArrayLayout, ArraySpec
from kdcache.format.checksums import header_digest, row_crcs
from kdcache.format.factored import Factored
from kdcache.format.hdf5_header import build_layout
from kdcache.format.hdf5_parser import parse
from kdcache.format.head import HEAD_FILE, head_header
from kdcache.format.identity import canonical_json
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema, schema_from_json
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.dump import open_dump
from kdcache.store.head_writer import head_content, place_head
from kdcache.store.plan import Plan

FEATURES = 16
ODD_CLASSES = 63  # of int4 rows, so that the last byte of a row holds one code
ENCODINGS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "topk": {"top_k": 10, "temperatures": (1, 4, "z2")},
}
Files = dict[str, bytes]


def write_encoded(path: Path, kind: str) -> Path:
    """A cache of 600 rows as the library writes it: `int8`, `int4`, `topk`, `factored` or `soft_targets`."""
    if kind == "factored":
        return _write_factored(path)
    if kind == "soft_targets":
        return _write_soft_targets(path)
    if kind == "int4":
        return write_sound(path, classes=NAMES[:ODD_CLASSES], columns=ODD_CLASSES, **ENCODINGS[kind])
    return write_sound(path, **ENCODINGS[kind])


def layer() -> tuple[np.ndarray, np.ndarray]:
    """(64, 16) weights and (64,) biases of the teacher's last layer."""
    rng = np.random.default_rng(7)
    return rng.standard_normal((CLASSES, FEATURES), np.float32), rng.standard_normal(CLASSES, np.float32)


def _write_factored(path: Path) -> Path:
    content = head_content(*layer())
    schema = RowSchema(Factored((CLASSES,), FEATURES, content.record.sha256), "<i8", True, False)
    plan = Plan(schema, ClassList.of(CLASSES, tuple(NAMES)), SHARD_ROWS, ROWS, PROVENANCE, head=content.record)
    dump = open_dump(path, plan)
    place_head(dump, content)
    for number in range(plan.shard_count):
        _, start, stop = plan.span(number)
        ids, inputs = np.arange(start, stop), np.random.default_rng(start).standard_normal((stop - start, FEATURES))
        writer = dump.container(0, number, start, stop)
        encoded = schema.encoding.encode_features(inputs).arrays
        writer.append({"sample_id": ids, "label": ids % CLASSES, **encoded}, view=0, positions=ids)
        dump.commit(writer, writer.record(view=0, start=start, ids=(start, stop - 1)), number)
    dump.finish(dump.all_records() or [], samples=ROWS)
    dump.leave()
    return path


def _write_soft_targets(path: Path) -> Path:
    """Ten classes a row, and the mass of all others."""
    schema = RowSchema(SoftTargets((CLASSES,), 4.0, 10), "<i8", True, False)
    dump = open_dump(path, Plan(schema, ClassList.of(CLASSES, tuple(NAMES)), SHARD_ROWS, ROWS, PROVENANCE))
    for number in range(dump.plan.shard_count):
        _, start, stop = dump.plan.span(number)
        ids, shares = np.arange(start, stop), np.random.default_rng(start).random((stop - start, 11)) + 0.1
        logs = np.log(shares / shares.sum(axis=1, keepdims=True))
        arrays = {
            "log_probs": logs[:, :10].astype("<f4"),
            "kept_classes": ((ids[:, None] + np.arange(10)) % CLASSES).astype("<u2"),
            "log_rest": logs[:, 10].astype("<f4"),
        }
        writer = dump.container(0, number, start, stop)
        writer.append({"sample_id": ids, "label": ids % CLASSES, **arrays}, view=0, positions=ids)
        dump.commit(writer, writer.record(view=0, start=start, ids=(start, stop - 1)), number)
    dump.finish(dump.all_records() or [], samples=ROWS)
    dump.leave()
    return path


@functools.cache
def _sound(kind: str) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        return files_of(write_encoded(Path(folder, "teacher"), kind))


def manifest_of(kind: str) -> dict[str, Any]:
    """The manifest of a sound cache, to be changed."""
    value: dict[str, Any] = json.loads(_sound(kind)["manifest.json"])
    return value


def put(folder: Path, kind: str, manifest: dict[str, Any] | None = None, **files: bytes) -> Path:
    """A sound cache with another manifest, its hashes right, or other files: `head_h5=`, `v000_00000=`."""
    names = {"head_h5": HEAD_FILE}
    changed = {names.get(name, f"shards/{name.replace('_', '-')}.h5"): data for name, data in files.items()}
    if manifest is not None:
        changed["manifest.json"] = sealed(manifest)
    root = folder / "teacher"
    (root / "shards").mkdir(parents=True)
    for name, data in {**_sound(kind), **changed}.items():
        (root / name).write_bytes(data)
    if kind == "factored":
        (folder / FOLDER_ONLY).touch()
    return root


def put_encoding(folder: Path, kind: str, **changes: Any) -> Path:
    """With other fields in the encoding of the manifest."""
    manifest = manifest_of(kind)
    manifest["encoding"].update(changes)
    return put(folder, kind, manifest)


def put_field(folder: Path, kind: str, *path: Any, value: Any) -> Path:
    """With another value of one field of the manifest, hashes right."""
    manifest = manifest_of(kind)
    target: Any = manifest
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return put(folder, kind, manifest)


def put_rows(folder: Path, kind: str, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """With other rows in the first shard; row checksums and all hashes are right."""
    data, manifest = _sound(kind)["shards/v000-00000.h5"], manifest_of(kind)
    schema, arrays = schema_from_json(manifest, where="base"), rows_of(data)
    change(arrays)
    stored = [arrays[name] for name in schema.crc_names]
    arrays["row_crc"] = row_crcs(stored, view=0, positions=np.arange(SHARD_ROWS))
    made = container(arrays, canonical_json(header_of(data)))
    layouts = parse(lambda o, n: made[o : o + n], len(made), name="base").arrays
    record = manifest["shards"][0]
    record["sha256"] = hashlib.sha256(made).hexdigest()
    record["header_blake2b"] = header_digest(lambda o, n: made[o : o + n], layouts, len(made))
    return put(folder, kind, manifest, v000_00000=made)


# --------------------------------------------------------------------------- heads


def head_file(weight: np.ndarray, bias: np.ndarray, header: str | None = None) -> tuple[bytes, dict[str, ArrayLayout]]:
    """A head of any arrays, and where they lie in it."""
    arrays = {"weight": weight, "bias": bias}
    specs = [ArraySpec(name, a.dtype.str, a.shape[1:]) for name, a in arrays.items()]
    layout = build_layout(specs, len(bias), head_header(*weight.shape) if header is None else header)
    data = bytearray(layout.size)
    pieces = [(layout.arrays[name].offset, array.tobytes()) for name, array in arrays.items()]
    for offset, piece in [*layout.metadata, *pieces]:
        data[offset : offset + len(piece)] = piece
    return bytes(data), layout.arrays


def put_head(folder: Path, weight: np.ndarray, bias: np.ndarray, header: str | None = None) -> Path:
    """With another head, which manifest and rows name as theirs: every hash is right."""
    data, layouts = head_file(weight, bias, header)
    return put(
        folder, "factored", manifest_with_head(hashlib.sha256(data).hexdigest(), len(data), layouts), head_h5=data
    )


def manifest_with_head(sha256: str, size: int, layouts: dict[str, ArrayLayout]) -> dict[str, Any]:
    """A manifest of factored rows that names another head."""
    manifest = manifest_of("factored")
    manifest["encoding"]["head"] = sha256
    arrays = {name: [a.offset, a.dtype, list(a.shape)] for name, a in layouts.items()}
    manifest["head"] = {"size": size, "sha256": sha256, "arrays": arrays}
    return manifest
