"""Texts of an exported program are names, arithmetic and plain structures, or the program is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kdcache.stages.pt2_program import UnsafeProgramError, check_text

CODE = "__import__('os').system('true')"


def check(value: Any) -> None:
    check_text(json.dumps(value).encode())


def structure(context: Any, kind: str | None = "builtins.dict") -> dict[str, str]:
    return {"in_spec": json.dumps([1, {"type": kind, "context": context, "children_spec": []}])}


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))",
        "s0*(s1 + 1)//2",
        "FloorDiv(s0, 2) + Max(1, s1)",
        "L['x'].size()[0] % 8 == 0",
        "L['inputs'][0].stride()[1] >= 2 and Ne(s0, 1)",
    ],
)
def test_arithmetic_on_shapes_passes(text: str) -> None:
    check({"expr_str": text})
    check({"guards_code": [text]})


@pytest.mark.parametrize(
    "text",
    [
        *(
            CODE,
            f"Max(1, {CODE})",
            f"L['x'].size()[0] >= 0 or {CODE}",
            "open('x', 'w')",
            "eval('1')",
            "sympify('1')",
        ),
        *("x.__class__", "().__class__.__bases__[0]", "L['x'].item()", "Max('1', 2)", "Symbol(open('x'))", "f'{1}'"),
        *("[x for x in y]", "lambda: 1", "(x := 1)", "Max(*x)", "1 # 2", "1\n", "L['a b'].size()", "9" * 20_000, ""),
        *("x.size(1)", "size()", "__import__", "1j", "b'1'", "..."),
    ],
)
def test_anything_else_is_refused_where_torch_evaluates(text: str) -> None:
    with pytest.raises(UnsafeProgramError, match="torch would evaluate"):
        check({"expr_str": text})
    with pytest.raises(UnsafeProgramError, match="torch would evaluate"):
        check({"guards_code": [text]})


@pytest.mark.parametrize("text", ["x; y", "a b", "f(1)", "x=1", "a'b", 'a"b', "a\nb", "é", "a" * 501])
def test_names_are_plain(text: str) -> None:
    for value in ({"name": text}, {"forward_arg_names": [text]}, {"tensor_values": {text: {}}}, {"target": text}):
        with pytest.raises(UnsafeProgramError):
            check(value)


def test_notes_and_quoted_texts_may_say_anything() -> None:
    check({"metadata": {"stack_trace": f"line 1\n{CODE}"}, "as_string": CODE, "as_strings": [CODE, "b"]})


@pytest.mark.parametrize("name", ["metadata", "as_string", "as_strings"])
def test_a_tensor_with_the_name_of_a_note_hides_nothing(name: str) -> None:
    with pytest.raises(UnsafeProgramError):
        check({"tensor_values": {name: {"sizes": [{"as_expr": {"expr_str": CODE}}]}}})
    with pytest.raises(UnsafeProgramError):
        check({"sym_int_values": {name: {"as_expr": {"expr_str": CODE, "hint": None}}}})


def test_ranges_may_be_known_by_an_expression() -> None:
    check({"range_constraints": {"2*s0 + 1": {"min_val": 0, "max_val": None}}})
    with pytest.raises(UnsafeProgramError):
        check({"range_constraints": {CODE: {}}})


def test_structures_of_plain_containers_pass() -> None:
    check(structure('["input_ids", "attention_mask"]'))
    check(structure("null", "builtins.tuple"))
    check(structure(None, None))
    check(
        structure(
            {"default_factory_module": "builtins", "default_factory_name": "list", "dict_context": ["a"]},
            "collections.defaultdict",
        )
    )


@pytest.mark.parametrize(
    "context",
    [
        json.dumps({"__enum__": True, "fqn": "module:A", "name": "B"}),
        json.dumps([{"__enum__": True, "fqn": "module:A", "name": "B"}]),
        {"default_factory_module": "module", "default_factory_name": "a", "dict_context": []},
        json.dumps(["x'].size(); f("]),
        "f(1)",
    ],
)
def test_structures_that_name_modules_or_code_are_refused(context: Any) -> None:
    with pytest.raises(UnsafeProgramError, match="its inputs or outputs"):
        check(structure(context))
