"""Caches that every reader accepts: so that what refuses everything passes no test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from encoded_base import put, write_encoded
from hostile_base import CLASSES, NAMES, open_writer, put_file, put_folder, sound_file, write_sound
from hostile_cases import valid
from hostile_places import FOLDER_ONLY

from kdcache.format.dense import Dense
from kdcache.format.identity import as_sample_ids
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import open_dump
from kdcache.store.incoming import consecutive
from kdcache.store.merge import merge
from kdcache.store.plan import Plan

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "format1"


def _write(path: Path, rows: int = 20, *, ids: Any = None, trailing: tuple[int, ...] = (), **settings: Any) -> Path:
    """A small cache without labels and digests."""
    logits = np.random.default_rng(0).standard_normal((rows, CLASSES, *trailing), np.float32)
    with open_writer(path, **settings) as writer:
        writer.write(np.arange(rows) if ids is None else ids, logits)
    return path


def _write_views(path: Path, views: tuple[int, ...]) -> Path:
    """A folder of several views, as `precompute` makes one."""
    rows, ids = 100, as_sample_ids([f"{n}.png" for n in range(100)])
    schema = RowSchema(Dense((CLASSES,), "float16"), ids.dtype.str, has_labels=False, has_digests=False)
    dump = open_dump(path, Plan(schema, ClassList.of(CLASSES, None), 40, rows, {}, views))
    for number in range(dump.plan.shard_count):
        view, start, stop = dump.plan.span(number)
        index = number % dump.plan.shards_per_view
        dump.claim(view, index)
        container = dump.container(view, index, start, stop)
        logits = np.random.default_rng(number).standard_normal((stop - start, CLASSES), np.float32)
        arrays = schema.encoding.encode(logits).arrays
        container.append({"sample_id": ids[start:stop], **arrays}, view=view, positions=np.arange(start, stop))
        dump.commit(container, container.record(view=view, start=start, ids=consecutive(ids[start:stop])), index)
        dump.release(view, index)
    dump.finish(dump.all_records() or [], samples=rows)
    dump.leave()
    return path


@valid
def folder_of_three_shards(folder: Path) -> Path:
    """float16, integer ids, labels, digests, class names: a folder."""
    return write_sound(folder / "teacher")


@valid
def one_file(folder: Path) -> Path:
    """The same as one file."""
    return put_file(folder, sound_file())


@valid
def folder_of_float32(folder: Path) -> Path:
    """float32 logits."""
    return write_sound(folder / "teacher", dtype="float32")


@valid
def one_file_of_float32(folder: Path) -> Path:
    """float32 logits, one file."""
    return write_sound(folder / "teacher.h5", dtype="float32")


@valid
def folder_of_text_ids(folder: Path) -> Path:
    """Text ids, neither labels nor digests."""
    return _write(folder / "teacher", ids=[f"cat/{n}.png" for n in range(20)], shard_rows=8)


@valid
def one_file_of_long_ids(folder: Path) -> Path:
    """Ids of 1,024 bytes, the most there may be."""
    return _write(folder / "teacher.h5", ids=[f"{n:01024d}" for n in range(20)])


@valid
def ids_in_any_order(folder: Path) -> Path:
    """Integer ids that follow no order, with both ends of int64 among them."""
    ids = [2**63 - 1, -(2**63), *range(1000, 1018)]
    return _write(folder / "teacher", ids=ids, shard_rows=7)


@valid
def rows_of_three_dimensions(folder: Path) -> Path:
    """Dense prediction: logits of 64 classes on 3 x 5 positions."""
    return _write(folder / "teacher.h5", trailing=(3, 5))


@valid
def single_row(folder: Path) -> Path:
    """One row: every array has HDF5's single-chunk index."""
    return _write(folder / "teacher", rows=1)


@valid
def single_row_in_one_file(folder: Path) -> Path:
    """One row, one file."""
    return _write(folder / "teacher.h5", rows=1)


@valid
def shards_of_one_row(folder: Path) -> Path:
    """Twenty shards of one row."""
    return _write(folder / "teacher", shard_rows=1)


@valid
def masked_and_clamped_logits(folder: Path) -> Path:
    """-inf, values below the range of float16, and a row that is constant."""
    logits = np.random.default_rng(0).standard_normal((20, CLASSES), np.float32)
    logits[0, 1:], logits[1, 3], logits[2] = -np.inf, -1e9, 7
    with open_writer(folder / "teacher") as writer:
        writer.write(np.arange(20), logits, np.full(20, -1))
    return folder / "teacher"


@valid
def header_of_fifty_thousand_bytes(folder: Path) -> Path:
    """Provenance that nearly fills the root attribute."""
    return write_sound(folder / "teacher.h5", provenance={"note": "x" * 50_000})


@valid
def class_names_in_a_file_of_their_own(folder: Path) -> Path:
    """5,000 names that do not fit into the manifest, and rows of 5,000 classes."""
    names = [f"token number {n}" for n in range(5000)]
    with open_writer(folder / "teacher", classes=names) as writer:
        writer.write(np.arange(20), np.random.default_rng(0).standard_normal((20, 5000), np.float32))
    return folder / "teacher"


