"""The `dense` encoding on a device: the same arithmetic as `kdcache.format.encodings.encode`, in torch.

Encoding before the copy to the host moves 2 bytes a value instead of 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdcache.errors import LogitsError
from kdcache.format.encoding import FLOAT16_LOWEST, FLOAT32_MAX, Encoding


@dataclass(frozen=True, eq=False)
class EncodedTensors:
    """N encoded rows on a device.

    Attributes:
        arrays: `logits` (N, C, ...) and, for float16, `row_max` (N, ...) float32.
        bad: (N,) bool, rows with NaN, +inf or -inf alone; they must not be stored.
        clamped: scalar int64, values clamped to the range of the encoding's dtype.
    """

    arrays: dict[str, torch.Tensor]
    bad: torch.Tensor
    clamped: torch.Tensor


def encode(encoding: Encoding, logits: torch.Tensor) -> EncodedTensors:
    """Encodes raw logits without waiting for the device; the caller looks at `bad` later.

    Args:
        encoding: the target.
        logits: (N, C, ...) of any float type.

    Raises:
        LogitsError: another shape than the encoding's, or not floating point.
    """
    if tuple(logits.shape[1:]) != encoding.row_shape:
        raise LogitsError(
            f"the teacher returned logits of shape {tuple(logits.shape)}, expected (N, "
            f"{', '.join(map(str, encoding.row_shape))}) as in the first batch"
        )
    if not logits.is_floating_point():
        raise LogitsError(f"the teacher returned {logits.dtype}, expected floating point logits")
    exact, clamped = _as_float32(logits)
    row_max = exact.amax(dim=1)
    bad = ~torch.isfinite(row_max).reshape(len(exact), math.prod(encoding.row_shape[1:])).all(dim=1)
    if encoding.dtype == "float32":
        return EncodedTensors({"logits": exact}, bad, clamped)
    shifted = exact - row_max.unsqueeze(1)
    low = (shifted < FLOAT16_LOWEST) & torch.isfinite(exact)
    stored = torch.where(low, FLOAT16_LOWEST, shifted).half()
    return EncodedTensors({"logits": stored, "row_max": row_max}, bad, low.sum())


def _as_float32(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits, and how many were clamped: float64 values below the float32 range. Those above become +inf."""
    if logits.dtype != torch.float64:
        return logits.float(), torch.zeros((), dtype=torch.int64, device=logits.device)
    low = (logits < -FLOAT32_MAX) & torch.isfinite(logits)
    fitting = torch.where(low, -FLOAT32_MAX, torch.where(logits > FLOAT32_MAX, math.inf, logits))
    return fitting.float(), low.sum()
