"""Fewer views of a cache: written by `merge`, or what is left of a folder that was fetched in part."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, MismatchError, UsageError
from kdcache.store import cache as caches
from kdcache.store.inspect import describe
from kdcache.store.merge import merge, parse_views
from kdcache.store.verify import verify


def remove_view(path: Path, view: int) -> None:
    for shard in (path / "shards").glob(f"v{view:03d}-*.h5"):
        shard.unlink()


def answers(path: Path, logits: dict[int, np.ndarray]) -> None:
    """The cache holds these views, and each has its rows."""
    with caches.open(path) as cache:
        assert cache.views == tuple(logits)
        assert len(cache) == 100 * len(logits)
        for view, expected in logits.items():
            rows = cache.gather(cache.rows(cache.sample_ids, view=view))
            np.testing.assert_array_equal(rows.dense(), expected)
            assert set(rows.view.tolist()) == {view}


@pytest.mark.parametrize("ids", [None, [f"image {n}" for n in range(100)]], ids=["integers", "text"])
@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("out", ["fewer", "fewer.h5"])
def test_a_merge_of_some_views_holds_their_rows(
    make_views: Any, tmp_path: Path, ids: Any, source: str, out: str
) -> None:
    path, logits = make_views(views=(0, 1, 3), ids=ids)
    if source == "file":
        merge(path, tmp_path / "all.h5")
        path = tmp_path / "all.h5"
    done: list[int] = []
    root = merge(path, tmp_path / out, views=[3, 0, 3], progress=done.append)
    assert sum(done) == 200
    answers(tmp_path / out, {0: logits[0], 3: logits[3]})
    assert verify(tmp_path / out, expect_root=root).ok
    assert caches.open(tmp_path / out).provenance == caches.open(path).provenance
    assert describe(tmp_path / out)["absent_views"] == []


def test_the_folder_of_some_views_is_the_one_that_a_dump_of_them_makes(
    make_views: Any, tmp_path: Path, content: Any
) -> None:
    path, _ = make_views(views=(0, 1, 3))
    few, _ = make_views("few", views=(0, 3))
    merge(path, tmp_path / "fewer", views=[0, 3])
    assert content(tmp_path / "fewer") == content(few)
    merge(few, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(few)


def test_clamped_values_and_class_names_go_along(make_cache: Any, make_table: Any, tmp_path: Path) -> None:
    table = make_table()
    table.logits[50, 2] = -1e6
    path = make_cache("clamped", table, classes=[f"class {n} {'of a long list ' * 2000}" for n in range(5)])
    merge(path, tmp_path / "copy")
    assert describe(tmp_path / "copy")["clamped"] == describe(path)["clamped"] == 1
    assert caches.open(tmp_path / "copy").classes == caches.open(path).classes
    merge(path, tmp_path / "one.h5")
    merge(tmp_path / "one.h5", tmp_path / "again")
    assert caches.open(tmp_path / "again").classes is None  # a one-file cache has no room for them
    assert verify(tmp_path / "again").ok


def test_a_view_that_is_not_there_cannot_be_merged(make_views: Any, tmp_path: Path) -> None:
    path, _ = make_views(views=(0, 1, 3))
    remove_view(path, 1)
    with pytest.raises(MismatchError, match=r"has the views \[0, 3\] \(of its dump, .* \[1\] are not here\), not"):
        merge(path, tmp_path / "fewer", views=[0, 1])
    assert not (tmp_path / "fewer").exists()


def test_a_folder_that_is_taken_is_replaced_only_when_asked_for(make_views: Any, tmp_path: Path, content: Any) -> None:
    path, logits = make_views()
    merge(path, tmp_path / "fewer", views=[0])
    before = content(tmp_path / "fewer")
    with pytest.raises(UsageError, match="exists"):
        merge(path, tmp_path / "fewer", views=[3])
    assert content(tmp_path / "fewer") == before
    merge(path, tmp_path / "fewer", views=[3], overwrite=True)
    answers(tmp_path / "fewer", {3: logits[3]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="thesis"):
            merge(path, tmp_path / "mine", overwrite=overwrite)
        with pytest.raises(UsageError, match="is the cache that is read"):
            merge(path, path, overwrite=overwrite)
    assert verify(path).ok


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_source_that_is_not_sound_leaves_no_folder(make_views: Any, flip: Any, tmp_path: Path, damage: str) -> None:
    path, _ = make_views()
    shard = path / "shards" / "v003-00001.h5"
    if damage == "flip":
        flip(shard, caches.open(path).catalog.parts[4].arrays["logits"].offset)
    else:
        shard.unlink()
    with pytest.raises(CorruptCacheError if damage == "flip" else IncompleteCacheError, match="v003-00001"):
        merge(path, tmp_path / "fewer", views=[3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["views"]


def test_a_merge_that_was_killed_is_finished_by_the_same_call(
    make_views: Any, tmp_path: Path, python: Any, content: Any
) -> None:
    path, _ = make_views()
    script = (
        "import os, sys; from kdcache.store.merge import merge; done = []; "
        "merge(sys.argv[1], sys.argv[2], progress=lambda n: done.append(n) or (len(done) == 5 and os._exit(9)))"
    )
    assert python(script, path, tmp_path / "copy", check=False).returncode == 9
    with pytest.raises(IncompleteCacheError, match="not finished"):
        caches.open(tmp_path / "copy")
    kept = os.stat(tmp_path / "copy" / "shards" / "v000-00001.h5").st_ino
    with pytest.raises(KDCacheError, match="another dump"):
        merge(path, tmp_path / "copy", views=[3])
    merge(path, tmp_path / "copy")
    assert os.stat(tmp_path / "copy" / "shards" / "v000-00001.h5").st_ino == kept
    assert content(tmp_path / "copy") == content(path)


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 3)], ids=str)
def test_a_folder_with_the_shards_of_some_views_is_a_cache_of_these(
    make_views: Any, tmp_path: Path, gone: tuple[int, ...]
) -> None:
    path, logits = make_views(views=(0, 1, 3))
    root = caches.open(path).root
    for view in gone:
        remove_view(path, view)
    left = {view: logits[view] for view in (0, 1, 3) if view not in gone}
    answers(path, left)
    report = verify(path, expect_root=root)
    assert report.ok
    assert (report.rows, report.absent_views) == (100 * len(left), gone)
    assert report.bytes == describe(path)["bytes"] == sum(p.stat().st_size for p in (path / "shards").iterdir())
    assert describe(path)["absent_views"] == list(gone)
    merge(path, tmp_path / "rest.h5")
    answers(tmp_path / "rest.h5", left)


def test_a_view_of_which_some_shards_are_missing_is_incomplete(make_views: Any) -> None:
    path, _ = make_views(views=(0, 1, 3))
    remove_view(path, 0)
    (path / "shards" / "v001-00002.h5").unlink()
    report = verify(path)
    assert report.missing
    assert report.absent_views == (0,)
    assert "v001-00002.h5 is missing" in report.problems[0]
    cache = caches.open(path)
    with pytest.raises(IncompleteCacheError, match="v001-00002"):
        cache.gather(cache.rows([99], view=1))


@pytest.mark.parametrize("views", [(0,), (0, 3)], ids=str)
def test_a_cache_without_any_shard_is_incomplete(make_views: Any, views: tuple[int, ...]) -> None:
    path, _ = make_views(views=views)
    for view in views:
        remove_view(path, view)
    report = verify(path)
    assert report.missing
    assert report.absent_views == ()
    with pytest.raises(IncompleteCacheError, match=r"v000-00000\.h5 is missing"):
        caches.open(path).gather([0])


def test_links_to_nowhere_are_damage_and_no_absent_view(make_views: Any) -> None:
    path, _ = make_views()
    for shard in sorted((path / "shards").glob("v003-*.h5")):
        shard.unlink()
        shard.symlink_to("nowhere.h5")
    assert not verify(path).ok
    assert not verify(path).missing


def test_rows_keep_their_numbers_where_further_views_arrive_meanwhile(make_views: Any, tmp_path: Path) -> None:
    """A worker that opens the cache again must not number the rows of more views than the process that sent it."""
    path, logits = make_views(views=(0, 1, 3))
    away = [(shard, shard.read_bytes()) for shard in sorted((path / "shards").glob("v00[01]-*.h5"))]
    for shard, _ in away:
        shard.unlink()
    sent = pickle.dumps(caches.open(path))
    for shard, data in away:
        shard.write_bytes(data)
    cache = pickle.loads(sent)
    assert cache.views == (3,)
    np.testing.assert_array_equal(cache.gather([7]).dense(), logits[3][[7]])
    assert pickle.loads(pickle.dumps(cache)).views == (3,)
    remove_view(path, 3)
    with pytest.raises(IncompleteCacheError, match=r"views \[3\] were removed"):
        pickle.loads(sent)


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "0,,2", "0-99999999", "65536", "1.5", "0-3-5"])
def test_texts_that_name_no_views_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--views"):
        parse_views(text)


def test_views_are_named_by_numbers_and_ranges() -> None:
    assert parse_views("0-3") == (0, 1, 2, 3)
    assert parse_views("5, 0,2,2") == (0, 2, 5)
