"""A data set that grew: its new samples go behind the stored ones, which keep their shards, order and labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kdcache
from kdcache.errors import IncompleteCacheError, KDCacheError, MismatchError
from kdcache.stages.precompute import PrecomputeResult
from kdcache.store.merge import merge
from kdcache.store.verify import verify
from kdcache.train.ids import resolve

CLASSES = 5
SHARD_ROWS = 8


class Letters(Dataset[Any]):
    """Samples by name; what belongs to a name never changes, and any names in any order make a data set."""

    def __init__(self, names: list[str], labels: dict[str, int] | None = None) -> None:
        self.sample_ids = names
        self.labels = np.array([(labels or {}).get(name, sum(name.encode()) % CLASSES) for name in names])

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed = int.from_bytes(self.sample_ids[index].encode(), "little") % 2**31
        image = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(seed))
        return image, int(self.labels[index])


class Numbers(Dataset[Any]):
    """Ids are positions; labels are not at hand as an array."""

    def __init__(self, rows: int, *, moved: int = 0) -> None:
        self.rows = rows
        self.moved = moved

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(index + self.moved))
        return image, index % CLASSES


def names(count: int, *, skip: int = 0) -> list[str]:
    """Names in an order of which a part is not the beginning: new ones come between the old."""
    return [f"{index % 7}/{index:03d}" for index in sorted(range(skip, skip + count), key=lambda i: (i % 7, i))]


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))


def dump(teacher: nn.Module, data: Dataset[Any], out: Path, **settings: Any) -> PrecomputeResult:
    facts = {"shard_rows": SHARD_ROWS, "batch_size": 4, "quiet": True, "threads": 1}
    result = kdcache.precompute(teacher, data, out, **{**facts, **settings})
    assert isinstance(result, PrecomputeResult)
    return result


def shards(out: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in sorted((out / "shards").iterdir())}


def check_rows(out: Path, data: Letters | Numbers, teacher: nn.Module) -> None:
    """Every sample's row is the teacher's answer to it, found by id, and a student is given it with its item."""
    cache = kdcache.open(out)
    assert sorted(cache.sample_ids.tolist()) == sorted(resolve(data).tolist())
    joined = kdcache.join(data, cache, check="full")
    for epoch in range(len(cache.views)):
        joined.set_epoch(epoch)
        for inputs, labels, rows in DataLoader(joined, batch_size=5, shuffle=True):
            with torch.inference_mode():
                assert torch.allclose(rows.dense(), teacher(inputs), atol=2e-3)
            assert torch.equal(labels, torch.as_tensor(rows.label))
    assert verify(out).ok


@pytest.mark.parametrize("settings", [{}, {"augment": "shift1", "views": 2, "seed": 3}, {"workers": 2}])
def test_new_samples_go_behind_the_stored_ones(teacher: nn.Module, tmp_path: Path, settings: dict[str, Any]) -> None:
    out, grown = tmp_path / "cache", Letters(names(33))
    first = dump(teacher, Letters(names(21)), out, **settings)
    before, stored = shards(out), kdcache.open(out).sample_ids
    result = dump(teacher, grown, out, **settings)
    views = settings.get("views", 1)
    assert (result.samples, result.computed) == (33, 12 * views)
    assert result.growth is not None
    assert (result.growth.samples_before, result.growth.samples_added) == (21, 12)
    assert (result.growth.labels_compared, result.growth.labels_changed) == (21, 0)
    assert {name: shards(out)[name] for name in before} == before
    cache = kdcache.open(out)
    assert np.array_equal(cache.sample_ids[:21], stored)
    assert cache.sample_ids[21:].tolist() == [n.encode() for n in grown.sample_ids if n.encode() not in stored]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["extents"] == [21, 33]
    assert manifest["predecessor"] == first.root
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["manifest.json", "shards"]
    check_rows(out, grown, teacher)


def test_it_grows_again_and_again_and_the_same_command_adds_nothing(teacher: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    for count in (3, 16, 17, 33):
        root = dump(teacher, Letters(names(count)), out).root
        again = dump(teacher, Letters(names(count)), out)
        assert (again.root, again.computed, again.growth) == (root, 0, None)
    assert json.loads((out / "manifest.json").read_text())["extents"] == [3, 16, 17, 33]
    check_rows(out, Letters(names(33)), teacher)
    check_rows(out, Letters(names(33)[::-1]), teacher)  # a student's data set may be in any order


def test_views_and_samples_may_come_at_once_or_in_turns(teacher: nn.Module, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"augment": "shift1", "seed": 3}
    at_once, in_turns = tmp_path / "at_once", tmp_path / "in_turns"
    for out in (at_once, in_turns):
        dump(teacher, Letters(names(11)), out, views=1, **facts)
    dump(teacher, Letters(names(21)), at_once, views=3, **facts)
    dump(teacher, Letters(names(11)), in_turns, views=3, **facts)
    result = dump(
        teacher, Letters(names(21)), in_turns, views=1, **facts
    )  # all views of the folder get the new samples
    assert result.computed == 10 * 3
    assert {n: data for n, (data, _) in shards(at_once).items()} == {n: d for n, (d, _) in shards(in_turns).items()}
    assert kdcache.open(at_once).views == (0, 1, 2)
    check_rows(at_once, Letters(names(21)), teacher)


def test_integers_that_count_on_stay_a_range(teacher: nn.Module, tmp_path: Path) -> None:
    dump(teacher, Numbers(21), tmp_path / "cache")
    result = dump(teacher, Numbers(30), tmp_path / "cache")
    assert kdcache.open(tmp_path / "cache").catalog.first_id == 0
    assert result.growth is not None
    assert result.growth.labels_compared == 21
    check_rows(tmp_path / "cache", Numbers(30), teacher)


def test_a_larger_limit_is_growth_too(teacher: nn.Module, tmp_path: Path) -> None:
    dump(teacher, Numbers(30), tmp_path / "cache", limit=10)
    assert dump(teacher, Numbers(30), tmp_path / "cache").computed == 20
    with pytest.raises(MismatchError, match="--limit"):
        dump(teacher, Numbers(30), tmp_path / "cache", limit=20)


def test_what_a_folder_grows_by_is_cut_as_its_shards_are(teacher: nn.Module, tmp_path: Path) -> None:
    """In shards of 8 rows, where a new dump would have one of all."""
    dump(teacher, Letters(names(11)), tmp_path / "told")
    dump(teacher, Letters(names(11)), tmp_path / "untold")
    for out, settings in (("told", {}), ("untold", {"shard_rows": None})):
        dump(teacher, Letters(names(21)), tmp_path / out, **settings)
        dump(teacher, Letters(names(31)), tmp_path / out, **settings)
    assert kdcache.open(tmp_path / "told").root == kdcache.open(tmp_path / "untold").root
    assert len(shards(tmp_path / "untold")) == 6


def test_labels_corrected_since_are_reported_and_not_used(teacher: nn.Module, tmp_path: Path) -> None:
    out, wrong = tmp_path / "cache", {"0/000": 1, "3/003": 3}
    dump(teacher, Letters(names(21), wrong), out)
    result = dump(teacher, Letters(names(33)), out)
    assert result.growth is not None
    assert result.growth.labels_changed == 2
    assert result.growth.changed_ids == ("0/000", "3/003")
    cache = kdcache.open(out)
    rows = cache.gather(cache.rows(["0/000", "3/003"], 0))
    assert rows.label is not None
    assert rows.label.tolist() == [1, 3]
    with pytest.raises(MismatchError, match="label"):
        check_rows(out, Letters(names(33)), teacher)


def test_labels_of_items_alone_are_compared_where_they_are_looked_at(teacher: nn.Module, tmp_path: Path) -> None:
    class Corrected(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            return image, 4 if index == 2 and self.rows == 30 else label

    dump(teacher, Corrected(21), tmp_path / "cache")
    result = dump(teacher, Corrected(30), tmp_path / "cache")
    assert result.growth is not None
    assert (result.growth.labels_changed, result.growth.changed_ids) == (1, (2,))


def test_a_column_of_labels_that_the_items_contradict_is_not_believed(teacher: nn.Module, tmp_path: Path) -> None:
    class Lying(Numbers):
        @property
        def targets(self) -> list[int]:
            return [0] * len(self)

    dump(teacher, Lying(300), tmp_path / "cache")
    result = dump(teacher, Lying(301), tmp_path / "cache")
    assert result.growth is not None
    assert (result.growth.labels_compared, result.growth.labels_changed) == (256, 0)


def test_another_data_set_does_not_pose_as_one_that_grew(teacher: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    root = dump(teacher, Numbers(21), out).root
    with pytest.raises(MismatchError, match=r"another data set: the input of sample \d+ .* Nothing was added"):
        dump(teacher, Numbers(30, moved=1), out)
    dump(teacher, Letters(names(21)), tmp_path / "letters")
    with pytest.raises(MismatchError, match=r"holds 21 samples, of which this data set of 30 lacks 9 \('"):
        dump(teacher, Letters(names(30, skip=9)), tmp_path / "letters")
    with pytest.raises(MismatchError, match="--output-key"):
        dump(teacher, Numbers(30), out, output_key="logits")
    assert verify(out, expect_root=root).ok
    assert not verify(out).unlisted


def test_ids_that_do_not_fit_are_refused(teacher: nn.Module, tmp_path: Path) -> None:
    dump(teacher, Letters(names(21)), tmp_path / "cache")
    with pytest.raises(MismatchError, match="room for sample ids of 5 bytes, and the data set has one of 9"):
        dump(teacher, Letters([*names(21), "7/long000"]), tmp_path / "cache")
    with pytest.raises(MismatchError, match="another dump"):
        dump(teacher, Numbers(30), tmp_path / "cache")


def test_mixed_views_do_not_grow(teacher: nn.Module, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"augment": "shift1,mixup0.4", "seed": 3}
    dump(teacher, Letters(names(11)), tmp_path / "cache", views=1, **facts)
    with pytest.raises(MismatchError, match="mix samples with others"):
        dump(teacher, Letters(names(21)), tmp_path / "cache", views=1, **facts)


def test_one_file_grows_by_way_of_a_folder(teacher: nn.Module, tmp_path: Path) -> None:
    dump(teacher, Letters(names(11)), tmp_path / "cache.h5")
    with pytest.raises(MismatchError, match="One file does not grow") as refused:
        dump(teacher, Letters(names(21)), tmp_path / "cache.h5")
    advised = re.search(r"`kdcache merge (\S+) (\S+)`, then this command with --out (\S+) ", str(refused.value))
    assert advised is not None
    merge(advised[1], advised[2])
    assert advised[3] == advised[2] == f"{tmp_path / 'cache'}/"
    with pytest.raises(MismatchError, match=r"shard_rows is \d+ there and 8 .*leave it out"):
        dump(teacher, Letters(names(21)), Path(advised[3]))
    dump(teacher, Letters(names(21)), Path(advised[3]), shard_rows=None)
    merge(advised[2], tmp_path / "grown.h5")
    check_rows(tmp_path / "grown.h5", Letters(names(21)), teacher)


def test_a_copy_of_a_folder_that_grew_has_its_shards(teacher: nn.Module, tmp_path: Path) -> None:
    dump(teacher, Letters(names(11)), tmp_path / "cache")
    dump(teacher, Letters(names(21)), tmp_path / "cache")
    merge(tmp_path / "cache", tmp_path / "copy")
    assert {n: d for n, (d, _) in shards(tmp_path / "copy").items()} == {
        n: d for n, (d, _) in shards(tmp_path / "cache").items()
    }
    check_rows(tmp_path / "copy", Letters(names(21)), teacher)


@pytest.mark.parametrize("gone", ["v001-00001.h5", "v001-00003.h5"])
def test_a_shard_that_is_gone_is_made_again_in_the_stored_order(teacher: nn.Module, tmp_path: Path, gone: str) -> None:
    facts: dict[str, Any] = {"augment": "shift1", "views": 2, "seed": 3}
    out = tmp_path / "cache"
    dump(teacher, Letters(names(21)), out, **facts)
    root = dump(teacher, Letters(names(33)), out, **facts).root
    (out / "shards" / gone).unlink()
    assert dump(teacher, Letters(names(33)), out, **facts).root == root
    check_rows(out, Letters(names(33)), teacher)


def test_which_samples_a_shard_held_must_be_known(teacher: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    dump(teacher, Letters(names(21)), out)
    dump(teacher, Letters(names(33)), out)
    (out / "shards" / "v000-00001.h5").unlink()
    with pytest.raises(IncompleteCacheError, match=r"v000-00001.h5 is missing, .* fetch it from a copy"):
        dump(teacher, Letters(names(33)), out)


class Failing(Letters):
    """Fails at a name, as a disk that comes and goes."""

    def __init__(self, count: int, at: str | None) -> None:
        super().__init__(names(count))
        self.at = at

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.sample_ids[index] == self.at:
            raise OSError("a disk that comes and goes")
        return super().__getitem__(index)


def test_growth_that_was_interrupted_goes_on_and_the_old_rows_are_there_meanwhile(
    teacher: nn.Module, tmp_path: Path
) -> None:
    out, whole = tmp_path / "cache", tmp_path / "whole"
    root = dump(teacher, Failing(21, None), out).root
    with pytest.raises(KDCacheError, match="comes and goes"):
        dump(teacher, Failing(45, names(45)[-1]), out)
    assert kdcache.open(out).root == root
    assert verify(out).ok
    result = dump(teacher, Failing(45, None), out)
    assert 0 < result.computed < 24
    for count in (21, 45):
        dump(teacher, Failing(count, None), whole)
    assert {n: d for n, (d, _) in shards(out).items()} == {n: d for n, (d, _) in shards(whole).items()}
    assert result.root == kdcache.open(whole).root


def test_data_that_grow_further_while_growth_is_interrupted_mix_no_rows(teacher: nn.Module, tmp_path: Path) -> None:
    """What was begun holds samples at positions that others have now."""
    out = tmp_path / "cache"
    dump(teacher, Failing(21, None), out)
    with pytest.raises(KDCacheError, match="comes and goes"):
        dump(teacher, Failing(45, names(45)[-1]), out)
    assert len(shards(out)) > 3
    assert dump(teacher, Failing(60, None), out).computed == 39
    check_rows(out, Letters(names(60)), teacher)
