"""The root attribute of shards and one-file caches: what it says, how it shrinks, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.headers import MAX_HEADER_BYTES, FileHeader, parse_file_header, shard_header
from kdcache.format.identity import canonical_json
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema

SCHEMA = RowSchema(Dense((3,), "float16"), "<i8", has_labels=True, has_digests=False)
CLASSES = ClassList.of(3, ("cat", "dog", "owl"))
HEADER = FileHeader(SCHEMA, CLASSES, 10, (0, 1), (5, 14), {"teacher": {"spec": "m:f"}}, "ab" * 32)


def parse(value: dict[str, Any], rows: int = 20) -> FileHeader:
    return parse_file_header(canonical_json(value), rows=rows, where="x")


def test_a_file_header_survives_its_text() -> None:
    assert parse_file_header(HEADER.dump(), rows=20, where="x") == HEADER


def test_the_length_of_a_header_does_not_depend_on_the_payload_hash() -> None:
    assert len(HEADER.dump()) == len(replace(HEADER, payload_sha256="0" * 64).dump())


def test_class_names_that_do_not_fit_leave_their_hash_behind() -> None:
    names = tuple(f"a rather long class name {n}" for n in range(3000))
    schema = replace(SCHEMA, encoding=Dense((3000,), "float16"))
    header = replace(HEADER, schema=schema, classes=ClassList.of(3000, names))
    text = header.dump()
    assert len(text) <= MAX_HEADER_BYTES
    assert parse_file_header(text, rows=20, where="x").classes == ClassList(3000, None, header.classes.sha256)


def test_provenance_that_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="keep a folder cache"):
        replace(HEADER, provenance={"note": "x" * 60_000}).dump()


def test_a_shard_says_only_what_determines_its_rows() -> None:
    value = json.loads(shard_header(SCHEMA, CLASSES, {"spec": "m:f"}, view=3, start=40, stop=80))
    assert value == {
        "format": 1,
        "kind": "shard",
        **SCHEMA.to_json(),
        "classes": {"count": 3, "sha256": CLASSES.sha256},
        "teacher": {"spec": "m:f"},
        "view": 3,
        "start": 40,
        "stop": 80,
    }


def test_a_lone_shard_is_refused_with_the_advice_to_open_its_folder() -> None:
    text = shard_header(SCHEMA, CLASSES, {}, view=0, start=0, stop=20)
    with pytest.raises(CorruptCacheError, match="one shard of a folder cache; open the folder"):
        parse_file_header(text, rows=20, where="x")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("format", 2, "format version 2"),
        ("format", None, "format version None"),
        ("kind", "folder", "kind is 'folder'"),
        ("samples", 11, "do not make 20 rows"),
        ("samples", True, "do not make 20 rows"),
        ("samples", 0, "do not make 20 rows"),
        ("views", [0], "do not make 20 rows"),
        ("views", [1, 0], "ascend"),
        ("views", [0, 0], "ascend"),
        ("views", "01", "views must be"),
        ("ids", [5, 15], "id range"),
        ("ids", [5.0, 14.0], "id range"),
        ("ids", [2**63, 2**63 + 9], "id range"),
        ("ids", 5, "id range"),
        ("payload_sha256", "x" * 64, "payload_sha256"),
        ("payload_sha256", None, "payload_sha256"),
        ("provenance", None, "provenance"),
        ("provenance", {"data": []}, "provenance"),
        ("classes", {"count": 4}, "class count"),
        ("id", "|S0", "sample ids of type"),
    ],
)
def test_another_header_is_refused(field: str, value: object, reason: str) -> None:
    with pytest.raises(CorruptCacheError, match=reason):
        parse({**json.loads(HEADER.dump()), field: value})


@given(
    st.sampled_from([*json.loads(HEADER.dump())]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=5)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_change_is_accepted_or_refused_with_a_reason(field: str, value: object) -> None:
    try:
        parsed = parse({**json.loads(HEADER.dump()), field: value})
    except CorruptCacheError:
        return
    assert parsed.samples * len(parsed.views) == 20
