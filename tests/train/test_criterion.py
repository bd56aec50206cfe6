from __future__ import annotations

import copy

import pytest
import torch

from kdcache.errors import UsageError
from kdcache.train.binary import binary_kd
from kdcache.train.criterion import DistillationLoss
from kdcache.train.losses import kd_loss, loss_sums

STUDENT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, -1, 0])


def test_the_criterion_is_the_function_with_its_settings_kept() -> None:
    weight = torch.arange(6.0)
    settings = {"alpha": 0.7, "temperature": 3.0, "student_temperature": 2.0, "label_smoothing": 0.1}
    criterion = DistillationLoss(**settings)
    assert criterion(STUDENT, TEACHER, LABELS, weight) == kd_loss(
        STUDENT, TEACHER, LABELS, sample_weight=weight, **settings
    )
    sums = criterion.sums(STUDENT, TEACHER, LABELS, weight)
    assert sums == loss_sums(STUDENT, TEACHER, LABELS, sample_weight=weight, **settings)
    assert [value.shape for value in sums] == [(), ()]


def test_the_criterion_prints_its_formula_with_numbers() -> None:
    assert repr(DistillationLoss(alpha=0.9, temperature=4)) == (
        "DistillationLoss(0.1*CE + 0.9*16*KL(teacher || student) at temperature 4)"
    )
    mixed = DistillationLoss(alpha=0.5, temperature=4, student_temperature=2, label_smoothing=0.1)
    assert mixed.formula == (
        "0.5*CE (label smoothing 0.1) + 0.5*4*KL(teacher || student) at temperature 4, the student's 2"
    )


def test_bad_numbers_are_refused_when_the_criterion_is_made() -> None:
    with pytest.raises(UsageError, match="alpha is 2"):
        DistillationLoss(alpha=2)
    with pytest.raises(UsageError, match="temperature is 0"):
        DistillationLoss(temperature=0)


def test_labels_alone_need_no_teacher_and_the_teacher_alone_no_labels() -> None:
    assert DistillationLoss(alpha=0.0)(STUDENT, None, LABELS).isfinite()
    assert DistillationLoss(alpha=1.0)(STUDENT, TEACHER).isfinite()


def test_the_criterion_holds_no_parameters_and_can_be_copied() -> None:
    criterion = copy.deepcopy(DistillationLoss())
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_the_binary_loss_is_the_two_class_loss_of_a_logit_beside_zero() -> None:
    student, teacher, labels = STUDENT[:, 0], TEACHER[:, 0], torch.tensor([0, 1, 1, 0, -1, 1])
    loss = binary_kd(student[:, None], teacher, labels, alpha=0.4, temperature=2.0)
    p, q = torch.sigmoid(teacher.double() / 2), torch.sigmoid(student.double() / 2)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(student, labels.clamp(min=0).float(), reduction="none")
    alpha = torch.where(labels >= 0, 0.4, 1.0)
    expected = ((1 - alpha) * bce + alpha * 4 * kl).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # float32 against float64
