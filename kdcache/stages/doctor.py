"""What this machine offers to kdcache: versions, extras, devices, limits, and what a folder's file system can do.

Every check tries the thing itself (a link, a lock, an fsync) in a temporary folder instead of reading the file
system's name: network file systems differ by mount option. Nothing here leaves a file behind.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, NOTE, BROKEN = "ok", "note", "broken"
OLDEST_PYTHON = (3, 10)
REQUIRED = ("torch", "numpy", "h5py", "click", "tqdm")
EXTRAS = {"PIL": ("pillow", "vision"), "safetensors": ("safetensors",) * 2, "tensorboard": ("tensorboard",) * 2}
SMALL_SHARED_MEMORY_BYTES = 1 << 30  # DataLoader workers hand batches over through it; containers often have 64 MiB
FEW_FILE_DESCRIPTORS = 1024  # workers of a DataLoader keep a descriptor for each tensor in flight


@dataclass(frozen=True)
class Check:
    """One finding. `status` is `ok`, `note` (works, with a limit) or `broken`; `advice` says what to do then."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine(folder: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """Look at the installation, the machine and one folder.

    Args:
        folder: Where caches are to be written; its file system is tried in a temporary folder inside.

    Returns:
        `ok` (False where something is broken) and `checks`, a list of dicts with the fields of `Check`.
    """
    checks = [*_versions(), *_extras(), _devices(), *_limits(), *_file_system(Path(folder)), _h5dump()]
    return {"ok": all(check.status != BROKEN for check in checks), "checks": [asdict(check) for check in checks]}


def _versions() -> Iterator[Check]:
    version = platform.python_version()
    old = sys.version_info < OLDEST_PYTHON
    yield Check("python", BROKEN if old else OK, version, "Install Python 3.10 or newer." if old else "")
    for package in REQUIRED:
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            yield Check(package, BROKEN, f"does not import: {error}", f"Run: pip install --force-reinstall {package}")
        else:
            yield Check(package, OK, importlib.metadata.version(package))
    try:
        import h5py
    except (ImportError, OSError):
        return  # reported above
    yield Check("HDF5", OK, h5py.version.hdf5_version)


def _extras() -> Iterator[Check]:
    for module, (package, extra) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Check(package, NOTE, "not installed", f'Where it is wanted: pip install "kdcache[{extra}]"')
        else:
            yield Check(package, OK, importlib.metadata.version(package))


def _devices() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("devices", BROKEN, "torch does not import")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return Check("devices", OK, ", ".join([*names, "cpu"]))


def _limits() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", OK, f"{usable} usable of {os.cpu_count()}")
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        small = size < SMALL_SHARED_MEMORY_BYTES
        advice = "DataLoader workers may run out of it: docker run --shm-size=8g, or num_workers=0."
        yield Check("shared memory", NOTE if small else OK, _gibibytes(size), advice if small else "")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < FEW_FILE_DESCRIPTORS
    yield Check("file descriptors", NOTE if few else OK, str(soft), "Raise it: ulimit -n 4096" if few else "")


def _file_system(folder: Path) -> Iterator[Check]:
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(prefix=".kdcache-doctor-", dir=folder) as scratch:
            yield Check("folder", OK, f"{folder}: writable, {_gibibytes(free)} free")
            for name, attempt, status, advice in _ATTEMPTS:
                yield _tried(name, attempt, Path(scratch), status, advice)
    except OSError as error:
        yield Check("folder", BROKEN, f"{folder}: {error.strerror}", "Choose a folder that you can write to.")


def _tried(name: str, attempt: Callable[[Path], None], folder: Path, status: str, advice: str) -> Check:
    try:
        attempt(folder)
    except (OSError, ValueError) as error:
        return Check(name, status, f"fails: {error}", advice)
    return Check(name, OK, "works")


def _try_fsync(folder: Path) -> None:
    with (folder / "fsync").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(folder: Path) -> None:
    with (folder / "lock").open("wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)


def _try_map(folder: Path) -> None:
    path = folder / "map"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if view[:1] != b"x":
            raise ValueError("the mapped bytes are not those of the file")


def _try_link(folder: Path) -> None:
    (folder / "linked").write_bytes(b"x")
    os.link(folder / "linked", folder / "link")


_ATTEMPTS = (
    ("fsync", _try_fsync, BROKEN, "A cache written here may be lost in a crash. Write to another disk, then copy."),
    ("record locks", _try_lock, BROKEN, "Several processes cannot share a dump here: mount with locks, or elsewhere."),
    ("mmap", _try_map, BROKEN, "Caches cannot be read from here: copy them to a local disk first."),
    ("hard links", _try_link, NOTE, "Shards are published by rename under the lock instead."),
)


def _h5dump() -> Check:
    path = shutil.which("h5dump")
    if path is None:
        return Check("h5dump", NOTE, "not found", "Only one test needs it: apt-get install hdf5-tools")
    return Check("h5dump", OK, path)


def _gibibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
