"""Students in a report: what is compared with what, when a class counts as lost, damaged records."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kdcache.errors import CorruptCacheError, KDCacheError, UsageError
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.report_students import class_gains, mean_of, students

OPTIONS = DistillOptions(epochs=10, batch_size=16, device="cpu", quiet=True)
ROWS = 50  # validation rows of each class


def write_run(
    folder: Path, *, alpha: float = 0.9, seed: int = 0, correct: tuple[int, ...] = (40, 40, 40), **changes: Any
) -> Path:
    """The folder of a finished run on three classes, as `distill` writes it; changes replace fields of the record."""
    options = {
        "student": "mlp:6-8-3", "data": "digits:train", "val": "digits:test", "alpha": alpha, "seed": seed,
        "batch_size": 16, "epochs": 10, "lr": 0.1, "optimizer": "sgd", "weight_decay": 5e-4, "schedule": "cosine",
    }  # fmt: skip
    options |= changes.pop("options", {})
    labelled = 3 * ROWS
    bins = [
        {"low": at / 15, "high": (at + 1) / 15, "rows": labelled if at == 12 else 0, "confidence": 0.8, "accuracy": 0.8}
        for at in range(15)
    ]
    val = {
        "rows": labelled, "labelled": labelled, "accuracy": sum(correct) / labelled, "nll": 0.5, "brier": 0.3,
        "ece": {"equal_width": 0.01, "equal_mass": 0.01}, "confidence": 0.8, "reliability": bins,
        "class_rows": [ROWS] * 3, "class_correct": list(correct), "class_predicted": [ROWS] * 3,
        "confusions": [{"label": 0, "student_class": 1, "rows": 3}],
        "taught": labelled, "agreement": 0.9, "kl": 0.1,
    }  # fmt: skip
    train = {"rows": 200, "labelled": 200, "accuracy": 0.95, "taught": 200, "agreement": 0.95, "kl": 0.05}
    val |= changes.pop("val_measures", {})
    train |= changes.pop("train_measures", {})
    data: dict[str, Any] = {"rows": 1000, "fingerprint": "f", "data": {"name": "digits:train", "fingerprint": "aa"}}
    if alpha:
        data["cache"] = {"name": "teacher", "root": "00" * 32}
    record = {
        "kdcache_run": 1, "status": "done", "options": options, "formula": f"alpha {alpha:g}",
        "student": {"spec": "mlp:6-8-3", "classes": 3, "parameters": 83}, "data": data,
        "val": {"rows": labelled, "data": {"name": "digits:test", "fingerprint": "bb"}},
        "total_steps": 630, "steps": 630, "identity": {**options, "data cache root": alpha and "00"},
        "measures": {"weights": "last", "val": val, "train": train, "missing": {}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**record, **changes}))
    lines = [{"step": step, "event": "train", "loss": 1 / step} for step in range(1, 631)]
    lines += [{"step": step, "event": "eval", "val_accuracy": 0.5} for step in (315, 630)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(advice: list[dict[str, Any]]) -> str:
    assert all(set(one) == {"section", "level", "text", "command"} for one in advice)
    return "\n".join(one["text"] for one in advice)


def test_real_runs_end_in_one_entry_a_setting(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    toy = make_toy()
    folders = []
    for alpha in (0.0, 0.9):
        for seed in range(2):
            options = replace(OPTIONS, alpha=alpha, seed=seed, out=str(tmp_path / f"run{alpha:g}-{seed}"))
            cache = toy.cache if alpha else None
            distill(options, student=nn.Linear(6, 4), data=toy.data, val=toy.data, cache=cache)
            folders.append(tmp_path / f"run{alpha:g}-{seed}")
    entries, advice = students(folders[::-1])
    assert [entry["labels_only"] for entry in entries] == [True, False]
    assert [run["seed"] for run in entries[1]["runs"]] == [1, 0]
    found = [json.loads((folder / "run.json").read_text())["measures"]["val"]["accuracy"] for folder in folders]
    assert entries[1]["held_out"]["accuracy"] == mean_of(found[2:][::-1])
    against = entries[1]["against_labels"]
    assert against["why_not"] is None
    assert against["accuracy"]["gain"] == pytest.approx(np.mean(found[2:]) - np.mean(found[:2]))
    assert against["accuracy"]["of"] == "seeds"
    assert sum(row["rows"] for row in against["classes"]) == 100
    assert entries[0]["curves"][0]["evaluations"][-1]["step"] == 70
    assert "against labels only" in texts(advice)


def test_classes_that_lost_are_named(tmp_path: Path) -> None:
    labels = write_run(tmp_path / "labels", alpha=0, correct=(48, 40, 40))
    kd = write_run(tmp_path / "kd", correct=(20, 41, 50))
    entries, advice = students([kd, labels])
    verdicts = [row["verdict"] for row in entries[1]["against_labels"]["classes"]]
    assert verdicts == ["lost", "same", "gained"]
    assert "kd: class 0 (-56.0) lost accuracy against labels only" in texts(advice)
    assert "the teacher hurts" in texts(advice)


def test_seeds_make_a_mean_with_its_standard_error(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"kd{seed}", seed=seed, correct=(40 + seed, 40, 40)) for seed in range(3)]
    (entry,), _ = students(runs)
    shares = np.array([120, 121, 122]) / 150
    assert entry["held_out"]["accuracy"]["mean"] == pytest.approx(shares.mean())
    assert entry["held_out"]["accuracy"]["standard_error"] == pytest.approx(shares.std(ddof=1) / math.sqrt(3))
    assert entry["held_out"]["classes"][0] == {"class": 0, "rows": 50, "accuracy": 123 / 150, "predicted": 50.0}
    assert entry["held_out"]["confusions"] == [{"label": 0, "student_class": 1, "rows": 3.0}]
    assert entry["name"] == "kd0 and 2 more"


@pytest.mark.parametrize(("seeds", "says"), [(2, "no difference that these runs can tell"), (5, "the teacher helps")])
def test_two_seeds_tell_nothing_that_five_do(tmp_path: Path, seeds: int, says: str) -> None:
    """Three points at two to seven standard errors: with two seeds Student's t asks for 12.7 of them."""
    runs = []
    for seed in range(seeds):
        jitter = seed % 2
        runs.append(write_run(tmp_path / f"kd{seed}", seed=seed, correct=(44 + jitter, 41, 41)))
        runs.append(write_run(tmp_path / f"labels{seed}", seed=seed, alpha=0.0, correct=(40 + jitter, 41, 41)))
    entries, advice = students(runs)
    (against,) = (entry["against_labels"]["accuracy"] for entry in entries if entry["against_labels"])
    assert against["gain"] == pytest.approx(4 / 150)
    assert against["standard_errors_needed"] == {2: 12.706, 5: 2.776}[seeds]
    assert says in texts(advice)


