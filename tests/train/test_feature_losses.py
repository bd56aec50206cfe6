"""Losses on features: values against plain NumPy, gradients, weights, and rows that do not count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kdcache.errors import MismatchError, UsageError
from kdcache.format.factored import Factored
from kdcache.store.rows import TeacherRows
from kdcache.train.feature_losses import (
    FeatureMSE,
    feature_cosine,
    feature_mse,
    relational_distance,
    teacher_features,
)

ROWS, WIDTH = 7, 5
LOSSES = [feature_cosine, feature_mse, relational_distance]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(inputs: Tensor) -> TeacherRows:
    """Rows as a cache gives them; feature losses need no head."""
    encoding = Factored((3,), inputs.shape[1], "0" * 64)
    rows = TeacherRows.from_dense(np.zeros((len(inputs), 3), np.float32))
    return replace(rows, encoding=encoding, arrays=encoding.encode_features(inputs.numpy()).arrays)


def plain_relational(student: np.ndarray, teacher: np.ndarray) -> float:
    """Park et al. 2019, equations 4 to 6, with the mean over pairs of different samples."""

    def relative(features: np.ndarray) -> np.ndarray:
        distances = np.sqrt(((features[:, None] - features) ** 2).sum(-1))
        return distances / distances[~np.eye(len(features), dtype=bool)].mean()

    apart = np.abs(relative(student) - relative(teacher))
    huber = np.where(apart <= 1, apart**2 / 2, apart - 0.5)
    return float(huber[~np.eye(len(student), dtype=bool)].mean())


def test_the_cosine_is_that_of_torch() -> None:
    student, teacher = draw(ROWS, WIDTH), draw(ROWS, WIDTH, seed=1)
    expected = functional.cosine_embedding_loss(student, teacher, torch.ones(ROWS))
    assert torch.isclose(feature_cosine(student, teacher), expected, rtol=1e-12)


def test_the_mean_square_is_that_of_torch() -> None:
    student, teacher = draw(ROWS, WIDTH), draw(ROWS, WIDTH, seed=1)
    assert torch.isclose(feature_mse(student, teacher), functional.mse_loss(student, teacher), rtol=1e-12)


@pytest.mark.parametrize("width", [2, WIDTH, 40])
def test_the_relational_distance_is_that_of_the_paper(width: int) -> None:
    student, teacher = draw(ROWS, width), draw(ROWS, WIDTH, seed=1).exp()
    expected = plain_relational(student.numpy(), teacher.numpy())
    assert relational_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_relations_do_not_see_scale_shift_or_rotation() -> None:
    teacher = draw(ROWS, WIDTH)
    rotation, _ = torch.linalg.qr(draw(WIDTH, WIDTH, seed=2))
    assert relational_distance(3 * teacher @ rotation + 5, teacher).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_value(loss: object) -> None:
    student, teacher = draw(ROWS, WIDTH).requires_grad_(), draw(ROWS, WIDTH, seed=1)
    weight = draw(ROWS, seed=2).abs()
    assert callable(loss)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, sample_weight=weight), (student,))


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_without_a_teacher_or_weight_change_nothing(loss: object) -> None:
    assert callable(loss)
    student, teacher = draw(ROWS, WIDTH), draw(ROWS, WIDTH, seed=1)
    rows = factored(teacher)
    alone = loss(student[:4], rows.take(slice(0, 4)))
    has_teacher = np.arange(ROWS) < 4
    assert torch.isclose(loss(student, replace(rows, has_teacher=has_teacher)), alone, rtol=1e-12)
    weight = torch.from_numpy(has_teacher.astype(np.float64))
    assert torch.isclose(loss(student, rows, sample_weight=3 * weight), alone, rtol=1e-12)


@pytest.mark.parametrize("loss", [feature_cosine, feature_mse])  # among rows that are copies, distances are 0
def test_a_whole_weight_is_as_many_rows(loss: object) -> None:
    assert callable(loss)
    student, teacher = draw(3, WIDTH), draw(3, WIDTH, seed=1)
    weight = torch.tensor([1.0, 2.0, 3.0])
    repeated = torch.tensor([0, 1, 1, 2, 2, 2])
    whole = loss(student[repeated], teacher[repeated])
    assert torch.isclose(loss(student, teacher, sample_weight=weight), whole, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_add_up_to_the_sum_and_a_batch_of_none_is_zero(loss: object) -> None:
    assert callable(loss)
    student, teacher = draw(ROWS, WIDTH).requires_grad_(), draw(ROWS, WIDTH, seed=1)
    each = loss(student, teacher, reduction="none")
    assert each.shape == (ROWS,)
    assert torch.isclose(each.sum(), loss(student, teacher, reduction="sum"))
    assert torch.isclose(each.mean(), loss(student, teacher))
    none = loss(student, replace(factored(teacher), has_teacher=np.zeros(ROWS, bool)))
    none.backward()
    assert none.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_samples_give_finite_gradients(loss: object) -> None:
    assert callable(loss)
    student = torch.zeros(ROWS, WIDTH, requires_grad=True)
    loss(student, torch.zeros(ROWS, WIDTH)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_students_are_computed_in_float32(loss: object) -> None:
    assert callable(loss)
    student, teacher = draw(ROWS, WIDTH).bfloat16(), draw(ROWS, WIDTH, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, factored(teacher))
    assert value.dtype == torch.float32
    assert torch.isclose(value, loss(student.float(), factored(teacher)), rtol=1e-6)


def test_the_projection_learns_and_moves_with_its_module() -> None:
    torch.manual_seed(0)
    criterion = FeatureMSE(3, WIDTH)
    student = draw(64, 3).float()
    teacher = student @ draw(3, WIDTH, seed=1).float() + 1
    assert len(list(criterion.parameters())) == 2
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.05)
    first = criterion(student, teacher).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * first


def test_no_gradient_flows_into_the_teacher() -> None:
    teacher = draw(ROWS, WIDTH).requires_grad_()
    feature_mse(draw(ROWS, WIDTH, seed=1).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_features_of_rows_are_what_was_stored() -> None:
    inputs = draw(ROWS, WIDTH).float()
    found = teacher_features(factored(inputs))
    assert found.values.dtype == torch.float32
    assert torch.allclose(found.values, inputs, rtol=2**-11)


def test_what_cannot_be_meant_is_refused() -> None:
    student = draw(ROWS, WIDTH)
    with pytest.raises(UsageError, match="--factored"):
        feature_mse(student, TeacherRows.from_dense(torch.zeros(ROWS, 3)))
    with pytest.raises(MismatchError, match="FeatureMSE"):
        feature_mse(student, draw(ROWS, WIDTH + 1))
    with pytest.raises(MismatchError, match="7 rows"):
        relational_distance(student, draw(ROWS + 1, WIDTH))
    with pytest.raises(UsageError, match=r"\(N, D\)"):
        feature_cosine(student[0], student)
    with pytest.raises(UsageError, match=r"\(N, D\)"):
        feature_cosine(student, torch.zeros(ROWS, WIDTH, dtype=torch.int64))
    with pytest.raises(UsageError, match="at least 1"):
        FeatureMSE(0, 3)
    with pytest.raises(UsageError, match=r"\(N, 4\)"):
        FeatureMSE(4, WIDTH)(student, student)
    with pytest.raises(UsageError, match="reduction"):
        feature_mse(student, student, reduction="max")  # type: ignore[arg-type]
