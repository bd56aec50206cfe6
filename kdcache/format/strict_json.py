"""JSON as we read it from files that others may have written: small, flat, without surprises."""

from __future__ import annotations

import json
from typing import Any

from kdcache.errors import CorruptCacheError

MAX_JSON_BYTES = 256 << 20
_MAX_DIGITS = 20


def load_json(text: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptCacheError: not UTF-8, not an object, duplicate keys, NaN or infinities, integers of more
            than 20 digits, nesting too deep, above 256 MiB.
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

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: not readable as JSON ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise CorruptCacheError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
