"""Statistics of teacher rows against NumPy in float64, the calibration metrics, and scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import rows_of

from kdcache.errors import DataError
from kdcache.format.encodings import EncodingChoice
from kdcache.store.rows import TeacherRows
from kdcache.train.calibration_metrics import CalibrationMetrics
from kdcache.train.teacher_figures import TEMPERATURES
from kdcache.train.teacher_statistics import TeacherStatistics, histogram

ROWS, CLASSES = 500, 12
LOGITS = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float32) * 3
LABELS = np.where(np.random.default_rng(1).random(ROWS) < 0.6, LOGITS.argmax(1), np.arange(ROWS) % CLASSES)
FLOAT32 = 1e-6  # exp(z / 8) to the eighth power


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def rows(logits: np.ndarray = LOGITS, labels: np.ndarray | None = LABELS, dtype: str = "float32") -> TeacherRows:
    encoding = EncodingChoice(dtype).of(logits.shape[1:])
    arrays = encoding.encode(logits).arrays
    count = len(logits)
    return TeacherRows(encoding, arrays, np.arange(count), np.zeros(count, "<u2"), labels, np.ones(count, bool))


def measured(given: TeacherRows, step: int = 128) -> tuple[dict, dict]:
    statistics = TeacherStatistics(given.num_classes)
    for start in range(0, len(given), step):
        statistics.add(given.take(slice(start, start + step)))
    return statistics.result()


def test_figures_against_labels_are_those_of_the_calibration_metrics() -> None:
    metrics = CalibrationMetrics()
    metrics.add(rows())
    expected, (found, missing) = metrics.result(), measured(rows())
    for name in ("top1", "top5", "nll", "brier", "confidence"):
        assert found[name] == pytest.approx(getattr(expected, name), abs=FLOAT32)
    assert found["ece"]["equal_width"] == pytest.approx(expected.ece, abs=FLOAT32)
    assert found["ece"]["equal_mass"] == pytest.approx(expected.ece_equal_mass, abs=FLOAT32)
    assert [one["rows"] for one in found["reliability"]] == list(expected.equal_width.counts)
    assert missing == {}


def test_softness_is_that_of_its_definition_at_each_temperature() -> None:
    found, _ = measured(rows())
    for one, temperature in zip(found["softness"], TEMPERATURES, strict=True):
        p = probabilities(LOGITS, temperature)
        assert one["temperature"] == temperature
        assert one["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=FLOAT32)
        assert one["outside_label"] == pytest.approx(1 - p[np.arange(ROWS), LABELS].mean(), abs=FLOAT32)
        assert one["outside_top"] == pytest.approx(1 - p.max(1).mean(), abs=FLOAT32)


def test_classes_confusions_and_priors_are_counted() -> None:
    found, _ = measured(rows())
    top = LOGITS.argmax(1)
    for one in found["classes"]:
        of_class = one["class"] == LABELS
        assert one["rows"] == of_class.sum()
        assert one["accuracy"] == pytest.approx((top == LABELS)[of_class].mean())
        assert one["predicted"] == pytest.approx((top == one["class"]).mean())
    first = found["confusions"][0]
    assert first["label"] != first["teacher_class"]
    assert first["rows"] == ((first["label"] == LABELS) & (top == first["teacher_class"])).sum()
    assert [one["rows"] for one in found["confusions"]] == sorted(
        (o["rows"] for o in found["confusions"]), reverse=True
    )
    prior = np.bincount(LABELS) / ROWS
    assert (found["majority_share"], found["prior_nll"]) == pytest.approx((prior.max(), -(prior * np.log(prior)).sum()))


def test_classes_in_another_order_are_seen_and_a_constant_teacher_is_none() -> None:
    exact = np.eye(CLASSES, dtype=np.float32)[LABELS] * 5
    found, _ = measured(rows(exact[:, np.roll(np.arange(CLASSES), 1)]))
    assert found["top1"] == 0
    assert found["usual_class_share"] == 1
    constant, _ = measured(rows(np.tile(exact[:1], (ROWS, 1))))
    assert constant["usual_class_share"] == pytest.approx(constant["majority_share"])
    few, _ = measured(rows(exact[:20], LABELS[:20]))
    assert few["usual_class_share"] is None


@pytest.mark.parametrize(("dtype", "off"), [("float16", 1e-3), ("int8", 5e-3), ("int4", 5e-2)])
def test_every_encoding_with_all_logits_serves(dtype: str, off: float) -> None:
    (found, missing), (exact, _) = measured(rows(dtype=dtype)), measured(rows())
    for name in ("top1", "nll", "brier", "confidence"):
        assert found[name] == pytest.approx(exact[name], abs=off)
    for mine, theirs in zip(found["softness"], exact["softness"], strict=True):
        assert mine == pytest.approx(theirs, abs=off)
    assert missing == {}


def test_topk_rows_tell_what_a_kept_class_and_the_tail_tell_and_say_why_not_the_rest() -> None:
    given = rows_of(LOGITS, k=6, temperatures=(1.0, 2.0, 4.0, 8.0), labels=[LABELS])
    (found, missing), (exact, _) = measured(given), measured(rows())
    for name in ("top1", "top5", "nll", "confidence"):
        assert found[name] == pytest.approx(exact[name], abs=2e-3)
    for mine, theirs in zip(found["softness"], exact["softness"], strict=True):
        assert mine["outside_label"] == pytest.approx(theirs["outside_label"], abs=2e-3)
        assert mine["outside_top"] == pytest.approx(theirs["outside_top"], abs=2e-3)
        assert mine["entropy"] is None
    assert found["brier"] is found["entropy_histogram"] is None
    assert set(missing) == {"brier", "softness.entropy", "entropy_histogram"}


def test_topk_rows_without_labels_logits_or_with_few_temperatures_say_so() -> None:
    found, missing = measured(rows_of(LOGITS, k=3, temperatures=(4.0,), labels=[LABELS]))
    assert found["ece"] is found["reliability"] is found["confidence"] is found["nll"] is found["top5"] is None
    assert found["top1"] == pytest.approx((LOGITS.argmax(1) == LABELS).mean())
    assert "T = 1 was not stored" in missing["ece"]
    assert found["softness"][2]["outside_top"] is not None
    bare = rows_of(LOGITS, k=3)
    bare = TeacherRows(
        bare.encoding, bare.arrays, bare.sample_id, bare.view, torch.from_numpy(LABELS), bare.has_teacher
    )
    found, missing = measured(bare)
    assert found["nll"] is found["softness"][0]["outside_label"] is None
    assert "without labels" in missing["nll"]
    assert found["ece"] is not None


def test_rows_without_labels_leave_out_what_needs_them() -> None:
    found, missing = measured(rows(labels=None))
    names = {"top1", "top5", "nll", "brier", "ece", "reliability", "classes", "confusions"}
    assert all(found[name] is None for name in names)
    assert names <= set(missing)
    assert found["softness"][0]["entropy"] == pytest.approx(measured(rows())[0]["softness"][0]["entropy"])
    assert sum(found["confidence_histogram"]["counts"]) == ROWS


def test_masked_classes_take_no_part_and_a_masked_label_is_infinitely_unlikely() -> None:
    logits = LOGITS.copy()
    logits[:, 3] = -math.inf
    labels = np.where(LABELS == 3, -1, LABELS)
    found, _ = measured(rows(logits, labels))
    p = np.delete(probabilities(logits), 3, axis=1)
    assert found["softness"][0]["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=FLOAT32)
    assert found["labelled"] == (labels >= 0).sum()
    assert math.isfinite(found["nll"])
    assert measured(rows(logits[:9], np.full(9, 3)))[0]["nll"] == math.inf


def test_the_divergence_of_views_is_the_kl_of_their_softmax() -> None:
    other = LOGITS + np.random.default_rng(3).normal(size=LOGITS.shape).astype(np.float32)
    p, q = probabilities(LOGITS), probabilities(other)
    for dtype, off in (("float32", FLOAT32), ("float16", 2e-3)):
        statistics = TeacherStatistics(CLASSES)
        statistics.add(rows(dtype=dtype))
        assert statistics.kl_mean is None
        statistics.add(rows(other, dtype=dtype), against=rows(dtype=dtype))
        assert statistics.kl_mean == pytest.approx((p * np.log(p / q)).sum(1).mean(), abs=off)


@settings(max_examples=30)
@given(
    st.integers(2, 9),
    st.integers(1, 40),
    st.integers(1, 17),
    st.integers(0, 2**31),
    st.sampled_from(["float16", "float32", "int8"]),
)
def test_no_cut_into_blocks_changes_anything(classes: int, count: int, step: int, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 4, (count, classes)).astype(np.float32)  # many ties
    given_rows = rows(logits, rng.integers(-1, classes, count), dtype)
    whole, pieces = measured(given_rows, count), measured(given_rows, step)
    assert whole[1] == pieces[1]
    for name, value in whole[0].items():
        if isinstance(value, float):
            assert pieces[0][name] == pytest.approx(value, abs=1e-9)
        elif name in ("classes", "confusions", "rows", "labelled", "confidence_histogram"):
            assert pieces[0][name] == value


def test_the_input_rows_stay_as_they_are() -> None:
    for dtype in ("float32", "float16"):
        given_rows = rows(dtype=dtype)
        before = {name: array.copy() for name, array in given_rows.arrays.items()}
        measured(given_rows, ROWS)
        for name, array in given_rows.arrays.items():
            np.testing.assert_array_equal(array, before[name])


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(DataError, match="last class is 11"):
        measured(rows(labels=np.full(ROWS, 12)))


def test_a_histogram_holds_every_value_once() -> None:
    found = histogram(np.array([-1.0, 0.0, 0.49, 0.5, 2.0]), 0.0, 1.0, 2)
    assert found == {"edges": [0.0, 0.5, 1.0], "counts": [3, 2]}


@pytest.mark.interop("sklearn")
def test_accuracies_and_brier_scores_are_those_of_scikit_learn() -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    p, (found, _) = probabilities(LOGITS), measured(rows())
    assert found["top1"] == pytest.approx(theirs.accuracy_score(LABELS, p.argmax(1)), abs=1e-6)
    top5 = theirs.top_k_accuracy_score(LABELS, p, k=5, labels=range(CLASSES))
    assert found["top5"] == pytest.approx(top5, abs=1e-6)
    assert found["nll"] == pytest.approx(theirs.log_loss(LABELS, p, labels=range(CLASSES)), abs=1e-6)
    single = [theirs.brier_score_loss(c == LABELS, p[:, c]) for c in range(CLASSES)]
    assert found["brier"] == pytest.approx(sum(single), abs=1e-6)
    matrix = theirs.confusion_matrix(LABELS, p.argmax(1))
    assert all(matrix[one["label"], one["teacher_class"]] == one["rows"] for one in found["confusions"])
    recall = theirs.recall_score(LABELS, p.argmax(1), average=None)
    np.testing.assert_allclose([one["accuracy"] for one in found["classes"]], recall, atol=1e-6)


@pytest.mark.interop("scipy")
def test_entropies_and_divergences_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    found, _ = measured(rows())
    for one in found["softness"]:
        p = probabilities(LOGITS, one["temperature"])
        assert one["entropy"] == pytest.approx(stats.entropy(p, axis=1).mean(), abs=1e-6)
    statistics = TeacherStatistics(CLASSES)
    statistics.add(rows(LOGITS[::-1].copy()), against=rows())
    expected = stats.entropy(probabilities(LOGITS), probabilities(LOGITS[::-1]), axis=1).mean()
    assert statistics.kl_mean == pytest.approx(expected, abs=1e-6)


@pytest.mark.interop("torchmetrics")
def test_the_calibration_errors_are_those_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    found, _ = measured(rows())
    p, labels = torch.from_numpy(probabilities(LOGITS)), torch.from_numpy(LABELS)
    theirs = functional.multiclass_calibration_error(p, labels, CLASSES, n_bins=15, norm="l1")
    assert found["ece"]["equal_width"] == pytest.approx(float(theirs), abs=1e-6)
    top5 = functional.multiclass_accuracy(p, labels, CLASSES, average="micro", top_k=5)
    assert found["top5"] == pytest.approx(float(top5), abs=1e-6)
