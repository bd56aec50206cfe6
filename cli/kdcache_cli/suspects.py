"""`kdcache suspects`: labels that the teacher contradicts, as a ranked CSV file."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli.command import CachePath, define
from kdcache_cli.output import emit

_SHOWN = 10


@define(
    "suspects",
    examples=(
        "kdcache suspects teacher.h5 -o suspects.csv",
        "kdcache suspects teacher/ -o worst.csv --score margin --limit 200 --json",
    ),
)
@click.argument("cache", type=CachePath())
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="The CSV file to make.")
@click.option(
    "--score",
    type=click.Choice(["self-confidence", "margin"]),
    default="self-confidence",
    show_default=True,
    help="Rank by p(label), or by (p(label) - the largest other + 1) / 2.",
)
@click.option("--limit", type=int, metavar="N", help="The N most suspicious rows (default: all with a label).")
@click.option("--view", type=int, metavar="V", help="The view whose rows are looked at (default: the first).")
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, help="Divides the logits; top-k: a stored T."
)
@click.option("--overwrite", is_flag=True, help="Replace the list if it exists; no other file is.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    cache: Path,
    out: Path,
    score: str,
    limit: int | None,
    view: int | None,
    temperature: float,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rank the labels of a cache by how little its teacher supports them, the most suspicious first.

    Columns: sample_id, label, teacher_class, score, self_confidence, margin, teacher_confidence, is_issue, and the
    names of the classes where they are known. is_issue is 1 where the row confidently belongs to another class
    (confident learning; the same as cleanlab finds). A text cell that a spreadsheet would run gets an apostrophe.

    Believe the list of a teacher that was not trained on these labels; one that was has learnt the wrong ones too.
    """
    from kdcache.stages.progress import Progress
    from kdcache.stages.suspects import suspects
    from kdcache.store.parts import read_catalog

    with Progress(2 * read_catalog(cache).samples, what="suspects", unit=" rows", enabled=not quiet) as progress:
        found = suspects(
            cache,
            out,
            score=score,
            limit=limit,
            view=view,
            temperature=temperature,
            overwrite=overwrite,
            progress=progress.advance,
        )
    for warning in found.warnings:
        click.echo(f"Warning: {warning}.", err=True)
    if as_json:
        emit(found.to_json(), as_json=True)
        return
    worst = sorted((one for one in found.classes if one.issues), key=lambda one: -one.issues)[:_SHOWN]
    shown = {
        "path": found.path,
        "rows": found.rows,
        "labelled": found.labelled,
        "written": found.written,
        "teacher's class differs": found.disagree,
        "issues": found.issues,
        "issues by label": {
            (str(one.label) if one.name is None else f"{one.label} {one.name}"): f"{one.issues} of {one.labelled}"
            for one in worst
        },
    }
    emit({name: value for name, value in shown.items() if value != {}}, as_json=False)
