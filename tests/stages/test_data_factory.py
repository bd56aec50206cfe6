"""A factory's data set is taken as it is where rows can be asked for by number, and refused where they cannot."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.stages.data import LoadedData, load_data

COUNTER = itertools.count()

HEAD = """
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

class Rows(Dataset):
    def __init__(self, rows=3, **attributes):
        self.rows = rows
        for name, value in attributes.items():
            setattr(self, name, value)
    def __len__(self):
        return self.rows
    def __getitem__(self, index):
        return {"x": torch.zeros(2), "label": index}

class Stream(IterableDataset):
    def __iter__(self):
        yield 1

class NoLength(Dataset):
    def __getitem__(self, index):
        return torch.zeros(2), 0

class BadLength(NoLength):
    def __len__(self):
        raise RuntimeError("no idea")

def make():
    return """

Load = Callable[[str], LoadedData]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads `module:make`, where `make` returns the given expression."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(expression: str) -> LoadedData:
        name = f"data_module_{next(COUNTER)}"
        (tmp_path / f"{name}.py").write_text(HEAD + expression + "\n")
        return load_data(f"{name}:make")

    return run


def test_the_data_set_is_handed_on_as_it_is(load: Load) -> None:
    data = load("Rows()")
    assert data.dataset[1]["label"] == 1
    assert (len(data), data.num_classes, data.classes, data.sample_ids) == (3, None, None, None)
    assert data.provenance["rows"] == 3
    assert data.provenance["ids_sha256"] is None


@pytest.mark.parametrize("expression", ["[(torch.zeros(2), 0)] * 3", "TensorDataset(torch.zeros(3, 2))"])
def test_everything_with_a_length_and_items_is_a_data_set(load: Load, expression: str) -> None:
    assert len(load(expression)) == 3


def test_ids_and_classes_of_the_data_set_are_used(load: Load) -> None:
    data = load("Rows(sample_ids=['a', 'bc', 'd'], classes=['x', 'y'])")
    assert data.sample_ids is not None
    assert data.sample_ids.tolist() == [b"a", b"bc", b"d"]
    assert (data.classes, data.num_classes) == (("x", "y"), 2)
    assert data.provenance["id_scheme"] == "sample_ids of the data set"


def test_a_class_count_without_names_is_used(load: Load) -> None:
    assert load("Rows(num_classes=7)").num_classes == 7
    assert load("Rows(num_classes='seven', classes=3)").num_classes is None


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("Stream()", "a Stream, an IterableDataset"),
        ("NoLength()", "without a length"),
        ("BadLength()", "no idea"),
        ("Rows(0)", "no samples"),
        ("Rows(sample_ids=[1, 2])", "sample_ids has 2"),
        ("Rows(sample_ids=[1, 2, 1])", "sample id 1 occurs 2 times"),
        ("Rows(sample_ids=[1, 'a', 2])", "all be integers or all be strings"),
        ("Rows(classes=['x', 'x'])", "one name"),
    ],
)
def test_data_sets_that_cannot_be_joined_are_data_errors(load: Load, expression: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(expression)


@pytest.mark.parametrize(
    "expression", ["None", "3", "'text'", "Rows", "{'x': 1}", "torch.zeros(3, 2)", "np.zeros(3)", "(i for i in 'abc')"]
)
def test_a_factory_that_returns_something_else_is_a_usage_error(load: Load, expression: str) -> None:
    with pytest.raises(UsageError, match=r"returned .*; expected a data set"):
        load(expression)


def test_a_factory_that_raises_is_an_error_with_its_reason(load: Load) -> None:
    with pytest.raises(KDCacheError, match="ZeroDivisionError: division by zero"):
        load("1 / 0")
