"""SPECs on the command line: `scheme:rest`, or `[py:]module:factory` for code of the user's own.

The folder one stands in goes to the front of `sys.path`, as `python -m` does, and stays there: DataLoader workers
that are not forked import the data set's module again, and take the path from their parent.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kdcache.errors import KDCacheError, UsageError

PYTHON = "py"
PYTHON_USAGE = "[py:]module:factory"
FILE_SCHEMES = ("pt2", "run")
"""Schemes of a teacher whose rest is a file or a folder."""

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Spec:
    """A SPEC taken apart; `scheme` is `py` for `module:factory` with or without its prefix."""

    text: str
    scheme: str
    rest: str


@dataclass(frozen=True)
class SpecKind:
    """What a SPEC can stand for: `name` (`data`, `teacher`, `student`) and how each scheme is written."""

    name: str
    usages: Mapping[str, str]

    def parse(self, text: str) -> Spec:
        """Takes a SPEC apart; nothing is imported or opened.

        Raises:
            UsageError: no known scheme and not `module:factory` either; the message lists what is known.

        >>> SpecKind("data", {"npz": "npz:FILE"}).parse("npz:a/b.npz")
        Spec(text='npz:a/b.npz', scheme='npz', rest='a/b.npz')
        """
        scheme, colon, rest = text.partition(":")
        if scheme in self.usages and colon:
            if not rest:
                raise UsageError(f"{self.name} SPEC {text!r} ends after its scheme; expected {self.usages[scheme]}")
            return Spec(text, scheme, rest)
        target = rest if scheme == PYTHON and colon else text
        module, colon, factory = target.partition(":")
        if colon and _DOTTED.fullmatch(module) and _DOTTED.fullmatch(factory):
            return Spec(text, PYTHON, target)
        raise self.unknown(text)

    def unknown(self, text: str) -> UsageError:
        """The error for a SPEC that nothing understands."""
        scheme = text.partition(":")[0]
        known = ", ".join([*self.usages.values(), PYTHON_USAGE])
        near = difflib.get_close_matches(scheme.lower(), [*self.usages, PYTHON], n=1)
        hint = f" Did you mean {near[0]}:?" if near else ""
        what = f"has the unknown scheme {scheme!r}" if ":" in text else "is not of the form scheme:rest"
        return UsageError(f"{self.name} SPEC {text!r} {what}; known: {known}.{hint}")


def recorded_spec(text: str) -> str:
    """A SPEC as provenance names it: without `py:`, and a file without the folders it lies in.

    >>> recorded_spec("py:networks:wide"), recorded_spec("pt2:runs/a/wide.pt2")
    ('networks:wide', 'pt2:wide.pt2')
    """
    scheme, colon, rest = text.partition(":")
    if scheme == PYTHON and colon:
        return rest
    return f"{scheme}:{Path(rest).name}" if scheme in FILE_SCHEMES and colon else text


def call_factory(spec: Spec, kind: SpecKind, **offered: Any) -> Any:
    """What the factory of a `module:factory` SPEC returns.

    Args:
        spec: a SPEC whose scheme is `py`.
        kind: for the messages.
        offered: keyword arguments that are passed if the factory's signature names them.

    Raises:
        UsageError: no such module, no such name in it, or not a function or class.
        KDCacheError: the module or the factory raised; the error it raised is chained. Errors of kdcache pass as
            they are.
    """
    factory = _find_factory(spec, kind)
    try:
        names = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # a callable written in C has no signature
        names = set()
    try:
        return factory(**{name: value for name, value in offered.items() if name in names})
    except KDCacheError:
        raise
    except Exception as error:
        raise KDCacheError(f"the {kind.name} factory {spec.rest} raised {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Type and first line of a foreign error, for messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe(value: object) -> str:
    """A value's type for people: `None`, `a dict`, `the class Net`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _find_factory(spec: Spec, kind: SpecKind) -> Callable[..., Any]:
    module_name, _, path = spec.rest.partition(":")
    found: Any = _import(module_name, spec, kind)
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{kind.name} SPEC {spec.text!r}: {module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    if not (inspect.isroutine(found) or inspect.isclass(found) or isinstance(found, functools.partial)):
        raise UsageError(
            f"{kind.name} SPEC {spec.text!r} names {describe(found)}; expected a function or a class, which is called "
            f"without arguments: write a function that returns it"
        )
    return found


def _import(name: str, spec: Spec, kind: SpecKind) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise KDCacheError(f"{kind.name} SPEC {spec.text!r}: importing {name} raised {one_line(error)}") from error
        if spec.text.startswith(f"{PYTHON}:"):
            raise UsageError(
                f"{kind.name} SPEC {spec.text!r}: there is no module {error.name}, neither installed nor in the "
                f"current folder"
            ) from error
        raise UsageError(f"{kind.unknown(spec.text)} No module {error.name} was found either.") from error
    except KDCacheError:
        raise
    except (Exception, SystemExit) as error:
        raise KDCacheError(f"{kind.name} SPEC {spec.text!r}: importing {name} raised {one_line(error)}") from error
