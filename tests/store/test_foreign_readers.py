"""A cache is plain HDF5: read with nothing of ours installed, by h5py, by h5dump and by `datasets`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = pytest.mark.parametrize("name", ["teacher", "teacher.h5"])

# kdcache is made impossible to import, then NumPy and h5py alone take the rows apart.
PLAIN_H5PY = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kdcache":
            raise ImportError("kdcache is not installed here")
sys.meta_path.insert(0, Block())
import glob, json, os, h5py, numpy as np
path, out = sys.argv[1:]
files = [path] if os.path.isfile(path) else sorted(glob.glob(os.path.join(path, "shards", "*.h5")))
rows = {}
for file in files:
    with h5py.File(file, "r") as shard:
        header = json.loads(shard.attrs["kdcache"])
        assert header["format"] == 1 and list(shard.attrs) == ["kdcache"]
        for name, data in shard.items():
            assert isinstance(data, h5py.Dataset) and data.dtype.kind in "iufS"
            rows.setdefault(name, []).append(data[...])
rows = {name: np.concatenate(parts) for name, parts in rows.items()}
np.savez(out, logits=rows["logits"].astype("f4") + rows["row_max"][:, None], sample_id=rows["sample_id"],
         label=rows["label"], names=sorted(rows))
assert not any(m.split(".")[0] == "kdcache" for m in sys.modules)
"""


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted((path / "shards").iterdir())


@KINDS
@pytest.mark.parametrize("ids", [None, [f"image {n}" for n in range(100)]], ids=["integers", "text"])
def test_plain_h5py_reads_every_row(
    make_cache: Any, make_table: Any, python: Any, tmp_path: Path, name: str, ids: Any
) -> None:
    table = make_table(ids=ids)
    python(PLAIN_H5PY, make_cache(name, table, digests=True), tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as rows:
        np.testing.assert_array_equal(rows["logits"], table.logits)
        np.testing.assert_array_equal(rows["label"], table.labels)
        assert [i if ids is None else i.decode() for i in rows["sample_id"].tolist()] == list(table.ids)
        expected = ["input_digest", "label", "logits", "row_crc", "row_max", "sample_id", "view"]
        assert rows["names"].tolist() == expected


@KINDS
def test_h5dump_reads_every_row(make_cache: Any, table: Any, name: str) -> None:
    if shutil.which("h5dump") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("h5dump is missing: apt-get install hdf5-tools")
        pytest.skip("h5dump is not installed (Debian: hdf5-tools)")
    labels: list[int] = []
    for file in files_of(make_cache(name)):
        command = ["h5dump", "-w", "0", "-y", "-d", "/label", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        body = re.search(r"DATA \{(.*?)\}", text, re.DOTALL)
        assert body is not None
        labels += [int(n) for n in body[1].split(",") if n.strip()]
        whole = subprocess.run(["h5dump", "-H", str(file)], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r'DATASET "(\w+)"', whole)) == {
            "logits",
            "row_max",
            "sample_id",
            "label",
            "view",
            "row_crc",
        }
        assert "GROUP" not in whole.replace('GROUP "/"', "")
    assert labels == table.labels.tolist()


@pytest.mark.interop("datasets")
def test_huggingface_datasets_loads_the_shards(folder: Path, table: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(p) for p in sorted((folder / "shards").glob("*.h5"))]
    loaded = datasets.load_dataset("hdf5", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded.num_rows == 100
    np.testing.assert_array_equal(loaded["label"], table.labels)
    logits = np.asarray(loaded["logits"], np.float32) + np.asarray(loaded["row_max"], np.float32)[:, None]
    np.testing.assert_array_equal(logits, table.logits)


def test_the_header_of_a_one_file_cache_says_all_that_a_stranger_needs(one_file: Path) -> None:
    import h5py

    with h5py.File(one_file, "r") as file:
        header = json.loads(file.attrs["kdcache"])
        assert file["logits"].shape == (100, 5)
    assert header["kind"] == "cache"
    assert header["encoding"] == {"name": "dense", "dtype": "float16", "shape": [5]}
    assert header["classes"]["count"] == 5
    assert header["samples"] == 100
    assert set(header["provenance"]["versions"]) == {"kdcache", "numpy", "h5py", "hdf5"}
