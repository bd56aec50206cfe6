"""A finished student is the next teacher, by the plain commands' functions and SPECs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdcache
from kdcache.errors import KDCacheError, MismatchError, UsageError
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.models import CNN, MLP, built
from kdcache.stages.students import load_student
from kdcache.stages.teachers import load_teacher


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(out: Path, student: str | None = "mlp:64-32-10", **changed: Any) -> Any:
    given = {name: changed.pop(name) for name in ("student_module",) if name in changed}
    options = DistillOptions(
        **{
            **{"student": student, "data": "digits:train", "val": "digits:test", "out": str(out), "lr": 0.1},
            **{"epochs": 8, "batch_size": 64, "device": "cpu", "quiet": True, "threads": 1, **changed},
        }
    )
    return kdcache.distill(options, student=given.get("student_module"))


def test_three_generations_hold_their_accuracy(tmp_path: Path) -> None:
    """Students of the teacher's size on 1,300 digits, each from random weights of its own."""
    accuracies = [trained(tmp_path / "0", alpha=0.0).last["val_accuracy"]]
    for generation in range(1, 4):
        cache = tmp_path / f"{generation}.h5"
        options = {"teacher": f"run:{tmp_path / str(generation - 1)}", "data": "digits:train", "quiet": True}
        kdcache.precompute(out=cache, teacher_saw="yes", threads=1, **options)
        teacher = kdcache.open(cache).provenance["teacher"]
        assert (teacher["spec"], teacher["generation"]) == (f"run:{generation - 1}", generation - 1)
        run = trained(tmp_path / str(generation), cache=str(cache), alpha=0.5, temperature=2.0, seed=generation)
        accuracies.append(run.last["val_accuracy"])
    assert min(accuracies) > 0.85
    assert max(accuracies) - min(accuracies) < 0.05


@pytest.mark.parametrize("spec", ["mlp:64-8-10", "cnn:TINY"])
def test_a_run_names_its_student_as_teacher_and_as_start(tmp_path: Path, spec: str) -> None:
    result = trained(tmp_path / "a", spec, alpha=0.0, epochs=1)
    teacher = load_teacher(f"run:{tmp_path / 'a'}")
    start = load_student(f"run:{tmp_path / 'a'}", num_classes=10, example=torch.zeros(1, 1, 8, 8))
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for module in (teacher.module, start.eval()):
        assert torch.equal(module(inputs), result.student(inputs))
    assert teacher.provenance["weights"]["name"] == "last.pt"
    assert str(tmp_path) not in json.dumps(teacher.provenance)
    best = load_teacher(f"run:{tmp_path / 'a'}", weights=tmp_path / "a" / "best.pt")
    assert best.provenance["weights"]["name"] == "best.pt"
    again = trained(tmp_path / "b", f"run:{tmp_path / 'a'}", alpha=0.0, epochs=1)
    assert again.record["student"]["recipe"] == result.record["student"]["recipe"]
    assert load_teacher(f"run:{tmp_path / 'b'}").provenance["generation"] == 0


def test_a_run_that_cannot_be_a_teacher_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no finished run \(there is no run.json\)"):
        load_teacher(f"run:{tmp_path}")
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trained(tmp_path / "own", None, student_module=own, alpha=0.0, epochs=1)
    with pytest.raises(UsageError, match=r"not a built-in one.*--weights .*last\.pt"):
        load_teacher(f"run:{tmp_path / 'own'}")
    trained(tmp_path / "a", alpha=0.0, epochs=1)
    with pytest.raises(MismatchError, match="does not fit MLP"):
        load_teacher(f"run:{tmp_path / 'a'}", weights=tmp_path / "own" / "last.pt")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda record: record.update(status="interrupted"), UsageError, "its status is 'interrupted'"),
        (lambda record: record["student"].update(recipe={"kind": "mlp", "widths": [64]}), UsageError, "not the recipe"),
        (lambda record: record["student"].update(recipe="os:system"), UsageError, "not the recipe"),
        # 40 TB, which are not asked for.
        (lambda r: r["student"].update(recipe={"kind": "mlp", "widths": [64, 10**7, 10**6, 10]}), MismatchError, "fit"),
        (lambda record: record.update(data=[]), KDCacheError, "damaged"),
        (lambda record: record.update(student=None), UsageError, "not a built-in one"),
    ],
)
def test_a_record_that_was_edited_builds_nothing(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], error: type[KDCacheError], match: str
) -> None:
    trained(tmp_path / "a", alpha=0.0, epochs=1)
    path = tmp_path / "a" / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.chmod(0o644)
    path.write_text(json.dumps(record))
    with pytest.raises(error, match=match):
        load_teacher(f"run:{tmp_path / 'a'}")


@pytest.mark.parametrize("net", [MLP((6, 5, 4)), CNN("TINY", in_channels=2, num_classes=3, pixels=20)])
def test_a_recipe_makes_the_same_network_again(net: MLP | CNN) -> None:
    again = built(json.loads(json.dumps(net.recipe)))
    assert type(again) is type(net)
    again.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        {"kind": "mlp", "widths": [3, -1]},
        {"kind": "mlp", "widths": [3] * 1001},
        {"kind": "mlp", "widths": [3, True]},
        {"kind": "cnn", "size": "TINY", "in_channels": 1, "num_classes": 10},
        {"kind": "cnn", "size": ["TINY"], "in_channels": 1, "num_classes": 10, "pixels": 8},
        {"kind": "cnn", "size": "HUGE", "in_channels": 1, "num_classes": 10, "pixels": 8},
    ],
)
def test_what_is_no_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(UsageError, match="not the recipe"):
        built(recipe)


def test_the_average_of_the_student_teaches_by_two_options(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"alpha": 0.5, "refresh_every": 3, "ema": 0.9}
    run = trained(tmp_path / "a", **settings)
    assert [version["epoch"] for version in run.record["refresh"]["versions"]] == [3, 6]
    assert run.record["refresh"]["ema"] == 0.9
    assert sorted(path.name for path in (tmp_path / "a" / "teacher").glob("v*")) == [
        "v000001",
        "v000002",
        "versions.json",
    ]
    again = trained(tmp_path / "a", overwrite=True, **settings)
    assert again.record["refresh"] == run.record["refresh"]
    assert trained(tmp_path / "a", resume=True, **settings).last == run.last
    assert (tmp_path / "a" / "teacher" / "versions.json").exists()
    trained(tmp_path / "a", overwrite=True, alpha=0.0)
    assert not (tmp_path / "a" / "teacher").exists()
    assert run.last["val_accuracy"] > 0.85


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"ema": 0.9}, "give --refresh-every"),
        ({"refresh_every": 0}, "--refresh-every must be at least 1"),
        ({"refresh_every": 1, "ema": 1.0}, "--ema must be"),
        ({"refresh_every": 1, "out": None}, "give --out"),
        ({"refresh_every": 1, "alpha": 0.0}, "teaches nothing with --alpha 0"),
        ({"refresh_every": 1, "augment": "shift1"}, "give --cache with a dump of --augment"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    given = {"out": str(tmp_path / "a"), "alpha": 0.5, **changed}
    options = DistillOptions(student="mlp:64-32-10", data="digits:train", device="cpu", quiet=True, **given)
    with pytest.raises(UsageError, match=match):
        kdcache.distill(options)
    assert not (tmp_path / "a").exists()
