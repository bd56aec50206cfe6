"""The encoding `topk` on a device against its NumPy twin: what is kept to the bit, sums to a few units of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.errors import DataError
from kdcache.format.encoding import bad_rows
from kdcache.format.topk import TopK
from kdcache.train.encode import encode

MAX = float(np.finfo(np.float32).max)
EXACT = ("topk_logits", "topk_classes", "label_logits", "row_max")
SUMS = ("tail_logsumexp", "tail_mean", "logit_std")
FEW = st.sampled_from([-np.inf, -0.0, 0.0, 1.0, 2.0, -65504.0, -65505.0, -MAX, MAX])


def assert_same(found: Any, expected: Any, clamped: int) -> None:
    assert set(found.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        tensor = found.arrays[name].numpy()
        assert tensor.dtype == array.dtype
        assert tensor.shape == array.shape
        if name in EXACT:
            np.testing.assert_array_equal(tensor, array, err_msg=name)
        else:
            # Sums of up to 1000 float32: a few units of their last bit, relative to the logits that enter.
            scale = np.abs(np.nan_to_num(array, neginf=0)).max(initial=1)
            np.testing.assert_allclose(tensor, array, rtol=2e-6, atol=2e-6 * scale, err_msg=name)
    assert int(found.clamped) == clamped


@pytest.mark.parametrize(
    ("shape", "labels"), [((5, 6), 0), ((5, 6), 1), ((5, 6), 2), ((3, 4, 2), 0), ((2, 3, 2, 2), 0)]
)
@given(data=st.data())
def test_a_device_keeps_what_numpy_keeps(shape: tuple[int, ...], labels: int, data: Any) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    values = data.draw(st.sampled_from([FEW, st.floats(-100, 100, width=width), st.integers(-3, 3).map(float)]))
    logits = data.draw(hnp.arrays(f"f{width // 8}", shape, elements=values))
    logits = np.delete(logits, bad_rows(logits), axis=0)
    k = data.draw(st.integers(1, shape[1]))
    encoding = TopK(shape[1:], k, (0.5, 1.0, 4.0, "z2"), labels)
    own = data.draw(hnp.arrays(np.int64, (len(logits), labels), elements=st.integers(-1, shape[1] - 1)))
    expected = encoding.encode(logits, own)
    found = encode(encoding, torch.from_numpy(logits), torch.from_numpy(own))
    assert not found.bad.any()
    assert_same(found, expected, int(expected.clamped.sum()))


@pytest.mark.parametrize("classes", [65_536, 65_537])
def test_a_thousand_and_more_classes_are_kept_alike(classes: int) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (3, classes)).astype(np.float32)
    logits[0, -1] = 50  # the class that uint16 just holds, or just not
    encoding = TopK((classes,), 16, (1.0, 2.0), 1)
    labels = np.array([[classes - 1], [7], [-1]])
    expected = encoding.encode(logits, labels)
    found = encode(encoding, torch.from_numpy(logits), torch.from_numpy(labels))
    assert_same(found, expected, 0)
    assert int(found.arrays["topk_classes"][0, 0]) == classes - 1


def test_bad_rows_are_marked_and_do_not_disturb_the_others() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    spoilt = logits.clone()
    spoilt[1, 3], spoilt[2, 0], spoilt[4] = torch.nan, torch.inf, -torch.inf
    encoding = TopK((9,), 3, (1.0, "z2"), 1)
    labels = torch.arange(6).unsqueeze(1)
    found, clean = encode(encoding, spoilt, labels), encode(encoding, logits, labels)
    assert found.bad.tolist() == [False, True, True, False, True, False]
    for name, array in clean.arrays.items():
        np.testing.assert_array_equal(found.arrays[name][[0, 3, 5]].numpy(), array[[0, 3, 5]].numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_taken(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    encoding = TopK((20,), 5, (1.0,), 0)
    assert_same(encode(encoding, logits), encoding.encode(logits.float().numpy()), 0)


def test_no_rows_are_no_rows() -> None:
    encoding = TopK((20,), 5, (1.0, "z2"), 1)
    found = encode(encoding, torch.empty(0, 20), torch.empty(0, 1, dtype=torch.int64))
    assert {name: tuple(t.shape) for name, t in found.arrays.items()} == {s.name: s.shape(0) for s in encoding.specs}


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected \(4, 2\)"):
        encode(TopK((5,), 2, (1.0,), 2), torch.zeros(4, 5), torch.zeros(4, 1, dtype=torch.int64))


def test_labels_left_out_are_those_of_rows_without() -> None:
    encoding = TopK((5,), 2, (1.0,), 1)
    found = encode(encoding, torch.zeros(4, 5))
    assert_same(found, encoding.encode(np.zeros((4, 5), np.float32)), 0)
    assert (found.arrays["label_logits"] == -np.inf).all()
