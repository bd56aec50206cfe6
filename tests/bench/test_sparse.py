"""Cross-entropy and KL on `topk` rows with K = 64, forward and backward, against the dense straightforward form.

Both sides start from what a batch holds: the stored rows on one side, dense float32 teacher logits on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bench_measure import interleaved, ratio, timed
from torch.nn import functional

from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.losses import kd_loss

ALPHA, K = 0.5, 64
STEPS = 10


def straightforward(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """(1 - a) * cross_entropy + a * T * T * kl_div, as tutorials write it."""
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.softmax(teacher / temperature, dim=1),
        reduction="batchmean",
    )
    return (1 - ALPHA) * functional.cross_entropy(student, labels) + ALPHA * temperature**2 * soft


def topk_rows(logits: np.ndarray, labels: np.ndarray) -> TeacherRows:
    encoding = TopK(logits.shape[1:], K, (1.0, 2.0, 4.0), 1)
    rows = TeacherRows.from_dense(logits, label=labels)
    return replace(rows, encoding=encoding, arrays=encoding.encode(logits, labels[:, None]).arrays).tensors()


@pytest.mark.bench
@pytest.mark.parametrize(("rows", "classes"), [(256, 1000), (64, 20_000)])
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_topk_rows_against_the_dense_form(figures: Any, rows: int, classes: int, temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((rows, classes)).astype("f4")
    numbers = rng.integers(0, classes, rows)
    teacher, labels = topk_rows(logits, numbers), torch.from_numpy(numbers)
    dense = torch.from_numpy(logits)
    student = torch.from_numpy(3 * rng.standard_normal((rows, classes)).astype("f4")).requires_grad_()

    def ours() -> torch.Tensor:
        return kd_loss(student, teacher, labels, alpha=ALPHA, temperature=temperature)

    def seconds(loss: Callable[[], torch.Tensor]) -> float:
        def steps() -> None:
            for _ in range(STEPS):
                student.grad = None
                loss().backward()

        return timed(steps) / STEPS

    sides = {"ours": ours, "dense": lambda: straightforward(student, dense, labels, temperature)}
    for loss in sides.values():
        seconds(loss)
    found = interleaved({name: lambda loss=loss: seconds(loss) for name, loss in sides.items()}, repeats=25)
    figures.add(
        f"topk rows (K = {K}), CE + KL, {rows} x {classes}, T = {temperature:g}",
        ratio(found["ours"], found["dense"]),
        "<= 0.5",
        against="dense straightforward form",
    )
