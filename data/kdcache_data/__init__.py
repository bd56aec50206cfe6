"""Small real data sets that ship with kdcache; README.md says where each comes from and under which licence."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["NAMES", "path"]

NAMES = ("digits.npz",)


def path(name: str) -> AbstractContextManager[Path]:
    """A file of this package as a path on the disk, valid inside a `with` block.

    Args:
        name: one of `NAMES`.

    Raises:
        KeyError: there is no such file.

    >>> with path("digits.npz") as file:
    ...     file.stat().st_size
    45374
    """
    if name not in NAMES:
        raise KeyError(f"kdcache_data has no {name!r}; it has {', '.join(NAMES)}")
    return as_file(files(__name__) / name)
