"""`kdcache inspect`: what a cache says about itself, without torch."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli.command import define
from kdcache_cli.output import emit


@define("inspect", examples=("kdcache inspect teacher.h5", "kdcache inspect teacher/ --json"))
@click.argument("cache", type=click.Path(path_type=Path))
def command(cache: Path, as_json: bool) -> None:
    """Print what a cache holds: rows, encoding, classes, teacher, data, shards, root hash.

    Reads the manifest, or the header of a one-file cache, and no rows; `kdcache verify` reads everything.
    """
    from kdcache.store.inspect import describe

    summary = describe(cache)
    if not as_json:
        views = summary["views"]
        summary["views"] = f"{len(views)} (number {', '.join(map(str, views))})"
        for name in ("absent_views", "extents"):
            if not summary[name]:
                del summary[name]
    emit(summary, as_json=as_json)
