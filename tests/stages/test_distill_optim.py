from __future__ import annotations

import pytest
from torch import nn

from kdcache.errors import UsageError
from kdcache.stages.optim import Schedule, build_optimizer, set_lr


def test_cosine_falls_from_lr_towards_zero() -> None:
    schedule = Schedule("cosine", 0.4, total_steps=100)
    assert schedule.at(0) == 0.4
    assert schedule.at(50) == pytest.approx(0.2)
    assert 0 < schedule.at(99) < 0.001


def test_warm_up_rises_to_lr_and_then_the_schedule_starts() -> None:
    schedule = Schedule("cosine", 1.0, total_steps=14, warmup_steps=4)
    assert [schedule.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_step_drops_tenfold_at_half_and_three_quarters() -> None:
    schedule = Schedule("step", 1.0, total_steps=8)
    assert [round(schedule.at(step), 6) for step in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_constant_stays() -> None:
    assert {Schedule("constant", 0.3, total_steps=5).at(step) for step in range(5)} == {0.3}


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UsageError, match="warm-up of 5"):
        Schedule("cosine", 1.0, total_steps=5, warmup_steps=5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimiser_leaves_frozen_parameters_alone(name: str) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(name, model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    set_lr(optimizer, 0.5)
    (group,) = optimizer.param_groups
    assert group["params"] == [model.weight]
    assert group["lr"] == 0.5


def test_a_student_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="no trainable parameter"):
        build_optimizer("sgd", nn.ReLU().parameters(), lr=0.1, momentum=0.0, weight_decay=0.0)


@pytest.mark.parametrize("kind", ["schedule", "optimizer"])
def test_unknown_names_are_refused_with_the_known_ones(kind: str) -> None:
    parameters = nn.Linear(1, 1).parameters()
    make = {
        "schedule": lambda: Schedule("linear", 1.0, 3),
        "optimizer": lambda: build_optimizer("lion", parameters, lr=0.1, momentum=0.0, weight_decay=0.0),
    }[kind]
    with pytest.raises(UsageError, match="choose one of"):
        make()
