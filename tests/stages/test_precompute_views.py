"""Dumps of several views: each row is the teacher's answer to the view that a student will be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

import kdcache
from kdcache.errors import DataError, KDCacheError, MismatchError, UsageError
from kdcache.format.identity import input_digest

ROWS, VIEWS = 23, 3
SETTINGS: dict[str, Any] = {"batch_size": 4, "shard_rows": 9, "device": "cpu", "threads": 1, "quiet": True}


class Images(Dataset[Any]):
    """8 x 8 images with labels; every other method of loading gives the same."""

    def __init__(self, *, labels: bool = True) -> None:
        self.pixels = torch.rand(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.labels = labels
        self.sample_ids = [f"image-{n}" for n in range(ROWS)]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return (self.pixels[index], index % 5) if self.labels else self.pixels[index]


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()


def dump(teacher: nn.Module, out: Path, data: Any = None, **settings: Any) -> kdcache.Cache:
    options = {"augment": "shift2,noise0.1", "views": VIEWS, "seed": 7, "dtype": "float32", **SETTINGS, **settings}
    kdcache.precompute(teacher, Images() if data is None else data, out, **options)
    return kdcache.open(out)


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_is_the_answer_to_its_view(teacher: nn.Module, tmp_path: Path, name: str, workers: int) -> None:
    cache = dump(teacher, tmp_path / name, workers=workers)
    replay, data = kdcache.views.named("shift2,noise0.1", seed=7), Images()
    assert cache.views == (0, 1, 2)
    for view in cache.views:
        rows = cache.gather(cache.rows(data.sample_ids, view))
        seen = [replay(pixels, id.encode(), view) for pixels, id in zip(data.pixels, data.sample_ids, strict=True)]
        assert rows.input_digest is not None
        assert rows.input_digest.tolist() == [input_digest(value) for value in seen]
        with torch.inference_mode():
            expected = teacher(torch.stack(seen))
        torch.testing.assert_close(torch.from_numpy(rows.dense()), expected)
    assert cache.provenance["views"]["augment"] == "shift2,noise0.1"
    assert cache.provenance["data"]["digest_point"] == "view"
    assert kdcache.verify(tmp_path / name).ok


def test_workers_batches_of_shards_and_ranks_do_not_change_a_byte(teacher: nn.Module, tmp_path: Path) -> None:
    first = dump(teacher, tmp_path / "a")
    assert dump(teacher, tmp_path / "b", workers=2).root == first.root


def test_a_student_is_shown_what_the_teacher_saw(teacher: nn.Module, tmp_path: Path) -> None:
    joined = kdcache.join(Images(), dump(teacher, tmp_path / "teacher"), check="full")
    for epoch in range(4):
        joined.set_epoch(epoch)
        pixels, _, rows = default_collate(joined.__getitems__(list(range(ROWS))))
        assert rows.view.unique().tolist() == [epoch % VIEWS]
        with torch.inference_mode():
            torch.testing.assert_close(rows.dense(), teacher(pixels))


def test_the_teachers_own_transform_comes_after_the_shared_view(teacher: nn.Module, tmp_path: Path) -> None:
    plain = dump(teacher, tmp_path / "plain")
    scaled = dump(teacher, tmp_path / "scaled", transform=lambda image: image * 2 - 1)
    rows = plain.rows(Images().sample_ids)
    one, other = plain.gather(rows), scaled.gather(rows)
    assert one.input_digest is not None
    assert other.input_digest is not None
    assert one.input_digest.tolist() == other.input_digest.tolist()
    assert not np.array_equal(one.dense(), other.dense())


def test_mixed_views_store_the_partners_label_and_its_share(teacher: nn.Module, tmp_path: Path) -> None:
    cache = dump(teacher, tmp_path / "teacher", augment="shift1,cutmix1")
    replay, data = kdcache.views.named("shift1,cutmix1", seed=7), Images()
    assert replay.mix is not None
    rows = cache.gather(cache.rows(data.sample_ids, 1))
    assert rows.label_b is not None
    assert rows.mix_ratio is not None
    for place, sample_id in enumerate(data.sample_ids):
        draw = replay.mix.draw(7, sample_id.encode(), 1, ROWS)
        own, other = (replay(data.pixels[n], data.sample_ids[n].encode(), 1) for n in (place, draw.partner))
        mixed, ratio = replay.mix(own, other, draw)
        assert rows.label_b[place] == draw.partner % 5
        assert rows.mix_ratio[place] == np.float32(ratio)
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(rows.dense()[place]), teacher(mixed[None])[0])
    joined = kdcache.join(data, cache, check="full", view=1)
    _, labels, found = default_collate(joined.__getitems__([3, 5]))
    loss = kdcache.DistillationLoss(alpha=0.5)(torch.zeros(2, 5), found, labels)
    assert torch.isfinite(loss)


def test_an_interrupted_dump_of_views_ends_in_the_same_bytes(teacher: nn.Module, tmp_path: Path) -> None:
    class Failing(Images):
        calls = 0

        def __getitem__(self, index: int) -> Any:
            Failing.calls += 1
            if Failing.calls == 45:
                raise OSError("a disk that comes and goes")
            return super().__getitem__(index)

    whole = dump(teacher, tmp_path / "whole")
    facts = {**SETTINGS, "augment": "shift2,noise0.1", "views": VIEWS, "seed": 7, "dtype": "float32"}
    with pytest.raises(DataError, match="comes and goes"):
        kdcache.precompute(teacher, Failing(), tmp_path / "broken", **facts)
    result = kdcache.precompute(teacher, Failing(), tmp_path / "broken", **{**facts, "workers": 1})
    assert 0 < result.computed < ROWS * VIEWS
    shards = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "shards").iterdir()}
    assert shards == {path.name: path.read_bytes() for path in (tmp_path / "broken" / "shards").iterdir()}
    assert whole.views == kdcache.open(tmp_path / "broken").views


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": "shift1,noise0.1"}, "--augment"),
        ({"seed": 8}, "--seed"),
        ({"augment": None, "views": 1}, "--augment"),
    ],
)
def test_another_pipeline_seed_or_number_of_views_is_another_dump(
    teacher: nn.Module, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    dump(teacher, tmp_path / "teacher")
    with pytest.raises(MismatchError, match=message):
        dump(teacher, tmp_path / "teacher", **change)


def test_another_spelling_is_the_same_pipeline(teacher: nn.Module, tmp_path: Path) -> None:
    root = dump(teacher, tmp_path / "teacher").root
    assert dump(teacher, tmp_path / "teacher", augment="shift, noise0.10").root == root


def files_of(out: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and inode of every shard."""
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in sorted((out / "shards").iterdir())}