def test_without_labels_only_the_advice_is_the_command_that_trains_it(tmp_path: Path) -> None:
    _, advice = students([write_run(tmp_path / "kd", options={"data": "npz:my data.npz", "lr": 0.05})])
    (command,) = [one["command"] for one in advice if one["command"]]
    words = shlex.split(command)
    assert words[:2] == ["kdcache", "distill"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--data"] == "npz:my data.npz"
    assert (given["--alpha"], given["--lr"], given["--batch-size"]) == ("0", "0.05", "16")
    assert given["--steps"] == "630"
    assert "--cache" not in given


def test_the_command_keeps_the_views_and_the_share_of_the_labels(tmp_path: Path) -> None:
    data = {"rows": 9, "data": {"name": "d"}, "cache": {"root": "00"}, "views": {"augment": "crop4"}}
    given = {"cache": ["one.h5", "two"], "label_fraction": 0.1, "unlabelled": "keep", "drop_last": True}
    _, advice = students([write_run(tmp_path / "kd", data=data, options=given)])
    (command,) = [one["command"] for one in advice if one["command"]]
    assert "--cache one.h5 --alpha 0" in command
    assert "--label-fraction 0.1" in command
    assert "--steps 630 --unlabelled drop" in command
    assert "--epochs" not in command
    assert "--drop-last --" in command


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"total_steps": 100}, "another steps: 630 against 100"),
        ({"student": {"spec": "mlp:6-3", "classes": 3, "parameters": 21}}, "another student"),
        ({"options": {"batch_size": 32}}, "another batch size"),
        ({"val": {"rows": 150, "data": {"name": "digits:test", "fingerprint": "cc"}}}, "another validation rows"),
        ({"data": {"rows": 900, "data": {"name": "digits:train", "fingerprint": "aa"}}}, "another training rows"),
    ],
)
def test_what_is_not_comparable_is_not_compared(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    labels = write_run(tmp_path / "labels", alpha=0, **change)
    entries, advice = students([labels, write_run(tmp_path / "kd")])
    against = entries[1]["against_labels"]
    assert why in against["why_not"]
    assert against["accuracy"] is None
    assert against["classes"] == []
    assert why in texts(advice)


def test_of_several_label_only_settings_the_most_alike_is_compared(tmp_path: Path) -> None:
    others = [write_run(tmp_path / f"labels{lr}", alpha=0, options={"lr": lr}) for lr in (0.5, 0.1, 0.02)]
    entries, _ = students([*others, write_run(tmp_path / "kd")])
    assert entries[-1]["against_labels"]["with"] == "labels0.1"
    assert entries[-1]["against_labels"]["differs"] == []
    entries, _ = students([others[0], tmp_path / "kd"])
    assert entries[-1]["against_labels"]["differs"] == ["lr 0.1 against 0.5"]


def test_all_labels_are_all_labels_whatever_their_seed(tmp_path: Path) -> None:
    rest = {"fraction": 1.0, "seed": 0, "unlabelled": "keep", "labelled_rows": 600, "other_rows": 400}
    rows = {"fingerprint": "f", "data": {"name": "digits:train", "fingerprint": "aa"}}
    labels = write_run(
        tmp_path / "labels", alpha=0, data={**rows, "rows": 600}, options={"label_fraction": 1.0, "unlabelled": "drop"},
        labels={**rest, "unlabelled": "drop", "other_rows": 0},
    )  # fmt: skip
    cache = {"name": "teacher", "root": "00" * 32}
    plain = write_run(tmp_path / "plain", data={**rows, "rows": 600, "cache": cache})
    kept = write_run(
        tmp_path / "kept", data={**rows, "rows": 1000, "cache": cache}, options={"label_fraction": 1.0}, labels=rest
    )
    some = write_run(
        tmp_path / "some", data={**rows, "rows": 600, "cache": cache}, options={"label_fraction": 0.5}, labels=rest
    )
    entries, _ = students([labels, plain, kept, some])
    found = {entry["name"]: entry["against_labels"] for entry in entries[1:]}
    assert [found[name]["why_not"] for name in ("plain", "kept")] == [None, None]
    assert "0.5 of the labels (label seed 0)" in found["some"]["why_not"]


def test_an_interrupted_run_is_at_the_step_that_its_record_says(tmp_path: Path) -> None:
    part = write_run(tmp_path / "part", status="interrupted", steps=7, measures=None)
    (part / "metrics.jsonl").write_text("")  # stopped before the first line
    entries, _ = students([part])
    assert entries[0]["runs"][0]["step"] == 7


def test_runs_of_another_cache_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "kd"), write_run(tmp_path / "labels", alpha=0)]
    assert "learnt from another one" not in texts(students(runs, root="00" * 32)[1])
    text = texts(students(runs, root="11" * 32)[1])
    assert "not of this cache (111111111111): kd (000000000000) learnt from another one" in text
    members = [{"root": "22" * 32}, {"root": "11" * 32}]
    data = {"rows": 9, "data": {}, "cache": {"root": "22" * 32}, "ensemble": {"members": members}}
    several = write_run(tmp_path / "several", data=data)
    assert "several (" not in texts(students([several], root="11" * 32)[1])


