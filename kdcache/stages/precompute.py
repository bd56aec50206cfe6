"""The `precompute` stage: run the teacher once over a data set and keep its raw logits.

Plan, then for each free shard: load, forward, encode on the device, copy without waiting, write in the
background, publish. Any number of processes may run the same command on the same --out; each takes the
next free shard, and the last one writes the manifest. Running it again goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.errors import IncompleteCacheError, InterruptedRunError, KDCacheError, StorageError, UsageError
from kdcache.format.headers import FileHeader
from kdcache.stages.asked_plan import check_path
from kdcache.stages.devices import torch_threads
from kdcache.stages.dry_run import DryRun, measure
from kdcache.stages.dump_feed import Claim, ShardBatches, batches, worker_deaths
from kdcache.stages.dump_plan import Job, check_logits, early_checks, labels_to_keep, limited_ids, make_job
from kdcache.stages.dump_sink import EncodedBatch, ShardSink, to_host
from kdcache.stages.dump_views import check_pipeline, pipeline_of_dump
from kdcache.stages.growth import Growth, compare_stored, in_order, stored_order
from kdcache.stages.loaded_data import check_unique_ids
from kdcache.stages.precompute_inputs import data_of, target_of, teacher_of
from kdcache.stages.precompute_options import PrecomputeOptions, options_of, share_of
from kdcache.stages.preflight import check_space, least_plan, planned_bytes
from kdcache.stages.progress import Progress
from kdcache.stages.signals import StopRequest, graceful_signals
from kdcache.stages.teachers import LoadedTeacher
from kdcache.store.dump import DumpFolder, open_dump
from kdcache.store.folder import MANIFEST, read_manifest
from kdcache.store.head_writer import place_head
from kdcache.store.locks import FINISH
from kdcache.store.merge import merge
from kdcache.store.parts import read_catalog
from kdcache.store.plan import Plan, require_same_file
from kdcache.store.posix import exists, is_file
from kdcache.store.removal import clear_parts, remove_dump, remove_one_file
from kdcache.store.writer import dump_folder_of
from kdcache.train.cache_views import Augment
from kdcache.train.encode import encode
from kdcache.train.ids import resolve
from kdcache.train.ranks import discover

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PrecomputeResult:
    """What a call of `precompute` did.

    Attributes:
        path: of the cache.
        root: its root hash; None if other processes (`--shard`) still have shards to do.
        samples: of the whole dump.
        computed: rows that this process computed.
        seconds: it took.
        rows_per_second: computed rows a second.
        bytes: of the whole dump.
        views: of each sample that are there, which may be more than were asked for.
        growth: where the data set grew since an earlier dump, what came to it, and labels that changed meanwhile.
        notes: what should be known about the dump.
    """

    path: str
    root: str | None
    samples: int
    computed: int
    seconds: float
    rows_per_second: float
    bytes: int
    views: int
    growth: Growth | None = None
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the cache is complete."""
        return self.root is not None


