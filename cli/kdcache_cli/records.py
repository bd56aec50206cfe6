"""Options of a command from a frozen dataclass, whose fields carry help, group and choices as metadata.

So the command, the library call and the reference page list the same options with the same defaults.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

# By annotation: records use `from __future__ import annotations`, which leaves them as text.
TYPES: dict[str, click.ParamType[Any]] = {
    "str": click.STRING,
    "int": click.INT,
    "float": click.FLOAT,
    "Path": click.Path(path_type=Path),
}


class RecordOption(click.Option):
    """An option that knows under which heading of the help it belongs, and whether a file may give it as one value."""

    def __init__(self, *args: Any, group: str, takes_one: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.takes_one = takes_one


def record_options(record: type[Any]) -> list[click.Parameter]:
    """One option for each field of a dataclass, in their order."""
    return [_option(field) for field in dataclasses.fields(record)]


def _option(field: dataclasses.Field[Any]) -> RecordOption:
    declared = str(field.type).removesuffix(" | None")
    kind = declared.removesuffix(" | str")
    is_flag, repeats = kind == "bool", kind.startswith("tuple[")
    takes_one = repeats and kind != declared
    kind = kind.removeprefix("tuple[").removesuffix(", ...]")
    choices = field.metadata.get("choices")
    settings: dict[str, Any] = (
        {"is_flag": True} if is_flag else {"type": click.Choice(choices) if choices else TYPES[kind]}
    )
    return RecordOption(
        [f"--{field.name.replace('_', '-')}", field.name],
        group=field.metadata["group"],
        takes_one=takes_one,
        default=field.default,
        multiple=repeats,
        show_default=not is_flag and not repeats and field.default is not None,
        help=field.metadata["help"],
        **settings,
    )
