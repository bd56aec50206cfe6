"""The fused form on `topk` rows against cross-entropy and KL computed apart.

float32 differs by rounding alone: a few of 6e-8 in each sum, 1e-6 relative. float64 must agree to 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from topk_rows import rows_of

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.cross_entropy import cross_entropy
from kdcache.train.divergence_losses import kl_of
from kdcache.train.kd import kd_loss
from kdcache.train.sparse import topk_pair
from kdcache.train.sparse_fused import sparse_terms

TEMPERATURES = (0.5, 1.0, 2.0, 3.0, 4.0, 100.0)


def batch(rows: int = 16, classes: int = 300, k: int = 5) -> tuple[TeacherRows, torch.Tensor, torch.Tensor]:
    """`topk` rows, a float64 student, labels; labels inside and outside the top k."""
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((rows, classes)).astype("f4"), rng.integers(0, classes, rows)
    labels[:4] = logits[:4].argmax(1)
    student = torch.from_numpy(3 * rng.standard_normal((rows, classes)))
    return rows_of(logits, k=k, temperatures=TEMPERATURES, labels=[labels]), student, torch.from_numpy(labels)


def apart(
    student: torch.Tensor, rows: TeacherRows, labels: torch.Tensor, temperature: float, ce: Any, kl: Any
) -> torch.Tensor:
    pair = topk_pair(student, rows, temperature=temperature)
    soft = kl_of(pair, temperature=temperature, student_temperature=temperature)
    hard = cross_entropy(student, labels)
    ce, kl = torch.as_tensor(ce, dtype=student.dtype), torch.as_tensor(kl, dtype=student.dtype)
    return torch.where(ce != 0, hard, 0) * ce + torch.where(kl != 0, soft, 0) * kl


def both_ways(
    student: torch.Tensor, rows: TeacherRows, labels: torch.Tensor, temperature: float, ce: Any, kl: Any
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(terms, gradient of a sum with uneven weights) of the fused form and of the parts."""
    found = []
    for form in (False, True):
        v = student.clone().requires_grad_()
        if form:
            terms = apart(v, rows, labels, temperature, ce, kl)
        else:
            terms = sparse_terms(
                v, rows, labels, temperature=temperature, student_temperature=temperature, ce_weight=ce, kl_weight=kl
            )
        (gradient,) = torch.autograd.grad((terms * torch.arange(1, len(terms) + 1)).sum(), v)
        found.append((terms.detach(), gradient))
    return found[0], found[1]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("k", [5, 300])
def test_it_is_the_sum_of_its_parts(temperature: float, dtype: torch.dtype, tolerance: float, k: int) -> None:
    rows, student, labels = batch(k=k)
    ours, theirs = both_ways(student.to(dtype), rows, labels, temperature, 0.3, 0.7 * temperature**2)
    if dtype == torch.float32 and temperature == 100:
        tolerance = 1e-5  # p - q is a small difference there
    exact = apart(student, rows, labels, temperature, 0.3, 0.7 * temperature**2)
    assert (ours[0] - exact).abs().max() <= tolerance * exact.abs().max() * (4 if dtype == torch.float32 else 1)
    assert (ours[1] - theirs[1]).norm() <= 2 * tolerance * theirs[1].norm()


