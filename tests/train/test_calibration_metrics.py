"""NLL, Brier score and calibration errors of teacher rows against NumPy, scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from topk_rows import rows_of

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.format.encodings import EncodingChoice
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.calibration_metrics import CalibrationMetrics, CalibrationReport, equal_mass_bins, equal_width_bins

ROWS, CLASSES = 600, 12
FLOAT32 = 1e-7  # the mean over rows of roundings of 6e-8, which have no common sign
LOGITS = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float32) * 3
LABELS = np.where(
    np.random.default_rng(1).random(ROWS) < 0.6,
    LOGITS.argmax(1),
    np.random.default_rng(2).integers(0, CLASSES, ROWS),
)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def measured(
    rows: TeacherRows, calibration: Calibration | float = 1.0, *, labels: np.ndarray | None = LABELS, step: int = 128
) -> CalibrationReport:
    metrics = CalibrationMetrics(calibration)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        metrics.add(rows.take(part), None if labels is None else torch.from_numpy(labels[part]))
    return metrics.result()


def dense(logits: np.ndarray = LOGITS) -> TeacherRows:
    return TeacherRows.from_dense(torch.from_numpy(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_nll_brier_and_accuracies_are_those_of_their_definitions(temperature: float) -> None:
    p, found = probabilities(LOGITS, temperature), measured(dense(), temperature)
    own = p[np.arange(ROWS), LABELS]
    order = np.argsort(-p, axis=1, kind="stable")
    assert found.rows == ROWS
    assert found.nll == pytest.approx(-np.log(own).mean(), abs=FLOAT32)
    assert found.brier == pytest.approx(((p - np.eye(CLASSES)[LABELS]) ** 2).sum(1).mean(), abs=FLOAT32)
    assert found.top1 == pytest.approx((order[:, 0] == LABELS).mean())
    assert found.top5 == pytest.approx((order[:, :5] == LABELS[:, None]).any(1).mean())
    assert found.missing == found.errors == {}


def test_a_calibration_error_is_the_sum_over_its_bins() -> None:
    p, found = probabilities(LOGITS), measured(dense())
    sure, right = p.max(1), p.argmax(1) == LABELS
    for error, places in (
        (found.ece, np.floor(sure * 15).clip(max=14)),
        (found.ece_equal_mass, np.argsort(np.argsort(sure)) * 15 // ROWS),  # 600 rows: 40 a bin
    ):
        expected = sum(
            (places == b).mean() * abs(right[places == b].mean() - sure[places == b].mean())
            for b in range(15)
            if (places == b).any()
        )
        assert error == pytest.approx(expected, abs=FLOAT32)


def test_a_confidence_of_exactly_1_belongs_to_the_last_bin_and_a_border_to_the_bin_above() -> None:
    bins = equal_width_bins(np.array([1.0, 0.5, 0.0, 0.95]), np.array([True, False, False, True]), 2)
    assert bins.counts == (1, 3)
    assert bins.error == pytest.approx(0.75 * abs(2 / 3 - 2.45 / 3))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=60), st.randoms(use_true_random=False)
)
def test_bins_hold_every_row_once_whatever_the_order_and_equal_confidences_share_one(pairs, random) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    for function in (equal_width_bins, equal_mass_bins):
        one, other = (
            function(np.array([a / 6 for a, _ in part]), np.array([b for _, b in part]), 4)
            for part in (pairs, shuffled)
        )
        assert sum(one.counts) == len(pairs)
        assert one.counts == other.counts
        assert one.error == pytest.approx(other.error, abs=1e-12)
        assert 0 <= one.error <= 1
        whole = sum(count * share for count, share in zip(one.counts, one.accuracy, strict=True))
        assert whole == pytest.approx(sum(b for _, b in pairs))
    counts = np.bincount([a for a, _ in pairs])
    assert all(
        n == 0 or n >= counts[counts > 0].min()
        for n in equal_mass_bins(np.array([a / 6 for a, _ in pairs]), np.array([b for _, b in pairs]), 4).counts
    )


def test_no_cut_of_the_rows_into_blocks_changes_anything() -> None:
    whole, pieces = measured(dense(), step=ROWS), measured(dense(), step=7)
    assert pieces.nll == pytest.approx(whole.nll, abs=1e-12)
    assert pieces.brier == pytest.approx(whole.brier, abs=1e-12)
    assert (pieces.ece, pieces.ece_equal_mass) == pytest.approx((whole.ece, whole.ece_equal_mass), abs=1e-12)


@pytest.mark.parametrize(("dtype", "off"), [("float32", 0.0), ("float16", 1e-3), ("int8", 5e-3), ("int4", 5e-2)])
def test_every_encoding_with_all_logits_serves(dtype: str, off: float) -> None:
    encoding = EncodingChoice(dtype).of((CLASSES,))
    arrays = encoding.encode(LOGITS).arrays
    rows = TeacherRows(encoding, arrays, np.arange(ROWS), np.zeros(ROWS, np.uint16), LABELS, np.ones(ROWS, bool))
    found, exact = measured(rows, 2.0, labels=None), measured(dense(), 2.0)
    assert found.nll == pytest.approx(exact.nll, abs=off + 1e-12)
    assert found.brier == pytest.approx(exact.brier, abs=off + 1e-12)
    assert found.top1 == exact.top1


def test_topk_rows_tell_all_but_brier_at_a_stored_temperature() -> None:
    rows = rows_of(LOGITS, k=5, temperatures=(1.0, 2.0), labels=[LABELS])
    found, exact = measured(rows, 2.0), measured(dense(), 2.0)
    # The kept logits are float16.
    assert found.nll == pytest.approx(exact.nll, abs=2e-3)
    assert found.ece_equal_mass == pytest.approx(exact.ece_equal_mass, abs=2e-3)
    assert (found.top1, found.top5) == (exact.top1, exact.top5)
    assert found.brier is None
    assert list(found.missing) == ["brier"]
    assert found.errors == {}


def test_topk_rows_say_what_they_do_not_know_and_why() -> None:
    without = measured(rows_of(LOGITS, k=3, temperatures=(1.0,)))
    assert without.nll is without.top5 is without.brier is None
    assert without.ece == pytest.approx(measured(dense()).ece, abs=5e-3)
    assert "without labels" in without.missing["nll"]
    rows = rows_of(LOGITS, k=3, temperatures=(1.0,), labels=[LABELS])
    far = measured(rows, 1.6)
    assert far.nll is None
    assert "not stored" in far.missing["nll"]


@pytest.mark.parametrize("temperature", [0.9, 1.2, 3.0, 6.0, 50.0])
def test_between_stored_temperatures_topk_rows_are_within_the_error_that_they_state(temperature: float) -> None:
    found = measured(rows_of(LOGITS, k=6, temperatures=(1.0, 4.0), labels=[LABELS]), temperature)
    exact = measured(dense(), temperature)
    for name, value, true in (("nll", found.nll, exact.nll), ("confidence", found.confidence, exact.confidence)):
        if value is None:
            assert "not stored" in found.missing["ece" if name == "confidence" else name]
        else:
            assert 0 < found.errors[name] <= 0.01
            assert value == pytest.approx(true, abs=found.errors[name] + 1e-3)


def test_rows_without_a_label_without_a_teacher_or_of_mixed_samples_do_not_count() -> None:
    labels = np.array([0, -1, 1, 1, 1])
    rows = TeacherRows(
        dense().encoding,
        {"logits": LOGITS[:5]},
        np.arange(5),
        np.zeros(5, np.uint16),
        labels,
        np.array([True, True, False, True, True]),
        label_b=np.array([-1, -1, -1, 2, 1]),
        mix_ratio=np.array([1, 1, 1, 0.4, 0.4], np.float32),
    )
    found = measured(rows, labels=None)
    assert found.rows == 2
    p = probabilities(LOGITS[[0, 4]])
    assert found.nll == pytest.approx(-np.log(p[[0, 1], [0, 1]]).mean())


def test_masked_classes_have_probability_0_and_a_masked_label_an_infinite_nll() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, -math.inf, 1.0]])
    metrics = CalibrationMetrics(Calibration(2.0, bias=(0.0, 5.0, 0.0)))
    metrics.add(TeacherRows.from_dense(logits), torch.tensor([0, 2]))
    assert metrics.result().nll == pytest.approx((math.log(2) + math.log(1 + math.exp(-0.5))) / 2)
    metrics.add(TeacherRows.from_dense(logits[:1]), torch.tensor([1]))
    assert metrics.result().nll == math.inf
    assert metrics.result().brier is not None


def test_dense_prediction_counts_positions() -> None:
    maps = torch.from_numpy(LOGITS.reshape(100, 6, CLASSES)).movedim(2, 1)
    found = CalibrationMetrics()
    found.add(TeacherRows.from_dense(maps), torch.from_numpy(LABELS.reshape(100, 6)))
    assert found.result().nll == pytest.approx(measured(dense()).nll, abs=FLOAT32)
    assert found.result().rows == ROWS


def test_what_cannot_be_measured_is_refused() -> None:
    metrics = CalibrationMetrics()
    with pytest.raises(DataError, match="no row has a label"):
        metrics.result()
    with pytest.raises(UsageError, match="no labels"):
        metrics.add(dense())
    with pytest.raises(MismatchError, match="shape"):
        metrics.add(dense(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="last class is 11"):
        metrics.add(dense(), torch.full((ROWS,), 12))
    with pytest.raises(DataError, match="one class"):
        metrics.add(TeacherRows.from_dense(torch.zeros(2, 1)), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UsageError, match="bins"):
        CalibrationMetrics(bins=0)


@pytest.mark.interop("sklearn")
def test_the_numbers_are_those_of_scikit_learn() -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    p, found = probabilities(LOGITS, 2.0), measured(dense(), 2.0)
    assert found.nll == pytest.approx(theirs.log_loss(LABELS, p, labels=range(CLASSES)), abs=1e-6)
    assert found.top1 == pytest.approx(theirs.accuracy_score(LABELS, p.argmax(1)), abs=1e-6)
    top5 = theirs.top_k_accuracy_score(LABELS, p, k=5, labels=range(CLASSES))
    assert found.top5 == pytest.approx(top5, abs=1e-6)
    # Of many classes scikit-learn before 1.7 has no Brier score: theirs is the mean of those of one class against all.
    single = [theirs.brier_score_loss(c == LABELS, p[:, c]) for c in range(CLASSES)]
    assert found.brier == pytest.approx(sum(single), abs=1e-6)
    sure, right = p.max(1), p.argmax(1) == LABELS
    for strategy, bins in (("uniform", found.equal_width), ("quantile", found.equal_mass)):
        assert bins is not None
        accuracy, confidence = calibration.calibration_curve(right, sure, n_bins=15, strategy=strategy)
        full = [b for b in range(15) if bins.counts[b]]
        np.testing.assert_allclose([bins.accuracy[b] for b in full], accuracy, atol=1e-6)
        np.testing.assert_allclose([bins.confidence[b] for b in full], confidence, atol=1e-6)


@pytest.mark.interop("torchmetrics")
@pytest.mark.parametrize("bins", [10, 15])
def test_the_calibration_error_is_that_of_torchmetrics(bins: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    metrics = CalibrationMetrics(2.0, bins=bins)
    metrics.add(dense(), torch.from_numpy(LABELS))
    p = torch.from_numpy(probabilities(LOGITS, 2.0))
    theirs = functional.multiclass_calibration_error(p, torch.from_numpy(LABELS), CLASSES, n_bins=bins, norm="l1")
    assert metrics.result().ece == pytest.approx(float(theirs), abs=1e-6)
    accuracy = functional.multiclass_accuracy(p, torch.from_numpy(LABELS), CLASSES, average="micro", top_k=5)
    assert metrics.result().top5 == pytest.approx(float(accuracy), abs=1e-6)
