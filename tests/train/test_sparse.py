"""`topk` rows as a pair of distributions, against the dense rows summed up class by class.

The oracle decodes nothing: it takes all logits, puts the stored float16 values where classes are kept, computes in
float64, and adds the probabilities of the others up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import as_stored, is_kept, rows_of

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.kept import kept
from kdcache.train.log_pair import Pair
from kdcache.train.sparse import plain_log_probs, standardised, student_log_probs, topk_pair


def kl(pair: Pair) -> torch.Tensor:
    """(N, ...) sum of p (log p - log q)."""
    p = pair.log_p.exp()
    return torch.where(p > 0, p * (pair.log_p - pair.log_q), 0.0).sum(dim=1)


def bucketed_kl(student: torch.Tensor, logits: np.ndarray, rows: TeacherRows, temperature: Any) -> torch.Tensor:
    """The bucketed KL of the dense row, (N, ...)."""
    mask = torch.from_numpy(is_kept(rows))
    log_p = (as_stored(logits, rows) / temperature).log_softmax(dim=1)
    log_q = (student / temperature).log_softmax(dim=1)
    p = log_p.exp()
    own = torch.where(mask & (p > 0), p * (log_p - log_q), 0.0).sum(dim=1)
    tail_p, tail_q = (x.masked_fill(mask, -math.inf).logsumexp(dim=1) for x in (log_p, log_q.detach()))
    has_tail = torch.isfinite(tail_p)
    # logsumexp of nothing has no gradient: a row without a tail gets one class that does not count.
    safe = torch.where(has_tail.unsqueeze(1), log_q.masked_fill(mask, -math.inf), 0.0)
    tail_q = safe.logsumexp(dim=1)
    return own + torch.where(has_tail, tail_p.exp() * (torch.where(has_tail, tail_p, 0.0) - tail_q), 0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, TeacherRows, torch.Tensor]:
    """Logits of 4 rows of 2 to 30 classes (ties, masked ones), their `topk` rows, and a float64 student."""
    classes = draw(st.integers(2, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = draw(st.sampled_from([(), (), (2, 3)]))
    logits = (rng.standard_normal((4, classes, *positions)) * draw(st.sampled_from([0.0, 1, 5, 100]))).astype("f4")
    if draw(st.booleans()):
        logits = np.round(logits)
    logits[rng.random(logits.shape) < draw(st.sampled_from([0, 0.3]))] = -math.inf
    logits[:, rng.integers(classes)] = 1.0
    k = draw(st.sampled_from([1, min(3, classes), classes]))
    labels = [] if positions else [rng.integers(-1, classes, 4) for _ in range(draw(st.integers(0, 2)))]
    student = torch.from_numpy(rng.standard_normal(logits.shape) * draw(st.sampled_from([1, 10, 300])))
    return logits, rows_of(logits, k=k, temperatures=(0.5, 2.0, 100.0), labels=labels), student


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.5, 2.0, 100.0]))
def test_value_and_gradient_are_those_of_the_dense_row_summed_up(
    case: tuple[np.ndarray, TeacherRows, torch.Tensor], temperature: float
) -> None:
    logits, rows, student = case
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    pair = topk_pair(ours, rows, temperature=temperature)
    found, expected = kl(pair), bucketed_kl(theirs, logits, rows, temperature)
    # The stored tail is float32: 6e-8 of its exponents (up to 1000 here) is 1e-5 of a probability at the worst.
    rounding = 3e-7 * (1 + as_stored(logits, rows).nan_to_num(neginf=0).abs().amax() / temperature)
    scale = 1 + expected.detach().abs() + (student.abs().amax() / temperature)
    assert (found - expected).detach().abs().le((1e-6 + rounding) * scale).all()
    found.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=float(rounding) / temperature)
    torch.testing.assert_close(pair.log_p.exp().sum(dim=1), torch.ones_like(found), rtol=1e-12, atol=0)
    torch.testing.assert_close(pair.log_q.detach().exp().sum(dim=1), torch.ones_like(found), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 10])
def test_ordinary_rows_agree_to_1e6_relative(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((64, 1000)).astype("f4"), rng.integers(0, 1000, 64)
    rows = rows_of(logits, k=k, labels=[labels])
    student = torch.from_numpy(3 * rng.standard_normal((64, 1000)))
    for temperature in (1.0, 2.0, 4.0):
        ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        found = kl(topk_pair(ours, rows, temperature=temperature))
        expected = bucketed_kl(theirs, logits, rows, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(found.sum(), ours)
        (wanted,) = torch.autograd.grad(expected.sum(), theirs)
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("labels", [0, 1])
def test_with_all_classes_kept_it_is_the_dense_kl(labels: int) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((8, 20)).astype("f4")
    rows = rows_of(logits, k=20, labels=[rng.integers(-1, 20, 8)] * labels)
    student = torch.from_numpy(rng.standard_normal((8, 20))).requires_grad_()
    dense = (rows.dense().double() / 3).log_softmax(1)
    for temperature in (3.0,):  # not stored: the tail is empty, so nothing is open
        pair = topk_pair(student, rows, temperature=temperature)
        expected = (dense.exp() * (dense - (student / temperature).log_softmax(1))).sum(1)
        torch.testing.assert_close(kl(pair), expected, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(kl(pair).sum(), student)
        (wanted,) = torch.autograd.grad(expected.sum(), student)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
        assert torch.isneginf(pair.log_p[:, -1]).all()
        assert torch.isneginf(pair.log_q[:, -1]).all()
        assert pair.bound is not None
        assert not pair.bound.any()


def test_the_bucketed_kl_is_a_lower_bound_of_the_dense_one() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((64, 200)).astype("f4")
    rows, student = rows_of(logits, k=5), torch.from_numpy(rng.standard_normal((64, 200)))
    log_p, log_q = as_stored(logits, rows).log_softmax(1), student.log_softmax(1)
    dense = (log_p.exp() * (log_p - log_q)).sum(1)
    found = kl(topk_pair(student, rows, temperature=1.0))
    assert (found < dense).all()
    assert (found > 0).all()


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 3)])
def test_gradients_are_exact_to_the_second_order(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(shape).astype("f4")
    labels = [np.array([2, -1, 5])] if len(shape) == 2 else []
    slots = kept(rows_of(logits, k=3, labels=labels), dtype=torch.float64)
    is_used = torch.tensor(True) if slots.is_empty is None else ~torch.cat([slots.is_empty, slots.is_empty[:, :1]], 1)
    student = torch.from_numpy(rng.standard_normal(shape)).requires_grad_()

    def function(v: torch.Tensor) -> torch.Tensor:
        return student_log_probs(v, slots, 2.0).masked_fill(~is_used, 0)

    assert torch.autograd.gradcheck(function, (student,))
    assert torch.autograd.gradgradcheck(function, (student,))


@pytest.mark.parametrize("tail", ["far below", "masked", "far above"])
def test_extreme_students_lose_no_digits(tail: str) -> None:
    rows = rows_of(np.array([[5, 4, 1, 0, -1]], "f4"), k=2, temperatures=(1.0,))
    far = {"far below": -1e4, "masked": -math.inf, "far above": 1e4}[tail]
    student = torch.tensor([[3.0, 2, far, far + 1, far]], requires_grad=True)
    pair = topk_pair(student, rows, temperature=1.0)
    expected = student.detach().double().log_softmax(1)
    bucket = expected[:, 2:].logsumexp(1, keepdim=True)
    wanted = torch.cat([expected[:, :2], bucket], 1).float()
    torch.testing.assert_close(pair.log_q.detach(), wanted, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(pair.log_q[:, :2].sum(), student)
    assert torch.isfinite(gradient).all()
    if tail == "far below":
        (gradient,) = torch.autograd.grad(topk_pair(student, rows, temperature=1.0).log_q[:, 2].sum(), student)
        softmax = torch.tensor([0.0, 0, 1, math.e, 1]) / (2 + math.e)
        own = torch.tensor([[3.0, 2]]).softmax(1)[0]
        torch.testing.assert_close(gradient[0], softmax - torch.cat([own, torch.zeros(3)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_students_are_computed_in_float32(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(3 * rng.standard_normal((4, 50)).astype("f4"), k=5)
    student = torch.from_numpy(rng.standard_normal((4, 50))).to(dtype).requires_grad_()
    pair = topk_pair(student, rows, temperature=2.0)
    assert pair.log_q.dtype == torch.float32
    torch.testing.assert_close(pair.log_q, topk_pair(student.float(), rows, temperature=2.0).log_q)
    kl(pair).sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype


def test_a_slot_that_holds_nothing_weighs_nothing_in_any_divergence() -> None:
    logits = np.array([[3, 2, 1, 0]] * 4, "f4")
    rows = rows_of(logits, k=2, labels=[np.array([0, 2, 2, -1]), np.array([3, 2, 3, -1])])
    slots = kept(rows)
    assert slots.is_empty is not None
    assert slots.is_empty[:, 2:].tolist() == [[True, False], [False, True], [False, False], [True, True]]
    assert torch.as_tensor(slots.tail_count).tolist() == [1, 1, 0, 2]
    student = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pair = topk_pair(student, rows, temperature=1.0)
    nothing = torch.isneginf(pair.log_p)
    assert nothing.tolist() == [
        [False, False, *row, left]
        for row, left in zip(slots.is_empty[:, 2:].tolist(), [False, False, True, False], strict=True)
    ]
    assert torch.isneginf(pair.log_q[nothing]).all()
    (gradient,) = torch.autograd.grad((pair.log_q * pair.log_q).masked_fill(~nothing, 0).sum(), student)
    assert not gradient.any()


def test_rows_without_a_teacher_give_numbers_and_decide_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(3 * rng.standard_normal((4, 50)).astype("f4"), k=1, temperatures=(1.0,), labels=[np.arange(4)])
    blank = {name: values.clone() for name, values in rows.arrays.items()}
    for values in blank.values():
        values[1:] = 0
    label = torch.tensor([3, 0, -1, 0])
    has = torch.tensor([True, False, False, False])
    blank["topk_logits"][0] = 0
    blank["tail_logsumexp"][0] = -40  # a tail that weighs nothing leaves nothing open
    student = torch.randn(4, 50, requires_grad=True)
    pair = topk_pair(student, replace(rows, arrays=blank, label=label, has_teacher=has), temperature=1.5)
    assert pair.has_teacher is has
    torch.where(has, kl(pair), 0.0).sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert not student.grad[1:].any()


def test_a_temperature_that_was_not_stored_is_bounded_or_refused() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((64, 200)).astype("f4")
    rows, student = rows_of(logits, k=5, temperatures=(1.0, 4.0)), torch.zeros(64, 200)
    with pytest.raises(UsageError, match=r"temperature 2\.0 was not stored"):
        topk_pair(student, rows, temperature=2.0)
    pair = topk_pair(student, rows, temperature=2.0, tail_tolerance=1.0)
    assert pair.bound is not None
    log_p = (as_stored(logits, rows) / 2).log_softmax(1)
    true = log_p.masked_fill(torch.from_numpy(is_kept(rows)), -math.inf).logsumexp(1)
    head = log_p.masked_fill(torch.from_numpy(~is_kept(rows)), -math.inf).logsumexp(1)
    odds = pair.log_p[:, -1] - pair.log_p[:, :-1].logsumexp(1)
    assert ((odds - (true - head)).abs() <= pair.bound + 1e-6).all()


def test_standardised_rows_are_exact_where_z2_was_stored() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((16, 100)).astype("f4")
    rows = rows_of(logits, k=5, temperatures=(1.0, "z2"))
    student = torch.from_numpy(rng.standard_normal((16, 100)))
    pair = topk_pair(standardised(student), rows, temperature="z2", student_temperature=1.0)
    assert pair.bound is None
    twice = 2 * torch.from_numpy(logits.astype("f8")).std(dim=1, correction=0, keepdim=True)
    spread = student / (2 * student.std(dim=1, correction=0, keepdim=True))
    torch.testing.assert_close(kl(pair), bucketed_kl(spread, logits / twice.numpy(), rows, 1.0), rtol=1e-3, atol=0)
    with pytest.raises(UsageError, match="needs student_temperature"):
        topk_pair(student, rows, temperature="z2")


def test_standardised_logits_have_a_standard_deviation_of_a_half() -> None:
    student = torch.tensor([[1.0, 5, -2, -math.inf], [1e4, 1e4, 1e4, 1e4]], dtype=torch.float64, requires_grad=True)
    found = standardised(student)
    assert found[0, :3].std(correction=0).item() == pytest.approx(0.5)
    assert found[0, 3] == -math.inf
    assert found[1].unique().numel() == 1
    (gradient,) = torch.autograd.grad(found[0, :3].sum() + found[1].sum(), student)
    assert torch.isfinite(gradient).all()
    # Stretching all logits changes nothing.
    assert (gradient[0, :3] * student[0, :3]).sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("classes", [65_536, 65_537, 200_000])
def test_many_classes(classes: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, classes)).astype("f4")
    logits[:, -1] = 9
    rows = rows_of(logits, k=4, temperatures=(1.0,), labels=[np.array([classes - 2, classes - 1])])
    student = torch.from_numpy(rng.standard_normal((2, classes))).requires_grad_()
    theirs = student.detach().clone().requires_grad_()
    found, expected = kl(topk_pair(student, rows, temperature=1.0)), bucketed_kl(theirs, logits, rows, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_what_does_not_belong_together_is_refused() -> None:
    rows = rows_of(np.eye(4, dtype="f4"), k=2, labels=[np.arange(4)])
    with pytest.raises(MismatchError, match=r"the student has 5 classes, the teacher 4 \(logits \(4, 5\) and rows of"):
        topk_pair(torch.zeros(4, 5), rows, temperature=1.0)
    with pytest.raises(MismatchError, match=r"shape \(3, 4\), the teacher's rows \(4, 4\)"):
        topk_pair(torch.zeros(3, 4), rows, temperature=1.0)
    with pytest.raises(UsageError, match="hold 0 labels"):
        topk_pair(torch.zeros(4, 4), replace(rows, label=None), temperature=1.0)
    with pytest.raises(UsageError, match="meta"):
        topk_pair(torch.zeros(4, 4, device="meta"), rows, temperature=1.0)
    with pytest.raises(UsageError, match="temperature is -1"):
        topk_pair(torch.zeros(4, 4), rows, temperature=1.0, student_temperature=-1.0)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_the_plain_form_is_the_same(case: tuple[np.ndarray, TeacherRows, torch.Tensor]) -> None:
    _, rows, student = case
    slots = kept(rows, dtype=torch.float64)
    is_empty = torch.isneginf(topk_pair(student, rows, temperature=2.0).log_q)
    found = student_log_probs(student, slots, 2.0)
    torch.testing.assert_close(found, plain_log_probs(student, slots.classes, is_empty, 2.0), rtol=1e-12, atol=1e-12)
