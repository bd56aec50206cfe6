"""`kdcache card`: a README.md that says what a cache is and where it comes from."""

from __future__ import annotations

from pathlib import Path

import click

import kdcache
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define("card", examples=("kdcache card teacher/", "kdcache card teacher.h5 --print"))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--print", "only_print", is_flag=True, help="Print the card instead of writing it.")
@click.option("--overwrite", is_flag=True, help="Replace a card that is there.")
def command(cache: Path, only_print: bool, overwrite: bool, as_json: bool) -> None:
    """Write README.md into a folder cache: front matter for dataset hubs, provenance, root hash."""
    from kdcache.store.card import render_card
    from kdcache.store.inspect import describe

    if only_print:
        text = render_card(describe(cache), name=cache.resolve().name)
        emit({"card": text}, as_json=as_json, text=text.rstrip("\n"))
    else:
        emit({"path": kdcache.write_card(cache, overwrite=overwrite)}, as_json=as_json)
