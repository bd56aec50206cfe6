"""What plain h5py reads of the mutants that were kept: `fuzz_h5py.py FOLDER`, in a process that libhdf5 may crash.

Prints the number of the mutant before it is opened, and at the end how many agreed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np


def read(cache: Path) -> dict[str, np.ndarray]:
    """All arrays of a cache: of one file, or of the shards in the order of the manifest."""
    if not (cache / "manifest.json").exists():
        (path,) = cache.iterdir()
        return _arrays(path)
    records = json.loads((cache / "manifest.json").read_bytes())["shards"]
    parts = [_arrays(cache / "shards" / record["file"]) for record in records]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {name: file[name][...] for name in file}


def main(folder: Path) -> int:
    agreed = 0
    for kept in sorted((folder / "kept").iterdir(), key=lambda path: path.name):
        print(kept.name, end=" ", flush=True)
        theirs = read(kept / "cache")
        with np.load(kept / "rows.npz") as rows:
            numbers = rows["numbers"]
            for name in set(rows.files) - {"numbers"}:
                ours, plain = rows[name], theirs[name][numbers]
                if ours.dtype != plain.dtype or ours.shape != plain.shape or ours.tobytes() != plain.tobytes():
                    print(f"\narray {name} is {plain!r} to h5py, and was read as {ours!r}", file=sys.stderr)
                    return 1
        agreed += 1
    print(f"\n{agreed}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
