"""A reader that works for a while and tells what it read and what it held: `soak_reader.py FOLDER FILE ROWS SECONDS N`.

One cache stays open all the time, a second one is opened anew for every few batches, as a folder or one file, mapped
or with pread. A sample of the process's own memory is taken while only the first is open. What a row holds follows
from its position, so every value is compared.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

import kdcache

CLASSES = 1000
STEP = 1_000_003  # a prime: multiplied by it, positions become ids in no order
KINDS = [(place, access) for place in (0, 1) for access in ("mmap", "pread")]
CALLS = 10
LEAST_SAMPLES = 12


def ids_of(positions: np.ndarray, rows: int) -> np.ndarray:
    """(N,) int64 ids: a permutation of 10 ... rows + 9."""
    return positions * STEP % rows + 10


def logits_of(positions: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N, len(classes)) float32 quarters, which float16 rows hold exactly."""
    codes = positions[:, None].astype(np.uint32) * np.uint32(2654435761) + classes.astype(np.uint32) * np.uint32(40503)
    return ((codes >> np.uint32(5)) & np.uint32(511)).astype(np.float32) / 4


def wrong_rows(cache: kdcache.Cache, rng: np.random.Generator, positions: np.ndarray, rows: int) -> int:
    """Reads rows by their ids and compares: 8 classes of all of them, all classes of some, ids, labels."""
    stored = cache.gather(cache.rows(ids_of(positions, rows)))
    dense = stored.dense()
    some, every = rng.integers(0, CLASSES, 8), np.arange(CLASSES)
    bad = (dense[:, some] != logits_of(positions, some)).any(axis=1)
    bad[:16] |= (dense[:16] != logits_of(positions[:16], every)).any(axis=1)
    bad |= (stored.sample_id != ids_of(positions, rows)) | (stored.label != positions % CLASSES)
    return int(bad.sum())


def own_memory() -> tuple[int, int, int, int]:
    """(anonymous bytes, private dirty bytes, descriptors, mappings) of this process; the page cache is not its own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)}
    mappings = Path("/proc/self/maps").read_text().count("\n")
    return sizes["Anonymous"], sizes["Private_Dirty"], len(os.listdir("/proc/self/fd")), mappings


def main(folder: str, file: str, rows: int, seconds: float, number: int) -> None:
    """Reads for `seconds` and prints what it did as JSON."""
    rng, paths = np.random.default_rng(number), (folder, file)
    done = wrong = opens = 0
    samples: list[tuple[float, int, int, int, int]] = []
    begun, place, access = time.monotonic(), *KINDS[number % len(KINDS)]
    with kdcache.open(paths[place], access=access) as held:
        while time.monotonic() - begun < seconds or len(samples) < LEAST_SAMPLES:
            place, access = KINDS[rng.integers(len(KINDS))]
            with kdcache.open(paths[place], access=access) as other:
                for cache in [held, other] * (CALLS // 2):
                    positions = rng.integers(0, rows, int(rng.integers(1, 513)))
                    wrong += wrong_rows(cache, rng, positions, rows)
                    done += len(positions)
            opens += 1
            if time.monotonic() - begun > len(samples) * seconds / 300:
                gc.collect()
                samples.append((time.monotonic() - begun, *own_memory()))
    json.dump({"rows": done, "wrong": wrong, "opens": opens, "samples": samples}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
