"""L1, "load": four processes read random batches for minutes; no row is wrong and no memory, file or map is kept.

By default for a second from 64 MB, with --long for 10 minutes from 4 GB as a folder and as much as one file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache

PROCESSES = 4
MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test, for what it holds is large."""
    folder = tmp_path / "soak"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def growth(values: np.ndarray) -> float:
    """What a straight line through the second half of some measurements rises by."""
    steady = values[len(values) // 2 :]
    slope = np.polyfit(np.arange(len(steady)), steady, 1)[0]
    return float(slope * (len(steady) - 1))


def test_readers_under_load_see_no_wrong_row_and_keep_nothing(place: Path, count: Any, proved: Any) -> None:
    import soak_reader
    from soak_reader import CLASSES, LEAST_SAMPLES, ids_of, logits_of

    rows, seconds = count(16_000, 2_000_000), count(1, 600)
    folder, file = place / "teacher", place / "teacher.h5"
    with kdcache.Writer(folder, classes=CLASSES, shard_rows=max(2_000, rows // 40)) as writer:
        for start in range(0, rows, 4_000):
            positions = np.arange(start, start + 4_000)
            writer.write(ids_of(positions, rows), logits_of(positions, np.arange(CLASSES)), positions % CLASSES)
    kdcache.merge(folder, file)
    assert file.stat().st_size >= count(32 * 10**6, 4 * 10**9)

    line = [sys.executable, "-W", "error", soak_reader.__file__, folder, file, str(rows), str(seconds)]
    readers = [subprocess.Popen([*line, str(n)], stdout=subprocess.PIPE, text=True) for n in range(PROCESSES)]
    found = [json.loads(reader.communicate()[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * PROCESSES
    assert [one["wrong"] for one in found] == [0] * PROCESSES
    for one in found:
        seen, anonymous, dirty, descriptors, mappings = np.array(one["samples"]).T
        assert len(seen) >= count(LEAST_SAMPLES, 60)
        assert seen[-1] >= seconds * 0.9
        assert growth(anonymous) < MIB
        assert growth(dirty) < MIB
        assert set(descriptors.tolist()) == {descriptors[0]}  # those of the cache that stays open
        assert np.ptp(mappings[len(mappings) // 2 :]) <= 4
    proved(
        "L1",
        minutes=round(seconds / 60, 1),
        GB_as_folder_and_as_file=round(file.stat().st_size / 1e9, 2),
        processes=PROCESSES,
        rows_read=sum(one["rows"] for one in found),
        rows_per_second=round(sum(one["rows"] / one["samples"][-1][0] for one in found)),
        caches_opened=sum(one["opens"] for one in found),
        wrong_rows=sum(one["wrong"] for one in found),
        **{
            "MiB of own memory per process in the middle and at the end": [
                [round(one["samples"][at][2] / MIB, 1) for at in (len(one["samples"]) // 2, -1)] for one in found
            ]
        },
    )
