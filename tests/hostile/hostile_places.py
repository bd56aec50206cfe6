"""What can stand in the place of a file, for cases that put it there and for doors that exchange it later."""

from __future__ import annotations

import os
import socket
from pathlib import Path

AFTER_OPEN = "after-open.json"
FOLDER_ONLY = "merge-to-a-folder"  # a file beside a cache that has no one-file form


def put_instead(path: Path, kind: str, outside: Path) -> None:
    """Replaces a file, or a folder, by a `fifo`, `socket`, `folder`, or a link.

    `link` moves what was there to `outside` and leads to it, `device` leads to /dev/zero.
    """
    if kind == "link":
        path.rename(outside)
        path.symlink_to(outside)
        return
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        put_socket(path)


def put_socket(path: Path) -> None:
    """A socket that nobody listens on; the path may be longer than the 107 bytes that an address has."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
