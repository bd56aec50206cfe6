"""A teacher's rows in the student's classes: what a teacher of those classes would have given."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import rows_of
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.class_map import ClassMap
from kdcache.train.losses import LossSettings, kd_loss, loss_terms, parse_loss, soft_target_kl
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.sparse_metrics import label_log_prob
from kdcache.train.teaching import OneTeacher

LOGITS = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * 4
STUDENT = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
LABELS = np.random.default_rng(2).integers(-1, 8, 50)


def dense(logits: np.ndarray = LOGITS) -> TeacherRows:
    return TeacherRows.from_dense(torch.from_numpy(logits))


@st.composite
def maps(draw: st.DrawFn) -> ClassMap:
    student = draw(st.integers(2, 6))
    targets = draw(st.lists(st.integers(-1, student - 1), min_size=2, max_size=9))
    if len({*targets} - {-1}) < 2:
        targets += [0, 1]
    return ClassMap(tuple(targets), student)


@settings(max_examples=60, deadline=None)
@given(maps(), st.integers(0, 2**31))
def test_probabilities_are_the_sums_over_the_members_renormalised_over_the_classes_that_are_left(
    classes: ClassMap, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(6, len(classes.targets))).astype(np.float32) * 5
    made = classes.logits(torch.from_numpy(logits))
    assert made.shape == (6, classes.num_classes)
    exact = np.exp(logits.astype("f8") - logits.max(axis=1, keepdims=True))
    wanted = np.zeros((6, classes.num_classes))
    for number, target in enumerate(classes.targets):
        if target >= 0:
            wanted[:, target] += exact[:, number]
    wanted /= wanted.sum(axis=1, keepdims=True)
    found = torch.softmax(made.double(), dim=1).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-9)
    assert (made[:, list(classes.novel)] == -math.inf).all()


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(8)))
def test_a_permutation_and_its_inverse_give_back_every_bit_of_every_encoding(order: list[int]) -> None:
    there, back = ClassMap(tuple(order), 8), ClassMap(tuple(np.argsort(order).tolist()), 8)
    assert torch.equal(there.logits(torch.from_numpy(LOGITS))[:, order], torch.from_numpy(LOGITS))
    for given_rows in (dense(), rows_of(LOGITS, k=3, temperatures=(1.0, 4.0, "z2"), labels=[LABELS])):
        again = back.rows(there.rows(given_rows))
        assert again.encoding == given_rows.encoding
        for name, array in given_rows.arrays.items():
            assert torch.equal(again.arrays[name].to(array.dtype), array), name
        assert given_rows.label is None or torch.equal(again.label, given_rows.label)


def test_merging_comes_before_softening_which_would_change_most_of_the_argmaxes() -> None:
    """100 classes in 20 groups of 1 to 14: softened first, a group counts by how many members it has."""
    random = np.random.default_rng(5)
    logits = torch.from_numpy(random.normal(size=(2000, 100)).astype("f4") * 2)
    sizes = [1] * 10 + [2] * 5 + [10, 14, 16, 20, 20]
    groups = np.repeat(np.arange(20), sizes)
    classes = ClassMap(tuple(groups.tolist()), 20)
    merged = classes.logits(logits)
    softened_first = torch.zeros(2000, 20).index_add_(1, torch.from_numpy(groups), torch.softmax(logits / 4, dim=1))
    assert torch.equal(torch.softmax(merged / 4, dim=1).argmax(dim=1), torch.softmax(merged, dim=1).argmax(dim=1))
    assert (softened_first.argmax(dim=1) != merged.argmax(dim=1)).float().mean() > 0.5


def test_calibration_comes_first() -> None:
    classes, calibration = ClassMap((0, 0, 1, 1, 2, 2, -1, -1), 3), Calibration(2.5)
    found = OneTeacher(calibration, classes).rows(dense(), None, step=0)
    assert torch.equal(found.dense(), classes.logits(torch.from_numpy(LOGITS) / 2.5))
    assert not torch.allclose(found.dense(), classes.logits(torch.from_numpy(LOGITS)) / 2.5, atol=1e-2)


KEEPS = ClassMap((5, 9, 0, 3, 1, 7, 2, 4), 10)  # in another order, with 6 and 8 novel


@pytest.mark.parametrize("loss", ["kl", "js", "reverse_kl", "soft_ce", "dkd:beta=0", "spread_kl"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_topk_rows_in_another_order_give_the_loss_of_the_rows_themselves(loss: str, temperature: float) -> None:
    rows = rows_of(LOGITS, k=4, labels=[LABELS])
    labels = torch.from_numpy(LABELS)
    wide = torch.randn(50, 10, generator=torch.Generator().manual_seed(3))
    chosen = LossSettings(0.8, temperature, losses=(parse_loss(loss),))
    mapped = KEEPS.rows(rows, KEEPS.labels(labels))
    found, _ = loss_terms(wide, mapped, KEEPS.labels(labels), chosen, teacher_classes=KEEPS.known)
    # What the restricted student is to the teacher, in the teacher's own order.
    own = wide[:, list(KEEPS.targets)]
    soft, _ = loss_terms(own, rows, labels, replace(chosen, alpha=1.0))
    hard, _ = loss_terms(wide, None, KEEPS.labels(labels), replace(chosen, alpha=0.0))
    has_label = labels >= 0
    if loss.startswith("dkd"):
        wanted = torch.where(has_label, 0.2 * hard + 0.8 * soft, 0.0)
    else:
        wanted = torch.where(has_label, 0.2 * hard + 0.8 * soft, soft)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _top_two_always_kept() -> np.ndarray:
    """Classes 1 and 6 are far above all others, in turns."""
    logits = LOGITS.copy()
    logits[:, [1, 6]] += 25
    return logits


def test_topk_rows_that_keep_all_members_are_those_of_a_merged_teacher() -> None:
    logits = _top_two_always_kept()
    labels = np.random.default_rng(4).integers(-1, 8, 50)
    classes = ClassMap((0, 1, 2, 3, 4, 5, 1, 6), 7)  # 1 and 6 are one
    made = classes.rows(rows_of(logits, k=4, labels=[labels]))
    merged = classes.logits(torch.from_numpy(logits)).numpy()
    wanted = rows_of(merged, k=3, labels=[classes.labels(labels)])
    assert isinstance(made.encoding, TopK)
    assert made.encoding == wanted.encoding
    assert torch.equal(made.arrays["topk_classes"], wanted.arrays["topk_classes"].long())
    assert torch.equal(made.label, wanted.label)
    for name in ("topk_logits", "tail_logsumexp", "row_max", "tail_mean"):
        off = 3e-2 if name == "topk_logits" else 2e-2  # kept logits are rounded to float16 before they are merged
        torch.testing.assert_close(made.arrays[name].float(), wanted.arrays[name].float(), atol=off, rtol=1e-3)
    assert made.arrays["logit_std"].isnan().all()
    student = STUDENT[:, :7]
    for temperature in (1.0, 2.0, 4.0):
        found = kd_loss(student, made, None, alpha=1.0, temperature=temperature)
        assert found.item() == pytest.approx(
            kd_loss(student, wanted, None, alpha=1.0, temperature=temperature).item(), rel=2e-3
        )
    known = torch.from_numpy(classes.labels(labels))
    both = (label_log_prob(rows, 1.0, labels=known).value[known >= 0] for rows in (made, wanted))
    torch.testing.assert_close(*both, atol=5e-2, rtol=2e-3)


def test_a_dropped_class_that_is_kept_leaves_the_softmax_of_the_others() -> None:
    logits = _top_two_always_kept()
    classes = ClassMap((0, -1, 1, 2, 3, 4, 5, 6), 7)
    rows = rows_of(logits, k=5, labels=[np.full(50, 1)])
    rows = replace(rows, has_teacher=torch.arange(50) > 2, arrays={**rows.arrays})
    for array in rows.arrays.values():
        array[:3] = 0  # what a cache gives for samples that it does not hold
    made = classes.rows(rows)
    assert (made.label == -1).all()
    for temperature in (1.0, 4.0):
        found = kd_loss(STUDENT[3:, :7], made.take(slice(3, 50)), None, alpha=1.0, temperature=temperature)
        wanted = kd_loss(
            STUDENT[3:, :7], classes.logits(torch.from_numpy(logits[3:])), None, alpha=1.0, temperature=temperature
        )
        assert found.item() == pytest.approx(wanted.item(), rel=2e-2)
    alone = kd_loss(STUDENT[:, :7], made, torch.zeros(50).long(), alpha=0.5, temperature=2.0, reduction="none")
    assert alone.isfinite().all()


def test_topk_rows_with_a_merged_or_dropped_class_in_the_tail_are_refused() -> None:
    rows = rows_of(LOGITS, k=4, labels=[LABELS])
    for classes in (ClassMap((0, 0, 1, 2, 3, 4, 5, 6), 7), ClassMap((-1, 0, 1, 2, 3, 4, 5, 6), 7)):
        top = rows.arrays["topk_classes"].long()
        lacks = ~torch.stack([(top == one).any(dim=1) for one in classes.single]).all(dim=0)
        assert (classes.lacks(rows) == lacks.numpy()).all()
        with pytest.raises(MismatchError, match="in its tail"):
            classes.rows(rows)
        assert not classes.lacks(dense()).any()


def test_rows_with_all_logits_in_topk_are_merged_like_dense_ones() -> None:
    classes = ClassMap((0, 1, 0, 1, 0, 1, 0, 1), 2)
    made = classes.rows(rows_of(LOGITS, k=8))
    torch.testing.assert_close(
        torch.softmax(made.dense(), 1), torch.softmax(classes.logits(torch.from_numpy(LOGITS)), 1), atol=2e-3, rtol=0
    )


def test_the_restricted_term_is_the_kl_over_the_known_classes_and_gives_novel_ones_no_gradient() -> None:
    classes = ClassMap((4, 0, 3), 5)  # 1 and 2 are novel
    labels = torch.tensor([4, 1, -1, 0, 2, 3])
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 3
    student = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    rows = classes.rows(TeacherRows.from_dense(teacher), labels)
    assert rows.has_teacher.tolist() == [True, False, True, True, False, True]
    found = kd_loss(student, rows, labels, alpha=0.7, temperature=3.0, reduction="none", teacher_classes=classes.known)
    p = torch.softmax(teacher / 3, dim=1)
    q = torch.log_softmax(student[:, [4, 0, 3]] / 3, dim=1)
    kl = 9 * (p * (p.log() - q)).sum(dim=1)
    ce = torch.nn.functional.cross_entropy(student, labels, ignore_index=-1, reduction="none")
    wanted = torch.where(rows.has_teacher, 0.3 * ce + 0.7 * kl, ce)
    wanted = torch.where(labels < 0, kl, wanted)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found[2], student)
    assert (gradient[2, [1, 2]] == 0).all()


def test_the_bucket_has_no_teacher_mass_and_pushes_novel_classes_down() -> None:
    classes = ClassMap((4, 0, 3), 5)
    teacher = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 3
    student = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 3, 4, 4] * 16)
    rows = classes.rows(TeacherRows.from_dense(teacher), labels)
    p = torch.softmax(teacher / 2, dim=1)
    kl = (p * (p.log() - torch.log_softmax(student / 2, dim=1)[:, [4, 0, 3]])).sum(dim=1)
    torch.testing.assert_close(soft_target_kl(student, rows.dense(), temperature=2.0), kl)
    found = kd_loss(student, rows, labels, alpha=0.7, temperature=2.0)
    ce = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(found, 0.3 * ce + 0.7 * 4 * kl.mean())
    (gradient,) = torch.autograd.grad(kl.sum(), student)
    assert (gradient[:, [1, 2]] > 0).all()


def test_labels_of_mixed_rows_are_mapped_and_either_novel_one_takes_the_teacher_away() -> None:
    classes = ClassMap((2, 0, -1), 4)
    rows = TeacherRows.from_dense(torch.zeros(4, 3), label=torch.tensor([0, 1, 2, -1]))
    rows = replace(rows, label_b=torch.tensor([2, 1, 0, 7]), mix_ratio=torch.full((4,), 0.5))
    labels = MixedLabels(torch.tensor([2, 0, 1, 0]), torch.tensor([2, 3, 0, -1]), torch.full((4,), 0.5))
    made = classes.rows(rows, labels)
    assert made.label.tolist() == [2, 0, -1, -1]
    assert made.label_b.tolist() == [-1, 0, 2, -1]
    assert made.has_teacher.tolist() == [True, False, False, True]
    assert classes.labels(np.array([0, 2, -1])).tolist() == [2, -1, -1]


def test_dense_prediction_is_mapped_position_by_position_but_has_no_novel_classes() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    made = ClassMap((1, 0, 1), 2).rows(TeacherRows.from_dense(logits))
    assert made.dense().shape == (2, 2, 4, 5)
    torch.testing.assert_close(made.dense()[1, 1, 2, 3], logits[1, [0, 2], 2, 3].logsumexp(dim=0))
    with pytest.raises(UsageError, match="single positions"):
        ClassMap((1, 0, 2), 4).rows(TeacherRows.from_dense(logits), torch.zeros(2, 4, 5).long())


def test_a_row_that_masks_all_that_is_left_loses_its_teacher() -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 1.0, 2.0]])
    made = ClassMap((-1, 0, 1), 2).rows(TeacherRows.from_dense(logits))
    assert made.has_teacher.tolist() == [False, True]
    student = torch.zeros(2, 2, requires_grad=True)
    kd_loss(student, made, torch.tensor([0, 1]), alpha=0.5, temperature=2.0).backward()
    assert isinstance(student.grad, Tensor)
    assert student.grad.isfinite().all()


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="class 3, expected 0 to 2"):
        ClassMap((0, 1, 3), 3)
    with pytest.raises(UsageError, match="share 1 class"):
        ClassMap((0, 0, -1), 3)
    with pytest.raises(MismatchError, match="of a teacher of 3 classes, these rows have 8"):
        ClassMap((0, 1, 2), 3).rows(dense())
    with pytest.raises(UsageError, match="name 'a'"):
        ClassMap.of_names(["a", "b"], ["a", "b", "a"])
    with pytest.raises(MismatchError, match="'lamp'"):
        ClassMap.of_names(["a", "lamp"], ["a", "b"])
    for classes in ((1,), (2, 1), (0, 9)):
        with pytest.raises(UsageError, match="ascending order"):
            kd_loss(STUDENT, dense(), None, alpha=1.0, temperature=1.0, teacher_classes=classes)
