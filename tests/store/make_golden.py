"""Makes data/golden/format1: a folder cache and a one-file cache of each encoding of format 1, a few KB each.

Each part is run once a format version, then never again: tests/store/test_golden.py reads what an older kdcache wrote.

    python tests/store/make_golden.py data/golden/format1
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.format.factored import Factored
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.cache import open as open_cache
from kdcache.store.dump import open_dump
from kdcache.store.head_writer import head_content, place_head
from kdcache.store.plan import Plan
from kdcache.store.writer import Writer

ROWS = 10


def logits() -> np.ndarray:
    """(10, 3) float32: exact in float16, with masked and clamped values."""
    values = (np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3) * 37 % 101 - 50) / 8
    values[4, 1] = -np.inf
    values[5, 2] = -1e6
    return values


def labels() -> np.ndarray:
    """(10,) int64, one of them unknown."""
    values = np.arange(ROWS) % 3
    values[7] = -1
    return values


def many_logits() -> np.ndarray:
    """(10, 21) float32, equal ones and masked ones among them; an odd number of classes above 8."""
    values = (np.arange(ROWS * 21, dtype=np.float32).reshape(ROWS, 21) * 53 % 127 - 60) / 4
    values[2, 5:] = -np.inf
    values[3] = 1.5
    values[4, ::2] = values[4, 0]
    return values


def last_layer() -> tuple[np.ndarray, np.ndarray]:
    """(3, 5) weights and (3,) biases, float32: small multiples of 1/4."""
    weight = (np.arange(15, dtype=np.float32).reshape(3, 5) * 7 % 11 - 5) / 4
    return weight, np.array([0.5, -1, 0], np.float32)


def inputs() -> np.ndarray:
    """(10, 5) float32 inputs of that layer: exact in storage, one row of zeros, one above the range of float16."""
    values = (np.arange(ROWS * 5, dtype=np.float32).reshape(ROWS, 5) * 41 % 97 - 48) / 8
    values[2], values[3] = 0, values[3] * 2**14
    return values


def main(out: Path) -> None:
    """Writes all caches."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    write_floats(out)
    write_small_rows(out)
    write_factored(out)
    write_soft_targets(out)


def write_floats(out: Path) -> None:
    """`folder` (float16) and `file.h5` (float32), with their roots in `roots.json`."""
    provenance = {"teacher": {"spec": "golden"}, "data": {"name": "golden"}, "teacher_seen": "no"}
    digests = np.arange(ROWS, dtype=np.uint64) + 2**63
    with Writer(out / "folder", classes=["cat", "dög", "owl"], shard_rows=4, provenance=provenance) as writer:
        writer.write(np.arange(ROWS) + 100, logits(), labels(), input_digests=digests)
    with Writer(out / "file.h5", classes=3, dtype="float32", provenance=provenance, id_bytes=12) as writer:
        writer.write([f"image {n}" for n in range(ROWS)], logits())
    record_roots(out, "folder", "file.h5")


def write_small_rows(out: Path) -> None:
    """`int8.h5`, `int4.h5` and `topk` (a folder), with the same provenance."""
    provenance = {"teacher": {"spec": "golden"}, "data": {"name": "golden"}, "teacher_seen": "no"}
    kept = {"top_k": 3, "temperatures": (1, 2.5, "z2")}
    settings: dict[str, dict[str, Any]] = {"int8.h5": {"dtype": "int8"}, "int4.h5": {"dtype": "int4"}, "topk": kept}
    for name, encoding in settings.items():
        with Writer(out / name, classes=21, shard_rows=4, provenance=provenance, **encoding) as writer:
            writer.write(np.arange(ROWS), many_logits(), labels())
    record_roots(out, *settings)


def write_factored(out: Path) -> None:
    """`factored` (a folder with head.h5), as `precompute` writes one."""
    content = head_content(*last_layer())
    schema = RowSchema(Factored((3,), 5, content.record.sha256), "<i8", has_labels=True, has_digests=False)
    provenance = {"teacher": {"spec": "golden"}, "data": {"name": "golden"}, "teacher_seen": "no"}
    classes = ClassList.of(3, ("cat", "dög", "owl"))
    dump = open_dump(out / "factored", Plan(schema, classes, 4, ROWS, provenance, head=content.record))
    place_head(dump, content)
    for number in range(dump.plan.shard_count):
        _, start, stop = dump.plan.span(number)
        container, rows = dump.container(0, number, start, stop), slice(start, stop)
        encoded = schema.encoding.encode_features(inputs()[rows]).arrays
        stored = {"sample_id": np.arange(start, stop), **encoded, "label": labels()[rows]}
        container.append(stored, view=0, positions=np.arange(start, stop))
        dump.commit(container, container.record(view=0, start=start, ids=(start, stop - 1)), number)
    dump.finish(dump.all_records() or [], samples=ROWS)
    dump.leave()
    record_roots(out, "factored")


def shares() -> np.ndarray:
    """(10, 5) float64 probabilities in eighths and sixteenths, whose sum is 1; one of them 0."""
    values = np.array([[8, 4, 2, 1, 1], [4, 4, 4, 4, 0], [1, 1, 2, 4, 8], [2, 2, 4, 4, 4], [16, 0, 0, 0, 0]]) / 16
    return np.concatenate([values, values[::-1]])


def write_soft_targets(out: Path) -> None:
    """`soft_targets` (a folder, all classes) and `soft_rest` (4 of 21 classes, and the mass of the others)."""
    provenance = {"teacher": {"spec": "golden"}, "data": {"name": "golden"}, "teacher_seen": "no"}
    with np.errstate(divide="ignore"):
        logs = np.log(shares()).astype("<f4")
    kept = ((np.arange(ROWS)[:, None] * 3 + np.arange(4) * 5) % 21).astype("<u2")
    kept = np.where(np.isneginf(logs[:, :4]), kept[:, :1], kept).astype("<u2")
    rest = {"log_probs": logs[:, :4].copy(), "kept_classes": kept, "log_rest": logs[:, 4].copy()}
    for name, encoding, arrays in (
        ("soft_targets", SoftTargets((5,), 2.5, 5, "float16"), {"log_probs": logs.astype("<f2")}),
        ("soft_rest", SoftTargets((21,), 4.0, 4), rest),
    ):
        schema = RowSchema(encoding, "<i8", has_labels=True, has_digests=False)
        dump = open_dump(out / name, Plan(schema, ClassList.of(encoding.num_classes, None), 4, ROWS, provenance))
        for number in range(dump.plan.shard_count):
            _, start, stop = dump.plan.span(number)
            container, rows = dump.container(0, number, start, stop), slice(start, stop)
            stored = {"sample_id": np.arange(start, stop), **{n: a[rows] for n, a in arrays.items()}}
            container.append({**stored, "label": labels()[rows]}, view=0, positions=np.arange(start, stop))
            dump.commit(container, container.record(view=0, start=start, ids=(start, stop - 1)), number)
        dump.finish(dump.all_records() or [], samples=ROWS)
        dump.leave()
    record_roots(out, "soft_targets", "soft_rest")


def record_roots(out: Path, *names: str) -> None:
    """Adds root hashes to `roots.json`."""
    path = out / "roots.json"
    roots = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if (out / name).is_dir():
            (out / name / ".lock").unlink()
        roots[name] = open_cache(out / name).root
    path.write_text(json.dumps(roots, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
