"""The KL against an even tail, against the distribution that it stands for, written out class by class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from topk_rows import is_kept, rows_of
from torch import Tensor

from kdcache.store.rows import TeacherRows
from kdcache.train.losses import spread_kl_loss
from kdcache.train.sparse import topk_pair


def even(rows: TeacherRows, temperature: float) -> Tensor:
    """(N, C, ...) float64: the kept classes with their probabilities, the tail's mass shared by all others."""
    kept = torch.from_numpy(is_kept(rows))
    student = torch.zeros(kept.shape, dtype=torch.float64)
    bucket = topk_pair(student, rows, temperature=temperature).log_p[:, -1].exp()
    top = rows.arrays["topk_logits"].double()
    exact = torch.full(kept.shape, -torch.inf, dtype=torch.float64)
    exact.scatter_(1, rows.arrays["topk_classes"].long(), top)
    if rows.label is not None:
        at = torch.nonzero(rows.label >= 0)[:, 0]
        exact[at, rows.label[at]] = rows.arrays["label_logits"][at, 0].double()
    head = torch.softmax(exact / temperature, dim=1) * (1 - bucket).unsqueeze(1)
    left = (~kept).sum(dim=1).clamp(min=1)
    return torch.where(kept, head, (bucket / left).unsqueeze(1).expand(kept.shape))


@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 40),
    k=st.integers(1, 40),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    labelled=st.booleans(),
    pixels=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_even_tail(
    seed: int, classes: int, k: int, temperature: float, labelled: bool, pixels: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (6, classes, 2, 3) if pixels else (6, classes)
    labels = [] if pixels or not labelled else [rng.integers(-1, classes, 6)]
    rows = rows_of(rng.normal(size=shape).astype(np.float32) * 3, k=min(k, classes), labels=labels)
    student = torch.from_numpy(rng.normal(size=shape)).requires_grad_()
    found = spread_kl_loss(student, rows, temperature=temperature)
    reference = student.detach().clone().requires_grad_()
    p = even(rows, temperature)
    log_q = torch.log_softmax(reference / temperature, dim=1)
    expected = temperature**2 * (torch.xlogy(p, p) - p * log_q).sum(dim=1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    found.backward()
    expected.backward()
    assert torch.allclose(student.grad, reference.grad, atol=1e-6)  # type: ignore[arg-type]


def test_it_is_never_below_the_bucketed_kl_and_the_kl_itself_of_whole_rows() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(8, 30)).astype(np.float32)
    student = torch.from_numpy(rng.normal(size=(8, 30))).float()
    from kdcache.train.losses import kd_loss

    for k in (1, 5, 29):
        rows = rows_of(logits, k=k)
        bucketed = kd_loss(student, rows, alpha=1.0, temperature=2.0, reduction="none")
        assert (spread_kl_loss(student, rows, temperature=2.0, reduction="none") >= bucketed - 1e-5).all()
    whole = kd_loss(student, torch.from_numpy(logits), alpha=1.0, temperature=2.0)
    assert spread_kl_loss(student, torch.from_numpy(logits), temperature=2.0).item() == pytest.approx(whole.item())
    assert spread_kl_loss(student, rows_of(logits, k=30), temperature=2.0).item() == pytest.approx(
        whole.item(), abs=1e-3
    )
