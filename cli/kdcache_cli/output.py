"""How commands print a result: one JSON object, or indented lines for people. Only results go to stdout."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from kdcache.train.ranks import discover

# Keys of click's `meta`, which the contexts of one command line share.
WANTS_JSON = "kdcache.wants_json"
EMITTED = "kdcache.emitted"


def emit(result: Mapping[str, Any], *, as_json: bool, text: str | None = None) -> None:
    """Print a result as one JSON object, or as `text` (by default: as `key: value` lines)."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[EMITTED] = True
    if as_json:
        click.echo(to_json(result))
    else:
        click.echo(text if text is not None else "\n".join(to_lines(result)))


def is_first_process(*, slurm: bool) -> bool:
    """Whether this process prints: of a command that torchrun runs once per rank, or with `slurm` srun once per task.

    A command to which the tasks of srun are runs of their own leaves `slurm` False.
    """
    return discover().is_first if slurm else os.environ.get("RANK", "0") == "0"


def to_json(value: Any) -> str:
    """One line of strict JSON: paths as text, tuples as lists, NaN and infinities as null."""
    return json.dumps(_strict(value), allow_nan=False, ensure_ascii=False)


def to_lines(result: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The entries of a nested mapping, keys aligned, inner mappings indented."""
    width = max((len(str(key)) for key, value in result.items() if not isinstance(value, Mapping)), default=0)
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from to_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {' ' * (width - len(str(key)))}{_as_text(value)}"


def _as_text(value: Any) -> str:
    if value is None:
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
