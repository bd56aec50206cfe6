"""The call convention: what of a batch reaches the model, and what of its output is taken."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import DataError, KDCacheError, LogitsError, UsageError
from kdcache.stages.calling import call_model, move_to_device

X = torch.arange(6.0).reshape(3, 2)


class Fixed(nn.Module):
    """Returns what it was given at the start."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


class Named(nn.Module):
    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return input_ids if mask is None else input_ids * mask


class AnyKeys(nn.Module):
    def forward(self, **inputs: Tensor) -> Tensor:
        assert sorted(inputs) == ["a", "b"]
        return inputs["a"]


@pytest.mark.parametrize("batch", [X, (X, torch.zeros(3)), [X, 1, 2], (X,)])
def test_the_first_element_is_the_input(batch: Any) -> None:
    assert torch.equal(call_model(nn.Identity(), batch), X)


def test_of_a_dict_those_keys_are_passed_that_forward_names() -> None:
    batch = {"input_ids": X, "mask": torch.full((3, 2), 2.0), "other": X, "label": torch.zeros(3)}
    assert torch.equal(call_model(Named(), batch), 2 * X)
    assert torch.equal(call_model(Named(), {"input_ids": X}), X)


def test_a_forward_that_takes_everything_gets_no_labels_ids_or_teacher_rows() -> None:
    batch = {"a": X, "b": X, "sample_id": 1, "teacher": 1, **dict.fromkeys(("label", "labels", "target", "targets"), 1)}
    assert torch.equal(call_model(AnyKeys(), batch), X)


@pytest.mark.parametrize("batch", [{"mask": X}, {"pixels": X}, {}, {"labels": X}])
def test_a_dict_without_the_keys_is_a_usage_error_that_names_them(batch: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match="forward takes input_ids, mask"):
        call_model(Named(), batch)


def test_an_empty_tuple_is_a_data_error() -> None:
    with pytest.raises(DataError, match="item of the data set is empty"):
        call_model(nn.Identity(), ())


def test_a_model_that_fails_on_a_dict_is_quoted_with_its_keys() -> None:
    with pytest.raises(KDCacheError, match="teacher failed on items with the keys label, a: AssertionError"):
        call_model(AnyKeys(), {"label": 1, "a": X}, what="teacher")


Pair = namedtuple("Pair", "features scores")


def test_tensors_move_to_a_device_in_whatever_holds_them() -> None:
    moved = move_to_device({"a": [X, (X, "text")], "b": Pair(X, None)}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["a"][1][1] == "text"
    assert isinstance(moved["b"], Pair)
    assert moved["b"].features.is_meta


@pytest.mark.parametrize(
    ("output", "key"),
    [
        (X, None),
        (SimpleNamespace(logits=X), None),
        ({"scores": X, "features": 0}, "scores"),
        (SimpleNamespace(scores=X), "scores"),
        (Pair(0, X), "scores"),
        ((0, X), "1"),
        ([X], "0"),
    ],
)
def test_logits_are_found_in_the_output(output: Any, key: str | None) -> None:
    assert call_model(Fixed(output), X, output_key=key) is X


@pytest.mark.parametrize("output", [None, (X, X), {"logits": X}, 3.0, SimpleNamespace(logits=[1])])
def test_an_output_without_logits_is_an_error_that_describes_it(output: Any) -> None:
    with pytest.raises(LogitsError, match="--output-key"):
        call_model(Fixed(output), X, what="teacher")


def test_the_error_lists_the_keys_there_are() -> None:
    with pytest.raises(LogitsError, match="the teacher returned a dict with the keys scores, features"):
        call_model(Fixed({"scores": X, "features": X}), X, what="teacher")


@pytest.mark.parametrize(("output", "key"), [((X,), "1"), ({"a": X}, "b"), (X, "shape"), (SimpleNamespace(a=X), "b")])
def test_an_output_key_that_picks_nothing_is_a_usage_error(output: Any, key: str) -> None:
    with pytest.raises(UsageError, match=f"no '{key}'"):
        call_model(Fixed(output), X, output_key=key)


def test_an_output_key_that_picks_no_tensor_is_an_error() -> None:
    with pytest.raises(LogitsError, match="'a' is an int"):
        call_model(Fixed({"a": 1}), X, output_key="a")


def test_a_model_that_raises_is_quoted_with_the_shape_it_got() -> None:
    with pytest.raises(
        KDCacheError, match=r"teacher failed on an input of shape \(3, 2\) and float32: RuntimeError: mat1"
    ):
        call_model(nn.Linear(5, 1), (X, 0), what="teacher")


def test_errors_of_kdcache_pass_through_a_model() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise DataError("mine")

    with pytest.raises(DataError, match=r"^mine$"):
        call_model(Strict(), X)
