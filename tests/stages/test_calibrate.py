"""`calibrate`: what it fits to, what it measures on, what it refuses, and its side file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache
from kdcache.errors import CorruptCacheError, DataError, IncompleteCacheError, MismatchError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.format.sealed import dump_sealed
from kdcache.stages import calibrate as stage
from kdcache.stages.calibrate import calibrate
from kdcache.stages.calibration_file import load_calibration
from kdcache.store.dump import open_dump
from kdcache.store.plan import Plan
from kdcache.store.posix import read_file
from kdcache.train.calibrated import Calibration

ROWS, CLASSES = 800, 5
GENERATOR = np.random.default_rng(0)
TRUE = GENERATOR.normal(size=(ROWS, CLASSES)).astype(np.float32) * 2
NOISE = GENERATOR.gumbel(size=(ROWS, CLASSES))
LABELS = (TRUE + NOISE).argmax(1)  # drawn from the softmax of TRUE

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A cache of TRUE times 3, whose teacher has not seen the rows."""

    def made(
        name: str = "teacher.h5",
        *,
        labels: np.ndarray | None = LABELS,
        seen: str | None = "no",
        weights: str | None = "a" * 64,
        views: int = 1,
        logits: np.ndarray = TRUE * 3,
        **options: Any,
    ) -> Path:
        provenance: dict[str, Any] = {} if seen is None else {"teacher_seen": seen}
        if weights is not None:
            provenance["teacher"] = {"state_sha256": weights}
        if views > 1:
            return write_views(tmp_path / name, views, provenance)
        classes = options.pop("classes", logits.shape[1])
        with kdcache.Writer(tmp_path / name, classes=classes, provenance=provenance, **options) as writer:
            writer.write(np.arange(len(logits)), logits, labels)
        return tmp_path / name

    return made


def write_views(path: Path, views: int, provenance: dict[str, Any]) -> Path:
    """A folder with views of TRUE times 3, as `precompute` builds one."""
    encoding = Dense((CLASSES,), "float32")
    schema = RowSchema(encoding, "<i8", has_labels=True, has_digests=False)
    plan = Plan(schema, ClassList.of(CLASSES, None), 300, ROWS, provenance, tuple(range(views)))
    dump = open_dump(path, plan)
    for number in range(plan.shard_count):
        view, start, stop = plan.span(number)
        index = number % plan.shards_per_view
        assert dump.claim(view, index)
        container = dump.container(view, index, start, stop)
        ids = np.arange(start, stop)
        arrays = encoding.encode(TRUE[start:stop] * 3 + np.float32(view)).arrays
        container.append({"sample_id": ids, "label": LABELS[start:stop], **arrays}, view=view, positions=ids)
        dump.commit(container, container.record(view=view, start=start, ids=(start, stop - 1)), index)
        dump.release(view, index)
    records = dump.all_records()
    assert records is not None
    dump.finish(records, samples=ROWS)
    return path


def test_an_over_confident_teacher_is_measured_before_and_after_on_rows_held_out(make: Make) -> None:
    result = calibrate(make())
    assert result.stored.calibration.temperature == pytest.approx(3, rel=0.15)
    assert (result.before.rows, result.stored.fitted_on["rows"]) == (160, 640)
    for name in ("nll", "ece", "brier"):
        assert getattr(result.after, name) < getattr(result.before, name)
    assert result.notes == ()
    assert result.path.name == "teacher.h5.calibration.json"


def test_the_same_seed_gives_the_same_file_and_another_one_another_split(make: Make, tmp_path: Path) -> None:
    cache = make()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibrate(cache, out=tmp_path / name, seed=seed)
    texts = [(tmp_path / name).read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_the_logits_and_the_root_stay_and_the_file_is_of_this_cache_alone(make: Make) -> None:
    path, other = make(), make("other", logits=TRUE)
    before = kdcache.open(path).root
    result = calibrate(path, method="bias")
    with kdcache.open(path) as cache:
        assert cache.root == before
        stored = load_calibration(result.path, cache)
        assert stored == result.stored
        assert stored.describe()["temperature"] == result.stored.calibration.temperature
        assert "bias" not in stored.describe()
    with kdcache.open(other) as cache, pytest.raises(MismatchError, match="belongs to other logits"):
        load_calibration(result.path, cache)


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"dtype": "float32"}, {"shard_rows": 100}])
def test_every_dense_cache_gives_nearly_the_same_temperature(make: Make, options: dict[str, Any]) -> None:
    name = "sharded" if "shard_rows" in options else "other.h5"
    expected, found = calibrate(make()), calibrate(make(name, **options))
    near = expected.stored.calibration.temperature
    assert found.stored.calibration.temperature == pytest.approx(near, rel=2e-3)


