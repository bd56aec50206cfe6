"""Teacher rows in memory: the arrays of one batch, as stored, with the identity of each row.

One type serves NumPy and torch, since reading must not need torch and every loss takes rows. torch is
imported only by the methods that make tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """N rows of a cache.

    Attributes:
        encoding: what the arrays mean.
        arrays: by name, as stored; `logits` (N, C, ...) and, for float16, `row_max` (N, ...). All NumPy or
            all tensors.
        sample_id: (N,) int64 or fixed-length bytes, always NumPy.
        view: (N,) uint16 (int64 as a tensor).
        label: (N,) int64, -1 where a row has none; None where the cache has no labels.
        has_teacher: (N,) bool; False for a sample that the cache does not hold.
        input_digest: (N,) uint64, always NumPy; None where the dump took none.
        label_b: (N,) int64, the second label of mixed views (MixUp, CutMix), -1 where it has none; None where
            nothing was mixed.
        mix_ratio: (N,) float32, the share of the first; None with `label_b`.
    """

    encoding: Encoding
    arrays: dict[str, Any]
    sample_id: np.ndarray
    view: Any
    label: Any | None
    has_teacher: Any
    input_digest: np.ndarray | None = None
    label_b: Any | None = None
    mix_ratio: Any | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.encoding.num_classes

    def dense(self) -> Any:
        """(N, C, ...) float32 raw logits, NumPy or a tensor like the arrays; 0 where there is no teacher.

        raw logit = logits + row_max for float16, logits for float32.
        """
        return self.encoding.decode(self.arrays)

    def take(self, index: Any) -> TeacherRows:
        """The rows at an index: a slice, or an array of positions."""

        def pick(value: Any) -> Any:
            return None if value is None else value[index]

        positions = np.asarray(index) if not isinstance(index, slice) else index
        return replace(
            self,
            arrays={n: a[index] for n, a in self.arrays.items()},
            sample_id=self.sample_id[positions],
            view=pick(self.view),
            label=pick(self.label),
            has_teacher=pick(self.has_teacher),
            label_b=pick(self.label_b),
            mix_ratio=pick(self.mix_ratio),
            input_digest=None if self.input_digest is None else self.input_digest[positions],
        )

    def tensors(self) -> TeacherRows:
        """The same rows as torch tensors on the CPU; memory is shared, not copied."""
        if not isinstance(self.view, np.ndarray):
            return self
        import torch

        def convert(value: np.ndarray) -> Any:
            return torch.from_numpy(value if value.flags.writeable else value.copy())

        return replace(
            self,
            arrays={n: convert(a) for n, a in self.arrays.items()},
            view=convert(self.view.astype(np.int64)),
            label=None if self.label is None else convert(self.label),
            has_teacher=convert(self.has_teacher),
            label_b=None if self.label_b is None else convert(self.label_b),
            mix_ratio=None if self.mix_ratio is None else convert(self.mix_ratio),
        )

    def to(self, device: Any, *, non_blocking: bool = False) -> TeacherRows:
        """The rows as tensors on a device; ids and digests stay NumPy."""
        return self.tensors()._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TeacherRows:
        """The rows as tensors in page-locked memory, so that `to(..., non_blocking=True)` overlaps."""
        return self.tensors()._each(lambda t: t.pin_memory())

    def _each(self, function: Callable[[Any], Any]) -> TeacherRows:
        return replace(
            self,
            arrays={n: function(a) for n, a in self.arrays.items()},
            view=function(self.view),
            label=None if self.label is None else function(self.label),
            has_teacher=function(self.has_teacher),
            label_b=None if self.label_b is None else function(self.label_b),
            mix_ratio=None if self.mix_ratio is None else function(self.mix_ratio),
        )

    @staticmethod
    def from_dense(logits: Any, *, sample_id: Any = None, label: Any = None) -> TeacherRows:
        """Rows made from raw logits in memory, kept in float32: for a live teacher or a test.

        Args:
            logits: (N, C, ...) NumPy or tensor.
            sample_id: (N,) ids; 0..N-1 if not given.
            label: (N,) int64 or None.
        """
        count = len(logits)
        ids = np.arange(count) if sample_id is None else np.asarray(sample_id)
        if isinstance(logits, np.ndarray):
            exact: Any = logits.astype(np.float32, copy=False)
            view: Any = np.zeros(count, np.uint16)
            has: Any = np.ones(count, bool)
        else:
            exact = logits.float()
            view = logits.new_zeros(count).long()
            has = view == 0
        encoding = Dense(tuple(int(n) for n in logits.shape[1:]), "float32")
        return TeacherRows(encoding, {"logits": exact}, ids, view, label, has)