@valid
def names_of_all_scripts(folder: Path) -> Path:
    """Class names in Arabic, Chinese and emoji, one of them empty."""
    return write_sound(folder / "teacher.h5", classes=["قطة", "猫", "\U0001f408", "", *NAMES[4:]])


@valid
def single_class(folder: Path) -> Path:
    """One logit a row: yes or no."""
    with open_writer(folder / "teacher", classes=1) as writer:
        writer.write(np.arange(20), np.zeros((20, 1), np.float32), np.arange(20) % 2)
    return folder / "teacher"


@valid
def folder_of_two_views(folder: Path) -> Path:
    """Views 0 and 3 of 100 samples."""
    return _write_views(folder / "teacher", (0, 3))


@valid
def one_file_of_two_views(folder: Path) -> Path:
    """The same as one file."""
    merge(_write_views(folder / "parts", (0, 3)), folder / "teacher.h5")
    return folder / "teacher.h5"


@valid
def views_with_large_numbers(folder: Path) -> Path:
    """Views 7 and 65,535, the last one there can be."""
    return _write_views(folder / "teacher", (7, 65_535))


@valid
def unlisted_files(folder: Path) -> Path:
    """Files that the manifest does not list, in both folders: noted, never read."""
    path = write_sound(folder / "teacher")
    (path / "shards" / "v001-00000.h5").write_bytes(b"not HDF5")
    (path / "shards" / "notes.txt").write_text("mine")
    (path / "notes.txt").write_text("mine")
    return path


@valid
def renamed_folder(folder: Path) -> Path:
    """A folder under another name, with spaces, quotes and letters of other scripts."""
    return write_sound(folder / "teacher").rename(folder / "猫 'teacher' \"2\" ü")


@valid
def link_to_a_cache(folder: Path) -> Path:
    """A link to a folder cache: only links inside of one are refused."""
    write_sound(folder / "store")
    (folder / "teacher").symlink_to(folder / "store")
    return folder / "teacher"


@valid
def link_to_a_one_file_cache(folder: Path) -> Path:
    """A link to a one-file cache."""
    put_file(folder, sound_file(), "store.h5")
    (folder / "teacher.h5").symlink_to("store.h5")
    return folder / "teacher.h5"


@valid
def read_only_folder(folder: Path) -> Path:
    """Files of mode 0444 and folders of mode 0555."""
    path = put_folder(folder)
    for part in path.rglob("*"):
        part.chmod(0o555 if part.is_dir() else 0o444)
    path.chmod(0o555)
    return path


@valid
def folder_without_lock_and_card(folder: Path) -> Path:
    """What arrives when only manifest and shards were sent."""
    return put_folder(folder)


@valid
def copy_with_other_times_and_modes(folder: Path) -> Path:
    """A copy that any user can write, with another time."""
    path = put_folder(folder)
    for part in path.rglob("*.h5"):
        part.chmod(0o666)
        os.utime(part, (0, 0))
    return path


@valid
def file_of_another_name(folder: Path) -> Path:
    """A one-file cache without .h5 in its name."""
    return put_file(folder, sound_file(), "teacher")


@valid
def folder_of_int8(folder: Path) -> Path:
    """8 bits a logit."""
    return write_encoded(folder / "teacher", "int8")


@valid
def one_file_of_int4(folder: Path) -> Path:
    """4 bits a logit, of 63 classes, one file."""
    return write_encoded(folder / "teacher.h5", "int4")


@valid
def folder_of_top_k(folder: Path) -> Path:
    """The 10 largest logits and the label's, with the tail at T = 1, 4 and that of the row."""
    return write_encoded(folder / "teacher", "topk")


@valid
def one_file_of_top_k(folder: Path) -> Path:
    """The same as one file."""
    return write_encoded(folder / "teacher.h5", "topk")


@valid
def one_file_of_all_logits_ranked(folder: Path) -> Path:
    """Top-k rows that keep every class, for one temperature, without labels."""
    return _write(folder / "teacher.h5", top_k=CLASSES, temperatures=("z2",))


@valid
def top_k_of_images(folder: Path) -> Path:
    """Dense prediction: the 3 largest of 64 classes on 3 x 5 positions."""
    return _write(folder / "teacher", trailing=(3, 5), top_k=3, temperatures=(0.5,))


@valid
def folder_of_factored_rows(folder: Path) -> Path:
    """Features of 16 values, and head.h5."""
    return put(folder, "factored")


@valid
def golden_factored_folder(folder: Path) -> Path:
    """The factored folder that was written when format 1 was new."""
    (folder / FOLDER_ONLY).touch()
    return Path(shutil.copytree(GOLDEN / "factored", folder / "teacher"))


@valid
def golden_folder(folder: Path) -> Path:
    """The folder that was written when format 1 was new."""
    return Path(shutil.copytree(GOLDEN / "folder", folder / "teacher"))


@valid
def golden_file(folder: Path) -> Path:
    """The one-file cache that was written when format 1 was new."""
    return Path(shutil.copy(GOLDEN / "file.h5", folder / "teacher.h5"))


@valid
def folder_of_soft_targets(folder: Path) -> Path:
    """The mean of several teachers at temperature 4: ten classes a row, and the mass of all others."""
    return write_encoded(folder / "teacher", "soft_targets")
