"""A teacher whose logits are calibrated: z / temperature * scale + bias, applied to rows of any encoding.

The logits on disk never change. Rows with all logits become float32 rows of the new logits. `topk` rows stay `topk`:
what they hold of z / c at a temperature T is what they held of z at T * c, so that dividing the kept logits and the
temperatures by c gives exactly the rows that the divided logits would have. A loss sees no difference to a cache of
calibrated logits, and its own temperature, whose square is its factor, stays what it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import LARGEST_TEMPERATURE, LEAST_TEMPERATURE, TopK
from kdcache.store.rows import TeacherRows

_LOGITS = ("topk_logits", "label_logits", "row_max", "tail_mean", "logit_std")


@final
@dataclass(frozen=True)
class Calibration:
    """What is done to a teacher's logits before alpha and the run's temperature: z / temperature * scale + bias.

    Attributes:
        temperature: above 0; above 1 makes an over-confident teacher less so.
        scale: one factor a class (C,), or None for 1.
        bias: one summand a class (C,), in logits, or None for 0.
    """

    temperature: float
    scale: tuple[float, ...] | None = None
    bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"a calibration's temperature is {self.temperature}, expected a finite number above 0")
        for name, values in (("scale", self.scale), ("bias", self.bias)):
            if values is not None and not all(map(math.isfinite, values)):
                raise UsageError(f"a calibration's {name} is not finite")

    @property
    def is_temperature(self) -> bool:
        """Whether a temperature is all there is."""
        return self.scale is None and self.bias is None

    def logits(self, logits: Tensor) -> Tensor:
        """z / temperature * scale + bias.

        Args:
            logits: (N, C, ...) floats; -inf is a masked class and stays.

        Returns:
            (N, C, ...) of the same type.

        Raises:
            MismatchError: another number of classes.
        """
        divided = logits / self.temperature
        if self.is_temperature:
            return divided
        found = divided
        for values, combine in ((self.scale, torch.mul), (self.bias, torch.add)):
            if values is None:
                continue
            if len(values) != logits.shape[1]:
                raise MismatchError(f"the calibration is of {len(values)} classes, these rows have {logits.shape[1]}")
            found = combine(found, _column(values, found.dtype, found.device, found.ndim))
        return torch.where(torch.isneginf(logits), logits, found)  # a negative scale would turn it into +inf

    def rows(self, rows: TeacherRows) -> TeacherRows:
        """The rows that a teacher with calibrated logits would have, as tensors.

        Args:
            rows: N rows of any encoding.

        Returns:
            N rows: `dense` float32, or `topk` where not all logits are held. Ids, labels and `has_teacher` stay.

        Raises:
            UsageError: `topk` rows and more than a temperature, or none of whose temperatures stays in range.
            MismatchError: another number of classes.
        """
        given = rows.tensors()
        if isinstance(given.encoding, TopK) and not given.encoding.has_all_logits:
            return self._topk_rows(given, given.encoding)
        # The arrays are what the encoding of a cache of these logits would hold.
        return replace(given, encoding=Dense(given.encoding.row_shape, "float32"), arrays=self._dense(given))

    def _dense(self, rows: TeacherRows) -> dict[str, Any]:
        return {"logits": self.logits(rows.dense())}

    def _topk_rows(self, rows: TeacherRows, encoding: TopK) -> TeacherRows:
        check_serves(self, encoding)
        divided = [t / self.temperature if isinstance(t, float) else t for t in encoding.temperatures]
        stays = [
            index
            for index, t in enumerate(divided)
            if not isinstance(t, float) or LEAST_TEMPERATURE <= t <= LARGEST_TEMPERATURE
        ]
        if not stays:
            raise UsageError(
                f"the temperatures of these topk rows, {encoding.temperatures}, divided by the calibration's "
                f"{self.temperature:g} are outside {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE:g}"
            )
        arrays = {
            name: array.float() / self.temperature if name in _LOGITS else array for name, array in rows.arrays.items()
        }
        if len(stays) < len(divided):
            arrays["tail_logsumexp"] = arrays["tail_logsumexp"][:, stays]
        return replace(
            rows, encoding=replace(encoding, temperatures=tuple(divided[index] for index in stays)), arrays=arrays
        )


def check_serves(calibration: Calibration, encoding: Any) -> None:
    """Refuses rows of which a calibration cannot be had.

    Raises:
        UsageError: `topk` rows, and more than a temperature; soft targets.
        MismatchError: another number of classes.
    """
    if isinstance(encoding, SoftTargets):
        raise UsageError(
            "a calibration divides logits, and the mean of several teachers' soft targets has none: calibrate each "
            "cache, and make the ensemble of them with --calibration"
        )
    for values in (calibration.scale, calibration.bias):
        if values is not None and len(values) != encoding.num_classes:
            raise MismatchError(f"the calibration is of {len(values)} classes, these rows have {encoding.num_classes}")
    if not calibration.is_temperature and not encoding.has_all_logits:
        raise UsageError(
            "a calibration with a number for each class needs the logits of all classes, and these rows (encoding "
            "topk) do not hold them: use `kdcache calibrate --method temperature`, or a cache with all logits"
        )


@lru_cache(maxsize=16)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, ndim: int) -> Tensor:
    """(1, C, 1 ...) of values (C,)."""
    return torch.tensor(values, dtype=dtype, device=device).reshape(1, -1, *[1] * (ndim - 2))
