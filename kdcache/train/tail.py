"""The logsumexp of a `topk` row's tail at a temperature: exact at a stored one, else between two bounds.

f(b) = log sum exp(b * z) over the classes that are not kept, with b = 1/temperature and z relative to `row_max`, is
convex in b. Known for free are its value at b = 0, log(C - kept), its slope there, `tail_mean`, and that no slope is
above the tail's largest logit, which is at most the smallest of the K kept ones, and at most f(b)/b. So

    chords between two known points bound f from above, and beyond them from below;
    the tangent at 0 bounds it from below;
    the line of the largest slope through a known point bounds it from above behind the point, from below before it.

Every bound carries the rounding of the float32 values that it is made of, so that the true value lies between the two.
What is used is their middle. With T = 1, 2, 4 stored and 1000 classes with K = 1, half the distance in tail mass is
0.005 on the mean at T = 3, 0.001 at T = 8, 0.02 at T = 1.5 and 0.06 at T = 0.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.topk import LEAST_STD, Z2, TopK, z2_temperature
from kdcache.store.rows import TeacherRows
from kdcache.train.kept import Kept, kept, topk_encoding
from kdcache.train.row_weights import per_position

# The mean error of the tail mass that is taken without asking. Moving a share m of the teacher's mass changes the KL's
# gradient in a row's logits by at most 2 m / T in the sum of magnitudes, and 2 / T is the most that gradient can be:
# 0.01 is 1 % of it.
DEFAULT_TAIL_TOLERANCE = 0.01
# Of stored values: 8 float32 roundings of a sum, of what it sums, and of the exponentials that it is made of.
_ROUNDING = 2.0**-21
_HALF_ROUNDING = 2.0**-11

Temperature: TypeAlias = float | str | Tensor


@dataclass(frozen=True, eq=False)
class Tail:
    """log sum exp(z / temperature) over the classes that are not kept, z relative to `row_max`.

    Attributes:
        middle: (N, ...); -inf where no class with a finite logit is left.
        half_width: (N, ...) nats: the true value is no further from `middle`; None where it is exact.
    """

    middle: Tensor
    half_width: Tensor | None


def tail_logsumexp(
    rows: TeacherRows, temperature: Temperature, *, slots: Kept | None = None, dtype: torch.dtype = torch.float32
) -> Tail:
    """The tail of `topk` rows at a temperature, with its bound where the temperature was not stored.

    Args:
        rows: N rows of tensors.
        temperature: above 0; "z2" for twice the row's own `logit_std`; or (N, ...) of its own for each row.
        slots: `kept(rows)`, if it is at hand.
        dtype: of the result.

    Raises:
        UsageError: rows of another encoding, or a temperature that cannot be meant.
    """
    encoding = topk_encoding(rows)
    stored = _stored_at(encoding, temperature)
    if stored is not None:
        return Tail(rows.arrays["tail_logsumexp"][:, stored].to(dtype), None)
    lower, upper, is_empty = _bounds(rows, slots or kept(rows), 1 / temperature_of(rows, temperature))
    middle = ((lower + upper) / 2).masked_fill(is_empty, -math.inf)
    half = ((upper - lower) / 2).clamp(min=0).masked_fill(is_empty, 0)
    return Tail(middle.to(dtype), half.to(dtype))


def temperature_of(rows: TeacherRows, temperature: Temperature) -> Tensor:
    """(N, ...) of each row, or () where all share it; float64 but where a device has none.

    Raises:
        UsageError: not a temperature.
    """
    std = rows.arrays["logit_std"]
    precise = torch.float32 if std.device.type == "mps" else torch.float64
    if isinstance(temperature, Tensor):
        each = per_position(temperature, std) if temperature.ndim == 1 else temperature
        return each.to(precise).clamp(min=LEAST_STD)  # of a row whose logits are all equal
    if temperature == Z2:
        twice: Tensor = z2_temperature(std.to(precise))
        return twice
    return torch.tensor(check_temperature(temperature), dtype=precise, device=std.device)


def check_temperature(temperature: Any) -> float:
    """A finite number above 0.

    Raises:
        UsageError: anything else.
    """
    if isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0:
        return float(temperature)
    raise UsageError(f'temperature is {temperature!r:.80}, expected a finite number above 0, or "{Z2}" of topk rows')


def mass_error(tail: Tail, head: Tensor) -> Tensor:
    """(N, ...) by how much the tail's share of the probability may be wrong.

    Args:
        tail: of rows.
        head: (N, ...) logsumexp over the kept classes at the same temperature.
    """
    if tail.half_width is None:
        return torch.zeros_like(tail.middle)
    low, high = (torch.sigmoid(tail.middle + side * tail.half_width - head) for side in (-1, 1))
    return (high - low) / 2


def check_width(
    error: Tensor, has_teacher: Tensor | None, *, encoding: TopK, temperature: Temperature, tolerance: float
) -> None:
    """Refuses a temperature whose tail mass is known too vaguely, on the mean over the batch.

    The mean, since the loss is one: a single odd row does not end a run. On a GPU this waits for the stream; at a
    stored temperature nothing is asked.

    Raises:
        UsageError: the mean error is above the tolerance.
    """
    if not tolerance >= 0:
        raise UsageError(f"the tail tolerance is {tolerance}, expected a share of the probability, 0 or above")
    if has_teacher is not None:
        error = error[has_teacher]
    mean = float(error.mean()) if error.numel() else 0.0
    if mean <= tolerance:
        return
    named = "of each row's own" if isinstance(temperature, Tensor) else f"{temperature}"
    stored = ", ".join(f"{t:g}" if isinstance(t, float) else t for t in encoding.temperatures)
    raise UsageError(
        f"temperature {named} was not stored (stored: {stored}), and what was stored leaves the mass of the classes "
        f"that are not kept open by +-{mean:.3g} on the mean over these rows; the tolerance is {tolerance:g}. Use a "
        f"stored temperature, allow more with tail_tolerance (--tail-tolerance), or make the cache again with "
        "--temperatures that has this one"
    )


def _stored_at(encoding: TopK, temperature: Temperature) -> int | None:
    """Which stored temperature it is, or None."""
    if isinstance(temperature, Tensor):
        return None
    wanted = Z2 if temperature == Z2 else check_temperature(temperature)
    return encoding.temperatures.index(wanted) if wanted in encoding.temperatures else None


def _bounds(rows: TeacherRows, slots: Kept, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, ...) lower and upper bound of f at `beta`, and where the tail is empty; the two mean nothing there."""
    encoding, arrays, precise = topk_encoding(rows), rows.arrays, beta.dtype
    mean = arrays["tail_mean"].to(precise)
    values = arrays["tail_logsumexp"].to(precise)
    count = torch.as_tensor(slots.tail_count, dtype=precise, device=beta.device).expand(mean.shape)
    is_empty = (count == 0) | torch.isneginf(values).all(dim=1)
    log_count = count.clamp(min=1).log()

    # (b, f(b), by how much f may be off) of what is known. At 0 it is too high where a class of the tail is masked,
    # which keeps every bound that is made of it valid.
    points = [(torch.zeros_like(mean), log_count, _ROUNDING * (1 + log_count))]
    for index, temperature in enumerate(encoding.temperatures):
        value = values[:, index]
        off = _ROUNDING * (1 + value.abs() + log_count)
        points.append(((1 / temperature_of(rows, temperature)).expand(mean.shape), value, off))

    smallest = arrays["topk_logits"][:, encoding.k - 1].to(precise)
    steepest = smallest + _HALF_ROUNDING * smallest.abs() + 2.0**-25  # what was rounded to it may have been larger
    for at, value, off in points[1:]:
        steepest = torch.where(torch.isfinite(value), torch.minimum(steepest, (value + off) / at), steepest)
    steepest = steepest.clamp(min=-1e40)

    tangent = log_count - points[0][2] + beta * (mean - _ROUNDING * mean.abs())
    lower = torch.where(torch.isfinite(mean), tangent, -math.inf)
    upper = torch.full_like(lower, math.inf)
    for number, (at, value, off) in enumerate(points):
        known, distance = torch.isfinite(value), beta - at
        line = value + steepest * distance
        upper = torch.where(known & (distance >= 0), torch.minimum(upper, line + off), upper)
        # The count at 0 may be too high, but nothing lies before 0.
        lower = torch.where(known & (distance <= 0), torch.maximum(lower, line - off), lower)
        for other_at, other, other_off in points[:number]:
            # Each weight from its own difference: 1 - weight would lose the digits of a small one.
            weight, other_weight = (beta - other_at) / (at - other_at), (beta - at) / (other_at - at)
            chord = weight * value + other_weight * other
            around = weight.abs() * off + other_weight.abs() * other_off
            usable = torch.isfinite(chord) & torch.isfinite(around)
            is_between = (weight >= 0) & (other_weight >= 0)
            upper = torch.where(usable & is_between, torch.minimum(upper, chord + around), upper)
            lower = torch.where(usable & ~is_between, torch.maximum(lower, chord - around), lower)
    return lower, upper, is_empty
