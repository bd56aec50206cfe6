"""A data set of arrays in memory or mapped from a file: converts a row when it is asked for.

Inputs stay as they are stored (uint8 images take a quarter of float32, mapped ones nothing) and become float32 a
batch at a time: `__getitems__` gathers and scales a batch in one NumPy call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.errors import DataError

Item = tuple[Tensor, "int | Tensor"]


class ArrayDataset(Dataset[Item]):
    """Items `(x, label)` from row-aligned arrays.

    Args:
        inputs: (N, ...) numbers. Floats become float32; integers are divided by `divisor` where one is given
            (float32), and are int64 otherwise.
        labels: (N,) int64, items carry an int; or (N, ...) int64, items carry a tensor (...).
        sample_ids: (N,) int64 or bytes.
        classes: ordered names, None where unknown.
        divisor: the value that becomes 1.0.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        labels: np.ndarray,
        sample_ids: np.ndarray,
        *,
        classes: Sequence[str] | None = None,
        divisor: int | None = None,
    ) -> None:
        self.inputs = inputs
        self.labels = labels
        self.sample_ids = sample_ids
        self.classes = None if classes is None else tuple(classes)
        self._divisor = divisor
        self._dtype = np.float32 if divisor or inputs.dtype.kind == "f" else np.int64

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Item:
        return self._tensor(self.inputs[index]), self._label(index)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch; their tensors are views of one (N, ...) tensor."""
        batch = self._tensor(self.inputs[np.asarray(indices, dtype=np.int64)])
        return [(x, self._label(index)) for x, index in zip(batch, indices, strict=True)]

    def _tensor(self, values: np.ndarray) -> Tensor:
        copied = np.array(values, dtype=self._dtype, order="C")
        if self._divisor is not None:
            np.divide(copied, np.float32(self._divisor), out=copied)
        return torch.from_numpy(copied)

    def _label(self, index: int) -> int | Tensor:
        label = self.labels[index]
        return int(label) if self.labels.ndim == 1 else torch.from_numpy(np.array(label))


def input_rule(dtype: np.dtype[np.generic], *, name: str) -> tuple[int | None, str]:
    """How stored inputs become model inputs: the divisor for `ArrayDataset`, and the rule in words.

    Raises:
        DataError: an element type that is no input.
    """
    if dtype == np.uint8:
        return 255, "uint8 / 255 -> float32"
    if dtype.kind == "f":
        return None, f"{dtype.name} -> float32"
    if dtype.kind in "iu":
        return None, f"{dtype.name} -> int64"
    raise DataError(f"{name}: inputs of {dtype}; expected uint8, another integer type or floats")
