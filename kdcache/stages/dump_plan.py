"""From a teacher, a data set and options to the plan of a dump, and the checks before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import DataError, LogitsError, StorageError, UsageError
from kdcache.format.encoding import label_count
from kdcache.format.identity import ids_sha256
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.format.topk import TopK
from kdcache.stages.amp import autocast
from kdcache.stages.calling import call_model, move_to_device
from kdcache.stages.data import LoadedData
from kdcache.stages.devices import pick_device
from kdcache.stages.dump_feed import DumpItems, Fed, collate
from kdcache.stages.growth import StoredOrder
from kdcache.stages.last_layer import LastLayer, last_layer
from kdcache.stages.loaded_data import NO_LABEL
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.preflight import existing_folder
from kdcache.stages.teachers import LoadedTeacher
from kdcache.store.head_writer import HeadContent
from kdcache.store.incoming import plain_provenance
from kdcache.store.occupant import occupant
from kdcache.store.plan import Plan, default_shard_rows, same_source
from kdcache.store.versions import versions
from kdcache.train.encode_features import LayerInputs
from kdcache.train.replay import Replay


@dataclass(frozen=True, eq=False)
class Job:
    """Everything a dump needs, checked: `items` feed `teacher` on `device`, `plan` says what comes out."""

    plan: Plan
    teacher: LoadedTeacher
    items: DumpItems
    sample_ids: np.ndarray
    device: torch.device
    options: PrecomputeOptions
    layer: LastLayer | None = None
    head: HeadContent | None = None

    def forward(self, inputs: Any) -> tuple[Tensor, LayerInputs | None]:
        """Raw logits of a batch on the device, and of a factored dump what went into the teacher's last layer."""
        return run_teacher(self.teacher.module, inputs, self.device, self.options, self.layer)

    def with_labels(self, fed: Fed) -> Fed:
        """The batch with the labels that are to be stored (`--labels`), -1 in place of others."""
        if self.options.labels == "all":
            return fed
        count = label_count(self.plan.schema.encoding.num_classes) if self.options.labels == "known" else 0
        label, label_b = (
            None if labels is None else np.where(labels < count, labels, NO_LABEL)
            for labels in (fed.labels, fed.label_b)
        )
        return replace(fed, labels=label if self.plan.schema.has_labels else None, label_b=label_b)


def early_checks(
    out: Path,
    data: LoadedData,
    sample_ids: np.ndarray,
    replay: Replay | None,
    order: StoredOrder | None,
    options: PrecomputeOptions,
) -> PrecomputeOptions:
    """What can be refused before the teacher is loaded, when `asked_plan.check_path` has nothing against it.

    Returns:
        The options, with what the dump that goes on has where nothing else was asked for: the number of threads (under
        torchrun the default is 1, alone it is the number of cores), the rows of a shard, and where samples come to it
        its views.

    Raises:
        MismatchError: `out` holds the dump of other data, or another precision.
        StorageError: no permission.
    """
    found = None if options.overwrite else occupant(out)
    if options.threads is None:
        there = None if found is None else found.field("provenance", "precision", "threads")
        options = replace(options, threads=there if type(there) is int else torch.get_num_threads())
    if found is not None and found.is_stored and options.shard_rows is None:
        options = replace(options, shard_rows=found.field("shard_rows"))
    grows = order is not None and order.grows
    if order is not None and grows and order.views[: options.views] == tuple(range(options.views)):
        options = replace(options, views=max(options.views, len(order.views)))
    if found is not None:
        known: dict[str, Any] = {
            "id": id_dtype_of(sample_ids),
            "provenance": {
                "data": data_identity(data, sample_ids, replay),
                "precision": precision(options, pick_device(options.device)),
            },
            "samples": len(sample_ids),
            "views": list(range(options.views)),
        }
        if replay is not None:
            known["provenance"]["views"] = replay.describe()
        if grows:
            del known["samples"]
            known["provenance"]["data"] = same_source(known["provenance"])
        found.refuse_other(known)
    if (found is None or not found.is_stored) and not os.access(existing_folder(out), os.W_OK):
        raise StorageError(f"{out} cannot be written: no permission in {existing_folder(out)}; choose another --out")
    return options


