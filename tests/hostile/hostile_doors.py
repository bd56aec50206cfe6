"""Every door through which files of others come in, each tried in a fresh child process with limits.

Run as a script this is a server: it imports kdcache once and forks a child for each line of JSON that it reads (path,
doors, work, seconds), so that starting Python and importing is not counted, and nothing of one case reaches
another. A child has 200 MiB of memory beyond what it was born with (RLIMIT_DATA: what it may write to), `seconds`
until it is killed as hanging, and an audit hook that notes every file it opens and everything it must never do. It
prints, for each door, the error, processor time, growth of resident memory, and what a terminal was sent.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile_places import AFTER_OPEN, FOLDER_ONLY, put_instead

MEMORY_BYTES = 200 << 20
_PATH_EVENTS = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link"}
NEVER = ("pickle.", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "socket.", "shutil.", "ctypes.dlopen")
_SEEN: list[tuple[str, str, int]] = []


# --------------------------------------------------------------------------- doors of the library


def _open(path: Path, work: Path, access: str = "mmap") -> None:
    import kdcache

    with kdcache.open(path, access=access) as cache:
        swap = path.parent / AFTER_OPEN
        if swap.exists():
            name, kind = json.loads(swap.read_text())
            put_instead(path / name, kind, path.parent / "elsewhere")
            swap.unlink()
        repr(cache)
        rows = cache.gather(np.arange(len(cache)) if len(cache) < 1 << 20 else np.arange(8))
        cache.gather(cache.rows(cache.sample_ids[:5], cache.views[0]))
        if rows.encoding.has_all_logits:
            rows.dense()
        rows.encoding.top_class(rows.arrays)


def _pread(path: Path, work: Path) -> None:
    _open(path, work, "pread")


def _verify(path: Path, work: Path) -> None:
    import kdcache

    kdcache.verify(path, raise_on_error=True)


def _inspect(path: Path, work: Path) -> None:
    from kdcache.store.inspect import describe

    describe(path)


def _merge(path: Path, work: Path) -> None:
    import kdcache

    kdcache.merge(path, work / _merged(path))


def _merged(path: Path) -> str:
    return "merged" if os.path.exists(path.parent / FOLDER_ONLY) else "merged.h5"


def _export(path: Path, work: Path) -> None:
    import kdcache

    kdcache.export(path, work / "exported.npz")


def _card(path: Path, work: Path) -> None:
    from kdcache.store.card import render_card
    from kdcache.store.inspect import describe

    render_card(describe(path), name=path.name)


def _resume(path: Path, work: Path) -> None:
    from hostile_base import ROWS, open_writer, write_rows

    with open_writer(path, resume=True) as writer:
        done = len(writer.done)
        write_rows(writer, ROWS - done, done)


def _overwrite(path: Path, work: Path) -> None:
    from hostile_base import open_writer, write_rows

    with open_writer(path, overwrite=True) as writer:
        write_rows(writer, 10)


def _greedy(path: Path, work: Path) -> None:
    bytearray(MEMORY_BYTES + (10 << 20))


def _busy(path: Path, work: Path) -> None:
    while time.process_time() < 0.3:
        pass


def _curious(path: Path, work: Path) -> None:
    Path("/etc/hostname").read_bytes()


def _trusting(path: Path, work: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(_trusting))


def _hanging(path: Path, work: Path) -> None:
    os.mkfifo(work / "fifo")
    (work / "fifo").open()


BROKEN = {"greedy": _greedy, "busy": _busy, "curious": _curious, "trusting": _trusting, "hanging": _hanging}
"""Doors that do what no door may, to show that it is noticed."""

LIBRARY: dict[str, Callable[[Path, Path], None]] = {
    "open": _open,
    "pread": _pread,
    "verify": _verify,
    "inspect": _inspect,
    "merge": _merge,
    "export": _export,
    "card": _card,
    "resume": _resume,
    "overwrite": _overwrite,
}
COMMANDS = {
    "kdcache inspect": ("inspect", "PATH"),
    "kdcache inspect --json": ("inspect", "PATH", "--json"),
    "kdcache verify": ("verify", "PATH"),
    "kdcache verify --json": ("verify", "PATH", "--json"),
    "kdcache merge": ("merge", "PATH", "OUT/MERGED"),
    "kdcache export": ("export", "PATH", "OUT/exported.h5"),
    "kdcache card": ("card", "PATH", "--print"),
}


def arguments_of(door: str, path: Path, work: Path) -> list[str]:
    """The command line of a door."""
    places = {"OUT": str(work), "MERGED": _merged(path), "PATH": str(path)}
    return [re.sub("|".join(places), lambda found: places[found[0]], part) for part in COMMANDS[door]]


# --------------------------------------------------------------------------- one child


def _try(door: str, path: Path, work: Path) -> dict[str, Any]:
    """What one door made of a path."""
    from kdcache.errors import KDCacheError

    del _SEEN[:]
    before, found = time.process_time(), {"code": 0, "error": "", "message": "", "printed": "", "crash": ""}
    try:
        if door in LIBRARY or door in BROKEN:
            {**LIBRARY, **BROKEN}[door](path, work)
        else:
            found["printed"], found["code"] = _command(arguments_of(door, path, work))
    except KDCacheError as error:
        found.update(code=error.exit_code, error=type(error).__name__, message=str(error))
    except BaseException:
        found["crash"] = traceback.format_exc()
    found["seconds"] = time.process_time() - before
    found["touched"] = list(_SEEN)
    found["left"] = sorted(os.listdir(work))
    for name in found["left"]:
        shutil.rmtree(work / name) if (work / name).is_dir() else os.unlink(work / name)
    return {"door": door, "work": str(work), **found}


def _command(arguments: list[str]) -> tuple[str, int]:
    """What a command writes to a terminal, stdout and stderr together, and its exit code."""
    from kdcache_cli.main import cli

    leader, terminal = os.openpty()
    tty.setraw(terminal)
    pieces: list[bytes] = []
    reader = threading.Thread(target=lambda: pieces.extend(_until_closed(leader)))
    reader.start()
    saved = [os.dup(1), os.dup(2)]
    try:
        for number in (1, 2):
            os.dup2(terminal, number)
        os.close(terminal)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        try:
            cli.main(arguments, prog_name="kdcache")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        for number, copy in enumerate(saved, 1):
            os.dup2(copy, number)
            os.close(copy)
    reader.join()
    os.close(leader)
    return b"".join(pieces).decode("utf-8", "surrogateescape"), code


def _until_closed(descriptor: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # EIO: the last writer has gone
        while data := os.read(descriptor, 65_536):
            yield data


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: files that are opened or changed, and what no reader has any business doing."""
    if event in _PATH_EVENTS:
        if isinstance(arguments[0], (str, bytes, Path)):  # else a descriptor that was opened before
            flags = arguments[2] if event == "open" else 0
            _SEEN.append((event, os.fsdecode(arguments[0]), flags if isinstance(flags, int) else 0))
    elif event.startswith(NEVER):
        _SEEN.append((event, str(arguments)[:200], 0))


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def _child(request: dict[str, Any]) -> dict[str, Any]:
    work, path = Path(request["work"]), Path(request["path"])
    os.chdir(work)
    sys.addaudithook(_note)
    born_with = _memory("VmRSS:")
    limit = _memory("VmData:") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    results = [_try(door, path, work) for door in request["doors"]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"results": results, "growth": peak - born_with}


