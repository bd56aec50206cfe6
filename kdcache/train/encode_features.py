"""The `factored` encoding on a device, and whether the layer makes the teacher's logits of what is stored.

The second is asked of every batch, not of the first alone: a teacher that masks classes of some samples behind its
last layer would else be stored as one that does not. It costs one product of (N, D) and (D, C) a batch, as much as the
layer itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdcache.errors import LogitsError
from kdcache.format.factored import BELOW_TOP, LEAST_EXPONENT, TOP_EXPONENT, Factored
from kdcache.format.known_heads import head_on

_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23  # of float32
_FLOAT16_ROUNDING = 2.0**-11
_FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What went into the teacher's last layer, and what it computes in.

    Attributes:
        values: (N, D) of any float type.
        computed_in: the type of the layer's output: bfloat16 under autocast, whatever the model makes of it later.
    """

    values: torch.Tensor
    computed_in: torch.dtype


def encode_features(encoding: Factored, inputs: LayerInputs, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """`features` (N, D) float16 and `row_scale` (N,) float32, as `Factored.encode_features` makes them.

    Args:
        encoding: the target.
        inputs: of the last layer.
        logits: (N, C) of the same rows.

    Raises:
        LogitsError: another number of features or rows than the encoding and the logits have.
    """
    if inputs.values.shape != (len(logits), encoding.features):
        raise LogitsError(
            f"the teacher's last layer got an input of shape {tuple(inputs.values.shape)}, expected "
            f"{(len(logits), encoding.features)} as in the first batch"
        )
    exact = inputs.values.float()
    largest = exact.abs().amax(dim=1)
    _, exponents = torch.frexp(largest)
    exponents = (exponents - TOP_EXPONENT).clamp(LEAST_EXPONENT, _EXPONENT_BIAS)
    # By its bits: `ldexp` of a device is a product with pow(2, n), which need not be exact.
    scale = ((exponents + _EXPONENT_BIAS) << _MANTISSA_BITS).to(torch.int32).view(torch.float32)
    scale = torch.where((largest > 0) & torch.isfinite(largest), scale, 1.0)
    stored = (exact / scale.unsqueeze(1)).half()
    at_the_end = (stored.abs() == 2.0**TOP_EXPONENT) & (exponents == 128 - TOP_EXPONENT).unsqueeze(1)
    stored = torch.where(at_the_end, stored * BELOW_TOP, stored)
    return {"features": stored, "row_scale": scale}


def unlike_rows(
    encoding: Factored, arrays: dict[str, torch.Tensor], logits: torch.Tensor, computed_in: torch.dtype
) -> torch.Tensor:
    """(N,) bool: rows whose logits are not those that the stored features decode to, up to rounding, or not finite.

    The tolerance of a logit is |x| |w_c| + |b_c| times 2**-11 (features rounded to float16) plus three times the
    rounding of what the teacher computes in (input, weight, output; 2**-11 at least, for TensorFloat-32) plus that of
    D float32 additions, on both sides. That is 0.2 % for float32 and 0.7 % for bfloat16, of which errors reach a small
    part, since they seldom all have the same sign.

    Args:
        encoding: of the arrays.
        arrays: as `encode_features` makes them.
        logits: (N, C) float32.
        computed_in: see `LayerInputs`.
    """
    weight, bias = head_on(encoding.head, logits.device)
    difference: torch.Tensor = (encoding.decode(arrays) - logits).abs()
    alike = (difference <= tolerances(encoding, arrays, weight, bias, computed_in)).all(dim=1)
    return ~(alike & torch.isfinite(arrays["features"]).all(dim=1))  # an infinite feature has an infinite tolerance


def tolerances(
    encoding: Factored,
    arrays: dict[str, torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    computed_in: torch.dtype,
) -> torch.Tensor:
    """(N, C) how far logits may be from the decoded ones; see `unlike_rows`."""
    teacher = max(torch.finfo(computed_in).eps / 2, _FLOAT16_ROUNDING)
    share = _FLOAT16_ROUNDING + 3 * teacher + 2 * (encoding.features + 2) * _FLOAT32_ROUNDING
    lengths = torch.linalg.vector_norm(encoding.inputs(arrays), dim=1)
    sizes: torch.Tensor = lengths.unsqueeze(1) * torch.linalg.vector_norm(weight, dim=1) + bias.abs()
    return share * sizes
