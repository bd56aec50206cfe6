"""Means of several teachers' rows, against NumPy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import is_kept, rows_of
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.rows import TeacherRows
from kdcache.train.ensemble_mean import mean_logits, mean_soft_targets

ROWS, CLASSES = 7, 6
seeds = st.integers(0, 2**31)


def logits_of(seed: int, teachers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, CLASSES, generator=generator) * 4 for _ in range(teachers)]


def rows_with(logits: Tensor) -> TeacherRows:
    return TeacherRows.from_dense(logits)


def equal(teachers: int) -> Tensor:
    return torch.full((ROWS, teachers), 1 / teachers)


def weights_of(seed: int, teachers: int) -> Tensor:
    found = torch.rand(ROWS, teachers, generator=torch.Generator().manual_seed(seed)) + 0.01
    return found / found.sum(dim=1, keepdim=True)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def dense_mean(logits: list[Tensor], weights: Tensor, temperature: float) -> np.ndarray:
    parts = [softmax(z.double().numpy() / temperature) for z in logits]
    return sum(w[:, None] * p for w, p in zip(weights.double().numpy().T, parts, strict=True))


def soft(temperature: float, k: int = CLASSES) -> SoftTargets:
    return SoftTargets((CLASSES,), temperature, k)


@given(seeds)
def test_the_mean_of_one_is_that_one_bit_for_bit(seed: int) -> None:
    (z,) = logits_of(seed, 1)
    assert torch.equal(mean_logits([z], torch.ones(ROWS, 1)), z)
    found = mean_soft_targets([rows_with(z)], torch.ones(ROWS, 1), soft(3.0))["log_probs"]
    assert torch.equal(found, (z / 3.0).log_softmax(dim=1))
    others = [z, *logits_of(seed + 1, 2)]
    alone = torch.tensor([[1.0, 0.0, 0.0]]).repeat(ROWS, 1)
    assert torch.equal(mean_logits(others, alone), z)
    found = mean_soft_targets([rows_with(one) for one in others], alone, soft(3.0))["log_probs"]
    assert torch.equal(found, (z / 3.0).log_softmax(dim=1))


@given(seeds, st.sampled_from([0.5, 1.0, 4.0, 20.0]))
def test_the_mean_of_soft_targets_is_numpys(seed: int, temperature: float) -> None:
    logits, weights = logits_of(seed), weights_of(seed, 3)
    found = mean_soft_targets([rows_with(z) for z in logits], weights, soft(temperature))["log_probs"]
    np.testing.assert_allclose(found.exp().numpy(), dense_mean(logits, weights, temperature), rtol=2e-5, atol=1e-7)


@given(seeds)
def test_the_order_of_teachers_does_not_matter_with_equal_weights(seed: int) -> None:
    logits = logits_of(seed)
    for one, other in (
        (mean_logits(logits, equal(3)), mean_logits(logits[::-1], equal(3))),
        *(
            [
                mean_soft_targets([rows_with(z) for z in part], equal(3), soft(2.0))["log_probs"]
                for part in (logits, logits[::-1])
            ],
        ),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_sparse_mean_is_the_dense_mean_summed_up(
    seed: int, first_k: int, second_k: int, with_labels: bool, with_dense: bool
) -> None:
    logits = logits_of(seed, 3 if with_dense else 2)
    labels = np.random.default_rng(seed).integers(-1, CLASSES, ROWS)
    wanted = (labels,) if with_labels else ()
    kept = [logits[0].half().float(), logits[1].half().float()]
    given_rows = [rows_of(z.numpy(), k=k, labels=wanted) for z, k in zip(kept, (first_k, second_k), strict=True)]
    # float16 relative to the largest is what topk rows hold: the dense rows that they stand for.
    dense = [exact_of(rows, z) for rows, z in zip(given_rows, kept, strict=True)]
    common = is_kept(given_rows[0]) & is_kept(given_rows[1])
    if with_dense:
        given_rows.append(rows_with(logits[2]))
        dense.append(logits[2])
    k = min(first_k + len(wanted), second_k + len(wanted), CLASSES - 1)
    weights = weights_of(seed, len(dense))
    found = mean_soft_targets(given_rows, weights, soft(2.0, k))
    mean = dense_mean(dense, weights, 2.0)
    p, classes = found["log_probs"].exp().numpy(), found["kept_classes"].numpy()
    for row in range(ROWS):
        is_there = ~np.isneginf(found["log_probs"][row].numpy())
        own = classes[row][is_there]
        assert len(set(own.tolist())) == len(own) == min(k, int(common[row].sum()))
        assert common[row][own].all()
        np.testing.assert_allclose(p[row][is_there], mean[row][own], rtol=5e-3, atol=1e-6)
        np.testing.assert_allclose(math.exp(found["log_rest"][row]), 1 - mean[row][own].sum(), atol=2e-3)
    total = p.sum(axis=1) + found["log_rest"].exp().numpy()
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert soft(2.0, k).flaw(soft(2.0, k).from_log_probs({n: v.numpy() for n, v in found.items()})) is None


def exact_of(rows: TeacherRows, logits: Tensor) -> Tensor:
    """The logits with those that are kept rounded as they are stored."""
    z = logits.clone()
    top = rows.arrays["row_max"][:, None]
    z.scatter_(1, rows.arrays["topk_classes"].long(), rows.arrays["topk_logits"].float() + top)
    return z


def test_a_teacher_without_a_vote_adds_nothing_even_where_it_masks_classes() -> None:
    first, second = logits_of(1, 2)
    second[:, 2] = -math.inf
    alone = torch.tensor([[1.0, 0.0]]).repeat(ROWS, 1)
    assert torch.equal(mean_logits([first, second], alone), first)
    both = mean_logits([first, second], equal(2))
    assert torch.isneginf(both[:, 2]).all()
    assert torch.isfinite(both[:, :2]).all()
    rows = [rows_with(first), rows_with(second)]
    found = mean_soft_targets(rows, equal(2), soft(1.0))["log_probs"].exp()
    torch.testing.assert_close(found[:, 2], first.softmax(dim=1)[:, 2] / 2)


def test_rows_that_no_teacher_has_are_zeros() -> None:
    logits, weights = logits_of(2, 2), equal(2)
    weights[3] = 0
    sparse = rows_of(logits[0].numpy(), k=2)
    for encoding, rows in ((soft(2.0), [rows_with(z) for z in logits]), (soft(2.0, 2), [sparse, rows_with(logits[1])])):
        for array in mean_soft_targets(rows, weights, encoding).values():
            assert torch.isfinite(array[3].float()).all()
            assert (array[3] == array[3].reshape(-1)[0]).all()


def test_classes_have_weights_of_their_own_and_the_row_sums_to_one() -> None:
    logits = logits_of(3, 2)
    weights = torch.rand(ROWS, 2, CLASSES, generator=torch.Generator().manual_seed(1))
    weights = weights / weights.sum(dim=1, keepdim=True)
    found = mean_soft_targets([rows_with(z) for z in logits], weights, soft(2.0))["log_probs"].exp().double()
    plain = sum(weights[:, n].double() * (z.double() / 2).softmax(dim=1) for n, z in enumerate(logits))
    torch.testing.assert_close(found, plain / plain.sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_topk_rows_serve_a_stored_temperature_alone() -> None:
    rows: list[Any] = [rows_of(z.numpy(), k=2) for z in logits_of(4, 2)]
    with pytest.raises(
        UsageError, match="needs the tail of the topk rows of teacher 1 at that temperature, and they hold"
    ):
        mean_soft_targets(rows, equal(2), soft(3.0, 2))


def test_dense_prediction_has_a_mean_at_each_position() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(ROWS, CLASSES, 2, 3, generator=generator) for _ in range(2)]
    weights = weights_of(5, 2)
    encoding = SoftTargets((CLASSES, 2, 3), 2.0, CLASSES)
    found = mean_soft_targets([rows_with(z) for z in logits], weights, encoding)["log_probs"]
    one = mean_soft_targets([rows_with(z[:, :, 1, 2]) for z in logits], weights, soft(2.0))["log_probs"]
    torch.testing.assert_close(found[:, :, 1, 2], one)
    assert mean_logits(logits, weights).shape == logits[0].shape


def test_a_class_that_a_teacher_gives_no_mass_may_be_common() -> None:
    first, second = logits_of(6, 2)
    first[:, :4] = -math.inf  # two classes have a mass, and three are kept
    rows = [rows_of(first.numpy(), k=3), replace(rows_with(second))]
    found = mean_soft_targets(rows, equal(2), soft(2.0, 3))
    kept = torch.from_numpy(rows[0].arrays["topk_classes"].numpy().astype(np.int64))
    assert [set(row) for row in found["kept_classes"].tolist()] == [set(row) for row in kept.tolist()]
