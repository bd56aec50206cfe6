"""`kdcache card`."""

from __future__ import annotations

import json
from pathlib import Path

import kdcache


def test_the_card_of_a_folder_is_written_into_it(run, folder: Path) -> None:
    result = run("card", folder, "--json")
    assert result.exit_code == 0
    path = Path(json.loads(result.stdout)["path"])
    assert path == folder / "README.md"
    assert path.read_text().startswith("---\n")
    assert kdcache.open(folder).root in path.read_text()
    assert kdcache.verify(folder).ok


def test_a_card_that_is_there_is_replaced_only_when_asked_for(run, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    assert run("card", folder).exit_code == 2
    assert (folder / "README.md").read_text() == "mine"
    assert run("card", folder, "--overwrite").exit_code == 0


def test_print_shows_the_card_and_writes_nothing(run, folder: Path) -> None:
    assert "# Teacher logits: teacher" in run("card", folder, "--print").stdout
    assert not (folder / "README.md").exists()
