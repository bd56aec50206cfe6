"""What becomes of rows that the teacher contradicts, or is not sure of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import rows_of
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.losses import kd_loss, loss_sums
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.policy_names import RowPolicies
from kdcache.train.row_policies import apply_policies, confidence_weights, disagreement_weights

ROWS, CLASSES = 40, 5
RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(ROWS, CLASSES)).astype(np.float32) * 2
LABELS = torch.from_numpy(RNG.integers(-1, CLASSES, ROWS))
STUDENT = torch.from_numpy(RNG.normal(size=(ROWS, CLASSES)).astype(np.float32))
P = torch.softmax(torch.from_numpy(LOGITS), dim=1)
OWN = P.gather(1, LABELS.clamp_min(0)[:, None])[:, 0]
DISAGREES = (LABELS >= 0) & (P.argmax(dim=1) != LABELS)


def teacher(missing: tuple[int, ...] = ()) -> TeacherRows:
    rows = TeacherRows.from_dense(torch.from_numpy(LOGITS))
    has = rows.has_teacher.clone()
    has[list(missing)] = False
    return replace(rows, has_teacher=has)


def loss(rows: Any, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    return kd_loss(STUDENT, rows, labels, alpha=0.7, temperature=2.0, sample_weight=weight)


def test_the_example_has_rows_of_every_kind() -> None:
    assert 5 < DISAGREES.sum() < ROWS - 10
    assert (LABELS < 0).sum() > 2


@pytest.mark.parametrize("policy", ["keep", "drop", "downweight", "trust-teacher"])
def test_the_rows_that_disagree_are_those_whose_top_class_is_not_the_label(policy: str) -> None:
    found = disagreement_weights(teacher(), LABELS, policy)
    assert torch.equal(found.chosen, DISAGREES)
    assert found.has_teacher is None


def test_a_threshold_spares_labels_that_the_teacher_finds_possible() -> None:
    found = disagreement_weights(teacher(), LABELS, "drop", 0.1)
    assert torch.equal(found.chosen, DISAGREES & (OWN < 0.1))
    assert 0 < found.chosen.sum() < DISAGREES.sum()
    assert torch.equal(disagreement_weights(teacher(), LABELS, "drop", 0.5).chosen, DISAGREES)


def test_rows_without_a_teacher_do_not_disagree() -> None:
    first = int(torch.nonzero(DISAGREES)[0])
    found = disagreement_weights(teacher((first,)), LABELS, "drop")
    assert not found.chosen[first]
    assert found.chosen.sum() == DISAGREES.sum() - 1


def test_keep_changes_nothing() -> None:
    found = disagreement_weights(teacher(), LABELS, "keep")
    assert (found.sample_weight, found.labels) == (None, None)


def test_a_dropped_row_is_as_good_as_absent() -> None:
    found = disagreement_weights(teacher(), LABELS, "drop")
    left = torch.nonzero(~DISAGREES)[:, 0]
    absent = kd_loss(STUDENT[left], teacher().take(left), LABELS[left], alpha=0.7, temperature=2.0)
    torch.testing.assert_close(loss(teacher(), LABELS, found.sample_weight), absent)


def test_a_downweighted_row_has_the_weight_of_its_label() -> None:
    found = disagreement_weights(teacher(), LABELS, "downweight")
    assert found.sample_weight is not None
    torch.testing.assert_close(found.sample_weight, torch.where(DISAGREES, OWN, 1.0))


def test_trusting_the_teacher_is_to_have_no_label() -> None:
    found = disagreement_weights(teacher(), LABELS, "trust-teacher")
    assert found.sample_weight is None
    assert found.labels is not None
    assert torch.equal(found.labels, torch.where(DISAGREES, -1, LABELS))
    terms = kd_loss(STUDENT, teacher(), found.labels, alpha=0.7, temperature=2.0, reduction="none")
    alone = kd_loss(STUDENT, teacher(), None, alpha=1.0, temperature=2.0, reduction="none")
    torch.testing.assert_close(terms[DISAGREES], alone[DISAGREES])


def test_an_unsure_row_is_one_whose_largest_probability_is_below() -> None:
    largest = P.amax(dim=1)
    assert 0 < (largest < 0.6).sum() < ROWS
    dropped = confidence_weights(teacher(), 0.6, "drop")
    assert torch.equal(dropped.chosen, largest < 0.6)
    assert dropped.sample_weight is not None
    assert torch.equal(dropped.sample_weight == 0, largest < 0.6)
    lighter = confidence_weights(teacher(), 0.6, "downweight").sample_weight
    assert lighter is not None
    torch.testing.assert_close(lighter, torch.where(largest < 0.6, largest, 1.0))


def test_trusting_the_label_is_to_have_no_teacher() -> None:
    found = confidence_weights(teacher((0,)), 0.6, "trust-label")
    assert found.has_teacher is not None
    assert not found.has_teacher[found.chosen].any()
    assert not found.chosen[0]
    assert not found.has_teacher[0]
    terms = kd_loss(
        STUDENT, replace(teacher(), has_teacher=found.has_teacher), LABELS, alpha=0.7, temperature=2.0, reduction="none"
    )
    hard = kd_loss(STUDENT, None, LABELS, alpha=0.0, temperature=1.0, reduction="none")
    torch.testing.assert_close(terms[~found.has_teacher], hard[~found.has_teacher])


def test_both_policies_multiply_and_an_unsure_teacher_contradicts_nothing() -> None:
    policies = RowPolicies("drop", confidence_below=0.6, confidence_policy="downweight")
    batch = apply_policies(policies, teacher(), LABELS)
    largest = P.amax(dim=1)
    unsure = largest < 0.6
    expected = torch.where(unsure, largest, torch.where(DISAGREES, 0.0, 1.0))
    assert batch.sample_weight is not None
    torch.testing.assert_close(batch.sample_weight, expected)
    assert (int(batch.disagree), int(batch.unconfident)) == (int((DISAGREES & ~unsure).sum()), int(unsure.sum()))


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_rows_give_the_same(k: int) -> None:
    labels = LABELS.numpy()
    rows = rows_of(LOGITS, k=k, labels=(labels,))
    for policy in ("drop", "downweight", "trust-teacher"):
        dense, sparse = (disagreement_weights(one, LABELS, policy, 0.4) for one in (teacher(), rows))
        assert torch.equal(sparse.chosen, dense.chosen)
        if dense.sample_weight is not None:
            assert sparse.sample_weight is not None
            torch.testing.assert_close(sparse.sample_weight, dense.sample_weight, atol=1e-3, rtol=0)  # float16 logits
    dense, sparse = (confidence_weights(one, 0.6, "downweight") for one in (teacher(), rows))
    assert torch.equal(sparse.chosen, dense.chosen)


def test_top_k_rows_without_the_label_s_logit_serve_where_it_is_not_needed() -> None:
    rows = replace(rows_of(LOGITS, k=1), label=None)
    assert torch.equal(disagreement_weights(rows, LABELS, "drop").chosen, DISAGREES)
    with pytest.raises(MismatchError, match="neither among the K classes"):
        disagreement_weights(rows, LABELS, "downweight")


def test_top_k_rows_that_tell_little_at_temperature_1_are_refused() -> None:
    rows = rows_of(LOGITS, k=1, temperatures=(8.0,), labels=(LABELS.numpy(),))
    with pytest.raises(UsageError, match="make them with 1 among --temperatures"):
        confidence_weights(rows, 0.6, "drop")


def test_dense_prediction_is_chosen_position_by_position() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)
    found = disagreement_weights(logits, labels, "downweight")
    assert torch.equal(found.chosen, logits.argmax(dim=1) != 0)
    assert found.sample_weight is not None
    assert found.sample_weight.shape == (2, 4, 5)
    with pytest.raises(UsageError, match="whole rows"):
        confidence_weights(logits, 0.9, "trust-label")


@given(
    cut=st.integers(1, ROWS - 1),
    policy=st.sampled_from(["drop", "downweight", "trust-teacher"]),
    threshold=st.floats(0.05, 1),
    below=st.none() | st.floats(0.3, 0.9),
)
@settings(max_examples=25, deadline=None)
def test_sums_over_pieces_add_up_to_the_loss_of_the_whole(
    cut: int, policy: str, threshold: float, below: float | None
) -> None:
    policies = RowPolicies(policy, threshold, below, "downweight")

    def sums(rows: slice) -> tuple[Tensor, Tensor]:
        batch = apply_policies(policies, teacher().take(rows), LABELS[rows])
        return loss_sums(
            STUDENT[rows].double(),
            batch.teacher,
            batch.labels,
            alpha=0.7,
            temperature=2.0,
            sample_weight=batch.sample_weight,
        )

    whole = sums(slice(None))
    pieces = [sums(slice(cut)), sums(slice(cut, None))]
    for place in (0, 1):
        torch.testing.assert_close(pieces[0][place] + pieces[1][place], whole[place])


def test_what_cannot_be_meant_is_refused() -> None:
    mixed = MixedLabels(LABELS, LABELS, torch.ones(ROWS))
    for call, message in (
        (lambda: disagreement_weights(teacher(), LABELS, "ignore"), "choose one of keep, drop"),
        (lambda: disagreement_weights(teacher(), LABELS, "drop", 0.0), "threshold is 0.0"),
        (lambda: disagreement_weights(teacher(), mixed, "drop"), "two labels"),
        (lambda: confidence_weights(teacher(), 0.5, "keep"), "choose one of drop"),
        (lambda: confidence_weights(teacher(), 1.5, "drop"), "confidence below is 1.5"),
        (lambda: RowPolicies("maybe"), "choose one of keep"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.parametrize("k", [3, CLASSES])
def test_calibrated_rows_are_asked_as_they_are_calibrated(k: int) -> None:
    rows = rows_of(LOGITS, k=k, temperatures=(1.0, 3.0), labels=(LABELS.numpy(),))
    softer = torch.softmax(torch.from_numpy(LOGITS) / 3, dim=1).amax(dim=1)
    found = confidence_weights(Calibration(temperature=3.0).rows(rows), 0.5, "drop")
    assert torch.equal(found.chosen, softer < 0.5)
    assert found.chosen.sum() > confidence_weights(rows, 0.5, "drop").chosen.sum()


def test_mixed_rows_are_fine_where_only_confidence_counts() -> None:
    mixed = MixedLabels(LABELS, LABELS, torch.ones(ROWS))
    batch = apply_policies(RowPolicies(confidence_below=0.6), teacher(), mixed)
    assert batch.labels is mixed
    assert int(batch.disagree) == 0
    assert int(batch.unconfident) > 0
