"""JSON as we read it from files that others may have written: small, flat, without surprises.

The limits hold for the largest manifest that a cache may have (8,192 shards, about 6 MB), and keep the worst file that
they let through below half a second and 150 MiB: Python needs 64 bytes for a `[]`, and an emoji of 4 bytes is 12 in the
canonical text that is hashed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from kdcache.errors import CorruptCacheError

MAX_JSON_BYTES = 12 << 20
MAX_JSON_VALUES = 750_000
_MAX_DIGITS = 20
_MAX_NUMBER_LENGTH = 40
_MAX_DEPTH = 64
_LONG_NUMBER = re.compile(rb"\d{%d}" % (_MAX_DIGITS + 1))


def load_json(text: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptCacheError: not UTF-8, not an object, duplicate keys, NaN or infinities (a float that is too
            large is one), integers of more than 20 digits, halves of surrogate pairs, nesting above 64 levels,
            more than 12 MiB or 750,000 values.
    """
    if len(text) > MAX_JSON_BYTES:
        raise CorruptCacheError(f"{where}: {len(text)} bytes of JSON, more than the limit of {MAX_JSON_BYTES}")
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > MAX_JSON_VALUES:  # counted in the raw text, where a comma may also stand in a name
        raise CorruptCacheError(f"{where}: about {values} values of JSON, more than the limit of {MAX_JSON_VALUES}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CorruptCacheError(f"{where}: a key stands twice in one object")
        return result

    def constant(name: str) -> Any:
        raise CorruptCacheError(f"{where}: {name} is not allowed")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise CorruptCacheError(f"{where}: an integer of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        if len(digits) > _MAX_NUMBER_LENGTH:
            raise CorruptCacheError(f"{where}: a number of {len(digits)} characters")
        value = float(digits)
        return value if math.isfinite(value) else constant(digits)

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=integer if _LONG_NUMBER.search(text) else None,  # a call for each integer is half of the time
            parse_float=real,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: not readable as JSON ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise CorruptCacheError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if _deeper_than(value, _MAX_DEPTH):
        raise CorruptCacheError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
    if (b"\\ud" in text or b"\\uD" in text) and not _is_unicode(value):
        raise CorruptCacheError(f"{where}: half of a surrogate pair, which is no text")
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other more than `levels` deep, level by level, without recursion."""
    level = [value]
    for _ in range(levels):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return False
    return True


def _is_unicode(value: Any) -> bool:
    """Whether all text in a JSON value can be encoded: to print it, or to write it into a file."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
