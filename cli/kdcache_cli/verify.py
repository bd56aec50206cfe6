"""`kdcache verify`: read everything, and say what is wrong; compare rows with the data, or run the teacher again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import kdcache
from kdcache.errors import UsageError
from kdcache.format.identity import as_root
from kdcache.stages.choices import AMP
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "verify",
    examples=(
        "kdcache verify teacher.h5",
        "kdcache verify teacher/ --expect-root 9f2c... --json",
        "kdcache verify views/ --data digits:train --sample 256",
        "kdcache verify teacher.h5 --teacher networks:wide --weights wide.safetensors --data digits:train --sample 64",
    ),
)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--expect-root", metavar="HASH", help="Fail unless the cache has this root hash.")
@click.option("--teacher", metavar="SPEC", help="Run this teacher again on some rows; needs --data.")
@click.option("--weights", type=click.Path(path_type=Path), help="State dict (.pt or .safetensors) for the teacher.")
@click.option("--data", metavar="SPEC", help="The data set that was dumped: replay and compare some samples of it.")
@click.option("--augment", metavar="SPEC", help="The pipeline of the dump, where it is your own: module:factory.")
@click.option("--sample", type=int, default=64, show_default=True, help="Samples to compare, each in all views.")
@click.option("--output-key", help="Where the logits are in the teacher's output (default: as in the dump).")
@click.option("--amp", type=click.Choice(AMP), help="Precision of the forward pass (default: as in the dump).")
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda, cuda:0 ...")
def command(
    cache: Path,
    expect_root: str | None,
    teacher: str | None,
    weights: Path | None,
    data: str | None,
    augment: str | None,
    sample: int,
    output_key: str | None,
    amp: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Read every byte of a cache and compare checksums, digests, the sha256 of shards and the root hash.

    With --data, also replay the first, last and random samples of the shards in all views, and compare input digests
    and labels: does this data set, with these libraries, give a student what the teacher saw? No model is needed.

    With --teacher and --data, also run the teacher on these rows. The relative L2 distance of centred logits must not
    exceed 3e-3 in the median (1.5e-2 in another precision than the dump's), nor ten times that in any row; labels must
    agree, and inputs are compared to tell what is wrong.

    Exits with 3 where bytes are damaged, with 4 where shards are missing, with 5 for another root hash, other data or
    another teacher.
    """
    if teacher is not None and data is None:
        raise UsageError("--teacher needs --data: the teacher runs on the rows of the data set")
    if augment is not None and data is None:
        raise UsageError("--augment needs --data: it is the pipeline through which the data set's items go")
    report = kdcache.verify(cache, expect_root=None if expect_root is None else as_root(expect_root))
    result = report.to_json()
    if data is None or not report.ok:
        _show(result, as_json=as_json)
        report.raise_on_error()
        return
    from kdcache.stages.augment import load_augment

    pipeline = None if augment is None else load_augment(augment)
    if teacher is None:
        from kdcache.stages.verify_data import verify_data

        compared = verify_data(cache, data, augment=pipeline, sample=sample)
        _show({**result, "ok": compared.ok, "data": compared.to_json()}, as_json=as_json)
        compared.raise_on_error()
        return
    from kdcache.stages.verify_teacher import verify_teacher

    found = verify_teacher(
        cache,
        teacher,
        data,
        weights=weights,
        output_key=output_key,
        amp=amp,
        device=device,
        augment=pipeline,
        sample=sample,
    )
    _show({**result, "ok": found.ok, "teacher": found.to_json()}, as_json=as_json)
    found.raise_on_error()


def _show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what was found; people read the problems once, in the error that follows."""
    emit(result if as_json else _without_problems(result), as_json=as_json)


def _without_problems(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in ("problem", "problems")}
    return {key: _without_problems(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
