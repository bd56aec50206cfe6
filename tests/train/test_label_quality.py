"""Scores and issues of labels: against plain NumPy on all logits, against cleanlab, and what cannot be answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from view_caches import Images, write_views

import kdcache
from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.train import label_quality as module
from kdcache.train.label_quality import LabelQuality, label_quality
from kdcache.train.pipelines import named

ROWS, CLASSES = 600, 7


@dataclass(frozen=True, eq=False)
class Noisy:
    """Logits (N, C) of a fair teacher, and labels (N,) of which some are wrong and some are missing."""

    logits: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module")
def noisy() -> Noisy:
    rng = np.random.default_rng(0)
    true = rng.integers(0, CLASSES, ROWS)
    logits = rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
    logits[np.arange(ROWS), true] += 3
    labels = np.where(rng.random(ROWS) < 0.2, rng.integers(0, CLASSES, ROWS), true)
    labels[::10] = -1
    return Noisy(logits, labels)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(logits: np.ndarray, labels: np.ndarray | None, **settings: Any) -> Path:
        path = tmp_path / "cache"
        settings = {"classes": logits.shape[1], "shard_rows": 250, **settings}
        with kdcache.Writer(path, **settings) as writer:
            writer.write(np.arange(len(logits)), logits, labels)
        return path

    return make


def stored_probabilities(path: Path, temperature: float = 1.0) -> np.ndarray:
    """(N, C) float64 of a cache with all logits."""
    with kdcache.open(path) as cache:
        z = cache.gather(np.arange(len(cache))).dense().astype(np.float64) / temperature
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def by_hand(p: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Self-confidence, margin, thresholds, guesses and issues, a row at a time; for rows that all have a label."""
    own = p[np.arange(len(p)), labels]
    other = np.array([max(np.delete(row, label)) for row, label in zip(p, labels, strict=True)])
    thresholds = np.array([p[labels == j, j].mean() if (labels == j).any() else np.inf for j in range(p.shape[1])])
    guesses = []
    for row in p:
        confident = np.flatnonzero(row >= thresholds - 1e-6)
        guesses.append(-1 if not len(confident) else confident[0] if len(confident) == 1 else row.argmax())
    guess = np.array(guesses)
    issue = (guess >= 0) & (guess != labels) & (other > own + 1e-6)
    return own, (own - other + 1) / 2, thresholds, guess, issue


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_and_issues_are_those_of_a_loop_over_rows(
    noisy: Noisy, write: Callable[..., Path], dtype: str, temperature: float
) -> None:
    path = write(noisy.logits, noisy.labels, dtype=dtype)
    found = label_quality(path, temperature=temperature)
    p, known = stored_probabilities(path, temperature), noisy.labels >= 0
    own, margin, thresholds, guess, issue = by_hand(p[known], noisy.labels[known])
    np.testing.assert_allclose(found.self_confidence[known], own, atol=1e-6)
    np.testing.assert_allclose(found.margin[known], margin, atol=1e-6)
    np.testing.assert_allclose(found.thresholds, thresholds, atol=1e-6)
    np.testing.assert_allclose(found.teacher_confidence, p.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(found.guess[known], guess)
    np.testing.assert_array_equal(found.is_issue[known], issue)
    np.testing.assert_array_equal(found.teacher_class, p.argmax(axis=1))
    assert 0 < issue.sum() < 200
    assert np.isnan(found.self_confidence[~known]).all()
    assert (found.guess[~known] == -1).all()
    assert not found.is_issue[~known].any()
    assert found.undecided == 0


def test_the_joint_counts_the_guesses_by_label(noisy: Noisy, write: Callable[..., Path]) -> None:
    found = label_quality(write(noisy.logits, noisy.labels))
    joint = found.joint()
    assert joint.sum() == (found.guess >= 0).sum()
    assert joint[2, 4] == ((found.label == 2) & (found.guess == 4)).sum()


def test_small_blocks_give_the_same(noisy: Noisy, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(noisy.logits, noisy.labels)
    whole = label_quality(path)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 50)
    seen: list[int] = []
    pieces = label_quality(path, progress=seen.append)
    assert max(seen) <= 7
    assert sum(seen) == 2 * ROWS
    for name in ("sample_id", "label", "self_confidence", "margin", "guess", "is_issue", "thresholds"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))


@pytest.mark.parametrize("k", [1, 2, 5, CLASSES])
def test_top_k_rows_tell_the_same_but_where_they_say_that_they_cannot(
    noisy: Noisy, write: Callable[..., Path], k: int, tmp_path: Path
) -> None:
    path = write(noisy.logits, noisy.labels)
    kdcache.convert(path, tmp_path / "sparse", top_k=k, temperatures=(1.0, 2.0))
    for temperature in (1.0, 2.0):
        dense, sparse = (label_quality(p, temperature=temperature) for p in (path, tmp_path / "sparse"))
        # A float16 logit below the largest, the same in both but for one rounding of it.
        np.testing.assert_allclose(sparse.self_confidence, dense.self_confidence, atol=2e-3)
        np.testing.assert_array_equal(sparse.teacher_class, dense.teacher_class)
        told = ~np.isnan(sparse.margin)
        np.testing.assert_allclose(sparse.margin[told], dense.margin[told], atol=2e-3)
        known = noisy.labels >= 0
        assert told[known].all() == (k > 1)
        assert ((sparse.guess != dense.guess) & known).sum() <= sparse.undecided
    assert k < CLASSES or sparse.undecided == 0


