"""Rows of a calibrated teacher are the rows that a cache of calibrated logits would give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from topk_rows import rows_of

from kdcache.errors import MismatchError, UsageError
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.losses import kd_loss, standardized_kd_loss

LOGITS = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32) * 4
STUDENT = torch.randn(40, 9, generator=torch.Generator().manual_seed(1))
LABELS = np.random.default_rng(2).integers(0, 9, 40)


def test_rows_with_all_logits_are_divided_bit_for_bit() -> None:
    given = TeacherRows.from_dense(torch.from_numpy(LOGITS), label=LABELS)
    made = Calibration(1.7).rows(given)
    assert torch.equal(made.dense(), torch.from_numpy(LOGITS) / 1.7)
    assert made.dense().shape == (40, 9)
    assert torch.equal(given.dense(), torch.from_numpy(LOGITS))
    assert made.encoding.dtype == "float32"


def test_scale_and_bias_are_of_classes_and_leave_masked_ones_masked() -> None:
    logits = torch.tensor([[1.0, -math.inf, 3.0]])
    found = Calibration(2.0, scale=(1.0, -1.0, 2.0), bias=(0.5, 1.0, -1.0)).logits(logits)
    assert torch.equal(found, torch.tensor([[1.0, -math.inf, 2.0]]))
    maps = Calibration(2.0, bias=(1.0, 2.0, 3.0)).logits(torch.zeros(2, 3, 4, 5))
    assert torch.equal(maps[1, :, 2, 3], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("divisor", [0.4, 1.0, 2.0, 3.3])
def test_topk_rows_are_those_of_divided_logits(divisor: float) -> None:
    stored = (1.0, 2.0, 4.0, "z2")
    made = Calibration(divisor).rows(rows_of(LOGITS, k=3, temperatures=stored, labels=[LABELS]))
    divided = tuple(t / divisor if isinstance(t, float) else t for t in stored)
    wanted = rows_of(LOGITS / np.float32(divisor), k=3, temperatures=divided, labels=[LABELS])
    assert made.encoding == wanted.encoding
    for name, array in wanted.arrays.items():
        # The kept logits were rounded to float16 before they were divided, and there after.
        off = 2e-2 if name in ("topk_logits", "label_logits") else 2e-5
        torch.testing.assert_close(
            made.arrays[name].double(), array.double(), atol=off, rtol=1e-3 if off > 1e-3 else 1e-5
        )


def test_the_temperature_of_a_loss_on_topk_rows_is_that_of_the_divided_logits_and_its_factor_stays() -> None:
    rows = rows_of(LOGITS, k=8, temperatures=(1.0, 6.0), labels=[LABELS])
    found = kd_loss(STUDENT, Calibration(1.5).rows(rows), None, alpha=1.0, temperature=4.0)  # 4 * 1.5 is stored
    dense = kd_loss(STUDENT, torch.from_numpy(LOGITS) / 1.5, None, alpha=1.0, temperature=4.0)
    assert found.item() == pytest.approx(dense.item(), rel=2e-3)


def test_the_rules_of_tails_that_were_not_stored_apply_to_the_product() -> None:
    rows = rows_of(LOGITS * 0.3, k=1, temperatures=(1.0,))
    kd_loss(STUDENT, rows, None, alpha=1.0, temperature=1.0)
    with pytest.raises(UsageError, match="was not stored"):
        kd_loss(STUDENT, Calibration(1.6).rows(rows), None, alpha=1.0, temperature=1.0)


def test_standardised_logits_do_not_see_a_temperature() -> None:
    rows = rows_of(LOGITS, k=4, temperatures=("z2",))
    for given in (rows, TeacherRows.from_dense(torch.from_numpy(LOGITS))):
        before, after = (standardized_kd_loss(STUDENT, teacher) for teacher in (given, Calibration(3.0).rows(given)))
        assert after.item() == pytest.approx(before.item(), rel=1e-4)


def test_temperatures_that_leave_the_range_are_left_out_with_their_tails() -> None:
    rows = rows_of(LOGITS, k=3, temperatures=(0.02, 2.0))
    made = Calibration(4.0).rows(rows)
    assert isinstance(made.encoding, TopK)
    assert made.encoding.temperatures == (0.5,)
    assert made.arrays["tail_logsumexp"].shape == (40, 1)
    with pytest.raises(UsageError, match="outside"):
        Calibration(1e4).rows(rows)


def test_what_cannot_be_meant_is_refused() -> None:
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="temperature"):
            Calibration(temperature)
    with pytest.raises(UsageError, match="not finite"):
        Calibration(1.0, bias=(math.nan,))
    with pytest.raises(MismatchError, match="2 classes"):
        Calibration(1.0, bias=(0.0, 0.0)).rows(TeacherRows.from_dense(torch.from_numpy(LOGITS)))
    with pytest.raises(UsageError, match="--method temperature"):
        Calibration(1.0, bias=(0.0,) * 9).rows(rows_of(LOGITS, k=3))
