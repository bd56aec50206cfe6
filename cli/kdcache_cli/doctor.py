"""`kdcache doctor`: what this machine and a folder on it offer, and what to change."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli.command import define
from kdcache_cli.output import emit

MARKS = {"ok": " ", "note": "*", "broken": "!"}


@define("doctor", examples=("kdcache doctor", "kdcache doctor --path /scratch/caches --json"))
@click.option(
    "--path",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="Folder whose file system is tried: links, locks, fsync, mmap.",
)
@click.pass_context
def command(ctx: click.Context, path: Path, as_json: bool) -> None:
    """Check versions, extras, devices, limits and the file system of a folder.

    Lines marked * work with a limit, lines marked ! are broken; exits with 1 when something is broken.
    """
    from kdcache.stages.doctor import examine

    report = examine(path)
    lines = []
    for check in report["checks"]:
        lines.append(f"{MARKS[check['status']]} {check['name']:<17}{check['found']}")
        if check["advice"]:
            lines.append(f"{'':<19}{check['advice']}")
    emit(report, as_json=as_json, text="\n".join(lines))
    ctx.exit(0 if report["ok"] else 1)
