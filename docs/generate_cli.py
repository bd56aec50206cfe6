"""Writes docs/cli.md from the commands: `python docs/generate_cli.py`. A test fails while the page is out of date."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli.command import Command
from kdcache_cli.main import COMMANDS, cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100

INTRODUCTION = """\
# Command line

<!-- Written by docs/generate_cli.py from the commands themselves. -->

Results go to stdout, everything else to stderr; `--json` prints one JSON object on stdout.

Every option can also be set in the environment and in a TOML file. Of several settings the first in this list wins:

1. the command line: `--batch-size 64`
2. the variable of the command: `KDCACHE_DISTILL_BATCH_SIZE=64`
3. the variable for all commands: `KDCACHE_BATCH_SIZE=64`
4. the command's table in the file of `--config`: `[distill]` with `batch-size = 64`
5. the default

`--print-config` prints what is in force and where it comes from, as a file that `--config` reads.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error: the disk, the data, the teacher's output, a factory that raised |
| 2 | usage: an option or a call that cannot be meant, a missing extra |
| 3 | corrupt: bytes that are not what kdcache wrote |
| 4 | incomplete: a dump that is not finished, a shard that is not there |
| 5 | mismatch: teacher, data, classes or view do not belong together |
| 75 | interrupted and resumable: run the same command again |

`KDCACHE_DEBUG=1` prints the traceback of an error as well.
"""


def render() -> str:
    """The whole page."""
    root = click.Context(cli, info_name="kdcache", **cli.context_settings)
    return "\n".join([INTRODUCTION, *(_section(root, name) for name in COMMANDS)])


def _section(root: click.Context, name: str) -> str:
    command = cli.get_command(root, name)
    assert isinstance(command, Command), name
    context = click.Context(command, parent=root, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"## kdcache {name}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
