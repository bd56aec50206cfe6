"""Factored rows on a device: equal to NumPy, decoded in float32 under autocast, compared with the teacher's logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import LogitsError, UsageError
from kdcache.format.factored import Factored
from kdcache.format.known_heads import Head, forget_heads, keep_head
from kdcache.train.encode import encode
from kdcache.train.encode_features import LayerInputs

ROWS, WIDTH, CLASSES, SHA = 6, 16, 11, "12" * 32
ENCODING = Factored((CLASSES,), WIDTH, SHA)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = draw(CLASSES, WIDTH, seed=1), draw(CLASSES, seed=2)


@pytest.fixture(autouse=True)
def head() -> Iterator[None]:
    keep_head(SHA, Head(WEIGHT.numpy(), BIAS.numpy()))
    yield
    forget_heads()


def inputs_of(values: Tensor, computed_in: torch.dtype = torch.float32) -> LayerInputs:
    return LayerInputs(values, computed_in)


@given(st.integers(-149, 127), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_device_encodes_as_numpy_does(exponent: int, seed: int, dtype: torch.dtype) -> None:
    values = torch.ldexp(draw(ROWS, WIDTH, seed=seed).clamp(-1, 1), torch.tensor(exponent)).to(dtype)
    values[0] = 0
    values = torch.where(torch.isfinite(values), values, 0)
    found = encode(ENCODING, torch.zeros(ROWS, CLASSES), inputs=inputs_of(values)).arrays
    expected = ENCODING.encode_features(values.float().numpy()).arrays
    for name, array in expected.items():
        assert np.array_equal(found[name].numpy(), array), name


def test_tensors_decode_as_arrays_do_also_under_autocast() -> None:
    arrays = ENCODING.encode_features(draw(ROWS, WIDTH).numpy()).arrays
    expected = ENCODING.decode(arrays)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = ENCODING.decode(tensors)
        assert found.dtype == torch.float32
        assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        ENCODING.decode(tensors)
    student = draw(ROWS, CLASSES, seed=3).requires_grad_()
    (student * ENCODING.decode(tensors)).sum().backward()  # the cached layer is no inference tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_layer_computes_in_its_precision_is_taken(dtype: torch.dtype) -> None:
    values = draw(64, WIDTH)
    logits = (values.to(dtype) @ WEIGHT.to(dtype).T + BIAS.to(dtype)).float()
    assert not encode(ENCODING, logits, inputs=inputs_of(values, dtype)).bad.any()


@pytest.mark.parametrize(
    "behind",
    [
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        lambda z: z * 1.1,
        lambda z: z + 1,
        lambda z: z.masked_fill(torch.arange(CLASSES) == 3, -torch.inf),
        lambda z: z.masked_fill(torch.arange(CLASSES) == 3, torch.nan),
        lambda z: z.flip(1),
    ],
)
def test_logits_that_are_not_the_layers_are_bad(behind: object) -> None:
    assert callable(behind)
    values = draw(ROWS, WIDTH)
    logits = values @ WEIGHT.T + BIAS
    logits[2:] = behind(logits[2:])
    assert encode(ENCODING, logits, inputs=inputs_of(values)).bad.tolist() == [False] * 2 + [True] * 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e39])
def test_features_that_are_not_finite_are_bad(bad: float) -> None:
    values = draw(ROWS, WIDTH).double()
    logits = (values @ WEIGHT.double().T + BIAS).float()
    values[1, 3] = bad
    assert encode(ENCODING, logits, inputs=inputs_of(values)).bad.tolist() == [n == 1 for n in range(ROWS)]


def test_what_cannot_be_meant_is_refused() -> None:
    logits = torch.zeros(ROWS, CLASSES)
    with pytest.raises(UsageError, match="last layer"):
        encode(ENCODING, logits)
    with pytest.raises(LogitsError, match="first batch"):
        encode(ENCODING, logits, inputs=inputs_of(torch.zeros(ROWS, WIDTH + 1)))
