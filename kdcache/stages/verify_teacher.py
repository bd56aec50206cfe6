"""`kdcache verify --teacher`: runs a teacher on some rows of a cache again: is it the one whose logits are stored?

Compared is the relative L2 distance of centred logits, ||c(again) - c(stored)|| / ||c(stored)|| with c = minus the
mean over the classes, since softmax does not see a shift. Medians on a small CNN over 20 classes: other batch sizes,
threads, memory formats 2e-7; storage in float16 3e-4; bfloat16 against float32 3e-3. JPEG 95 instead of the original
2.9e-2, bicubic for bilinear or a crop off by one pixel 4.4e-2, another seed of the same recipe 0.33. Single rows
scatter: one changed weight gives a median of 8e-4 and a row of 1.6e-2. (Not told apart: weights rounded to float16,
4e-4; `same_weights` says so.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.errors import MismatchError
from kdcache.format.identity import show_id
from kdcache.stages.choices import AMP
from kdcache.stages.comparable import comparable
from kdcache.stages.devices import pick_device
from kdcache.stages.dump_feed import DumpItems, Fed
from kdcache.stages.dump_plan import check_logits, feed, forward
from kdcache.stages.loaded_data import NO_LABEL
from kdcache.stages.precompute_inputs import data_of, teacher_of
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.teacher_report import OTHER_COMPUTE, ROW_FACTOR, SAME_COMPUTE, TeacherReport, judged
from kdcache.stages.teachers import LoadedTeacher
from kdcache.stages.verify_rows import contradictions, replayed_rows
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.rows import TeacherRows
from kdcache.train.cache_views import Augment
from kdcache.train.checks import reason_against_inputs

_BATCH_ROWS = 64


def verify_teacher(
    path: str | Path,
    teacher: nn.Module | LoadedTeacher | str,
    data: Any,
    *,
    weights: Path | None = None,
    transform: Callable[[Any], Any] | None = None,
    sample_ids: Any = None,
    id_key: str | None = None,
    output_key: str | None = None,
    amp: str | None = None,
    device: str = "auto",
    augment: Augment | None = None,
    sample: int = 64,
    seed: int = 0,
) -> TeacherReport:
    """Runs a teacher on the first, last and random rows of the shards and compares logits, labels and input digests.

    Of a cache of augmented views, the views of each sample are replayed, and the teacher sees all of them.

    Args:
        path: of the cache.
        teacher: a module, or a SPEC.
        data: the data set, or a SPEC; it must hold the sampled rows.
        weights: state dict for a teacher that is given as a SPEC.
        transform: from the data set's input to the teacher's, for a teacher that is given as a module.
        sample_ids: one per item of the data set, as in `precompute`.
        id_key: as in `precompute`.
        output_key: as in `precompute`; the one of the dump if not given.
        amp: `none`, `bf16` or `fp16`; the one of the dump if not given.
        device: as in `precompute`.
        augment: the pipeline of the dump, where it is a transform of your own (see `kdcache.join`).
        sample: how many samples.
        seed: of the random ones.

    Raises:
        MismatchError: the data set lacks sampled rows, the teacher has another number of classes, or another pipeline.
        UsageError, DataError, LogitsError, CorruptCacheError: as in `precompute` and `kdcache.open`.
    """
    with open_cache(path) as cache:
        there = cache.provenance
        dumped_amp = there.get("precision", {}).get("amp")
        options = PrecomputeOptions(
            teacher=teacher if isinstance(teacher, str) else None,
            weights=weights,
            data=data if isinstance(data, str) else None,
            output_key=output_key if output_key is not None else there.get("output_key"),
            amp=amp if amp is not None else dumped_amp if dumped_amp in AMP else "none",
            device=device,
        )
        loaded = data_of(None if isinstance(data, str) else data, options)
        rows = replayed_rows(
            cache, loaded, sample_ids=sample_ids, id_key=id_key, augment=augment, sample=sample, seed=seed
        )
        with teacher_of(None if isinstance(teacher, str) else teacher, transform, options) as ready:
            items = DumpItems(rows, rows.stored.sample_id, ready.transform)
            return _compare(cache, rows.stored, ready, items, options)


def relative_differences(again: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """(N,) ||c(again) - c(stored)|| / ||c(stored)||, with c = minus the mean over the classes of a row.

    Classes that are masked (-inf) on both sides are left out; where only one side masks one, the difference is
    infinite. The single logit of a one-class teacher is not centred, which would leave nothing of it.

    Args:
        again: (N, C, ...) float.
        stored: (N, C, ...) float.
    """
    kept = np.isfinite(stored)
    difference = _centred(again, kept) - _centred(stored, kept)
    axes = tuple(range(1, stored.ndim))
    distance = np.sqrt((difference**2).sum(axis=axes))
    length = np.sqrt((_centred(stored, kept) ** 2).sum(axis=axes))
    same = distance == 0
    relative = np.divide(distance, length, out=np.where(same, 0.0, np.inf), where=~same & (length > 0))
    fits = (np.isfinite(again) == kept).all(axis=axes)
    return np.where(fits, relative, np.inf)


def _centred(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    values = np.where(kept & np.isfinite(logits), logits, 0).astype(np.float64)
    if logits.shape[1] == 1:
        return values
    mean = values.sum(axis=1, keepdims=True) / np.maximum(1, kept.sum(axis=1, keepdims=True))
    return np.where(kept, values - mean, 0)


def _compare(
    cache: Cache,
    stored: TeacherRows,
    teacher: LoadedTeacher,
    items: DumpItems,
    options: PrecomputeOptions,
) -> TeacherReport:
    device = pick_device(options.device)
    logits, labels, digests = [], [], []
    for again, fed in _run(cache, teacher, items, device, options):
        logits.append(again)
        labels.append(np.full(len(again), NO_LABEL) if fed.labels is None else fed.labels)
        digests.append(fed.digests)
    differences = relative_differences(*comparable(np.concatenate(logits), stored))
    there = cache.provenance
    was = there.get("precision", {})
    # Float32 is float32 everywhere; the rounding of bf16 and fp16 differs between kinds of devices.
    same_compute = was.get("amp") == options.amp and (options.amp == "none" or was.get("device") == device.type)
    tolerance = SAME_COMPUTE if same_compute else OTHER_COMPUTE
    state = there.get("teacher", {}).get("state_sha256")
    worst = int(differences.argmax())
    report = TeacherReport(
        rows=len(differences),
        median=float(np.median(differences)),
        worst=float(differences[worst]),
        worst_sample=show_id(stored.sample_id[worst]),
        median_tolerance=tolerance,
        row_tolerance=ROW_FACTOR * tolerance,
        same_compute=same_compute,
        labels_differ=None if stored.label is None else contradictions(np.concatenate(labels), stored.label),
        inputs_differ=(
            int((np.concatenate(digests) != stored.input_digest).sum())
            if stored.input_digest is not None and reason_against_inputs(cache) is None
            else None
        ),
        same_weights=None if state is None else teacher.provenance.get("state_sha256") == state,
    )
    return judged(report, cache.path.name)


def _run(
    cache: Cache,
    teacher: LoadedTeacher,
    items: DumpItems,
    device: torch.device,
    options: PrecomputeOptions,
) -> Iterator[tuple[np.ndarray, Fed]]:
    """Raw logits (n, C, ...) float32 of one batch after the other."""
    module = teacher.module.to(device)
    rows = min(_BATCH_ROWS, teacher.max_batch or _BATCH_ROWS)
    for start in range(0, len(items), rows):
        fed = feed(items, list(range(start, min(start + rows, len(items)))))
        logits = forward(module, fed.inputs, device, options)
        row_shape = check_logits(logits, rows=len(fed.digests))
        if row_shape != cache.encoding.row_shape:
            raise MismatchError(
                f"the teacher returns {row_shape} values a sample, {cache.path.name} holds {cache.encoding.row_shape}: "
                "another teacher, or another part of its output (--output-key)"
            )
        yield logits.float().cpu().numpy(), fed
