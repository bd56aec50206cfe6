"""A field of an options record: default, help text, group and choices, for the library and the command alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(default: Any, help_text: str, *, group: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field whose metadata describes the command-line option of the same name."""
    return dataclasses.field(default=default, metadata={"help": help_text, "group": group, "choices": tuple(choices)})


def flag(field_name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + field_name.replace("_", "-")
