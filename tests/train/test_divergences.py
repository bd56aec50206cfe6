"""Divergences and their losses against float64 NumPy, term by term; float64 differs in the order of summation only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.divergences import jensen_shannon, kl, reverse_kl, soft_cross_entropy
from kdcache.train.log_pair import Pair
from kdcache.train.losses import (
    dist_loss,
    dkd_loss,
    js_loss,
    kd_loss,
    logit_mse_loss,
    reverse_kl_loss,
    soft_ce_loss,
    standardized_kd_loss,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kl_twin(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(axis=1)


def js_twin(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    mixture = beta * p + (1 - beta) * q
    return beta * kl_twin(p, mixture) + (1 - beta) * kl_twin(q, mixture)


def pair_of(p: np.ndarray, q: np.ndarray) -> Pair:
    return Pair(torch.from_numpy(p).log(), torch.from_numpy(q).log(), None)


def random_pair(seed: int, classes: int, *, zeros: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p, q = (softmax(3 * rng.standard_normal((4, classes))) for _ in range(2))
    p[:, :zeros] = 0
    return p / p.sum(axis=1, keepdims=True), q


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 40), beta=st.floats(0.01, 0.99))
def test_every_divergence_is_its_definition(seed: int, classes: int, beta: float) -> None:
    p, q = random_pair(seed, classes)
    both = pair_of(p, q)
    for found, expected in (
        (kl(both), kl_twin(p, q)),
        (kl(both, is_soft=True), kl_twin(p, q)),
        (reverse_kl(both), kl_twin(q, p)),
        (jensen_shannon(both, beta=beta), js_twin(p, q, beta)),
        (soft_cross_entropy(both), -(p * np.log(q)).sum(axis=1)),
    ):
        assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-13)


@given(seed=st.integers(0, 2**31), beta=st.floats(0.01, 0.99))
def test_events_of_probability_0_add_nothing_where_they_may(seed: int, beta: float) -> None:
    p, q = random_pair(seed, 6, zeros=2)
    log_q = torch.from_numpy(q).log().requires_grad_()
    both = Pair(torch.from_numpy(p).log(), log_q, None)
    assert kl(both).detach().numpy() == pytest.approx(kl_twin(p, q), rel=1e-9)
    assert jensen_shannon(both, beta=beta).detach().numpy() == pytest.approx(js_twin(p, q, beta), rel=1e-9)
    assert (reverse_kl(both) == math.inf).all()
    found = [kl(both), kl(both, is_soft=True), jensen_shannon(both, beta=beta), reverse_kl(both)]
    for value in found:
        (gradient,) = torch.autograd.grad(value.sum(), log_q)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("nothing", [-math.inf, -1e30])
def test_a_slot_that_holds_no_event_changes_nothing(nothing: float) -> None:
    p, q = random_pair(0, 5)
    plain = pair_of(p, q)
    log_p = torch.cat([plain.log_p, torch.full((4, 1), -math.inf)], dim=1)
    log_q = torch.cat([plain.log_q, torch.full((4, 1), nothing)], dim=1).requires_grad_()
    padded = Pair(log_p, log_q, None)
    for divergence in (kl, reverse_kl, jensen_shannon, soft_cross_entropy):
        value = divergence(padded)
        assert torch.equal(value, divergence(plain)), divergence
        (gradient,) = torch.autograd.grad(value.sum(), log_q)
        assert torch.isfinite(gradient).all(), divergence


def test_jensen_shannon_tends_to_the_kl_at_both_ends() -> None:
    p, q = random_pair(1, 7)
    both, small = pair_of(p, q), 1e-6
    assert (jensen_shannon(both, beta=small) / small).numpy() == pytest.approx(kl_twin(p, q), rel=1e-2)
    assert (jensen_shannon(both, beta=1 - small) / small).numpy() == pytest.approx(kl_twin(q, p), rel=1e-2)
    swapped = pair_of(q, p)
    assert torch.allclose(jensen_shannon(both, beta=0.3), jensen_shannon(swapped, beta=0.7))


@pytest.mark.parametrize("temperature", [10.0, 100.0, 1000.0])
def test_the_kl_keeps_its_digits_at_high_temperatures_in_float32(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v, z = (3 * torch.randn(16, 50, generator=generator) for _ in range(2))
    settings: dict[str, Any] = {"alpha": 1.0, "temperature": temperature}
    value, exact = kd_loss(v, z, **settings), kd_loss(v.double(), z.double(), **settings)
    assert value.item() == pytest.approx(exact.item(), rel=2e-4)


def test_at_an_infinite_temperature_the_kl_is_half_the_mean_square_of_centred_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    v, z = (torch.randn(5, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    limit = logit_mse_loss(v, z, centred=True, reduction="none") / 2
    for temperature, relative in ((1e2, 0.1), (1e4, 1e-3)):
        rows = kd_loss(v, z, alpha=1.0, temperature=temperature, reduction="none")
        assert torch.allclose(rows, limit, rtol=relative)
    centred = [t - t.mean(dim=1, keepdim=True) for t in (v, z)]
    assert torch.allclose(limit, (centred[0] - centred[1]).square().mean(dim=1) / 2)


# Every loss with what it needs beside student and teacher; each counts the rows that have a teacher.
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "kd": lambda v, z, labels=LABELS, **o: kd_loss(v, z, None, alpha=1.0, temperature=2.0, **o),
    "reverse_kl": lambda v, z, labels=LABELS, **o: reverse_kl_loss(v, z, temperature=2.0, **o),
    "js": lambda v, z, labels=LABELS, **o: js_loss(v, z, temperature=2.0, beta=0.3, **o),
    "soft_ce": lambda v, z, labels=LABELS, **o: soft_ce_loss(v, z, temperature=2.0, **o),
    "mse": lambda v, z, labels=LABELS, **o: logit_mse_loss(v, z, **o),
    "centred_mse": lambda v, z, labels=LABELS, **o: logit_mse_loss(v, z, centred=True, **o),
    "dkd": lambda v, z, labels=LABELS, **o: dkd_loss(v, z, labels, temperature=2.0, **o),
    "dist": lambda v, z, labels=LABELS, **o: dist_loss(v, z, temperature=2.0, **o),
    "standardized": lambda v, z, labels=LABELS, **o: standardized_kd_loss(v, z, **o),
}
each = pytest.mark.parametrize("name", LOSSES)


def batch(rows: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, z = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return v, z


@each
def test_the_gradient_passes_gradcheck(name: str) -> None:
    v, z = batch()
    assert torch.autograd.gradcheck(lambda t: LOSSES[name](t, z), (v.requires_grad_(),))


@each
def test_rows_without_a_teacher_do_not_count(name: str) -> None:
    v, z = batch()
    has = np.array([True, False, True, True, False, True])
    rows = replace(TeacherRows.from_dense(z.float()), has_teacher=has.copy()).tensors()
    rows = replace(rows, has_teacher=torch.from_numpy(has))
    v.requires_grad_()
    found = LOSSES[name](v, rows)
    expected = LOSSES[name](v[has], z[has].float(), labels=LABELS[has])
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    found.backward()
    assert (v.grad[~has] == 0).all()  # type: ignore[index]
    each_row = LOSSES[name](v, rows, reduction="none")
    assert (each_row[~has] == 0).all()
    assert LOSSES[name](v, rows, reduction="sum").item() == pytest.approx(4 * expected.item(), rel=1e-9)


@each
def test_weights_are_repetitions_of_a_row(name: str) -> None:
    v, z = batch()
    weight = torch.tensor([1.0, 0.0, 3.0, 1.0, 2.0, 1.0])
    repeated = torch.repeat_interleave(torch.arange(6), weight.long())
    found = LOSSES[name](v, z, sample_weight=weight)
    expected = LOSSES[name](v[repeated], z[repeated], labels=LABELS[repeated])
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@each
def test_masked_classes_are_as_if_they_were_not_there(name: str) -> None:
    v, z = batch(classes=6)
    mask = torch.tensor([True, True, True, False, True, False])
    v.requires_grad_()
    found = LOSSES[name](v, z, class_mask=mask)
    assert found.item() == pytest.approx(LOSSES[name](v[:, mask], z[:, mask]).item(), rel=1e-9)
    found.backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]
    assert (v.grad[:, ~mask] == 0).all()  # type: ignore[index]


@each
@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_in_which_no_row_counts_is_0_with_a_gradient(name: str, rows: int) -> None:
    v, z = batch(rows)
    teacher = TeacherRows.from_dense(z.float())
    teacher = replace(teacher, has_teacher=torch.zeros(rows, dtype=torch.bool))
    v = v.float().requires_grad_()
    loss = LOSSES[name](v, teacher, labels=LABELS[:rows])
    assert loss.item() == 0
    loss.backward()
    assert (v.grad == 0).all()  # type: ignore[union-attr]


@each
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_of_ten_thousand_stay_finite(name: str, scale: float) -> None:
    v, z = (t.float().sign() * scale for t in batch())
    v.requires_grad_()
    loss = LOSSES[name](v, z)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


@each
def test_equal_logits_have_a_finite_gradient(name: str) -> None:
    v = torch.zeros(6, 4, requires_grad=True)
    loss = LOSSES[name](v, torch.zeros(6, 4))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_students_are_computed_in_float32_under_autocast(name: str, dtype: torch.dtype) -> None:
    v, z = batch()
    half = v.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](half, z.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LOSSES[name](half.float(), z.float()).item(), rel=1e-6)
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype


@each
def test_two_classes_are_enough_and_one_is_refused(name: str) -> None:
    v, z = batch(classes=2)
    assert torch.isfinite(LOSSES[name](v, z, labels=LABELS % 2))
    with pytest.raises(UsageError, match="binary_kd"):
        LOSSES[name](v[:, :1], z[:, :1], labels=LABELS * 0)


@each
def test_every_position_of_dense_prediction_is_a_row(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    v, z = (torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(4, (2, 3), generator=generator)
    flat = [t.movedim(1, -1).reshape(-1, 4) for t in (v, z)]
    found = LOSSES[name](v, z, labels=labels)
    assert found.item() == pytest.approx(LOSSES[name](*flat, labels=labels.reshape(-1)).item(), rel=1e-9)
    assert LOSSES[name](v, z, labels=labels, reduction="none").shape == (2, 3)


@each
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (UsageError, "reduction must be", {"reduction": "batchmean"}),
        (UsageError, "sample_weight has shape", {"sample_weight": torch.ones(5)}),
        (UsageError, "must be bool", {"class_mask": torch.ones(4)}),
        (MismatchError, r"class_mask has shape \(3,\), expected \(4,\)", {"class_mask": torch.ones(3).bool()}),
        (UsageError, "leaves 0 of 4 classes", {"class_mask": torch.zeros(4).bool()}),
        (UsageError, "leaves 1 of 4 classes", {"class_mask": torch.arange(4) == 0}),
    ],
)
def test_what_cannot_be_meant_is_refused(
    name: str, error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        LOSSES[name](*batch(), **options)


@each
def test_students_of_other_classes_are_refused(name: str) -> None:
    v, z = batch()
    with pytest.raises(MismatchError, match="the student has 3 classes, the teacher 4"):
        LOSSES[name](v[:, :3], z)


def test_a_label_of_a_masked_class_is_refused() -> None:
    v, z = batch()
    mask = torch.tensor([True, True, False, True])
    for loss in (
        lambda: kd_loss(v, z, LABELS, alpha=0.5, temperature=2.0, class_mask=mask),
        lambda: dkd_loss(v, z, LABELS, temperature=2.0, class_mask=mask),
    ):
        with pytest.raises(DataError, match="2 rows have a label that class_mask excludes, for example 2"):
            loss()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_with_labels_masks_classes_too(smoothing: float) -> None:
    v, z = batch(classes=6)
    mask = torch.tensor([True, True, True, False, True, False])
    settings: dict[str, Any] = {"alpha": 0.4, "temperature": 3.0, "label_smoothing": smoothing}
    found = kd_loss(v, z, LABELS, class_mask=mask, **settings)
    assert found.item() == pytest.approx(kd_loss(v[:, mask], z[:, mask], LABELS, **settings).item(), rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, math.nan])
def test_a_mixture_needs_two_parts(beta: float) -> None:
    with pytest.raises(UsageError, match="beta of js"):
        js_loss(*batch(), temperature=1.0, beta=beta)


def test_different_temperatures_take_the_students_square() -> None:
    v, z = batch()
    p, q = softmax(z.numpy() / 4), softmax(v.numpy() / 2)
    found = reverse_kl_loss(v, z, temperature=4.0, student_temperature=2.0, reduction="none")
    assert found.numpy() == pytest.approx(4 * kl_twin(q, p), rel=1e-9)


@pytest.mark.gpu
@each
def test_a_gpu_gives_the_loss_of_the_cpu(name: str) -> None:
    v, z = batch()
    mask = torch.tensor([True, True, True, False])
    found = []
    for device in ("cpu", "cuda"):
        student = v.to(device, torch.float32).requires_grad_()
        options = {"class_mask": mask.to(device), "sample_weight": torch.arange(6.0, device=device)}
        loss = LOSSES[name](student, z.to(device, torch.float32), labels=LABELS.to(device), **options)
        loss.backward()
        assert student.grad is not None
        found.append((loss.item(), student.grad.cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_tail_tolerance_that_a_message_advises_is_taken() -> None:
    from topk_rows import rows_of

    from kdcache.train.losses import js_loss, reverse_kl_loss, soft_ce_loss

    rng = np.random.default_rng(0)
    rows = rows_of(rng.normal(size=(4, 40)).astype(np.float32) * 3, k=3, temperatures=(1.0,))
    student = torch.zeros(4, 40)
    for loss in (reverse_kl_loss, js_loss, soft_ce_loss):
        with pytest.raises(UsageError, match="tail_tolerance"):
            loss(student, rows, temperature=3.0)
        assert torch.isfinite(loss(student, rows, temperature=3.0, tail_tolerance=1.0))
