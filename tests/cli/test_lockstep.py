"""Commands, their help, their page of the documentation and their tests stay together."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

from kdcache_cli.command import Command
from kdcache_cli.main import COMMANDS, cli, module_of

ROOT = Path(__file__).parents[2]


def command_named(name: str) -> Command:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    return command


def page_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_of_a_command_is_listed() -> None:
    shared = {"__init__", "main", "command", "config", "output", "records"}
    modules = {path.stem for path in (ROOT / "cli" / "kdcache_cli").glob("*.py")}
    assert modules - shared == {module_of(name) for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_gives_examples_of_itself(name: str) -> None:
    command = command_named(name)
    assert command.name == name
    assert len(command.get_short_help_str()) > 20
    assert command.examples
    assert all(f"kdcache {name}" in example for example in command.examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    options = [parameter for parameter in command_named(name).params if isinstance(parameter, click.Option)]
    assert not [option.name for option in options if not option.help]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_on_demand_and_tells_its_settings(name: str) -> None:
    names = {parameter.name for parameter in command_named(name).params}
    assert {"as_json", "config_file", "print_config"} <= names


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_test_of_its_own(name: str) -> None:
    path = ROOT / "tests" / "cli" / f"test_{name}.py"
    assert path.exists()
    assert f'"{name}"' in path.read_text(encoding="utf-8")


def test_the_page_of_the_commands_is_current() -> None:
    generator = page_generator()
    message = "docs/cli.md is out of date; run: python docs/generate_cli.py"
    assert generator.PAGE.read_text(encoding="utf-8") == generator.render(), message


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_section_in_the_documentation(name: str) -> None:
    assert f"\n## kdcache {name}\n" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
