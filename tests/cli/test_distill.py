"""`kdcache distill`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kdcache
from kdcache.train.loss_text import BY_NAME

BASE = ("distill", "--student", "mlp:64-16-10", "--data", "digits:train", "--steps", "3", "--out", "run")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for digits:train whose logits are noise."""
    path = tmp_path_factory.mktemp("cache") / "teacher.h5"
    logits = np.random.default_rng(0).normal(size=(1300, 10)).astype(np.float32)
    with kdcache.Writer(path, classes=10) as writer:
        writer.write(np.arange(1300), logits)
    return path


def test_a_student_learns_from_a_cache_and_its_weights_are_a_plain_state_dict(
    run, teacher: Path, tmp_path: Path
) -> None:
    result = run(*BASE, "--cache", teacher, "--val", "digits:test", "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["steps"] == 3
    assert report["out"] == str(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert json.loads((tmp_path / "run" / "run.json").read_text())


def test_several_caches_are_repeated_options_and_a_file_may_name_one_or_a_list(
    run, teacher: Path, tmp_path: Path
) -> None:
    kdcache.convert(teacher, tmp_path / "sparse", top_k=3)
    out = tmp_path / "both"
    result = run(*BASE, "--cache", f"{teacher}=2", "--cache", tmp_path / "sparse", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert "2 teachers by the rule soft-targets: teacher.h5 (0.667), sparse (0.333)" in result.stderr
    record = json.loads((out / "run.json").read_text())
    assert record["options"]["cache"] == ["teacher.h5=2", "sparse"]
    assert len(record["data"]["ensemble"]["members"]) == 2
    for text in (f'"{teacher}"', f'["{teacher}"]'):
        (tmp_path / "run.toml").write_text(f"[distill]\ncache = {text}\n")
        result = run(*BASE, "--config", tmp_path / "run.toml", "--out", tmp_path / "one", "--overwrite")
        assert result.exit_code == 0, result.stderr
    refused = run(*BASE, "--cache", teacher, "--ensemble", "logits", "--out", tmp_path / "two")
    assert (refused.exit_code, "give --cache more than once" in refused.stderr) == (2, True)


def test_alpha_0_needs_no_cache(run, tmp_path: Path) -> None:
    assert run(*BASE, "--alpha", "0", "--out", tmp_path / "run").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--alpha", "1.5"), "--alpha"),
        (("--temperature", "0"), "--temperature"),
        (("--alpha", "0.5"), "--cache"),
        (("--alpha", "0", "--epochs", "2"), "exclude each other"),
        (("--alpha", "0", "--optimizer", "adam"), "adamw"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_that_names_it(run, arguments: tuple[str, ...], message: str) -> None:
    result = run(*BASE, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_with_other_files_is_refused(run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    result = run(*BASE, "--alpha", "0", "--out", "photos")
    assert result.exit_code == 2
    assert "'cat.png'" in result.stderr
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_the_folder_of_the_run_is_needed(run) -> None:
    result = run(*BASE[:-2], "--alpha", "0")
    assert result.exit_code == 2
    assert "--out" in result.stderr


def test_a_student_with_another_number_of_classes_is_a_mismatch(run, teacher: Path) -> None:
    result = run("distill", "--student", "mlp:64-16-7", "--data", "digits:train", "--cache", teacher, "--out", "run")
    assert result.exit_code == 5


def test_samples_that_the_cache_lacks_are_a_mismatch_unless_asked_for(run, tmp_path: Path) -> None:
    with kdcache.Writer(tmp_path / "half.h5", classes=10) as writer:
        writer.write(np.arange(700), np.zeros((700, 10), np.float32))
    result = run(*BASE, "--cache", tmp_path / "half.h5")
    assert result.exit_code == 5
    assert "600 of the 1300" in result.stderr
    assert run(*BASE, "--cache", tmp_path / "half.h5", "--missing", "ce").exit_code == 0
    assert run(*BASE, "--cache", tmp_path / "half.h5", "--missing", "skip", "--overwrite").exit_code == 0


def test_a_run_that_is_there_is_neither_replaced_nor_resumed_unasked(run, tmp_path: Path) -> None:
    arguments = (*BASE, "--alpha", "0", "--out", tmp_path / "run")
    assert run(*arguments).exit_code == 0
    assert run(*arguments).exit_code == 2
    assert run(*arguments, "--overwrite").exit_code == 0


def test_a_truncated_cache_is_corrupt(run, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "short.h5").write_bytes(teacher.read_bytes()[:-100])
    assert run(*BASE, "--cache", tmp_path / "short.h5").exit_code == 3


def test_losses_are_repeated_options_that_a_file_may_list(run, teacher: Path, tmp_path: Path) -> None:
    losses = ("--loss", "js:beta=0.1*0.5", "--loss", "dist")
    weights = ("--ce-weight", "1", "--kd-weight", "3")
    result = run(*BASE, "--cache", teacher, *losses, *weights)
    assert result.exit_code == 0, result.stderr
    formula = "4*[0.25*CE + 0.75*(0.5*16*JS(beta 0.1) + 1*DIST(1*inter + 1*intra) at temperature 1)] at temperature 4"
    assert f"loss = {formula}" in result.stderr
    assert "--ce-weight 1 and --kd-weight 3 are alpha 0.75, all times 4" in result.stderr
    printed = run(*BASE, "--cache", teacher, *losses, "--print-config").stdout
    assert 'loss = ["js:beta=0.1*0.5", "dist"]  # command line' in printed
    (tmp_path / "run.toml").write_text(printed.replace('out = "run"', 'out = "again"'))
    assert run("distill", "--config", "run.toml").exit_code == 0
    recorded = json.loads((tmp_path / "again" / "run.json").read_text())
    assert recorded["options"]["loss"] == ["js:beta=0.1*0.5", "dist"]


def test_the_help_names_the_losses_that_are_taken_and_no_others(run) -> None:
    text = " ".join(run("distill", "--help").stdout.split())
    assert f"in the place of the KL: {', '.join(BY_NAME)}. " in text


def test_a_loss_that_rows_cannot_serve_is_refused_with_losses_that_they_can(run, teacher: Path) -> None:
    assert run("convert", teacher, "sparse", "--top-k", "3").exit_code == 0
    result = run(*BASE, "--cache", "sparse", "--loss", "dkd")
    served = " ".join(result.stderr.split()).rpartition("Served by topk rows: ")[2].split(", ")
    assert result.exit_code == 2
    assert served == ["kl", "reverse_kl", "soft_ce", "js", "standardized_kd", "spread_kl"]


@pytest.mark.parametrize("loss", ["mse", "dkd:temperature=2", "dist"])
def test_a_temperature_that_no_loss_follows_is_told(run, teacher: Path, loss: str) -> None:
    told = f"--temperature 3 has no effect on {loss.partition(':')[0]}"
    assert told in run(*BASE, "--cache", teacher, "--loss", loss, "--temperature", "3").stderr
    both = run(*BASE, "--cache", teacher, "--loss", loss, "--loss", "kl", "--temperature", "3", "--overwrite")
    assert both.exit_code == 0
    assert "has no effect" not in both.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss", "kd"), "choose one of kl, reverse_kl, soft_ce, js, dkd, dist, standardized_kd, mse"),
        (("--loss", "dist", "--grad-accumulation", "2"), "--grad-accumulation 2 cuts into pieces"),
        (("--kd-weight", "1"), "--ce-weight and --kd-weight go together"),
        (("--alpha-schedule", "step:1"), "--alpha-schedule 'step:1'"),
        (("--loss", "mse", "--temperature-schedule", "linear:1"), "--temperature-schedule has no effect on mse"),
        (("--loss", "standardized_kd", "--student-temperature", "2"), "no effect on standardized_kd"),
    ],
)
def test_losses_that_cannot_be_meant_are_usage_errors(
    run, teacher: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*BASE, "--cache", teacher, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_class_map_is_read_from_a_file_and_refused_where_it_is_not_total(run, teacher: Path, tmp_path: Path) -> None:
    half = {"student": ["even", "odd"], "map": {str(n): n % 2 for n in range(9)}}
    (tmp_path / "half.json").write_text(json.dumps(half))
    np.savez(
        tmp_path / "parity.npz", x=np.zeros((1300, 64), np.float32), y=np.arange(1300) % 2, sample_id=np.arange(1300)
    )
    arguments = ("distill", "--student", "mlp:64-8-2", "--data", "npz:parity.npz", "--cache", teacher, "--out", "run")
    arguments = (*arguments, "--steps", "2")
    refused = run(*arguments, "--classes", "half.json")
    assert refused.exit_code == 5
    assert "1 of the 10 classes of teacher.h5 are not in the map: 9" in " ".join(refused.stderr.split())
    (tmp_path / "whole.json").write_text(json.dumps({**half, "map": {**half["map"], "9": "odd"}}))
    result = run(*arguments, "--classes", "whole.json")
    assert result.exit_code == 0, result.stderr
    assert "classes: 10 of the teacher, 2 of the student; 10 merged into 2" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "names"), "teacher.h5 has no class names"),
        (("--classes", "gone.json"), "there is no file gone.json"),
        (("--novel", "bucket"), "say with --classes which it knows"),
        (("--classes", "names", "--novel", "all"), "'all' is not"),
    ],
)
def test_class_maps_that_cannot_be_meant_are_usage_errors(
    run, teacher: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*BASE, "--cache", teacher, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_moving_teacher_is_two_options_and_a_run_names_the_next_teacher(run, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    common = ("distill", "--student", "mlp:64-32-10", "--data", "digits:train", "--epochs", "3", "--quiet")
    done = run(*common, "--alpha", "0.5", "--refresh-every", "1", "--ema", "0.9", "--out", out)
    assert done.exit_code == 0, done.output
    versions = json.loads((tmp_path / "run" / "run.json").read_text())["refresh"]["versions"]
    assert [version["epoch"] for version in versions] == [1, 2]
    dump = run(
        "precompute", "--teacher", f"run:{out}", "--data", "digits:test", "--out", str(tmp_path / "t.h5"), "--quiet"
    )
    assert dump.exit_code == 0, dump.output
    refused = run(*common, "--ema", "0.9", "--out", str(tmp_path / "other"))
    assert refused.exit_code == 2
    assert "--refresh-every" in refused.stderr