def precompute(
    model: nn.Module | LoadedTeacher | None = None,
    dataset: Any = None,
    out: str | Path | None = None,
    *,
    transform: Callable[[Any], Any] | None = None,
    sample_ids: Any = None,
    id_key: str | None = None,
    augment: Augment | None = None,
    options: PrecomputeOptions | None = None,
    **settings: Any,
) -> PrecomputeResult | DryRun:
    """Runs a teacher over a data set and stores its logits.

    Args:
        model: the teacher; called as `model(item[0])`, or with the keys of dict items that `forward` takes.
        dataset: map-style; items `(x, label)`, dicts, or bare inputs. Ids come from `sample_ids=`, else
            `dataset.sample_ids`, else `id_key`, else the index.
        out: a folder, or a name ending in `.h5`.
        transform: from the data set's input to the teacher's; with `augment` from the shared view.
        sample_ids: N ids.
        id_key: the key of dict items that holds the id.
        augment: what makes the views: a pipeline by name, a transform, or what `kdcache.views` makes of it. Its draws
            are replayed: view v of a sample is the same for every student (see `kdcache.views`).
        options: all settings as one record, as the command passes them.
        **settings: fields of `PrecomputeOptions`, for example `batch_size=256, amp="bf16"`.

    Returns:
        What was done; with `dry_run=True` what it would cost.

    Raises:
        UsageError: settings that cannot be meant, or `out` holds something else.
        MismatchError: `out` holds another dump; the message names the field that differs, and a process at work on it.
        LogitsError: logits that cannot be stored; the message names the sample.
        DataError: the data set failed, or has no usable ids or labels.
        StorageError: too little disk, or an I/O error; committed shards stay.
        InterruptedRunError: SIGINT or SIGTERM; the same call goes on.
    """
    if options is None:
        options = options_of(settings)
    elif settings:
        raise UsageError(f"pass settings in options or by name, not both: {', '.join(settings)}")
    target = target_of(out, options)
    with graceful_signals() as stop:
        check_path(target, options if model is None else replace(options, teacher=None))
        data = data_of(dataset, options)
        own = data.sample_ids if sample_ids is None and id_key is None else None
        ids = resolve(data.dataset, sample_ids=sample_ids, id_key=id_key) if own is None else own
        check_unique_ids(ids, name=data.name)
        ids = limited_ids(ids, options.limit)
        replay = pipeline_of_dump(augment, options)
        order = stored_order(target, ids, overwrite=options.overwrite)
        if order is not None:
            data, ids = in_order(data, ids, order)
        options = early_checks(target, data, ids, replay, order, options)
        if replay is not None:
            check_pipeline(replay, data.dataset, ids, options.views)
        growth = compare_stored(target, data, ids, replay, order) if order is not None and order.grows else None
        if not options.dry_run:
            check_space(target, least_plan(target, data, ids, order, options), overwrite=options.overwrite)
        _check_stop(stop)
        with torch_threads(options.threads), teacher_of(model, transform, options) as teacher:
            _check_stop(stop)
            job = make_job(teacher, data, ids, replay, order, options)
            if options.dry_run:
                return measure(job, target)
            return replace(_dump(job, target, stop), growth=growth)


def _dump(job: Job, out: Path, stop: StopRequest) -> PrecomputeResult:
    begun = time.monotonic()
    folder, one_file = dump_folder_of(out)
    plan = job.plan
    if job.options.overwrite:
        check_space(out, plan, overwrite=True)  # lest the old cache go for a new one that does not fit
        _remove(out, folder)
    computed = 0
    try:
        if one_file and is_file(out):
            _finished_file(out, plan)  # refuses another dump before anything is touched
        else:
            check_space(out, plan)
        if one_file and is_file(out) and not exists(folder):
            root: str | None = _finished_file(out, plan)
        else:
            dump = open_dump(folder, plan, merged=out if one_file else None)
            try:
                if job.head is not None:
                    place_head(dump, job.head)
                computed = 0 if dump.finished else _work_through(dump, job, stop)
                _finish(dump, plan)
                if not dump.finished:
                    root = None  # other processes (--shard) have shards to do
                elif one_file:
                    root = _merge_once(dump, out, plan, stop)
                else:
                    root = read_manifest(folder).root
            finally:
                dump.leave()
    except (StorageError, IncompleteCacheError):
        # Another process made the file and clears the folder away under this one: its manifest goes first. While that
        # is there, the error is of this process, and the file's name may not be on the disk.
        if not (one_file and is_file(out)) or exists(folder / MANIFEST):
            raise
        root = _finished_file(out, plan)
    return _result(job, out, root, computed=computed, seconds=time.monotonic() - begun)


def _work_through(dump: DumpFolder, job: Job, stop: StopRequest) -> int:
    """Takes free shards until none is left; waits for those in other hands, whose owner may die."""
    computed = 0
    ranks = discover()
    share = share_of(job.options.shard)
    mine = [n for n in range(job.plan.shard_count) if n % share[1] == share[0]]
    left = [n for n in mine if _record_of(dump, n) is None]
    rows_done = sum(_rows(job.plan, n) for n in mine) - sum(_rows(job.plan, n) for n in left)
    enabled = ranks.is_first and not job.options.quiet
    total = sum(_rows(job.plan, n) for n in mine)
    with Progress(total, what="precompute", unit=" rows", done=rows_done, enabled=enabled) as progress:
        while left and not dump.finished:
            fresh = _one_pass(dump, job, left, stop, progress)
            computed += fresh
            left = [n for n in left if not dump.finished and _record_of(dump, n) is None]
            if left and not fresh and not dump.finished:
                _wait(stop)  # all that is left is in the hands of other processes
    return computed


