"""`--dry-run`: what a dump would cost, measured on its first batches; nothing is written."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kdcache.format.dense import Dense
from kdcache.format.topk import TopK
from kdcache.stages.dump_feed import Claim, ShardBatches, batches, worker_deaths
from kdcache.stages.dump_plan import Job, labels_to_keep
from kdcache.stages.last_layer import smaller_layer
from kdcache.stages.preflight import free_bytes, planned_bytes
from kdcache.store.quality import Captured, of_logits
from kdcache.train.encode import encode

_MEASURE_SECONDS = 2.0


@dataclass(frozen=True)
class DryRun:
    """What a dump would cost; nothing was written.

    Attributes:
        rows: rows of the dump.
        bytes: on disk.
        bytes_per_row: payload of the encoding alone.
        shards: files.
        free_bytes: on the disk of --out.
        rows_per_second: measured on the first batches, loading included.
        seconds: estimated for one process.
        break_even_epochs: epochs of one student with a live teacher that cost as much as the dump.
        break_even_students: students of `epochs` epochs after which the dump has paid for itself.
        epochs: that estimate's epochs a student.
        factored: the teacher's last linear layer, where `--factored` with it would make smaller rows; None where not.
        captured: of top-k rows, at each stored temperature, the probability of the kept classes and the share of KL to
            the uniform distribution that they and their bucket hold, of the last batch that was measured; else empty.
    """

    rows: int
    bytes: int
    bytes_per_row: int
    shards: int
    free_bytes: int
    rows_per_second: float
    seconds: float
    break_even_epochs: float
    break_even_students: int
    epochs: int
    factored: str | None = None
    captured: tuple[Captured, ...] = ()


def measure(job: Job, out: Path) -> DryRun:
    """Runs the teacher for about two seconds and extrapolates; writes nothing."""
    plan, options = job.plan, job.options
    rows = (plan.samples or 0) * len(plan.views)
    samples = plan.samples or 0
    given = iter([Claim(view, 0, 0, samples) for view in plan.views])
    sampler = ShardBatches(lambda: next(given, None), options.batch_size, samples)
    begun, elapsed, forwarded, done = time.perf_counter(), 0.0, 0.0, 0
    feed = batches(job.items, sampler, workers=options.workers, pin_memory=job.device.type == "cuda")
    with worker_deaths(), closing(feed):
        for number, (_, start, stop, fed) in enumerate(feed):
            if number == 1:  # the first batch pays for warming up; it counts only where it is the only one
                begun, forwarded, done = begun + elapsed, 0.0, 0
            tick = time.perf_counter()
            logits, inputs = job.forward(fed.inputs)
            labels = labels_to_keep(job.with_labels(fed), plan.schema, job.device)
            encode(plan.schema.encoding, logits, labels, inputs=inputs).bad.cpu()
            now = time.perf_counter()
            forwarded, elapsed, done = forwarded + now - tick, now - begun, done + stop - start
            if elapsed > _MEASURE_SECONDS:
                break
    rate = done / max(1e-9, elapsed)
    # A live teacher costs a student its forward passes, every epoch; the dump costs them once, with loading.
    epochs = elapsed / max(1e-9, forwarded)
    return DryRun(
        rows=rows,
        bytes=planned_bytes(plan),
        bytes_per_row=plan.schema.payload_row_bytes,
        shards=plan.shard_count,
        free_bytes=free_bytes(out),
        rows_per_second=round(rate, 1),
        seconds=round(rows / rate, 1),
        break_even_epochs=round(epochs, 2),
        break_even_students=max(1, math.ceil(epochs / options.epochs)),
        epochs=options.epochs,
        factored=_smaller(job),
        captured=_captured(job, logits, labels),
    )


def _captured(job: Job, logits: Tensor, labels: Tensor | None) -> tuple[Captured, ...]:
    encoding = job.plan.schema.encoding
    if encoding.has_all_logits or not isinstance(encoding, TopK):
        return ()
    kept = None if labels is None or not encoding.labels else labels.cpu().numpy()
    return tuple(of_logits(encoding, logits.float().cpu().numpy(), kept))


def _smaller(job: Job) -> str | None:
    """Only where all logits are asked for in float16: other rows are smaller or more exact, and meant to be."""
    encoding = job.plan.schema.encoding
    if not isinstance(encoding, Dense) or encoding.dtype != "float16":
        return None
    return smaller_layer(job.teacher.module, encoding.row_shape, job.plan.schema.payload_row_bytes)
