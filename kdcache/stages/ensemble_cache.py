"""`kdcache ensemble`: several teachers' caches as one new cache, streamed, without any teacher.

A mean of logits becomes a plain cache, which serves every temperature and loss. A mean of soft targets carries its
temperature in its encoding and serves that alone. The provenance names every cache with its root hash, the rule and the
weights. Its rows are those that `distill` with all the caches would learn from: with float32 to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from kdcache.errors import UsageError
from kdcache.format.dense import DTYPES as FLOATS
from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding
from kdcache.format.encodings import EncodingChoice
from kdcache.format.soft_targets import SoftTargets
from kdcache.stages.asked_caches import AskedCache, asked_caches
from kdcache.stages.ensemble_checks import check_coverage, check_members, check_same_labels, check_views
from kdcache.stages.ensemble_inputs import Teachers, note_of
from kdcache.stages.ensemble_members import chosen_rule, matched_calibrations, members_of, opened, ordered_like
from kdcache.stages.ensemble_routes import load_routes
from kdcache.stages.ensemble_skill import measured_skill
from kdcache.store.plan import default_shard_rows
from kdcache.store.rewrite import Block, Rewriting, check_target, write_cache
from kdcache.store.rows import TeacherRows
from kdcache.train.ensemble import Ensemble
from kdcache.train.ensemble_rules import OF_ENSEMBLE, Rule

ENSEMBLE = "ensemble"
_KEPT = ("data", "views", "versions")  # of the first cache's provenance: what is true of the new one as well


@final
@dataclass(frozen=True)
class EnsembleResult:
    """What `ensemble` made.

    Attributes:
        root: the root hash of the new cache.
        rule: by which it was made.
        notes: what is to be said about it, a sentence each.
    """

    root: str
    rule: str
    notes: tuple[str, ...]


def ensemble(
    caches: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    rule: str | None = None,
    temperature: float | None = None,
    dtype: str = "float16",
    calibration: Sequence[str] = (),
    missing: str = "error",
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> EnsembleResult:
    """Writes the rows of several caches as one.

    Args:
        caches: two or more, PATH or PATH=WEIGHT; samples, views and the order of the classes are those of the first.
        out: the file to make, if its name ends in `.h5`, else the folder.
        rule: see `kdcache.train.ensemble_rules`; by default `logits`, or `soft-targets` where a cache does not hold all
            logits. `random` is of a run's steps and makes no cache.
        temperature: of soft targets, for the rules that make them.
        dtype: float16 or float32, and for logits int8 and int4.
        calibration: files of `kdcache calibrate`, matched to the caches by their root hashes.
        missing: `error`, or `vote`: samples of the first cache that another lacks are left to the others.
        shard_rows: rows of a shard of a folder.
        overwrite: replace `out` if it exists.
        progress: called with the number of rows after each block.

    Returns:
        The root hash of the new cache, with the rule.

    Raises:
        UsageError: caches or options that the rule cannot serve, or an `out` that exists.
        CoverageError: samples that a cache lacks, or caches that share none.
        MismatchError: other views, classes, labels, or ids.
        CorruptCacheError, IncompleteCacheError: of a cache; nothing is written under `out`.
        StorageError: the disk refused.
    """
    asked = asked_caches([os.fspath(cache) for cache in caches], (), option="CACHE")
    target = Path(out)
    _check_asked(asked, target, missing=missing, shard_rows=shard_rows, overwrite=overwrite)
    open_caches = [opened(one) for one in asked]
    first = open_caches[0]
    chosen = chosen_rule(rule, open_caches, words=OF_ENSEMBLE)
    if chosen.name == "random":
        raise UsageError(
            "--rule random draws a teacher in each step of a run, and makes no cache: give distill all caches"
        )
    stored = matched_calibrations(calibration, open_caches)
    maps = [ordered_like(cache, first, words=OF_ENSEMBLE) for cache in open_caches]
    members = members_of(open_caches, [one.weight for one in asked], stored, maps)
    makes_logits = isinstance(Ensemble(members, chosen, lambda step: 1.0).encoding, Dense)
    at = _temperature(temperature, chosen, makes_logits=makes_logits)
    check_views(open_caches, first.views)
    check_coverage(open_caches, first.sample_ids, missing=missing, words=OF_ENSEMBLE)
    check_same_labels(members, first.sample_ids)
    check_members(chosen, members, at, words=OF_ENSEMBLE)
    if chosen.name == "cross-entropy" and not first.has_labels:
        raise UsageError(f"--rule cross-entropy asks for the label of each row, and {first.path.name} has none")
    skill, notes = measured_skill(chosen, members, words=OF_ENSEMBLE)
    routes, digest = load_routes(chosen, open_caches, first.sample_ids)
    teaching = Ensemble(members, chosen, lambda step: at, skill, routes)
    teachers = Teachers(teaching, tuple(stored), (), digest)
    encoding = _encoding(teaching.encoding, dtype)
    schema = replace(first.catalog.schema, encoding=encoding)
    result = replace(
        first.catalog,
        schema=schema,
        provenance=_provenance(teachers, None if makes_logits else at),
        shard_rows=shard_rows or default_shard_rows(schema.row_bytes),
        extents=(),
        head=None,
    )
    if first.catalog.head is not None:
        first.catalog.head.keep()
    job = Rewriting(first.catalog, result, first.views, _recode(teaching, encoding))
    root = write_cache(job, first.path, target, overwrite=overwrite, progress=progress)
    return EnsembleResult(root, chosen.shown, (note_of(teaching), *notes))


def _check_asked(
    asked: Sequence[AskedCache], target: Path, *, missing: str, shard_rows: int | None, overwrite: bool
) -> None:
    if len(asked) < 2:
        raise UsageError(
            f"an ensemble is of two caches or more, found {len(asked)}; one alone is copied by `kdcache merge`"
        )
    if missing not in ("error", "vote"):
        raise UsageError(f"--missing {missing!r:.50} is not known; choose error or vote")
    if shard_rows is not None and shard_rows < 1:
        raise UsageError(f"--shard-rows (shard_rows=) must be at least 1, found {shard_rows}")
    for one in asked:
        path = one.cache.path if not isinstance(one.cache, (str, os.PathLike)) else Path(one.cache)
        if os.path.realpath(target) == os.path.realpath(path):
            raise UsageError(f"{target} is a cache that is read; choose another name")
        check_target(path, target, overwrite=overwrite)


def _temperature(asked: float | None, rule: Rule, *, makes_logits: bool) -> float:
    if makes_logits and asked is not None:
        raise UsageError(
            f"--temperature has no effect on --rule {rule}, whose logits serve every temperature: leave it out"
        )
    if not makes_logits and asked is None:
        raise UsageError(f"--rule {rule} makes soft targets, which are of one temperature: give --temperature")
    return 1.0 if asked is None else float(asked)


def _encoding(made: Encoding, dtype: str) -> Encoding:
    """What is stored of float32 rows."""
    if isinstance(made, SoftTargets):
        if dtype not in FLOATS:
            raise UsageError(f"soft targets are stored as {' or '.join(FLOATS)}, found --dtype {dtype}")
        return replace(made, stored=dtype)
    return EncodingChoice(dtype).of(made.row_shape)


def _provenance(teachers: Teachers, temperature: float | None) -> dict[str, Any]:
    """The first cache's data and views; the teacher is all of them."""
    members = [member.cache.provenance for member in teachers.ensemble.members]
    seen = [str(one.get("teacher_seen", "unknown")) for one in members]
    licences = {str(one.get("licence") or "unknown") for one in members}
    names = ", ".join(member.name for member in teachers.ensemble.members)
    return {
        **{key: members[0][key] for key in _KEPT if key in members[0]},
        "teacher": {"spec": f"ensemble of {names}"},
        "teacher_seen": "yes" if "yes" in seen else "unknown" if "unknown" in seen else "no",
        "licence": licences.pop() if len(licences) == 1 else "several, see ensemble",
        ENSEMBLE: {**teachers.describe(), "temperature": temperature},
    }


def _recode(teaching: Ensemble, encoding: Encoding) -> Callable[[Block], tuple[dict[str, np.ndarray], int]]:
    old = teaching.members[0].cache.encoding

    def recode(block: Block) -> tuple[dict[str, np.ndarray], int]:
        rows = TeacherRows(
            old,
            {spec.name: block[spec.name] for spec in old.specs},
            block["sample_id"],
            block["view"],
            block.get("label"),
            np.ones(len(block["sample_id"]), bool),
            label_b=block.get("label_b"),
            mix_ratio=block.get("mix_ratio"),
        ).tensors()
        with torch.inference_mode():
            made = teaching.rows(rows, rows.label, step=0)
        arrays = {name: value.numpy() for name, value in made.arrays.items()}
        if isinstance(encoding, SoftTargets):
            return encoding.from_log_probs(arrays), 0
        encoded = encoding.encode(arrays["logits"])
        return encoded.arrays, int(encoded.clamped.sum())

    return recode
