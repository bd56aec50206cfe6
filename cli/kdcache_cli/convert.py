"""`kdcache convert`: a cache in another encoding, without the teacher."""

from __future__ import annotations

from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "convert",
    examples=(
        "kdcache convert teacher.h5 small.h5 --dtype int4",
        "kdcache convert teacher/ sparse/ --top-k 32 --temperatures 1,2,4",
        "kdcache convert teacher/ corrected/ --labels corrected.csv",
    ),
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", help="Stored type: float16 (the default; with --labels as it is), float32, int8 or int4.")
@click.option("--top-k", type=int, help="Keep the K largest logits of a row and the label's, and the tail's sum.")
@click.option("--temperatures", metavar="LIST", help="With --top-k: where the tail is exact, such as 1,2,4 or 1,z2.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="CSV file (columns sample_id, label) of samples whose label was corrected since the dump.",
)
@click.option("--views", metavar="NUMBERS", help="Only these views, such as 0-3 or 0,2,5 (default: all).")
@click.option("--shard-rows", type=int, help="Rows of a shard (default: up to 131,072, and 256 MiB).")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    source: Path,
    out: Path,
    dtype: str | None,
    top_k: int | None,
    temperatures: str | None,
    labels: Path | None,
    views: str | None,
    shard_rows: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the rows of a cache into OUT in another encoding: smaller rows, or plain ones of a factored cache.

    One file where OUT ends in .h5, else a folder of shards. Every row is checked on the way; SOURCE stays as it is, and
    OUT says what it was made from. With --labels some samples get other labels, in the same encoding. Top-k rows cannot
    be converted: what they left out does not come back.
    """
    from kdcache.format.encodings import EncodingChoice
    from kdcache.format.topk import temperatures_of
    from kdcache.stages.progress import Progress
    from kdcache.store.convert import CORRECTED
    from kdcache.store.merge import parse_views
    from kdcache.store.parts import read_catalog

    chosen = None if views is None else parse_views(views)
    before = read_catalog(source)
    rows = before.samples * len(before.views if chosen is None else chosen)
    with Progress(rows, what="convert", unit=" rows", enabled=not quiet) as progress:
        root = kdcache.convert(
            source,
            out,
            dtype=dtype,
            top_k=top_k,
            temperatures=None if temperatures is None else temperatures_of(temperatures),
            labels=labels,
            views=chosen,
            shard_rows=shard_rows,
            overwrite=overwrite,
            progress=progress.advance,
        )
    made = read_catalog(out)
    result = {
        "path": out,
        "bytes": made.size_bytes,
        "bytes_before": before.size_bytes,
        "bytes_per_row": {"payload": made.schema.payload_row_bytes, "before": before.schema.payload_row_bytes},
        "root": root,
        **({} if labels is None else {"labels_changed": made.provenance[CORRECTED]["changed"]}),
    }
    notes = [EncodingChoice("float16", top_k).note(made.classes.count)]
    if labels is None and made.schema.payload_row_bytes >= before.schema.payload_row_bytes:
        notes.append("the rows are no smaller than they were (integer and top-k rows are, of few classes)")
    if any(notes):
        result["note"] = "; ".join(filter(None, notes))
    emit(result, as_json=as_json)
