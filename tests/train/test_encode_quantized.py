"""The encodings `int8` and `int4` on a device against their NumPy twin: the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.format.encoding import bad_rows
from kdcache.format.quantized import Quantized
from kdcache.train.encode import encode

MAX = float(np.finfo(np.float32).max)
EDGES = st.sampled_from([-np.inf, -0.0, 0.0, 1.0, -65504.0, -65505.0, -MAX, MAX])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(4, 1), (4, 3), (3, 11), (2, 9, 2), (2, 10, 1, 2)])
@given(data=st.data())
def test_a_device_stores_and_reads_what_numpy_does(kind: str, shape: tuple[int, ...], data: Any) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    values = data.draw(st.sampled_from([EDGES, st.floats(-100, 100, width=width), st.integers(-3, 3).map(float)]))
    logits = data.draw(hnp.arrays(f"f{width // 8}", shape, elements=values))
    bad = bad_rows(logits)
    encoding = Quantized(shape[1:], kind)
    assert np.flatnonzero(encode(encoding, torch.from_numpy(logits)).bad.numpy()).tolist() == bad.tolist()
    good = np.delete(logits, bad, axis=0)
    expected, found = encoding.encode(good), encode(encoding, torch.from_numpy(good))
    for name, array in expected.arrays.items():
        tensor = found.arrays[name].numpy()
        assert tensor.dtype == array.dtype
        np.testing.assert_array_equal(tensor, array, err_msg=name)
    assert int(found.clamped) == expected.clamped.sum()
    np.testing.assert_array_equal(encoding.decode(found.arrays).numpy(), encoding.decode(expected.arrays))
    np.testing.assert_array_equal(encoding.top_class(found.arrays).numpy(), encoding.top_class(expected.arrays))


@pytest.mark.parametrize("classes", [65_536, 65_537])
def test_the_top_classes_of_long_rows_have_the_type_of_the_format(classes: int) -> None:
    logits = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = 50
    encoding = Quantized((classes,), "int4")
    found = encode(encoding, logits).arrays
    assert found["top_classes"].numpy().dtype == np.dtype("<u2" if classes == 65_536 else "<u4")
    assert int(found["top_classes"][0, 0]) == classes - 1
    assert encoding.decode(found)[0, -1] == 50
