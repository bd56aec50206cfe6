"""Dumps of int8, int4 and top-k rows: what is stored is what NumPy makes of the teacher's logits, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import DataError, MismatchError, StorageError, UsageError
from kdcache.stages import preflight
from kdcache.stages.asked_plan import asked_plan
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.verify_teacher import verify_teacher
from kdcache.store.occupant import occupant

ROWS, WIDTH, CLASSES = 50, 6, 21
SETTINGS: dict[str, Any] = {"batch_size": 8, "shard_rows": 20, "device": "cpu", "threads": 1, "quiet": True}
SMALL: list[dict[str, Any]] = [
    {"dtype": "int8"},
    {"dtype": "int4"},
    {"top_k": 3},
    {"top_k": 3, "temperatures": "1,z2"},
    {"top_k": 99},
]
ENCODINGS = pytest.mark.parametrize("small", SMALL, ids=lambda s: "-".join(str(v) for v in s.values()))
NAMES = pytest.mark.parametrize("name", ["teacher", "teacher.h5"])


class Maps(nn.Module):
    """Logits of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x * 3, 1 - x, x**2, -x], dim=1)


def make_teacher(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(WIDTH, CLASSES)
    for parameter in module.parameters():
        parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
    return module


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, CLASSES, (ROWS,), generator=generator)
    return TensorDataset(torch.randn(ROWS, WIDTH, generator=generator), labels)


def dump(out: Path, data: Any = None, teacher: nn.Module | None = None, **settings: Any) -> Any:
    kdcache.precompute(teacher or make_teacher(), data or make_data(), out, **{**SETTINGS, **settings})
    cache = kdcache.open(out)
    return cache, cache.gather(np.arange(len(cache)))


def assert_rows(rows: Any, logits: np.ndarray, labels: np.ndarray | None) -> None:
    expected = rows.encoding.encode(logits, labels).arrays
    assert set(rows.arrays) == set(expected)
    for array, values in expected.items():
        if array in ("tail_logsumexp", "tail_mean", "logit_std"):
            np.testing.assert_allclose(rows.arrays[array], values, rtol=1e-5, atol=1e-5, err_msg=array)
        else:
            np.testing.assert_array_equal(rows.arrays[array], values, err_msg=array)