def _one_pass(dump: DumpFolder, job: Job, left: list[int], stop: StopRequest, progress: Progress) -> int:
    """Computes the shards of `left` that are free now; returns the rows computed."""
    free = iter(left)
    held: list[Claim] = []

    def claim() -> Claim | None:
        for number in free:
            view, start, stop_at = job.plan.span(number)
            index = number % job.plan.shards_per_view
            if dump.claim(view, index):
                held.append(Claim(view, index, start, stop_at))
                return held[-1]
        return None

    options, device = job.options, job.device
    sampler = ShardBatches(claim, options.batch_size, len(job.sample_ids))
    sink = ShardSink(dump, job.sample_ids, progress.advance)
    computed = 0
    try:
        feed = batches(job.items, sampler, workers=options.workers, pin_memory=device.type == "cuda")
        with worker_deaths(), closing(feed):  # closed here: an exception that somebody keeps would keep the workers
            for shard, start, stop_at, given in feed:
                fed = job.with_labels(given)
                _check_stop(stop)
                sink.begin(shard)
                logits, inputs = job.forward(fed.inputs)
                check_logits(logits, rows=stop_at - start)
                with torch.inference_mode():
                    labels = labels_to_keep(fed, job.plan.schema, device)
                    encoded, ready = to_host(encode(job.plan.schema.encoding, logits, labels, inputs=inputs))
                sink.put(EncodedBatch(shard, start, stop_at, encoded, replace(fed, inputs=None), ready))
                computed += stop_at - start
        sink.close()
    except BaseException as error:
        if isinstance(error, KDCacheError) and stop.requested:
            sink.close()  # what was computed is stored, a shard that is not full is dropped
            _check_stop(stop)  # the signal may have ended a worker first, and this failed for want of it
        sink.drop()
        raise
    finally:
        with ExitStack() as releases:  # all of them, even where one cannot be given back
            for shard in held:
                releases.callback(dump.release, shard.view, shard.index)
    return computed


def _check_stop(stop: StopRequest) -> None:
    if stop.requested:
        raise InterruptedRunError(
            f"stopped by {stop.name}; finished shards are kept, run the same command again to go on"
        )


def _wait(stop: StopRequest) -> None:
    time.sleep(_POLL_SECONDS)
    _check_stop(stop)


def _record_of(dump: DumpFolder, number: int) -> object | None:
    view, _, _ = dump.plan.span(number)
    return dump.record(view, number % dump.plan.shards_per_view)


def _rows(plan: Plan, number: int) -> int:
    _, start, stop = plan.span(number)
    return stop - start


def _finish(dump: DumpFolder, plan: Plan) -> None:
    """Writes the manifest if all shards are committed and no other process has done it."""
    if not dump.finished:
        records = dump.all_records()
        if records is not None:
            dump.finish(records, samples=plan.samples or 0)


def _merge_once(dump: DumpFolder, out: Path, plan: Plan, stop: StopRequest) -> str:
    """Makes the one file from the finished folder; processes that come second wait and find it done."""
    with dump.exclusive(FINISH, lambda: _check_stop(stop)):
        if not is_file(out):
            merge(dump.folder, out, progress=lambda rows: _check_stop(stop))
        root = _finished_file(out, plan)
        clear_parts(dump.folder, out)
    return root


def _finished_file(out: Path, plan: Plan) -> str:
    catalog = read_catalog(out)
    header: FileHeader | None = catalog.header
    if header is not None:
        require_same_file(header, plan, where=str(out))
    return catalog.root


def _remove(out: Path, folder: Path) -> None:
    if exists(folder):
        remove_dump(folder)
    remove_one_file(out)


def _result(job: Job, out: Path, root: str | None, *, computed: int, seconds: float) -> PrecomputeResult:
    catalog = None if root is None else read_catalog(out)
    held, asked = len(job.plan.views if catalog is None else catalog.views), len(job.plan.views)
    notes = [] if (note := job.options.encoding.note(job.plan.classes.count)) is None else [note]
    if held > asked:
        notes.append(f"{held} views are there, more than the {asked} of --views; all of them stay")
    rate = computed / seconds if seconds > 0 else 0.0
    return PrecomputeResult(
        path=str(out),
        root=root,
        samples=job.plan.samples or 0,
        computed=computed,
        seconds=round(seconds, 3),
        rows_per_second=round(rate, 1),
        bytes=planned_bytes(job.plan) if catalog is None else catalog.size_bytes,
        views=held,
        notes=tuple(notes),
    )


def summary(result: PrecomputeResult | DryRun) -> dict[str, Any]:
    """For `--json`."""
    value = asdict(result)
    if isinstance(result, PrecomputeResult):
        value["finished"] = result.finished
    return value
