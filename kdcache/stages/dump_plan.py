"""From a teacher, a data set and options to the plan of a dump, and the checks before anything is computed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import DataError, IncompleteCacheError, LogitsError, StorageError, UsageError
from kdcache.format.encodings import Encoding
from kdcache.format.hdf5_header import build_layout
from kdcache.format.headers import shard_header
from kdcache.format.identity import ids_sha256
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.stages.amp import autocast
from kdcache.stages.calling import call_model, move_to_device
from kdcache.stages.data import LoadedData
from kdcache.stages.dump_feed import DumpItems, Fed, collate
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.teachers import LoadedTeacher
from kdcache.store.folder import MANIFEST, PLAN, SHARDS, read_manifest
from kdcache.store.parts import read_catalog
from kdcache.store.plan import Plan, default_shard_rows, first_difference, parse_plan, raise_difference
from kdcache.store.posix import read_file
from kdcache.store.removal import refuse_foreign
from kdcache.store.versions import versions
from kdcache.store.writer import dump_folder_of
from kdcache.train.ranks import discover

DIGEST_POINT = "item"
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Job:
    """Everything a dump needs, checked: `items` feed `teacher` on `device`, `plan` says what comes out."""

    plan: Plan
    teacher: LoadedTeacher
    items: DumpItems
    sample_ids: np.ndarray
    device: torch.device
    options: PrecomputeOptions


def early_checks(out: Path, data: LoadedData, sample_ids: np.ndarray, options: PrecomputeOptions) -> PrecomputeOptions:
    """What can be refused before the teacher is loaded: a path that is taken, another data set, a full disk.

    Returns:
        The options, with the number of threads of the dump that is to be resumed where none was asked for:
        under torchrun the default is 1, alone it is the number of cores.

    Raises:
        UsageError: `out` holds something that is not a cache.
        MismatchError: it holds the dump of other data, or another precision.
        StorageError: too little disk, or no permission.
    """
    folder, one_file = dump_folder_of(out)
    if one_file and out.is_dir():
        raise UsageError(f"{out} is a folder; a name in .h5 makes one file: choose another --out")
    refuse_foreign(folder)
    if options.overwrite and (options.shard is not None or discover().world_size > 1):
        raise UsageError(
            "--overwrite goes with one process only: each of several would remove what the others have done; remove "
            f"{out} first"
        )
    found, stored = (None, False) if options.overwrite else _existing(out, folder)
    if found is not None and options.threads is None and isinstance(threads_of(found), int):
        options = replace(options, threads=threads_of(found))
    if found is None or not stored:
        if not os.access(_existing_folder(out), os.W_OK):
            raise StorageError(
                f"{out} cannot be written: no permission in {_existing_folder(out)}; choose another --out"
            )
        if data.num_classes and not options.dry_run:
            width = 2 if options.dtype == "float16" else 4
            check_disk(out, len(sample_ids) * (data.num_classes * width + 32) * (2 if one_file else 1))
        return replace(options, threads=options.threads or torch.get_num_threads())
    there = found.get("precision", {})
    wanted = {**precision(options, torch.device("cpu")), "device": there.get("device")}
    for part, left, right in (
        ("provenance.data", found.get("data"), data_identity(data, sample_ids)),
        ("provenance.precision", there, wanted),
    ):
        difference = first_difference(left, right, part)
        if difference is not None:
            raise_difference(difference, where=str(out))
    return options


def make_job(
    teacher: LoadedTeacher, data: LoadedData, sample_ids: np.ndarray, device: torch.device, options: PrecomputeOptions
) -> Job:
    """Runs the teacher on one batch to learn what it returns, and writes the plan down.

    Raises:
        LogitsError: the output is not (N, C) or (N, C, ...).
        UsageError: a batch size that the teacher cannot take.
    """
    if teacher.max_batch is not None and options.batch_size > teacher.max_batch:
        raise UsageError(
            f"--batch-size {options.batch_size} is above {teacher.max_batch}, the most that the exported teacher takes"
        )
    items = DumpItems(data.dataset, sample_ids, teacher.transform)
    probe = feed(items, list(range(min(2, len(items)))))
    logits = forward(teacher.module.to(device), probe.inputs, device, options)
    row_shape = check_logits(logits, rows=min(2, len(items)))
    encoding = Encoding(options.dtype, row_shape)
    id_dtype = "<i8" if sample_ids.dtype.kind == "i" else f"|S{sample_ids.dtype.itemsize}"
    schema = RowSchema(encoding, id_dtype, probe.labels is not None, True)
    names = data.classes if data.classes is not None and len(data.classes) == encoding.num_classes else None
    plan = Plan(
        schema=schema,
        classes=ClassList.of(encoding.num_classes, names),
        shard_rows=options.shard_rows or default_shard_rows(schema.row_bytes),
        samples=len(sample_ids),
        provenance={
            "teacher": teacher.provenance,
            "data": data_identity(data, sample_ids),
            "output_key": options.output_key,
            "transform": None if teacher.transform is None else describe_transform(teacher.transform),
            "teacher_seen": options.teacher_saw,
            "licence": options.licence,
            "precision": precision(options, device),
            "versions": {**versions(), "torch": torch.__version__},
        },
    )
    return Job(plan, teacher, items, sample_ids, device, options)


def data_identity(data: LoadedData, sample_ids: np.ndarray) -> dict[str, Any]:
    """The data part of the provenance, with how many of its samples are dumped and where digests are taken."""
    ids = data.provenance.get("ids_sha256") or ids_sha256(sample_ids)  # known only now where they were passed in
    return {**data.provenance, "ids_sha256": ids, "dumped": len(sample_ids), "digest_point": DIGEST_POINT}


def precision(options: PrecomputeOptions, device: torch.device) -> dict[str, Any]:
    """What the bits of the logits depend on beside teacher and data."""
    return {
        "amp": options.amp,
        "batch_size": options.batch_size,
        "device": device.type,
        "threads": options.threads or torch.get_num_threads(),
    }


def describe_transform(transform: Any) -> str:
    """A transform as text, without memory addresses or paths."""
    name = getattr(transform, "__qualname__", None)
    if name is not None:
        return f"{getattr(transform, '__module__', '')}.{name}"
    text = " ".join(repr(transform).split())
    private = " at 0x" in text or any(mark in text for mark in ("/", "\\", "~"))  # an address, or perhaps a path
    return type(transform).__qualname__ if private else text[:2000]


def forward(model: nn.Module, inputs: Any, device: torch.device, options: PrecomputeOptions) -> Tensor:
    """Raw logits of a batch on the device, in inference mode."""
    with torch.inference_mode(), autocast(options.amp, device):
        return call_model(model, move_to_device(inputs, device), output_key=options.output_key, what="teacher")


def check_logits(logits: Tensor, *, rows: int) -> tuple[int, ...]:
    """The shape of one row.

    Raises:
        LogitsError: not floating point, not (N, C, ...), or another N than the batch has.
    """
    if logits.ndim < 2 or len(logits) != rows or not logits.is_floating_point():
        raise LogitsError(
            f"the teacher returned {logits.dtype} of shape {tuple(logits.shape)} for {rows} samples, expected floating "
            "point logits (N, C) or (N, C, ...); pick the right part of its output with --output-key"
        )
    return tuple(int(n) for n in logits.shape[1:])


def planned_bytes(plan: Plan) -> int:
    """Bytes of all shards, exactly."""
    sizes: dict[tuple[int, int], int] = {}
    total = 0
    for number in range(plan.shard_count):
        view, start, stop = plan.span(number)
        teacher = plan.provenance.get("teacher", {})
        header = shard_header(plan.schema, plan.classes, teacher, view=view, start=start, stop=stop)
        key = (stop - start, len(header))
        if key not in sizes:
            sizes[key] = build_layout(plan.schema.specs, stop - start, header).size
        total += sizes[key]
    return total


def check_disk(out: Path, needed: int) -> int:
    """Free bytes where `out` will be.

    Raises:
        StorageError: fewer than `needed`.
    """
    free = free_bytes(out)
    if free < needed + _SPARE_BYTES:
        raise StorageError(
            f"{out} needs about {needed / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free; free some space, "
            "choose another --out, or a smaller --dtype"
        )
    return free


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` is or will be."""
    return shutil.disk_usage(_existing_folder(path)).free


