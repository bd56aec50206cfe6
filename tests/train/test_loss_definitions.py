"""DKD, DIST and standardised KD against their published formulas, written out in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from topk_rows import rows_of

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.losses import Dkd, dist_loss, dkd_loss, kd_loss, standardized_kd_loss
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.standardized import standardize


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(axis=1)


def batch(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    student, teacher = (3 * rng.standard_normal((rows, classes)) for _ in range(2))
    return student, teacher, rng.integers(0, classes, rows)


def dkd_twin(
    v: np.ndarray, z: np.ndarray, labels: np.ndarray, *, temperature: float, alpha: float, beta: float
) -> np.ndarray:
    p, q = softmax(z / temperature), softmax(v / temperature)
    rows = np.arange(len(labels))
    binary = [np.stack([s[rows, labels], 1 - s[rows, labels]], axis=1) for s in (p, q)]
    others = np.ones_like(p, dtype=bool)
    others[rows, labels] = False
    among = [softmax(logits[others].reshape(len(labels), -1) / temperature) for logits in (z, v)]
    return temperature**2 * (alpha * kl(*binary) + beta * kl(*among))


@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 12),
    temperature=st.floats(0.5, 8),
    alpha=st.floats(0, 3),
    beta=st.floats(0, 10),
)
def test_dkd_is_its_definition(seed: int, classes: int, temperature: float, alpha: float, beta: float) -> None:
    v, z, labels = batch(5, classes, seed)
    expected = dkd_twin(v, z, labels, temperature=temperature, alpha=alpha, beta=beta)
    found = dkd_loss(
        torch.from_numpy(v),
        torch.from_numpy(z),
        torch.from_numpy(labels),
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        reduction="none",
    )
    # The twin takes 1 - p of the target, which has lost digits where the target is nearly certain.
    assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_dkd_whose_beta_is_what_the_target_leaves_is_the_kl() -> None:
    v, z, labels = batch(8, 6)
    student, teacher, targets = (torch.from_numpy(t) for t in (v, z, labels))
    left = 1 - softmax(z / 2)[np.arange(8), labels]
    rows = [
        dkd_loss(student[i : i + 1], teacher[i : i + 1], targets[i : i + 1], temperature=2.0, beta=float(left[i]))
        for i in range(8)
    ]
    expected = kd_loss(student, teacher, alpha=1.0, temperature=2.0, reduction="none")
    assert torch.allclose(torch.stack(rows), expected, rtol=1e-9)


def test_dkd_keeps_the_digits_of_a_teacher_that_is_sure() -> None:
    v = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    z = torch.tensor([[60.0, 1.0, 0.0]])  # 1 - p of the target is 0 in float32
    loss = dkd_loss(v, z, torch.tensor([0]), temperature=1.0, alpha=0.0, beta=1.0)
    p, q = softmax(np.array([[1.0, 0.0]])), softmax(np.array([[1.0, 2.0]]))
    assert loss.item() == pytest.approx(kl(p, q)[0], rel=1e-5)
    loss.backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


def test_rows_without_a_label_have_no_dkd() -> None:
    v, z, labels = (torch.from_numpy(t) for t in batch(4, 5))
    labels[1] = -1
    rows = dkd_loss(v, z, labels, temperature=2.0, reduction="none")
    assert rows[1] == 0
    kept = torch.tensor([0, 2, 3])
    expected = dkd_loss(v[kept], z[kept], labels[kept], temperature=2.0)
    assert dkd_loss(v, z, labels, temperature=2.0).item() == pytest.approx(expected.item(), rel=1e-12)


@given(st.integers(0, 2**31), st.integers(3, 30), st.integers(1, 30))
def test_the_target_part_of_dkd_is_exact_on_top_k_rows(seed: int, classes: int, k: int) -> None:
    v, z, labels = batch(7, classes, seed % 1000)
    labels[2] = -1
    rows = rows_of(z.astype(np.float32), k=min(k, classes), temperatures=(2.0,), labels=[labels])
    student = torch.from_numpy(v).float().requires_grad_()
    found = dkd_loss(student, rows, torch.from_numpy(labels), temperature=2.0, beta=0.0)
    reference = torch.from_numpy(v).float().requires_grad_()
    stored = torch.from_numpy(z).float()
    expected = dkd_loss(reference, stored, torch.from_numpy(labels), temperature=2.0, beta=0.0)
    assert found.item() == pytest.approx(expected.item(), rel=5e-3, abs=1e-4)  # kept logits are float16
    found.backward()
    expected.backward()
    assert torch.allclose(student.grad, reference.grad, atol=2e-3)  # type: ignore[arg-type]


def test_dkd_on_top_k_rows_needs_all_logits_for_its_other_part() -> None:
    v, z, labels = batch(4, 9)
    rows = rows_of(z.astype(np.float32), k=3, labels=[labels])
    with pytest.raises(UsageError, match=r"encoding topk|all classes"):
        dkd_loss(torch.from_numpy(v).float(), rows, torch.from_numpy(labels), temperature=2.0)
    assert (Dkd(beta=0.0).need, Dkd().need) == ("dkd_target", "dkd")


def test_dkd_refuses_two_targets_a_row_and_weights_below_0() -> None:
    v, z, labels = (torch.from_numpy(t) for t in batch(4, 5))
    with pytest.raises(UsageError, match="rows of mixed views"):
        dkd_loss(v, z, MixedLabels(labels, labels, torch.ones(4)), temperature=2.0)  # type: ignore[arg-type]
    for name in ("alpha", "beta"):
        with pytest.raises(UsageError, match=f"{name} of dkd is -1"):
            dkd_loss(v, z, labels, temperature=2.0, **{name: -1.0})


def pearson(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.corrcoef(p, q)[0, 1])


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 8), beta=st.floats(0, 3), gamma=st.floats(0, 3))
def test_dist_is_its_definition(seed: int, temperature: float, beta: float, gamma: float) -> None:
    v, z, _ = batch(6, 5, seed)
    p, q = softmax(z / temperature), softmax(v / temperature)
    inter = np.mean([1 - pearson(p[i], q[i]) for i in range(6)])
    intra = np.mean([1 - pearson(p[:, c], q[:, c]) for c in range(5)])
    expected = temperature**2 * (beta * inter + gamma * intra)
    found = dist_loss(torch.from_numpy(v), torch.from_numpy(z), temperature=temperature, beta=beta, gamma=gamma)
    # The product of two norms is held above 1e-8, which classes that nobody predicts come near.
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_dist_of_one_row_has_no_correlation_over_the_batch() -> None:
    v, z, _ = (torch.from_numpy(t) for t in batch(1, 5))
    v.requires_grad_()
    loss = dist_loss(v, z, beta=0.0)
    assert loss.item() == 1
    loss.backward()
    assert torch.isfinite(v.grad).all()  # type: ignore[arg-type]


def test_dist_refuses_weights_below_0() -> None:
    v, z, _ = (torch.from_numpy(t) for t in batch(3, 5))
    for name in ("beta", "gamma"):
        with pytest.raises(UsageError, match=f"{name} of dist is nan"):
            dist_loss(v, z, **{name: math.nan})


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 9.0])
def test_standardised_kd_is_the_kl_of_z_scores(ddof: int, temperature: float) -> None:
    v, z, _ = batch(6, 7)
    scores = [(t - t.mean(axis=1, keepdims=True)) / t.std(axis=1, ddof=ddof, keepdims=True) for t in (z, v)]
    p, q = (softmax(s / temperature) for s in scores)
    found = standardized_kd_loss(
        torch.from_numpy(v), torch.from_numpy(z), temperature=temperature, ddof=ddof, reduction="none"
    )
    assert found.numpy() == pytest.approx(temperature**2 * kl(p, q), rel=1e-9)


def test_standardised_kd_sees_neither_the_range_nor_the_offset_of_logits() -> None:
    v, z, _ = (torch.from_numpy(t) for t in batch(6, 7))
    expected = standardized_kd_loss(v, z)
    assert standardized_kd_loss(5 * v + 3, 0.1 * z - 7).item() == pytest.approx(expected.item(), rel=1e-9)
    # ddof moves the base temperature alone, by sqrt(C / (C - 1)), and the factor with it.
    moved = standardized_kd_loss(v, z, temperature=2.0, ddof=1)
    other = standardized_kd_loss(v, z, temperature=2.0 * math.sqrt(7 / 6), ddof=0) / (7 / 6)
    assert moved.item() == pytest.approx(other.item(), rel=1e-9)


def test_z_scores_have_mean_0_and_deviation_1_over_the_classes_that_are_not_masked() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0, -math.inf], [3.0, 3.0, 3.0, 3.0]])
    scores = standardize(logits)
    assert scores[0, :3].mean().item() == pytest.approx(0, abs=1e-7)
    assert scores[0, :3].std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert scores[0, 3] == -math.inf
    assert (scores[1] == 0).all()
    with pytest.raises(UsageError, match="ddof is 2"):
        standardized_kd_loss(logits, logits, ddof=2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_that_cannot_divide_are_refused(temperature: float) -> None:
    v, z, labels = (torch.from_numpy(t) for t in batch(3, 5))
    for loss in (
        lambda: dkd_loss(v, z, labels, temperature=temperature),
        lambda: dist_loss(v, z, temperature=temperature),
        lambda: standardized_kd_loss(v, z, temperature=temperature),
    ):
        with pytest.raises(UsageError, match="temperature is"):
            loss()


def test_cached_rows_and_plain_logits_give_the_same() -> None:
    v, z, labels = (torch.from_numpy(t) for t in batch(6, 5))
    rows = TeacherRows.from_dense(z.numpy().astype(np.float32))
    assert dist_loss(v, rows) == dist_loss(v, z.float())
    assert dkd_loss(v, rows, labels, temperature=2.0) == dkd_loss(v, z.float(), labels, temperature=2.0)
