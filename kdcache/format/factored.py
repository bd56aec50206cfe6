"""The `factored` encoding: the input of the teacher's last linear layer, and that layer once for all rows.

A row takes 2 D + 4 bytes instead of 2 C + 4: a tenth for 20,000 classes and 1,024 features, and the features serve
feature losses. Decoding multiplies by the layer again, on the device of the student.

Features are divided by a power of two, so that the largest of a row lies in [2**14, 2**15) and only the rounding to
float16 loses anything: no overflow, and full precision down to 2**-29 of the largest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.errors import LogitsError, UsageError
from kdcache.format.arrays import ArraySpec
from kdcache.format.encoding import EncodedRows, Encoding
from kdcache.format.known_heads import head_of, head_on

TOP_EXPONENT = 15  # the largest feature of a row is below 2**15, and float16 ends at 65,504
BELOW_TOP = 1 - 2.0**-11  # what rounds up to 2**15 in a row of the largest exponent would decode to infinity
LEAST_EXPONENT = -126  # of row_scale: the least normal float32, since devices may flush smaller ones to zero
LARGEST_EXPONENT = 128 - TOP_EXPONENT  # of a row of the largest float32
MAX_FEATURES = 1 << 24
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROUNDING = 2.0**-11  # of float16: half the distance of two neighbours, relative
_LEAST = 2.0**-25  # half the distance of two float16 below 2**-14
_FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Factored(Encoding):
    """Features of a row, (N, D), and the sha256 of the layer that makes logits of them.

    `row_scale` is a power of two (1 for features that are all 0), `features` = input / row_scale rounded to float16;
    raw logit = (features * row_scale) @ weight.T + bias in float32. A `row_scale` of 0 marks a row without a teacher,
    whose logits are 0.

    Attributes:
        features: D.
        head: sha256 of `head.h5`.
    """

    name = "factored"
    features: int
    head: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.row_shape) != 1:
            raise UsageError(
                f"factored rows have one logit a class, (C,), found {self.row_shape}; leave --factored out for dense "
                "prediction"
            )
        if type(self.features) is not int or not 0 < self.features <= MAX_FEATURES:
            raise UsageError(f"factored rows have 1 to {MAX_FEATURES} features, found {self.features!r:.50}")
        if not isinstance(self.head, str) or not _SHA256.fullmatch(self.head):
            raise UsageError(f"the head of factored rows is the sha256 of its file, found {self.head!r:.80}")

    @property
    def dtype(self) -> str:
        """`float16`."""
        return "float16"

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """`features` (N, D) and `row_scale` (N,)."""
        return ArraySpec("features", "<f2", (self.features,)), ArraySpec("row_scale", "<f4")

    def to_json(self) -> dict[str, Any]:
        """As written in headers and manifests."""
        return {**super().to_json(), "features": self.features, "head": self.head}

    def _encode(self, exact: np.ndarray, labels: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        raise UsageError(
            "factored rows are made from the input of the teacher's last layer, which logits do not tell: run "
            "`kdcache precompute --factored LAYER`"
        )

    def encode_features(self, inputs: np.ndarray) -> EncodedRows:
        """Encodes inputs of the last layer.

        Args:
            inputs: (N, D) float16, float32 or float64.

        Returns:
            `features` (N, D) float16 and `row_scale` (N,) float32; nothing is clamped but what rounds up to 2**128.

        Raises:
            LogitsError: a wrong shape or type, NaN or infinite values (float64 above the float32 range counts so).
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.features or inputs.dtype.kind != "f":
            raise LogitsError(f"features are {inputs.dtype} {inputs.shape}, expected floats (N, {self.features})")
        with np.errstate(over="ignore"):
            exact = inputs.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(exact).all(axis=1))
        if bad.size:
            raise LogitsError(f"{bad.size} rows of features hold NaN or infinity; the first at position {bad[0]}")
        largest = np.abs(exact).max(axis=1)
        _, exponents = np.frexp(largest)
        scale = np.ldexp(np.float32(1), np.maximum(exponents - TOP_EXPONENT, LEAST_EXPONENT)).astype("<f4")
        scale[largest == 0] = 1
        stored = (exact / scale[:, None]).astype("<f2")
        stored[(np.abs(stored) == 2.0**TOP_EXPONENT) & (exponents == 128)[:, None]] *= BELOW_TOP
        return EncodedRows({"features": stored, "row_scale": scale}, np.zeros(len(exact), np.int64))

    def inputs(self, arrays: dict[str, Any]) -> Any:
        """(N, D) float32 inputs of the last layer, as stored; NumPy arrays and tensors alike."""
        stored, scale = arrays["features"], arrays["row_scale"]
        exact = stored.astype(np.float32) if isinstance(stored, np.ndarray) else stored.float()
        return exact * scale[:, None]

    def flaw(self, arrays: dict[str, np.ndarray]) -> str | None:
        """Features that are infinite, or a `row_scale` that is no power of two of a writer's."""
        if not np.isfinite(arrays["features"]).all():
            return "features are infinite"
        mantissa, exponent = np.frexp(arrays["row_scale"])
        in_range = (exponent > LEAST_EXPONENT) & (exponent <= LARGEST_EXPONENT + 1)
        return None if (in_range & (mantissa == 0.5)).all() else "row_scale is no power of two that a row can have"

    def decode(self, arrays: dict[str, Any]) -> Any:
        """Raw logit = (features * row_scale) @ weight.T + bias, in float32 also under autocast.

        Raises:
            UsageError: no cache with this head was opened in this process.
            KDCacheError: `head.h5` is missing or damaged.
        """
        scale = arrays["row_scale"]
        if isinstance(scale, np.ndarray):
            head = head_of(self.head)
            with np.errstate(over="ignore", invalid="ignore"):  # of rows that `verify` refuses
                logits = self.inputs(arrays) @ head.weight.T
                logits += head.bias * (scale > 0)[:, None]
            return logits
        import torch

        weight, bias = head_on(self.head, scale.device)
        with torch.autocast(scale.device.type, enabled=False):
            return torch.addmm(bias * (scale > 0)[:, None], self.inputs(arrays), weight.T)

    def error_bound(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """How far decoded logits can be from weight @ input + bias in exact arithmetic.

        With x the stored features times `row_scale`, |error| <= |w_c| * (2**-11 |x| + 2**-25 sqrt(D) row_scale) from
        rounding to float16 (Cauchy-Schwarz; the second term is of features below 2**-14 in storage), and
        (D + 2) 2**-24 (|w_c| |x| + |b_c|) from float32 arithmetic in any order. Since |x| <= 2**15 sqrt(D) row_scale,
        the first part is below 16.1 sqrt(D) row_scale |w_c| whatever the row holds. Where matrix products round to
        TensorFloat-32, a further 2**-11 |w_c| |x| is to be added: stored features are exact in it, weights are not.

        Args:
            arrays: NumPy, as stored.

        Returns:
            (N, C) float64, in logits.
        """
        head = head_of(self.head)
        weights = np.sqrt((head.weight.astype(np.float64) ** 2).sum(axis=1))
        scale = arrays["row_scale"].astype(np.float64)
        lengths = np.sqrt((arrays["features"].astype(np.float64) ** 2).sum(axis=1)) * scale
        rounding = _ROUNDING * lengths + _LEAST * math.sqrt(self.features) * scale
        arithmetic = (self.features + 2) * _FLOAT32_ROUNDING
        sizes = lengths[:, None] * weights + np.abs(head.bias.astype(np.float64))
        bound: np.ndarray = rounding[:, None] * weights + arithmetic * sizes
        return bound
