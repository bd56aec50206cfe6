"""`kdcache ensemble`: several teachers' caches as one new cache."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "ensemble",
    examples=(
        "kdcache ensemble a.h5 b.h5=2 c.h5 -o mean.h5",
        "kdcache ensemble a.h5 sparse/ -o mean/ --rule soft-targets --temperature 4",
        "kdcache ensemble a.h5 b.h5 -o best.h5 --rule route:which.csv",
    ),
)
@click.argument("caches", nargs=-1, required=True, metavar="CACHE[=WEIGHT]...")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="New cache: FILE.h5, or a folder.")
@click.option("--rule", help="logits, soft-targets, accuracy ... (default: logits; soft-targets with top-k rows).")
@click.option("--temperature", type=float, help="Of soft targets, which serve this temperature alone.")
@click.option("--dtype", default="float16", show_default=True, help="float16, float32; of logits also int8, int4.")
@click.option("--calibration", multiple=True, help="File of `kdcache calibrate` for one of the caches, repeated.")
@click.option(
    "--missing",
    default="error",
    show_default=True,
    type=click.Choice(["error", "vote"]),
    help="Samples of the first cache that another lacks: fail, or leave them to the others.",
)
@click.option("--shard-rows", type=int, help="Rows of a shard (default: up to 131,072, and 256 MiB).")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    caches: tuple[str, ...],
    out: Path,
    rule: str | None,
    temperature: float | None,
    dtype: str,
    calibration: tuple[str, ...],
    missing: str,
    shard_rows: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make one teacher of several: their rows, joined by sample and view, combined into a new cache.

    Samples, views, labels and the order of the classes are those of the first CACHE; the others are brought to it by
    their class names. The new cache says what it was made from. A mean of logits is a plain cache; a mean of soft
    targets serves the temperature that it was made at and refuses another.
    """
    from kdcache.stages.asked_caches import parse_cache
    from kdcache.stages.progress import Progress
    from kdcache.store.parts import read_catalog

    before = read_catalog(Path(str(parse_cache(caches[0], option="CACHE").cache)))
    rows = before.samples * len(before.views)
    with Progress(rows, what="ensemble", unit=" rows", enabled=not quiet) as progress:
        made = kdcache.ensemble(
            caches,
            out,
            rule=rule,
            temperature=temperature,
            dtype=dtype,
            calibration=calibration,
            missing=missing,
            shard_rows=shard_rows,
            overwrite=overwrite,
            progress=progress.advance,
        )
    if not quiet:
        print("\n".join(made.notes), file=sys.stderr, flush=True)
    catalog = read_catalog(out)
    result = {
        "path": out,
        "rows": rows,
        "bytes": catalog.size_bytes,
        "encoding": catalog.schema.encoding.to_json(),
        "rule": made.rule,
        "root": made.root,
        "notes": list(made.notes),
    }
    emit(result, as_json=as_json)
