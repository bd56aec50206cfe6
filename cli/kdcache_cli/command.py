"""What all commands share: `--json`, `--config`, `--print-config`, variables of the environment, and examples.

Precedence: command line, then `KDCACHE_<COMMAND>_<OPTION>`, then `KDCACHE_<OPTION>`, then the table of the command in
the file of `--config`, then the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kdcache_cli.config import load_defaults, render_settings
from kdcache_cli.output import WANTS_JSON
from kdcache_cli.records import RecordOption, record_options


class Command(click.Command):
    """A click command with the shared options and at least one example in its help."""

    def __init__(
        self, *args: Any, examples: tuple[str, ...] = (), record: type[Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.own = [*self.params, *(record_options(record) if record else [])]
        self.params = [*self.own, *_shared_options()]
        for parameter in self.params:
            if isinstance(parameter, click.Option) and parameter.envvar is None:
                parameter.envvar = variables_of(str(self.name), option_name(parameter))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under the headings of their groups; those of all commands come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                groups.setdefault(self._heading(parameter), []).append(row)
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def _heading(self, parameter: click.Parameter) -> str:
        if isinstance(parameter, RecordOption):
            return parameter.group.capitalize()
        return "Options" if parameter in self.own else "Every command"

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are typed."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")  # one line, to be copied

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or print its settings when `--print-config` asks for that."""
        ctx.params.pop("config_file")
        if ctx.params.pop("print_config"):
            click.echo(render_settings(ctx, as_json=ctx.params["as_json"]))
            return None
        ctx.meta[WANTS_JSON] = ctx.params["as_json"]
        self._warn_of_unknown_variables()
        return super().invoke(ctx)

    def _warn_of_unknown_variables(self) -> None:
        """A misspelt variable would otherwise do nothing, silently; one of another command is fine."""
        known = {name for p in self.params for name in (p.envvar or ())}
        mine = f"KDCACHE_{self.name}_".upper()
        for name in sorted(os.environ):
            if name.startswith(mine) and name not in known:
                click.echo(f"Warning: the variable {name} sets no option of {self.name}.", err=True)


class CachePath(click.Path):
    """The path of a cache; an empty one, of a variable that is not set, would mean the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A `Path`; refuses an empty text."""
        if value == "":
            self.fail("the path is empty: name a cache", param, ctx)
        return super().convert(value, param, ctx)


def define(
    name: str, *, examples: tuple[str, ...], record: type[Any] | None = None
) -> Callable[[Callable[..., None]], Command]:
    """A decorator that makes a `Command`; the function takes its options, the fields of `record` and `as_json`."""
    return click.command(name, cls=Command, examples=examples, record=record)


def option_name(option: click.Option) -> str:
    """The long name of an option without its dashes: `batch-size`."""
    return max(option.opts, key=len).lstrip("-")


def variables_of(command: str, option: str) -> list[str]:
    """The variables of the environment that set an option, the one that wins first."""
    return [f"KDCACHE_{name}".upper().replace("-", "_") for name in (f"{command}_{option}", option)]


def _set_defaults(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        ctx.default_map = load_defaults(value, ctx)
    return value


def _shared_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--config", "config_file"],
            type=click.Path(path_type=Path),
            metavar="FILE.toml",
            is_eager=True,
            callback=_set_defaults,
            help="Take options from the table of this command in a TOML file.",
        ),
        click.Option(
            ["--print-config", "print_config"],
            is_flag=True,
            help="Print the options in force and where each comes from, and do nothing else.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout."),
    ]