def test_each_row_has_its_own_weights_and_a_weight_of_0_hides_what_is_infinite() -> None:
    rows, student, labels = batch()
    student[0, labels[0]] = -math.inf  # CE and KL are infinite
    ce, kl = torch.rand(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    ce[0] = kl[0] = 0
    ce[1] = 0
    kl[2] = 0
    labels = labels.clone()
    labels[1] = -1
    ours, theirs = both_ways(student, rows, labels, 2.0, ce, kl)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    assert ours[0][0] == 0
    torch.testing.assert_close(ours[1][1:], theirs[1][1:], rtol=1e-10, atol=1e-14)
    assert not ours[1][0].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("tail", [-math.inf, -1e4, 1e4])
def test_extreme_tails(temperature: float, tail: float) -> None:
    rows = rows_of(np.array([[5, 4, 1, 0, -1]] * 3, "f4"), k=2, temperatures=TEMPERATURES, labels=[np.array([0, 1, 2])])
    student = torch.tensor([[3.0, 2, tail, tail, tail]] * 3)
    student[2, 2] = 0
    ours, theirs = both_ways(student, rows, torch.tensor([0, 1, 2]), temperature, 1.0, 1.0)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-6, atol=1e-7)
    assert torch.isfinite(ours[1]).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_gradients_are_exact_to_the_second_order(temperature: float) -> None:
    rows, student, labels = batch(3, 7, 2)

    def function(v: torch.Tensor) -> torch.Tensor:
        return sparse_terms(
            v, rows, labels[:3], temperature=temperature, student_temperature=temperature, ce_weight=0.4, kl_weight=1.5
        )

    v = student.requires_grad_()
    assert torch.autograd.gradcheck(function, (v,))
    assert torch.autograd.gradgradcheck(function, (v,))


def test_many_blocks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, student, labels = batch()
    for temperature in (2.0, 3.0, 4.0):
        whole, _ = both_ways(student, rows, labels, temperature, 0.5, 2.0)
        with monkeypatch.context() as patch:
            patch.setattr("kdcache.train.sparse_fused.BLOCK", 1000)
            cut, _ = both_ways(student, rows, labels, temperature, 0.5, 2.0)
        torch.testing.assert_close(cut[0], whole[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(cut[1], whole[1], rtol=1e-12, atol=1e-16)


def test_a_backward_pass_may_be_repeated() -> None:
    rows, student, labels = batch()
    v = student.requires_grad_()
    terms = sparse_terms(v, rows, labels, temperature=2.0, student_temperature=2.0, ce_weight=0.5, kl_weight=2.0)
    first = torch.autograd.grad(terms.sum(), v, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(terms.sum(), v)[0])


def test_what_does_not_fit_is_refused() -> None:
    rows, student, labels = batch()
    options: dict[str, Any] = {"student_temperature": 1.0, "ce_weight": 0.5, "kl_weight": 0.5}
    with pytest.raises(MismatchError, match="the student has 299 classes"):
        sparse_terms(student[:, 1:], rows, labels, temperature=1.0, **options)
    with pytest.raises(UsageError, match=r"temperature 0\.7 was not stored"):
        sparse_terms(student, rows, labels, temperature=0.7, tail_tolerance=0.0, **options)
    with pytest.raises(UsageError, match="hold 0 labels"):
        sparse_terms(student, replace(rows, label=None), labels, temperature=1.0, **options)


@pytest.mark.parametrize("labelled", [False, True])
def test_rows_without_a_teacher_have_the_cross_entropy_of_all_classes(labelled: bool) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 6)
    rows = rows_of(rng.normal(size=(6, 50)).astype(np.float32), k=10, labels=[labels] if labelled else [])
    blank = torch.tensor([False, True, False, False, True, False])
    arrays = {name: array.clone() for name, array in rows.arrays.items()}
    for array in arrays.values():
        array.view(torch.int16 if array.dtype == torch.uint16 else array.dtype)[blank] = 0
    rows = replace(rows, arrays=arrays, has_teacher=~blank, label=torch.from_numpy(labels) if labelled else None)
    student = torch.from_numpy(rng.normal(size=(6, 50))).float().requires_grad_()
    at = torch.from_numpy(labels)
    found = kd_loss(student, rows, at, alpha=0.5, temperature=2.0, reduction="none")
    expected = torch.nn.functional.cross_entropy(student, at, reduction="none")
    assert torch.allclose(found[blank], expected[blank], rtol=1e-6)
    (of_found,) = torch.autograd.grad(found[blank].sum(), student)
    (of_expected,) = torch.autograd.grad(expected[blank].sum(), student)
    assert torch.allclose(of_found, of_expected, atol=1e-6)
