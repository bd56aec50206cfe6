"""Where the options of a command come from, and in which order they win."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache_cli import main
from kdcache_cli.command import define, variables_of
from kdcache_cli.config import read_toml

needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")


@define("inspect", examples=("kdcache inspect",))
@click.option("--batch-size", type=int, default=8)
@click.option("--device", default=None)
@click.option("--overwrite", is_flag=True)
@click.option("--cache", multiple=True)
def sample(as_json: bool, **options: Any) -> None:
    """A command with an option of each kind."""
    click.echo(json.dumps(options))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the sample command with the text of a config file, arguments and variables of the environment."""
    monkeypatch.setattr(main.CommandGroup, "get_command", lambda *_: sample)

    def invoke(toml: str, *arguments: str, **env: str) -> Result:
        path = tmp_path / "run.toml"
        path.write_text(toml, encoding="utf-8")
        return CliRunner().invoke(main.cli, ["inspect", "--config", str(path), *arguments], env=env)

    return invoke


@needs_tomllib
def test_a_table_of_the_file_sets_the_options_of_the_command(run) -> None:
    result = run('[inspect]\nbatch-size = 4\noverwrite = true\ncache = ["a.h5", "b.h5"]\n[distill]\nalpha = 1\n')
    assert json.loads(result.stdout) == {
        "batch_size": 4,
        "device": None,
        "overwrite": True,
        "cache": ["a.h5", "b.h5"],
    }


@needs_tomllib
def test_command_line_wins_over_environment_over_file_over_default(run) -> None:
    toml = "[inspect]\nbatch_size = 1\n"
    specific, general = {"KDCACHE_INSPECT_BATCH_SIZE": "2"}, {"KDCACHE_BATCH_SIZE": "3"}
    assert json.loads(run("").stdout)["batch_size"] == 8
    assert json.loads(run(toml).stdout)["batch_size"] == 1
    assert json.loads(run(toml, **general).stdout)["batch_size"] == 3
    assert json.loads(run(toml, **general, **specific).stdout)["batch_size"] == 2
    assert json.loads(run(toml, "--batch-size", "5", **general, **specific).stdout)["batch_size"] == 5


@needs_tomllib
def test_print_config_names_the_source_of_each_setting_and_runs_nothing(run) -> None:
    result = run("[inspect]\nbatch-size = 4\n", "--cache", "a.h5", "--print-config", KDCACHE_OVERWRITE="1")
    assert result.stdout.splitlines() == [
        "[inspect]",
        "batch-size = 4  # config file",
        "# device is not set",
        "overwrite = true  # environment",
        'cache = ["a.h5"]  # command line',
        "json = false  # default",
    ]


@needs_tomllib
def test_what_print_config_prints_is_a_config_file_of_the_same_settings(run) -> None:
    printed = run('[inspect]\ncache = ["naïve \\"quoted\\".h5"]\ndevice = "cpu"\n', "--print-config").stdout
    again = run(printed, "--print-config").stdout
    assert [line.partition("  #")[0] for line in again.splitlines()] == [
        line.partition("  #")[0] for line in printed.splitlines()
    ]


@needs_tomllib
def test_print_config_with_json_prints_one_object(run) -> None:
    settings = json.loads(run("[inspect]\nbatch-size = 4\n", "--print-config", "--json").stdout)
    assert settings["batch-size"] == {"value": 4, "source": "config file"}
    assert settings["device"] == {"value": None, "source": "default"}


@needs_tomllib
@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[inspect]\nbatchsize = 4\n", "no option 'batchsize'"),
        ("[inspect]\nbatch-size = [4]\n", "expected a single value"),
        ('[inspect]\ncache = "a.h5"\n', "expected a list"),
        ("[inspect.device]\nx = 1\n", "expected a single value"),
        ("[inspect]\nprint-config = true\n", "no option 'print-config'"),
        ("batch-size = 4\n", "expected a table named as a command"),
        ("[inspct]\n", "expected a table named as a command"),
        ("[inspect\n", "is not TOML"),
        ('[inspect]\nbatch-size = "many"\n', "not a valid integer"),
    ],
)
def test_a_file_that_cannot_be_meant_is_a_usage_error_that_names_it(run, toml: str, message: str) -> None:
    result = run(toml)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@needs_tomllib
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_usage_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("toml") / "any.toml"
    path.write_bytes(content)
    with contextlib.suppress(UsageError):
        assert isinstance(read_toml(path), dict)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_toml(tmp_path / "absent.toml")


def test_the_variable_with_the_name_of_the_command_comes_first() -> None:
    assert variables_of("distill", "val-cache") == ["KDCACHE_DISTILL_VAL_CACHE", "KDCACHE_VAL_CACHE"]
