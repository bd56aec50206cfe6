"""`kdcache verify`: read everything, and say what is wrong."""

from __future__ import annotations

from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "verify",
    examples=("kdcache verify teacher.h5", "kdcache verify teacher/ --expect-root 9f2c... --json"),
)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--expect-root", metavar="HASH", help="Fail unless the cache has this root hash.")
def command(cache: Path, expect_root: str | None, as_json: bool) -> None:
    """Read every byte of a cache and compare checksums, digests, the sha256 of shards and the root hash.

    Exits with 3 where bytes are damaged, with 4 where shards are missing, with 5 for another root hash.
    """
    report = kdcache.verify(cache, expect_root=expect_root)
    emit(report.to_json(), as_json=as_json)
    report.raise_on_error()
