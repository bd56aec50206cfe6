"""The options `--classes` and `--novel` of `distill`: the map of a source, and what it does not go together with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdcache.errors import MismatchError, UsageError
from kdcache.format.identity import show_id
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import TopK
from kdcache.stages.choices import NOVEL
from kdcache.stages.class_map_file import StoredClassMap, load_class_map
from kdcache.stages.distill_inputs import Source
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.label_fraction import labels_at_hand
from kdcache.stages.loss_options import loss_settings, needs_teacher
from kdcache.store.cache import Cache
from kdcache.train.class_map import MEAN_REFUSED, ClassMap

_FORWARD = ("kl", "soft_ce")  # a class of teacher mass 0 is infinitely far from any student in the others
_BLOCK_ROWS = 4096


def with_classes(source: Source, held_out: Source | None, options: DistillOptions) -> tuple[Source, Source | None]:
    """Both sources with the map that the options name: the validation cache is of the same teacher.

    Raises:
        UsageError: there is no cache, a map that cannot be meant, or a loss or encoding that it cannot serve.
        MismatchError: it does not fit teacher or data; `topk` rows that lack what it merges or drops; without a map,
            classes of the same names in another order.
    """
    if options.classes is None:
        for each in (source, held_out):
            _check_order(each)
    if options.classes is None or source.teachers is not None:  # which have a map each
        return source, held_out
    if source.cache is None:
        raise UsageError("--classes says which class of the student each class of the teacher is; give --cache")
    found = load_class_map(
        options.classes,
        novel=options.novel or NOVEL[0],
        teacher=source.cache.classes,
        teacher_count=source.cache.num_classes,
        student=source.class_names,
        cache_name=source.cache.path.name,
    )
    check_labels(found, source)
    _check_served(found, source.cache, options)
    held_out = _held_out_with(found, held_out, source.cache)
    return replace(source, classes=found), held_out


def check_labels(found: StoredClassMap, source: Source) -> None:
    """Refuses labels that are none of the map's classes of the student; names, where data have them, were compared.

    Raises:
        MismatchError: the label, as far as labels can be had without a pass over the data.
    """
    if source.class_names is not None:
        return
    labels = labels_at_hand(source.dataset)
    if len(labels) and labels.max() >= len(found.student):
        raise MismatchError(
            f"{found.source}: `student` has {len(found.student)} classes, and the {source.name} data has the label "
            f"{labels.max()}: write all classes of the data, in the order of their numbers"
        )


def _check_order(source: Source | None) -> None:
    """Refuses names that stand under other numbers: of rows without labels nothing else would tell.

    Names that only one side has say nothing: `cat` may be `tabby` here.
    """
    if source is None or source.cache is None or source.cache.classes is None or source.class_names is None:
        return
    theirs, mine = source.cache.classes, source.class_names
    known = {*theirs}
    moved = next((n for n, name in enumerate(mine) if name in known and theirs[n : n + 1] != (name,)), None)
    if moved is not None:
        raise MismatchError(
            f"{source.cache.path.name} has the class {mine[moved]!r:.80} under the number {theirs.index(mine[moved])}, "
            f"the {source.name} data under {moved}: match them by name with --classes names, or give a map"
        )


def _held_out_with(found: StoredClassMap, held_out: Source | None, cache: Cache) -> Source | None:
    if held_out is None:
        return None
    if held_out.class_names is not None and held_out.class_names != found.student:
        raise MismatchError(
            "the validation data has other classes, or the same in another order, than the training data by --classes"
        )
    if held_out.cache is None:
        return held_out
    own = held_out.cache
    if own.num_classes != cache.num_classes or (
        None not in (own.classes, cache.classes) and own.classes != cache.classes
    ):
        raise MismatchError(
            f"{own.path.name} (--val-cache) has other classes than {cache.path.name}: dump the validation data with "
            "the same teacher, whose classes --classes maps"
        )
    check_rows(found.classes, own)
    return replace(held_out, classes=found)


def _check_served(found: StoredClassMap, cache: Cache, options: DistillOptions) -> None:
    classes, encoding = found.classes, cache.encoding
    if isinstance(encoding, SoftTargets):
        raise UsageError(f"--classes: {MEAN_REFUSED}")
    is_topk = isinstance(encoding, TopK) and not encoding.has_all_logits
    if classes.novel and len(encoding.row_shape) > 1:
        raise UsageError(
            f"--classes: {len(classes.novel)} classes are novel, and in dense prediction a row has many labels: the "
            "teacher must know all classes of the student"
        )
    names = (
        []
        if options.hard_targets or not needs_teacher(options)
        else [part.loss.name for part in loss_settings(options).losses]
    )
    if classes.novel and found.novel == "bucket":
        if is_topk:
            raise UsageError(
                "--novel bucket needs the logits of all classes: in topk rows the novel ones would share one number "
                "with those not kept; use --novel restricted, or a cache with all logits"
            )
        others = [name for name in names if name not in _FORWARD]
        if others:
            raise UsageError(
                f"--novel bucket gives novel classes the teacher mass 0, from which {others[0]} is infinite or not "
                f"defined; it goes with {' and '.join(_FORWARD)}. Use --novel restricted"
            )
    if is_topk and classes.single and "standardized_kd" in names:
        raise UsageError(
            "standardized_kd divides by the standard deviation of all logits, which topk rows do not have for merged "
            "or dropped classes; use a cache with all logits"
        )
    check_rows(classes, cache)


def novel_record(source: Source, rows: Sequence[int]) -> dict[str, Any]:
    """For the run record: how many rows of each epoch learnt their label alone, since the teacher does not know it."""
    if source.classes is None or not source.classes.classes.novel:
        return {}
    return {"novel_rows": list(rows)}


def check_rows(classes: ClassMap, cache: Cache) -> None:
    """Looks for `topk` rows that do not keep what the map merges or drops, before the first step.

    Raises:
        MismatchError: how many there are, and the first.
    """
    encoding = cache.encoding
    if not classes.single or not isinstance(encoding, TopK) or encoding.has_all_logits:
        return
    lacking, first = 0, None
    for start in range(0, len(cache), _BLOCK_ROWS):
        rows = cache.gather(np.arange(start, min(start + _BLOCK_ROWS, len(cache))))
        wrong = np.flatnonzero(classes.lacks(rows))
        lacking += len(wrong)
        if len(wrong) and first is None:
            first = show_id(rows.sample_id[wrong[0]])
    if lacking:
        raise MismatchError(
            f"--classes merges or drops {len(classes.single)} classes of the teacher, and {lacking} of the "
            f"{len(cache)} rows of {cache.path.name} (the first of sample {first}) do not have all of them among "
            f"their {encoding.k} largest: the others are one number, in which no class can be told from another. Use a "
            "cache with all logits (--dtype float16), or with a larger --top-k"
        )
