"""Promise S4: opening, reading, inspecting and verifying a cache touches nothing outside of it, and writes nothing.

An audit hook sees what Python opens, lists, imports, starts or connects to; strace sees every system call with a path
or a socket. The caches are sound ones and hostile ones: mutants of the fuzz, links to secrets, names that lead outside.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache

HERE = Path(__file__).parent
READ_ONLY_CALLS = {
    *("openat", "open", "openat2", "newfstatat", "stat", "lstat", "fstat", "statx", "access", "faccessat"),
    *("faccessat2", "readlink", "readlinkat", "getcwd", "statfs", "fstatfs", "exit_group"),
}
CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(?P<name>\w+)\((?P<rest>.*)$")
OPENED = re.compile(r'(?:AT_FDCWD(?:<[^>]*>)?|\d+<(?P<folder>[^>]*)>), "(?P<name>[^"]*)", O_')
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound caches, a secret beside them, and hostile caches that point at it."""
    home = tmp_path_factory.mktemp("outside")
    rng = np.random.default_rng(0)
    for name in ("warm", "sound", "one.h5"):
        with kdcache.Writer(home / name, classes=3, shard_rows=40) as writer:
            writer.write(np.arange(100), rng.normal(size=(100, 3)).astype(np.float32), np.arange(100) % 3)
    (home / "empty").mkdir()  # where the watched process stands
    (home / "secret").mkdir()
    (home / "secret" / "key").write_bytes(b"SECRET")
    shutil.copytree(home / "sound" / "shards", home / "secret" / "shards")
    hostile = home / "hostile"
    hostile.mkdir()
    for name, change in HOSTILE.items():
        shutil.copytree(home / "sound", hostile / name)
        change(hostile / name, home / "secret")
    (hostile / "link.h5").symlink_to(home / "secret" / "key")
    os.mkfifo(hostile / "pipe.h5")
    return home


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def _edit(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from fuzz_reseal import reseal_manifest

    value = json.loads((cache / "manifest.json").read_bytes())
    change(value)
    _replace(cache / "manifest.json", lambda path: path.write_bytes(reseal_manifest(value)))


HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    "shards-link": lambda cache, secret: _replace(
        cache / "shards", lambda path: path.symlink_to(secret / "shards", target_is_directory=True)
    ),
    "shard-link": lambda cache, secret: _replace(
        cache / "shards/v000-00001.h5", lambda path: path.symlink_to(secret / "shards/v000-00001.h5")
    ),
    "manifest-link": lambda cache, secret: _replace(
        cache / "manifest.json", lambda path: path.symlink_to(secret / "key")
    ),
    "shard-pipe": lambda cache, secret: _replace(cache / "shards/v000-00002.h5", os.mkfifo),
    "names-outside": lambda cache, secret: _edit(
        cache, lambda value: value["shards"][0].update(file="../../secret/shards/v000-00000.h5")
    ),
    "absolute-name": lambda cache, secret: _edit(
        cache, lambda value: value["shards"][0].update(file=str(secret / "key"))
    ),
    "classes-link": lambda cache, secret: (
        (cache / "classes.json").symlink_to(secret / "key"),
        _edit(cache, lambda value: value.update(classes={"count": 3, "names": None, "sha256": "0" * 64})),
    )[0],
}


