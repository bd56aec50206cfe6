"""What a foreign file holds, for people; the reading process is not trusted to send a listing."""

from __future__ import annotations

from typing import Any

import pytest

from kdcache.store.foreign_listing import render_listing


def entry(name: str, shape: list[Any], dtype: str) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype}


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f8", "F32", "BF16"])
@pytest.mark.parametrize("label", ["int64", "uint8", ">i4", "I64", "U8"])
def test_the_example_takes_the_first_floats_of_two_dimensions_and_integers_of_as_many_rows(
    dtype: str, label: str
) -> None:
    listing = [
        entry("ids", [9], "<U6"),
        entry("weights", [9], dtype),
        entry("steps", [4], label),
        entry("the logits", [9, 3], dtype),
        entry("y", [9], label),
    ]
    assert render_listing(listing).endswith("\nfor example: --logits 'the logits' --labels y")


@pytest.mark.parametrize("dtype", ["int64", "|S3", "<U3", "F8_E4M3", "text", "link", "complex64"])
def test_there_is_no_example_without_logits(dtype: str) -> None:
    assert "for example" not in render_listing([entry("a", [9, 3], dtype)])


@pytest.mark.parametrize("listing", [None, 3, "text", {}, [], [1, None, []]])
def test_what_is_no_listing_is_nothing_that_can_be_read(listing: Any) -> None:
    assert render_listing(listing) == "  nothing that can be read"


def test_names_are_cut_and_told_in_letters_that_a_terminal_does_not_obey() -> None:
    text = render_listing([entry("a\x1b[2J\n" * 50, ["x", -1, 2**70, 5], "b\x07"), {"name": 5}])
    assert "\x1b" not in text
    assert "\x07" not in text
    assert len(text.splitlines()) == 2
    assert len(text) < 400


def test_a_long_listing_is_cut() -> None:
    listing = [entry(f"a{number}", [1], "int8") for number in range(200)]
    assert render_listing(listing).splitlines()[-1] == "  ... and 160 or more others"