def test_topk_rows_take_a_temperature_and_tell_all_but_the_brier_score(make: Make) -> None:
    path = make("sparse", top_k=3, temperatures=[1, 2, 4])
    result = calibrate(path)
    assert result.stored.calibration.temperature == pytest.approx(3, rel=0.15)
    assert result.after.brier is None
    assert result.to_json()["after"]["missing"]["brier"]
    with pytest.raises(UsageError, match="logits of all classes"):
        calibrate(path, method="vector", overwrite=True)


def test_another_cache_of_the_same_teacher_may_be_fitted_to(make: Make) -> None:
    seen, unseen = make("train.h5", seen="yes", labels=None), make("val.h5", logits=TRUE * 3 + 1)
    result = calibrate(seen, on=unseen, method="bias")
    assert result.stored.root == kdcache.open(seen).root
    assert result.stored.fitted_on["root"] == kdcache.open(unseen).root
    assert result.notes == ()
    assert calibrate(seen, on=make("unsaid", weights=None), overwrite=True).notes[0].startswith("train.h5 and unsaid")
    for other, message in (
        (make("b.h5", weights="b" * 64), "different weights"),
        (make("c.h5", logits=TRUE[:, :4], labels=LABELS % 4), "5 classes, c.h5 4"),
    ):
        with pytest.raises(MismatchError, match=message):
            calibrate(seen, on=other, overwrite=True)
    names = make("d.h5", classes=list("abcde")), make("e.h5", classes=list("abced"))
    with pytest.raises(MismatchError, match="name their classes differently"):
        calibrate(names[0], on=names[1])


def test_rows_that_the_teacher_was_trained_on_are_refused_with_the_reason_unless_asked_for(make: Make) -> None:
    path = make(seen="yes")
    with pytest.raises(UsageError, match=r"was trained on these rows \(teacher_seen: yes\).*comes out too low"):
        calibrate(path)
    assert not path.with_name("teacher.h5.calibration.json").exists()
    assert "trained on" in calibrate(path, allow_seen=True).notes[0]


