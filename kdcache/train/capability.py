"""Which loss and which metric rows of each encoding serve: the table of docs/format.md, as code.

Asked before a run, so that what a cache cannot give is an error at the start and not a number that means something
else.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any, TypeAlias

from kdcache.errors import UsageError
from kdcache.format.encoding import Encoding
from kdcache.format.factored import Factored
from kdcache.format.quantized import Quantized
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import Z2, TopK
from kdcache.store.rows import TeacherRows


class Service(Enum):
    """How well rows serve a loss or metric; the value is what the table says."""

    EXACT = "exact"
    ROUNDED = "exact up to rounding"
    BUCKETED = "on the bucketed distribution: a lower bound"
    BOUNDED = "bounded"
    ERROR = "bounded error"
    NO = "no"


class _Needs(Enum):
    """What a loss or metric needs of a row."""

    DISTRIBUTION = "the teacher's distribution, if need be with a bucket for many classes"
    KEPT = "the probability of a kept class"
    LABEL = "the probability of the label"
    TOP = "the most likely class"
    ALL = "the logits of all classes"
    FEATURES = "the features before the last layer"


# name -> (what it needs, how the table calls it)
_NEEDS: dict[str, tuple[_Needs, str]] = {
    "kl": (_Needs.DISTRIBUTION, "KL, soft cross-entropy"),
    "reverse_kl": (_Needs.DISTRIBUTION, "reverse KL"),
    "js": (_Needs.DISTRIBUTION, "Jensen-Shannon"),
    "standardized_kd": (_Needs.DISTRIBUTION, "KL of standardised logits (its T is `z2`)"),
    "captured_mass": (_Needs.KEPT, "tail mass, captured mass"),
    "calibration_error": (_Needs.KEPT, "calibration error"),
    "nll": (_Needs.LABEL, "NLL of the label"),
    "dkd_target": (_Needs.LABEL, "DKD, target part"),
    "top1": (_Needs.TOP, "top-1 accuracy, hard targets"),
    "dkd": (_Needs.ALL, "DKD with its non-target part"),
    "dist": (_Needs.ALL, "DIST"),
    "mse": (_Needs.ALL, "MSE of logits"),
    "entropy": (_Needs.ALL, "entropy"),
    "brier": (_Needs.ALL, "Brier score"),
    "binary_kd": (_Needs.ALL, "KD of sigmoids (multi-label)"),
    "feature_cosine": (_Needs.FEATURES, "feature cosine"),
    "feature_mse": (_Needs.FEATURES, "feature MSE"),
    "relational_distance": (_Needs.FEATURES, "relational distance of features"),
}
_SAME = {"kd": "kl", "soft_ce": "kl", "spread_kl": "kl", "hard_target": "top1"}
NAMES = (*_NEEDS, *_SAME)

# float16 and float32, then int8 and int4, which hold the top classes in float16.
_OF_LOGITS = {
    **dict.fromkeys(_Needs, (Service.EXACT, Service.ERROR)),
    _Needs.TOP: (Service.EXACT, Service.EXACT),
    _Needs.FEATURES: (Service.NO, Service.NO),
}
# At a stored temperature, then at another one.
_TOPK = {
    _Needs.DISTRIBUTION: (Service.BUCKETED, Service.BOUNDED),
    _Needs.KEPT: (Service.EXACT, Service.BOUNDED),
    _Needs.LABEL: (Service.EXACT, Service.BOUNDED),
    _Needs.TOP: (Service.EXACT, Service.EXACT),
    _Needs.ALL: (Service.NO, Service.NO),
    _Needs.FEATURES: (Service.NO, Service.NO),
}

Teacher: TypeAlias = TeacherRows | Encoding


def service(name: str, teacher: Teacher, temperature: Any = None) -> Service:
    """How well rows of an encoding serve a loss or metric.

    Args:
        name: one of `NAMES`.
        teacher: the encoding, or rows of it.
        temperature: that the teacher's logits are divided by: a number, "z2", or anything else for one that was not
            stored; None for a stored one.

    Raises:
        UsageError: the name is not known.

    >>> from kdcache.format.dense import Dense
    >>> service("dist", Dense((10,)))
    <Service.EXACT: 'exact'>
    """
    encoding, needs = _encoding(teacher), _needs(name)
    if isinstance(encoding, TopK) and not encoding.has_all_logits:
        if needs is _Needs.LABEL and not encoding.labels:
            return Service.NO
        if name == "standardized_kd" and temperature is None:
            temperature = Z2
        is_stored = temperature is None or (
            isinstance(temperature, (int, float, str)) and temperature in encoding.temperatures
        )
        return _TOPK[needs][0 if is_stored else 1]
    if isinstance(encoding, SoftTargets):
        return _of_soft_targets(name, needs, encoding, temperature)
    if isinstance(encoding, Factored):
        return Service.ROUNDED
    return _OF_LOGITS[needs][1 if isinstance(encoding, Quantized) else 0]


def require(name: str, teacher: Teacher, temperature: Any = None, *, among: Iterable[str] = NAMES) -> Service:
    """Refuses rows that cannot serve a loss or metric.

    Whether a tail that is bounded is bounded closely enough, the loss itself finds out (`tail_tolerance`).

    Args:
        name: one of `NAMES`.
        teacher: the encoding, or rows of it.
        temperature: as in `service`.
        among: what a refusal may name as served.

    Returns:
        How well they serve it.

    Raises:
        UsageError: they do not; the message names the encodings that do, and what to run.
    """
    found = service(name, teacher, temperature)
    if found is not Service.NO:
        return found
    encoding, needs = _encoding(teacher), _needs(name)
    has = f"these rows ({_described(encoding)}) do not hold that"
    if isinstance(encoding, SoftTargets):
        is_of_no_temperature = service(name, teacher, encoding.temperature) is Service.NO
        if is_of_no_temperature:
            raise UsageError(
                f"{name} needs {needs.value}, and these rows are soft targets at temperature "
                f"{encoding.temperature:g}, the mean of several teachers: they serve kl, reverse_kl, soft_ce and js at "
                f"that one, and no temperature serves {name}. Take the cache of a single teacher, or the mean of "
                "logits (distill --ensemble logits, kdcache ensemble --rule logits), which serves everything"
            )
        at = f", asked for at temperature {temperature}" if temperature is not None else ""
        raise UsageError(
            f"{name} needs {needs.value}{at}, and these rows are soft targets at temperature "
            f"{encoding.temperature:g}, the mean of several teachers: they serve kl, reverse_kl, soft_ce and js at "
            "that one. Use it (--temperature), make the ensemble again with this one, or take the mean of logits "
            "(--ensemble logits, kdcache ensemble --rule logits), which serves everything"
        )
    if needs is _Needs.FEATURES:
        raise UsageError(
            f"{name} needs {needs.value}, and {has}. Only the encoding factored does: make the cache again with "
            "kdcache precompute --factored LAYER; kdcache convert cannot make features of logits"
        )
    if needs is _Needs.LABEL:
        raise UsageError(
            f"{name} needs {needs.value}, and {has}: the dump saw no label of each row. The encodings dense and "
            "factored serve it, and topk made from rows with labels. If a cache with all logits and labels is still "
            "there, kdcache convert makes such topk rows of it"
        )
    raise UsageError(
        f"{name} needs {needs.value}, and {has}. The encodings dense (float16, float32, int8, int4) and factored do: "
        "make the cache again with kdcache precompute --dtype int8 (or int4, the smallest). kdcache convert makes topk "
        "of dense, but cannot bring logits back that were not kept. Served by topk rows: "
        f"{', '.join(other for other in among if service(other, teacher) is not Service.NO)}"
    )


def _of_soft_targets(name: str, needs: _Needs, encoding: SoftTargets, temperature: Any) -> Service:
    """Probabilities at one temperature: what needs logits, or another temperature, is not served."""
    if needs is _Needs.TOP:
        return Service.EXACT if encoding.has_all_classes else Service.NO
    is_its_own = temperature is None or (
        isinstance(temperature, (int, float)) and float(temperature) == encoding.temperature
    )
    if needs is not _Needs.DISTRIBUTION or name == "standardized_kd" or not is_its_own:
        return Service.NO
    if name == "spread_kl" and not encoding.has_all_classes:
        return Service.NO
    return Service.EXACT if encoding.has_all_classes else Service.BUCKETED


def table() -> str:
    """The matrix as the Markdown table of docs/format.md."""
    columns = (
        ("`dense` float16, float32", _OF_LOGITS, 0),
        ("`dense` int8, int4", _OF_LOGITS, 1),
        ("`topk` at a stored T", _TOPK, 0),
        ("`topk` at another T", _TOPK, 1),
        ("`factored`", dict.fromkeys(_Needs, (Service.ROUNDED,)), 0),
    )
    titles = [*(title for title, _, _ in columns), "`soft_targets` at its T"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, (needs, shown) in _NEEDS.items():
        of_mean = _of_soft_targets(name, needs, SoftTargets((2,), 1.0, 2), None)
        cells = (*(given[needs][column].value for _, given, column in columns), of_mean.value)
        rows.setdefault(cells, []).append(shown)
    lines += [f"| {'; '.join(shown)} | {' | '.join(cells)} |" for cells, shown in rows.items()]
    return "\n".join(lines)


def _needs(name: str) -> _Needs:
    known = _NEEDS.get(_SAME.get(name, name))
    if known is None:
        raise UsageError(f"no loss or metric is called {name!r:.80}; known: {', '.join(NAMES)}")
    return known[0]


def _encoding(teacher: Teacher) -> Encoding:
    return teacher.encoding if isinstance(teacher, TeacherRows) else teacher


def _described(encoding: Encoding) -> str:
    """An encoding in few words."""
    if isinstance(encoding, TopK):
        labels = "" if encoding.labels else ", without labels"
        return f"encoding topk, {encoding.k} of {encoding.num_classes} classes{labels}"
    return f"encoding {encoding.name}, {encoding.dtype}"
