"""Built-in students fit the data and the class count they are made for, or say what would."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.errors import MismatchError, UsageError
from kdcache.stages.models import CNN, CNN_WIDTHS
from kdcache.stages.students import load_student

COUNTER = itertools.count()

MNIST = torch.zeros(1, 1, 28, 28)
CIFAR = torch.rand(2, 3, 32, 32)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_an_mlp_flattens_its_input_and_has_relu_between_its_layers() -> None:
    student = load_student("mlp:784-128-64-10", num_classes=10, example=MNIST)
    assert student(MNIST).shape == (1, 10)
    assert [type(layer).__name__ for layer in student] == [  # type: ignore[attr-defined]
        "Flatten",
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
        "Linear",
    ]
    assert student.training


def test_an_mlp_states_its_classes_itself_where_nobody_knows_them() -> None:
    assert load_student("mlp:784-7", num_classes=None, example=MNIST)(MNIST).shape == (1, 7)


def test_an_mlp_for_other_inputs_is_a_mismatch_that_says_what_fits() -> None:
    with pytest.raises(MismatchError, match=r"takes 64 values, .* has 784 \(1, 28, 28\); use mlp:784-10"):
        load_student("mlp:64-10", num_classes=10, example=MNIST)


def test_an_mlp_with_other_classes_is_a_mismatch_that_says_what_fits() -> None:
    with pytest.raises(MismatchError, match=r"has 10 classes, .* has 12; use mlp:784-128-12"):
        load_student("mlp:784-128-10", num_classes=12, example=MNIST)


@pytest.mark.parametrize(
    "rest", ["784", "784-", "-10", "784-0-10", "784-x-10", "784,10", "784--10", "784-10\n", "9" * 30]
)
def test_widths_that_cannot_be_meant_are_usage_errors(rest: str) -> None:
    with pytest.raises(UsageError, match="mlp:784-128-10"):
        load_student(f"mlp:{rest}", num_classes=10, example=MNIST)


@pytest.mark.parametrize("size", CNN_WIDTHS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 1, 1), (3, 64, 33)])
def test_a_cnn_adapts_to_channels_size_and_classes(size: str, shape: tuple[int, ...]) -> None:
    images = torch.rand(2, *shape)
    assert load_student(f"cnn:{size}", num_classes=7, example=images)(images).shape == (2, 7)


@pytest.mark.parametrize(("size", "expected"), [("TINY", 18_626), ("SMALL", 162_994), ("BASE", 1_148_874)])
def test_the_sizes_are_those_that_are_documented(size: str, expected: int) -> None:
    count = parameters(CNN(size, in_channels=3, num_classes=10, pixels=32))
    assert count == expected
    assert f"{size} {round(count, -3 if count < 10**6 else -4):,}" in str(CNN.__doc__)


def test_a_row_of_a_cnn_does_not_depend_on_its_batch() -> None:
    student = load_student("cnn:TINY", num_classes=10, example=CIFAR).double()
    images = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(student(images)[2:3], student(images[2:3]))


def test_the_same_seed_gives_the_same_student() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return load_student("cnn:TINY", num_classes=10, example=CIFAR)

    assert torch.equal(build()(CIFAR), build()(CIFAR))


def test_a_cnn_learns() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    student = load_student("cnn:TINY", num_classes=4, example=images)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(student(images), labels)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


def test_a_cnn_without_a_class_count_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="needs the number of classes"):
        load_student("cnn:SMALL", num_classes=None, example=CIFAR)


def test_an_unknown_size_is_a_usage_error_that_lists_the_sizes() -> None:
    with pytest.raises(UsageError, match=r"cnn:TINY\|SMALL\|BASE"):
        load_student("cnn:small", num_classes=10, example=CIFAR)


@pytest.mark.parametrize("example", [torch.zeros(1, 5), torch.zeros(1, 8, 8)])
def test_a_cnn_takes_images_alone(example: torch.Tensor) -> None:
    with pytest.raises(MismatchError, match="takes images"):
        load_student("cnn:SMALL", num_classes=10, example=example)


@pytest.mark.parametrize("example", [torch.zeros(1, 5, dtype=torch.int64), {"x": torch.zeros(1, 5)}, None])
@pytest.mark.parametrize("spec", ["cnn:SMALL", "mlp:5-10"])
def test_built_in_students_take_float_tensors_alone(spec: str, example: object) -> None:
    with pytest.raises(MismatchError, match="takes float tensors"):
        load_student(spec, num_classes=10, example=example)


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with student factories in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = f"student_module_{next(COUNTER)}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def plain(): return nn.Linear(2, 3)\n"
        "def adapted(num_classes): return nn.Linear(2, num_classes)\n"
        "def pair(): return nn.Linear(2, 3), None\n"
    )
    return name


def test_a_factory_is_given_the_class_count_if_it_takes_one(module_name: str) -> None:
    assert load_student(f"{module_name}:plain", num_classes=5, example=None).out_features == 3
    assert load_student(f"py:{module_name}:adapted", num_classes=5, example=None).out_features == 5


def test_a_factory_that_returns_no_module_is_a_usage_error(module_name: str) -> None:
    with pytest.raises(UsageError, match=r"returned a tuple; expected an nn\.Module"):
        load_student(f"{module_name}:pair", num_classes=5, example=None)
