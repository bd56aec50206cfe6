"""Dumps in progress that somebody else began: plan, commit records, lock, and what lies in their place.

Each attack takes the folder of a dump with one committed shard, whoever made it: `Writer`, or `kdcache precompute`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_base import put_dump
from hostile_cases import CORRUPT, hostile
from hostile_places import put_instead

from kdcache.format.sealed import dump_sealed

Attack = Callable[[Path], object]
ATTACKS: dict[str, Attack] = {}
_RECORD = "shards/v000-00000.json"


def attack(reason: str, *, code: int = CORRUPT, at: str = "dump", alike: str = "") -> Callable[[Attack], Attack]:
    """Registers an attack on a dump as a case of its own, and for dumps that `precompute` began."""

    def register(change: Attack) -> Attack:
        @functools.wraps(change)
        def build(folder: Path) -> Path:
            path = put_dump(folder)
            change(path)
            return path

        hostile(reason, at=at, code=code, alike=alike)(build)
        ATTACKS[change.__name__] = change
        return change

    return register


def _reseal(path: Path, **changes: Any) -> None:
    """Changes fields of a plan or a record and puts its seal right."""
    value = json.loads(path.read_bytes())
    del value["seal"]
    _replace(path, dump_sealed({**value, **changes}))


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


# --------------------------------------------------------------------------- plans


@attack("plan.json: its content does not match its seal")
def plan_edited(root: Path) -> None:
    """Another number of rows a shard, edited into the plan: shards of two sizes, which no manifest can list."""
    path = root / "plan.json"
    _replace(path, path.read_bytes().replace(b'"shard_rows":256', b'"shard_rows":512'))


@attack("plan.json: not readable as JSON .JSONDecodeError: Expecting value")
def plan_of_nothing(root: Path) -> None:
    """An empty plan, as a full disk leaves it."""
    _replace(root / "plan.json", b"")


@attack("plan.json: not readable as JSON .RecursionError")
def plan_of_a_hundred_thousand_brackets(root: Path) -> None:
    """A plan of 100,000 brackets."""
    _replace(root / "plan.json", b"[" * 100_000)


@attack("plan.json: shard_rows and samples must be positive integers")
def plan_of_negative_shards(root: Path) -> None:
    """Minus 256 rows a shard, sealed: loops over shards that never begin or never end."""
    _reseal(root / "plan.json", shard_rows=-256)


@attack("plan.json: [0-9]+ shards, and a cache has at most 8192")
def plan_of_a_trillion_shards(root: Path) -> None:
    """2**40 samples in shards of one row, sealed: whoever asks which shards are done asks a trillion times."""
    _reseal(root / "plan.json", shard_rows=1, samples=1 << 40)


@attack("plan.json: a shard of 281474976710655 rows .*is too large")
def plan_of_one_giant_shard(root: Path) -> None:
    """One shard of 2**48-1 rows, sealed: its header alone takes libhdf5 hours to lay out."""
    _reseal(root / "plan.json", shard_rows=2**48 - 1, samples=2**48 - 1)


@attack("plan.json: views must be a list of numbers below 65536")
def plan_of_views_beyond_uint16(root: Path) -> None:
    """View 10**9, sealed: lock number and file name of its shards are those of no view that can be stored."""
    _reseal(root / "plan.json", views=[10**9])


@attack("plan.json: views must ascend")
def plan_of_one_view_twice(root: Path) -> None:
    """View 0 twice, sealed: two shards of one name."""
    _reseal(root / "plan.json", views=[0, 0])


@attack("plan.json: kind is 'folder', expected 'plan'")
def manifest_in_the_place_of_a_plan(root: Path) -> None:
    """A manifest under the name of a plan."""
    _reseal(root / "plan.json", kind="folder")


@attack("plan.json: encoding 'pickle' is not known")
def plan_of_an_unknown_encoding(root: Path) -> None:
    """An encoding that nobody knows, sealed."""
    _reseal(root / "plan.json", encoding={"name": "pickle", "dtype": "float16", "shape": [64]})


@attack("plan.json is a FIFO, not a regular file")
def fifo_as_a_plan(root: Path) -> None:
    """A FIFO in the place of the plan: resuming hangs, on every node of a cluster."""
    put_instead(root / "plan.json", "fifo", root.parent / "elsewhere")


@attack("plan.json is a symbolic link")
def link_as_a_plan(root: Path) -> None:
    """A link in the place of the plan, to a file that changes while ranks read it one after the other."""
    put_instead(root / "plan.json", "link", root.parent / "elsewhere")


@attack("plan.json: 104857600 bytes, more than the limit of 12582912")
def plan_of_100_megabytes(root: Path) -> None:
    """A plan of 100 MB, which every rank reads."""
    _replace(root / "plan.json", b"")
    with (root / "plan.json").open("r+b") as file:
        file.truncate(100 << 20)


# --------------------------------------------------------------------------- commit records


@attack("v000-00000.json: its content does not match its seal")
def record_edited(root: Path) -> None:
    """Another sha256 in a commit record: it goes into the manifest, which then does not fit its shard."""
    path = root / _RECORD
    value = json.loads(path.read_bytes())
    _replace(path, path.read_bytes().replace(value["sha256"].encode(), b"0" * 64))


@attack("v000-00000.json: '../../x.h5' is not a shard's file name")
def record_that_climbs_out(root: Path) -> None:
    """A record, sealed, of a shard called ../../x.h5, which is published and removed under that name."""
    _reseal(root / _RECORD, file="../../x.h5")


@attack("v000-00000.json: the record of another shard, v000-00001.h5")
def record_of_another_shard(root: Path) -> None:
    """A record, sealed, of the second shard under the name of the first."""
    _reseal(root / _RECORD, file="v000-00001.h5")


@attack("v000-00000.json: samples 256 to 511, expected (at most )?256 from sample 0 on")
def record_of_other_samples(root: Path) -> None:
    """A record, sealed, that says that the first shard holds samples 256 to 511: the manifest at the end of hours of
    work does not tile."""
    _reseal(root / _RECORD, start=256, stop=512, ids=[256, 511])


@attack("v000-00000.json: array logits lies outside the file")
def record_with_an_array_outside(root: Path) -> None:
    """A record, sealed, whose logits lie beyond the end of the shard."""
    arrays = json.loads((root / _RECORD).read_bytes())["arrays"]
    arrays["logits"][0] = 1 << 40
    _reseal(root / _RECORD, arrays=arrays)


@attack("v000-00000.json: 104857600 bytes, more than the limit of 12582912")
def record_of_100_megabytes(root: Path) -> None:
    """A record of 100 MB."""
    _replace(root / _RECORD, b"")
    with (root / _RECORD).open("r+b") as file:
        file.truncate(100 << 20)


@attack("v000-00000.json is a FIFO, not a regular file")
def fifo_as_a_record(root: Path) -> None:
    """A FIFO in the place of a commit record."""
    put_instead(root / _RECORD, "fifo", root.parent / "elsewhere")


@attack("v000-00000.json is a folder, not a regular file")
def folder_as_a_record(root: Path) -> None:
    """A folder in the place of a commit record."""
    put_instead(root / _RECORD, "folder", root.parent / "elsewhere")


# --------------------------------------------------------------------------- what lies about


@attack("its header is not the one the manifest lists", alike="shards_exchanged")
def shard_exchanged(root: Path) -> None:
    """Other bytes of equal size in a committed shard: its rows would go into the cache under the old record."""
    path = root / "shards" / "v000-00000.h5"
    _replace(path, path.read_bytes()[:-4096] + bytes(4096))


@attack("shards is a symbolic link; a cache holds a folder of its own there")
def link_as_the_shards_of_a_dump(root: Path) -> None:
    """The folder of the shards is a link to one that holds somebody else's shards: finishing, or replacing, the dump
    removes files there."""
    put_instead(root / "shards", "link", root.parent / "elsewhere")


@attack(".lock is a symbolic link")
def link_as_a_lock(root: Path) -> None:
    """The lock is a link to a file of the victim: opening it for writing makes that file, or locks a mailbox."""
    (root / ".lock").symlink_to(root.parent / "elsewhere")


@attack(".lock is not a regular file")
def fifo_as_a_lock(root: Path) -> None:
    """The lock is a FIFO."""
    os.mkfifo(root / ".lock")


@attack("holds 'evil.py', which is not part of a cache", code=2)
def foreign_file_beside_the_plan(root: Path) -> None:
    """A script of somebody's beside the plan: `--overwrite` must not remove what is not ours."""
    (root / "evil.py").write_text("")


@attack("holds 'shards/evil.txt', which is not part of a cache", code=2)
def foreign_file_among_the_shards(root: Path) -> None:
    """A file of somebody's among the shards."""
    (root / "shards" / "evil.txt").write_text("")


@attack("holds shards .v000-00000.h5 ....? but neither manifest.json nor plan.json", code=4)
def shards_without_a_plan(root: Path) -> None:
    """The plan is gone: which teacher made these rows?"""
    (root / "plan.json").unlink()


@attack("teacher holds another dump: provenance.teacher", code=5)
def plan_of_another_teacher(root: Path) -> None:
    """The plan of another teacher, sealed: half of the rows would be its, half ours."""
    provenance = json.loads((root / "plan.json").read_bytes())["provenance"]
    _reseal(root / "plan.json", provenance={**provenance, "teacher": {"spec": "models:other"}})
