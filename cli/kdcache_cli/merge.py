"""`kdcache merge`: a cache as one file, or some of its views as a smaller cache."""

from __future__ import annotations

from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define("merge", examples=("kdcache merge teacher/ teacher.h5", "kdcache merge views/ two-views/ --views 0-1"))
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--views", metavar="NUMBERS", help="Only these views, such as 0-3 or 0,2,5 (default: all).")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
def command(source: Path, out: Path, views: str | None, overwrite: bool, as_json: bool) -> None:
    """Write the rows of a cache into one file OUT.h5, which reads fastest and travels as one thing.

    With --views, write some of its views, as a smaller cache. Where OUT does not end in .h5 it is a folder of shards.
    Every row is checked on the way; SOURCE stays as it is.
    """
    from kdcache.store.merge import parse_views
    from kdcache.store.parts import read_catalog

    root = kdcache.merge(source, out, views=None if views is None else parse_views(views), overwrite=overwrite)
    emit({"path": out, "bytes": read_catalog(out).size_bytes, "root": root}, as_json=as_json)
