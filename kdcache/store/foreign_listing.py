"""What a foreign file holds, for people: a line for each array, and the flags that would import them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from kdcache.store.foreign_wire import MAX_LISTED, clipped

_SHOWN = 40
_FLOAT = re.compile(r"float\d+|[<>]f\d|B?F(16|32|64)")  # of NumPy and of safetensors
_INTEGER = re.compile(r"u?int\d+|[<>]i\d|[<>]u\d|[IU](8|16|32|64)")


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: str


def render_listing(listing: Any) -> str:
    """Lines of what a reading process lists, which is not trusted to be a listing.

    >>> print(render_listing([{"name": "scores", "shape": [9, 3], "dtype": "float32"}]))
      scores  (9, 3)  float32
    for example: --logits scores
    """
    entries = [_entry(value) for value in listing if isinstance(value, dict)] if isinstance(listing, list) else []
    shown = entries[:_SHOWN]
    names = max((len(entry.name) for entry in shown), default=0)
    shapes = max((len(str(entry.shape)) for entry in shown), default=0)
    lines = [f"  {entry.name:{names}}  {entry.shape!s:{shapes}}  {entry.dtype}" for entry in shown]
    if len(entries) > _SHOWN:
        lines.append(f"  ... and {len(entries) - _SHOWN}{' or more' if len(entries) >= MAX_LISTED else ''} others")
    return "\n".join([*(lines or ["  nothing that can be read"]), *_example(entries)])


def _example(entries: list[_Entry]) -> list[str]:
    logits = next((e for e in entries if len(e.shape) > 1 and _FLOAT.fullmatch(e.dtype)), None)
    if logits is None:
        return []
    fitting = (e for e in entries if e.shape == logits.shape[:1] and _INTEGER.fullmatch(e.dtype))
    labels = next(fitting, None)
    flags = f"--logits {shlex.quote(logits.name)}"
    return [f"for example: {flags}" + (f" --labels {shlex.quote(labels.name)}" if labels is not None else "")]


def _entry(value: dict[str, Any]) -> _Entry:
    shape = value.get("shape")
    lengths = shape[:8] if isinstance(shape, list) else []
    return _Entry(
        name=clipped(str(value.get("name")), 80),
        shape=tuple(n for n in lengths if type(n) is int and 0 <= n < 2**63),
        dtype=clipped(str(value.get("dtype")), 80),
    )
