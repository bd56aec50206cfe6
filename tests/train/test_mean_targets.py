"""Losses against soft targets: equal to those of the logits that they come from, at their temperature, and no other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import losses
from kdcache.errors import MismatchError, UsageError
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.rows import TeacherRows
from kdcache.train.capability import Service, service
from kdcache.train.distributions import pair
from kdcache.train.losses import kd_loss

ROWS, CLASSES, T = 8, 6, 4.0
GENERATOR = torch.Generator().manual_seed(0)
TEACHER = torch.randn(ROWS, CLASSES, generator=GENERATOR) * 3
STUDENT = torch.randn(ROWS, CLASSES, generator=GENERATOR)
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=GENERATOR)


def kl_loss(student: Tensor, rows: TeacherRows | Tensor, **options: float) -> Tensor:
    return kd_loss(student, rows, None, alpha=1.0, **options)


def whole() -> TeacherRows:
    rows = TeacherRows.from_dense(TEACHER)
    arrays = {"log_probs": (TEACHER / T).log_softmax(dim=1)}
    return replace(rows, encoding=SoftTargets((CLASSES,), T, CLASSES), arrays=arrays)


def partial(k: int = 3) -> TeacherRows:
    log_p = (TEACHER / T).log_softmax(dim=1)
    top, classes = log_p.topk(k, dim=1)
    rest = log_p.scatter(1, classes, -math.inf).logsumexp(dim=1)
    arrays = {"log_probs": top, "kept_classes": classes, "log_rest": rest}
    return replace(TeacherRows.from_dense(TEACHER), encoding=SoftTargets((CLASSES,), T, k), arrays=arrays)


def gradient(rows: TeacherRows | Tensor, function: object, **options: object) -> tuple[Tensor, Tensor]:
    student = STUDENT.clone().requires_grad_()
    value = function(student, rows, **options)  # type: ignore[operator]
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


@pytest.mark.parametrize("name", ["reverse_kl_loss", "js_loss", "soft_ce_loss"])
def test_at_their_temperature_losses_are_those_of_the_logits(name: str) -> None:
    function = getattr(losses, name)
    for one, other in zip(
        gradient(whole(), function, temperature=T), gradient(TEACHER, function, temperature=T), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_whole_loss_is_that_of_the_logits() -> None:
    options = {"labels": LABELS, "alpha": 0.7, "temperature": T}
    for one, other in zip(gradient(whole(), kd_loss, **options), gradient(TEACHER, kd_loss, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_with_some_classes_both_sides_are_summed_up() -> None:
    rows = partial()
    both = pair(STUDENT, rows, temperature=T)
    assert both.is_bucketed
    q = (STUDENT / T).softmax(dim=1)
    own = q.gather(1, rows.arrays["kept_classes"])
    torch.testing.assert_close(both.log_q.exp(), torch.cat([own, 1 - own.sum(dim=1, keepdim=True)], dim=1))
    torch.testing.assert_close(both.log_p.exp().sum(dim=1), torch.ones(ROWS))
    _, found = gradient(rows, kl_loss, temperature=T)
    assert torch.isfinite(found).all()


def test_empty_slots_and_rows_without_a_common_class_teach_nothing_wrong() -> None:
    rows = partial()
    arrays = {name: array.clone() for name, array in rows.arrays.items()}
    arrays["log_probs"][0] = -math.inf
    arrays["kept_classes"][0] = 2
    arrays["log_rest"][0] = 0.0
    rows = replace(rows, arrays=arrays)
    both = pair(STUDENT, rows, temperature=T)
    assert both.log_q[0, -1].item() == pytest.approx(0, abs=1e-6)
    _, found = gradient(rows, kl_loss, temperature=T)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0], torch.zeros(CLASSES), atol=1e-7, rtol=0)


def test_another_temperature_and_what_needs_logits_are_refused() -> None:
    for rows in (whole(), partial()):
        with pytest.raises(
            UsageError, match=r"asked for at temperature 2.0, and these rows are soft targets at temperature 4"
        ):
            kl_loss(STUDENT, rows, temperature=2.0)
        for function in (losses.dist_loss, losses.standardized_kd_loss):
            with pytest.raises(UsageError, match="soft targets"):
                function(STUDENT, rows, temperature=T)
        with pytest.raises(UsageError, match="soft targets"):
            losses.dkd_loss(STUDENT, rows, LABELS, temperature=T)
    with pytest.raises(UsageError, match="soft targets"):
        losses.spread_kl_loss(STUDENT, partial(), temperature=T)
    assert kl_loss(STUDENT, whole(), temperature=T, student_temperature=2.0).isfinite()


def test_students_of_another_width_are_refused() -> None:
    for rows in (whole(), partial()):
        with pytest.raises(MismatchError, match="classes"):
            kl_loss(STUDENT[:, :5], rows, temperature=T)


def test_the_table_says_what_they_serve() -> None:
    encoding = whole().encoding
    assert service("kl", encoding) is service("kl", encoding, 4) is Service.EXACT
    assert service("kl", encoding, 2.0) is service("kl", encoding, "z2") is Service.NO
    assert service("kl", partial().encoding) is Service.BUCKETED
    assert service("top1", encoding) is Service.EXACT
    assert service("top1", partial().encoding) is Service.NO
    for name in ("nll", "entropy", "mse", "dkd", "dist", "standardized_kd", "feature_mse"):
        assert service(name, encoding, T) is Service.NO


def test_float16_rows_stay_close() -> None:
    rows = whole()
    stored = SoftTargets((CLASSES,), T, CLASSES, "float16")
    arrays = stored.from_log_probs({name: array.numpy() for name, array in rows.arrays.items()})
    half = replace(rows, encoding=stored, arrays={name: torch.from_numpy(array) for name, array in arrays.items()})
    one, other = (kl_loss(STUDENT, one, temperature=T) for one in (half, rows))
    np.testing.assert_allclose(float(one), float(other), rtol=2e-3)
