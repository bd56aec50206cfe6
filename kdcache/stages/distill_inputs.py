"""What a distillation run works on: data sets joined to caches, and the student, checked against each other.

Everything that can be refused is refused here, before the first step: rows that the cache lacks, a
student of another width, a teacher without a softmax, data with nothing to learn from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.format.encoding import Encoding
from kdcache.format.identity import ids_sha256
from kdcache.stages.batches import Batch, take_apart
from kdcache.stages.calibration_file import StoredCalibration, load_calibration
from kdcache.stages.calling import call_model
from kdcache.stages.choices import NOVEL
from kdcache.stages.class_map_file import StoredClassMap
from kdcache.stages.data import LoadedData, class_names, load_data
from kdcache.stages.distill_options import DistillOptions, several
from kdcache.stages.label_fraction import LabelChoice
from kdcache.stages.loss_options import check_encoding, needs_teacher
from kdcache.stages.signals import shield_worker
from kdcache.stages.student_views import ViewSettings, describe_views, in_views, refuse_views
from kdcache.stages.students import load_student
from kdcache.stages.weights import load_weights
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.train.attach import attach
from kdcache.train.calibrated import check_serves
from kdcache.train.checks import Check
from kdcache.train.ids import length, resolve
from kdcache.train.reading import Missing
from kdcache.train.teaching import OneTeacher, Teaching
from kdcache.train.with_ids import IdentifiedDataset

if TYPE_CHECKING:
    from kdcache.stages.ensemble_inputs import Teachers


@dataclass(frozen=True, eq=False)
class Source:
    """A data set with its teacher rows.

    Attributes:
        name: for messages.
        dataset: map-style.
        sample_ids: (N,), None without a cache.
        positions: (n,) int64 positions in the data set that take part.
        cache: of the teacher's rows, None = labels only.
        num_classes: as the data set states it, None where it does not.
        provenance: of the data, for the run record.
        items: the data set with ids and in views; None where neither a cache nor an augmentation needs them.
        views: what is known of the views, for the run record; None for inputs as they are.
        calibration: of the cache's teacher; None for logits as they are.
        labels: which of its labels are learnt; None = all.
        class_names: ordered names of its classes, None where it has none.
        classes: what its classes are to the cache's teacher; None where they are the same.
        teachers: several, of which `cache` is the first one's; None for one.
    """

    name: str
    dataset: Dataset[Any]
    sample_ids: np.ndarray | None
    positions: np.ndarray
    cache: Cache | None
    num_classes: int | None
    provenance: dict[str, Any]
    items: IdentifiedDataset | None = None
    views: dict[str, Any] | None = None
    calibration: StoredCalibration | None = None
    labels: LabelChoice | None = None
    class_names: tuple[str, ...] | None = None
    classes: StoredClassMap | None = None
    teachers: Teachers | None = None

    @property
    def encoding(self) -> Encoding:
        """Of the rows that the losses see; there is a cache."""
        assert self.cache is not None
        return self.cache.encoding if self.teachers is None else self.teachers.ensemble.encoding

    @property
    def teaching(self) -> Teaching | None:
        """What is done to the rows of its cache before a loss sees them."""
        if self.teachers is not None:
            return self.teachers.ensemble
        if self.calibration is None and self.classes is None:
            return None
        calibration = None if self.calibration is None else self.calibration.calibration
        if self.classes is None:
            return OneTeacher(calibration)
        return OneTeacher(calibration, self.classes.classes, restricted=self.classes.novel == NOVEL[0])

    @property
    def taught_classes(self) -> int | None:
        """Number of classes of the rows that the losses see; None without a cache."""
        if self.cache is None:
            return None
        return self.cache.num_classes if self.classes is None else self.classes.classes.num_classes

    @property
    def loaded(self) -> Any:
        """What a DataLoader loads from."""
        return self.dataset if self.items is None else self.items

    @property
    def fingerprint(self) -> str:
        """Identifies the rows for a resumed run: the data's own fingerprint, else its ids, else its length."""
        rows = f"{len(self.positions)} rows" if self.sample_ids is None else f"ids {ids_sha256(self.sample_ids)}"
        return " ".join(filter(None, [self.provenance.get("fingerprint"), rows]))


