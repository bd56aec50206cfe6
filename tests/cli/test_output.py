"""Results as JSON that any parser reads, and as lines for people."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kdcache_cli.output import to_json, to_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(VALUES)
def test_any_nested_value_is_one_line_of_strict_json(value: object) -> None:
    text = to_json(value)
    assert "\n" not in text
    json.loads(text, parse_constant=refuse)


def test_numbers_that_json_lacks_become_null_and_paths_become_text() -> None:
    assert json.loads(to_json({"loss": math.nan, "best": math.inf, "out": Path("runs/a")})) == {
        "loss": None,
        "best": None,
        "out": "runs/a",
    }


def test_lines_are_aligned_and_inner_mappings_are_indented() -> None:
    result = {"rows": 3, "root": None, "teacher": {"spec": "py:a:b", "seen": False}, "loss": 0.25, "views": [0, 1]}
    assert list(to_lines(result)) == [
        "rows:  3",
        "root:  -",
        "teacher:",
        "  spec: py:a:b",
        "  seen: no",
        "loss:  0.25",
        "views: 0, 1",
    ]


def test_long_lists_are_cut_with_their_length() -> None:
    assert list(to_lines({"ids": list(range(100))})) == ["ids: 0, 1, 2, 3, 4, 5, 6, 7, ... (100)"]
