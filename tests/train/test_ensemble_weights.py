"""The weights of each rule, against their formulas in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from topk_rows import rows_of
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.ensemble_rules import RULES, Rule, parse_rule
from kdcache.train.ensemble_weights import Skill, random_teacher, weights_of
from kdcache.train.mixed_labels import MixedLabels

ROWS, CLASSES, TEACHERS = 9, 5, 3
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = [torch.randn(ROWS, CLASSES, generator=GENERATOR) * scale for scale in (1.0, 3.0, 6.0)]
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=GENERATOR)
GIVEN = [TeacherRows.from_dense(z, label=LABELS) for z in LOGITS]
BASE = (1.0, 2.0, 0.5)
SKILL = Skill((0.9, 0.5, 0.7), (0.4, 1.5, 2.0), ((0.9,) * 5, (0.1, 0.9, 0.5, 0.5, 0.5), (0.5,) * 5), (50, 50, 50))


def softmax(z: Tensor) -> np.ndarray:
    found: np.ndarray = z.double().softmax(dim=1).numpy()
    return found


def normalised(weights: np.ndarray) -> np.ndarray:
    found: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return found


def expected(name: str) -> np.ndarray:
    """(N, M) by the formulas of `ensemble_rules`."""
    p = np.stack([softmax(z) for z in LOGITS])  # (M, N, C)
    base = np.array(BASE)[None, :]
    if name in ("logits", "soft-targets"):
        return normalised(np.repeat(base, ROWS, axis=0))
    if name == "accuracy":
        votes = [math.log(a / (1 - a)) + math.log(CLASSES - 1) for a in SKILL.accuracy]
        return normalised(np.repeat(base * np.maximum(votes, 0), ROWS, axis=0))
    if name == "calibration":
        return normalised(np.repeat(base * np.exp(-np.array(SKILL.nll)), ROWS, axis=0))
    if name == "entropy":
        return normalised(base * np.exp((p * np.log(p)).sum(axis=2)).T)
    if name == "cross-entropy":
        loss = -np.log(p[:, np.arange(ROWS), LABELS.numpy()]).T
        return normalised(base * (1 - np.exp(loss) / np.exp(loss).sum(axis=1, keepdims=True)))
    best = p.max(axis=2).argmax(axis=0)
    return np.eye(TEACHERS)[best]


@pytest.mark.parametrize(
    "name",
    ["logits", "soft-targets", "accuracy", "calibration", "entropy", "cross-entropy", "route:max-confidence"],
)
def test_weights_are_those_of_the_formula(name: str) -> None:
    found = weights_of(Rule(name), GIVEN, BASE, LABELS, skill=SKILL)
    np.testing.assert_allclose(found.numpy(), expected(name), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", [rule for rule in RULES if rule != "route:FILE.csv"])
@given(scale=st.sampled_from([0.25, 0.5, 2.0, 1024.0]))
def test_only_the_ratios_of_the_fixed_weights_count(name: str, scale: float) -> None:
    first = weights_of(Rule(name), GIVEN, BASE, LABELS, skill=SKILL)
    second = weights_of(Rule(name), GIVEN, [scale * one for one in BASE], LABELS, skill=SKILL)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", [rule for rule in RULES if rule != "route:FILE.csv"])
def test_a_teacher_that_lacks_a_row_has_no_vote_and_the_rest_sum_to_one(name: str) -> None:
    given_rows = [TeacherRows.from_dense(z, label=LABELS) for z in LOGITS]
    given_rows[1].has_teacher[:4] = False
    for rows in given_rows:
        rows.has_teacher[0] = False
    found = weights_of(Rule(name), given_rows, BASE, LABELS, skill=SKILL)
    assert (found[:4, 1] == 0).all()
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1:].sum(dim=1), torch.ones_like(found[1:].sum(dim=1)))
    given_rows[0].has_teacher[1], given_rows[2].has_teacher[1] = False, False
    given_rows[1].has_teacher[1] = True
    alone = weights_of(Rule(name), given_rows, BASE, LABELS, skill=SKILL)
    assert (alone[1, 1] == 1).all()


def test_class_weights_are_of_each_class() -> None:
    found = weights_of(Rule("class-accuracy"), GIVEN, BASE, None, skill=SKILL)
    weights = np.array(SKILL.of_class) * np.array(BASE)[:, None]
    np.testing.assert_allclose(found.numpy(), np.repeat((weights / weights.sum(axis=0))[None], ROWS, 0), rtol=1e-5)


def test_a_route_takes_one_teacher_and_where_that_lacks_the_row_the_others() -> None:
    routes = np.arange(ROWS) % TEACHERS
    given_rows = [TeacherRows.from_dense(z) for z in LOGITS]
    given_rows[0].has_teacher[0] = False
    found = weights_of(Rule("route:FILE.csv", "x.csv"), given_rows, BASE, None, routes=routes)
    assert torch.equal(found[1:], torch.eye(TEACHERS)[torch.from_numpy(routes)[1:]])
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.8, 0.2]))


def test_the_random_teacher_depends_on_seed_step_and_weights_alone() -> None:
    drawn = [random_teacher(BASE, 7, step) for step in range(2000)]
    assert drawn == [random_teacher(BASE, 7, step) for step in range(2000)]
    assert drawn != [random_teacher(BASE, 8, step) for step in range(2000)]
    shares = np.bincount(drawn, minlength=TEACHERS) / len(drawn)
    np.testing.assert_allclose(shares, np.array(BASE) / sum(BASE), atol=0.05)
    found = weights_of(Rule("random"), GIVEN, BASE, None, draw=(7, 3))
    assert torch.equal(found, torch.eye(TEACHERS)[[drawn[3]]].repeat(ROWS, 1))


def test_rows_without_a_label_take_the_fixed_weights() -> None:
    labels = LABELS.clone()
    labels[2] = -1
    found = weights_of(Rule("cross-entropy"), GIVEN, BASE, labels)
    torch.testing.assert_close(found[2], torch.tensor(BASE) / sum(BASE))
    torch.testing.assert_close(weights_of(Rule("cross-entropy"), GIVEN, BASE, None)[2], found[2])


def test_a_label_of_probability_zero_takes_the_vote_away() -> None:
    logits = [LOGITS[0].clone(), LOGITS[1].clone()]
    logits[0][torch.arange(ROWS), LABELS] = -math.inf
    given_rows = [TeacherRows.from_dense(z) for z in logits]
    found = weights_of(Rule("cross-entropy"), given_rows, (1.0, 1.0), LABELS)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]).repeat(ROWS, 1))


def test_sparse_rows_serve_confidence_and_cross_entropy_exactly() -> None:
    labels = LABELS.numpy()
    sparse = [rows_of(z.numpy(), k=2, labels=(labels,)) for z in LOGITS]
    for name in ("cross-entropy", "route:max-confidence"):
        found = weights_of(Rule(name), sparse, BASE, LABELS)
        torch.testing.assert_close(found, weights_of(Rule(name), GIVEN, BASE, LABELS), rtol=5e-3, atol=2e-3)


def test_labels_of_mixed_inputs_have_no_single_cross_entropy() -> None:
    mixed = MixedLabels(LABELS, LABELS, torch.full((ROWS,), 0.5))
    with pytest.raises(UsageError, match="mixed views have two"):
        weights_of(Rule("cross-entropy"), GIVEN, BASE, mixed)


def test_teachers_at_chance_have_nothing_to_weigh_by() -> None:
    with pytest.raises(UsageError, match="no teacher is better than chance"):
        Skill((0.1, 0.2), None, None, (9, 9)).weights(Rule("accuracy"), CLASSES)


@pytest.mark.parametrize("text", ["", "mean", "route:", "route:x.txt", "route:.csv", "Logits", "route:FILE"])
def test_another_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not known; choose one of logits"):
        parse_rule(text)


def test_rules_are_parsed_and_shown_as_they_were_given() -> None:
    for text in (*[rule for rule in RULES if rule != "route:FILE.csv"], "route:a/b.csv"):
        assert str(parse_rule(text)) == text
    assert parse_rule("route:which.csv").file == "which.csv"
