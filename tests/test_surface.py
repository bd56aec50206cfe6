"""What other packages may rely on is what `kdcache.__all__` lists, no more and no less."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import kdcache
from kdcache import errors


def test_all_is_sorted_and_without_duplicates() -> None:
    assert kdcache.__all__ == sorted(set(kdcache.__all__))


@pytest.mark.parametrize("name", kdcache.__all__)
def test_every_exported_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(kdcache, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_type_checkers_see_the_names_that_are_looked_up_when_first_used() -> None:
    tree = ast.parse(Path(kdcache.__file__).read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module) for node in guard.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == kdcache._HOMES | {"losses": "kdcache.train", "views": "kdcache.train"}


def test_every_error_is_exported() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes <= set(kdcache.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        kdcache.opne  # noqa: B018


def test_dir_lists_the_surface() -> None:
    assert dir(kdcache) == kdcache.__all__
