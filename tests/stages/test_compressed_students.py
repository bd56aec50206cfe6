"""Pruned and quantisation-aware students go through `distill` as any other module does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.errors import MismatchError
from kdcache.stages.data import load_data
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.moving_teacher import MovingTeacher
from kdcache.stages.weights import load_weights


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the students; one thread, so that accuracies are the same everywhere."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    import compressed_students

    yield compressed_students
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """Of a wider network that was trained on the same rows."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    distilled(teacher, alpha=0.0, epochs=12)
    kdcache.precompute(teacher, load_data("digits:train"), tmp_path / "teacher.h5", quiet=True, threads=1)
    return str(tmp_path / "teacher.h5")


def distilled(student: Any, *, refresh: Any = None, **given: Any) -> Any:
    shared = {"data": "digits:train", "val": "digits:test", "epochs": 8, "batch_size": 64, "lr": 0.1, "device": "cpu"}
    named = {"student": student} if isinstance(student, str) else {}
    options = DistillOptions(**{**shared, "quiet": True, "threads": 1, **named, **given})
    return kdcache.distill(options, student=None if named else student, refresh=refresh)


def rows() -> tuple[Tensor, Tensor]:
    data = load_data("digits:test").dataset
    return torch.stack([item[0] for item in data]), torch.tensor([item[1] for item in data])


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    x, y = rows()
    return float((net.eval()(x).argmax(dim=1) == y).float().mean())


def zeros(net: nn.Module, small: Any) -> float:
    weights = torch.cat([layer.weight.flatten() for layer in small.layers(net)])
    return float((weights == 0).float().mean())


def test_a_pruned_student_keeps_its_masks_and_gets_its_accuracy_back(small: Any, cache: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = distilled(small.plain(), alpha=0.0).student
    before = accuracy(net)
    small.pruned(net)
    masks = [layer.weight_mask.clone() for layer in small.layers(net)]
    cut = accuracy(net)
    result = distilled(net, cache=cache, out=str(tmp_path / "run"))
    assert all(torch.equal(mask, layer.weight_mask) for mask, layer in zip(masks, small.layers(net), strict=True))
    after = accuracy(net)
    assert cut < before - 0.1
    assert after > before - 0.05
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert {"1.weight_orig", "1.weight_mask", "1.bias"} <= saved.keys()
    again = small.prunable()
    load_weights(again, tmp_path / "run" / "last.pt")
    x, _ = rows()
    assert torch.equal(again.eval()(x), result.student(x))
    plain = small.unmasked(net)
    assert zeros(plain, small) == pytest.approx(small.SHARE, abs=0.01)
    assert torch.equal(again(x), plain(x))


def test_a_pruned_student_starts_from_a_file_resumes_and_has_an_average(
    small: Any, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = small.pruned(small.plain())
    torch.save(net.state_dict(), tmp_path / "pruned.pt")
    given: dict[str, Any] = {"cache": cache, "init": str(tmp_path / "pruned.pt"), "epochs": 2, "checkpoint_steps": 9}
    plain = distilled("compressed_students:prunable", out=str(tmp_path / "plain"), **given)
    assert zeros(plain.student, small) == pytest.approx(small.SHARE, abs=0.01)
    with pytest.raises(MismatchError, match="weight_orig"):
        distilled("compressed_students:plain", out=str(tmp_path / "other"), **given)
    stopped = tmp_path / "stopped"
    _stop_after(30, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distilled("compressed_students:prunable", out=str(stopped), **given)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert (stopped / "resume.pt").exists()
    resumed = distilled("compressed_students:prunable", out=str(stopped), resume=True, **given)
    mine, theirs = plain.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    moving = MovingTeacher(tmp_path / "versions", "digits:train", decay=0.9)
    averaged = distilled("compressed_students:prunable", refresh=moving, **given)
    assert len(averaged.record["refresh"]["versions"]) == 1


def _stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.stages import distill_loop

    take_step = distill_loop.take_step

    def limited(trainer: Any, batches: Any, step: int, **named: Any) -> Any:
        if step == steps:
            raise KeyboardInterrupt
        return take_step(trainer, batches, step, **named)

    monkeypatch.setattr(distill_loop, "take_step", limited)


def test_a_quantised_student_computes_in_integers_what_it_was_trained_for(
    small: Any, cache: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    result = distilled(small.quantized(), cache=cache, out=str(tmp_path / "run"))
    whole = small.converted(result.student)
    x, _ = rows()
    with torch.no_grad():
        assert torch.allclose(whole(x), result.student(x), atol=1e-4)
    assert {whole[1].weight.dtype, whole[3].weight.dtype} == {torch.int8}
    assert accuracy(whole) > 0.88
    again = small.quantized()
    load_weights(again, tmp_path / "run" / "last.pt")  # with the ranges of its inputs
    assert torch.equal(again.eval()(x), result.student(x))


def test_training_with_rounded_weights_beats_rounding_afterwards(small: Any, cache: str) -> None:
    """With three values for a weight; with 8 bits there is no difference to see here."""
    torch.manual_seed(0)
    plain = distilled(small.plain(), cache=cache).student
    rounded = small.rounded_after(plain, bits=2).train()
    data = load_data("digits:train").dataset
    with torch.no_grad():
        rounded(torch.stack([item[0] for item in data]))  # observes the ranges of its inputs
    torch.manual_seed(0)
    aware = distilled(small.ternary(), cache=cache).student
    assert accuracy(small.converted(aware)) > accuracy(small.converted(rounded)) + 0.02
    assert {-1, 0, 1} >= set(small.converted(aware)[1].weight.flatten().tolist())


def test_a_copy_of_a_quantised_student_is_one(small: Any) -> None:
    net = small.quantized(bits=4).train()
    net(torch.rand(4, 64))
    x = torch.rand(3, 64)
    assert torch.equal(copy.deepcopy(net).eval()(x), net.eval()(x))
