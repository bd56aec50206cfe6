"""What `topk` rows say of the teacher, against all its logits in float64.

Kept logits are float16: the twin takes the stored ones, and is then met to the 6e-8 of a stored float32 tail.
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
from kdcache.train.sparse import topk_pair
from kdcache.train.sparse_metrics import captured_mass, confidence, label_log_prob, label_slot, target_pair, top_class

STORED = (1.0, 4.0, "z2")


def teacher(classes: int = 60, k: int = 4) -> tuple[np.ndarray, np.ndarray, TeacherRows]:
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((20, classes)).astype("f4"), rng.integers(0, classes, 20)
    labels[0] = -1
    return logits, labels, rows_of(logits, k=k, temperatures=STORED, labels=[labels])


def log_probs(rows: TeacherRows, logits: np.ndarray, temperature: Any) -> torch.Tensor:
    divisor = 2 * rows.arrays["logit_std"].double()[:, None] if temperature == "z2" else temperature
    return (as_stored(logits, rows) / divisor).log_softmax(1)


@pytest.mark.parametrize("temperature", STORED)
def test_at_stored_temperatures_all_is_exact(temperature: Any) -> None:
    logits, labels, rows = teacher()
    expected = log_probs(rows, logits, temperature)
    mass, label, top = (f(rows, temperature) for f in (captured_mass, label_log_prob, confidence))
    assert mass.error is None
    assert label.error is None
    assert top.error is None
    kept_mass = (expected.exp() * torch.from_numpy(is_kept(rows))).sum(1)
    torch.testing.assert_close(mass.value, kept_mass, rtol=1e-6, atol=0)
    torch.testing.assert_close(top.value, expected.exp().amax(1), rtol=1e-6, atol=0)
    own = expected[torch.arange(1, 20), torch.from_numpy(labels[1:])]
    torch.testing.assert_close(label.value[1:], own, rtol=1e-6, atol=1e-7)
    assert label.value[0] == 0
    assert top_class(rows).tolist() == logits.argmax(1).tolist()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([0.3, 0.9, 1.5, 3.0, 10.0]), st.sampled_from([(1.0,), (1.0, 4.0), ("z2",)]))
def test_at_other_temperatures_the_error_holds(temperature: float, stored: tuple[float | str, ...]) -> None:
    logits, labels, _ = teacher()
    rows = rows_of(logits, k=4, temperatures=stored, labels=[labels])
    expected = log_probs(rows, logits, temperature)
    mass, label, top = (f(rows, temperature) for f in (captured_mass, label_log_prob, confidence))
    wanted = [
        (expected.exp() * torch.from_numpy(is_kept(rows))).sum(1),
        torch.where(torch.from_numpy(labels) >= 0, expected.gather(1, rows.label.clamp(min=0)[:, None])[:, 0], 0),
        expected.exp().amax(1),
    ]
    for found, value in zip((mass, label, top), wanted, strict=True):
        assert found.error is not None
        assert ((found.value - value).abs() <= found.error + 1e-12).all()


def test_positions_of_dense_prediction_are_measured_one_by_one() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 9, 3, 4)).astype("f4")
    rows = rows_of(logits, k=3, temperatures=(1.0, "z2"))
    flat = rows_of(np.moveaxis(logits, 1, -1).reshape(-1, 9), k=3, temperatures=(1.0, "z2"))
    for temperature in (1.0, "z2"):
        for measure in (captured_mass, confidence):
            found = measure(rows, temperature).value
            assert found.shape == (2, 3, 4)
            torch.testing.assert_close(found.reshape(-1), measure(flat, temperature).value)
    labels = top_class(rows)
    assert (label_log_prob(rows, labels=labels).value.exp() - confidence(rows).value).abs().max() < 1e-12
    with pytest.raises(UsageError, match="no labels"):
        label_log_prob(rows)


def test_a_label_that_a_row_does_not_keep_is_refused() -> None:
    logits, labels, rows = teacher(k=1)
    other = torch.from_numpy((logits.argmin(1) + 0).astype(np.int64))
    with pytest.raises(MismatchError, match="neither among the K classes"):
        label_log_prob(rows, labels=other)
    assert label_slot(kept(rows), torch.from_numpy(labels)).tolist()[1:] == [
        0 if labels[n] == logits[n].argmax() else 1 for n in range(1, 20)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_target_part_of_dkd_is_that_of_the_dense_rows(dtype: torch.dtype) -> None:
    logits, _, rows = teacher()
    student = torch.from_numpy(np.random.default_rng(1).standard_normal(logits.shape)).to(dtype).requires_grad_()
    found = target_pair(topk_pair(student, rows, temperature=4.0), rows)
    p = log_probs(rows, logits, 4.0).exp().gather(1, rows.label.clamp(min=0)[:, None])
    q = (student.double() / 4).softmax(1).gather(1, rows.label.clamp(min=0)[:, None])
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).squeeze(1)
    value = (found.log_p.exp() * (found.log_p - found.log_q)).sum(1)
    assert found.has_teacher is not None
    assert found.has_teacher.tolist() == [False, *[True] * 19]
    exact = {"rtol": 1e-5, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(value[1:].double(), expected[1:], **exact)
    (gradient,) = torch.autograd.grad(value[1:].sum(), student, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected[1:].sum(), student)
    assert (gradient - wanted).norm() <= (1e-6 if dtype == torch.float64 else 1e-5) * wanted.norm()


def test_a_target_of_nearly_all_the_mass_keeps_its_digits() -> None:
    rows = rows_of(np.array([[200.0, 0, 0, 0]], "f4"), k=1, temperatures=(1.0,), labels=[np.array([0])])
    student = torch.tensor([[300.0, 0, 0, 0]], requires_grad=True)
    found = target_pair(topk_pair(student, rows, temperature=1.0), rows)
    torch.testing.assert_close(found.log_p, torch.tensor([[0.0, math.log(3) - 200]]))
    torch.testing.assert_close(found.log_q.detach(), torch.tensor([[0.0, math.log(3) - 300]]))
    found.log_q.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_a_row_whose_only_class_is_the_label_has_a_finite_gradient() -> None:
    rows = rows_of(np.array([[1.0, -math.inf]], "f4"), k=1, temperatures=(1.0,), labels=[np.array([0])])
    student = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = target_pair(topk_pair(student, rows, temperature=1.0), rows)
    assert found.log_p.tolist() == [[0.0, -math.inf]]
    found.log_q[0, 0].backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_rows_without_a_teacher_have_no_target() -> None:
    _, _, rows = teacher()
    rows = replace(rows, has_teacher=torch.arange(20) > 3)
    pair = topk_pair(torch.zeros(20, 60), rows, temperature=1.0)
    found = target_pair(pair, rows).has_teacher
    assert found is not None
    assert found.tolist() == [False] * 4 + [True] * 16
