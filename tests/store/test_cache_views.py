"""Caches of several views: rows are numbered view by view, and each view is checked as itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, MismatchError
from kdcache.store import cache as caches
from kdcache.store.merge import merge
from kdcache.store.verify import verify

IDS = pytest.mark.parametrize("ids", [None, [f"image {n}" for n in range(100)]], ids=["integers", "text"])


@IDS
@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_every_view_has_its_rows(make_views: Any, tmp_path: Any, ids: Any, access: str) -> None:
    path, logits = make_views(ids=ids)
    merge(path, tmp_path / "views.h5")
    wanted = [9, 99, 0, 9] if ids is None else [ids[n] for n in (9, 99, 0, 9)]
    for source in (path, tmp_path / "views.h5"):
        cache = caches.open(source, access=access)
        assert (len(cache), cache.num_samples, cache.views, cache.shape) == (200, 100, (0, 3), (200, 5))
        assert cache.rows(wanted, view=3).tolist() == [109, 199, 100, 109]
        assert cache.find([-1 if ids is None else "x"], view=3).tolist() == [-1]
        for _ in range(2):  # with and without first-touch checks
            mixed = cache.gather([109, 9, -1, 100])
            assert mixed.view.tolist()[:2] == [3, 0]
            np.testing.assert_array_equal(mixed.dense(), [logits[3][9], logits[0][9], np.zeros(5), logits[3][0]])
            cache.gather(np.arange(200))
        assert len(cache.sample_ids) == 100
        assert verify(source).ok
    with pytest.raises(MismatchError, match=r"views \[0, 3\], not 1"):
        cache.rows(wanted, view=1)


def test_one_view_can_be_merged_out_of_many(make_views: Any, tmp_path: Any) -> None:
    path, logits = make_views()
    merge(path, tmp_path / "one.h5", views=[3])
    cache = caches.open(tmp_path / "one.h5")
    assert cache.views == (3,)
    rows = cache.gather(cache.rows([7, 8], view=3))
    np.testing.assert_array_equal(rows.dense(), logits[3][7:9])
    assert rows.view.tolist() == [3, 3]
    assert verify(tmp_path / "one.h5").ok
    for views in ([1], [], [0, 5]):
        with pytest.raises(MismatchError, match="has the views"):
            merge(path, tmp_path / "none.h5", views=views)


def test_a_shard_of_one_view_cannot_stand_in_for_another(make_views: Any) -> None:
    path, _ = make_views()
    (path / "shards" / "v003-00000.h5").unlink()
    (path / "shards" / "v000-00000.h5").rename(path / "shards" / "v003-00000.h5")
    with pytest.raises(CorruptCacheError, match=r"v003-00000[.]h5: its header"):
        caches.open(path).gather([100])


def test_a_folder_of_views_counts_its_bytes_once(make_views: Any, tmp_path: Any) -> None:
    path, _ = make_views()
    merge(path, tmp_path / "views.h5")
    report = verify(tmp_path / "views.h5")
    assert (report.rows, report.bytes) == (200, (tmp_path / "views.h5").stat().st_size)
    assert verify(path).bytes == sum(p.stat().st_size for p in (path / "shards").iterdir())
