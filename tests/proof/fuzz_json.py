"""JSON mutated by its structure: types change, parts vanish, repeat, swap, nest, and numbers go to their limits."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS: list[Any] = [0, 1, -1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**47, 2**48 - 1, 2**48, 2**53]
NUMBERS += [2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), -(2**63) - 1, 10**19, 10**25]
NUMBERS += [10**400, 0.0, -0.0, 0.5, 1.0, 1e308, -1e-320, 2.0**48]
TEXTS = [
    "",
    " ",
    "0",
    "1",
    "true",
    "null",
    "<i8",
    "<f2",
    "<f4",
    "|S8",
    "|S0",
    "|S1025",
    "|S99999",
    "|S1٣",
    "|S8\n",
    "<i8 ",
    "|O",
    "|V8",
    ">i8",
]
TEXTS += ["dense", "topk", "factored", "float16", "float32", "int8", "shard", "cache", "folder", "plan", "a" * 3000]
TEXTS += [
    "\0",
    "\x1b[31m",
    "\ud800",
    "\udcff",
    "\u202e",
    "é",
    "\U0001f600",
    "İ",
    "٣",
    "../../etc/passwd",
    "/etc/passwd",
]
TEXTS += ["v000-00000.h5", "v000-00001.h5", "v001-00000.h5", "v000-00000.h5\n", "v٠٠٠-00000.h5", "V000-00000.H5"]
TEXTS += [
    "0" * 64,
    "f" * 64,
    "F" * 64,
    "g" * 64,
    "0" * 63,
    "0" * 64 + "\n",
    "__class__",
    "__proto__",
    "$ref",
    "py/object",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [{}], {"": None}, [None], [0, 1], ["a", "b"], {"a": {"b": [1]}}]


def any_value(rng: random.Random) -> Any:
    """A value of any type, half of the time a number."""
    kind = rng.randrange(8)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind == 6:
        return copy.deepcopy(rng.choice(OTHERS))
    deep: Any = rng.choice([0, "x", None])
    for _ in range(rng.choice([1, 3, 63, 64, 65, 300])):
        deep = [deep] if rng.random() < 0.7 else {"k": deep}
    return deep


def mutate(rng: random.Random, value: Any) -> Any:
    """The value after one to four changes somewhere in it (a copy)."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(value))
        parent, key = rng.choice(places)
        _change(rng, parent, key, places)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(parent, key) of every value inside, outermost first."""
    found, level = [], [value]
    while level:
        inner: list[Any] = []
        for parent in level:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            for key in keys:
                found.append((parent, key))
                if isinstance(parent[key], (dict, list)):
                    inner.append(parent[key])
        level = inner
    return found or [({"": value}, "")]


def _change(rng: random.Random, parent: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    here = parent[key]
    what = rng.randrange(12)
    if what == 0:
        del parent[key]
    elif what <= 3:
        parent[key] = any_value(rng)
    elif what == 4 and type(here) is int:
        parent[key] = rng.choice(
            [
                here + 1,
                here - 1,
                -here,
                here * 2,
                here + 2**32,
                here * 0.5 if abs(here) < 2**99 else 0.5,
                str(here),
                here == 1,
            ]
        )
    elif what == 5 and type(here) is str and here:
        at = rng.randrange(len(here))
        parent[key] = rng.choice(
            [here[:at], here + here[at], here[:at] + rng.choice(TEXTS) + here[at:], here.upper(), here + "\n", [here]]
        )
    elif what == 6 and isinstance(here, list):
        rng.choice([lambda: here.append(any_value(rng)), lambda: here.extend(here[:]), lambda: rng.shuffle(here)])()
    elif what == 7 and isinstance(here, dict):
        here[rng.choice([*TEXTS, *map(str, here)])] = any_value(rng)
    elif what == 8 and isinstance(parent, dict):
        parent[rng.choice([key.upper(), key + " ", key[:-1], key + "\0", rng.choice(TEXTS)])] = parent.pop(key)
    elif what == 9:
        other, place = rng.choice(places)
        if (isinstance(other, dict) and place in other) or (isinstance(other, list) and place < len(other)):
            parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(here)
    elif what == 10:
        parent[key] = [here, copy.deepcopy(here)] if rng.random() < 0.5 else {"value": here}
    elif isinstance(parent, list):
        parent.insert(key, copy.deepcopy(here))
    else:
        parent[key] = rng.choice(NUMBERS)


def _twice(rng: random.Random, text: str) -> str:
    """A key stands twice."""
    if ":" not in text:
        return text * 2
    at = text.index(":")
    return text[:at] + ":" + rng.choice(["0", "null", '"x"']) + "," + text[1:at] + text[at:]


def _number(rng: random.Random, text: str) -> str:
    """A number as JSON's grammar allows it and no writer writes it, or not even that."""
    digits = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1] in ":,["] or [0]
    at = rng.choice(digits)
    new = rng.choice(
        ["1e5", "1E400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 5000, "1.0", "-0", "0x10", "01", "1_0"]
    )
    return text[:at] + new + text[at + 1 :]


def _cut(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return rng.choice([text[:at], text[at:], text[:at] + text[at + 1 :], text + text[:at], text[:at] + " " + text[at:]])


def _noise(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return (
        text[:at]
        + rng.choice(["\0", "\ufeff", "\\", '"', "{", "[" * 2000, "\u2028", "\\ud800", "}", "/**/"])
        + text[at:]
    )


TEXTUAL: list[Callable[[random.Random, str], str]] = [_twice, _number, _number, _cut, _noise]


def mutate_text(rng: random.Random, text: str) -> bytes:
    """JSON text changed without regard to its structure; seldom in an encoding other than UTF-8."""
    changed = rng.choice(TEXTUAL)(rng, text)
    if rng.random() < 0.1:
        return changed.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]), "replace")
    data = bytearray(changed.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2 and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def lenient(data: bytes) -> Any:
    """The value of a text as Python reads it, None where it cannot."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