def make_job(
    teacher: LoadedTeacher,
    data: LoadedData,
    sample_ids: np.ndarray,
    replay: Replay | None,
    order: StoredOrder | None,
    options: PrecomputeOptions,
) -> Job:
    """Runs the teacher on one batch to learn what it returns, and writes the plan down.

    Raises:
        LogitsError: the output is not (N, C) or (N, C, ...), or of a factored dump not that of the last layer.
        UsageError: a batch size that the teacher cannot take; no such layer.
    """
    if teacher.max_batch is not None and options.batch_size > teacher.max_batch:
        raise UsageError(
            f"--batch-size {options.batch_size} is above {teacher.max_batch}, the most that the exported teacher takes"
        )
    device = pick_device(options.device)
    items = DumpItems(data.dataset, sample_ids, teacher.transform, replay)
    probe = feed(items, list(range(min(2, len(items)))))
    layer = None if options.factored is None else last_layer(teacher.module, options.factored)
    logits, inputs = run_teacher(teacher.module.to(device), probe.inputs, device, options, layer)
    row_shape = check_logits(logits, rows=min(2, len(items)))
    is_mixed = replay is not None and replay.mix is not None
    has_labels = probe.labels is not None and options.labels != "none"
    labels = 0 if not has_labels else 2 if is_mixed else 1
    encoding, head = options.encoding.of(row_shape, labels=labels), None
    if layer is not None and inputs is not None:
        encoding, head = layer.encoding_of(logits, inputs)
    schema = RowSchema(encoding, id_dtype_of(sample_ids), has_labels, True, is_mixed)
    provenance = plain_provenance(  # a name that is no text, such as a file's that is not UTF-8, could not be read back
        {
            "teacher": teacher.provenance,
            "data": data_identity(data, sample_ids, replay),
            **({} if replay is None else {"views": replay.describe()}),
            "output_key": options.output_key,
            **({} if layer is None else {"layer": layer.name}),
            "transform": None if teacher.transform is None else describe_transform(teacher.transform),
            "teacher_seen": options.teacher_saw,
            "licence": options.licence,
            "precision": precision(options, device),
            "versions": {**versions(), "torch": torch.__version__},
        }
    )
    plan = Plan(
        schema=schema,
        classes=ClassList.of(encoding.num_classes, _class_names(data.classes, encoding.num_classes, options.labels)),
        shard_rows=options.shard_rows or default_shard_rows(schema.row_bytes),
        samples=len(sample_ids),
        provenance=provenance,
        views=tuple(range(options.views)),
        extents=() if order is None else order.extents,
        head=None if head is None else head.record,
    )
    return Job(plan, teacher, items, sample_ids, device, options, layer, head)


def _class_names(names: tuple[str, ...] | None, count: int, labels: str) -> tuple[str, ...] | None:
    """The data's names of the teacher's classes; none where they may be others, or in another order."""
    if names is None or labels == "none" or len(names) < count:
        return None
    return names[:count] if labels == "known" or len(names) == count else None


def id_dtype_of(sample_ids: np.ndarray) -> str:
    """The stored type of the ids."""
    return "<i8" if sample_ids.dtype.kind == "i" else f"|S{sample_ids.dtype.itemsize}"


def data_identity(data: LoadedData, sample_ids: np.ndarray, replay: Replay | None) -> dict[str, Any]:
    """The data part of the provenance, with how many of its samples are dumped and where digests are taken."""
    ids = data.provenance.get("ids_sha256") or ids_sha256(sample_ids)  # known only now where they were passed in
    point = "item" if replay is None else "view"
    return {**data.provenance, "ids_sha256": ids, "dumped": len(sample_ids), "digest_point": point}


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


def labels_to_keep(fed: Fed, schema: RowSchema, device: torch.device) -> Tensor | None:
    """(N, L) int64 labels whose logits a top-k row keeps in any case, -1 where there is none; None where L is 0."""
    count = schema.labels_kept
    if not count or not isinstance(schema.encoding, TopK):
        return None
    none = np.full(len(fed.digests), -1, np.int64)
    columns = [none if column is None else column for column in (fed.labels, fed.label_b)[:count]]
    return torch.from_numpy(np.stack(columns, axis=1)).to(device, non_blocking=True)


def run_teacher(
    model: nn.Module, inputs: Any, device: torch.device, options: PrecomputeOptions, layer: LastLayer | None
) -> tuple[Tensor, LayerInputs | None]:
    """The same, with what went into a layer on the way."""
    if layer is None:
        return forward(model, inputs, device, options), None
    return layer.run(lambda: forward(model, inputs, device, options))


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
    return Fed(*collated)