def test_the_folder_of_a_sweep_leads_to_its_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "runs" / "000-alpha0")
    for folder in (tmp_path / "sweep", tmp_path / "sweep" / "runs"):
        with pytest.raises(UsageError, match=f"such as {run}: give --run with each"):
            students([folder])


def test_alpha_0_with_a_cache_is_labels_only_if_every_row_has_a_label(tmp_path: Path) -> None:
    cache = {"rows": 1000, "data": {"name": "d", "fingerprint": "aa"}, "cache": {"root": "00"}}
    labels = write_run(tmp_path / "labels", alpha=0, data=cache)
    partly = write_run(tmp_path / "partly", alpha=0, data=cache, train_measures={"labelled": 150}, options={"lr": 1.0})
    entries, _ = students([labels, partly])
    assert [entry["labels_only"] for entry in entries] == [True, False]


def test_a_student_too_small_one_without_rows_and_one_too_sure_are_told(tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", train_measures={"agreement": 0.6})
    narrow = write_run(
        tmp_path / "narrow", train_measures={"agreement": 1.0}, val_measures={"agreement": 0.7}, options={"lr": 0.2}
    )
    sure = write_run(
        tmp_path / "sure",
        val_measures={"ece": {"equal_width": 0.2, "equal_mass": 0.2}, "confidence": 0.99},
        options={"lr": 0.3},
    )
    found = texts(students([small, narrow, sure])[1])
    assert "small: only 60 % agreement with the teacher on training rows" in found
    assert "narrow: agrees with the teacher on 100 % of training rows and on 70 % of held-out rows" in found
    assert "sure: over-confident, ECE (equal width) 0.20" in found
    assert "sure: only" not in found


def test_a_student_without_a_mean_confidence_is_not_called_too_sure(tmp_path: Path) -> None:
    far = {"ece": {"equal_width": 0.9, "equal_mass": 0.9}}
    run = write_run(tmp_path / "kd", val_measures=far)
    assert "confident, ECE" in texts(students([run])[1])
    run = write_run(tmp_path / "none", val_measures={**far, "confidence": None})
    assert "confident, ECE" not in texts(students([run])[1])


def test_a_run_that_is_not_finished_is_shown_as_such(tmp_path: Path) -> None:
    going = write_run(tmp_path / "going", status="running", measures=None)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 631, "event": "tra')  # what it writes right now
    (entry,), advice = students([going])
    assert entry["runs"] == [{"name": "going", "seed": 0, "status": "running", "step": 630, "of": 630}]
    assert entry["held_out"] is None
    assert "not finished" in texts(advice) or "no run of this setting is finished" in entry["missing"]["held_out"]
    assert len(entry["curves"][0]["train"]) <= 200
    assert entry["curves"][0]["train"][-1]["step"] == 630


def test_a_run_of_an_older_version_says_what_it_lacks(tmp_path: Path) -> None:
    (entry,), _ = students([write_run(tmp_path / "old", measures=None)])
    assert "did not measure it" in entry["missing"]["held_out"]


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UsageError, match=r"is no run: it has no run\.json"):
            students([path])
    kd = write_run(tmp_path / "kd")
    with pytest.raises(UsageError, match="given twice"):
        students([kd, tmp_path / "empty" / ".." / "kd"])


