"""What the program in a `.pt2` archive may say, so that loading it is arithmetic on shapes and nothing else.

torch evaluates more of a program than its graph. Sizes of tensors are expressions that pass through Python's `eval`
(in sympy), guards are Python that is executed before each batch, the structure of the inputs may name modules to
import, and names become source text. Each of these ran a shell command in a trial with torch 2.13. So texts must be
plain names, expressions arithmetic, structures of tuples, lists and dicts, and operators registered ones that open no
file. This is a fence and no wall: a program may still compute for ever, and torch itself advises against those of
strangers.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from typing import Any

import torch

_PLAIN = re.compile(r"[\w.:+@-]{0,500}", re.ASCII)
_LONGEST = 10_000
_SYMBOL = re.compile(r"[A-Za-z]\w{0,100}", re.ASCII)
_QUOTED = frozenset({"metadata", "as_string", "as_strings"})  # notes, and texts that torch puts into quotes
_EVALUATED = frozenset({"expr_str", "guards_code"})
_STRUCTURES = frozenset({"in_spec", "out_spec"})
_MODULES_OF_STRUCTURES = frozenset({"builtins", "collections"})
_SHAPE_METHODS = frozenset({"size", "stride", "storage_offset"})
_FUNCTIONS = re.compile(
    "Symbol|Integer|Rational|Float|(Negative)?(Int)?Infinity|Add|Mul|Pow|Max|Min|Mod|Abs|floor|ceiling|FloorDiv|"
    "ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|"
    "FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|"
    "Identity|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|(Strict)?(Less|Greater)Than|And|Or|Not|ITE|Piecewise"
)
_SYNTAX = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Attribute, ast.Subscript),
    *(ast.Constant, ast.Name, ast.Load, ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_PYTHON_OPERATORS = frozenset(
    {math.trunc, math.floor, math.ceil, math.sqrt, operator.getitem, operator.add, operator.sub, operator.mul}
    | {operator.truediv, operator.floordiv, operator.mod, operator.pow, operator.neg, operator.pos, operator.abs}
    | {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_}
    | {operator.not_, operator.lshift, operator.rshift}
)


class UnsafeProgramError(Exception):
    """A reason for which a program is not loaded."""


def check_text(text: bytes) -> None:
    """Looks at every text of a serialised program before torch does.

    Raises:
        UnsafeProgramError: one is more than a name, arithmetic or a structure of plain containers.
        ValueError, RecursionError: not JSON.
    """
    left: list[tuple[str, Any]] = [("", json.loads(text))]  # as torch reads it: of a key that stands twice, the last
    while left:
        key, value = left.pop()
        if key in _QUOTED and _is_text_alone(value):  # a tensor may be called so as well
            continue
        if isinstance(value, dict):
            left += value.items()
            left += (("", name) for name in value if not (key == "range_constraints" and _is_arithmetic(name)))
        elif isinstance(value, list):
            left += ((key, item) for item in value)
        elif isinstance(value, str):
            _check(key, value)


def check_graph(program: torch.export.ExportedProgram) -> None:
    """Looks at what the operators of a program came to be, in all its graphs.

    Raises:
        UnsafeProgramError: a function that is no operator of torch, or one that names a file.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if not node.name.isidentifier():
                raise UnsafeProgramError(f"a step is called {node.name!r:.80}")
            if node.op in ("call_method", "call_module"):
                raise UnsafeProgramError(f"the step {node.name} is a {node.op}")
            if node.op == "call_function" and not _is_operator(node.target):
                raise UnsafeProgramError(f"it calls {node.target!r:.80}, which is no operator that only computes")


def _is_text_alone(value: Any) -> bool:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(isinstance(item, str) for item in inner)


def _check(key: str, text: str) -> None:
    if key in _STRUCTURES:
        _check_structure(text)
    elif not (_is_arithmetic(text) if key in _EVALUATED else _PLAIN.fullmatch(text)):
        raise UnsafeProgramError(f"torch would evaluate {text!r:.80}")


def _check_structure(text: str) -> None:
    """The tree of containers that inputs or outputs are in, with the keys of dicts: JSON in JSON."""
    left: list[Any] = [json.loads(text)]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "__enum__" in value or value.get("default_factory_module", "builtins") not in _MODULES_OF_STRUCTURES:
                raise UnsafeProgramError("its inputs or outputs name a module to import")
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and not _PLAIN.fullmatch(value):
            if value[0] not in '[{"':
                raise UnsafeProgramError(f"a part of its inputs or outputs is called {value!r:.80}")
            left.append(json.loads(value))


def _is_arithmetic(text: str) -> bool:
    """Whether an expression consists of numbers, symbols, sizes of inputs, and functions of shapes."""
    if len(text) > _LONGEST or not text.isprintable() or "#" in text:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    quoted = {id(inner) for node in nodes for inner in _names_in(node)}
    return all(_is_harmless(node, called, quoted) for node in nodes)


def _names_in(node: ast.AST) -> list[ast.AST]:
    """The texts that may stand in an expression: of `L['x']` and `Symbol('s0')`."""
    if isinstance(node, ast.Subscript):
        return [node.slice]
    is_symbol = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol"
    return list(node.args[:1]) if is_symbol and isinstance(node, ast.Call) else []


def _is_harmless(node: ast.AST, called: set[int], quoted: set[int]) -> bool:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            return not node.args and not node.keywords
        return isinstance(node.func, ast.Name) and _FUNCTIONS.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Attribute):
        return id(node) in called and node.attr in _SHAPE_METHODS
    if isinstance(node, ast.Name):
        return _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return id(node) in quoted and _SYMBOL.fullmatch(node.value) is not None
        return isinstance(node.value, (bool, int, float))
    return isinstance(node, _SYNTAX)


def _is_operator(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace != "debugprims" and all(a.name != "filename" for a in target._schema.arguments)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = getattr(target, "__name__", "").lstrip("_")
    return target in _PYTHON_OPERATORS or (name.startswith("sym_") and getattr(target, "__module__", "") == "torch")