def _existing_folder(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def limited_ids(sample_ids: np.ndarray, limit: int | None) -> np.ndarray:
    """The ids of the samples to dump.

    Raises:
        DataError: there are none.
    """
    if not len(sample_ids):
        raise DataError("the data set has no rows; a cache needs at least one")
    return sample_ids if limit is None else sample_ids[:limit]


def feed(items: DumpItems, indices: list[int]) -> Fed:
    """One batch of items, loaded in this process.

    Raises:
        KDCacheError: what went wrong with an item; the message names the sample.
    """
    collated = collate(items.__getitems__(indices))
    if not isinstance(collated, tuple):
        raise collated.kind(collated.message)
    inputs, labels, digests = collated
    return Fed(inputs, labels, digests)


def threads_of(provenance: dict[str, Any]) -> int | None:
    """The number of threads of a dump, None where it does not say."""
    threads = provenance.get("precision", {}).get("threads")
    return threads if isinstance(threads, int) else None


def _existing(out: Path, folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """The provenance of the dump at `out`, and whether any of its rows are stored."""
    try:
        if (folder / MANIFEST).exists():
            return read_manifest(folder).provenance, True
        if (folder / PLAN).exists():
            path = folder / PLAN
            plan = parse_plan(read_file(path, 1 << 28), where=str(path))
            return plan.provenance, any(name.endswith(".h5") for name in os.listdir(folder / SHARDS))
    except (IncompleteCacheError, FileNotFoundError):
        pass  # another process has finished it since
    return (read_catalog(out).provenance, True) if out.is_file() else (None, False)
