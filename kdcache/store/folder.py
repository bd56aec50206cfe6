"""The names in a folder cache, and its manifest: all that a reader needs, without the writer's half (or h5py)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import CLASSES_FILE, ClassList, Manifest, parse_manifest
from kdcache.format.strict_json import MAX_JSON_BYTES, load_json
from kdcache.store import posix

MANIFEST = "manifest.json"
PLAN = "plan.json"
SHARDS = "shards"
VERSIONS = "versions.json"  # in a folder of caches, one for each version of a teacher


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder cache.

    Raises:
        IncompleteCacheError: there is none.
        CorruptCacheError: it is not what our writer wrote.
    """
    path = folder / MANIFEST
    manifest = parse_manifest(posix.read_file(path, MAX_JSON_BYTES), where=str(path))
    if manifest.classes.names is None and manifest.classes.sha256 is not None:
        return replace(manifest, classes=_read_classes(folder / CLASSES_FILE, manifest.classes))
    return manifest


def _read_classes(path: Path, classes: ClassList) -> ClassList:
    """The names of a class list that has a file of its own, checked against their hash."""
    text = posix.read_file(path, MAX_JSON_BYTES)
    if hashlib.sha256(text).hexdigest() != classes.sha256:
        raise CorruptCacheError(f"{path}: the class names do not match the hash in the manifest; fetch the file again")
    names = load_json(b'{"names":' + text + b"}", where=str(path))["names"]
    if not isinstance(names, list) or len(names) != classes.count or not all(isinstance(n, str) for n in names):
        raise CorruptCacheError(f"{path}: expected a list of {classes.count} names")
    return replace(classes, names=tuple(names))
