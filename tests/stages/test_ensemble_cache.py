"""`ensemble`: the cache that it writes teaches what all the caches together do."""

from __future__ import annotations

import json
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
from kdcache.errors import CorruptCacheError, CoverageError, KDCacheError, MismatchError, UsageError
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.store.verify import verify

ROWS, CLASSES = 50, 6
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 5, generator=GENERATOR)
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=GENERATOR)
LOGITS = [
    torch.randn(ROWS, CLASSES, generator=GENERATOR) * 3 + sure * nn.functional.one_hot(LABELS, CLASSES)
    for sure in (1, 3, 5)
]
OPTIONS = DistillOptions(epochs=2, batch_size=16, device="cpu", quiet=True, seed=3, temperature=4.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("a.h5", "b", "c")]
    for path, logits in zip(paths, LOGITS, strict=True):
        write(path, logits)
    return paths


def write(path: Path, logits: Tensor, *, rows: slice = slice(None), labels: Tensor = LABELS, **provenance: Any) -> Path:
    known = {"teacher": {"spec": path.name}, "teacher_seen": "no", **provenance}
    with kdcache.Writer(path, classes=CLASSES, dtype="float32", shard_rows=16, provenance=known) as writer:
        writer.write(np.arange(ROWS)[rows], logits[rows].numpy(), labels[rows].numpy())
    return path


def ran(caches: Any, **changed: Any) -> Tensor:
    torch.manual_seed(4)
    student = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    data = TensorDataset(INPUTS, LABELS)
    result = distill(replace(OPTIONS, **changed), student=student, data=data, cache=caches)
    return torch.cat([parameter.detach().reshape(-1) for parameter in result.student.parameters()])


@pytest.mark.parametrize("name", ["mean.h5", "mean"])
@pytest.mark.parametrize(
    "rule",
    [
        "logits",
        "soft-targets",
        "accuracy",
        "calibration",
        "class-accuracy",
        "entropy",
        "cross-entropy",
        "route:max-confidence",
    ],
)
def test_a_student_of_the_new_cache_is_the_student_of_all(
    three: list[Path], tmp_path: Path, rule: str, name: str
) -> None:
    asked = [f"{three[0]}=2", str(three[1]), str(three[2])]
    at = None if rule in ("logits", "route:max-confidence") else 4.0
    made = kdcache.ensemble(asked, tmp_path / name, rule=rule, temperature=at, dtype="float32")
    assert verify(tmp_path / name, expect_root=made.root).problems == ()
    wanted = ran(asked, ensemble=rule)
    assert torch.equal(ran(tmp_path / name), wanted)
    kdcache.ensemble(asked, tmp_path / "half", rule=rule, temperature=at)
    assert (ran(tmp_path / "half") - wanted).abs().max() < 2e-3


def test_sparse_caches_make_sparse_soft_targets(three: list[Path], tmp_path: Path) -> None:
    kdcache.convert(three[1], tmp_path / "sparse", top_k=3)
    asked = [three[0], tmp_path / "sparse"]
    kdcache.ensemble(asked, tmp_path / "mean.h5", temperature=4.0, dtype="float32")
    with kdcache.open(tmp_path / "mean.h5") as cache:
        assert cache.encoding.to_json() == {
            "name": "soft_targets",
            "dtype": "float32",
            "shape": [CLASSES],
            "k": 4,
            "temperature": 4.0,
        }
    assert verify(tmp_path / "mean.h5").problems == ()
    assert torch.equal(ran(tmp_path / "mean.h5"), ran(asked))


def test_the_provenance_names_every_cache_and_the_teacher_is_no_longer_the_first(
    three: list[Path], tmp_path: Path
) -> None:
    write(tmp_path / "seen", LOGITS[1], teacher_seen="yes")
    kdcache.ensemble([f"{three[0]}=3", str(tmp_path / "seen")], tmp_path / "mean")
    with kdcache.open(tmp_path / "mean") as cache, kdcache.open(three[0]) as first:
        told = cache.provenance
        assert told["ensemble"]["rule"] == "logits"
        assert [(one["name"], one["weight"]) for one in told["ensemble"]["members"]] == [("a.h5", 3.0), ("seen", 1.0)]
        assert told["ensemble"]["members"][0]["root"] == first.root
        assert told["ensemble"]["members"][0]["provenance"]["teacher"] == {"spec": "a.h5"}
        assert told["teacher"] == {"spec": "ensemble of a.h5, seen"}
        assert told["teacher_seen"] == "yes"
        rows = cache.gather(np.arange(ROWS))
    np.testing.assert_array_equal(rows.label, LABELS.numpy())
    assert str(tmp_path) not in str(told)


def test_soft_targets_refuse_another_temperature_and_other_losses(three: list[Path], tmp_path: Path) -> None:
    kdcache.ensemble(three, tmp_path / "mean", rule="soft-targets", temperature=4.0)
    ran(tmp_path / "mean", loss=("reverse_kl", "js:beta=0.3*0.5"))
    for changed in (
        {"temperature": 2.0},
        {"temperature_schedule": "linear:1"},
        {"loss": ("kl:temperature=2",)},
        {"loss": ("dist",)},
        {"loss": ("mse",)},
        {"confidence_below": 0.5},
    ):
        with pytest.raises(UsageError, match="these rows are soft targets at temperature 4"):
            ran(tmp_path / "mean", **changed)
    ran(tmp_path / "mean", hard_targets=True)


