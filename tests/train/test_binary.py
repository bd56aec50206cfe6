from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.binary import binary_kd


def test_rows_of_a_one_class_cache_are_taken_with_their_gaps() -> None:
    logits = np.array([[1.0], [-2.0], [0.5]], np.float32)
    rows = replace(TeacherRows.from_dense(logits), has_teacher=np.array([True, False, True]))
    student = torch.tensor([0.3, 0.1, -0.4])
    loss = binary_kd(student, rows, torch.tensor([-1, -1, -1]), alpha=0.5, temperature=1.0)
    expected = binary_kd(student[[0, 2]], torch.from_numpy(logits[[0, 2]]), None, alpha=1.0, temperature=1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_of_several_classes_are_refused() -> None:
    with pytest.raises(MismatchError, match="kd_loss"):
        binary_kd(torch.zeros(3, 2), torch.zeros(3), None, alpha=1.0, temperature=1.0)
    with pytest.raises(UsageError, match="floating point"):
        binary_kd(torch.zeros(3), torch.zeros(3, dtype=torch.int64), None, alpha=1.0, temperature=1.0)
