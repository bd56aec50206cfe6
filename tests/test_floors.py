"""Imports go downwards only, and torch is loaded only by those who compute with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["errors", "format", "store", "train", "stages", "adapters"]
HEIGHT = {f"kdcache.{floor}": height for height, floor in enumerate(FLOORS)}
HEIGHT |= {"kdcache.version": 0, "kdcache": len(FLOORS), "kdcache_cli": len(FLOORS) + 1}
TORCH_STARTS_AT = HEIGHT["kdcache.train"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "cli" if path.is_relative_to(ROOT / "cli") else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# __main__ is how `python -m kdcache` starts the command line; nothing imports it.
MODULES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for folder in (ROOT / "kdcache", ROOT / "cli" / "kdcache_cli")
    for path in sorted(folder.rglob("*.py"))
    if path.name != "__main__.py"
}


def height(module: str) -> int:
    """The floor of one of our modules; the packages above it count where it has no floor of its own."""
    while module not in HEIGHT:
        module = module.rpartition(".")[0]
    return HEIGHT[module]


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("kdcache", "kdcache_cli")


def imports(node: ast.AST, *, executed_on_import: bool) -> Iterator[str]:
    """The names of the modules that a tree imports, without those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if executed_on_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else str(child.module) for name in names)
        else:
            yield from imports(child, executed_on_import=executed_on_import)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_floor_and_below(module: str) -> None:
    upwards = [
        name
        for name in imports(MODULES[module], executed_on_import=False)
        if is_ours(name) and height(name) > height(module)
    ]
    assert not upwards, f"{module} imports upwards: {upwards}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {name for name in imports(tree, executed_on_import=False) if name in MODULES and name != module}
        for module, tree in MODULES.items()
    }
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these modules import each other in a circle, or something that does: {sorted(graph)}"


@pytest.mark.parametrize("module", [module for module in MODULES if height(module) < TORCH_STARTS_AT])
def test_below_train_no_module_loads_torch_when_it_is_imported(module: str) -> None:
    loaded = {name.split(".")[0] for name in imports(MODULES[module], executed_on_import=True)}
    assert "torch" not in loaded


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in `sys.modules` of a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_kdcache_loads_neither_torch_nor_numpy_nor_h5py() -> None:
    assert not {"torch", "numpy", "h5py"} & loaded_by("import kdcache")


def test_the_help_of_every_command_loads_neither_torch_nor_h5py() -> None:
    """So that help and completion answer at once; importing torch alone takes 1-2 s."""
    lines = ["from kdcache_cli.main import COMMANDS, cli", "cli.main(['--help'], standalone_mode=False)"]
    lines += ["for name in COMMANDS: cli.main([name, '--help'], standalone_mode=False)"]
    assert not {"torch", "h5py"} & loaded_by("\n".join(lines))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_command_that_only_reads_loads_no_torch(command: str, tmp_path: Path) -> None:
    make = "import kdcache, numpy as np\nwith kdcache.Writer('cache', classes=3) as w: w.write([0, 1], np.eye(2, 3))\n"
    run = f"from kdcache_cli.main import cli; cli.main(['{command}', 'cache'], standalone_mode=False)"
    assert "torch" not in loaded_by(f"import os; os.chdir({str(tmp_path)!r})\n{make}{run}")
