"""The texts that name view pipelines, `crop4,hflip` and the like: parts, numbers, and one spelling of each.

Without torch, so that a command can compare two of them before it imports it.
"""

from __future__ import annotations

import re
from typing import Literal

from kdcache.errors import UsageError

MIXES: tuple[Literal["mixup", "cutmix"], ...] = ("mixup", "cutmix")
PARTS = ("crop", "hflip", "rrc", "randaug", "shift", "noise", "erase")
_PART = re.compile(r"([a-z_]+)([0-9]+(?:\.[0-9]+)?)?")
_DEFAULTS = {"crop": 4.0, "randaug": 9.0, "shift": 2.0, "noise": 0.1, "erase": 0.5, "mixup": 0.2, "cutmix": 1.0}


def canonical(text: str) -> str:
    """The text of a named pipeline with all its numbers: equal for equal pipelines.

    >>> canonical("crop, hflip,mixup0.20")
    'crop4,hflip,mixup0.2'
    """
    return ",".join(name if number is None else f"{name}{number:.12g}" for name, number in parsed(text))


def parsed(text: str) -> list[tuple[str, float | None]]:
    """Names and numbers of the parts in order.

    Raises:
        UsageError: an unknown name, a number that cannot be meant, or a mix that is not last.
    """
    found: list[tuple[str, float | None]] = []
    for word in text.split(","):
        match = _PART.fullmatch(word.strip())
        name, number = (match[1], match[2]) if match else (word.strip(), None)
        if found and found[-1][0] in MIXES:
            raise UsageError(
                f"--augment {text!r:.200}: {found[-1][0]} mixes finished views, so it must be the last part"
            )
        if name not in (*PARTS, *MIXES):
            raise UsageError(
                f"--augment {text!r:.200}: no part is called {name!r:.50}; there are "
                f"{', '.join((*PARTS, *MIXES))}, each with an optional number, or "
                "module:factory for a transform of your own"
            )
        found.append((name, _number(text, word.strip(), name, number)))
    return found


def _number(text: str, word: str, name: str, number: str | None) -> float | None:
    whole = name in ("crop", "rrc", "randaug", "shift")
    if name == "hflip" and number is not None:
        raise UsageError(f"--augment {text!r:.200}: hflip takes no number, found {word!r:.50}")
    if number is None:
        return _DEFAULTS.get(name)
    value = float(number)
    if whole and not value.is_integer():
        raise UsageError(f"--augment {text!r:.200}: {name} takes a whole number, found {number:.20}")
    limits = {"crop": (1, 1024), "rrc": (1, 16384), "randaug": (0, 30), "shift": (1, 4096), "erase": (0, 1)}
    low, high = limits.get(name, (0, 1e6))
    if not low <= value <= high:
        raise UsageError(f"--augment {text!r:.200}: {name} takes a number from {low:g} to {high:g}, found {number:.20}")
    return value
