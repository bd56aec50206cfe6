"""Runs with several caches: what they learn, and how they go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import CoverageError, InterruptedRunError, MismatchError, UsageError
from kdcache.stages.asked_caches import asked_caches, parse_cache
from kdcache.stages.calibration_file import StoredCalibration, save_calibration
from kdcache.stages.distill import distill
from kdcache.stages.label_fraction import choose_labelled
from kdcache.train.calibrated import Calibration
from kdcache.train.ensemble_rules import RULES
from kdcache.train.pipelines import named

sys.path.insert(0, str(Path(__file__).parent))
from several_caches import CLASSES, INPUTS, LABELS, LOGITS, NAMES, OPTIONS, ROWS, cache_of, ran, two_caches, weights

PLAIN_RULES = [rule for rule in RULES if rule != "route:FILE.csv"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_caches(tmp_path)


def test_the_mean_of_logits_trains_as_a_cache_of_the_mean(two: list[Path], tmp_path: Path) -> None:
    mean = cache_of(tmp_path / "mean", (LOGITS[0] * (2 / 3) + LOGITS[1] * (1 / 3)))
    several = ran([f"{two[0]}=2", str(two[1])])
    torch.testing.assert_close(weights(several), weights(ran(mean)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(several), weights(ran(two[0])))


@pytest.mark.parametrize("rule", PLAIN_RULES)
def test_every_rule_trains_and_the_same_again(two: list[Path], rule: str) -> None:
    first = ran(two, val=two, ensemble=rule)
    assert {"val_accuracy", "agreement"} <= first.last.keys()
    assert torch.equal(weights(first), weights(ran(two, val=two, ensemble=rule)))


@pytest.mark.parametrize("rule", ["soft-targets", "accuracy", "calibration", "cross-entropy", "random"])
def test_dense_and_sparse_caches_teach_together(two: list[Path], tmp_path: Path, rule: str) -> None:
    cache_of(tmp_path / "all", LOGITS[2])
    kdcache.convert(tmp_path / "all", tmp_path / "sparse", top_k=3)
    result = ran([*two, tmp_path / "sparse"], val=two[0], ensemble=rule)
    assert result.steps == 8
    close = ran([*two, tmp_path / "all"], val=two[0], ensemble=rule)
    assert (weights(result) - weights(close)).abs().max() < 0.2


def test_classes_in_another_order_are_brought_together_by_their_names(tmp_path: Path) -> None:
    order = [3, 0, 5, 1, 4, 2]
    plain = [cache_of(tmp_path / f"p{n}", LOGITS[n], names=NAMES) for n in range(2)]
    place = torch.tensor([order.index(c) for c in range(CLASSES)])
    other = cache_of(tmp_path / "o1", LOGITS[1][:, order], names=[NAMES[c] for c in order], labels=place[LABELS])
    assert torch.equal(weights(ran(plain)), weights(ran([plain[0], other])))
    kdcache.convert(plain[1], tmp_path / "p1k", top_k=3)
    kdcache.convert(other, tmp_path / "o1k", top_k=3)
    sparse = [ran([plain[0], tmp_path / name]) for name in ("p1k", "o1k")]
    torch.testing.assert_close(weights(sparse[0]), weights(sparse[1]))


def test_a_class_map_is_of_each_teacher(tmp_path: Path) -> None:
    shifted = [(c + 1) % CLASSES for c in range(CLASSES)]  # class c of the teachers is class c + 1 of the data
    place = [shifted.index(c) for c in range(CLASSES)]
    data = TensorDataset(INPUTS, torch.tensor(shifted)[LABELS])
    path = tmp_path / "map.json"
    student = [str(c) for c in range(CLASSES)]
    path.write_text(json.dumps({"student": student, "map": {str(c): str(to) for c, to in enumerate(shifted)}}))
    two = [cache_of(tmp_path / f"t{n}", LOGITS[n], labels=None) for n in range(2)]
    mapped = [cache_of(tmp_path / f"m{n}", LOGITS[n][:, place], labels=None) for n in range(2)]
    for rule in ("logits", "entropy"):
        found = ran(two, classes=str(path), ensemble=rule, data=data)
        assert torch.equal(weights(found), weights(ran(mapped, ensemble=rule, data=data)))
    with pytest.raises(UsageError, match="give a --val-cache of each"):
        ran(two, classes=str(path), val=two[0])
    novel = {"student": [*student, "new"], "map": {c: c for c in student}}
    path.write_text(json.dumps(novel))
    with pytest.raises(UsageError, match="several teachers have to know the same classes"):
        ran(two, classes=str(path), data=data)


def test_one_map_names_the_classes_of_all_teachers(tmp_path: Path) -> None:
    """By their names in any order, and by numbers where a cache has no names."""
    order, other = [3, 0, 5, 1, 4, 2], [name.upper() for name in NAMES]
    place = torch.tensor([order.index(c) for c in range(CLASSES)])
    first = cache_of(tmp_path / "first", LOGITS[0], names=NAMES)
    moved = cache_of(tmp_path / "moved", LOGITS[1][:, order], names=[other[c] for c in order], labels=place[LABELS])
    nameless = cache_of(tmp_path / "nameless", LOGITS[1][:, order], labels=place[LABELS])
    wanted = weights(ran([first, cache_of(tmp_path / "plain", LOGITS[1], names=NAMES)]))
    path = tmp_path / "map.json"
    own = {name: name for name in NAMES}
    for second, pairs in (
        (moved, {**own, **dict(zip(other, NAMES, strict=True))}),
        (nameless, {**own, **{str(n): NAMES[c] for n, c in enumerate(order)}}),
    ):
        path.write_text(json.dumps({"student": NAMES, "map": pairs}))
        assert torch.equal(weights(ran([first, second], classes=str(path))), wanted)
    turned = cache_of(tmp_path / "turned", LOGITS[1], names=NAMES[::-1], labels=LABELS)
    with pytest.raises(MismatchError, match=rf"has the label {5 - LABELS[0]} in turned \(there {LABELS[0]}, as its cl"):
        ran([first, turned])
    path.write_text(json.dumps({"student": NAMES, "map": {**own, "g": "a"}}))
    with pytest.raises(MismatchError, match="'g' is none of the 6 classes of first"):
        ran([first, moved], classes=str(path))
    path.write_text(json.dumps({"student": NAMES, "map": own}))
    with pytest.raises(MismatchError, match="6 of the 6 classes of moved are not in the map"):
        ran([first, moved], classes=str(path))
    path.write_text(json.dumps({"student": NAMES, "map": {str(n): n for n in range(CLASSES)}}))
    with pytest.raises(UsageError, match="the number 0 is the class 'a' of first and 'D' of moved: write the names"):
        ran([first, moved], classes=str(path))


def test_each_calibration_goes_to_the_cache_that_it_is_bound_to(two: list[Path], tmp_path: Path) -> None:
    files = [file_of(cache, t) for cache, t in zip(two, (2.0, 0.5), strict=True)]
    divided = [cache_of(tmp_path / f"d{n}", LOGITS[n] / t) for n, t in enumerate((2.0, 0.5))]
    wanted = weights(ran(divided))
    for given in (files, files[::-1]):
        assert torch.equal(weights(ran(two, calibration=tuple(given))), wanted)
    with pytest.raises(MismatchError, match=r"which is none of first, d0"):
        ran([two[0], divided[0]], calibration=(files[1],))
    with pytest.raises(UsageError, match="names two files for first"):
        ran(two, calibration=(files[0], files[0]))


def file_of(cache: Path, temperature: float) -> str:
    with kdcache.open(cache) as opened:
        stored = StoredCalibration(Calibration(temperature), opened.root, "temperature", {}, {}, {})
    path = cache.with_name(f"{cache.name}.calibration.json")
    save_calibration(path, stored, overwrite=False)
    return str(path)


def test_a_temperature_schedule_makes_soft_targets_at_each_steps_temperature(two: list[Path], tmp_path: Path) -> None:
    result = ran(two, ensemble="soft-targets", temperature_schedule="linear:1", val=two[0])
    assert result.steps == 8
    assert not torch.equal(weights(result), weights(ran(two, ensemble="soft-targets", val=two[0])))
    with pytest.raises(UsageError, match="at another temperature than the loss"):
        ran(two, ensemble="soft-targets", temperature_schedule="linear:1", val=two)
    cache_of(tmp_path / "all", LOGITS[2])
    kdcache.convert(tmp_path / "all", tmp_path / "sparse", top_k=3)
    with pytest.raises(UsageError, match="--temperature-schedule beside the topk rows of sparse"):
        ran([two[0], tmp_path / "sparse"], temperature_schedule="linear:1")


def test_samples_that_a_cache_lacks_are_left_to_the_others(two: list[Path], tmp_path: Path) -> None:
    part = cache_of(tmp_path / "part", LOGITS[1], rows=slice(0, 40))
    other = cache_of(tmp_path / "other", LOGITS[0], rows=slice(20, 60))
    with pytest.raises(CoverageError, match=r"part lacks 20 of the 60 samples: 40, 41"):
        ran([two[0], part])
    mixed = torch.cat([(LOGITS[0][:40] + LOGITS[1][:40]) / 2, LOGITS[0][40:]])
    wanted = ran(cache_of(tmp_path / "mixed", mixed))
    torch.testing.assert_close(weights(ran([two[0], part], missing="ce")), weights(wanted), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(ran([part, two[0]], missing="ce")), weights(wanted), rtol=1e-4, atol=1e-5)
    assert ran([part, other], missing="skip").steps == 8
    few = cache_of(tmp_path / "few", LOGITS[1], rows=slice(0, 10))
    assert ran([few, cache_of(tmp_path / "less", LOGITS[0], rows=slice(5, 20))], missing="skip").steps == 4


def test_the_record_and_the_first_lines_name_rule_members_and_weights(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    ran([f"{two[0]}=3", two[1]], ensemble="soft-targets", out=str(out), quiet=False)
    assert "2 teachers by the rule soft-targets: first (0.75), second (0.25)" in capsys.readouterr().err
    record = json.loads((out / "run.json").read_text())
    told = record["data"]["ensemble"]
    assert told["rule"] == "soft-targets"
    assert [(one["name"], one["weight"]) for one in told["members"]] == [("first", 3.0), ("second", 1.0)]
    with kdcache.open(two[1]) as cache:
        assert told["members"][1]["root"] == cache.root
    assert str(tmp_path) not in (out / "run.json").read_text()
    assert len(record["identity"]["teachers"]["roots"]) == 2


def test_measured_weights_are_said_and_recorded(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = cache_of(tmp_path / "unknown", LOGITS[2], teacher_seen="unknown")
    out = tmp_path / "run"
    ran([two[0], unknown], ensemble="accuracy", out=str(out), quiet=False)
    said = capsys.readouterr().err
    right = float((LOGITS[0].argmax(dim=1) == LABELS).sum())
    assert f"accuracy on the caches' labelled rows: first {(right + 0.5) / 61:.4f}" in said
    assert "whether the teacher of unknown was trained on these rows" in said
    told = json.loads((out / "run.json").read_text())["data"]["ensemble"]["members"][0]["measured"]
    assert told["labelled_rows"] == ROWS


def test_a_route_file_sends_each_sample_to_its_teacher(two: list[Path], tmp_path: Path) -> None:
    to = ["first", "2"] * (ROWS // 2)
    path = tmp_path / "which.csv"
    path.write_text("teacher,sample_id,why\r\n" + "".join(f"{name},{n},x\r\n" for n, name in enumerate(to)))
    picked = LOGITS[0].clone()
    picked[1::2] = LOGITS[1][1::2]
    wanted = ran(cache_of(tmp_path / "picked", picked))
    kdcache.ensemble(two, tmp_path / "routed.h5", rule=f"route:{path}")
    made = kdcache.ensemble(two, tmp_path / "routed.h5", rule=f"route:{path}", overwrite=True)
    assert made.rule == "route:which.csv"
    assert "2 teachers by the rule route:which.csv: " in made.notes[0]
    assert torch.equal(weights(ran(two, ensemble=f"route:{path}")), weights(wanted))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("id,teacher\n0,1\n", UsageError, "expected sample_id and teacher"),
        ("sample_id,teacher\n", UsageError, "has no lines"),
        ("sample_id,teacher\n0,third\n", UsageError, "teacher 'third' is none of 1, 2, first, second"),
        ("sample_id,teacher\n0,0\n", UsageError, "is none of"),
        ("sample_id,teacher\n0,1\n0,2\n", UsageError, "names the sample 0 twice"),
        ("sample_id,teacher\n0,1\n1,1\n", CoverageError, "has no line for 58 of the 60 samples: 2, 3"),
        ("sample_id,teacher\nx,1\n", UsageError, "is no table"),
        ("sample_id,teacher\n0,1,2\n", UsageError, "has 3 cells, the header 2"),
        ('sample_id,teacher\n"0,1\n', UsageError, "is no table"),
    ],
)
def test_a_route_file_that_cannot_be_meant_is_refused(
    two: list[Path], tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "which.csv"
    path.write_text(content)
    with pytest.raises(error, match=message):
        ran(two, ensemble=f"route:{path}")


@pytest.mark.parametrize("rule", ["random", "entropy"])
def test_a_resumed_run_has_the_same_weights_bit_for_bit(two: list[Path], tmp_path: Path, rule: str) -> None:
    wanted = weights(ran(two, ensemble=rule, epochs=3))
    out, seen = tmp_path / "run", 0

    class Stops(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == 100:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    with pytest.raises(InterruptedRunError):
        ran(two, ensemble=rule, epochs=3, out=str(out), data=Stops(INPUTS, LABELS))
    with pytest.raises(MismatchError, match="teachers"):
        ran([f"{two[0]}=2", two[1]], ensemble=rule, epochs=3, out=str(out), resume=True)
    resumed = ran(two, ensemble=rule, epochs=3, out=str(out), resume=True)
    assert torch.equal(weights(resumed), wanted)


def test_a_random_teacher_is_one_of_them_in_each_step(two: list[Path], tmp_path: Path) -> None:
    same = cache_of(tmp_path / "same", LOGITS[0])
    assert torch.equal(weights(ran([two[0], same], ensemble="random")), weights(ran(two[0])))


def test_rows_of_views_are_joined_by_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "train"))
    from view_caches import Images, write_views

    data = Images(23)

    def views(name: str, numbers: tuple[int, ...], seed: int = 6) -> Path:
        write_views(tmp_path / name, data, named("shift2", seed=seed), numbers, shard_rows=20).close()
        return tmp_path / name

    def trained(caches: Any, **changed: Any) -> Tensor:
        torch.manual_seed(4)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        options = replace(OPTIONS, epochs=4, batch_size=8, check="full", **changed)
        return weights(distill(options, student=student, data=data, cache=caches))

    first, same, fewer, other = (
        views("v1", (0, 1, 2)),
        views("v2", (0, 1, 2)),
        views("v3", (0, 1)),
        views("v4", (0, 1), 7),
    )
    # The teacher's logits say which view they are of, so that a row of another view would change the mean.
    assert torch.equal(trained([first, same]), trained(first))
    assert torch.equal(trained([first, same], view_order="random"), trained(first, view_order="random"))
    assert torch.equal(trained([first, fewer], views=2), trained(first, views=2))
    with pytest.raises(MismatchError, match=r"v3 has the views \[0, 1\], not \[2\], which v1 has"):
        trained([first, fewer])
    with pytest.raises(MismatchError, match=r"v4 was dumped with the pipeline .* their teachers saw other inputs"):
        trained([fewer, other])


def test_hidden_labels_leave_no_trace_in_any_member(two: list[Path], tmp_path: Path) -> None:
    visible = choose_labelled(LABELS.numpy(), np.arange(ROWS), fraction=0.3, seed=0)
    few = torch.full_like(LABELS, -1)
    few[visible] = LABELS[visible]
    sparse = []
    for name, labels in (("all", LABELS), ("few", few)):
        cache_of(tmp_path / f"{name}-dense", LOGITS[1], labels=labels)
        sparse.append(tmp_path / f"{name}-sparse")
        kdcache.convert(tmp_path / f"{name}-dense", sparse[-1], top_k=1, temperatures=(4.0,))
    first = ran([two[0], sparse[0]], label_fraction=0.3, alpha=0.6)
    bare = cache_of(tmp_path / "bare", LOGITS[0], labels=few)
    second = ran([bare, sparse[1]], data=TensorDataset(INPUTS, few), alpha=0.6)
    torch.testing.assert_close(weights(first), weights(second), rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="those that --label-fraction hides too"):
        ran(two, ensemble="accuracy", label_fraction=0.3)


def test_a_single_path_and_an_open_cache_go_on_working(two: list[Path]) -> None:
    wanted = weights(ran(two[0]))
    assert torch.equal(weights(ran(None, cache=str(two[0]))), wanted)
    assert torch.equal(weights(ran(None, cache=(f"{two[0]}=2",))), wanted)
    with kdcache.open(two[0]) as opened, kdcache.open(two[1]) as other:
        assert torch.equal(weights(ran(opened)), wanted)
        assert torch.equal(weights(ran([opened, other])), weights(ran(two)))


def test_a_path_and_its_weight_are_told_apart(two: list[Path], tmp_path: Path) -> None:
    odd = cache_of(tmp_path / "seed=3", LOGITS[0])
    assert parse_cache(str(odd), option="--cache").weight == 1
    assert parse_cache(f"{odd}=0.5", option="--cache").weight == 0.5
    assert parse_cache("not=here.h5", option="--cache").weight == 1
    for text in (f"{odd}=0", f"{odd}=-1", f"{odd}=inf", f"{odd}=nan", f"{odd}=two", "=2"):
        with pytest.raises(UsageError, match="weight"):
            parse_cache(text, option="--cache")
    assert [one.name for one in asked_caches(two, (), option="--cache")] == ["first", "second"]
    assert asked_caches(None, (), option="--cache") == ()
