"""A loss as text: `NAME[:key=value,...][*weight]`, as `--loss` takes it.

kl                      dkd:beta=2,temperature=4          dist:gamma=2*0.5
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from kdcache.errors import UsageError
from kdcache.train.loss_records import LOSSES, Loss, WeightedLoss

BY_NAME: dict[str, type[Loss]] = {loss.name: loss for loss in LOSSES}


def parse_loss(text: str) -> WeightedLoss:
    """The loss that a text names.

    Raises:
        UsageError: an unknown name or key, or a number that cannot be meant.

    >>> parse_loss("dkd:beta=2*0.5")
    WeightedLoss(loss=Dkd(temperature=None, alpha=1.0, beta=2.0), weight=0.5)
    """
    spec, star, weight = text.partition("*")
    name, colon, options = spec.partition(":")
    name = name.strip()
    if name not in BY_NAME:
        raise UsageError(f"loss {text!r}: {name!r} is not known; choose one of {', '.join(BY_NAME)}")
    pairs = [_option(part, name, text) for part in options.split(",")] if colon else []
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UsageError(f"loss {text!r}: a key is given twice")
    return WeightedLoss(BY_NAME[name](**given), _number(weight, text, "the weight") if star else 1.0)


def as_losses(given: Iterable[WeightedLoss | Loss | str] | WeightedLoss | Loss | str) -> tuple[WeightedLoss, ...]:
    """Losses by record, by record with a weight, or by text, as one weighted sum.

    Raises:
        UsageError: something else, nothing, or a text that cannot be read.
    """
    if isinstance(given, (str, Loss, WeightedLoss)):
        given = [given]
    losses = []
    for loss in given:
        if isinstance(loss, str):
            losses.append(parse_loss(loss))
        elif isinstance(loss, Loss):
            losses.append(WeightedLoss(loss))
        elif isinstance(loss, WeightedLoss):
            losses.append(loss)
        else:
            raise UsageError(f"a loss is a record such as kdcache.losses.Kl(), or a text, found {loss!r:.80}")
    return tuple(losses)


def _option(part: str, name: str, text: str) -> tuple[str, float | bool]:
    key, equals, value = (piece.strip() for piece in part.partition("="))
    kinds = {field.name: str(field.type) for field in dataclasses.fields(BY_NAME[name])}
    if key not in kinds or not equals:
        keys = ", ".join(kinds) or "none"
        raise UsageError(f"loss {text!r}: {part!r} is no option of {name}, expected key=value with one of: {keys}")
    if kinds[key] == "bool":
        if value not in ("true", "false"):
            raise UsageError(f"loss {text!r}: {key} is {value!r}, expected true or false")
        return key, value == "true"
    return key, _number(value, text, key)


def _number(value: str, text: str, what: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"loss {text!r}: {what} is {value!r}, expected a number") from None
