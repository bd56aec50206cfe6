"""`export`: decoded rows for NumPy and HDF5, and no crash and no rest where the disk says no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, StorageError, UsageError
from kdcache.store import cache as caches
from kdcache.store import export as exports
from kdcache.store.export import export

FORMATS = pytest.mark.parametrize("ending", ["npz", "h5"])
COMPRESS = pytest.mark.parametrize("compress", [None, "gzip"])


def load(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    with h5py.File(path, "r") as file:
        return {name: data[...] for name, data in file.items()}


@FORMATS
@COMPRESS
@pytest.mark.parametrize("ids", [None, [f"image {n}" for n in range(100)]], ids=["integers", "text"])
@pytest.mark.parametrize("labels", [True, False])
def test_decoded_rows_come_out(
    make_cache: Any,
    make_table: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    compress: str | None,
    ids: Any,
    labels: bool,
) -> None:
    monkeypatch.setattr(exports, "_BLOCK_BYTES", 700)  # several blocks, a short last one
    table = make_table(ids=ids)
    out = export(make_cache(table=table, labels=labels), tmp_path / f"x.{ending}", compress=compress)
    arrays = load(out)
    assert sorted(arrays) == sorted(["logits", "sample_id", "view", *(["label"] if labels else [])])
    np.testing.assert_array_equal(arrays["logits"], table.logits)
    assert arrays["logits"].dtype == np.float32
    assert [i if ids is None else i.decode() for i in arrays["sample_id"].tolist()] == list(table.ids)
    if labels:
        np.testing.assert_array_equal(arrays["label"], table.labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["teacher", f"x.{ending}"])


@FORMATS
def test_dense_prediction_and_views_come_out(
    make_cache: Any, make_table: Any, make_views: Any, tmp_path: Path, ending: str
) -> None:
    table = make_table(trailing=(3, 2))
    arrays = load(export(make_cache(table=table), tmp_path / f"x.{ending}"))
    np.testing.assert_array_equal(arrays["logits"], table.logits)
    path, logits = make_views()
    arrays = load(export(path, tmp_path / f"views.{ending}"))
    np.testing.assert_array_equal(arrays["view"], [0] * 100 + [3] * 100)
    np.testing.assert_array_equal(arrays["logits"], np.concatenate([logits[0], logits[3]]))


def test_compression_is_in_force_and_provenance_comes_along(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "x.h5", compress="gzip")
    with h5py.File(tmp_path / "x.h5", "r") as file:
        assert file["logits"].compression == "gzip"
        assert caches.open(folder).root in file.attrs["provenance"].decode()
    with pytest.raises(CorruptCacheError):
        caches.open(tmp_path / "x.h5")  # an export is no cache


def test_the_format_may_be_named_apart_from_the_file(folder: Path, tmp_path: Path) -> None:
    assert set(load(export(folder, tmp_path / "x.npz"))) == {"logits", "sample_id", "view", "label"}
    export(folder, tmp_path / "archive", format="npz")
    assert (tmp_path / "archive").read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("wrong", [{"format": "csv"}, {"compress": "zstd"}])
def test_unknown_formats_are_refused(folder: Path, tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="choose"):
        export(folder, tmp_path / "x.h5", **wrong)
    with pytest.raises(UsageError, match="csv"):
        export(folder, tmp_path / "x.csv")


@FORMATS
def test_a_name_that_is_taken_is_refused(folder: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"x.{ending}"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export(folder, out)
    assert out.read_text() == "mine"
    assert "logits" in load(export(folder, out, overwrite=True))


@FORMATS
def test_a_damaged_row_leaves_nothing(folder: Path, flip: Any, tmp_path: Path, ending: str) -> None:
    flip(folder / "shards" / "v000-00002.h5", caches.open(folder).catalog.parts[2].arrays["logits"].offset)
    with pytest.raises(CorruptCacheError):
        export(folder, tmp_path / f"x.{ending}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher"]


LIMITED = """
import resource, sys
from kdcache.errors import StorageError
from kdcache.store.export import export
limit, source, out, compress = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] or None
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    export(source, out, compress=compress)
except StorageError as error:
    assert "file-size limit" in str(error), error
    sys.exit(7)
"""


@FORMATS
@pytest.mark.parametrize("compress", ["", "gzip"])
def test_a_full_disk_is_a_storage_error_and_not_a_crash(
    make_cache: Any, make_table: Any, tmp_path: Path, python: Any, ending: str, compress: str
) -> None:
    """libhdf5 on its own ends these in a segmentation fault; the limits hit header, rows and the end of the file."""
    source = make_cache(table=make_table(3000, classes=20), shard_rows=5000)
    size = export(source, tmp_path / f"whole.{ending}", compress=compress or None).stat().st_size
    for limit in (100, 3000, size // 2, size - 1):
        result = python(LIMITED, limit, source, tmp_path / f"x.{ending}", compress, check=False)
        assert result.returncode == 7, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher", f"whole.{ending}"]


def test_an_error_of_the_disk_is_raised_in_the_middle(
    make_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_cache()
    monkeypatch.setattr("kdcache.store.posix.os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(StorageError, match="I/O error"):
        export(source, tmp_path / "x.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher"]
