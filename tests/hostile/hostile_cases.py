"""The registry of hostile caches: every attack is a small function whose docstring says what it would do.

A builder gets an empty folder, writes its files there, and returns the path that a victim would open. `at` tells who
must notice:

    open    whoever opens the cache: nothing of it is used, by any command
    rows    whoever reads rows (gather, verify, merge, export); what reads the manifest alone stays unharmed
    later   the same, where a file is exchanged after the cache was opened and before its rows are read
    verify  `verify` alone: the rows are what their checksums say, but our writer would not have stored them
    dump    whoever goes on with a dump in progress, or replaces one (Writer, precompute)
    shown   nobody refuses it: what it says about itself must reach neither terminal nor page as it stands
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CORRUPT, INCOMPLETE, MISMATCH, USAGE = 3, 4, 5, 2

_TOPICS = {
    "hostile_hdf5_objects": "HDF5: objects, links and attributes that libhdf5 can make",
    "hostile_hdf5_storage": "HDF5: types, shapes and storage that libhdf5 can make",
    "hostile_hdf5_bytes": "HDF5: bytes that no library would write, checksums right",
    "hostile_headers": "The header of a one-file cache",
    "hostile_json": "The text of a manifest",
    "hostile_manifest": "A manifest's list of shards, hashes right",
    "hostile_fields": "A manifest's arrays and other fields, hashes right",
    "hostile_shards": "Rows and shards",
    "hostile_encodings": "Encodings of int8, int4, top-k and factored rows, hashes right",
    "hostile_encoded_rows": "Rows of these encodings, checksums right",
    "hostile_heads": "The last layer of a factored teacher",
    "hostile_files": "What lies in the place of a file",
    "hostile_dumps": "Dumps in progress",
    "hostile_shown": "Text that is shown",
    "valid_files": "Valid caches",
}


@dataclass(frozen=True)
class Case:
    """One attack: `build` makes it, `reason` is a regular expression for the message of its refusal.

    `verify_reason` is the one that `verify` gives where it looks at something else first. `code` is the exit code.
    `alike` names the case whose reason this one shares, being the same thing in another form.
    """

    name: str
    topic: str
    text: str
    build: Callable[[Path], Path]
    at: str
    reason: str
    code: int
    verify_reason: str
    alike: str


_CASES: dict[str, Case] = {}


def hostile(
    reason: str = "", *, at: str = "open", code: int = CORRUPT, verify: str = "", alike: str = ""
) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Registers a builder under its function's name."""

    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        name = build.__name__
        if name in _CASES:
            raise ValueError(f"two cases are called {name}")
        text = " ".join((build.__doc__ or "").split())
        _CASES[name] = Case(name, build.__module__, text, build, at, reason, code, verify or reason, alike)
        return build

    return register


def valid(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Registers a builder of a cache that every reader accepts."""
    return hostile(at="accepted", code=0)(build)


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case, topic by topic."""
    for topic in _TOPICS:
        __import__(topic)
    return tuple(sorted(_CASES.values(), key=lambda case: list(_TOPICS).index(case.topic)))


def readme() -> str:
    """The text of README.md: one paragraph a case."""
    hostile_count = sum(case.at != "accepted" for case in all_cases())
    lines = [
        "# Hostile files",
        "",
        "Made by `python tests/hostile/make_hostile.py FOLDER`, never committed; this page is generated from the",
        "docstrings there (`make_hostile.py --readme`). `test_hostile.py` takes every case through every door that",
        "reads files of others: `open` and `gather`, `verify`, `inspect`, `merge`, `export`, `card`, the commands of",
        "these names, `Writer(resume=True)`, `Writer(overwrite=True)` and `precompute`.",
        "",
        f"{hostile_count} hostile cases, {len(all_cases()) - hostile_count} valid ones. Who must notice:",
        "",
    ]
    who = (__doc__ or "").split("notice:\n\n")[1].rstrip().splitlines()
    lines += who
    for topic, title in _TOPICS.items():
        lines += ["", f"## {title}"]
        for case in (case for case in all_cases() if case.topic == topic):
            lines += ["", f"**{case.name}**" + (f" ({case.at})" if case.at != "accepted" else "")]
            lines += textwrap.wrap(case.text, 118, break_long_words=False, break_on_hyphens=False)
            if case.reason:
                alike = f" (as {case.alike})" if case.alike else ""
                lines += [f"Refused with `{case.reason}`{alike}, exit code {case.code}."]
    return "\n".join(lines) + "\n"
