"""Data never runs: no source file unpickles, evaluates, imports by a name from a file, starts a shell or a connection.

What may do more stands in `ALLOWED`, with the reason. `py:` and `module:factory` SPECs run code by design, and come
from the command line or from a `--config` file that stands on it, never from a cache. And no module outgrows one idea.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for folder in ("kdcache", "cli/kdcache_cli", "data/kdcache_data") for path in (ROOT / folder).rglob("*.py")
]
# By the name's first parts: a module, or a function of one.
FORBIDDEN = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "copyreg", "jsonpickle"),
    *("yaml", "ruamel", "code", "codeop", "runpy", "pty", "imp", "pkgutil", "ctypes", "cffi", "subprocess"),
    *("socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "webbrowser", "requests", "tarfile"),
    *("multiprocessing", "builtins", "os.system", "os.popen", "os.startfile", "os.fork", "os.forkpty"),
    *("importlib.import_module", "importlib.reload", "importlib.util", "importlib.machinery", "sys.modules"),
    *("h5py", "numpy.ctypeslib", "numpy.f2py", "shutil.unpack_archive", "zipimport", "atexit"),
    *("torch.jit", "torch.hub", "torch.package", "torch.ops.load_library", "torch.classes", "torch.export.load"),
    *("torch.serialization", "torch.utils.cpp_extension", "torch.utils.model_zoo"),
}
FORBIDDEN_STARTS = ("os.exec", "os.spawn", "os.posix_spawn")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
# Calls that must say how they treat pickles, programs to start, or formats to try.
REQUIRED_ARGUMENTS = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
    "image_module.open": ("formats", None),
}
FORBIDDEN_ARGUMENTS = {("allow_pickle", True), ("weights_only", False), ("shell", True)}
ALIASES = {"np": "numpy"}

ALLOWED: dict[str, dict[str, str]] = {
    "kdcache/__init__.py": {"importlib.import_module": "names in a table of its own"},
    "cli/kdcache_cli/main.py": {"importlib.import_module": "commands in a table of its own"},
    "kdcache/stages/doctor.py": {
        "importlib.import_module": "packages in a table of its own",
        "importlib.util": "whether they are installed",
        "h5py": "says its version",
    },
    "kdcache/stages/specs.py": {
        "importlib.import_module": "a SPEC of the command line is code by design",
    },
    "kdcache/train/replay.py": {"importlib.import_module": "packages that a transform in the process names"},
    "kdcache/train/library_versions.py": {"importlib.import_module": "packages in a table of its own"},
    "kdcache/store/foreign_child.py": {"importlib.import_module": "parsers in a table of its own"},
    "kdcache/store/foreign_process.py": {"subprocess": "the child that parses foreign files, without a shell"},
    "kdcache/store/foreign_hdf5.py": {"h5py": "in that child, for `kdcache import`"},
    "kdcache/format/hdf5_header.py": {"h5py": "writes headers, in memory"},
    "kdcache/store/export.py": {"h5py": "writes exports"},
    "kdcache/store/versions.py": {"h5py": "says its version"},
    "kdcache/store/mapping.py": {"ctypes": "mmap and madvise of the C library"},
    "kdcache/store/posix.py": {"ctypes": "sync_file_range of the C library"},
    "kdcache/train/rows.py": {"multiprocessing": "how rows reach the process that asked a worker for them"},
    "kdcache/stages/sweep_workers.py": {"subprocess": "the processes of a sweep, of this package, without a shell"},
    "kdcache/stages/teacher_pt2.py": {"torch.export.load": "after pt2_program has looked at every text"},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(node: ast.expr) -> str:
    """`np.lib.format.read_array` of such an expression, with np written out; "" for others."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([ALIASES.get(node.id, node.id), *reversed(parts)])


def names_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported or looked up in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node)


def violations(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that is forbidden in a source text, by the name to allow it by."""
    tree = ast.parse(text)
    for line, name in names_in(tree):
        parts = name.split(".")
        yield from ((line, n) for n in {".".join(parts[:k]) for k in range(1, len(parts) + 1)} & FORBIDDEN)
        if name.startswith(FORBIDDEN_STARTS):
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            constants = {(n, v.value) for n, v in given.items() if isinstance(v, ast.Constant)}
            if called in FORBIDDEN_CALLS or constants & FORBIDDEN_ARGUMENTS:
                yield node.lineno, called
            name, value = REQUIRED_ARGUMENTS.get(called, (None, None))
            if name is not None and (name not in given or (value is not None and (name, value) not in constants)):
                yield node.lineno, called


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_source_file_runs_data(path: Path) -> None:
    allowed = ALLOWED.get(name_of(path), {})
    found = [(line, name) for line, name in violations(path.read_text(encoding="utf-8")) if name not in allowed]
    assert not found


def test_what_is_allowed_is_still_needed() -> None:
    for name, reasons in ALLOWED.items():
        found = {what for _, what in violations((ROOT / name).read_text(encoding="utf-8"))}
        assert set(reasons) <= found, name


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from pickle import loads", "import yaml", "from torch import hub", "import joblib as j"),
        *("eval('1')", "exec(text)", "x = compile(a, b, 'exec')", "__import__(name)", "import builtins"),
        *(
            "torch.load(p)",
            "torch.load(p, weights_only=False)",
            "torch.load(p, weights_only=flag)",
            "torch.jit.load(p)",
        ),
        *("np.load(p)", "numpy.load(p, allow_pickle=True)", "np.lib.format.read_array(f)", "f(allow_pickle=True)"),
        *("os.system('x')", "os.execvp('x', [])", "from os import system", "run(c, shell=True)", "import subprocess"),
        *("importlib.import_module(n)", "from importlib import import_module", "import h5py", "from h5py import h5d"),
        *(
            "import ctypes",
            "import socket",
            "from urllib.request import urlopen",
            "image_module.open(p)",
            "torch.ops.load_library",
        ),
    ],
)
def test_the_scan_finds_what_it_forbids(text: str) -> None:
    assert list(violations(text))


@pytest.mark.parametrize(
    "text",
    [
        *("import json", "re.compile(p)", "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)"),
        *("cache.load(p)", "model.eval()", "optimizer.compile()", "image_module.open(p, formats=('PNG',))"),
    ],
)
def test_the_scan_lets_other_code_through(text: str) -> None:
    assert not list(violations(text))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_source_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
