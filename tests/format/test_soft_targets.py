"""The soft_targets encoding: what it stores, says about itself, and refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kdcache.errors import UsageError
from kdcache.format.encodings import encoding_from_json
from kdcache.format.soft_targets import SoftTargets

ALL = SoftTargets((4,), 2.0, 4)
SOME = SoftTargets((70_000,), 4.0, 3, "float16")


def log_probs(rows: int = 5, classes: int = 4) -> np.ndarray:
    z = np.random.default_rng(0).normal(0, 3, (rows, classes))
    return (z - np.log(np.exp(z).sum(axis=1, keepdims=True))).astype("f4")


def test_the_arrays_are_those_of_the_specification() -> None:
    assert [(spec.name, spec.dtype, spec.row_shape) for spec in ALL.specs] == [("log_probs", "<f4", (4,))]
    assert [(spec.name, spec.dtype, spec.row_shape) for spec in SOME.specs] == [
        ("log_probs", "<f2", (3,)),
        ("kept_classes", "<u4", (3,)),
        ("log_rest", "<f4", ()),
    ]
    maps = SoftTargets((4, 8, 9), 1.0, 4)
    assert [spec.row_shape for spec in maps.specs] == [(4, 8, 9)]


@pytest.mark.parametrize("encoding", [ALL, SOME])
def test_what_a_header_says_is_read_back(encoding: SoftTargets) -> None:
    assert encoding_from_json(json.loads(json.dumps(encoding.to_json()))) == encoding


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "have a temperature from"),
        ({"temperature": 1e7}, "have a temperature from"),
        ({"temperature": float("nan")}, "have a temperature from"),
        ({"temperature": 2}, "a fraction; found 4 and 2"),
        ({"temperature": "2.0"}, "a fraction"),
        ({"k": 0}, "1 to C classes a row"),
        ({"k": 5}, "1 to C classes a row"),
        ({"k": 4.0}, "k, an integer"),
        ({"k": True}, "k, an integer"),
        ({"dtype": "int4"}, "choose one of float16, float32"),
        ({"dtype": ["float16"]}, "k, an integer"),
        ({"shape": [1], "k": 1}, "two classes or more"),
        ({"shape": [4, 2], "k": 3}, "all C in dense prediction"),
        ({"labels": 1}, "needs exactly"),
    ],
)
def test_another_header_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoding_from_json({**ALL.to_json(), **changed})


def test_there_are_no_logits() -> None:
    arrays = ALL.from_log_probs({"log_probs": log_probs()})
    assert not ALL.has_all_logits
    with pytest.raises(
        UsageError, match="soft targets at temperature 2, the mean of several teachers, and have no logits"
    ):
        ALL.decode(arrays)
    with pytest.raises(UsageError, match="not from logits"):
        ALL.encode(np.zeros((2, 4), "f4"))


def test_the_top_class_is_known_where_every_class_is() -> None:
    arrays = {"log_probs": log_probs()}
    np.testing.assert_array_equal(ALL.top_class(arrays), arrays["log_probs"].argmax(axis=1))
    with pytest.raises(UsageError, match="may be among the others"):
        SOME.top_class(arrays)


def test_sound_rows_have_no_flaw_and_others_are_named() -> None:
    logs = log_probs(5, 4)
    some = SoftTargets((9,), 1.0, 3)
    sound = {
        "log_probs": logs[:, :3].copy(),
        "kept_classes": np.tile(np.uint16([5, 2, 8]), (5, 1)),
        "log_rest": logs[:, 3],
    }
    assert ALL.flaw({"log_probs": logs}) is None
    assert some.flaw(sound) is None
    half = SoftTargets((1000,), 1.0, 1000, "float16")
    even = np.full((2, 1000), -np.log(1000), "f4")
    assert half.flaw(half.from_log_probs({"log_probs": even})) is None
    shifted = {"log_probs": logs + np.float32(0.1)}
    assert ALL.flaw(shifted) == "log_probs are of probabilities that do not sum to 1"
    beyond = {**sound, "kept_classes": np.tile(np.uint16([5, 2, 9]), (5, 1))}
    assert some.flaw(beyond) == "kept_classes has a class beyond the last"
    twice = {**sound, "kept_classes": np.tile(np.uint16([5, 2, 5]), (5, 1))}
    assert some.flaw(twice) == "kept_classes has a class twice in a row"
    empty = {**twice, "log_probs": sound["log_probs"].copy(), "log_rest": np.zeros(5, "f4")}
    empty["log_probs"][:, 2] = -np.inf
    empty["log_rest"] = np.log(1 - np.exp(empty["log_probs"]).sum(axis=1))
    assert some.flaw(empty) is None
