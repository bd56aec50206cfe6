"""`kdcache verify`."""

from __future__ import annotations

import json
from pathlib import Path

import kdcache


def test_a_sound_cache_is_reported_with_its_root_hash(run, folder: Path) -> None:
    result = run("verify", folder, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"]
    assert report["rows"] == 100
    assert report["root"] == kdcache.open(folder).root


def test_a_flipped_bit_is_corrupt_and_the_report_names_the_shard(run, folder: Path, shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run("verify", folder, "--json")
    assert result.exit_code == 3
    assert shard.name in result.stderr
    assert not json.loads(result.stdout)["ok"]


def test_a_missing_shard_is_incomplete(run, folder: Path, shard: Path) -> None:
    shard.unlink()
    result = run("verify", folder)
    assert result.exit_code == 4
    assert shard.name in result.stderr


def test_another_root_hash_is_a_mismatch(run, folder: Path) -> None:
    root = kdcache.open(folder).root
    assert run("verify", folder, "--expect-root", root).exit_code == 0
    assert run("verify", folder, "--expect-root", "0" * 64).exit_code == 5
