"""Manifests: the same bytes for the same content, one root hash over it, and nothing else accepted."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError
from kdcache.format.arrays import ArrayLayout
from kdcache.format.dense import Dense
from kdcache.format.identity import canonical_json, fingerprint
from kdcache.format.manifest import ClassList, Manifest, ShardRecord, parse_manifest, seal, shard_name
from kdcache.format.schema import RowSchema

SCHEMA = RowSchema(Dense((3,), "float16"), "<i8", has_labels=True, has_digests=False)


def record(view: int, start: int, stop: int, index: int) -> ShardRecord:
    arrays, offset = {}, 4096
    for spec in SCHEMA.specs:
        arrays[spec.name] = ArrayLayout(spec.name, spec.dtype, spec.shape(stop - start), offset)
        offset = -(-arrays[spec.name].stop // 8) * 8
    hashes = {"sha256": fingerprint([view, start]), "header_blake2b": fingerprint([stop])}
    return ShardRecord(
        shard_name(view, index), view, start, stop, offset, arrays=arrays, ids=(start, stop - 1), **hashes
    )


MANIFEST = Manifest(
    schema=SCHEMA,
    classes=ClassList.of(3, ("cat", "dög", "owl")),
    samples=10,
    views=(0, 2),
    shard_rows=6,
    provenance={"teacher": {"spec": "m:f"}, "data": {"rows": 10}, "note": ["a", 1, 2.5, None]},
    shards=(record(0, 0, 6, 0), record(0, 6, 10, 1), record(2, 0, 6, 0), record(2, 6, 10, 1)),
    created="2024-01-01T00:00:00Z",
)


def sealed(value: dict[str, Any]) -> bytes:
    """The text of a changed manifest with both hashes put right, as an attacker would."""
    body = {k: v for k, v in value.items() if k not in ("created", "root", "seal")}
    root = fingerprint(body)
    ends = {"root": root, "seal": fingerprint([value.get("created"), root])}
    return canonical_json({**value, **ends}).encode() + b"\n"


def test_a_manifest_survives_its_text() -> None:
    parsed = parse_manifest(MANIFEST.dump(), where="x")
    assert parsed == MANIFEST
    assert parsed.root == MANIFEST.sealed().root
    assert parsed.dump() == MANIFEST.dump()


def test_the_root_hash_is_the_documented_one_and_leaves_the_date_out() -> None:
    value = json.loads(MANIFEST.dump())
    body = {k: v for k, v in value.items() if k not in ("created", "root", "seal")}
    assert value["root"] == fingerprint(body)
    assert value["seal"] == seal("2024-01-01T00:00:00Z", value["root"])
    later = replace(MANIFEST, created="2030-01-01T00:00:00Z").sealed()
    assert later.root == value["root"]
    assert replace(MANIFEST, provenance={}).sealed().root != value["root"]


def test_no_bit_of_a_manifest_can_change_unseen() -> None:
    text = MANIFEST.dump()
    for position in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[position] ^= 1 << bit
            with pytest.raises(CorruptCacheError):
                parse_manifest(bytes(changed), where="x")


@given(st.integers(0, len(MANIFEST.dump()) - 1))
def test_a_truncated_manifest_is_refused(length: int) -> None:
    with pytest.raises(CorruptCacheError):
        parse_manifest(MANIFEST.dump()[:length], where="x")


def test_the_same_content_in_other_words_is_refused() -> None:
    with pytest.raises(CorruptCacheError, match="canonical"):
        parse_manifest(json.dumps(json.loads(MANIFEST.dump()), indent=1).encode(), where="x")


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, part in inner for p in paths(part, (*path, key)))]


TREE = json.loads(MANIFEST.dump())
PLACES = [p for p in paths(TREE) if p]
NASTY = (
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.sampled_from([2**31, 2**47, 2**48, 2**63, 10**19, 0.5, "", "x", "<f2", "|O", "../x.h5", "v000-00000.h5"])
    | st.sampled_from([[], [0], [[0]], {}, {"a": 1}, [0, 1, 2]])
)


@given(st.data())
def test_a_resealed_change_is_accepted_or_refused_with_a_reason(data: st.DataObject) -> None:
    value = copy.deepcopy(TREE)
    for path in data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        target = value
        for key in path[:-1]:
            try:
                target = target[key]
            except (TypeError, KeyError, IndexError):
                break
        else:
            if isinstance(target, (dict, list)) and (isinstance(target, dict) or path[-1] in range(len(target))):
                if data.draw(st.booleans()):
                    target[path[-1]] = data.draw(NASTY)
                elif isinstance(target, dict):
                    target.pop(path[-1], None)
                else:
                    del target[path[-1]]
    try:
        parsed = parse_manifest(sealed(value), where="x")
    except CorruptCacheError:
        return
    assert sum(r.rows for r in parsed.shards) == parsed.samples * len(parsed.views)


@pytest.mark.parametrize(
    ("path", "new", "reason"),
    [
        (("format",), 2, "format version 2"),
        (("format",), True, "format version True"),
        (("kind",), "shard", "kind is 'shard'"),
        (("samples",), 11, "shards have 6"),
        (("samples",), -1, "samples must be"),
        (("views",), [2, 0], "ascend"),
        (("views",), [0], "starts at sample"),
        (("views",), [], "views must be"),
        (("views",), [0, 65_536], "views must be"),
        (("classes", "count"), 4, "class count"),
        (("classes", "names"), ["cat", "dog", "owl"], "class names"),
        (("classes", "names"), [1, 2, 3], "class names"),
        (("provenance",), [], "provenance"),
        (("provenance", "teacher"), "resnet", "provenance"),
        (("shards", 0, "file"), "../../etc/passwd", "file name"),
        (("shards", 0, "file"), "v000-00001.h5", "listed twice"),
        (("shards", 1, "start"), 5, "expected|shape"),
        (("shards", 0, "ids"), [0, 6], "id range"),
        (("shards", 0, "ids"), [0], "id range"),
        (("shards", 0, "sha256"), "0" * 63, "sha256"),
        (("shards", 0, "size"), 100, "outside the file"),
        (("shards", 0, "arrays", "logits"), [4096, "<f2", [6, 4]], "logits"),
        (("shards", 0, "arrays", "logits"), [4096, "O", [6, 3]], "logits"),
        (("shards", 0, "arrays", "view"), [4096, "<u2", [6]], "overlap"),
        (("predecessor",), "x", "predecessor"),
        (("created",), 5, "created"),
    ],
)
def test_a_resealed_lie_is_named(path: tuple[Any, ...], new: object, reason: str) -> None:
    value = copy.deepcopy(TREE)
    target = value
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    with pytest.raises(CorruptCacheError, match=reason):
        parse_manifest(sealed(value), where="x")


def test_a_vocabulary_leaves_the_manifest_for_a_file_of_its_own() -> None:
    names = tuple(f"token number {n}" for n in range(5000))
    classes = ClassList.of(5000, names)
    assert classes.own_file == canonical_json(list(names)).encode()
    assert MANIFEST.classes.own_file is None
