"""Does a cached row belong to the item beside it? Labels on every batch, input digests on a part of them.

The digest of an input is a hash of its bytes (14 us for 3 x 32 x 32 float32, 0.5 ms for 3 x 224 x 224), too
much for every item of every epoch: `sample` compares the first 256 items that a data set object serves (in a
worker: its copy) and then the same 1 in 64 of the samples in every epoch, chosen by a hash of the id. A wrong
order, file or transform shows at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from kdcache.errors import MismatchError, UsageError
from kdcache.format.identity import input_digest, show_id
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.diagnosis import mismatch

Check: TypeAlias = Literal["ids", "sample", "full"]

FIRST_ITEMS = 256
ONE_IN = 64
_SHOWN = 4
_SAMPLE_NOTE = (
    f"the first {FIRST_ITEMS} of each process, then 1 in {ONE_IN}: a fault in 1 % of the samples is found with 92 % in "
    f"the first {FIRST_ITEMS}"
)


class InputCheck:
    """Chooses which inputs to compare with the digests in a cache, and compares them.

    Args:
        cache: what the rows come from.
        level: "ids" compares no inputs, "sample" some, "full" all.

    Attributes:
        note: what is compared, in words, with the reason where inputs cannot be.
        active: whether inputs are compared at all.

    Raises:
        UsageError: another level.
    """

    def __init__(self, cache: Cache, level: Check) -> None:
        if level not in ("ids", "sample", "full"):
            raise UsageError(f"check must be ids, sample or full, found {level!r}")
        self.level = level
        reason = reason_against_inputs(cache)
        base = "ids and labels" if cache.has_labels else "ids (the cache holds no labels)"
        self.active = level != "ids" and reason is None
        if self.active:
            scope = "all" if level == "full" else _SAMPLE_NOTE
            self.note = f"{base}, inputs ({scope})"
        else:
            self.note = base if level == "ids" else f"{base}; no inputs: {reason}"
        self._cache = cache
        self._left_of_first = FIRST_ITEMS
        self._agreed = 0

    def choose(self, sample_ids: np.ndarray) -> np.ndarray:
        """Positions in a batch (n,) whose inputs are to be compared; counts the batch as served."""
        if not self.active:
            return np.empty(0, np.int64)
        if self.level == "full":
            return np.arange(len(sample_ids))
        chosen = in_sample(sample_ids)
        if self._left_of_first > 0:
            chosen[: self._left_of_first] = True
            self._left_of_first -= len(sample_ids)
        return np.flatnonzero(chosen)

    def compare(
        self,
        positions: np.ndarray,
        input_at: Callable[[int], Any],
        stored: TeacherRows,
        *,
        labels_agree: bool = False,
    ) -> None:
        """Compares inputs with stored digests; rows without a teacher are left out.

        Args:
            positions: (n,) positions in the batch.
            input_at: gives the first input at a position, as the data set returned it.
            stored: the batch's rows (N,).
            labels_agree: whether the batch's labels were compared with the stored ones.

        Raises:
            MismatchError: naming a sample and view whose input differs, the likely cause and what to do.
        """
        assert stored.input_digest is not None
        compared = positions[np.asarray(stored.has_teacher)[positions]]
        if not len(compared):
            return
        # All of them before anything is said: whether all differ or a few tells one cause from another.
        found = np.array([input_digest(input_at(position)) for position in compared.tolist()], np.uint64)
        if (found == stored.input_digest[compared]).all():
            self._agreed += len(compared)
            return
        raise MismatchError(
            mismatch(
                self._cache,
                stored.take(compared),
                found,
                agreed_before=self._agreed,
                labels_agree=True if labels_agree and stored.label is not None else None,
            )
        )


def detection_probability(rows_compared: int, fault_share: float) -> float:
    """How likely a fault is found that changes a share of the inputs, when some, chosen at random, are compared.

    1 - (1 - share)**rows: the power of the level `sample`. A fault that changes all inputs is found by the first.

    Args:
        rows_compared: distinct samples.
        fault_share: in [0, 1].

    Raises:
        UsageError: a share outside [0, 1], or fewer than no rows.

    >>> round(detection_probability(256, 0.01), 3)
    0.924
    """
    if not 0 <= fault_share <= 1 or rows_compared < 0:
        raise UsageError(f"fault_share must be in [0, 1] and rows_compared at least 0: {fault_share}, {rows_compared}")
    return float(1 - (1 - fault_share) ** rows_compared)


def check_labels(labels: Any, stored: TeacherRows, cache_name: str, *, own: Any = None) -> None:
    """Compares the items' labels with the cache's, where both have one (-1 is none).

    Args:
        labels: of the batch: (N,) integers, or N of them; anything else (masks, floats, None) is not compared.
        stored: the batch's rows (N,), NumPy or tensors.
        cache_name: for the message.
        own: (N,) labels as the cache has them, where those of `stored` are mapped to other classes.

    Raises:
        MismatchError: naming the first samples that differ, both labels of each, and what to do.
    """
    found = label_array(labels)
    if found is None or stored.label is None or len(found) != len(stored):
        return
    expected = np.asarray(stored.label)
    differs = (found != expected) & (found != -1) & (expected != -1)
    if differs.any():
        first, *others = np.flatnonzero(differs)[:_SHOWN].tolist()
        number = "" if own is None else f" ({np.asarray(own)[first]} there, before the class map)"
        more = "".join(f", sample {show_id(stored.sample_id[at])}: {found[at]} and {expected[at]}" for at in others)
        raise MismatchError(
            f"sample {show_id(stored.sample_id[first])} has the label {found[first]} in the data set and "
            f"{expected[first]} in {cache_name}{number}; {np.count_nonzero(differs)} of the {len(found)} labels of "
            f"this batch differ{more}. Where few do, labels were corrected since the dump: `kdcache convert "
            f"{cache_name} NEW --labels FILE.csv` makes a cache with the labels of FILE.csv (columns sample_id and "
            "label). Where many do, the ids point to other samples than in the dump, or the classes are numbered in "
            "another order: check sample_ids and the class list"
        )


def label_array(labels: Any) -> np.ndarray | None:
    """(N,) integer labels of a batch, from a tensor, an array or a list of scalars; None where they are not that."""
    if isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)) and len(labels):
        if all(isinstance(label, torch.Tensor) and label.ndim == 0 for label in labels):
            labels = torch.stack(list(labels))
        elif all(isinstance(label, (int, np.integer)) and not isinstance(label, bool) for label in labels):
            labels = np.asarray(labels)
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu().numpy() if labels.dtype != torch.bfloat16 else None
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
        return labels
    return None


def in_sample(sample_ids: np.ndarray) -> np.ndarray:
    """Which ids belong to the 1 in 64 that are compared: (N,) bool, the same on every machine and in every epoch."""
    if sample_ids.dtype.kind == "S":
        return np.array([zlib.crc32(value) % ONE_IN == 0 for value in sample_ids.tolist()], bool)
    # The finaliser of splitmix64: ids that count up must not be picked at regular places.
    mixed = sample_ids.astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    chosen: np.ndarray = (mixed >> np.uint64(31)) % np.uint64(ONE_IN) == 0
    return chosen


def reason_against_inputs(cache: Cache) -> str | None:
    """Why inputs cannot be compared, or None."""
    if not cache.has_digests:
        return "the cache holds no input digests"
    data = cache.provenance.get("data")
    point = data.get("digest_point") if isinstance(data, dict) else None
    # Where the provenance has a pipeline, the student's inputs are its views too: join and attach see to that.
    if point != ("item" if cache.provenance.get("views") is None else "view"):
        return f"the dump took its digests at another point ({point or 'not stated'}) than the data set's items"
    return None
