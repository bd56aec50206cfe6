"""The same teacher passes; another teacher, other preprocessing and other data fail and are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kdcache.errors import MismatchError, UsageError
from kdcache.stages.precompute import precompute
from kdcache.stages.verify_rows import choose_rows
from kdcache.stages.verify_teacher import relative_differences, verify_teacher
from kdcache.store.cache import open as open_cache
from kdcache.store.writer import Writer

ROWS, WIDTH, CLASSES = 150, 20, 6


def make_teacher(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, classes))
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def make_data(seed: int = 0, *, scale: float = 1.0, shift: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    return TensorDataset(inputs * scale, (labels + shift) % CLASSES)


def dump(out: Path, **settings: Any) -> Path:
    settings = {"shard_rows": 40, "batch_size": 16, "device": "cpu", "quiet": True, **settings}
    precompute(make_teacher(), make_data(), out, **settings)
    return out


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return dump(tmp_path / "teacher")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_the_same_teacher_passes(tmp_path: Path, dtype: str, name: str, amp: str) -> None:
    out = dump(tmp_path / name, dtype=dtype, amp=amp)
    report = verify_teacher(out, make_teacher(), make_data())
    assert report.ok
    report.raise_on_error()
    assert (report.rows, report.labels_differ, report.inputs_differ) == (64, 0, 0)
    assert report.same_weights
    assert report.same_compute
    assert (report.median_tolerance, report.row_tolerance) == (3e-3, 3e-2)
    assert report.median < 1e-3
    assert report.to_json()["ok"]


@pytest.mark.parametrize(("dumped", "again"), [("none", "bf16"), ("bf16", "none")])
def test_another_precision_passes_with_its_own_tolerance(tmp_path: Path, dumped: str, again: str) -> None:
    report = verify_teacher(dump(tmp_path / "teacher", amp=dumped), make_teacher(), make_data(), amp=again)
    assert not report.same_compute
    assert (report.median_tolerance, report.row_tolerance) == (1.5e-2, 0.15)
    assert 1e-4 < report.median < 1.5e-2
    assert report.ok


def test_another_teacher_is_named_as_the_cause(cache: Path) -> None:
    report = verify_teacher(cache, make_teacher(seed=1), make_data())
    assert not report.ok
    assert (report.labels_differ, report.inputs_differ, report.same_weights) == (0, 0, False)
    with pytest.raises(MismatchError, match=r"median of 64 rows .* inputs and labels are the same.* another teacher"):
        report.raise_on_error()


def test_one_row_far_off_fails_though_the_median_does_not(cache: Path) -> None:
    stored = make_data()
    rows = open_cache(cache).gather(choose_rows(open_cache(cache), 64, 0)).sample_id

    class OneOff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_teacher()

        def forward(self, x: Tensor) -> Tensor:
            off = (x == stored.tensors[0][rows[5]]).all(1, keepdim=True)
            return torch.where(off, -self.inner(x), self.inner(x))

    report = verify_teacher(cache, OneOff(), make_data())
    assert report.median < 1e-3
    assert report.worst_sample == str(rows[5])
    assert not report.ok


def test_items_prepared_in_another_way_are_named_as_the_cause(cache: Path) -> None:
    report = verify_teacher(cache, make_teacher(), make_data(scale=1.1))
    assert (report.labels_differ, report.inputs_differ) == (0, 64)
    with pytest.raises(MismatchError, match=r"64 of 64 inputs differ, the labels do not: .* in another way"):
        report.raise_on_error()


def test_another_transform_of_the_teacher_is_named_as_the_cause(cache: Path) -> None:
    report = verify_teacher(cache, make_teacher(), make_data(), transform=lambda x: x * 1.1)
    assert (report.labels_differ, report.inputs_differ, report.same_weights) == (0, 0, True)
    with pytest.raises(MismatchError, match=r"the weights are too: another transform"):
        report.raise_on_error()


def test_other_data_under_the_same_ids_is_named_as_the_cause(cache: Path) -> None:
    report = verify_teacher(cache, make_teacher(), make_data(seed=1))
    with pytest.raises(MismatchError, match=r"64 inputs differ too: this is other data under the same sample ids"):
        report.raise_on_error()


def test_other_labels_fail_though_the_logits_agree(cache: Path) -> None:
    report = verify_teacher(cache, make_teacher(), make_data(shift=1))
    assert report.median < 1e-3
    with pytest.raises(MismatchError, match=r"64 of 64 labels .* the inputs are the same: .* labelled in another way"):
        report.raise_on_error()


def test_data_without_the_sampled_rows_is_a_mismatch(cache: Path) -> None:
    with pytest.raises(MismatchError, match=r"lacks 64 of the 64 samples .*another data set or split"):
        verify_teacher(cache, make_teacher(), make_data(), sample_ids=np.arange(ROWS) + 1000)
    with pytest.raises(MismatchError, match=r"are like 0, those of TensorDataset like 'a0'"):
        verify_teacher(cache, make_teacher(), make_data(), sample_ids=[f"a{n}" for n in range(ROWS)])


def test_a_data_set_in_another_order_is_joined_by_id(cache: Path) -> None:
    data = make_data()
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = TensorDataset(*(tensor[order] for tensor in data.tensors))
    assert verify_teacher(cache, make_teacher(), shuffled, sample_ids=order).ok


def test_another_number_of_classes_is_a_mismatch(cache: Path) -> None:
    with pytest.raises(MismatchError, match=r"returns \(5,\) values a sample, teacher holds \(6,\)"):
        verify_teacher(cache, make_teacher(classes=5), make_data())


def test_no_rows_is_a_usage_error(cache: Path) -> None:
    with pytest.raises(UsageError, match=r"--sample"):
        verify_teacher(cache, make_teacher(), make_data(), sample=0)


def test_a_cache_without_labels_and_provenance_can_be_checked(tmp_path: Path) -> None:
    data = make_data()
    with torch.inference_mode():
        logits = make_teacher()(data.tensors[0])
    with Writer(tmp_path / "own", classes=CLASSES) as writer:
        writer.write(np.arange(ROWS), logits)
    report = verify_teacher(tmp_path / "own", make_teacher(), data)
    assert (report.labels_differ, report.inputs_differ, report.same_weights) == (None, None, None)
    assert (report.ok, report.same_compute) == (True, False)
    assert "inputs cannot be compared" in str(verify_teacher(tmp_path / "own", make_teacher(3), data).problem)


class Unlabelled(Dataset[Tensor]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        return make_data().tensors[0][index]


def test_unlabelled_data_contradicts_no_label(cache: Path) -> None:
    assert verify_teacher(cache, make_teacher(), Unlabelled(), sample=5).ok


def test_the_output_key_of_the_dump_is_used(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_teacher()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"other": -self.inner(x), "scores": self.inner(x)}

    precompute(Two(), make_data(), tmp_path / "teacher", output_key="scores", device="cpu", quiet=True)
    assert verify_teacher(tmp_path / "teacher", Two(), make_data()).ok
    assert not verify_teacher(tmp_path / "teacher", Two(), make_data(), output_key="other").ok


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 149, 150, 1000])
def test_rows_are_distinct_in_order_and_hold_the_ends_of_shards(cache: Path, count: int) -> None:
    with open_cache(cache) as opened:
        rows = choose_rows(opened, count, 0)
        again = choose_rows(opened, count, 0)
    assert len(rows) == min(count, ROWS)
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert np.array_equal(rows, again)
    if count >= 16:
        assert set(rows) >= {0, 39, 40, 79, 80, 119, 120, 149}


def test_differences_are_those_of_plain_arithmetic() -> None:
    rng = np.random.default_rng(0)
    stored, again = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    for row, found in enumerate(relative_differences(again, stored)):
        a, b = again[row] - again[row].mean(), stored[row] - stored[row].mean()
        assert found == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    assert relative_differences(stored + 7, stored) == pytest.approx(0, abs=1e-12)


def test_masked_classes_are_left_out_and_must_agree() -> None:
    stored = np.array([[1.0, 2.0, -np.inf], [1.0, 2.0, -np.inf], [1.0, 1.0, 1.0]])
    again = np.array([[1.1, 2.0, -np.inf], [1.0, 2.0, 0.0], [1.0, 1.0, np.nan]])
    found = relative_differences(again, stored)
    assert found[0] == pytest.approx(0.1)
    assert found[1] == found[2] == np.inf


def test_a_single_logit_is_not_centred() -> None:
    assert relative_differences(np.array([[1.1]]), np.array([[1.0]])) == pytest.approx(0.1)
    assert relative_differences(np.array([[0.0]]), np.array([[0.0]])) == 0


def test_dense_prediction_is_compared_over_all_positions() -> None:
    stored = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    again = stored.copy()
    again[1, 0, 2, 2] += 1
    found = relative_differences(again, stored)
    assert found[0] == 0
    assert 0 < found[1] < 1
