"""What a dump writes: a background thread takes encoded batches and publishes shards.

The queue is short (4 batches), so memory does not grow with the data, and the forward pass of the next
batch overlaps with the checksums, hashes and writes of the last (which release the interpreter's lock).
Only between two shards the forward pass waits until the first is committed, since what was computed and not committed
is what a kill costs. It could be five batches ahead by then, of the 500 of a shard (1,000 classes, batches of 256).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.errors import DataError, LogitsError
from kdcache.format.identity import show_id
from kdcache.stages.dump_feed import Claim, Fed
from kdcache.store.dump import DumpFolder
from kdcache.store.incoming import check_labels, consecutive, fit_ids
from kdcache.store.shards import ContainerWriter
from kdcache.train.encode import EncodedTensors

_QUEUE_BATCHES = 4


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Rows [start, stop) of a shard on their way from the device; `ready` is what to wait for (CUDA)."""

    claim: Claim
    start: int
    stop: int
    encoded: EncodedTensors
    fed: Fed
    ready: torch.cuda.Event | None


class ShardSink:
    """The writing side of one process's dump.

    Args:
        dump: the folder.
        sample_ids: (N,) ids of all samples.
        on_rows: called with the number of rows after each batch is written.
    """

    def __init__(self, dump: DumpFolder, sample_ids: np.ndarray, on_rows: Callable[[int], None]) -> None:
        self._dump = dump
        self._sample_ids = fit_ids(sample_ids, dump.plan.schema)
        self._on_rows = on_rows
        self._queue: queue.Queue[EncodedBatch | None] = queue.Queue(_QUEUE_BATCHES)
        self._error: BaseException | None = None
        self._dropped = False
        self._ended = threading.Event()
        self._settled = threading.Event()  # no row is waiting for the commit record of its shard
        self._settled.set()
        self._last: Claim | None = None
        self._container: ContainerWriter | None = None
        self._thread = threading.Thread(target=self._work, name="kdcache-sink", daemon=True)
        self._thread.start()

    def begin(self, claim: Claim) -> None:
        """To be called before rows of a shard are computed; waits until the shard before it is committed.

        Raises:
            KDCacheError: what went wrong with an earlier batch.
        """
        if claim != self._last:
            self._settled.wait()
            self._last = claim
        self._raise()

    def put(self, batch: EncodedBatch) -> None:
        """Hands a batch over; waits while the queue is full.

        Raises:
            KDCacheError: what went wrong with an earlier batch.
        """
        self._raise()
        self._settled.clear()
        self._queue.put(batch)

    def close(self) -> None:
        """Waits until everything handed over is written; a shard that is not full is dropped.

        Raises:
            KDCacheError: what went wrong with a batch.
        """
        self._end()
        self._raise()

    def drop(self) -> None:
        """Stops without writing what is queued; never raises."""
        self._dropped = True
        self._end()

    def _end(self) -> None:
        # torch raises from a signal handler when a DataLoader worker died; a thread whose `join` is interrupted in
        # this way counts as ended while it still runs (Python 3.11), so its end is an event.
        while not self._ended.is_set():
            with contextlib.suppress(RuntimeError):
                self._queue.put(None)
                self._ended.wait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is not None or self._dropped:
                self._settled.set()
                continue  # keep emptying the queue, so that neither `put` nor `begin` waits for ever
            try:
                self._write(batch)
            except BaseException as error:
                self._error = error
                self._abandon()
                self._settled.set()
        self._abandon()
        self._ended.set()

    def _write(self, batch: EncodedBatch) -> None:
        if batch.ready is not None:
            batch.ready.synchronize()
        ids = self._sample_ids[batch.start : batch.stop]
        bad = np.flatnonzero(batch.encoded.bad.numpy())
        if bad.size:
            unlike = "" if self._dump.plan.head is None else ", or are not what its last layer (--factored) makes"
            raise LogitsError(
                f"the teacher's logits for sample {show_id(ids[bad[0]])} hold NaN, +inf or -inf alone{unlike}; check "
                "its input and weights, or try --amp none. Nothing of this shard was stored"
            )
        claim, schema = batch.claim, self._dump.plan.schema
        if self._container is None:
            self._container = self._dump.container(claim.view, claim.index, claim.start, claim.stop)
        rows: dict[str, np.ndarray] = {n: t.numpy() for n, t in batch.encoded.arrays.items()}
        rows["sample_id"] = ids
        fed = batch.fed
        if fed.labels is not None and not schema.has_labels:
            raise DataError(
                f"the first samples have no label, a sample from {show_id(ids[0])} on has one; give all of them a "
                "label, -1 where there is none"
            )
        if schema.has_labels:
            labels = checked(fed.labels, ids, schema.encoding.num_classes)
            rows["label"] = np.full(len(ids), -1, np.int64) if labels is None else labels
        if schema.has_digests:
            rows["input_digest"] = fed.digests
        if fed.label_b is not None and fed.mix_ratio is not None:
            partners = checked(fed.label_b, ids, schema.encoding.num_classes)
            rows["label_b"] = np.full(len(ids), -1, np.int64) if partners is None else partners
            rows["mix_ratio"] = fed.mix_ratio
        positions = np.arange(batch.start, batch.stop)
        clamped = int(batch.encoded.clamped)
        self._container.append(rows, view=claim.view, positions=positions, clamped=clamped)
        self._on_rows(len(ids))
        if batch.stop == claim.stop:
            self._publish(claim)

    def _publish(self, claim: Claim) -> None:
        if self._container is None:
            return
        ids = consecutive(self._sample_ids[claim.start : claim.stop])
        record = self._container.record(view=claim.view, start=claim.start, ids=ids)
        self._dump.commit(self._container, record, claim.index)
        self._container = None
        self._dump.release(claim.view, claim.index)
        self._settled.set()

    def _abandon(self) -> None:
        if self._container is not None:
            self._container.abandon()
            self._container = None


def checked(labels: np.ndarray | None, ids: np.ndarray, classes: int) -> np.ndarray | None:
    """Labels of the teacher's classes.

    Raises:
        DataError: one is no class of the teacher.
    """
    try:
        return check_labels(labels, ids, classes)
    except DataError as error:
        raise DataError(
            f"{error}. Where the data has more classes than the teacher, --labels known leaves the others' labels out "
            "(the teacher's are the first of the data), --labels none all of them (they are numbered otherwise)"
        ) from None


def to_host(encoded: EncodedTensors) -> tuple[EncodedTensors, Any]:
    """Starts copies to pinned memory without waiting; returns them and the event to wait for (None on a CPU)."""
    if encoded.bad.device.type != "cuda":
        on_cpu = EncodedTensors(
            {n: t.cpu() for n, t in encoded.arrays.items()}, encoded.bad.cpu(), encoded.clamped.cpu()
        )
        return on_cpu, None

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    copies = EncodedTensors({n: copy(t) for n, t in encoded.arrays.items()}, copy(encoded.bad), copy(encoded.clamped))
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copies, event
