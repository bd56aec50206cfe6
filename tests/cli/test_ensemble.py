"""`kdcache ensemble`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kdcache


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """The rows of `folder` with other logits."""
    with kdcache.open(folder) as cache:
        rows = cache.gather(np.arange(len(cache)))
        names = cache.classes or cache.num_classes
    with kdcache.Writer(tmp_path / "other", classes=names) as writer:
        writer.write(rows.sample_id, rows.dense()[:, ::-1].copy(), rows.label)
    return tmp_path / "other"


def test_several_caches_become_one(run, folder: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean.h5"
    result = run("ensemble", f"{folder}=3", other, "-o", out, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["rule"] == "logits"
    assert "2 teachers by the rule logits" in result.stderr
    with kdcache.open(folder) as a, kdcache.open(other) as b, kdcache.open(out) as mean:
        assert mean.root == report["root"]
        one, two, found = (cache.gather(np.arange(len(cache))).dense() for cache in (a, b, mean))
    np.testing.assert_allclose(found, 0.75 * one + 0.25 * two, rtol=1e-5, atol=1e-5)
    assert run("verify", out).exit_code == 0
    assert run("inspect", out).exit_code == 0


def test_soft_targets_say_their_temperature(run, folder: Path, other: Path, tmp_path: Path) -> None:
    arguments = ("ensemble", folder, other, "-o", tmp_path / "mean", "--rule", "soft-targets", "--quiet")
    assert "give --temperature" in run(*arguments).stderr
    result = run(*arguments, "--temperature", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["encoding"]["temperature"] == 2.0
    for command in ("verify", "inspect", "card"):
        assert run(command, tmp_path / "mean").exit_code == 0
    assert run("export", tmp_path / "mean", tmp_path / "mean.npz").exit_code == 0


def test_messages_name_the_options_of_this_command(run, folder: Path, other: Path, tmp_path: Path) -> None:
    with kdcache.open(folder) as cache:
        rows = cache.gather(np.arange(len(cache)))
    count = rows.num_classes

    def cache_of(name: str, ids: slice, classes: list[str], **options) -> Path:
        with kdcache.Writer(tmp_path / name, classes=classes, **options) as writer:
            writer.write(rows.sample_id[ids], rows.dense()[ids], None)
        return tmp_path / name

    names = list(cache.classes or ()) or count
    lacks = cache_of("lacks", slice(0, len(rows) - 1), names)
    away = cache_of("away", slice(0, len(rows)), [f"x{n}" for n in range(count)])
    sparse = cache_of("sparse", slice(0, len(rows)), names, top_k=1)
    for arguments, message in (
        ((folder, lacks), "(--missing vote)"),
        ((folder, away), "--class-names FILE.json"),
        ((folder, sparse, "--rule", "logits"), "--rule logits needs"),
        ((folder, other, "--rule", "best"), "--rule 'best' is not known"),
        ((folder, lacks, "--rule", "accuracy", "--temperature", "1", "--missing", "vote"), "--rule accuracy measures"),
    ):
        told = run("ensemble", *arguments, "-o", tmp_path / "out").stderr
        assert message in told
        assert not any(word in told for word in ("--ensemble", "--missing ce", "--cache")), told


def test_what_cannot_be_meant_is_a_usage_error(run, folder: Path, other: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((folder,), "two caches or more"),
        ((folder, other, "--rule", "random"), "makes no cache"),
        ((folder, other, "--rule", "best"), "choose one of logits"),
        ((folder, f"{other}=0"), "a finite weight above 0"),
        ((folder, other, "--missing", "skip"), "vote"),
    ):
        result = run("ensemble", *arguments, "-o", tmp_path / "out")
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert run("ensemble", folder, tmp_path / "nothing", "-o", tmp_path / "out").exit_code == 4
    assert not (tmp_path / "out").exists()
