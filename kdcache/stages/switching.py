"""A run that goes on with another cache at an epoch's beginning: what is checked, and what changes in it.

The data, their order and the schedule stay. A checkpoint follows each change, so that a resumed run needs the version
it had or the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.errors import InterruptedRunError, MismatchError, UsageError
from kdcache.stages.checkpoint import rng_state, set_rng_state
from kdcache.stages.distill_inputs import Source, open_source
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.loaded_data import LoadedData
from kdcache.stages.loss_options import check_encoding, needs_teacher
from kdcache.stages.moving_teacher import MovingTeacher, Refresh, check_every
from kdcache.stages.parallel import Team
from kdcache.stages.policy_options import check_policies, row_policies
from kdcache.stages.run_record import TEACHER_NAME
from kdcache.stages.student_views import ViewSettings
from kdcache.stages.training import State, Trainer
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache

DEFAULT_DECAY = 0.99
_MESSAGE_BYTES = 8192
_NOTHING, _STOPPED = b"-", b"!"


def asked_refresh(given: Refresh | None, source: Source, options: DistillOptions) -> Refresh | None:
    """The refresh that a call gives as an object, or that its options ask for.

    Raises:
        UsageError: both.
    """
    if options.refresh_every is None:
        return given
    if given is not None:
        raise UsageError("refresh= and the option refresh_every are given: leave one of them out")
    assert options.out is not None  # `resolve` saw to it
    return MovingTeacher(
        Path(options.out) / TEACHER_NAME,
        _loaded(source),
        every=options.refresh_every,
        decay=DEFAULT_DECAY if options.ema is None else options.ema,
        threads=options.threads,
    )


def check_refresh(refresh: Refresh | None, source: Source, options: DistillOptions, *, caches: int) -> None:
    """Refuses runs whose teacher cannot change.

    Raises:
        UsageError: no term that learns from it, an epoch number that cannot be meant, or options that are about one
            cache or its views.
    """
    if refresh is None:
        return
    check_every(refresh.every)
    if not needs_teacher(options) and not options.hard_targets:
        raise UsageError("a refreshed teacher teaches nothing with --alpha 0: raise alpha, or leave out the refresh")
    if caches > 1:
        raise UsageError(f"{caches} caches are given, and a refreshed teacher takes the place of one: give one or none")
    if options.calibration:
        raise UsageError("--calibration is of one cache, and a refreshed teacher is another each time: leave it out")
    if options.classes is not None:
        raise UsageError(
            "--classes maps the classes of one teacher, and a refreshed one has the student's own: leave it out"
        )
    if source.cache is None and source.items is not None:
        raise UsageError(
            "the first version of a refreshed teacher has no views of the run's augmentation to follow: give --cache "
            "with a dump of --augment and --views, or leave them out"
        )


def check_comes(refresh: Refresh | None, trainer: Trainer) -> None:
    """Refuses runs that end before the first version: their teacher would never teach.

    Raises:
        UsageError: saying when the version would come, and when the run ends.
    """
    if refresh is None:
        return
    steps, an_epoch = trainer.schedule.total_steps, trainer.order.steps_per_epoch
    if steps <= refresh.every * an_epoch:
        raise UsageError(
            f"the first version of the refreshed teacher comes after {refresh.every} epochs (--refresh-every), and the "
            f"run ends after {steps / an_epoch:.4g} ({steps} steps): refresh more often, or train longer (--epochs, "
            "--steps)"
        )


def describe_refresh(refresh: Refresh | None) -> dict[str, Any]:
    """What two processes of a run must agree on; empty without a refreshed teacher."""
    if refresh is None:
        return {}
    return {"refresh every": refresh.every, "ema": None if refresh.ema is None else refresh.ema.decay}


def is_due(refresh: Refresh | None, state: State, *, steps_per_epoch: int) -> bool:
    """Whether the step to come is the first of an epoch that begins with another version."""
    epoch, within = divmod(state.step, steps_per_epoch)
    if refresh is None or within or epoch == 0 or epoch % refresh.every:
        return False
    return not state.versions or int(state.versions[-1]["epoch"]) < epoch


def next_version(refresh: Refresh, state: State, student: nn.Module, team: Team, *, epoch: int) -> Cache | None:
    """The cache for the epochs from `epoch` on, on all ranks; None to go on with the one there is.

    The generators are left as they were: a resumed run, which finds the version there, must not differ.

    Raises:
        InterruptedRunError: a signal came meanwhile; raised on all ranks.
        KDCacheError: whatever the refresh raised, on the first rank.
    """
    found, message = None, _NOTHING
    if team.is_first:
        before = rng_state(team.device)
        try:
            found = refresh.next(epoch, student, step=state.step)
        except InterruptedRunError:
            message = _STOPPED
        finally:
            set_rng_state(before, team.device)
        if found is not None:
            message = f"{found.root} {found.path.absolute()}".encode()
    told = _from_first(message, team)
    if told == _STOPPED:
        raise InterruptedRunError("stopped while the teacher was refreshed")
    if told == _NOTHING:
        return None
    root, _, path = told.decode().partition(" ")
    return open_cache(Path(path), expect_root=root) if found is None else found


def with_version(
    source: Source, trainer: Trainer, cache: Cache, options: DistillOptions, settings: ViewSettings | None
) -> tuple[Source, Trainer]:
    """The run's parts with another cache; ids are covered and views compared anew.

    Raises:
        MismatchError: another number of classes, other samples, or other views.
        CoverageError: it lacks samples that the run learns from.
        UsageError: rows that the losses or policies cannot be computed from.
    """
    assert settings is not None  # of every run with a refresh
    if cache.num_classes != trainer.num_classes:
        raise MismatchError(
            f"the refreshed teacher has {cache.num_classes} classes, the student {trainer.num_classes}: give the "
            "teacher the student's classes, in its order"
        )
    before = rng_state(trainer.team.device)  # views are tried out on a few samples
    try:
        opened = open_source(_loaded(source), cache, missing=options.missing, name=source.name, settings=settings)
    finally:
        set_rng_state(before, trainer.team.device)
    if not np.isin(source.positions, opened.positions).all():
        raise MismatchError(
            f"{cache.path.name} lacks samples of the {source.name} data that the run learns from: refresh the teacher "
            "on all of them, or use --missing ce"
        )
    check_encoding(options, cache.encoding)
    source = replace(source, cache=cache, sample_ids=opened.sample_ids, items=opened.items, views=opened.views)
    check_policies(row_policies(options), source)
    return source, replace(trainer, has_teacher=True, teaching=source.teaching)


def version_record(cache: Cache, *, epoch: int, step: int) -> dict[str, Any]:
    """A version for the run record."""
    return {"epoch": epoch, "step": step, "name": cache.path.name, "root": cache.root}


def shown(versions: Iterable[dict[str, Any]], refresh: Refresh | None) -> dict[str, Any]:
    """The part of the run record; empty without a refreshed teacher."""
    return {} if refresh is None else {"refresh": {**describe_refresh(refresh), "versions": list(versions)}}


def _loaded(source: Source) -> LoadedData:
    return LoadedData(source.dataset, source.name, source.num_classes, None, source.sample_ids, source.provenance)


def _from_first(message: bytes, team: Team) -> bytes:
    """The first rank's message on every rank."""
    if team.world_size == 1:
        return message
    if len(message) > _MESSAGE_BYTES:
        raise UsageError(f"the path of a refreshed cache has {len(message)} bytes, at most {_MESSAGE_BYTES} are told")
    padded = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    return bytes(team.gather(padded)[0].tolist()).rstrip(b"\0")
