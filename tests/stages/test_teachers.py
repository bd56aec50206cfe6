"""A teacher comes from a factory, fixed and named by its weights; a pickled one does not come at all."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.errors import KDCacheError, MismatchError, UsageError
from kdcache.stages.teachers import load_teacher
from kdcache.stages.weights import state_sha256

COUNTER = itertools.count()

HEAD = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))

def double(x):
    return x * 2

def make():
    return """


@pytest.fixture
def teacher_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The SPEC of a factory that returns the given expression."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(expression: str) -> str:
        name = f"teacher_module_{next(COUNTER)}"
        (tmp_path / f"{name}.py").write_text(HEAD + expression + "\n")
        return f"{name}:make"

    return write


def test_a_teacher_is_in_eval_mode_and_takes_no_gradient(teacher_spec: Callable[[str], str]) -> None:
    spec = teacher_spec("net()")
    teacher = load_teacher(spec)
    assert not any(module.training for module in teacher.module.modules())
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert (teacher.transform, teacher.max_batch) == (None, None)
    assert teacher.provenance == {
        "spec": spec,
        "state_sha256": state_sha256(teacher.module),
        "parameters": 3 * 4 + 4 + 4 + 4,
    }


def test_a_factory_may_bring_a_transform(teacher_spec: Callable[[str], str]) -> None:
    teacher = load_teacher(f"py:{teacher_spec('net(), double')}")
    assert teacher.transform is not None
    assert teacher.transform(2) == 4
    assert load_teacher(teacher_spec("net(), None")).transform is None


def test_weights_fill_the_module_and_are_named_in_its_provenance(
    teacher_spec: Callable[[str], str], tmp_path: Path
) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    teacher = load_teacher(teacher_spec("net()"), weights=tmp_path / "w.pt")
    assert teacher.provenance["state_sha256"] == state_sha256(source)
    assert teacher.provenance["weights"]["name"] == "w.pt"


def test_weights_of_another_module_are_a_mismatch(teacher_spec: Callable[[str], str], tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "w.pt")
    with pytest.raises(MismatchError, match=r"w\.pt does not fit Sequential"):
        load_teacher(teacher_spec("net()"), weights=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("None", "None"),
        ("nn.Linear", "the class Linear"),
        ("net().state_dict()", "an OrderedDict"),
        ("double", "a function"),
        ("(net(), 3)", "a tuple of a Sequential and an int"),
        ("(double, net())", "a tuple of a function and a Sequential"),
        ("(net(), double, 1)", "a tuple"),
    ],
)
def test_a_factory_that_returns_something_else_is_a_usage_error(
    teacher_spec: Callable[[str], str], expression: str, found: str
) -> None:
    with pytest.raises(UsageError, match=rf"returned {found}; expected an nn\.Module or"):
        load_teacher(teacher_spec(expression))


def test_a_factory_that_raises_is_an_error_with_its_reason(teacher_spec: Callable[[str], str]) -> None:
    with pytest.raises(KDCacheError, match="RuntimeError: mat1 and mat2"):
        load_teacher(teacher_spec("net()(torch.zeros(1, 7))"))


@pytest.mark.parametrize("text", ["teacher.pt", "runs/teacher.pth", "pt:teacher.pt"])
def test_a_pickled_module_is_refused_with_the_ways_that_work(text: str) -> None:
    with pytest.raises(UsageError, match=r"never loaded.*module:factory.*--weights"):
        load_teacher(text)


def test_an_unknown_scheme_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="known: pt2:FILE, "):
        load_teacher("timm:resnet18")
