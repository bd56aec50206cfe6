"""Caches of views for tests, written as `precompute` writes them, with a teacher that can be checked by looking.

The teacher's logits are taken from the digest of the pixels that it sees, so that a row belongs to an input if, and but
for a chance of 2**-30 only if, it equals `logits_of` that input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.data import Dataset

import kdcache
from kdcache.format.dense import Dense
from kdcache.format.identity import as_sample_ids, input_digest
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store import posix
from kdcache.store.dump import open_dump
from kdcache.store.incoming import consecutive
from kdcache.store.plan import Plan
from kdcache.train.ids import resolve
from kdcache.train.items import first_input, label_of
from kdcache.train.replay import Replay
from kdcache.train.viewed import ViewedItems

CLASSES = 5


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Items (image, label): 1 x 8 x 8 float32, or 3 x 8 x 8 uint8 with `colour`."""

    def __init__(self, rows: int = 12, *, colour: bool = False, side: int = 8) -> None:
        generator = torch.Generator().manual_seed(7)
        if colour:
            self.inputs = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
        else:
            self.inputs = torch.rand(rows, 1, side, side, generator=generator)
        self.labels = [index % CLASSES for index in range(rows)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], self.labels[index]


def logits_of(value: Any) -> np.ndarray:
    """(C,) float32: six bits of the input's digest for each class, which float16 rows keep exactly."""
    digest = input_digest(value)
    return np.array([(digest >> 6 * at) & 63 for at in range(CLASSES)], np.float32)


def write_views(
    path: Path,
    dataset: Any,
    replay: Replay | None,
    views: Sequence[int] = (0, 1, 2, 3),
    *,
    samples: Sequence[int] | None = None,
    sample_ids: Any = None,
    digests: bool = True,
    shard_rows: int = 5,
) -> kdcache.Cache:
    """Dumps views of a data set, or of its items `samples` in that order; opens the cache.

    Nothing waits for the disk: tests/store/test_posix.py looks at that.
    """
    with patch.object(posix, "fsync", lambda fd: None), patch.object(posix, "fsync_folder", lambda folder: None):
        _write(path, dataset, replay, views, samples, sample_ids, digests, shard_rows)
    return kdcache.open(path)


def _write(
    path: Path,
    dataset: Any,
    replay: Replay | None,
    views: Sequence[int],
    samples: Sequence[int] | None,
    sample_ids: Any,
    digests: bool,
    shard_rows: int,
) -> None:
    every = resolve(dataset, sample_ids=sample_ids)
    chosen = np.arange(len(every)) if samples is None else np.asarray(samples)
    ids = as_sample_ids(every[chosen])
    items = ViewedItems(dataset, every, replay, ids)
    encoding = Dense((CLASSES,), "float16")
    id_dtype = "<i8" if ids.dtype.kind == "i" else f"|S{ids.dtype.itemsize}"
    schema = RowSchema(encoding, id_dtype, has_labels=True, has_digests=digests, is_mixed=items.is_mixed)
    point = "item" if replay is None else "view"
    provenance: dict[str, Any] = {"data": {"name": "test", "digest_point": point}}
    if replay is not None:
        provenance["views"] = replay.describe()
    plan = Plan(schema, ClassList.of(CLASSES, None), shard_rows, len(ids), provenance, tuple(views))
    dump = open_dump(path, plan)
    for number in range(dump.plan.shard_count):
        view, start, stop = dump.plan.span(number)
        index = number % dump.plan.shards_per_view
        assert dump.claim(view, index)
        viewed = items.load(chosen[start:stop].tolist(), [view] * (stop - start))
        inputs = [first_input(one.item) for one in viewed]
        rows = {"sample_id": ids[start:stop], "label": np.array([label_of(one.item) for one in viewed], np.int64)}
        if items.is_mixed:
            rows["label_b"] = np.array([one.label_b for one in viewed], np.int64)
            rows["mix_ratio"] = np.array([one.mix_ratio for one in viewed], np.float32)
        if digests:
            rows["input_digest"] = np.array([input_digest(value) for value in inputs], np.uint64)
        rows |= encoding.encode(np.stack([logits_of(value) for value in inputs])).arrays
        container = dump.container(view, index, start, stop)
        container.append(rows, view=view, positions=np.arange(start, stop))
        record = container.record(view=view, start=start, ids=consecutive(ids[start:stop]))
        dump.commit(container, record, index)
        dump.release(view, index)
    records = dump.all_records()
    assert records is not None
    dump.finish(records, samples=len(ids))