def serve() -> None:
    """Forks a child for each request and prints what it found; a child that is killed is told by its signal.

    Until an empty line: the end of the file may be long in coming, since other children of the asker hold the pipe.
    """
    for module in (
        "hostile_base",
        "kdcache.store.cache",
        "kdcache.store.export",
        "kdcache.store.card",
        "kdcache_cli.main",
    ):
        importlib.import_module(module)
    for command in ("inspect", "verify", "merge", "export", "card"):
        importlib.import_module(f"kdcache_cli.{command}")
    gc.freeze()  # what was imported is not looked at again, so that children share its pages
    for line in sys.stdin:
        if not line.strip():
            break
        inlet, outlet = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                request = json.loads(line)
                signal.alarm(request["seconds"])
                answer = json.dumps(_child(request))
            except BaseException:
                answer = json.dumps({"results": [], "growth": 0, "failed": traceback.format_exc()})
            with open(outlet, "w") as file:
                file.write(answer)
            os._exit(0)
        os.close(outlet)
        with open(inlet) as file:
            answer = file.read()
        _, status = os.waitpid(child, 0)
        print(
            answer or json.dumps({"results": [], "growth": 0, "failed": f"killed by signal {status & 127}"}), flush=True
        )


if __name__ == "__main__":
    serve()