@pytest.mark.parametrize("seen", [None, "unknown", "perhaps"])
def test_where_nobody_knows_whether_it_was_there_is_a_warning(
    make: Make, seen: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    result = calibrate(make(seen=seen))
    assert "teacher_seen: unknown" in capsys.readouterr().err
    assert result.stored.fitted_on["teacher_seen"] == "unknown"


def test_labels_that_the_teacher_always_gets_right_or_wrong_are_said_to_be_so(make: Make) -> None:
    assert "lower bound" in calibrate(make("a.h5", labels=TRUE.argmax(1))).notes[0]
    assert "upper bound" in calibrate(make("b.h5", labels=TRUE.argmin(1))).notes[0]


def test_of_very_many_rows_some_are_fitted_to_and_all_held_out_ones_measured(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "FIT_VALUES", 100 * CLASSES)
    result = calibrate(make())
    assert result.stored.fitted_on["rows"] == 100
    assert result.before.rows == 160


def test_all_views_of_a_sample_are_on_one_side_of_the_split(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[set[int]] = []
    blocks = stage._blocks

    def watched(source: kdcache.Cache, positions: np.ndarray) -> Iterator[kdcache.TeacherRows]:
        sides.append(set())
        for rows in blocks(source, positions):
            sides[-1].update(rows.sample_id.tolist())
            yield rows

    monkeypatch.setattr(stage, "_blocks", watched)
    result = calibrate(make(views=2))
    fitted, held_out = sides
    assert not fitted & held_out
    assert (len(fitted), len(held_out)) == (640, 160)
    assert (result.stored.fitted_on["rows"], result.before.rows) == (1280, 320)


def test_samples_without_a_label_are_left_out(make: Make) -> None:
    labels = np.where(np.arange(ROWS) % 4 == 0, LABELS, -1)
    result = calibrate(make(labels=labels))
    assert (result.stored.fitted_on["rows"], result.before.rows) == (160, 40)


def test_what_cannot_be_calibrated_is_refused(make: Make, tmp_path: Path) -> None:
    few = np.where(np.arange(ROWS) < 30, LABELS, -1)
    maps = np.zeros((ROWS, 3, 2, 2), np.float32)
    for name, error, message, options in (
        ("a.h5", UsageError, "no labels", {"labels": None}),
        ("b.h5", DataError, "has 30 labelled samples", {"labels": few}),
        ("c.h5", DataError, "has 0 labelled samples", {"labels": np.full(ROWS, -1)}),
        ("d.h5", DataError, "are class 2", {"labels": np.full(ROWS, 2)}),
        ("e.h5", UsageError, "one class", {"logits": TRUE[:, :1], "labels": LABELS % 2}),
        ("f.h5", UsageError, "dense prediction", {"logits": maps, "labels": LABELS % 3}),
        ("g.h5", UsageError, "temperatures", {"top_k": 1, "temperatures": [1]}),
    ):
        with pytest.raises(error, match=message):
            calibrate(make(name, **options))
    path = make()
    for changed, message in (
        ({"holdout": 0.0}, "--holdout"),
        ({"holdout": 1.0}, "--holdout"),
        ({"holdout": float("nan")}, "--holdout"),
        ({"seed": -1}, "--seed"),
        ({"method": "matrix"}, "--method"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(path, **changed)
    with pytest.raises(IncompleteCacheError):
        calibrate(tmp_path / "nothing.h5")
    assert not list(tmp_path.glob("*.calibration.json"))


def test_a_file_that_is_there_is_replaced_only_when_asked_and_only_if_it_is_a_calibration(make: Make) -> None:
    path = make()
    first = calibrate(path)
    with pytest.raises(UsageError, match="--overwrite"):
        calibrate(path)
    calibrate(path, seed=5, overwrite=True)
    assert first.path.read_bytes() != dump_sealed(first.stored.to_json())
    with pytest.raises(UsageError, match="no calibration file"):
        calibrate(path, out=path, overwrite=True)
    kdcache.open(path).close()


def test_a_file_that_was_edited_or_is_something_else_is_refused(make: Make, tmp_path: Path) -> None:
    path = make()
    content = calibrate(path, method="bias").stored.to_json()
    bad: list[dict[str, Any]] = [
        {**content, "kdcache_calibration": 2},
        {**content, "kdcache_calibration": True},
        {**content, "more": 1},
        {**content, "temperature": 0.0},
        {**content, "temperature": -1.0},
        {**content, "temperature": 2},
        {**content, "temperature": "2.0"},
        {**content, "root": None},
        {**content, "bias": [1.0, "2"]},
        {**content, "bias": "abcde"},
        {**content, "before": []},
        {},
    ]
    with kdcache.open(path) as cache:
        for index, value in enumerate(bad):
            where = tmp_path / f"bad{index}.json"
            where.write_bytes(dump_sealed(value))
            with pytest.raises(CorruptCacheError, match=where.name):
                load_calibration(where, cache)
        edited = tmp_path / "edited.json"
        edited.write_bytes(dump_sealed(content).replace(b'"method":"bias"', b'"method":"none"'))
        with pytest.raises(CorruptCacheError, match="does not match its seal"):
            load_calibration(edited, cache)
        edited.write_text(json.dumps(content))
        with pytest.raises(CorruptCacheError):
            load_calibration(edited, cache)
        edited.write_bytes(dump_sealed({**content, "bias": content["bias"][:-1]}))
        with pytest.raises(MismatchError, match="4 classes"):
            load_calibration(edited, cache)
        with pytest.raises(UsageError, match="there is no file"):
            load_calibration(tmp_path / "nothing.json", cache)


def test_a_number_that_cannot_be_told_is_null_in_the_file(make: Make) -> None:
    masked = TRUE * 3
    masked[:, 4] = np.where(LABELS == 4, masked[:, 4], -np.inf)
    result = calibrate(make(logits=masked))
    content = json.loads(read_file(result.path, 1 << 20))
    assert content["after"]["nll"] == pytest.approx(result.after.nll)
    assert result.stored.calibration == Calibration(content["temperature"])
