"""`kdcache import`: logits in a file that somebody else wrote, as a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

import kdcache
from kdcache.stages.import_options import ImportOptions
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "import",
    record=ImportOptions,
    examples=(
        "kdcache import theirs.npz  # lists its arrays",
        "kdcache import theirs.npz --logits logits --labels y --ids names --out teacher.h5",
        "kdcache import theirs.h5 --logits outputs/probs --kind probabilities --out teacher/",
    ),
)
@click.argument("foreign", type=click.Path(path_type=Path))
def command(foreign: Path, as_json: bool, **options: Any) -> None:
    """Make a cache of arrays in FOREIGN: HDF5, .npz, .npy or safetensors that somebody else wrote.

    FOREIGN is read in a process of its own with limits of memory and time, and without plug-ins: a file that crashes
    what reads it is an error message. Nothing is unpickled, and links into other files are not followed.
    """
    result = kdcache.import_cache(foreign, options=ImportOptions(**options))
    for note in result.notes:
        click.echo(f"Note: {note}.", err=True)
    shown = dataclasses.asdict(result)
    emit(shown if as_json else {key: value for key, value in shown.items() if key != "notes"}, as_json=as_json)
