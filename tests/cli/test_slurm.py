"""The example scripts for SLURM use options that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from kdcache_cli.main import COMMANDS, cli

SCRIPTS = sorted((Path(__file__).parents[2] / "cli" / "slurm").glob("*.sbatch"))
CALL = re.compile(r"kdcache (\w+)((?:[^\n\\]|\\\n)*)")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_shell_accepts_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_of_a_call_is_one_of_the_command(script: Path) -> None:
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    calls = [(name, rest) for name, rest in CALL.findall("\n".join(lines)) if name in COMMANDS]
    assert calls
    for name, rest in calls:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known
