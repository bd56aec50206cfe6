"""`kdcache calibrate`: how sure a teacher should be, from labelled rows of its cache."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli.command import CachePath, define
from kdcache_cli.output import emit

_WITH_KIND = {"ece": "ece (equal width)", "ece_equal_mass": "ece (equal mass)"}


@define(
    "calibrate",
    examples=(
        "kdcache calibrate teacher.h5",
        "kdcache calibrate train.h5 --on val.h5 --method bias -o train.calibration.json --json",
    ),
)
@click.argument("cache", type=CachePath())
@click.option(
    "--on", type=click.Path(path_type=Path), help="Fit to the rows of this cache of the same teacher instead."
)
@click.option(
    "--holdout", type=float, default=0.2, show_default=True, help="Share of samples to measure on, not to fit to."
)
@click.option(
    "--method",
    type=click.Choice(("temperature", "bias", "vector")),
    default="temperature",
    show_default=True,
    help="What to fit: one temperature; with all logits also a bias for each class, or a scale and a bias.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write (default: CACHE.calibration.json).")
@click.option("--allow-seen", is_flag=True, help="Take rows that the teacher was trained on.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def command(
    cache: Path,
    on: Path | None,
    holdout: float,
    method: str,
    seed: int,
    out: Path | None,
    allow_seen: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit a temperature to labelled rows of CACHE and write it beside the cache, for distill --calibration.

    NLL, calibration error (ECE) and Brier score are printed before and after, on samples that were not fitted to. The
    teacher must not have been trained on the rows: a cache that says it was is refused, so that --on names another one.
    The logits in CACHE stay as they are, and the file fits this cache alone.
    """
    from kdcache.stages.calibrate import calibrate

    result = calibrate(
        cache,
        on=on,
        method=method,
        holdout=holdout,
        seed=seed,
        out=out,
        allow_seen=allow_seen,
        overwrite=overwrite,
    )
    found = result.to_json()
    if not as_json:
        for part in ("before", "after"):
            found[part] = {_WITH_KIND.get(name, name): value for name, value in found[part].items()}
    emit(found, as_json=as_json)
