"""Labels that are taken away from `topk` rows: what stays is what a dump without them would hold."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import rows_of

from kdcache.store.rows import TeacherRows
from kdcache.train.kept import without_labels
from kdcache.train.losses import kd_loss


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([(1.0, 4.0), (1.0, 2.0, "z2")]), st.booleans())
def test_rows_without_some_labels_are_those_of_a_dump_without_them(
    seed: int, k: int, temperatures: tuple[float | str, ...], masked: bool
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(30, 8)).astype(np.float16).astype(np.float32) * 4
    if masked:
        logits[random.random(logits.shape) < 0.2] = -np.inf
        logits[:, 3] = 0
    labels, hidden = random.integers(-1, 8, 30), random.random(30) < 0.5
    found = without_labels(rows_of(logits, k=k, temperatures=temperatures, labels=[labels]), torch.from_numpy(hidden))
    wanted = rows_of(logits, k=k, temperatures=temperatures, labels=[np.where(hidden, -1, labels)])
    assert found.encoding == wanted.encoding
    assert torch.equal(found.label, wanted.label)
    for name, array in wanted.arrays.items():
        # The label's logit comes back from float16.
        np.testing.assert_allclose(found.arrays[name].float(), array.float(), rtol=2e-3, atol=2e-3, err_msg=name)


def test_the_probability_of_a_hidden_label_stays_in_the_tail() -> None:
    """Of three classes one is kept; the label's 0.4 must not go to the others."""
    logits = np.log(np.array([[0.5, 0.4, 0.1]], np.float32))
    rows = rows_of(logits, k=1, temperatures=(1.0,), labels=[np.array([1])])
    made = without_labels(rows, torch.tensor([True]))
    student = torch.tensor([[0.3, -0.2, 0.1]])
    plain = rows_of(logits, k=1, temperatures=(1.0,))
    wanted = kd_loss(student, plain, alpha=1.0, temperature=1.0)
    torch.testing.assert_close(kd_loss(student, made, alpha=1.0, temperature=1.0), wanted, rtol=1e-3, atol=1e-5)


def test_rows_with_all_logits_lose_their_label_alone() -> None:
    rows = TeacherRows.from_dense(torch.zeros(2, 3), label=torch.tensor([0, 2]))
    made = without_labels(rows, torch.tensor([False, True]))
    assert made.label.tolist() == [0, -1]
    assert made.arrays is rows.arrays
