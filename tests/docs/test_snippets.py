"""The examples of the README and the guide run as they stand there.

The blocks of a page run in order, in one temporary folder and one namespace: `python` blocks in this process, the
lines of `console` blocks that start with `$ kdcache` as commands, in this process too, since each of its own would
import torch again. A `python` block that starts with `# file: NAME` is written to that file instead. Installation
lines (`pip`, `sh` blocks) are for `.ci/run`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdcache_cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
COMMAND = "$ kdcache "


def commands_of(console: str) -> list[str]:
    """The `kdcache` commands of a console block, continuation lines joined."""
    lines = console.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith(COMMAND)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, Any] = {"__name__": f"{page.stem}_examples"}
    text = page.read_text(encoding="utf-8")
    blocks = [match for match in BLOCK.finditer(text) if match[1] in ("python", "console")]
    assert blocks
    for block in blocks:
        language, source = block.groups()
        if language == "console":
            for command in commands_of(source):
                run_command(command)
        elif name := FILE.match(source):
            Path(name[1]).write_text(source, encoding="utf-8")
            monkeypatch.delitem(sys.modules, Path(name[1]).stem, raising=False)  # another page's file of that name
        else:
            line = text[: block.start()].count("\n") + 1
            exec(compile("\n" * line + source, str(page), "exec"), namespace)


def run_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    assert not {"|", ">", "<", "&&", ";"} & set(words), f"{command}: only a shell could run it"
    done = CliRunner().invoke(cli, words[1:])
    assert done.exit_code == 0, f"$ {command}\n{done.output}"


@pytest.fixture(autouse=True)
def no_module_of_another_page(tmp_path: Path) -> Iterator[None]:
    """Files that a page writes are imported under names that the next page uses again."""
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
