"""All rows in order, each checked, by reads that can fail as an error instead of a signal."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, StorageError
from kdcache.store.export import export
from kdcache.store.merge import merge
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.scan import scan


def dense(catalog: Catalog, **options: Any) -> np.ndarray:
    return np.concatenate([catalog.schema.encoding.decode(block) for _, _, block in scan(catalog, **options)])


@pytest.mark.parametrize("block_bytes", [1, 700, 8 << 20])
def test_rows_come_in_order_whatever_the_size_of_a_block(table: Any, folder: Path, block_bytes: int) -> None:
    catalog = read_catalog(folder)
    np.testing.assert_array_equal(dense(catalog, block_bytes=block_bytes), table.logits)
    positions = np.concatenate([positions for _, positions, _ in scan(catalog, block_bytes=block_bytes)])
    assert positions.tolist() == list(range(100))


def test_views_come_as_asked_for(make_views: Any) -> None:
    path, logits = make_views()
    catalog = read_catalog(path)
    np.testing.assert_array_equal(dense(catalog), np.concatenate([logits[0], logits[3]]))
    np.testing.assert_array_equal(dense(catalog, views=(3,)), logits[3])
    assert {view for view, _, _ in scan(catalog, views=(3,))} == {3}


def test_damage_names_the_sample(folder: Path, flip: Any) -> None:
    catalog = read_catalog(folder)
    layout = catalog.parts[1].arrays["logits"]
    flip(catalog.parts[1].path, layout.offset + 3 * layout.spec.row_bytes)
    with pytest.raises(CorruptCacheError, match=r"v000-00001\.h5.*row 3 \(sample 43\)"):
        dense(catalog)


def test_a_missing_part_is_said_when_it_is_reached(folder: Path) -> None:
    catalog = read_catalog(folder)
    catalog.parts[2].path.unlink()
    rows = scan(catalog)
    assert len([next(rows), next(rows)]) == 2
    with pytest.raises(IncompleteCacheError, match=r"v000-00002\.h5 is missing"):
        next(rows)


@pytest.mark.parametrize("copy", [merge, export], ids=["merge", "export"])
def test_a_disk_that_fails_below_the_rows_is_an_error_of_ours(
    copy: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a map it would be a SIGBUS."""
    real, calls = os.pread, []

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset >= first:
            calls.append(offset)
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, length, offset)

    first = read_catalog(folder).parts[0].arrays["logits"].offset
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(StorageError, match="I/O error"):
        copy(folder, tmp_path / "x.h5")
    assert calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]
