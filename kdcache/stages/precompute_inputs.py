"""What a dump is made from: the data set, the teacher and the target, given as objects or as SPECs in the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.errors import UsageError
from kdcache.stages.data import LoadedData, load_data
from kdcache.stages.loaded_data import data_provenance
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.teachers import LoadedTeacher, load_teacher
from kdcache.stages.weights import state_sha256
from kdcache.train.ids import length


def target_of(out: str | Path | None, options: PrecomputeOptions) -> Path:
    """The path of the cache.

    Raises:
        UsageError: none was given.
    """
    path = out if out is not None else options.out
    if path is None:
        raise UsageError("--out is needed: a folder for the cache, or a name ending in .h5 for one file")
    return Path(path)


def data_of(dataset: Any, options: PrecomputeOptions) -> LoadedData:
    """The data set with what is known about it.

    Raises:
        UsageError, DataError: as in `load_data`; nothing was given; no length.
    """
    if isinstance(dataset, LoadedData):
        return dataset
    if dataset is None:
        if options.data is None:
            raise UsageError(
                "--data is needed: digits:train, npz:FILE, idx:FOLDER:train, folder:PATH or module:factory"
            )
        return load_data(options.data)
    name = type(dataset).__name__
    classes = getattr(dataset, "classes", None)
    names = tuple(classes) if isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes) else None
    facts = data_provenance(
        name=name, rows=length(dataset), id_scheme=None, sample_ids=None, inputs=None, classes=names
    )
    return LoadedData(dataset, name, len(names) if names else None, names, None, facts)


@contextmanager
def teacher_of(
    model: nn.Module | LoadedTeacher | None, transform: Callable[[Any], Any] | None, options: PrecomputeOptions
) -> Iterator[LoadedTeacher]:
    """The teacher in eval mode; a module of the caller's gets its modes back, lest its training go on without dropout.

    Raises:
        UsageError, MismatchError, DataError, KDCacheError: as in `load_teacher`; nothing was given.
    """
    if isinstance(model, LoadedTeacher):
        yield model
    elif model is None:
        if options.teacher is None:
            raise UsageError("--teacher is needed: module:factory or pt2:FILE")
        yield load_teacher(options.teacher, weights=options.weights)
    else:
        modes = [(module, module.training) for module in model.modules()]
        facts = {
            "spec": type(model).__qualname__,
            "state_sha256": state_sha256(model),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        try:
            yield LoadedTeacher(model.eval(), transform, facts)
        finally:
            for module, training in modes:
                module.training = training
