"""The scripts that let shells complete `kdcache`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache_cli.completion import SHELLS, completion_script
from kdcache_cli.main import cli

STORED = Path(__file__).parents[2] / "cli" / "completions"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_stored_script_is_what_the_command_prints(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert (STORED / f"kdcache.{shell}").read_text(encoding="utf-8") == result.stdout


def test_json_holds_the_script() -> None:
    result = CliRunner().invoke(cli, ["completion", "fish", "--json"])
    assert json.loads(result.stdout) == {"shell": "fish", "script": completion_script("fish")}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_accepts_the_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(STORED / f"kdcache.{shell}")], check=True)


def test_an_unknown_shell_is_a_usage_error_that_lists_the_known() -> None:
    result = CliRunner().invoke(cli, ["completion", "csh"])
    assert result.exit_code == 2
    assert "bash" in result.stderr
