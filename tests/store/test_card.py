"""The card of a folder cache: front matter that dataset hubs can read, and what the rows are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import IncompleteCacheError, UsageError
from kdcache.store.cache import open as open_cache
from kdcache.store.card import render_card, write_card
from kdcache.store.inspect import describe
from kdcache.store.verify import verify


def front_matter(text: str) -> dict[str, str]:
    """The top-level scalars between the two lines of dashes; every quoted one is a JSON string, as in YAML."""
    head = text.split("---\n")[1]
    pairs = [line.split(": ", 1) for line in head.splitlines() if not line.startswith((" ", "-")) and ": " in line]
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def test_a_card_says_what_the_rows_are(make_cache: Any) -> None:
    provenance = {
        "teacher": {"spec": "models:resnet", "state_sha256": "ab" * 32},
        "data": {"name": "cifar10"},
        "teacher_seen": "no",
        "licence": "cc-by-4.0",
    }
    folder = make_cache(provenance=provenance)
    text = write_card(folder).read_text()
    assert text.startswith("---\n")
    assert front_matter(text)["license"] == "cc-by-4.0"
    assert front_matter(text)["pretty_name"] == "teacher"
    for fact in ("models:resnet", "ab" * 32, "cifar10", "| no |", "100 samples", open_cache(folder).root):
        assert fact in text
    assert "shards/*.h5" in text


def test_a_card_leaves_the_cache_as_it_is(folder: Path) -> None:
    root = open_cache(folder).root
    write_card(folder)
    assert verify(folder, expect_root=root).ok
    assert describe(folder)["unlisted"] == []


def test_a_card_that_is_there_is_kept_unless_overwritten(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        write_card(folder)
    assert card.read_text() == "mine"
    assert write_card(folder, overwrite=True).read_text().startswith("---")


def test_only_a_finished_folder_gets_a_card(one_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one file"):
        write_card(one_file)
    with pytest.raises(IncompleteCacheError):
        write_card(tmp_path)


@pytest.mark.parametrize(
    "licence", ["no", "a: b", "[x]", "# none", 'say "yes"', "two\nlines", "back\\slash", "ö", "| a | b |", "---", "`x`"]
)
def test_odd_text_breaks_neither_front_matter_nor_table(folder: Path, licence: str) -> None:
    summary = describe(folder)
    summary["provenance"] = {"teacher": {"spec": licence, "licence": licence}, "data": {"name": licence}}
    text = render_card(summary, name=licence)
    assert text.count("---\n") == 2 or licence == "---"
    assert front_matter(text)["license"] == " ".join(licence.split()).replace("|", "/").replace("`", "'")
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.count("|") == 3


def test_a_cache_that_says_nothing_has_a_card_that_says_unknown(folder: Path) -> None:
    text = write_card(folder).read_text()
    assert front_matter(text)["license"] == "unknown"
    assert "| teacher | unknown |" in text


def test_the_card_of_one_file_speaks_of_a_file(one_file: Path, folder: Path) -> None:
    summary = describe(one_file)
    text = render_card(summary, name="my teacher.h5")
    assert "shard" not in text
    assert 'data_files: "*.h5"' in text
    assert "PATH_OF_THE_FILE" in text
    assert f"kdcache verify 'my teacher.h5' --expect-root {summary['root']}`" in text
    of_folder = render_card(describe(folder), name="teacher")
    assert 'data_files: "shards/*.h5"' in of_folder
    assert "kdcache verify . --expect-root" in of_folder
