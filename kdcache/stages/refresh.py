"""`refresh`: the cache of a teacher that changes, written anew beside the version that a student is learning from.

A version is one pass of the teacher over the data (`precompute`) into a folder of its own. It is listed when it is
complete; until then, and after a kill at any moment, the one before is current. The same call again goes on with the
dump that was under way. What it costs is that pass, and the disk for `keep` versions.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.errors import CorruptCacheError, IncompleteCacheError, MismatchError, UsageError
from kdcache.format.identity import fingerprint, ids_sha256
from kdcache.stages.checkpoint import rng_state, set_rng_state
from kdcache.stages.data import LoadedData, load_data
from kdcache.stages.precompute import precompute
from kdcache.stages.precompute_inputs import data_of, teacher_of
from kdcache.stages.precompute_options import PrecomputeOptions, options_of
from kdcache.stages.specs import describe
from kdcache.stages.teachers import LoadedTeacher
from kdcache.store.cache import Cache
from kdcache.store.posix import exists
from kdcache.store.version_folder import (
    Version,
    current_version,
    listed_versions,
    only_writer,
    open_version,
    remove_version,
    sweep,
    version_name,
    write_list,
)
from kdcache.train.ids import resolve

__all__ = ["PathLike", "current", "refresh"]

PathLike = str | os.PathLike[str]
_REFUSED = ("teacher", "weights", "data", "out", "overwrite", "dry_run", "shard")


def refresh(
    teacher: nn.Module | LoadedTeacher,
    data: Any,
    out: PathLike,
    *,
    step: int | None = None,
    keep: int | None = 2,
    **settings: Any,
) -> Cache:
    """Writes the next version of a teacher's cache and makes it the current one.

    Asked again with the same teacher, step, data and settings it gives the version that is there. One process of a run
    calls it; the random generators are left as they were.

    Args:
        teacher: a module, in any mode; its modes are given back.
        data: a map-style data set, a SPEC, or what `load_data` gives.
        out: the folder of the versions.
        step: optimiser step of the student's run, for the version's provenance.
        keep: so many complete versions stay, the others are removed; None for all. Processes that have one open read
            on; a run that is resumed may need the one before the last.
        **settings: fields of `PrecomputeOptions`, for example `batch_size=256, dtype="int8"`. The device is that of
            the teacher's parameters unless it is given.

    Returns:
        The new version, all of it mapped.

    Raises:
        UsageError: a teacher that is no module, settings that make no version, or `out` holds something else.
        MismatchError: another process is writing a version there.
        LogitsError, DataError, StorageError, InterruptedRunError: as `precompute`; the version before stays current.

    >>> from tempfile import mkdtemp
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> refresh(net, "digits:test", f"{mkdtemp()}/teacher", step=100, quiet=True).path.name
    'v000001'
    """
    if keep is not None and keep < 1:
        raise UsageError(f"keep must be at least 1 version, or None for all; found {keep}")
    options = _options(teacher, settings)
    loaded = data_of(load_data(data) if isinstance(data, str) else data, options)
    folder, device = Path(out), torch.device("cpu" if options.device == "auto" else options.device)
    before = rng_state(device)  # a loader draws from the global generator; a student's dropout must not notice
    try:
        with only_writer(folder), teacher_of(teacher, None, options) as ready:
            return _refreshed(ready, loaded, folder, options, step=step, keep=keep)
    finally:
        set_rng_state(before, device)


def current(out: PathLike) -> Cache:
    """The latest complete version in a folder of versions, all of it mapped; another process may be writing the next.

    Raises:
        IncompleteCacheError: there is none.
        CorruptCacheError: the list of versions is damaged.
    """
    found = current_version(Path(out))
    if found is None:
        raise IncompleteCacheError(f"{out} holds no complete version of a cache yet; write one with `refresh`")
    return found


def _options(teacher: nn.Module | LoadedTeacher, settings: dict[str, Any]) -> PrecomputeOptions:
    if not isinstance(teacher, (nn.Module, LoadedTeacher)):
        raise UsageError(
            f"refresh takes the teacher as a module (nn.Module), found {describe(teacher)}; what a SPEC names is "
            "loaded with kdcache.stages.teachers.load_teacher"
        )
    wrong = sorted(set(settings).intersection(_REFUSED))
    if wrong:
        raise UsageError(f"refresh does not take {wrong[0]!r}: teacher, data and folder are its arguments")
    module = teacher.module if isinstance(teacher, LoadedTeacher) else teacher
    first = next(module.parameters(), None)
    device = "auto" if first is None else str(first.device)
    return options_of({"device": device, "quiet": True, **settings})


def _refreshed(
    teacher: LoadedTeacher,
    data: LoadedData,
    folder: Path,
    options: PrecomputeOptions,
    *,
    step: int | None,
    keep: int | None,
) -> Cache:
    versions, sha256 = listed_versions(folder), str(teacher.provenance["state_sha256"])
    asked = _asked(data, options)
    number = 1 + (versions[-1].number if versions else 0)
    sweep(folder, [*(version.name for version in versions), version_name(number)])
    for version in reversed(versions):
        if (version.step, version.teacher, version.asked) == (step, sha256, asked):
            try:
                return open_version(folder, version)
            except (IncompleteCacheError, CorruptCacheError, MismatchError):
                break  # damaged since: made again under a new number
    facts = {**teacher.provenance, "generation": number, **({} if step is None else {"step": step})}
    path = folder / version_name(number)
    root = _dumped(replace(teacher, provenance=facts), data, path, options)
    made = Version(number, root, sha256, asked, step)
    kept = [*versions, made][-keep if keep else 0 :]
    write_list(folder, kept)
    cache = open_version(folder, made)
    sweep(folder, [version.name for version in kept])
    return cache


def _dumped(teacher: LoadedTeacher, data: LoadedData, path: Path, options: PrecomputeOptions) -> str:
    """The root hash of the finished dump; what a killed process left is gone on with, or replaced if it was another."""
    try:
        done = precompute(teacher, data, path, options=options)
    except (MismatchError, CorruptCacheError):
        if not exists(path):
            raise
        remove_version(path)  # it is not listed, and this is the only writer
        done = precompute(teacher, data, path, options=options)
    root: str = done.root  # type: ignore[union-attr, assignment]  # no dry run, and no share of the shards
    return root


def _asked(data: LoadedData, options: PrecomputeOptions) -> str:
    """What a version is made from beside its teacher, as a hash."""
    ids = resolve(data.dataset, sample_ids=data.sample_ids)
    fields = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.metadata["group"] in ("inputs", "cache") or field.name in ("batch_size", "threads", "amp")
    }
    return fingerprint({"options": fields, "data": data.provenance.get("fingerprint"), "ids": ids_sha256(ids)})
