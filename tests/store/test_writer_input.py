"""What the Writer takes and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.errors import (
    DataError,
    LogitsError,
    UsageError,
)
from kdcache.store import cache as caches
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

CLASSES = 5


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), b"x", 10**30, float("inf")])
def test_provenance_that_json_does_not_have_is_refused_before_anything_is_made(tmp_path: Path, value: object) -> None:
    with pytest.raises(UsageError, match="plain nested values"):
        Writer(tmp_path / "teacher", classes=CLASSES, provenance={"note": value})
    with pytest.raises(UsageError, match="teacher, data"):
        Writer(tmp_path / "teacher", classes=CLASSES, provenance={"teacher": "resnet50"})
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("twice", [[3, 4, 3], [0, 1, 99]])
def test_duplicate_ids_are_refused_by_name(tmp_path: Path, table: Any, twice: list[int]) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES, shard_rows=40) as writer:
        writer.write([99, 98], table.logits[:2])
        with pytest.raises(DataError, match=r"the sample id (3|99) .*unique"):
            writer.write(twice, table.logits[:3])
        writer.write([97], table.logits[:1])  # what was refused left nothing behind
    assert caches.open(tmp_path / "teacher").sample_ids.tolist() == [99, 98, 97]


@pytest.mark.parametrize("label", [5, -2, 2**40])
def test_a_label_out_of_range_names_its_sample(tmp_path: Path, table: Any, label: int) -> None:
    with (
        pytest.raises(DataError, match=rf"sample 'b' has label {label}, expected 0 to 4"),
        Writer(tmp_path / "teacher", classes=CLASSES) as writer,
    ):
        writer.write(["a", "b"], table.logits[:2], [0, label])


@pytest.mark.parametrize("labels", [[0.5, 1.0], [[0], [1]], [0], ["a", "b"]])
def test_labels_of_another_kind_are_refused(tmp_path: Path, table: Any, labels: list[Any]) -> None:
    with pytest.raises(DataError, match="labels have"), Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([1, 2], table.logits[:2], labels)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_bad_logit_names_its_sample(tmp_path: Path, table: Any, value: float, dtype: Any) -> None:
    logits = table.logits.astype(dtype)
    logits[55, 2] = value
    with (
        pytest.raises(LogitsError, match="sample 55 hold NaN"),
        Writer(tmp_path / "teacher", classes=CLASSES, shard_rows=40) as writer,
    ):
        writer.write(table.ids, logits)


@pytest.mark.parametrize("logits", [np.zeros(5), np.zeros((2, 4)), np.zeros((2, 5), int), [["a"] * 5] * 2, None])
def test_logits_of_another_shape_or_kind_are_refused(tmp_path: Path, logits: Any) -> None:
    with pytest.raises(LogitsError), Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([1, 2], logits)


def test_a_width_that_changes_is_refused_and_what_was_there_stays(tmp_path: Path) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], np.zeros((1, 5, 2), np.float32))
        with pytest.raises(LogitsError, match=r"expected \(N, 5, 2\)"):
            writer.write([1], np.zeros((1, 5, 3), np.float32))
        writer.write([1], np.ones((1, 5, 2), np.float32))
    assert caches.open(tmp_path / "teacher").shape == (2, 5, 2)


@pytest.mark.parametrize(("first", "second"), [(None, [0]), ([0], None)])
def test_labels_come_from_the_first_batch_on_or_never(
    tmp_path: Path, table: Any, first: list[int] | None, second: list[int] | None
) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], table.logits[:1], first)
        if second is not None:
            with pytest.raises(DataError, match="from the first batch on"):
                writer.write([1], table.logits[:1], second)
        else:
            writer.write([1], table.logits[:1])
    cache = caches.open(tmp_path / "teacher")
    assert cache.has_labels == (first is not None)
    if cache.has_labels:
        assert cache.gather([0, 1]).label.tolist() == [0, -1]


def test_input_digests_come_for_every_row_or_for_none(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], table.logits[:1], input_digests=[2**64 - 1])
        for wrong in (None, [1, 2]):
            with pytest.raises(DataError, match=r"input[ _]digests"):
                writer.write([1], table.logits[:1], input_digests=wrong)
    assert caches.open(tmp_path / "teacher").gather([0]).input_digest.tolist() == [2**64 - 1]


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=["float", "double", "half", "bfloat16"]
)
def test_tensors_of_every_float_type_are_taken(tmp_path: Path, kind: torch.dtype) -> None:
    logits = (torch.arange(20.0).reshape(4, 5) / 4).to(kind).requires_grad_()
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write(torch.arange(4), logits, torch.tensor([0, 1, 2, -1]))
    rows = caches.open(tmp_path / "teacher").gather([0, 1, 2, 3])
    np.testing.assert_array_equal(rows.dense(), logits.detach().float().numpy())
    assert rows.label.tolist() == [0, 1, 2, -1]


def test_text_ids_get_room_for_longer_ones(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write(["cat/1.png"], table.logits[:1])
        writer.write(["dog/ö" + "x" * 26], table.logits[:1])  # 32 bytes
        with pytest.raises(DataError, match=r"longer than the 32 bytes .*id_bytes="):
            writer.write(["x" * 33], table.logits[:1])
    assert caches.open(tmp_path / "teacher").rows(["dog/ö" + "x" * 26, "cat/1.png"]).tolist() == [1, 0]


def test_id_bytes_sets_the_room_of_text_ids(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES, id_bytes=50) as writer:
        writer.write(["a"], table.logits[:1])
        writer.write(["x" * 50], table.logits[:1])
    assert caches.open(tmp_path / "teacher").sample_ids.dtype == np.dtype("S50")
    for wrong in (0, 1025):
        with pytest.raises(UsageError, match="id_bytes"):
            Writer(tmp_path / "another", classes=CLASSES, id_bytes=wrong)


def test_kinds_of_ids_do_not_mix(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([1], table.logits[:1])
        with pytest.raises(DataError, match="use one kind"):
            writer.write(["a"], table.logits[:1])


@pytest.mark.parametrize("classes", [0, -1, True, "abcde", None, 2.5])
def test_classes_are_a_count_or_names(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(UsageError):
        Writer(tmp_path / "teacher", classes=classes)


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_class_names_are_kept_in_order(make_cache: Any, name: str) -> None:
    path = make_cache(name, classes=["cat", "dög", "owl", "", "cat"])
    assert caches.open(path).classes == ("cat", "dög", "owl", "", "cat")


def test_a_numpy_count_is_a_count(make_cache: Any) -> None:
    assert caches.open(make_cache(classes=np.int64(5))).num_classes == 5


@pytest.mark.parametrize(
    "setting",
    [{"dtype": "int2"}, {"top_k": 0}, {"temperatures": (1,)}, {"top_k": 2, "temperatures": "12"}, {"shard_rows": 0}],
)
def test_unknown_settings_touch_nothing(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Writer(tmp_path / "teacher", classes=CLASSES, **setting)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_no_rows_are_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no rows"), Writer(tmp_path / name, classes=CLASSES) as writer:
        writer.write([], np.empty((0, CLASSES), np.float32))
    assert not any(tmp_path.iterdir())


def test_wide_classes_get_a_file_of_their_own(tmp_path: Path) -> None:
    names = [f"token number {n}" for n in range(5000)]
    with Writer(tmp_path / "teacher", classes=names) as writer:
        writer.write([0], np.zeros((1, 5000), np.float32))
    assert (tmp_path / "teacher" / "classes.json").exists()
    assert caches.open(tmp_path / "teacher").classes == tuple(names)
    assert verify(tmp_path / "teacher").ok


@pytest.mark.parametrize(
    "settings", [{"classes": ["\udcff", "b"]}, {"classes": 2, "provenance": {"name": "\udcff.npz"}}]
)
def test_names_that_are_no_text_are_refused_before_anything_is_written(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(UsageError, match=r"not Unicode text|no text"):
        Writer(tmp_path / "teacher", **settings)
    assert not (tmp_path / "teacher").exists()