def test_a_class_that_is_not_kept_and_could_be_the_confident_one_is_counted(write: Callable[..., Path]) -> None:
    # Class 2 has a low threshold (its own row supports it badly), and rows 0-1 keep class 0 alone.
    logits = np.float32([[2, 0, 1.9], [2, 0, 1.9], [9, 0, 0], [0, 9, 0], [3, 0, 1]])
    labels = np.array([0, 0, 0, 1, 2])
    exact = label_quality(write(logits, labels))
    assert exact.guess[:2].tolist() == [2, 2]
    assert exact.undecided == 0


def test_undecided_rows_are_counted(tmp_path: Path) -> None:
    logits = np.float32([[2, 0, 1.9], [2, 0, 1.9], [9, 0, 0], [0, 9, 0], [3, 0, 1]])
    with kdcache.Writer(tmp_path / "sparse", classes=3, top_k=1) as writer:
        writer.write(np.arange(5), logits, np.array([0, 0, 0, 1, 2]))
    found = label_quality(tmp_path / "sparse")
    assert found.guess[:2].tolist() == [-1, -1]
    assert found.undecided == 2


def test_a_class_without_labelled_rows_is_nobody_s_guess(noisy: Noisy, write: Callable[..., Path]) -> None:
    labels = np.where(noisy.labels == 3, -1, noisy.labels)
    found = label_quality(write(noisy.logits, labels))
    assert found.thresholds[3] == np.inf
    assert not (found.guess == 3).any()


def test_masked_classes_have_no_probability(write: Callable[..., Path]) -> None:
    logits = np.float32([[1, -np.inf, 0], [0, -np.inf, 2]])
    found = label_quality(write(logits, np.array([1, 2]), dtype="float32"))
    assert found.self_confidence[0] == 0
    assert found.is_issue.tolist() == [False, False]  # nobody is confident of class 0, which has no label


def test_the_view_is_chosen_by_its_number(tmp_path: Path) -> None:
    path = write_views(tmp_path / "views", Images(40), named("noise"), (1, 4)).path
    first, second = (label_quality(path, view=view) for view in (None, 4))
    assert (first.view, second.view) == (1, 4)
    with kdcache.open(path) as cache:
        for slot, found in enumerate((first, second)):
            rows = cache.gather(np.arange(40) + 40 * slot)
            np.testing.assert_array_equal(found.teacher_class, rows.dense().argmax(axis=1))
            np.testing.assert_array_equal(found.sample_id, rows.sample_id)
    with pytest.raises(MismatchError, match=r"has the views \[1, 4\], not 2"):
        label_quality(path, view=2)


def test_mixed_views_are_refused(tmp_path: Path) -> None:
    path = write_views(tmp_path / "views", Images(8), named("mixup1"), (0,)).path
    with pytest.raises(UsageError, match="mixed views"):
        label_quality(path)


@pytest.mark.parametrize(
    ("shape", "labelled", "settings", "call", "error", "message"),
    [
        ((9, 3), False, {}, {}, UsageError, "holds no labels"),
        ((9, 1), True, {}, {}, UsageError, "of one class"),
        ((9, 3, 2, 2), False, {}, {}, UsageError, "dense prediction"),
        ((9, 3), True, {}, {"temperature": 0.0}, UsageError, "temperature is 0.0"),
        ((9, 3), True, {"top_k": 2}, {"temperature": 3.0}, UsageError, r"exact at the temperatures \[1.0, 2.0, 4.0\]"),
    ],
)
def test_what_cannot_be_answered_is_an_error(
    write: Callable[..., Path],
    shape: tuple[int, ...],
    labelled: bool,
    settings: dict[str, Any],
    call: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = write(np.zeros(shape, np.float32), np.zeros(9, np.int64) if labelled else None, **settings)
    with pytest.raises(error, match=message):
        label_quality(path, **call)


def test_rows_without_any_label_are_an_error(write: Callable[..., Path]) -> None:
    path = write(np.zeros((9, 3), np.float32), np.full(9, -1))
    with pytest.raises(DataError, match="no row of cache"):
        label_quality(path)


def test_a_joint_that_is_too_large_is_refused() -> None:
    empty = np.empty(0, np.int32)
    quality = LabelQuality(*[empty] * 8, np.zeros(20_000), 0, 0)
    with pytest.raises(UsageError, match="20,000 classes"):
        quality.joint()


@pytest.mark.interop("cleanlab")
@pytest.mark.parametrize("dtype", ["float16", "float32", "int4"])
def test_all_of_it_agrees_with_cleanlab(noisy: Noisy, write: Callable[..., Path], dtype: str) -> None:
    count, rank = pytest.importorskip("cleanlab.count"), pytest.importorskip("cleanlab.rank")
    filters = pytest.importorskip("cleanlab.filter")
    path = write(noisy.logits, noisy.labels, dtype=dtype)
    found, known = label_quality(path), noisy.labels >= 0
    p, labels = stored_probabilities(path)[known], noisy.labels[known]
    confidence = rank.get_self_confidence_for_each_label(labels, p)
    np.testing.assert_allclose(found.self_confidence[known], confidence, atol=1e-6)
    margin = rank.get_normalized_margin_for_each_label(labels, p)
    np.testing.assert_allclose(found.margin[known], margin, atol=1e-6)
    joint = found.joint()
    np.fill_diagonal(joint, joint.diagonal().clip(min=1))
    np.testing.assert_array_equal(joint, count.compute_confident_joint(labels, p, calibrate=False))
    issues = filters.find_label_issues(labels, p, filter_by="confident_learning", n_jobs=1)
    np.testing.assert_array_equal(found.is_issue[known], issues)
    assert issues.sum() > 20