def open_source(
    data: str | Dataset[Any] | LoadedData,
    cache: str | os.PathLike[str] | Cache | None,
    *,
    missing: str,
    name: str,
    settings: ViewSettings | None = None,
    expect_root: str | None = None,
) -> Source:
    """Loads data by its SPEC (or takes it as it is) and finds its rows in the cache.

    Args:
        data: a SPEC, or a data set.
        cache: of its rows, if any.
        missing: what to do about samples that the cache lacks.
        name: of the data, for messages.
        settings: of the views; None for data that are never augmented.
        expect_root: the root hash that the cache must have.

    Raises:
        CoverageError: the cache lacks samples and `missing` is `error`.
        UsageError: a one-class teacher, or views that cannot be had; see `in_views`.
        MismatchError: another root hash or pipeline than expected, or more views than the cache holds.
        DataError: no rows, no length, or a pipeline that is not replayed.
    """
    loaded = _as_loaded(data, name)
    positions = np.arange(length(loaded.dataset), dtype=np.int64)
    if not len(positions):
        raise DataError(f"the {name} data has no rows; a run needs at least one")
    source = Source(
        name,
        loaded.dataset,
        None,
        positions,
        None,
        loaded.num_classes,
        loaded.provenance,
        class_names=loaded.classes,
    )
    if cache is None:
        return source if settings is None else _with_views(source, loaded.sample_ids, settings)
    opened = _teachable(cache, expect_root)
    ids = resolve(loaded.dataset, sample_ids=loaded.sample_ids)
    first_view = opened.views[0]
    found = opened.rows(ids, first_view) if missing == "error" else opened.find(ids, first_view)
    if missing == "skip":
        positions = np.flatnonzero(found >= 0)
        if not len(positions):
            raise DataError(f"{opened.path.name} holds none of the {len(ids)} samples of the {name} data; none is left")
    if settings is None:
        refuse_views(opened, name=name)
        settings = ViewSettings(None, None, "epoch", None, 0)
    return _with_views(replace(source, sample_ids=ids, positions=positions, cache=opened), ids, settings)


def _as_loaded(data: str | Dataset[Any] | LoadedData, name: str) -> LoadedData:
    loaded = load_data(data) if isinstance(data, str) else data
    if isinstance(loaded, LoadedData):
        return loaded
    classes, rows = getattr(loaded, "num_classes", None), length(loaded)
    return LoadedData(
        loaded,
        name,
        classes if isinstance(classes, int) else None,
        class_names(loaded, name),
        None,
        {"name": name, "rows": rows},
    )


def _teachable(cache: str | os.PathLike[str] | Cache, expect_root: str | None) -> Cache:
    """The open cache, refused where it is not the expected one or a softmax over its classes says nothing."""
    opened = cache if isinstance(cache, Cache) else open_cache(cache, expect_root=expect_root)
    if expect_root is not None and opened.root != expect_root:
        raise MismatchError(f"{opened.path.name} has the root hash {opened.root}, expected {expect_root}")
    if opened.num_classes < 2:
        raise UsageError(
            f"the teacher of {opened.path.name} has one class, and softmax over one class is always 1: the loss would "
            "teach nothing. kdcache.train.binary.binary_kd serves one-logit teachers in a loop of your own"
        )
    return opened


def _with_views(source: Source, sample_ids: np.ndarray | None, settings: ViewSettings) -> Source:
    """The source with its items in views, where a cache or the settings ask for them."""
    if source.cache is None and settings.augment is None and settings.views is None:
        return source
    if source.cache is None:
        sample_ids = resolve(source.dataset, sample_ids=sample_ids)
    assert sample_ids is not None
    items = in_views(source.dataset, sample_ids, source.cache, settings)
    return replace(source, sample_ids=sample_ids, items=items, views=describe_views(items, settings))


def with_calibration(source: Source, held_out: Source | None, options: DistillOptions) -> tuple[Source, Source | None]:
    """Both sources with the calibration that the options name: the validation cache is of the same teacher.

    Raises:
        UsageError: there is no cache, or rows that cannot serve it.
        MismatchError: it is of another cache.
        CorruptCacheError: not what `kdcache calibrate` wrote.
    """
    files = several(options.calibration)
    if not files or source.teachers is not None:
        return source, held_out
    if source.cache is None:
        raise UsageError("--calibration divides the teacher's logits; give --cache, or leave it out")
    if len(files) > 1:
        raise UsageError(f"--calibration is given {len(files)} times, for a single --cache: give the one of that cache")
    found = load_calibration(files[0], source.cache)
    if held_out is not None and held_out.cache is not None:
        check_serves(found.calibration, held_out.cache.encoding)
        held_out = replace(held_out, calibration=found)
    return replace(source, calibration=found), held_out


def build_loader(source: Source, batch_sampler: Any, options: DistillOptions, generator: torch.Generator) -> Any:
    """Collated batches with teacher rows at their end; the rows are gathered in this process.

    Args:
        source: the data set and its cache.
        batch_sampler: yields lists of positions.
        options: workers, missing and check are used.
        generator: seeds the workers; a loader would draw from the global one, and a resumed run differ.
    """
    loader: DataLoader[Any] = DataLoader(
        source.loaded,
        batch_sampler=batch_sampler,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=torch.cuda.is_available() and options.device != "cpu",
        worker_init_fn=shield_worker,
        generator=generator,
    )
    if source.cache is None:
        return loader
    # Rows to skip are not among the positions; the data set still has them.
    missing: Missing = "error" if options.missing == "error" else "ce"
    class_map = None if source.classes is None else source.classes.classes
    return attach(loader, source.cache, missing=missing, check=cast("Check", options.check), class_map=class_map)


