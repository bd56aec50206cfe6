"""Results as JSON that any parser reads, and as lines for people."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache_cli.output import is_first_process, to_json, to_lines

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


@pytest.mark.parametrize(
    ("environ", "prints"),
    [
        ({}, (True, True)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, (True, True)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (False, False)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (True, True)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (False, True)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "2"}, (True, True)),
    ],
)
def test_one_process_of_a_command_prints(
    environ: dict[str, str], prints: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert (is_first_process(slurm=True), is_first_process(slurm=False)) == prints


def test_long_lists_are_cut_with_their_length() -> None:
    assert list(to_lines({"ids": list(range(100))})) == ["ids: 0, 1, 2, 3, 4, 5, 6, 7, ... (100)"]


def test_what_a_terminal_would_obey_is_escaped() -> None:
    result = {"name\x1b[2J": "a\nb\x9b31m\u202e", "inner": {"\r": ["\x07"]}}
    assert list(to_lines(result)) == ["name\\x1b[2J: a\\nb\\x9b31m\\u202e", "inner:", "  \\r: \\x07"]
    assert to_json(result).isprintable()
    assert json.loads(to_json(result)) == result


def test_what_is_empty_has_a_dash() -> None:
    assert list(to_lines({"best": {}, "steps": 2})) == ["best:  -", "steps: 2"]
