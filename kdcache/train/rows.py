"""Single teacher rows as items of a data set, and how torch's collate turns them into a batch again.

A joined data set gathers a whole batch at once and then has to hand out single items, since that is what a
DataLoader's collate takes. `TeacherRow` is a place in such a batch. When all rows of one batch come back
together and in order, which is the rule, collating them gives the gathered arrays themselves, without a copy:
stacking 256 rows of 1000 classes would cost as much as the gather.

Importing this module registers both types, once per process, with `default_collate` and with the pickler of
torch's worker queues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, final

import numpy as np
import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from kdcache.errors import MismatchError
from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding
from kdcache.store.rows import TeacherRows

# Tensors up to this size leave a worker through its pipe: pickling 1 kB takes 7 us as bytes and 56 us as shared
# memory (a file, a descriptor passed over a socket), and the receiver has to map that.
PIPE_BYTES = 64 << 10


@final
@dataclass(slots=True, eq=False)  # not frozen: 0.10 instead of 0.25 us to make one, for every item
class TeacherRow:
    """One row of a gathered batch of tensors; `batch` may be shared with the other rows of the same batch."""

    batch: TeacherRows
    position: int

    @property
    def rows(self) -> TeacherRows:
        """This row alone, as TeacherRows with N = 1."""
        return self.batch.take(slice(self.position, self.position + 1))

    @property
    def sample_id(self) -> Any:
        """The id: an integer or bytes."""
        return self.batch.sample_id[self.position].item()

    @property
    def label(self) -> int | None:
        """The label stored in the cache, -1 where the row has none; None where the cache has no labels."""
        return None if self.batch.label is None else int(self.batch.label[self.position])

    @property
    def has_teacher(self) -> bool:
        """False where the cache does not hold this sample (missing="ce")."""
        return bool(self.batch.has_teacher[self.position])

    @property
    def num_classes(self) -> int:
        """C."""
        return self.batch.num_classes

    def dense(self) -> torch.Tensor:
        """(C, ...) float32 raw logits; 0 where there is no teacher."""
        logits: torch.Tensor = self.rows.tensors().dense()[0]
        return logits


def collate_rows(
    batch: Sequence[TeacherRow], *, collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None
) -> TeacherRows:
    """The batch of tensors that single rows make: the gathered one itself where they are all of it, in order.

    Args:
        batch: rows of one cache, or of several with equal row shapes.
        collate_fn_map: given by torch, not used.

    Raises:
        MismatchError: rows of different shapes, or of integer and text ids, cannot be in one batch.
    """
    first = batch[0].batch
    if all(row.batch is first for row in batch):
        positions = [row.position for row in batch]
        if positions == list(range(len(first))):
            return first.tensors()
        return first.take(positions).tensors()
    return concatenate([row.rows.tensors() for row in batch])


def concatenate(parts: Sequence[TeacherRows]) -> TeacherRows:
    """Rows of several batches of tensors one after the other; different float encodings become float32.

    Raises:
        MismatchError: row shapes or kinds of ids differ.
    """
    shapes = {part.encoding.row_shape for part in parts}
    if len(shapes) > 1:
        raise MismatchError(f"one batch mixes teacher rows of shapes {sorted(shapes)}: join caches of one class list")
    kinds = {part.sample_id.dtype.kind for part in parts}
    if len(kinds) > 1:
        raise MismatchError("one batch mixes integer and text sample ids: use one kind of id in all data sets")
    if len({part.encoding for part in parts}) > 1:
        parts = [_as_float32(part) for part in parts]
    first = parts[0]
    labelled = any(part.label is not None for part in parts)
    mixed = any(part.label_b is not None for part in parts)
    digested = all(part.input_digest is not None for part in parts)
    return TeacherRows(
        encoding=first.encoding,
        arrays={name: torch.cat([part.arrays[name] for part in parts]) for name in first.arrays},
        sample_id=np.concatenate([part.sample_id for part in parts]),
        view=torch.cat([part.view for part in parts]),
        label=torch.cat([_labels(part) for part in parts]) if labelled else None,
        has_teacher=torch.cat([part.has_teacher for part in parts]),
        input_digest=np.concatenate([part.input_digest for part in parts]) if digested else None,
        label_b=torch.cat([_partners(part)[0] for part in parts]) if mixed else None,
        mix_ratio=torch.cat([_partners(part)[1] for part in parts]) if mixed else None,
    )


def _as_float32(part: TeacherRows) -> TeacherRows:
    return replace(part, encoding=Dense(part.encoding.row_shape, "float32"), arrays={"logits": part.dense()})


def _labels(part: TeacherRows) -> torch.Tensor:
    return torch.full((len(part),), -1) if part.label is None else part.label


def _partners(part: TeacherRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Second labels and shares; rows that are not mixed are all their own."""
    if part.label_b is None or part.mix_ratio is None:
        return torch.full((len(part),), -1), torch.ones(len(part))
    return part.label_b, part.mix_ratio


def _through_pipe(value: Any) -> Any:
    small = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.nbytes <= PIPE_BYTES
    return value.numpy() if small else value


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _send(rows: TeacherRows) -> tuple[Callable[..., TeacherRows], tuple[Any, ...]]:
    """How a worker's queue pickles rows of tensors: large tensors in shared memory, small ones as bytes."""
    tensors = not isinstance(rows.view, np.ndarray)
    convert = _through_pipe if tensors else lambda value: value
    arrays = {name: convert(array) for name, array in rows.arrays.items()}
    parts = tuple(convert(part) for part in (rows.view, rows.label, rows.has_teacher, rows.label_b, rows.mix_ratio))
    return _receive, (tensors, rows.encoding, arrays, rows.sample_id, parts, rows.input_digest)


def _receive(
    tensors: bool,
    encoding: Encoding,
    arrays: dict[str, Any],
    sample_id: np.ndarray,
    parts: tuple[Any, ...],
    input_digest: np.ndarray | None,
) -> TeacherRows:
    if tensors:
        arrays = {name: _as_tensor(array) for name, array in arrays.items()}
        parts = tuple(_as_tensor(part) for part in parts)
    view, label, has_teacher, label_b, mix_ratio = parts
    return TeacherRows(encoding, arrays, sample_id, view, label, has_teacher, input_digest, label_b, mix_ratio)


default_collate_fn_map[TeacherRow] = collate_rows
ForkingPickler.register(TeacherRows, _send)
