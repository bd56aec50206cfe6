"""Labels of mixed views: the cross-entropy is that of both, by their shares, with and without a teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.utils.data import default_collate

from kdcache.errors import DataError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.losses import cross_entropy, kd_loss, soft_target_kl
from kdcache.train.mixed_labels import MixedLabel, MixedLabels

GENERATOR = torch.Generator().manual_seed(0)
STUDENT = torch.randn(4, 3, generator=GENERATOR)
TEACHER = torch.randn(4, 3, generator=GENERATOR)
FIRST, SECOND = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 1])
RATIO = torch.tensor([0.25, 1.0, 0.5, 0.0])


def plain_cross_entropy(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """By the definition: against the mixed one-hot targets."""
    targets = RATIO[:, None] * functional.one_hot(first, 3) + (1 - RATIO)[:, None] * functional.one_hot(second, 3)
    return -(targets * functional.log_softmax(STUDENT, dim=1)).sum(dim=1)


def mixed_rows() -> TeacherRows:
    rows = TeacherRows.from_dense(TEACHER, label=FIRST)
    return replace(rows, label_b=SECOND, mix_ratio=RATIO)


def test_the_cross_entropy_is_that_of_the_mixed_targets() -> None:
    found = cross_entropy(STUDENT, MixedLabels(FIRST, SECOND, RATIO))
    torch.testing.assert_close(found, plain_cross_entropy(FIRST, SECOND))


def test_rows_of_mixed_views_mix_the_labels_of_the_loss() -> None:
    found = kd_loss(STUDENT, mixed_rows(), FIRST, alpha=0.3, temperature=2.0, reduction="none")
    divergence = soft_target_kl(STUDENT, TEACHER, temperature=2.0)
    torch.testing.assert_close(found, 0.7 * plain_cross_entropy(FIRST, SECOND) + 0.3 * 4 * divergence)


def test_a_row_that_lacks_one_of_its_labels_learns_from_the_teacher_alone() -> None:
    labels = MixedLabels(FIRST, torch.tensor([-1, -1, 0, 1]), RATIO)  # in the second row the first label is all of it
    found = kd_loss(STUDENT, TEACHER, labels, alpha=0.3, temperature=2.0, reduction="none")
    divergence = soft_target_kl(STUDENT, TEACHER, temperature=2.0) * 4
    expected = 0.7 * plain_cross_entropy(FIRST, SECOND.clamp(min=0)) + 0.3 * divergence
    expected[0] = divergence[0]
    torch.testing.assert_close(found, expected)


def test_items_collate_and_move_as_one() -> None:
    labels = default_collate([MixedLabel(0, 2, 0.25), MixedLabel(1, -1, 1.0)])
    assert isinstance(labels, MixedLabels)
    assert labels.first.tolist() == [0, 1]
    assert labels.known.tolist() == [0, 1]
    assert labels.ratio.dtype == torch.float32
    assert len(labels.to("cpu")) == 2


def test_a_second_label_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="labels run from"):
        kd_loss(STUDENT, None, MixedLabels(FIRST, SECOND + 1, RATIO), alpha=0.0, temperature=1.0)


def test_mixed_labels_and_dense_prediction_are_refused() -> None:
    with pytest.raises(UsageError, match="one label a row"):
        kd_loss(STUDENT[:, :, None], None, MixedLabels(FIRST, SECOND, RATIO), alpha=0.0, temperature=1.0)


def test_rows_keep_their_second_labels_through_taking_and_joining() -> None:
    from kdcache.train.rows import TeacherRow, collate_rows

    rows = mixed_rows()
    part = collate_rows([TeacherRow(rows, 2), TeacherRow(rows, 0)])
    assert part.label_b is not None
    assert part.label_b.tolist() == [0, 2]
    other = TeacherRows.from_dense(TEACHER, label=FIRST)
    both = collate_rows([TeacherRow(rows, 0), TeacherRow(other, 1)])
    assert both.label_b is not None
    assert both.mix_ratio is not None
    assert (both.label_b.tolist(), both.mix_ratio.tolist()) == ([2, -1], [0.25, 1.0])