@pytest.mark.parametrize("use", ["calibrate", "calibrate on", "suspects", "convert", "classes", "calibration"])
def test_tools_that_need_logits_say_so(three: list[Path], tmp_path: Path, use: str) -> None:
    kdcache.ensemble(three, tmp_path / "mean", rule="soft-targets", temperature=4.0)
    tools: dict[str, Any] = {
        "calibrate": lambda: kdcache.calibrate(tmp_path / "mean"),
        "suspects": lambda: kdcache.suspects(tmp_path / "mean", tmp_path / "s.csv"),
        "convert": lambda: kdcache.convert(tmp_path / "mean", tmp_path / "x", top_k=2),
        "calibrate on": lambda: kdcache.calibrate(tmp_path / "mean", on=three[0], allow_seen=True),
        "classes": lambda: ran(tmp_path / "mean", classes=str(class_map(tmp_path))),
        "calibration": lambda: kdcache.ensemble([tmp_path / "mean", three[0]], tmp_path / "x"),
    }
    with pytest.raises(KDCacheError, match=r"soft|several teachers|part of the logits"):
        tools[use]()


def class_map(folder: Path) -> Path:
    names = [str(number) for number in range(CLASSES)]
    (folder / "map.json").write_text(json.dumps({"student": names, "map": {name: name for name in names[::-1]}}))
    return folder / "map.json"


def test_samples_that_one_lacks_may_be_left_to_the_others(three: list[Path], tmp_path: Path) -> None:
    part = write(tmp_path / "part", LOGITS[1], rows=slice(0, 30))
    with pytest.raises(CoverageError, match="part lacks 20 of the 50 samples"):
        kdcache.ensemble([three[0], part], tmp_path / "mean")
    kdcache.ensemble([three[0], part], tmp_path / "mean", missing="vote", dtype="float32")
    with kdcache.open(tmp_path / "mean") as cache:
        found = torch.from_numpy(cache.gather(np.arange(ROWS)).dense())
    assert torch.equal(found[30:], LOGITS[0][30:])
    torch.testing.assert_close(found[:30], (LOGITS[0][:30] + LOGITS[1][:30]) / 2)
    kdcache.ensemble([part, three[0]], tmp_path / "fewer", dtype="float32")
    with kdcache.open(tmp_path / "fewer") as cache:
        assert cache.num_samples == 30


def test_what_cannot_be_meant_is_refused_and_nothing_is_written(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "mean"
    wrong = write(tmp_path / "wrong", LOGITS[1], labels=(LABELS + 1) % CLASSES)
    for caches, options, error, message in (
        (three[:1], {}, UsageError, "two caches or more, found 1"),
        ([three[0], three[0]], {}, UsageError, "names a.h5 twice"),
        (three, {"rule": "random"}, UsageError, "makes no cache"),
        (three, {"rule": "median"}, UsageError, "is not known"),
        (three, {"rule": "soft-targets"}, UsageError, "give --temperature"),
        (three, {"temperature": 4.0}, UsageError, "has no effect on --rule logits"),
        (three, {"rule": "soft-targets", "temperature": 0.0}, UsageError, "have a temperature from"),
        (three, {"rule": "soft-targets", "temperature": 4.0, "dtype": "int8"}, UsageError, "float16 or float32"),
        (three, {"dtype": "float8"}, UsageError, "float8"),
        (three, {"missing": "skip"}, UsageError, "choose error or vote"),
        (three, {"shard_rows": 0}, UsageError, "--shard-rows"),
        ([three[0], wrong], {}, MismatchError, "50 labels differ"),
        ([three[0], tmp_path / "none"], {}, KDCacheError, "none"),
    ):
        with pytest.raises(error, match=message):
            kdcache.ensemble(caches, out, **options)
        assert not out.exists()
    with pytest.raises(UsageError, match=r"is a cache that is read|is the cache that is read"):
        kdcache.ensemble(three, three[1], overwrite=True)
    kdcache.ensemble(three, out)
    with pytest.raises(UsageError, match="exists; choose another name or pass --overwrite"):
        kdcache.ensemble(three, out)
    kdcache.ensemble(three, out, overwrite=True)


def test_teachers_at_chance_cannot_be_weighed(tmp_path: Path) -> None:
    caches = [write(tmp_path / name, -5.0 * nn.functional.one_hot(LABELS, CLASSES).float()) for name in ("x", "y")]
    with pytest.raises(UsageError, match="no teacher is better than chance"):
        kdcache.ensemble(caches, tmp_path / "mean", rule="accuracy", temperature=4.0)
    assert not (tmp_path / "mean").exists()


def test_a_damaged_member_leaves_nothing_behind(three: list[Path], tmp_path: Path) -> None:
    shard = next((three[1] / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(bytes(data))
    for name in ("mean", "mean.h5"):
        with pytest.raises(CorruptCacheError):
            kdcache.ensemble(three, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_masked_classes_stay_masked(tmp_path: Path) -> None:
    masked = LOGITS[1].clone()
    masked[:, 2] = -torch.inf
    caches = [write(tmp_path / "x", LOGITS[0]), write(tmp_path / "y", masked)]
    kdcache.ensemble(caches, tmp_path / "mean")
    with kdcache.open(tmp_path / "mean") as cache:
        found = cache.gather(np.arange(ROWS)).dense()
    assert np.isneginf(found[:, 2]).all()
    assert np.isfinite(np.delete(found, 2, axis=1)).all()
