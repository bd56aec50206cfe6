"""Which arrays a shard holds and in which order; layouts that are not a schema's are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError
from kdcache.format.arrays import ArrayLayout
from kdcache.format.dense import Dense
from kdcache.format.schema import RowSchema, schema_from_json
from kdcache.format.topk import TopK

SCHEMA = RowSchema(Dense((10,), "float16"), "<i8", has_labels=True, has_digests=True)


def layouts(schema: RowSchema, rows: int) -> dict[str, ArrayLayout]:
    arrays, offset = {}, 64
    for spec in schema.specs:
        arrays[spec.name] = ArrayLayout(spec.name, spec.dtype, spec.shape(rows), offset)
        offset = arrays[spec.name].stop
    return arrays


def test_the_arrays_stand_in_the_documented_order_with_the_largest_first() -> None:
    assert [(s.name, s.dtype, s.row_shape) for s in SCHEMA.specs] == [
        ("logits", "<f2", (10,)),
        ("row_max", "<f4", ()),
        ("sample_id", "<i8", ()),
        ("label", "<i8", ()),
        ("input_digest", "<u8", ()),
        ("view", "<u2", ()),
        ("row_crc", "<u4", ()),
    ]


def test_the_checksum_covers_identity_first_and_neither_itself_nor_the_view() -> None:
    assert SCHEMA.crc_names == ("sample_id", "label", "input_digest", "row_max", "logits")


def test_optional_arrays_are_left_out() -> None:
    schema = RowSchema(Dense((3, 2), "float32"), "|S16", has_labels=False, has_digests=False)
    assert [s.name for s in schema.specs] == ["logits", "sample_id", "view", "row_crc"]
    assert schema.row_bytes == 24 + 16 + 2 + 4
    assert schema.payload_row_bytes == 24


@given(st.sampled_from(["float16", "float32"]), st.integers(1, 1024), st.booleans(), st.booleans())
def test_a_schema_survives_its_json(dtype: str, width: int, labels: bool, digests: bool) -> None:
    for ids in ("<i8", f"|S{width}"):
        schema = RowSchema(Dense((7, 2), dtype), ids, labels, digests)
        assert schema_from_json(schema.to_json(), where="x") == schema


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "<i4"),
        ("id", "|S0"),
        ("id", "|S1025"),
        ("id", "|S9999999"),
        ("id", "|O"),
        ("id", 8),
        ("labels", 1),
        ("digests", None),
        ("encoding", {"name": "dense", "dtype": "float16", "shape": [-1]}),
        ("encoding", []),
    ],
)
def test_another_schema_is_refused(field: str, value: object) -> None:
    with pytest.raises(CorruptCacheError, match="x: "):
        schema_from_json({**SCHEMA.to_json(), field: value}, where="x")


@pytest.mark.parametrize("field", ["encoding", "id", "labels", "digests"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(CorruptCacheError, match=field):
        schema_from_json({k: v for k, v in SCHEMA.to_json().items() if k != field}, where="x")


def test_its_own_layout_is_accepted_to_the_last_byte() -> None:
    arrays = layouts(SCHEMA, 9)
    size = max(a.stop for a in arrays.values())
    SCHEMA.check_arrays(arrays, 9, size, where="x")
    with pytest.raises(CorruptCacheError, match="row_crc lies outside"):
        SCHEMA.check_arrays(arrays, 9, size - 1, where="x")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("logits", {"dtype": "<f4"}, "array logits is"),
        ("logits", {"shape": (9, 11)}, "array logits is"),
        ("label", {"shape": (8,)}, "array label is"),
        ("label", {"offset": -8}, "outside"),
        ("label", {"offset": 1 << 50}, "outside"),
        ("view", {"offset": 64}, "overlap"),
    ],
)
def test_a_layout_that_is_not_the_schemas_is_refused(name: str, change: dict[str, object], reason: str) -> None:
    arrays = layouts(SCHEMA, 9)
    arrays[name] = replace(arrays[name], **change)
    with pytest.raises(CorruptCacheError, match=reason):
        SCHEMA.check_arrays(arrays, 9, 4096, where="x")


def test_missing_and_further_arrays_are_refused() -> None:
    arrays = layouts(SCHEMA, 9)
    with pytest.raises(CorruptCacheError, match="expected"):
        SCHEMA.check_arrays({k: v for k, v in arrays.items() if k != "view"}, 9, 4096, where="x")
    with pytest.raises(CorruptCacheError, match="more"):
        SCHEMA.check_arrays({**arrays, "more": arrays["view"]}, 9, 4096, where="x")


@pytest.mark.parametrize(("labels", "mixed", "kept"), [(True, False, 1), (True, True, 2), (False, False, 0)])
def test_top_k_rows_keep_the_logits_of_the_labels_that_stand_beside_them(labels: bool, mixed: bool, kept: int) -> None:
    for count in (0, 1, 2):
        encoding = TopK((10,), 3, (1.0,), count)
        value = RowSchema(encoding, "<i8", labels, True, mixed).to_json()
        if count == kept:
            assert schema_from_json(value, where="x").encoding == encoding
        else:
            with pytest.raises(CorruptCacheError, match=f"{count} labels a row, expected {kept}"):
                schema_from_json(value, where="x")
