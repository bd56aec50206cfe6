"""Uses caches while everything that Python opens, imports or starts is watched: `outside_child.py WHAT WARM CACHE ...`.

WARM is a sound cache that is used first, so that imports are over when the watch begins. WHAT is `read` (without torch
and h5py), `load` (a DataLoader over a joined data set), or `trace`, which watches nothing itself but marks the
beginning and the end of each cache for strace. Prints a JSON object: `events` seen, `violations`, and whether libhdf5
is in the process.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kdcache
from kdcache.store.inspect import describe
from kdcache_cli.output import to_json, to_lines

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MARK = "/mark-of-the-proof"
# Events that touch nothing: looking at objects, at memory that is mapped, at the clock.
HARMLESS = {
    *("builtins.id", "object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe", "time.sleep"),
    *("ctypes.cdata", "ctypes.cdata/buffer", "ctypes.get_errno", "ctypes.addressof", "array.__new__"),
    *("gc.get_referents", "sys._getframemodulename", "code.__new__", "object.__reduce__"),
}
FOLDERS = {"os.listdir", "os.scandir", "pathlib.Path.iterdir"}


class Watch:
    """An audit hook, which cannot be taken off; it looks only while `inside` is set."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.events: collections.Counter[str] = collections.Counter()
        self.violations: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        inside, self.inside = self.inside, None  # what is done here to judge an event is none
        if inside is None:
            return
        try:
            self.events[event] += 1
            if event not in HARMLESS and not self._is_read_inside(event, arguments, inside):
                self.violations.append(f"{event} {arguments!r:.300}")
        finally:
            self.inside = inside

    def _is_read_inside(self, event: str, arguments: tuple[Any, ...], inside: Path) -> bool:
        """Whether it opens or lists something inside the cache, through no link, and not for writing."""
        if event not in (*FOLDERS, "open") or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return False
        path = Path(os.fsdecode(arguments[0]))
        if event == "open" and path.name == str(path) and path.name != "..":
            # In a folder that was opened before; not in the current one, which is empty.
            return bool(arguments[2] & os.O_NOFOLLOW) and not arguments[2] & WRITES
        is_inside = Path(os.path.realpath(path.parent), path.name).is_relative_to(inside)
        if event in FOLDERS:
            return is_inside and (path == inside or not path.is_symlink())
        flags = arguments[2]
        follows = not flags & os.O_NOFOLLOW and path.is_symlink()
        return is_inside and not flags & WRITES and not follows


def attempt(call: Callable[[], Any]) -> None:
    """A refusal is as good as a result."""
    try:
        call()
    except kdcache.KDCacheError as error:
        str(error)


def read(path: Path) -> None:
    """Everything that needs neither torch nor h5py."""
    for access in ("mmap", "pread"):
        attempt(lambda access=access: _gather(path, access))
    attempt(lambda: "\n".join(to_lines(kdcache.verify(path).to_json())))
    attempt(lambda: to_json(describe(path)))
    attempt(lambda: "\n".join(to_lines(describe(path))))


def _gather(path: Path, access: str) -> None:
    with kdcache.open(path, access=access) as cache:
        count = min(len(cache), 1000)
        cache.gather(np.arange(count)).dense()
        cache.rows(cache.sample_ids[:10], cache.views[0])


def load(path: Path) -> None:
    """An epoch of a DataLoader."""
    import torch
    from torch.utils.data import DataLoader

    class Samples(torch.utils.data.Dataset[Any]):
        sample_ids = np.arange(100)

        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(3), 0

    def epoch() -> None:
        with kdcache.open(path) as cache:
            for _, _, rows in DataLoader(kdcache.join(Samples(), cache, check="ids"), batch_size=32):
                rows.dense()

    attempt(epoch)


def main(what: str, warm: Path, caches: list[Path]) -> None:
    use = load if what == "load" else read
    (warm.parent / "empty").mkdir(exist_ok=True)
    os.chdir(warm.parent / "empty")
    missing = warm.with_name("missing")
    for path in (warm, missing, warm.parent, *caches[:1]):
        use(path)
    watch = Watch()
    for cache in caches:
        real = Path(os.path.realpath(cache))
        os.access(f"{MARK}/{cache}", os.F_OK)
        watch.inside = None if what == "trace" else real
        use(cache)
        watch.inside = None
    os.access(MARK, os.F_OK)
    libraries = Path("/proc/self/maps").read_text()
    print(json.dumps({"events": watch.events, "violations": watch.violations, "hdf5": "libhdf5" in libraries}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
