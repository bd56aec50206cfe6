"""Links, FIFOs, devices, sockets and folders in the place of files, before a cache is opened or right after.

Where something is exchanged after the cache was opened, the folder of the case holds `after-open.json`: the file to
remove, and what comes in its place.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from hostile_base import NAMES, put_file, put_folder, sound_manifest
from hostile_cases import hostile
from hostile_places import AFTER_OPEN, put_instead, put_socket

from kdcache.format.identity import canonical_json, fingerprint

_SHARD = "shards/v000-00001.h5"


def _folder_with(folder: Path, name: str, kind: str) -> Path:
    path = put_folder(folder)
    put_instead(path / name, kind, folder / "elsewhere")
    return path


def _exchanged_later(folder: Path, kind: str, name: str = _SHARD) -> Path:
    path = put_folder(folder)
    (folder / AFTER_OPEN).write_text(json.dumps([name, kind]))
    return path


def _with_classes_file(folder: Path) -> Path:
    manifest = sound_manifest()
    manifest["classes"] = {"count": 64, "sha256": fingerprint(NAMES)}
    path = put_folder(folder, manifest)
    (path / "classes.json").write_text(canonical_json(NAMES))
    return path


# --------------------------------------------------------------------------- one-file caches


@hostile("fifo.h5 is a FIFO, not a regular file")
def fifo_as_a_cache(folder: Path) -> Path:
    """A FIFO called fifo.h5: opening it waits for a writer, for ever."""
    os.mkfifo(folder / "fifo.h5")
    return folder / "fifo.h5"


@hostile("/dev/zero is a device, not a regular file")
def endless_device(folder: Path) -> Path:
    """/dev/zero, through a link called zero.h5: it has no size and no end."""
    (folder / "zero.h5").symlink_to("/dev/zero")
    return folder / "zero.h5"


@hostile("socket.h5 is a socket")
def socket_as_a_cache(folder: Path) -> Path:
    """A socket called socket.h5, which cannot be opened at all."""
    put_socket(folder / "socket.h5")
    return folder / "socket.h5"


@hostile("folder.h5 holds no manifest.json", code=4)
def folder_as_a_file(folder: Path) -> Path:
    """A folder with the name of a one-file cache."""
    (folder / "folder.h5").mkdir()
    return folder / "folder.h5"


@hostile("loop.h5 does not exist", code=4)
def link_to_itself(folder: Path) -> Path:
    """A link that leads to itself: code that resolves links by hand never ends."""
    (folder / "loop.h5").symlink_to("loop.h5")
    return folder / "loop.h5"


@hostile("only 0 bytes long")
def file_of_no_bytes(folder: Path) -> Path:
    """An empty file: `mmap` refuses it with a ValueError."""
    return put_file(folder, b"")


@hostile("teacher.h5 does not exist", code=4)
def link_to_nowhere(folder: Path) -> Path:
    """A link to a file that is gone."""
    (folder / "teacher.h5").symlink_to("nowhere.h5")
    return folder / "teacher.h5"


# --------------------------------------------------------------------------- manifests


@hostile("manifest.json is a FIFO, not a regular file")
def fifo_as_a_manifest(folder: Path) -> Path:
    """A FIFO in the place of the manifest: listing a folder of caches hangs."""
    return _folder_with(folder, "manifest.json", "fifo")


@hostile("manifest.json is a symbolic link")
def link_as_a_manifest(folder: Path) -> Path:
    """A link in the place of the manifest. It could lead to any file of the victim, whose text an error quotes."""
    return _folder_with(folder, "manifest.json", "link")


@hostile("manifest.json is a folder, not a regular file")
def folder_as_a_manifest(folder: Path) -> Path:
    """A folder in the place of the manifest."""
    return _folder_with(folder, "manifest.json", "folder")


@hostile("manifest.json is a socket")
def socket_as_a_manifest(folder: Path) -> Path:
    """A socket in the place of the manifest."""
    return _folder_with(folder, "manifest.json", "socket")


@hostile("classes.json is a FIFO, not a regular file")
def fifo_as_a_class_list(folder: Path) -> Path:
    """A FIFO in the place of the class list, which is opened only by some caches."""
    path = _with_classes_file(folder)
    put_instead(path / "classes.json", "fifo", folder / "elsewhere")
    return path


@hostile("classes.json is a symbolic link")
def link_as_a_class_list(folder: Path) -> Path:
    """A link in the place of the class list: the right names, from a file that may change to others."""
    path = _with_classes_file(folder)
    put_instead(path / "classes.json", "link", folder / "elsewhere")
    return path


# --------------------------------------------------------------------------- shards


@hostile("v000-00001.h5 is a FIFO, not a regular file", at="rows")
def fifo_as_a_shard(folder: Path) -> Path:
    """A FIFO in the place of a shard: training begins and hangs at the first batch that needs it."""
    return _folder_with(folder, _SHARD, "fifo")


@hostile("v000-00001.h5 is a symbolic link", at="rows")
def link_as_a_shard(folder: Path) -> Path:
    """A link in the place of a shard, to the right bytes, outside: they can change when everything was verified."""
    return _folder_with(folder, _SHARD, "link")


@hostile("v000-00001.h5 is a folder, not a regular file", at="rows")
def folder_as_a_shard(folder: Path) -> Path:
    """A folder in the place of a shard."""
    return _folder_with(folder, _SHARD, "folder")


@hostile("v000-00001.h5 is a socket", at="rows")
def socket_as_a_shard(folder: Path) -> Path:
    """A socket in the place of a shard."""
    return _folder_with(folder, _SHARD, "socket")


@hostile("v000-00001.h5 is missing", at="rows", code=4)
def shard_that_is_missing(folder: Path) -> Path:
    """A shard that was never sent."""
    path = put_folder(folder)
    (path / _SHARD).unlink()
    return path


@hostile("shards is a symbolic link; a cache holds regular", at="rows")
def link_as_the_folder_of_shards(folder: Path) -> Path:
    """The folder of the shards is a link: whoever replaces this cache removes files in another folder, and whoever
    reads it reads there."""
    return _folder_with(folder, "shards", "link")


@hostile("shards is not a folder", at="rows")
def file_as_the_folder_of_shards(folder: Path) -> Path:
    """A file in the place of the folder of the shards."""
    path = put_folder(folder)
    (path / "shards").rename(folder / "elsewhere")
    (path / "shards").write_bytes(b"")
    return path


@hostile("v000-00001.h5 is a FIFO, not a regular file", at="later", alike="fifo_as_a_shard")
def fifo_after_opening(folder: Path) -> Path:
    """A shard becomes a FIFO after the cache was opened and before its rows are read."""
    return _exchanged_later(folder, "fifo")


@hostile("v000-00001.h5 is a symbolic link", at="later", alike="link_as_a_shard")
def device_after_opening(folder: Path) -> Path:
    """A shard becomes a link to /dev/zero after the cache was opened."""
    return _exchanged_later(folder, "device")


@hostile("v000-00001.h5 is a folder, not a regular file", at="later", alike="folder_as_a_shard")
def folder_after_opening(folder: Path) -> Path:
    """A shard becomes a folder after the cache was opened."""
    return _exchanged_later(folder, "folder")


@hostile("v000-00001.h5 is a symbolic link", at="later", alike="link_as_a_shard")
def link_after_opening(folder: Path) -> Path:
    """A shard becomes a link to the same bytes elsewhere after the cache was opened."""
    return _exchanged_later(folder, "link")


@hostile("shards is a symbolic link; a cache holds regular", at="later", alike="link_as_the_folder_of_shards")
def folder_of_shards_exchanged_after_opening(folder: Path) -> Path:
    """The folder of the shards becomes a link to another folder after the cache was opened."""
    return _exchanged_later(folder, "link", "shards")
