"""How commands print a result: one JSON object, or indented lines for people. Only results go to stdout."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from kdcache.errors import StorageError, printable
from kdcache.train.ranks import discover

# Keys of click's `meta`, which the contexts of one command line share.
WANTS_JSON = "kdcache.wants_json"
EMITTED = "kdcache.emitted"


def emit(result: Mapping[str, Any], *, as_json: bool, text: str | None = None) -> None:
    """Print a result as one JSON object, or as `text` (by default: as `key: value` lines).

    Raises:
        StorageError: stdout is a file on a full disk.
    """
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[EMITTED] = True
    shown = to_json(result) if as_json else text if text is not None else "\n".join(to_lines(result))
    try:
        click.echo(shown)
    except BrokenPipeError:
        raise  # the reader of a pipe has gone; click ends quietly
    except OSError as error:
        raise StorageError(
            f"could not print the result on stdout: {error.strerror}; what was asked for is done, let stdout go "
            "elsewhere"
        ) from error


def is_first_process(*, slurm: bool) -> bool:
    """Whether this process prints: of a command that torchrun runs once per rank, or with `slurm` srun once per task.

    A command to which the tasks of srun are runs of their own leaves `slurm` False.
    """
    return discover().is_first if slurm else os.environ.get("RANK", "0") == "0"


def to_json(value: Any) -> str:
    """One line of strict JSON: paths as text, tuples as lists, NaN as null, control characters escaped."""
    text = json.dumps(_strict(value), allow_nan=False, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def to_lines(result: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The entries of a nested mapping, keys aligned, inner mappings indented; what a terminal would obey is escaped."""
    shown = [(printable(str(key)), value) for key, value in result.items()]
    width = max((len(key) for key, value in shown if not isinstance(value, Mapping) or not value), default=0)
    for key, value in shown:
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from to_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {' ' * (width - len(key))}{printable(_as_text(value))}"


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, Mapping):  # one with entries has lines of its own
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        shown = [_as_text(item) for item in value[:8]]
        return ", ".join([*shown, f"... ({len(value)})"] if len(value) > len(shown) else shown) or "-"
    return str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
