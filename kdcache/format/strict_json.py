"""JSON as we read it from files that others may have written: small, flat, without surprises."""

from __future__ import annotations

import json
import math
from typing import Any

from kdcache.errors import CorruptCacheError

MAX_JSON_BYTES = 256 << 20
_MAX_DIGITS = 20
_MAX_DEPTH = 64


def load_json(text: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptCacheError: not UTF-8, not an object, duplicate keys, NaN or infinities (a float that is too
            large is one), integers of more than 20 digits, nesting above 64 levels, above 256 MiB.
    """
    if len(text) > MAX_JSON_BYTES:
        raise CorruptCacheError(f"{where}: {len(text)} bytes of JSON, more than the limit of {MAX_JSON_BYTES}")

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
        value = float(digits)
        return value if math.isfinite(value) else constant(digits[:30])

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=integer,
            parse_float=real,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: not readable as JSON ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise CorruptCacheError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if _deeper_than(value, _MAX_DEPTH):
        raise CorruptCacheError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
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
