"""The small JSON files of a dump in progress (its plan and its commit records), each with a hash of its own content.

What they say decides the bytes of the cache and goes into its manifest. Without the seal, one flipped bit in nine
of a commit record ended in a finished cache whose manifest did not fit its shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.errors import CorruptCacheError
from kdcache.format.identity import canonical_json, fingerprint
from kdcache.format.strict_json import load_json


def dump_sealed(value: Mapping[str, Any]) -> bytes:
    """The bytes of a file: canonical JSON with `seal`, the sha256 of the canonical JSON without it, and a newline."""
    return canonical_json({**value, "seal": fingerprint(dict(value))}).encode() + b"\n"


def load_sealed(text: bytes, *, where: str, advice: str) -> dict[str, Any]:
    """The content of such a file, without its seal.

    Args:
        text: its bytes.
        where: what to call it in an error.
        advice: what to do about a damaged one.

    Raises:
        CorruptCacheError: not, byte by byte, what `dump_sealed` made.
    """
    try:
        value = load_json(text, where=where)
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{error}; {advice}") from None
    seal = value.pop("seal", None)
    if seal != fingerprint(value) or text != dump_sealed(value):
        raise CorruptCacheError(f"{where}: its content does not match its seal, it was edited or damaged; {advice}")
    return value
