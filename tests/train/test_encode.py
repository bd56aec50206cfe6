"""The encoding on a device against its NumPy twin: the same bits, the same rows refused, the same counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdcache.format.dense import Dense
from kdcache.format.encoding import bad_rows
from kdcache.train.encode import encode

MAX = float(np.finfo(np.float32).max)
EDGES32 = [np.nan, np.inf, -np.inf, MAX, -MAX, 0.0, -65504.0, -65505.0]
EDGES = [*EDGES32, 1e300, -1e300, 1e-300, float(np.nextafter(MAX, np.inf)), float(np.nextafter(-MAX, -np.inf))]


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2)])
@given(data=st.data())
def test_a_device_stores_what_numpy_stores(kind: str, shape: tuple[int, ...], data: Any) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    edges = EDGES if width == 64 else EDGES32
    values = st.sampled_from(edges) | st.floats(-1e5, 1e5, width=width)
    logits = data.draw(arrays.arrays(f"f{width // 8}", shape, elements=values))
    encoding = Dense(shape[1:], kind)
    found = encode(encoding, torch.from_numpy(logits))
    bad = bad_rows(logits)
    assert np.flatnonzero(found.bad.numpy()).tolist() == bad.tolist()
    good = np.delete(logits, bad, axis=0)
    expected, kept = encoding.encode(good), encode(encoding, torch.from_numpy(good))
    assert set(kept.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(kept.arrays[name].numpy(), array)
    assert int(kept.clamped) == np.sum(expected.clamped)


def test_a_float64_below_the_float32_range_is_clamped_and_one_above_refused() -> None:
    found = encode(Dense((3,), "float32"), torch.tensor([[0, -1e300, -torch.inf], [1e300, 0, 0]], dtype=torch.float64))
    assert found.arrays["logits"][0].tolist() == [0.0, -MAX, -np.inf]
    assert found.bad.tolist() == [False, True]
    assert int(found.clamped) == 1
