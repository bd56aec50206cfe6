"""`kdcache merge`: a folder cache as one file."""

from __future__ import annotations

from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define("merge", examples=("kdcache merge teacher/ teacher.h5",))
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
def command(source: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write the rows of a cache into one file OUT.h5, which reads fastest and travels as one thing.

    Every row is checked on the way; SOURCE stays as it is.
    """
    root = kdcache.merge(source, out, overwrite=overwrite)
    emit({"path": out, "bytes": out.stat().st_size, "root": root}, as_json=as_json)
