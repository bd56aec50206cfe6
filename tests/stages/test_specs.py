"""A SPEC either names something or is refused with the reason, and errors in a user's code stay readable."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.stages.specs import Spec, SpecKind, call_factory, describe, one_line

KIND = SpecKind("data", {"npz": "npz:FILE", "digits": "digits:train|test"})
COUNTER = itertools.count()

WriteModule = Callable[[str], str]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """Puts a module of a new name into the current folder and returns that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(source: str) -> str:
        name = f"spec_module_{next(COUNTER)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def run(text: str, **offered: object) -> object:
    return call_factory(KIND.parse(text), KIND, **offered)


def test_a_known_scheme_keeps_everything_behind_its_colon() -> None:
    assert KIND.parse("npz:a:b/c.npz") == Spec("npz:a:b/c.npz", "npz", "a:b/c.npz")


@pytest.mark.parametrize("text", ["package.module:factory", "py:package.module:factory", "py:m:Class.method"])
def test_module_and_factory_work_with_and_without_the_prefix(text: str) -> None:
    assert KIND.parse(text) == Spec(text, "py", text.removeprefix("py:"))


def test_the_prefix_reaches_a_module_that_is_called_like_a_scheme() -> None:
    assert KIND.parse("py:npz:factory").scheme == "py"


@pytest.mark.parametrize("text", ["", "npz", ":", "a b:c", "npz:", "x/y.py:f", "py:", "py:module", "module:", "m:f:g"])
def test_what_is_no_spec_is_a_usage_error_that_lists_the_schemes(text: str) -> None:
    with pytest.raises(UsageError, match="npz:FILE"):
        KIND.parse(text)


@given(st.text())
def test_any_text_is_a_spec_or_a_usage_error(text: str) -> None:
    try:
        spec = KIND.parse(text)
    except UsageError:
        return
    assert spec.text == text
    assert spec.rest


def test_an_unknown_scheme_names_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"unknown scheme 'digit'; known: npz:FILE, .* Did you mean digits:\?"):
        run("digit:train")


def test_a_module_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no module no_such_module_anywhere"):
        run("py:no_such_module_anywhere:f")


def test_the_current_folder_is_searched(write_module: WriteModule) -> None:
    name = write_module("def make(): return 7")
    assert run(f"{name}:make") == 7


def test_a_spawned_worker_can_import_the_module_again(write_module: WriteModule) -> None:
    name = write_module("def make(): return answer\ndef answer(): return 7")
    answer = run(f"{name}:make")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(answer) == 7  # type: ignore[arg-type]


def test_a_factory_gets_those_arguments_that_it_names(write_module: WriteModule) -> None:
    name = write_module("def one(num_classes): return num_classes\ndef none(): return 0")
    assert run(f"{name}:one", num_classes=5, other=1) == 5
    assert run(f"{name}:none", num_classes=5) == 0


def test_a_class_and_a_partial_are_factories(write_module: WriteModule) -> None:
    name = write_module("import functools\nclass Net: pass\nhalf = functools.partial(dict, a=1)")
    assert type(run(f"{name}:Net")).__name__ == "Net"
    assert run(f"{name}:half") == {"a": 1}


def test_a_missing_name_names_its_neighbour(write_module: WriteModule) -> None:
    name = write_module("def make_data(): return 1")
    with pytest.raises(UsageError, match="did you mean make_data"):
        run(f"{name}:make_dat")


def test_an_object_is_no_factory(write_module: WriteModule) -> None:
    name = write_module("value = {}")
    with pytest.raises(UsageError, match="names a dict; expected a function or a class"):
        run(f"{name}:value")


def test_a_factory_that_raises_is_quoted_in_one_line_and_chained(write_module: WriteModule) -> None:
    name = write_module("def make(): raise ValueError('first\\nsecond')")
    with pytest.raises(KDCacheError, match=r"raised ValueError: first$") as caught:
        run(f"{name}:make")
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_factory_that_needs_arguments_says_so(write_module: WriteModule) -> None:
    name = write_module("def make(size): return size")
    with pytest.raises(KDCacheError, match="missing 1 required positional argument: 'size'"):
        run(f"{name}:make")


def test_errors_of_kdcache_pass_through_a_factory(write_module: WriteModule) -> None:
    name = write_module("from kdcache.errors import DataError\ndef make(): raise DataError('mine')")
    with pytest.raises(DataError, match=r"^mine$"):
        run(f"{name}:make")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import no_such_dependency", "no_such_dependency"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_imported_gives_the_reason(write_module: WriteModule, source: str, reason: str) -> None:
    name = write_module(source)
    with pytest.raises(KDCacheError, match=reason) as caught:
        run(f"{name}:f")
    assert not isinstance(caught.value, UsageError)


def test_values_are_described_for_people() -> None:
    assert [describe(v) for v in (None, 3, "x", dict, functools.partial(print))] == [
        "None",
        "an int",
        "a str",
        "the class dict",
        "a partial",
    ]
    assert one_line(ValueError()) == "ValueError"
