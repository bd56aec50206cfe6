"""`digits:PART`: 1,797 real 8x8 images that ship with kdcache.

Rows of one writer stand together in the file, so the parts are blocks of it: cut at random, the same hands would be
on both sides and the test accuracy too good.
"""

from __future__ import annotations

import numpy as np

import kdcache_data
from kdcache.errors import UsageError
from kdcache.stages.data_arrays import ArrayDataset
from kdcache.stages.data_npz import read_npz
from kdcache.stages.loaded_data import LoadedData, data_provenance, describe_file

USAGE = "digits:train|test"
SCALE = 16

# `train` is `teacher` and `transfer` together: the demo's teacher never sees the rows that it labels.
PARTS = {
    "train": (0, 1300),
    "test": (1300, 1797),
    "teacher": (0, 700),
    "transfer": (700, 1300),
}


def load_digits(part: str) -> LoadedData:
    """A part of the digits: x float32 (1, 8, 8) in [0, 1], label 0 to 9, sample_id = position in the whole file.

    Args:
        part: `train` (1,300 rows) or `test` (the last 497); `teacher` (the first 700) and `transfer` (the other 600)
            are the two halves of `train` that `kdcache demo` uses.

    Raises:
        UsageError: another part.
    """
    if part not in PARTS:
        raise UsageError(f"digits has no part {part!r}; expected one of {', '.join(PARTS)} (digits:train)")
    start, stop = PARTS[part]
    with kdcache_data.path("digits.npz") as path:
        arrays = read_npz(path, ("x", "y"), name="digits")
        file = describe_file(path)
    sample_ids = np.arange(start, stop, dtype=np.int64)
    classes = tuple(str(digit) for digit in range(10))
    dataset = ArrayDataset(
        arrays["x"][start:stop, None],
        arrays["y"][start:stop].astype(np.int64),
        sample_ids,
        classes=classes,
        divisor=SCALE,
    )
    name = f"digits:{part}"
    provenance = data_provenance(
        name=name,
        rows=len(dataset),
        id_scheme="position in the file",
        sample_ids=sample_ids,
        inputs=f"uint8 / {SCALE} -> float32",
        classes=classes,
        files=[file],
        licence="CC BY 4.0",
    )
    return LoadedData(dataset, name, len(classes), classes, sample_ids, provenance)