@ENCODINGS
@NAMES
def test_a_dump_holds_what_numpy_makes_of_the_logits(tmp_path: Path, small: dict[str, Any], name: str) -> None:
    out = tmp_path / name
    cache, rows = dump(out, **small)
    data = make_data()
    batches = [slice(n, n + 8) for start in (0, 20, 40) for n in range(start, min(start + 20, ROWS), 8)]
    ends = [min(b.stop, -(-(b.start + 1) // 20) * 20, ROWS) for b in batches]  # none crosses a shard's border
    with torch.inference_mode():
        made = [make_teacher()(data.tensors[0][b.start : end]) for b, end in zip(batches, ends, strict=True)]
    assert_rows(rows, torch.cat(made).numpy(), data.tensors[1].numpy()[:, None])
    np.testing.assert_array_equal(rows.label, data.tensors[1].numpy())
    assert kdcache.verify(out).problems == ()
    with h5py.File(out if name.endswith(".h5") else sorted((out / "shards").glob("*.h5"))[0], "r") as file:
        for array, values in rows.arrays.items():  # plain h5py reads the arrays under the names of the format
            np.testing.assert_array_equal(file[array][:20], values[:20])
    again = kdcache.precompute(make_teacher(), make_data(), out, **SETTINGS, **small)
    assert (again.computed, again.root) == (0, cache.root)


def test_mixed_views_keep_the_logits_of_both_labels(tmp_path: Path) -> None:
    images = TensorDataset(torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    settings = {"augment": "mixup0.4", "views": 2, "seed": 1}
    cache, rows = dump(tmp_path / "top", images, teacher, top_k=2, **settings)
    _, exact = dump(tmp_path / "all", images, teacher, dtype="float32", **settings)
    assert cache.encoding.labels == 2
    assert (rows.label != rows.label_b).any()
    assert_rows(rows, exact.dense(), np.stack([rows.label, rows.label_b], axis=1))
    assert kdcache.verify(tmp_path / "top").problems == ()
    assert verify_teacher(tmp_path / "top", teacher, images).ok


@pytest.mark.parametrize("small", [{"dtype": "int8"}, {"dtype": "int4"}, {"top_k": 2, "temperatures": "1,z2"}])
def test_each_pixel_of_a_dense_prediction_is_encoded(tmp_path: Path, small: dict[str, Any]) -> None:
    pixels = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(pixels, torch.zeros(12, 3, 5, dtype=torch.int64))
    cache, rows = dump(tmp_path / "teacher", data, Maps(), **small)
    assert cache.encoding.row_shape == (4, 3, 5)
    assert rows.label is None
    assert_rows(rows, Maps()(pixels).numpy(), None)
    assert kdcache.verify(tmp_path / "teacher").problems == ()
    assert verify_teacher(tmp_path / "teacher", Maps(), data).ok


@ENCODINGS
def test_the_same_teacher_passes_and_another_does_not(tmp_path: Path, small: dict[str, Any]) -> None:
    dump(tmp_path / "teacher", **small)
    report = verify_teacher(tmp_path / "teacher", make_teacher(), make_data())
    assert report.ok
    assert report.median < 1e-3
    other = verify_teacher(tmp_path / "teacher", make_teacher(seed=1), make_data())
    assert not other.ok
    assert other.median > 0.1
    nearly = make_teacher()
    nearly.weight.data += 0.15 * torch.randn(nearly.weight.shape, generator=torch.Generator().manual_seed(2))
    assert not verify_teacher(tmp_path / "teacher", nearly, make_data()).ok


@ENCODINGS
@NAMES
def test_options_agree_with_the_plan_of_their_own_dump(tmp_path: Path, small: dict[str, Any], name: str) -> None:
    dump(tmp_path / name, **small)
    found = occupant(tmp_path / name)
    assert found is not None
    found.refuse_other(asked_plan(PrecomputeOptions(**SETTINGS, **small), found))


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ({"top_k": 3}, {"top_k": 4}, "encoding.k is 3 there and 4 in this command .--top-k"),
        ({"top_k": 3}, {"top_k": 3, "temperatures": "1,2"}, "encoding.temperatures .*--temperatures"),
        ({"top_k": 3}, {}, "encoding.name is 'topk' there and 'dense' .*--top-k"),
        ({}, {"top_k": 3}, "encoding.name is 'dense' there and 'topk' .*--top-k"),
        ({"dtype": "int8"}, {"dtype": "int4"}, "encoding.dtype is 'int8' .*--dtype"),
    ],
)
@NAMES
def test_another_encoding_on_the_same_path_is_refused_by_its_option(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], field: str, name: str
) -> None:
    dump(tmp_path / name, **first)
    with pytest.raises(MismatchError, match=field):
        dump(tmp_path / name, **second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 3, "dtype": "float32"}, "--dtype float32"),
        ({"top_k": 3, "dtype": "int8"}, "--dtype int8"),
        ({"temperatures": "1"}, "belongs to --top-k"),
        ({"top_k": 3, "temperatures": "0,1"}, "temperature"),
        ({"top_k": 3, "temperatures": "2,1"}, "ascend"),
        ({"top_k": 3, "temperatures": "nan"}, "temperature"),
        ({"dtype": "int2"}, "float16, float32, int8, int4"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dump(tmp_path / "teacher", **settings)
    assert not (tmp_path / "teacher").exists()


def test_a_label_that_is_no_class_is_refused_with_its_sample(tmp_path: Path) -> None:
    data = make_data()
    data.tensors[1][30] = CLASSES
    with pytest.raises(DataError, match="30"):
        dump(tmp_path / "teacher", data, top_k=3)


def test_a_single_logit_has_no_top_k(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two classes"):
        dump(tmp_path / "teacher", teacher=nn.Linear(WIDTH, 1), top_k=3)


def test_the_space_of_small_rows_is_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = (16 << 20) + 40_000  # 50 rows of 21 float16 take 17 kB with their identity; two shards' headers the rest
    monkeypatch.setattr(preflight, "free_bytes", lambda path: room)
    dump(tmp_path / "small", top_k=3)
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 16 << 20)
    with pytest.raises(StorageError, match="--dtype or --top-k"):
        dump(tmp_path / "none", top_k=3)


@pytest.mark.parametrize("small", [{"dtype": "int4"}, {"top_k": 3, "temperatures": "1,z2"}])
@pytest.mark.parametrize("labels", [None, "y"])
def test_foreign_logits_are_imported_into_small_rows(tmp_path: Path, small: dict[str, Any], labels: str | None) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (40, CLASSES)).astype(np.float32)
    y = np.arange(40) % CLASSES
    np.savez(tmp_path / "theirs.npz", logits=logits, y=y)
    out = tmp_path / "teacher"
    kdcache.import_cache(tmp_path / "theirs.npz", out=out, logits="logits", labels=labels, quiet=True, **small)
    with kdcache.open(out) as cache:
        assert_rows(cache.gather(np.arange(40)), logits, None if labels is None else y[:, None])
    assert kdcache.verify(out).problems == ()


@pytest.mark.parametrize("small", [{"dtype": "int4"}, {"top_k": 3}, {"top_k": 99}])
@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_an_export_decodes_what_it_can_and_copies_the_rest(tmp_path: Path, small: dict[str, Any], ending: str) -> None:
    cache, rows = dump(tmp_path / "teacher", **small)
    out = kdcache.export(tmp_path / "teacher", tmp_path / f"rows.{ending}")
    stored = dict(np.load(out)) if ending == "npz" else {n: d[...] for n, d in h5py.File(out, "r").items()}
    expected = {"logits": rows.dense()} if cache.encoding.has_all_logits else rows.arrays
    assert set(stored) == {*expected, "sample_id", "view", "label"}
    for name, values in expected.items():
        np.testing.assert_array_equal(stored[name], values)


def test_a_writer_resumes_top_k_rows_and_refuses_other_ones(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (40, CLASSES)).astype(np.float32)
    labels = np.arange(40) % CLASSES
    settings: dict[str, Any] = {"classes": CLASSES, "shard_rows": 10, "top_k": 4, "temperatures": (1, 4)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with kdcache.Writer(whole, **settings) as writer:
        writer.write(np.arange(40), logits, labels)
    writer = kdcache.Writer(parts, **settings)
    writer.write(np.arange(25), logits[:25], labels[:25])
    writer.abandon()
    with pytest.raises(MismatchError, match=r"encoding\.k .*--top-k"):
        kdcache.Writer(parts, resume=True, **{**settings, "top_k": 5})
    with kdcache.Writer(parts, resume=True, **settings) as writer:
        assert len(writer.done) == 20
        writer.write(np.arange(20, 40), logits[20:], labels[20:])
    assert kdcache.open(parts).root == kdcache.open(whole).root
