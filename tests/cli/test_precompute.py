"""`kdcache precompute`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import kdcache
from kdcache_cli.precompute import size_text, time_text

FACTORIES = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

def raising():
    raise ValueError("no such file")

def nothing():
    return None

class Rows:
    sample_ids = [1, 2, 2]
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return torch.zeros(64), index

class NoLength:
    def __getitem__(self, index):
        return torch.zeros(64), 0

class Empty(Rows):
    sample_ids = []
    def __len__(self):
        return 0

class OutOfRange(Rows):
    sample_ids = None
    def __getitem__(self, index):
        return torch.zeros(64), 10 + index

def nan():
    class Nan(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), float("nan"))
    return Nan()
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The arguments of a small dump, in a folder with a module of factories."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"  # a module of its own for each test
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)

    def arguments(factory: str = "linear", out: str = "teacher.h5") -> list[str]:
        return ["precompute", "--teacher", f"{name}:{factory}", "--data", "digits:test", "--out", out]

    return arguments


def test_a_dump_ends_in_a_cache_and_prints_what_was_done(run, arguments) -> None:
    result = run(*arguments(), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    cache = kdcache.open("teacher.h5")
    assert report["root"] == cache.root
    assert report["samples"] == len(cache) == 497
    assert np.isfinite(cache.gather(np.arange(497)).dense()).all()


def test_the_same_command_again_has_nothing_left_to_do(run, arguments) -> None:
    first = json.loads(run(*arguments(), "--json").stdout)
    again = run(*arguments(), "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["root"] == first["root"]
    assert json.loads(again.stdout)["computed"] == 0


def test_people_read_what_was_done(run, arguments) -> None:
    result = run(*arguments())
    assert result.stdout.startswith("teacher.h5: 497 samples, ")
    assert f"root hash: {kdcache.open('teacher.h5').root}" in result.stdout
    part = run(*arguments(out="teacher/"), "--shard-rows", "100", "--shard", "0/2")
    assert part.exit_code == 0
    assert "not finished" in part.stdout


def test_people_read_how_many_views_are_there(run, arguments) -> None:
    views = ["--augment", "noise0.1", "--views"]
    assert run(*arguments(out="v/"), *views, "3").stdout.startswith("v: 497 samples x 3 views, ")
    again = run(*arguments(out="v/"), *views, "2")
    assert "\nnote: 3 views are there, more than the 2 of --views; all of them stay\n" in again.stdout


def test_more_logits_than_classes_are_told(run, arguments) -> None:
    told = "note: --top-k 64 is more than the 10 classes: each row keeps all of them"
    assert told in run(*arguments(out="k/"), "--top-k", "64").stdout
    assert "note" not in run(*arguments(out="ten/"), "--top-k", "10").stdout


def test_people_read_what_came_and_which_labels_changed(run, arguments, tmp_path: Path) -> None:
    def grown(rows: int, *more: str, changed: int = 0) -> str:
        generator = np.random.default_rng(1)
        labels = np.arange(40) % 10
        labels[:changed] += 1
        inputs = generator.normal(size=(40, 64)).astype(np.float32)
        np.savez(tmp_path / "data.npz", x=inputs[:rows], y=labels[:rows])
        given = arguments(out="teacher/")
        given[given.index("digits:test")] = "npz:data.npz"
        result = run(*given, *more)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    grown(20)
    assert "added 10 samples to the 20 that were there\nroot hash" in grown(30)
    text = grown(38, changed=2)
    assert "added 8 samples to the 30 that were there\nlabels changed: 2 of the 30 compared (0, 1). The cache" in text
    report = json.loads(grown(40, "--json", changed=2))["growth"]
    assert (report["samples_before"], report["samples_added"], report["labels_changed"]) == (38, 2, 2)
    assert json.loads(run("inspect", "teacher", "--json").stdout)["extents"] == [20, 30, 38, 40]


def test_people_read_what_a_dump_would_cost(run, arguments) -> None:
    result = run(*arguments(), "--dry-run", "--shard-rows", "100")
    assert result.exit_code == 0
    for name in ("size:", "shards:    5", "free disk:", "rows/s", "time:", "pays off:  after", "of 30 epochs"):
        assert name in result.stdout


def test_people_read_what_top_k_rows_would_capture(run, arguments) -> None:
    result = run(*arguments(), "--dry-run", "--top-k", "2", "--temperatures", "1,8")
    assert result.exit_code == 0, result.stderr
    assert " % of the KL at T = 1\n" in result.stdout
    assert (
        " % of the KL at T = 8\nbetter:    --dtype int4 (float16 below 30 classes) or a larger --top-k" in result.stdout
    )
    report = json.loads(run(*arguments(), "--dry-run", "--top-k", "2", "--json").stdout)
    assert [one["temperature"] for one in report["captured"]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (31232, "31.23 kB"), (2**31, "2.147 GB"), (10**16, "1e+04 TB")],
)
def test_sizes_are_read_in_powers_of_a_thousand(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123, "0.123 s"), (119, "119 s"), (600, "10 min"), (9000, "2 h 30 min")]
)
def test_durations_are_read_in_minutes_and_hours(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_a_package_that_is_not_installed_names_the_extra(run, arguments, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.png").write_bytes(b"")
    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run(*arguments()[:3], "--data", "folder:photos", "--out", "teacher.h5")
    assert result.exit_code == 2
    assert 'pip install "kdcache[vision]"' in result.stderr


@pytest.mark.parametrize(
    ("data", "exit_code", "message"),
    [
        ("NoLength", 1, "add __len__"),
        ("Empty", 1, "needs at least one"),
        ("Rows", 1, "sample id 2 occurs 2 times"),
        ("OutOfRange", 1, "sample 0 has label 10, expected 0 to 9"),
        ("nothing", 2, "returned None"),
        ("raising", 1, "no such file"),
    ],
)
def test_data_that_cannot_be_dumped_is_described(run, arguments, data: str, exit_code: int, message: str) -> None:
    given = arguments()
    given[given.index("--data") + 1] = given[given.index("--teacher") + 1].replace("linear", data)
    result = run(*given)
    assert result.exit_code == exit_code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_dry_run_reports_the_cost_and_writes_nothing(run, arguments, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*.h5*"))
    result = run(*arguments(), "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"] == 497
    assert sorted(tmp_path.rglob("*.h5*")) == before


@pytest.mark.parametrize(
    ("change", "exit_code", "message"),
    [
        ({"--teacher": "nowhere:factory"}, 2, "nowhere"),
        ({"--data": "digts:train"}, 2, "digits"),
        ({"--out": None}, 2, "--out"),
        ({"--dtype": "float8"}, 2, "float16"),
        ({"--shard": "4/4"}, 2, "--shard"),
        ({"--limit": "0"}, 2, "--limit"),
        ({"--device": "abacus"}, 2, "--device"),
        ({"--teacher": "digits:train"}, 2, "digits"),
        ({"--teacher": "kdcache.version:__version__"}, 2, "expected a function or a class"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_that_names_it(
    run, arguments, change: dict[str, str | None], exit_code: int, message: str
) -> None:
    given = arguments()
    options = dict(zip(given[1::2], given[2::2], strict=True)) | change
    result = run("precompute", *(part for pair in options.items() if pair[1] is not None for part in pair))
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("factory", "message"), [("raising", "no such file"), ("nan", "sample 1300 hold NaN")])
def test_a_teacher_that_fails_exits_with_1_and_the_reason(run, arguments, factory: str, message: str) -> None:
    result = run(*arguments(factory))
    assert result.exit_code == 1
    assert message in result.stderr


def test_another_dtype_on_a_path_that_holds_a_cache_is_a_mismatch(run, arguments) -> None:
    assert run(*arguments(out="teacher/")).exit_code == 0
    result = run(*arguments(out="teacher/"), "--dtype", "float32")
    assert result.exit_code == 5
    assert "float32" in result.stderr


def test_a_factory_that_returns_no_module_is_a_usage_error(run, arguments) -> None:
    result = run(*arguments("nothing"))
    assert result.exit_code == 2
    assert "expected an nn.Module" in result.stderr
