"""Makes data/golden/format1: one folder cache and one one-file cache of format 1, a few KB each.

Run once a format version, then never again: tests/store/test_golden.py reads what an older kdcache wrote.

    python tests/store/make_golden.py data/golden/format1
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from kdcache.store.cache import open as open_cache
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


def main(out: Path) -> None:
    """Writes both caches and what they must hold."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    provenance = {"teacher": {"spec": "golden"}, "data": {"name": "golden"}, "teacher_seen": "no"}
    digests = np.arange(ROWS, dtype=np.uint64) + 2**63
    with Writer(out / "folder", classes=["cat", "dög", "owl"], shard_rows=4, provenance=provenance) as writer:
        writer.write(np.arange(ROWS) + 100, logits(), labels(), input_digests=digests)
    with Writer(out / "file.h5", classes=3, dtype="float32", provenance=provenance, id_bytes=12) as writer:
        writer.write([f"image {n}" for n in range(ROWS)], logits())
    (out / "folder" / ".lock").unlink()
    roots = {name: open_cache(out / name).root for name in ("folder", "file.h5")}
    (out / "roots.json").write_text(json.dumps(roots, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
