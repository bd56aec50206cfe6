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

    Reads the manifest, or the header of a one-file cache; of top-k rows also a thousand, to say how much of the
    teacher's distribution they capture. `kdcache verify` reads everything.
    """
    from kdcache.store.inspect import describe

    summary = describe(cache)
    if not as_json:
        views, captured = summary["views"], dict[str, str]()
        summary["views"] = f"{len(views)} (number {', '.join(map(str, views))})"
        for one in summary.get("captured", ()):
            least, most = (f"{100 * share:.3g}" for share in one["kl_share"])
            whole = f"{least} to {most}" if least != most else least
            captured[f"T = {one['temperature']:g}"] = f"{100 * one['mass']:.3g} % of the mass, {whole} % of the KL"
        if "captured" in summary:
            summary["captured"] = captured
        for name in ("absent_views", "extents", "advice"):
            if not summary.get(name, True):
                del summary[name]
    emit(summary, as_json=as_json)