def damaged(record: dict[str, Any], path: tuple[str, ...], value: Any) -> str:
    place: Any = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kdcache_run",), 2),
        (("status",), None),
        (("student",), "mlp"),
        (("student", "classes"), -3),
        (("total_steps",), "many"),
        (("data", "rows"), True),
        (("identity",), []),
        (("measures", "val", "accuracy"), 3.0),
        (("measures", "val", "accuracy"), None),
        (("measures", "val", "nll"), "low"),
        (("measures", "val", "ece"), 0.1),
        (("measures", "val", "class_correct"), [51, 0, 0]),
        (("measures", "val", "class_rows"), [50, 50]),
        (("measures", "val", "class_rows"), [60, 50, 50]),
        (("measures", "val", "reliability"), [{"low": 0}]),
        (("measures", "val", "confusions"), [{"label": 7, "student_class": 0, "rows": 1}]),
        (("measures", "train", "agreement"), -0.1),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    folder = write_run(tmp_path / "kd")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(damaged(record, path, value))
    with pytest.raises(CorruptCacheError, match=rf"kd/run\.json: .*{path[-1]}"):
        students([folder])


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in paths_of(one, (*path, key)))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_whatever_stands_in_a_record_ends_in_entries_or_in_an_error_of_ours(
    tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "kd"
    if not folder.exists():
        write_run(folder)
        write_run(tmp_path / "labels", alpha=0)
        (tmp_path / "sound.json").write_bytes((folder / "run.json").read_bytes())
    record = json.loads((tmp_path / "sound.json").read_text())
    path = data.draw(st.sampled_from(paths_of(record)[1:]))
    value = data.draw(st.sampled_from([None, True, -1, 0, 10**19, 1e300, 0.5, "", "text", [], [1], {}, {"a": []}]))
    (folder / "run.json").write_text(damaged(record, path, value))
    try:
        entries, advice = students([folder, tmp_path / "labels"])
    except KDCacheError:
        return
    json.dumps([entries, advice], allow_nan=False)


@pytest.mark.parametrize("line", ["nonsense", '{"event": "train"}', '{"step": 1, "loss": NaN}'])
def test_damaged_metrics_are_refused_by_line(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "kd")
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "event": "train"}}\n{line}\n')
    with pytest.raises(CorruptCacheError, match=r"metrics\.jsonl, line 2"):
        students([folder])


