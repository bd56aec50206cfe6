"""Options from a TOML file, and the settings in force written as one.

What `--print-config` prints is a file that `--config` reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdcache.errors import UsageError
from kdcache_cli.output import to_json

SOURCES = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "config file",
}
NOT_SETTINGS = {"config", "print-config"}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; UsageError where it is missing, is not TOML, or Python is too old to read it."""
    try:
        return _parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}. Give the path of a TOML file.") from error
    except ValueError as error:  # includes what is not UTF-8
        raise UsageError(f"--config {path} is not TOML: {error}.") from error


def load_defaults(path: Path, ctx: click.Context) -> dict[str, Any]:
    """The settings of a command in a file, by parameter name, as click's `default_map` takes them."""
    tables = read_toml(path)
    commands = _command_names(ctx)
    for name, table in tables.items():
        if not isinstance(table, dict) or name not in commands:
            raise UsageError(f"--config {path}: found {name!r}, expected a table named as a command: {commands}.")
    options = settings_of(ctx.command)
    defaults: dict[str, Any] = {}
    for key, given in tables.get(str(ctx.command.name), {}).items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            raise UsageError(f"--config {path}: [{ctx.command.name}] has no option {key!r}, only {sorted(options)}.")
        takes_one = isinstance(given, str) and getattr(option, "takes_one", False)
        value = [given] if takes_one else given
        if isinstance(value, dict) or isinstance(value, list) != option.multiple:
            wanted = "a list" if option.multiple else "a single value"
            raise UsageError(f"--config {path}: [{ctx.command.name}] {key} = {value!r}, expected {wanted}.")
        defaults[str(option.name)] = value
    return defaults


def settings_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a file may set, by their long names without the dashes."""
    options = {max(p.opts, key=len).lstrip("-"): p for p in command.params if isinstance(p, click.Option)}
    return {name: option for name, option in options.items() if name not in NOT_SETTINGS}


def render_settings(ctx: click.Context, *, as_json: bool) -> str:
    """The options of a command, their values and where each comes from, as TOML or as one JSON object."""
    rows: dict[str, dict[str, Any]] = {}
    for name, option in settings_of(ctx.command).items():
        where = ctx.get_parameter_source(str(option.name))
        source = SOURCES.get(where, "default") if where is not None else "default"
        rows[name] = {"value": _plain(ctx.params[str(option.name)]), "source": source}
    if as_json:
        return to_json(rows)
    lines = [f"[{ctx.command.name}]"]
    for name, row in rows.items():
        if row["value"] is None:
            lines.append(f"# {name} is not set")
        else:
            lines.append(f"{name} = {json.dumps(row['value'], ensure_ascii=False)}  # {row['source']}")
    return "\n".join(lines)


def _command_names(ctx: click.Context) -> list[str]:
    if ctx.parent is not None and isinstance(ctx.parent.command, click.Group):
        return ctx.parent.command.list_commands(ctx.parent)
    return [str(ctx.command.name)]


def _plain(value: Any) -> Any:
    """A value as TOML and JSON know it."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


if sys.version_info >= (3, 11):
    import tomllib

    def _parse_toml(text: str) -> dict[str, Any]:
        return tomllib.loads(text)

else:

    def _parse_toml(text: str) -> dict[str, Any]:
        raise UsageError(
            f"--config needs Python 3.11 or newer to read TOML, this is {sys.version.split()[0]}. "
            "Set the options on the command line or as KDCACHE_* variables instead."
        )
