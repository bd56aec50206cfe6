"""`kdcache demo`: the whole way on real data that ships with kdcache."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli.command import define
from kdcache_cli.output import emit


@define("demo", examples=("kdcache demo", "kdcache demo --out digits.h5 --json"))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep the cache there; by default it goes with the demo's folder."
)
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Paired repetitions of every kind of student.",
)
def command(out: Path | None, seeds: int, as_json: bool) -> None:
    """Teacher, cache, students and a table, on 1,797 real digits: offline, under a minute on a laptop.

    Five kinds of students take the same number of steps: labels only, the same rows distilled, the teacher's argmax,
    soft targets on all rows, and all labels as the upper control.
    """
    from kdcache.stages.demo import run_demo, table

    result = run_demo(out, seeds=seeds)
    emit(result, as_json=as_json, text=table(result))
