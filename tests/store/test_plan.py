"""Plans: how samples are cut into shards, and how two dumps are told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.headers import FileHeader
from kdcache.format.identity import canonical_json
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.format.sealed import dump_sealed
from kdcache.store.plan import (
    Plan,
    default_shard_rows,
    first_difference,
    parse_plan,
    require_same_file,
    require_same_plan,
)

SCHEMA = RowSchema(Dense((3,), "float16"), "<i8", has_labels=True, has_digests=False)
PLAN = Plan(SCHEMA, ClassList.of(3, ("a", "b", "c")), 40, 100, {"teacher": {"spec": "m:f"}}, (0, 2))
JSON = st.recursive(
    st.none() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(st.integers(1, 50), st.integers(1, 500), st.integers(1, 4))
def test_shards_tile_every_view(shard_rows: int, samples: int, views: int) -> None:
    plan = replace(PLAN, shard_rows=shard_rows, samples=samples, views=tuple(range(views)))
    spans = [plan.span(n) for n in range(plan.shard_count)]
    covered = [(view, i) for view, start, stop in spans for i in range(start, stop)]
    assert covered == [(view, i) for view in range(views) for i in range(samples)]
    assert all(start % shard_rows == 0 and stop - start <= shard_rows for _, start, stop in spans)


@given(st.integers(1, 1 << 32))
def test_a_shard_is_at_most_256_mib_by_default_and_holds_a_row(row_bytes: int) -> None:
    rows = default_shard_rows(row_bytes)
    assert 1 <= rows <= 1 << 17
    assert rows == 1 or rows * row_bytes <= 256 << 20
    assert rows < 4096 or rows % 4096 == 0


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, samples=None, views=(0,), classes=ClassList(3))])
def test_a_plan_survives_its_bytes(plan: Plan) -> None:
    assert parse_plan(plan.dump(), where="x") == plan


def test_the_number_of_shards_is_unknown_before_the_end() -> None:
    with pytest.raises(UsageError, match="not known before"):
        _ = replace(PLAN, samples=None).shard_count
    with pytest.raises(UsageError, match="at least 1"):
        replace(PLAN, shard_rows=0)


@pytest.mark.parametrize("field", [*PLAN.to_json()])
@pytest.mark.parametrize("value", [..., None, -1, "x", [], {}, [0.5], True])
def test_a_damaged_plan_is_corrupt_and_nothing_else(field: str, value: Any) -> None:
    damaged = PLAN.to_json()
    if value is ...:
        del damaged[field]
    else:
        damaged[field] = value
    if (field, value) in [("samples", None), ("samples", ...), ("provenance", {}), ("labels", True), ("digests", True)]:
        return  # these are plans
    with pytest.raises(CorruptCacheError, match="x: "):
        parse_plan(dump_sealed(damaged), where="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_rows": 41}, "shard_rows is 40 there and 41"),
        ({"samples": 101}, "samples is 100 there and 101"),
        ({"views": (0,)}, "views is"),
        ({"provenance": {"teacher": {"spec": "m:g"}}}, "provenance.teacher.spec is 'm:f' there and 'm:g'"),
        ({"provenance": {}}, "provenance.teacher is"),
        ({"classes": ClassList.of(3, ("a", "b", "d"))}, "classes.names is"),
        ({"schema": replace(SCHEMA, has_labels=False)}, "labels is True there and False"),
        ({"schema": replace(SCHEMA, encoding=Dense((3,), "float32"))}, "encoding.dtype is 'float16' there"),
    ],
)
def test_another_plan_is_refused_by_the_first_field_that_differs(change: dict[str, Any], message: str) -> None:
    require_same_plan(PLAN, replace(PLAN), where="x")
    with pytest.raises(MismatchError, match=message):
        require_same_plan(PLAN, replace(PLAN, **change), where="x")


def test_the_process_at_work_is_named_and_overwriting_is_advised_only_where_there_is_none() -> None:
    other = replace(PLAN, shard_rows=41)
    with pytest.raises(MismatchError, match="--overwrite to replace it"):
        require_same_plan(PLAN, other, where="x")
    with pytest.raises(MismatchError, match=r"41 in this command.*, and process 77 is at work on it") as raised:
        require_same_plan(PLAN, other, where="x", holder=77)
    assert "--overwrite" not in str(raised.value)


@given(JSON, st.dictionaries(st.text(max_size=2), JSON, max_size=3))
def test_a_field_that_is_not_known_yet_differs_from_nothing(left: Any, more: dict[str, Any]) -> None:
    found = {**more, "a": left}
    assert first_difference(found, {}, is_partial=True) is None
    assert first_difference(found, {"a": left}, is_partial=True) is None
    assert first_difference(found, found, is_partial=True) is None
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, is_partial=True) == ("a.b", 1, 3)


def test_a_finished_file_is_compared_without_its_shards() -> None:
    header = FileHeader(SCHEMA, PLAN.classes, 100, (0, 2), (0, 99), PLAN.provenance)
    require_same_file(header, replace(PLAN, shard_rows=7), where="x")
    require_same_file(replace(header, classes=replace(PLAN.classes, names=None)), PLAN, where="x")
    with pytest.raises(MismatchError, match="samples is 99"):
        require_same_file(replace(header, samples=99), PLAN, where="x")
    with pytest.raises(MismatchError, match=r"classes\.sha256"):
        require_same_file(replace(header, classes=ClassList(3, None, "0" * 64)), PLAN, where="x")


@given(JSON, JSON)
def test_the_first_difference_is_none_for_equal_values_only(left: Any, right: Any) -> None:
    assert first_difference(left, left) is None
    found = first_difference({"a": left}, {"a": right})
    # A missing field and None are one thing here: both mean "not said".
    if canonical_json(left) != canonical_json(right) and "null" not in canonical_json([left, right]):
        assert found is None or found[0].startswith("a")
    if left == right:
        assert found is None
