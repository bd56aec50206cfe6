"""The encodings `int8` and `int4` on a device: the arithmetic of `kdcache.format.quantized`, to the last bit."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kdcache.format.encoding import FLOAT16_LOWEST
from kdcache.format.quantized import Quantized
from kdcache.train.ranking import as_stored_classes, largest_classes


def encode_quantized(encoding: Quantized, exact: Tensor, row_max: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The arrays of float32 logits (N, C, ...) with maxima (N, ...), and how many values were clamped."""
    shifted = exact - row_max.unsqueeze(1)
    low = (shifted < FLOAT16_LOWEST) & torch.isfinite(exact)
    shifted = torch.where(low, FLOAT16_LOWEST, shifted)
    masked = shifted == -math.inf
    classes = largest_classes(exact, encoding.top)
    top = shifted.gather(1, classes).half()
    depth = torch.where(masked, 0.0, (top[:, -1:].float() - shifted).clamp_(min=0))
    # One rounding of 1 / 254 for every device: dividing by a number is not the same operation on all of them.
    row_scale = depth.amax(dim=1) * float(np.float32(1 / encoding.levels))
    steps = depth / torch.where(row_scale > 0, row_scale, 1.0).unsqueeze(1)
    codes = steps.round_().clamp_(max=encoding.levels).masked_fill_(masked, encoding.levels + 1).to(torch.uint8)
    arrays = {
        "logits": codes if encoding.stored == "int8" else _pack(codes),
        "top_logits": top,
        "top_classes": as_stored_classes(classes, encoding.num_classes),
        "row_max": row_max,
        "row_scale": row_scale,
    }
    return arrays, low.sum()


def _pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits (N, C, ...) two a byte (N, ceil(C / 2), ...), the first in the lower half."""
    packed = codes[:, 0::2].clone()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed
