from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.binary import binary_kd


def test_rows_of_a_one_class_cache_are_taken_with_their_gaps() -> None:
    logits = np.array([[1.0], [-2.0], [0.5]], np.float32)
    rows = replace(TeacherRows.from_dense(logits), has_teacher=np.array([True, False, True]))
    student = torch.tensor([0.3, 0.1, -0.4])
    loss = binary_kd(student, rows, torch.tensor([-1, -1, -1]), alpha=0.5, temperature=1.0)
    expected = binary_kd(student[[0, 2]], torch.from_numpy(logits[[0, 2]]), None, alpha=1.0, temperature=1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_of_several_classes_are_refused() -> None:
    with pytest.raises(MismatchError, match="kd_loss"):
        binary_kd(torch.zeros(3, 2), torch.zeros(3), None, alpha=1.0, temperature=1.0)
    with pytest.raises(UsageError, match="floating point"):
        binary_kd(torch.zeros(3), torch.zeros(3, dtype=torch.int64), None, alpha=1.0, temperature=1.0)


def test_a_multi_label_teacher_is_compared_label_by_label() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(5, 3, generator=generator) for _ in range(2))
    labels = torch.tensor([[0, 1, 1], [1, -1, 0], [-1, -1, -1], [1, 1, 1], [0, 0, 0]])
    options = {"alpha": 0.4, "temperature": 2.0}
    each = binary_kd(student, teacher, labels, reduction="none", **options)
    assert each.shape == (5, 3)
    for label in range(3):
        one = binary_kd(student[:, label], teacher[:, label], labels[:, label], reduction="none", **options)
        assert torch.allclose(each[:, label], one, rtol=1e-5, atol=1e-6)
    loss = binary_kd(student, teacher, labels, **options)
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-6)  # every answer has a teacher


def test_rows_of_a_multi_label_cache_are_taken_with_their_gaps() -> None:
    logits = np.array([[1.0, -1.0], [-2.0, 3.0], [0.5, 0.5]], np.float32)
    rows = replace(TeacherRows.from_dense(logits), has_teacher=np.array([True, False, True]))
    student = torch.tensor([[0.3, 0.1], [0.2, 0.2], [-0.4, 1.0]], requires_grad=True)
    labels = torch.tensor([[1, 0], [1, -1], [-1, -1]])
    loss = binary_kd(student, rows, labels, alpha=0.5, temperature=3.0, sample_weight=torch.tensor([1.0, 2.0, 1.0]))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    p, q = torch.sigmoid(torch.from_numpy(logits) / 3), torch.sigmoid(student / 3)
    kl = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    # Row 0 has both, row 1 a label alone (and one of the two not), row 2 a teacher alone.
    expected = 0.5 * (bce(student[0], labels[0].float(), reduction="none") + kl[0]).sum()
    expected = expected + 2 * bce(student[1, 0], torch.tensor(1.0)) + kl[2].sum()
    assert loss.item() == pytest.approx(expected.item() / (2 + 2 + 2), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[1, 1] == 0


def test_smoothing_moves_both_answers_alike() -> None:
    student = torch.tensor([0.3, -2.0])
    loss = binary_kd(student, None, torch.tensor([1, 0]), alpha=0.0, temperature=1.0, label_smoothing=0.2)
    targets = torch.tensor([0.9, 0.1])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(student, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(scale: float) -> None:
    student = torch.tensor([scale, -scale], requires_grad=True)
    loss = binary_kd(student, torch.tensor([-scale, -scale]), torch.tensor([1, 0]), alpha=0.5, temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_student_of_other_labels_than_the_teacher_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"the student has 3 logit\(s\) a row, the teacher 2"):
        binary_kd(torch.zeros(4, 3), torch.zeros(4, 2), None, alpha=1.0, temperature=1.0)
    with pytest.raises(MismatchError, match=r"shape \(2, 3, 4\)"):
        binary_kd(torch.zeros(2, 3, 4), None, None, alpha=1.0, temperature=1.0)
