"""`kdcache export`: float32 logits for tools that know nothing of a cache."""

from __future__ import annotations

from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "export",
    examples=("kdcache export teacher.h5 teacher.npz", "kdcache export teacher/ archive.h5 --compress gzip"),
)
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["npz", "h5"]),
    help="npz for NumPy, h5 for any HDF5 tool; by default from the name of OUT.",
)
@click.option("--compress", type=click.Choice(["gzip"]), help="Compress, for archives: reading rows gets slow.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
def command(
    cache: Path, out: Path, file_format: str | None, compress: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write raw float32 logits, sample ids and labels of a cache to OUT, decoded.

    The result is not a cache: no checksums, no provenance that is checked. To hand over a cache, send its files.
    """
    path = kdcache.export(cache, out, format=file_format, compress=compress, overwrite=overwrite)
    emit({"path": path, "bytes": path.stat().st_size}, as_json=as_json)
