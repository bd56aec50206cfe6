"""Each loss against a plain float64 NumPy twin.

Tolerances: float64 against the twin differs by summation order only, 1e-12 relative. float32 has 24 bits; a row's
terms are sums over C <= 1000 classes of numbers near 1, each rounded a handful of times, so 2e-5 relative plus
2e-6 * temperature**2 absolute (KL near 0 is a difference of near-equal logarithms, then multiplied by the square).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.losses import cross_entropy, hard_target_loss, kd_loss, loss_sums, safe_mean, soft_target_kl


def log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def twin_kl(student: np.ndarray, teacher: np.ndarray, temperature: float, student_temperature: float) -> np.ndarray:
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / student_temperature)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=1)


def twin_ce(student: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    log_q = log_softmax(student)
    picked = np.take_along_axis(log_q, np.maximum(labels, 0)[:, None], axis=1)[:, 0]
    spread = smoothing * log_q.mean(axis=1) if smoothing else 0.0
    return np.where(labels >= 0, -(1 - smoothing) * picked - spread, 0.0)


def twin_sums(
    student: np.ndarray,
    teacher: np.ndarray | None,
    labels: np.ndarray | None,
    *,
    alpha: float,
    temperature: float,
    student_temperature: float | None = None,
    has_teacher: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    smoothing: float = 0.0,
) -> tuple[float, float]:
    """Numerator and denominator of DESIGN section 7, row by row, in float64."""
    student = student.astype(np.float64)
    shape = (student.shape[0], *student.shape[2:])
    divisor = temperature if student_temperature is None else student_temperature
    numerator = denominator = 0.0
    ce = twin_ce(student, labels, smoothing) if labels is not None else None
    kl = twin_kl(student, teacher.astype(np.float64), temperature, divisor) if teacher is not None else None
    for index in np.ndindex(*shape):
        taught = kl is not None and (has_teacher is None or bool(has_teacher[index[0]]))
        labelled = labels is not None and labels[index] >= 0
        if not taught and not labelled:
            continue
        a = alpha if taught and labelled else float(taught)
        w = 1.0 if weight is None else float(weight[index] if weight.ndim > 1 else weight[index[0]])
        # A term of weight 0 is left out: where a masked class makes it infinite, 0 * inf would be NaN.
        numerator += w * (1 - a) * ce[index] if labelled and a < 1 else 0.0
        numerator += w * a * divisor**2 * kl[index] if taught and a > 0 else 0.0
        denominator += w
    return numerator, denominator


def batch(rows: int = 6, classes: int = 5, *positions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (rows, classes, *positions)
    labels = rng.integers(0, classes, (rows, *positions))
    return 3 * rng.standard_normal(shape), 3 * rng.standard_normal(shape), labels


def tensor(values: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values)).to(dtype)


def cached(logits: np.ndarray, has_teacher: np.ndarray | None = None) -> TeacherRows:
    rows = TeacherRows.from_dense(torch.from_numpy(logits).float())
    return rows if has_teacher is None else replace(rows, has_teacher=torch.from_numpy(has_teacher))


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.9, 4.0), (1.0, 20.0)])
def test_the_loss_is_the_formula(classes: int, alpha: float, temperature: float) -> None:
    student, teacher, labels = batch(8, classes)
    numerator, denominator = twin_sums(student, teacher, labels, alpha=alpha, temperature=temperature)
    settings: dict[str, Any] = {"alpha": alpha, "temperature": temperature}
    exact = kd_loss(tensor(student), tensor(teacher), tensor(labels, torch.int64), **settings)
    assert exact.dtype == torch.float64
    assert exact.item() == pytest.approx(numerator / denominator, rel=1e-12)
    single = kd_loss(
        tensor(student, torch.float32), tensor(teacher, torch.float32), tensor(labels, torch.int64), **settings
    )
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(numerator / denominator, rel=2e-5, abs=2e-6 * temperature**2)


def test_alpha_weighs_the_teacher_and_not_the_labels() -> None:
    student, teacher, labels = batch()
    wrong = tensor((labels + 1) % 5, torch.int64)
    alone = kd_loss(tensor(student), tensor(teacher), tensor(labels, torch.int64), alpha=1.0, temperature=2.0)
    assert alone == kd_loss(tensor(student), tensor(teacher), wrong, alpha=1.0, temperature=2.0)
    assert kd_loss(tensor(teacher), tensor(teacher), None, alpha=1.0, temperature=2.0).item() == pytest.approx(0)


def test_the_divergence_is_from_the_teacher_to_the_student() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]])
    assert soft_target_kl(student, teacher, temperature=1.0).item() == pytest.approx(np.log(2))
    assert soft_target_kl(teacher, student, temperature=1.0).item() == pytest.approx(50 - np.log(2))


def test_a_student_temperature_of_its_own_sets_the_factor() -> None:
    student, teacher, labels = batch()
    numerator, denominator = twin_sums(student, teacher, labels, alpha=0.7, temperature=4.0, student_temperature=2.0)
    loss = kd_loss(
        tensor(student),
        tensor(teacher),
        tensor(labels, torch.int64),
        alpha=0.7,
        temperature=4.0,
        student_temperature=2.0,
    )
    assert loss.item() == pytest.approx(numerator / denominator, rel=1e-12)


def test_the_gradient_at_high_temperature_keeps_its_scale() -> None:
    student, teacher, _ = batch(4, 10)
    norms = []
    for temperature in (1.0, 10.0, 100.0):
        v = tensor(student).requires_grad_()
        kd_loss(v, tensor(teacher), alpha=1.0, temperature=temperature).backward()
        norms.append(v.grad.norm().item())  # type: ignore[union-attr]
    assert 0.1 < norms[1] / norms[2] < 10


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dense_prediction_averages_over_the_positions_that_count(smoothing: float) -> None:
    student, teacher, labels = batch(3, 4, 2, 5)
    labels[0, 0], labels[2] = -1, -1
    has_teacher = np.array([True, False, False])
    rounded = twin_sums(
        student, teacher.astype("f4"), labels, alpha=0.3, temperature=3.0, has_teacher=has_teacher, smoothing=smoothing
    )
    assert rounded[1] == 20  # 10 positions with the teacher, 10 with labels alone, 10 with nothing
    loss = kd_loss(
        tensor(student),
        cached(teacher, has_teacher),
        tensor(labels, torch.int64),
        alpha=0.3,
        temperature=3.0,
        label_smoothing=smoothing,
    )
    assert loss.item() == pytest.approx(rounded[0] / rounded[1], rel=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)])
def test_sample_weights_are_per_row_or_per_position(shape: tuple[int, ...]) -> None:
    student, teacher, labels = batch(4, 5, 2, 3)
    labels[1] = -1
    weight = np.random.default_rng(1).random(shape)
    expected = twin_sums(student, teacher, labels, alpha=0.4, temperature=2.0, weight=weight)
    arguments = (tensor(student), tensor(teacher), tensor(labels, torch.int64))
    sums = loss_sums(*arguments, alpha=0.4, temperature=2.0, sample_weight=tensor(weight))
    assert [value.item() for value in sums] == pytest.approx(expected, rel=1e-12)
    terms = kd_loss(*arguments, alpha=0.4, temperature=2.0, sample_weight=tensor(weight), reduction="none")
    assert terms.shape == (4, 2, 3)
    assert terms.sum().item() == pytest.approx(expected[0], rel=1e-12)


@given(
    signals=st.lists(st.tuples(st.booleans(), st.booleans(), st.just(0.0) | st.floats(1e-3, 4)), max_size=8),
    classes=st.integers(2, 5),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.25, 32),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_mixed_rows_follow_the_formula_and_never_give_nan(
    signals: list[tuple[bool, bool, float]],
    classes: int,
    alpha: float,
    temperature: float,
    weighted: bool,
    seed: int,
) -> None:
    rows = len(signals)
    student, teacher, labels = batch(rows, classes, seed=seed)
    has_teacher = np.array([taught for taught, _, _ in signals], bool)
    labels = np.where(np.array([labelled for _, labelled, _ in signals], bool), labels, -1)
    weight = np.array([w for _, _, w in signals]) if weighted else None
    v = tensor(student).requires_grad_()
    numerator, denominator = loss_sums(
        v,
        cached(teacher, has_teacher),
        tensor(labels, torch.int64),
        alpha=alpha,
        temperature=temperature,
        sample_weight=None if weight is None else tensor(weight),
    )
    expected = twin_sums(
        student,
        teacher.astype("f4"),
        labels,
        alpha=alpha,
        temperature=temperature,
        has_teacher=has_teacher,
        weight=weight,
    )
    assert numerator.item() == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
    assert denominator.item() == pytest.approx(expected[1], rel=1e-9)
    safe_mean(numerator, denominator).backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]
    silent = ~has_teacher & (labels < 0)
    assert (v.grad[torch.from_numpy(silent)] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_without_any_signal_has_the_loss_zero_with_a_gradient(rows: int) -> None:
    student, teacher, _ = batch(rows, 4)
    for teacher_rows in (None, cached(teacher, np.zeros(rows, bool))):
        v = tensor(student, torch.float32).requires_grad_()
        labels = torch.full((rows,), -1)
        loss = kd_loss(v, teacher_rows, labels, alpha=0.0, temperature=1.0)
        assert loss.item() == 0
        loss.backward()
        assert (v.grad == 0).all()  # type: ignore[union-attr]


def test_sums_over_parts_of_a_batch_give_the_mean_over_the_whole() -> None:
    student, teacher, labels = batch(8)
    labels[5:] = -1
    arguments = (tensor(student), tensor(teacher), tensor(labels, torch.int64))
    whole = kd_loss(*arguments, alpha=0.0, temperature=2.0)
    parts = [loss_sums(*(a[half] for a in arguments), alpha=0.0, temperature=2.0) for half in (slice(4), slice(4, 8))]
    numerator, denominator = (sum(values) for values in zip(*parts, strict=True))
    assert safe_mean(numerator, denominator).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("masked_student", [False, True])
def test_masked_teacher_classes_add_nothing(masked_student: bool) -> None:
    student, teacher, labels = batch(5, 6)
    labels[:] = 0
    teacher[:, 4:] = -np.inf
    if masked_student:
        student[:, 4:] = -np.inf
    numerator, denominator = twin_sums(student, teacher, labels, alpha=0.5, temperature=2.0)
    v = tensor(student).requires_grad_()
    loss = kd_loss(v, tensor(teacher), tensor(labels, torch.int64), alpha=0.5, temperature=2.0)
    assert loss.item() == pytest.approx(numerator / denominator, rel=1e-12)
    loss.backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]
    assert (v.grad[:, :4] != 0).all()  # type: ignore[index]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_term_that_weighs_nothing_adds_nothing_where_a_masked_class_makes_it_infinite(alpha: float) -> None:
    student, teacher, labels = batch(5, 6)
    student[:, 5] = teacher[:, 5] = -np.inf
    teacher[3:] = 0  # as rows that the cache lacks are read
    labels[:] = 0
    labels[:2] = -1, 5 if alpha == 1 else -1  # the CE of row 1 is infinite, and weighs nothing at alpha = 1
    has_teacher = np.array([True, True, True, False, False])  # rows 3 and 4 have no teacher, and infinite KL to zeros
    expected = twin_sums(student, teacher.astype("f4"), labels, alpha=alpha, temperature=2.0, has_teacher=has_teacher)
    v = tensor(student).requires_grad_()
    settings: dict[str, Any] = {"alpha": alpha, "temperature": 2.0}
    sums = loss_sums(v, cached(teacher, has_teacher), tensor(labels, torch.int64), **settings)
    assert [value.item() for value in sums] == pytest.approx(expected, rel=1e-12)
    sums[0].backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


def test_a_sample_weight_of_0_silences_an_infinite_term() -> None:
    v = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]], requires_grad=True)
    settings: dict[str, Any] = {"alpha": 0.0, "temperature": 1.0}
    weight, labels = torch.tensor([1.0, 0.0]), torch.tensor([0, 2])
    loss = kd_loss(v, None, labels, sample_weight=weight, **settings)
    assert loss == kd_loss(v[:1], None, labels[:1], **settings)
    loss.backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


def test_extreme_logits_stay_finite() -> None:
    v = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = kd_loss(v, torch.tensor([[-300.0, 0.0, 300.0]]), torch.tensor([2]), alpha=0.5, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(400)
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_pass_gradcheck(masked: bool) -> None:
    student, teacher, labels = batch(5, 4)
    labels[1] = -1
    if masked:
        teacher[:, 3] = -np.inf
    has_teacher = np.array([True, True, False, True, True])
    fixed, targets = cached(teacher, has_teacher), tensor(labels % 3, torch.int64)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return kd_loss(v, fixed, targets, alpha=0.6, temperature=3.0, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (tensor(student).requires_grad_(),))
    assert torch.autograd.gradgradcheck(loss, (tensor(student).requires_grad_(),))


def test_no_gradient_flows_into_a_live_teacher() -> None:
    student, teacher, labels = batch()
    z = tensor(teacher).requires_grad_()
    v = tensor(student).requires_grad_()
    kd_loss(v, z, tensor(labels, torch.int64), alpha=0.5, temperature=2.0).backward()
    assert z.grad is None
    assert v.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    student, teacher, labels = batch(6, 100)
    v, targets = tensor(student, dtype), tensor(labels, torch.int64)
    z = tensor(teacher, torch.float32)
    plain = kd_loss(v.float(), z, targets, alpha=0.9, temperature=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(v, z, targets, alpha=0.9, temperature=4.0)
    assert loss.dtype == torch.float32
    assert loss == plain


def test_cached_float32_rows_and_the_same_rows_in_memory_give_the_same_bits() -> None:
    student, teacher, labels = batch(32, 10)
    z = tensor(teacher, torch.float32)
    gradients = []
    for signal in (z, TeacherRows.from_dense(z), TeacherRows.from_dense(z.numpy())):
        v = tensor(student, torch.float32).requires_grad_()
        kd_loss(v, signal, tensor(labels, torch.int64), alpha=0.9, temperature=4.0).backward()
        gradients.append(v.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    assert torch.equal(gradients[0], gradients[2])  # type: ignore[arg-type]


def test_rows_that_are_alike_and_weights_of_one_agree() -> None:
    student, teacher, labels = batch(16, 7)
    arguments = (tensor(student), tensor(teacher), tensor(labels, torch.int64))
    alike = kd_loss(*arguments, alpha=0.8, temperature=2.0)
    weighted = kd_loss(*arguments, alpha=0.8, temperature=2.0, sample_weight=torch.ones(16))
    assert alike.item() == pytest.approx(weighted.item(), rel=1e-14)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_taken(kind: torch.dtype) -> None:
    student, _, labels = batch()
    loss = kd_loss(tensor(student), None, tensor(labels, kind), alpha=0.0, temperature=1.0)
    assert loss == kd_loss(tensor(student), None, tensor(labels, torch.int64), alpha=0.0, temperature=1.0)


def test_hard_targets_are_the_teachers_most_likely_classes() -> None:
    student, teacher, _ = batch(6, 5)
    has_teacher = np.array([True] * 4 + [False] * 2)
    loss = hard_target_loss(tensor(student), cached(teacher, has_teacher), label_smoothing=0.2)
    expected = twin_ce(student[:4], teacher[:4].argmax(axis=1), 0.2).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_is_zero_without_a_label() -> None:
    student, _, labels = batch()
    labels[2] = -1
    rows = cross_entropy(tensor(student), tensor(labels, torch.int64))
    assert rows.shape == (6,)
    assert rows[2] == 0


LOGITS = torch.zeros(2, 3)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (UsageError, "alpha is 1.5", (LOGITS, LOGITS, LABELS), {"alpha": 1.5}),
        (UsageError, "alpha is -0.1", (LOGITS, LOGITS, LABELS), {"alpha": -0.1}),
        (UsageError, "alpha is nan", (LOGITS, LOGITS, LABELS), {"alpha": float("nan")}),
        (UsageError, "temperature is 0", (LOGITS, LOGITS, LABELS), {"temperature": 0.0}),
        (UsageError, "temperature is inf", (LOGITS, LOGITS, LABELS), {"temperature": float("inf")}),
        (UsageError, "student_temperature is -1", (LOGITS, LOGITS, LABELS), {"student_temperature": -1.0}),
        (UsageError, "label_smoothing is 1", (LOGITS, LOGITS, LABELS), {"label_smoothing": 1.0}),
        (UsageError, "reduction must be", (LOGITS, LOGITS, LABELS), {"reduction": "batchmean"}),
        (UsageError, "the teacher is None", (LOGITS, None, LABELS), {}),
        (UsageError, "labels is None", (LOGITS, LOGITS), {}),
        (UsageError, "binary_kd", (LOGITS, torch.zeros(2, 1), LABELS), {}),
        (UsageError, "binary_kd", (torch.zeros(2, 1), LOGITS, LABELS), {}),
        (UsageError, r"shape \(N, C\)", (torch.zeros(2), LOGITS, LABELS), {}),
        (UsageError, r"shape \(N, C\)", (LOGITS, torch.zeros(3), LABELS), {}),
        (UsageError, "floating point", (LOGITS, LABELS[:, None], LABELS), {}),
        (UsageError, "found list", (LOGITS, [1.0], LABELS), {}),
        (UsageError, "class numbers", (LOGITS, LOGITS, LOGITS), {}),
        (UsageError, "labels have shape", (LOGITS, LOGITS, LABELS[:1]), {}),
        (UsageError, "sample_weight has shape", (LOGITS, LOGITS, LABELS), {"sample_weight": torch.ones(3)}),
        (MismatchError, "student has 3 classes, the teacher 4", (LOGITS, torch.zeros(2, 4), LABELS), {}),
        (MismatchError, "expected the same shape", (LOGITS, torch.zeros(5, 3), LABELS), {}),
        (DataError, "labels run from 0 to 3", (LOGITS, LOGITS, torch.tensor([0, 3])), {}),
        (DataError, "labels run from -100 to 0", (LOGITS, LOGITS, torch.tensor([0, -100])), {}),
    ],
)
def test_what_cannot_be_meant_is_refused(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        kd_loss(*arguments, **{"alpha": 0.5, "temperature": 2.0, **options})


def test_a_batch_on_another_device_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"teacher.to\(device"):
        kd_loss(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3), None, alpha=1.0, temperature=1.0)


@pytest.mark.gpu
def test_a_gpu_gives_the_loss_of_the_cpu() -> None:
    student, teacher, labels = batch(16, 10)
    labels[3] = -1
    has_teacher = np.arange(16) % 3 > 0
    losses = []
    for device in ("cpu", "cuda"):
        rows = cached(teacher, has_teacher).to(device)
        v, targets = tensor(student).to(device), tensor(labels, torch.int64).to(device)
        losses.append(kd_loss(v, rows, targets, alpha=0.9, temperature=4.0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