@pytest.fixture(scope="module")
def mutants(home: Path) -> Callable[[int], list[Path]]:
    """The first of so many mutants of the fuzz, as files and folders of their own."""
    found: list[Path] = []

    def make(count: int) -> list[Path]:
        from fuzz_targets import ManifestFile, OneFile, Shard

        if found:
            return found[:count]
        for kind in (OneFile, Shard, ManifestFile):
            target = kind(home / "fuzz" / kind.__name__)
            for number in range(count // 3):
                rng = random.Random(f"outside {number}")
                base = rng.choice(target.bases)
                path = home / "mutants" / f"{kind.__name__}-{number}{base.path.suffix}"
                found.append(base.write(path, target.changes(rng, base)))
        return found

    return make


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that would tell of a write: names, kinds, sizes, times and content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def watch(what: str, home: Path, caches: list[Path], *prefix: str) -> dict[str, Any]:
    command = [*prefix, sys.executable, str(HERE / "outside_child.py"), what, str(home / "warm"), *map(str, caches)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def caches_in(home: Path) -> list[Path]:
    return [home / "sound", home / "one.h5", *sorted((home / "hostile").iterdir())]


def test_reading_opens_nothing_outside_and_writes_nothing(
    home: Path, mutants: Callable[[int], list[Path]], count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    caches = [*caches_in(home), *mutants(count(60, 3000))]
    before = state(home)
    seen = watch("read", home, caches)
    assert not seen["violations"]
    assert seen["events"]["open"] >= 3 * len(caches)  # the hook saw what there was to see
    assert not seen["hdf5"]
    assert state(home) == before
    proved("S4", caches=len(caches), events=sum(seen["events"].values()), outside=0)


@pytest.mark.long
def test_an_epoch_of_a_loader_opens_nothing_outside(home: Path) -> None:
    before = state(home)
    seen = watch("load", home, [home / "sound", home / "one.h5"])
    assert not seen["violations"]
    assert seen["events"]["open"] >= 5
    assert not seen["hdf5"]
    assert state(home) == before


def test_a_cache_behind_a_link_is_read_and_nothing_beside_it(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home / "sound", target_is_directory=True)
    (tmp_path / "link.h5").symlink_to(home / "one.h5")
    for name in ("link", "link.h5"):
        with kdcache.open(tmp_path / name) as cache:
            assert len(cache.gather(np.arange(100))) == 100
    seen = watch("read", home, [tmp_path / "link", tmp_path / "link.h5"])
    assert not seen["violations"]


@pytest.fixture
def read_only(home: Path, tmp_path: Path) -> Iterator[Path]:
    """The caches in a file system to which nothing can be written."""
    place = tmp_path / "mounted"
    place.mkdir()
    for command in (["mount", "--bind", home, place], ["mount", "-o", "remount,ro,bind", place]):
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            subprocess.run(["umount", str(place)], capture_output=True)
            pytest.skip("this process may not mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_cache_that_cannot_be_written_to_is_read_all_the_same(read_only: Path) -> None:
    seen = watch("read", read_only, caches_in(read_only))
    assert not seen["violations"]
    for name in ("sound", "one.h5"):
        assert kdcache.verify(read_only / name).ok


def traced(home: Path, caches: list[Path], log: Path) -> list[tuple[Path, str, str]]:
    """(cache, system call, the rest of the line) of everything with a path or a socket while a cache is used."""
    trace = "trace=%file,%network,%process,pwrite64,pwritev,ftruncate,fallocate,fchmod,copy_file_range,sendfile"
    watch("trace", home, caches, "strace", "-f", "-q", "-y", "-s", "4096", "-o", str(log), "-e", trace)
    found, cache = [], None
    for line in log.read_text(errors="replace").splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        if "/mark-of-the-proof" in line:
            name = QUOTED.search(match["rest"])
            inner = name[1].partition("/mark-of-the-proof/")[2] if name else ""
            cache = Path("/", inner) if inner else None
        elif cache is not None:
            found.append((cache, match["name"], match["rest"]))
    return found


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None or subprocess.run(["strace", "-o", os.devnull, "true"]).returncode:
        pytest.skip("needs strace, and the right to trace")


@pytest.mark.usefixtures("strace")
def test_no_system_call_leaves_the_cache_or_writes(
    home: Path,
    tmp_path: Path,
    mutants: Callable[[int], list[Path]],
    count: Callable[[int, int], int],
    proved: Callable[..., None],
) -> None:
    caches = [*caches_in(home), *mutants(count(30, 1500))]
    calls = traced(home, caches, tmp_path / "log")
    assert {cache for cache, _, _ in calls} == set(caches)
    for cache, name, rest in calls:
        assert name in READ_ONLY_CALLS, (cache, name, rest)
        if not name.startswith("open"):
            continue
        match = OPENED.match(rest)
        assert match is not None, rest
        path = Path(match["folder"] or "/", match["name"])
        assert path.is_relative_to(os.path.realpath(cache)), (cache, name, rest)
        assert "O_RDONLY" in rest, rest
        assert not re.search("O_(CREAT|TRUNC|APPEND|WRONLY|RDWR)", rest), rest
    opened = sum(name.startswith("open") for _, name, _ in calls)
    assert opened >= 3 * len(caches)
    proved("S4", caches=len(caches), system_calls=len(calls), outside=0)


def test_the_watch_sees_what_it_must(home: Path, tmp_path: Path) -> None:
    """Were the reader to open something else, follow a link, write or import, it would be seen."""
    script = (
        "import sys, os, pathlib\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import outside_child\n"
        "inside = pathlib.Path(sys.argv[2])\n"
        "watch = outside_child.Watch()\n"
        "deeds = [lambda: open('/etc/hostname'), lambda: os.open(inside / 'x', os.O_CREAT | os.O_WRONLY),\n"
        "         lambda: os.open(inside / 'link', os.O_RDONLY), lambda: os.listdir('/'), lambda: __import__('wave'),\n"
        "         lambda: os.system('true'), lambda: __import__('socket').socket(), lambda: os.unlink(inside / 'x'),\n"
        "         lambda: eval('1'), lambda: os.rename(inside / 'link', inside / 'y')]\n"
        "for deed in deeds:\n"
        "    watch.inside, before = inside, len(watch.violations)\n"
        "    deed()\n"
        "    watch.inside = None\n"
        "    assert len(watch.violations) > before, deed.__code__.co_firstlineno\n"
        "print(len(deeds))\n"
    )
    (tmp_path / "link").symlink_to(home / "secret" / "key")
    command = [sys.executable, "-W", "ignore", "-c", script, str(HERE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "10", done.stderr
