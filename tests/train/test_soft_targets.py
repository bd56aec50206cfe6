from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.soft_targets import pseudo_labels, soft_targets

LOGITS = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_soft_targets_are_the_softmax_of_the_raw_logits(temperature: float) -> None:
    expected = np.exp(LOGITS.astype(np.float64) / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    for teacher in (torch.from_numpy(LOGITS), TeacherRows.from_dense(LOGITS)):
        found = soft_targets(teacher, temperature=temperature)
        assert found.shape == (4, 3, 2)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32 has 24 bits


def test_pseudo_labels_are_missing_where_the_teacher_is() -> None:
    rows = replace(TeacherRows.from_dense(LOGITS), has_teacher=np.array([True, False, True, True]))
    labels = pseudo_labels(rows)
    assert labels.shape == (4, 2)
    assert (labels[1] == -1).all()
    assert (labels[[0, 2, 3]].numpy() == LOGITS[[0, 2, 3]].argmax(axis=1)).all()


def test_a_one_class_teacher_is_refused() -> None:
    with pytest.raises(UsageError, match="binary_kd"):
        soft_targets(torch.zeros(3, 1))