def example_batch(source: Source) -> Batch:
    """The first row as a batch of one, in a view where there are views, without its teacher."""
    item = source.loaded[int(source.positions[0])]
    return take_apart(default_collate([item]), has_teacher=False)


def open_student(
    given: nn.Module | None, source: Source, options: DistillOptions, device: torch.device
) -> tuple[nn.Module, int]:
    """The student on its device, in training mode, and its number of classes.

    Its first forward pass happens here, without gradient and in eval mode: lazy layers get their shapes,
    and a student that does not fit data or teacher is refused.

    Raises:
        MismatchError: another number of classes than the cache or the data.
    """
    example = example_batch(source)
    known = source.num_classes if source.cache is None else source.taught_classes
    instead = check_same_classes(source)
    if given is not None:
        student = given
    elif options.student is not None:
        student = load_student(options.student, num_classes=known, example=example.inputs, instead=instead)
    else:
        raise UsageError("no student: give --student, for example mlp:784-128-10 or module:factory")
    student.to(device).eval()
    with torch.no_grad():
        inputs = Batch(example.inputs, None, None).to(device, num_classes=known or 1).inputs
        logits = call_model(student, inputs, what="student")
    if logits.ndim < 2 or not logits.is_floating_point():
        raise UsageError(
            f"for one row the student gives {logits.dtype} of shape {tuple(logits.shape)}; expected logits (1, C, ...)"
        )
    width = logits.shape[1]
    if options.init is not None:
        load_weights(student, Path(options.init))
    if source.classes is not None and width != known:
        raise MismatchError(f"the student has {width} classes, by --classes {source.classes.source} it has {known}")
    if source.cache is not None and width != known:
        advice = instead or (
            f"the teacher of {source.cache.path.name} has {known}: give the student the teacher's classes, in the "
            "teacher's order, or say with --classes which is which"
        )
        raise MismatchError(f"the student has {width} classes, {advice}")
    if known is not None and width < known:
        raise MismatchError(f"the student has {width} classes, the {source.name} data has {known}")
    return student.train(), width


def check_same_classes(source: Source) -> str | None:
    """Refuses data whose labels no class of the teacher stands for, where no map says which is which.

    Returns:
        Where data and teacher have other numbers of classes all the same, what to say of a student that has not the
        teacher's; else None. A teacher may have further classes behind those of the data.

    Raises:
        MismatchError: more classes than the teacher has, or fewer with other names.
    """
    cache, names = source.cache, source.class_names
    count = source.num_classes or (None if names is None else len(names))
    if cache is None or source.classes is not None or count in (None, cache.num_classes):
        return None
    assert count is not None
    by_names = names is not None and cache.classes is not None and {*cache.classes} <= {*names}
    found = (
        f"the {source.name} data has {count} classes, the teacher of {cache.path.name} has {cache.num_classes}: say "
        f"which is which with {'--classes names, or ' if by_names else ''}--classes MAP.json"
    )
    are_others = None not in (names, cache.classes) and not {*(names or ())} <= {*(cache.classes or ())}
    if count > cache.num_classes or are_others:
        raise MismatchError(found)
    return found


def check_signal(source: Source, held_out: Source | None, options: DistillOptions, *, refreshed: bool = False) -> None:
    """Refuses runs that have nothing to learn from or to measure, or would leave out a term without a word.

    Args:
        source: of the training.
        held_out: of the validation.
        options: of the run.
        refreshed: a teacher comes later, and until then labels teach alone.

    Raises:
        UsageError: alpha above 0 or hard targets without a cache, or neither labels nor a teacher.
    """
    if source.cache is None and options.hard_targets:
        raise UsageError("--hard-targets needs the teacher's logits; give --cache")
    if source.cache is not None:
        check_encoding(options, source.encoding, follows=source.teachers is not None)
    if source.cache is None and needs_teacher(options) and not refreshed:
        asked = f"--alpha {options.alpha:g}" if options.alpha else f"--alpha-schedule {options.alpha_schedule}"
        raise UsageError(f"{asked} needs the teacher's logits; give --cache, or --alpha 0 for labels only")
    if source.cache is None and example_batch(source).labels is None:
        raise UsageError("the training data has no labels and there is no cache: there is nothing to learn from")
    if held_out is not None and held_out.cache is None and example_batch(held_out).labels is None:
        raise UsageError("the validation data has no labels: give --val-cache to measure fidelity to the teacher")


def check_held_out(held_out: Source | None, width: int) -> None:
    """Refuses a validation cache that the student's logits cannot be compared with.

    Raises:
        MismatchError: another number of classes.
    """
    if held_out is not None and held_out.cache is not None and held_out.taught_classes != width:
        raise MismatchError(
            f"the student has {width} classes, the teacher of {held_out.cache.path.name} (--val-cache) has "
            f"{held_out.taught_classes}: dump the validation data with the same teacher"
        )
