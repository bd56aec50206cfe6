"""Encoding on a device: the same arithmetic as the NumPy of each encoding, in torch.

Encoding before the copy to the host moves 2 bytes a value instead of 4, and of top-k rows a few dozen a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdcache.errors import DataError, LogitsError, UsageError
from kdcache.format.encoding import FLOAT16_LOWEST, FLOAT32_MAX, Encoding
from kdcache.format.factored import Factored
from kdcache.format.quantized import Quantized
from kdcache.format.topk import TopK
from kdcache.train.encode_features import LayerInputs, encode_features, unlike_rows
from kdcache.train.encode_quantized import encode_quantized
from kdcache.train.encode_topk import encode_topk


@dataclass(frozen=True, eq=False)
class EncodedTensors:
    """N encoded rows on a device.

    Attributes:
        arrays: those of the encoding by name, N rows each.
        bad: (N,) bool, rows with NaN, +inf or -inf alone; they must not be stored.
        clamped: scalar int64, stored values that were clamped to the range of their dtype.
    """

    arrays: dict[str, torch.Tensor]
    bad: torch.Tensor
    clamped: torch.Tensor


def encode(
    encoding: Encoding,
    logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    inputs: LayerInputs | None = None,
) -> EncodedTensors:
    """Encodes raw logits without waiting for the device; the caller looks at `bad` later.

    Args:
        encoding: the target.
        logits: (N, C, ...) of any float type.
        labels: (N, L) int64, -1 = none: classes whose logits are kept in any case. None where there are none, or all
            logits are kept.
        inputs: of the teacher's last layer, which factored rows are made from; those whose logits are not what they
            decode to count as bad.

    Raises:
        LogitsError: another shape than the encoding's, or not floating point.
        DataError: labels of another shape than the encoding's.
        UsageError: factored rows without inputs.
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
    if isinstance(encoding, Factored):
        if inputs is None:
            raise UsageError("factored rows are made from the input of the teacher's last layer, which is missing here")
        arrays = encode_features(encoding, inputs, exact)
        return EncodedTensors(arrays, bad | unlike_rows(encoding, arrays, exact, inputs.computed_in), clamped)
    if isinstance(encoding, TopK):
        if labels is not None and encoding.labels and labels.shape != (len(exact), encoding.labels):
            raise DataError(f"labels have shape {tuple(labels.shape)}, expected {(len(exact), encoding.labels)}")
        arrays, clamped = encode_topk(encoding, exact, row_max, labels)
        return EncodedTensors(arrays, bad, clamped)
    if isinstance(encoding, Quantized):
        arrays, clamped = encode_quantized(encoding, exact, row_max)
        return EncodedTensors(arrays, bad, clamped)
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