def test_views_are_added_to_a_finished_folder_and_nothing_else_is_touched(teacher: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    small = dump(teacher, out, views=2)
    before, rows = files_of(out), small.rows(Images().sample_ids, 1)
    manifest = (out / "manifest.json").read_bytes()
    result = kdcache.precompute(
        teacher, Images(), out, **{**SETTINGS, "augment": "shift2,noise0.1", "views": 5, "seed": 7, "dtype": "float32"}
    )
    assert result.computed == 3 * ROWS
    grown, after = kdcache.open(out), files_of(out)
    assert grown.views == (0, 1, 2, 3, 4)
    assert {name: after[name] for name in before} == before
    assert np.array_equal(small.gather(rows).dense(), grown.gather(grown.rows(Images().sample_ids, 1)).dense())
    at_once = tmp_path / "at_once"
    dump(teacher, at_once, views=5)
    assert {name: data for name, (data, _) in files_of(at_once).items()} == {n: d for n, (d, _) in after.items()}
    assert b'"predecessor":"' + small.root.encode() in (out / "manifest.json").read_bytes()
    assert manifest != (out / "manifest.json").read_bytes()
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["manifest.json", "shards"]
    report = kdcache.verify(out)
    assert report.ok
    assert not report.unlisted


def test_a_grown_folder_that_lost_a_shard_is_made_whole_with_the_same_root(teacher: nn.Module, tmp_path: Path) -> None:
    dump(teacher, tmp_path / "teacher", views=1)
    root = dump(teacher, tmp_path / "teacher").root
    (tmp_path / "teacher" / "shards" / "v001-00001.h5").unlink()
    assert dump(teacher, tmp_path / "teacher").root == root


def test_fewer_views_than_there_are_leave_nothing_to_do(teacher: nn.Module, tmp_path: Path) -> None:
    for name in ("teacher", "teacher.h5"):
        root = dump(teacher, tmp_path / name).root
        assert dump(teacher, tmp_path / name, views=1).root == root


def test_one_file_does_not_grow(teacher: nn.Module, tmp_path: Path) -> None:
    root = dump(teacher, tmp_path / "teacher.h5").root
    with pytest.raises(MismatchError, match="One file does not grow"):
        dump(teacher, tmp_path / "teacher.h5", views=VIEWS + 1)
    assert kdcache.open(tmp_path / "teacher.h5").root == root


def test_the_smaller_cache_is_read_while_views_are_added_and_a_kill_loses_none(
    teacher: nn.Module, tmp_path: Path
) -> None:
    class Failing(Images):
        calls = 0

        def __getitem__(self, index: int) -> Any:
            Failing.calls += 1
            if Failing.calls == 40:
                raise OSError("a disk that comes and goes")
            return super().__getitem__(index)

    Failing.__name__ = "Images"  # the name is part of the identity of the data
    out, facts = tmp_path / "teacher", {**SETTINGS, "augment": "shift2,noise0.1", "seed": 7, "dtype": "float32"}
    root = dump(teacher, out, views=1).root
    with pytest.raises(DataError, match="comes and goes"):
        kdcache.precompute(teacher, Failing(), out, views=4, **facts)
    assert kdcache.open(out).root == root  # not finished: what was there is there
    assert dump(teacher, out, views=1).root == root  # and the old command leaves what was begun
    result = kdcache.precompute(teacher, Images(), out, views=4, **facts)
    assert 0 < result.computed < 3 * ROWS
    dump(teacher, tmp_path / "at_once", views=4)
    shards = {name: data for name, (data, _) in files_of(out).items()}
    assert shards == {name: data for name, (data, _) in files_of(tmp_path / "at_once").items()}
    assert kdcache.verify(out).ok


class Stateful:
    """Every call turns a little further."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image + self.calls


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"views": 0}, UsageError, "must be 1 to"),
        ({"views": 2, "augment": None}, UsageError, "store the same rows 2 times"),
        ({"augment": "turn3"}, UsageError, "no part is called 'turn'"),
        ({"augment": "mixup0.2", "data": Images(labels=False)}, UsageError, "the data has none"),
        ({"augment": Stateful()}, DataError, "Stateful is not replayed"),
        ({"augment": lambda image: image[0, 0, 0, 0]}, DataError, "failed on sample"),
        ({"seed": -1}, UsageError, "--seed must be"),
    ],
)
def test_views_that_cannot_be_meant_are_refused_before_the_teacher_runs(
    tmp_path: Path, settings: dict[str, Any], kind: type[KDCacheError], message: str
) -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the teacher ran")

    with pytest.raises(kind, match=message):
        dump(Unused(), tmp_path / "teacher", **settings)
    assert not (tmp_path / "teacher").exists()


def test_views_of_different_shapes_do_not_stack(teacher: nn.Module, tmp_path: Path) -> None:
    def ragged(image: Tensor) -> Tensor:
        return image[:, : int(torch.randint(4, 9, ()))]

    with pytest.raises(DataError, match="cannot be stacked"):
        dump(teacher, tmp_path / "teacher", augment=ragged)