def test_names_in_advice_do_not_move_a_cursor(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "kd\x1b[2J", options={"data": "npz:\x1b[2J", "student": "mlp:\u202e"})
    entries, advice = students([folder])
    shown = [entries[0]["name"], *(one["text"] for one in advice), *(one["command"] or "" for one in advice)]
    assert all(text.isprintable() for text in shown)


def test_few_rows_are_never_called_lost() -> None:
    rows = np.array([9, 10, 0])
    found = class_gains(rows, np.zeros(3), np.ones(3))
    assert [(row["class"], row["verdict"]) for row in found] == [(0, "few rows"), (1, "lost")]


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1)).map(
            lambda one: (one[0], round(one[1] * one[0]) / one[0], round(one[2] * one[0]) / one[0])
        ),
        min_size=1,
        max_size=30,
    )
)
def test_gains_turn_round_when_the_students_change_places(classes: list[tuple[int, float, float]]) -> None:
    rows, first, second = (np.array(column) for column in zip(*classes, strict=True))
    turned = {"lost": "gained", "gained": "lost", "same": "same", "few rows": "few rows"}
    for one, other in zip(class_gains(rows, first, second), class_gains(rows, second, first), strict=True):
        assert one["gain"] == pytest.approx(-other["gain"])
        assert one["verdict"] == turned[other["verdict"]]
        assert one["standard_error"] > 0


def test_equal_students_are_seldom_said_to_differ() -> None:
    rng = np.random.default_rng(0)
    rows = np.full(100, 50)
    alarms = 0
    for _ in range(200):
        first, second = rng.binomial(50, 0.9, (2, 100)) / 50
        alarms += any(row["verdict"] != "same" for row in class_gains(rows, first, second))
    assert alarms <= 20  # 1 in 20 by the rule
