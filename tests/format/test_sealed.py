"""The files of a dump in progress: what they say comes back, or a typed refusal that tells what to do."""

from __future__ import annotations

import json

import pytest

from kdcache.errors import CorruptCacheError
from kdcache.format.identity import canonical_json
from kdcache.format.sealed import dump_sealed, load_sealed

VALUE = {"file": "v000-00000.h5", "clamped": 0, "ids": None, "scale": 0.5}


def test_what_was_sealed_comes_back() -> None:
    assert load_sealed(dump_sealed(VALUE), where="x", advice="do it again") == VALUE


def test_the_seal_is_the_documented_one() -> None:
    from hashlib import sha256

    assert json.loads(dump_sealed(VALUE))["seal"] == sha256(canonical_json(VALUE).encode()).hexdigest()


def test_no_bit_can_change_unseen() -> None:
    text = dump_sealed(VALUE)
    for bit in range(len(text) * 8):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptCacheError, match=r"x: .*; do it again"):
            load_sealed(bytes(changed), where="x", advice="do it again")


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"{}\n", canonical_json(VALUE).encode() + b"\n", dump_sealed(VALUE)[:-1], dump_sealed(VALUE) + b"\n"],
    ids=["nothing", "empty", "empty line", "no seal", "cut", "longer"],
)
def test_what_is_not_sealed_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptCacheError, match="do it again"):
        load_sealed(text, where="x", advice="do it again")
