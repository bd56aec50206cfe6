"""`--label-fraction`: which training rows keep their label, and what becomes of the others.

The choice is a function of the labels, a seed and the position in the data alone: all settings of a sweep train on the
same labels. It is balanced, the same share of each class and at least one row, and nested: each class has an order, of
which a larger fraction takes more, so that the 1 % are part of the 5 %. With 1,000 classes of 5 rows, 1 % is therefore
20 %: no class goes without.

`keep` hides a label where a batch is taken apart, after it was compared with the cache's: the guards see all labels,
and calibrations, policies, losses and metrics none of the hidden ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from kdcache.errors import DataError, UsageError
from kdcache.stages.batches import Batch
from kdcache.stages.loaded_data import NO_LABEL
from kdcache.stages.loss_options import needs_teacher
from kdcache.train.checks import label_array
from kdcache.train.items import label_of, load_items
from kdcache.train.kept import without_labels

if TYPE_CHECKING:
    from kdcache.stages.distill_inputs import Source
    from kdcache.stages.distill_options import DistillOptions

_BLOCK = 1024
_PROBES = 16


@final
@dataclass(frozen=True, eq=False)
class LabelChoice:
    """Which labels of a data set are learnt.

    Attributes:
        fraction: that was asked for.
        seed: of the choice.
        unlabelled: keep or drop, for the other rows.
        hidden: (N,) bool over all positions of the data set, rows whose label is not to be seen; None = none.
        labelled: rows that keep theirs.
        others: rows that take part and have none, or not any more; 0 with `drop`.
    """

    fraction: float
    seed: int
    unlabelled: str
    hidden: np.ndarray | None
    labelled: int
    others: int

    def hide(self, batch: Batch, positions: np.ndarray) -> Batch:
        """The batch without the labels that are not to be seen, neither its own nor those of its teacher's rows.

        Args:
            batch: taken apart, as the loader gives it.
            positions: (n,) of its rows in the data set.
        """
        if self.hidden is None or batch.labels is None:
            return batch
        assert isinstance(batch.labels, torch.Tensor)  # mixed views are refused
        hidden = torch.from_numpy(self.hidden[positions])
        teacher = batch.teacher
        if teacher is not None:
            teacher = without_labels(teacher, hidden.to(teacher.has_teacher.device))
        labels = batch.labels.masked_fill(hidden.to(batch.labels.device), NO_LABEL)
        return replace(batch, labels=labels, teacher=teacher)

    @property
    def note(self) -> str:
        """Said at the start of a run."""
        rest = "other rows are left out"
        if self.unlabelled == "keep":
            rest = f"{self.others:,} rows learn from the teacher alone"
        return f"labels of {self.labelled:,} rows (fraction {self.fraction:g}, seed {self.seed}); {rest}"

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "fraction": self.fraction,
            "seed": self.seed,
            "unlabelled": self.unlabelled,
            "labelled_rows": self.labelled,
            "other_rows": self.others,
        }


def with_label_fraction(source: Source, options: DistillOptions) -> Source:
    """The source with the labels that the options leave it; rows without one are taken out with `drop`.

    Raises:
        UsageError: `keep` without a cache, mixed views, or data without labels.
        DataError: labels that are not one integer a sample.
    """
    if options.label_fraction is None:
        return source
    unlabelled = options.unlabelled or ("keep" if _learns_from_teacher(source, options) else "drop")
    if unlabelled == "keep" and source.cache is None:
        raise UsageError("--unlabelled keep: without a cache there is nothing to learn of such rows; give --cache")
    if options.label_fraction < 1:
        _refuse_mixed(source)
    seed = options.label_seed or 0
    labels = labels_of(source.dataset, name=source.name)
    if labels is None:
        if options.label_fraction < 1:
            raise DataError(
                f"--label-fraction: the {source.name} data has labels of several positions a sample (dense "
                "prediction), and a fraction is chosen by one integer label a sample; leave it out"
            )
        return replace(
            source, labels=LabelChoice(options.label_fraction, seed, unlabelled, None, len(source.positions), 0)
        )
    chosen = choose_labelled(labels, source.positions, fraction=options.label_fraction, seed=seed)
    if not len(chosen):
        raise UsageError(f"--label-fraction: none of the {len(source.positions)} {source.name} rows has a label")
    if unlabelled == "drop":
        choice = LabelChoice(options.label_fraction, seed, unlabelled, None, len(chosen), 0)
        return replace(source, positions=chosen, labels=choice)
    hidden = np.ones(len(labels), bool)
    hidden[chosen] = False
    others = len(source.positions) - len(chosen)
    return replace(source, labels=LabelChoice(options.label_fraction, seed, unlabelled, hidden, len(chosen), others))


def choose_labelled(labels: np.ndarray, positions: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """The positions that keep their label: of a class with n rows the first max(1, round(fraction * n)) of its order.

    Args:
        labels: (N,) int64 of all positions, -1 = none.
        positions: (n,) ascending positions that take part.
        fraction: above 0 to 1.
        seed: of the order.

    Returns:
        (k,) ascending positions.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, -1])
    >>> len(choose_labelled(labels, np.arange(7), fraction=0.5, seed=0))
    3
    """
    # Raw numbers of PCG64 are a promise of NumPy's, as in the order of rows; a stream of its own.
    rank = np.random.PCG64((seed, 0x1ABE1)).random_raw(len(labels))
    candidates = positions[labels[positions] != NO_LABEL]
    ordered = candidates[np.lexsort((rank[candidates], labels[candidates]))]
    _, starts, counts = np.unique(labels[ordered], return_index=True, return_counts=True)
    kept = np.maximum(1, np.rint(fraction * counts)).astype(np.int64)
    within = np.arange(len(ordered)) - np.repeat(starts, counts)
    chosen: np.ndarray = np.sort(ordered[within < np.repeat(kept, counts)])
    return chosen


def labels_of(dataset: Any, *, name: str) -> np.ndarray | None:
    """(N,) int64 labels of all items, -1 = none; None where an item has labels for several positions.

    From the array `labels` or `targets` of the data set where it agrees with some of its items, otherwise from every
    item: a data set that decodes images pays for an epoch of that.

    Raises:
        UsageError: the items have no labels.
        DataError: labels that are not integers.
    """
    rows, probes = len(dataset), _probes(dataset)
    found = _item_labels(dataset, probes, name=name)
    if found is None:
        return None
    column = _column(dataset, probes, found)
    if column is not None:
        return column
    every = [_item_labels(dataset, list(range(at, min(at + _BLOCK, rows))), name=name) for at in range(0, rows, _BLOCK)]
    parts = [part for part in every if part is not None]
    return np.concatenate(parts) if len(parts) == len(every) else None


def labels_at_hand(dataset: Any) -> np.ndarray:
    """(n,) int64 labels that cost no pass over the data: its array of them, else those of a few items; may be empty."""
    probes = _probes(dataset)
    found = label_array([label_of(item) for item in load_items(dataset, probes)])
    if found is None:
        return np.empty(0, np.int64)
    column = _column(dataset, probes, found)
    return found.astype(np.int64) if column is None else column


def _probes(dataset: Any) -> list[int]:
    found: list[int] = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _PROBES)).astype(np.int64)).tolist()
    return found


def _column(dataset: Any, probes: list[int], found: np.ndarray) -> np.ndarray | None:
    """The data set's own array of labels, where it has one that agrees with the labels of some items."""
    arrays = [getattr(dataset, "labels", None), getattr(dataset, "targets", None)]
    tensors = getattr(dataset, "tensors", None)  # of a TensorDataset
    for array in (*arrays, *(tensors[1:2] if isinstance(tensors, tuple) else ())):
        column = label_array(array)
        if column is not None and len(column) == len(dataset) and np.array_equal(column[probes], found):
            return column.astype(np.int64)
    return None


def _item_labels(dataset: Any, indices: list[int], *, name: str) -> np.ndarray | None:
    found = [label_of(item) for item in load_items(dataset, indices)]
    if any(label is None for label in found):
        raise UsageError(f"--label-fraction chooses among labels, and the {name} data has none; leave it out")
    labels = label_array(found)
    if labels is not None:
        return labels.astype(np.int64)
    if all(isinstance(label, (torch.Tensor, np.ndarray)) and label.ndim > 0 for label in found):
        return None
    raise DataError(
        f"--label-fraction: the {name} data has labels of type {type(found[0]).__name__}; expected integers (-1: none)"
    )


def _learns_from_teacher(source: Source, options: DistillOptions) -> bool:
    return source.cache is not None and (needs_teacher(options) or options.hard_targets)


def _refuse_mixed(source: Source) -> None:
    replay = None if source.items is None else source.items.replay
    is_mixed = source.cache is not None and source.cache.catalog.schema.is_mixed
    if is_mixed or (replay is not None and replay.mix is not None):
        raise UsageError(
            "--label-fraction: the views are mixed (MixUp, CutMix), a row has the labels of two samples, and hiding "
            "one would leave half a label; use views that are not mixed"
        )
