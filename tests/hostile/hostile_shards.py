"""Folder caches with a sound manifest over shards that are not what they seem."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from hostile_base import (
    SCHEMA,
    checksummed,
    container,
    header_of,
    put_folder,
    put_shard,
    rows_of,
    sealed,
    sound_file,
    sound_manifest,
    sound_shard,
    with_archive,
)
from hostile_cases import hostile

from kdcache.format.hdf5_header import FileLayout, build_layout
from kdcache.format.identity import canonical_json


@hostile("v000-00001.h5: [0-9]+ bytes, the manifest says [0-9]+; .*trunca", at="rows")
def shard_cut_short(folder: Path) -> Path:
    """A shard that lost its last bytes on the way: a map of the missing page ends the process with SIGBUS."""
    return put_folder(folder, v000_00001=sound_shard(1)[:-4096])


@hostile("v000-00000.h5: 0 bytes, the manifest says [0-9]+", at="rows")
def shard_of_no_bytes(folder: Path) -> Path:
    """An empty shard, as a full disk leaves it."""
    return put_folder(folder, v000_00000=b"")


@hostile("its header is not the one the manifest lists", at="rows", verify="describes another shard than the manifest")
def shards_exchanged(folder: Path) -> Path:
    """Two shards of equal size under each other's names: sound rows, 256 places away from their samples."""
    return put_folder(folder, v000_00000=sound_shard(1), v000_00001=sound_shard(0))


@hostile(r"row 100 \(sample 100\) does not match", at="rows", verify="the checksum of 1 rows does not match, .*row 100")
def row_changed_hashes_right(folder: Path) -> Path:
    """One logit changed, and every hash over the file put right, but the checksum of the row: found when that row is
    first read."""
    arrays = rows_of(sound_shard())
    arrays["logits"][100, 3] += 1
    return put_shard(folder, container(arrays, canonical_json(header_of(sound_shard()))))


@hostile("row 0 .sample 256. does not match", at="rows", verify="the checksum of 256 rows does not match")
def shard_of_other_rows_hashes_right(folder: Path) -> Path:
    """The rows of the second shard in the place of the first, every hash put right: the checksums of its rows are
    seeded with the position of the sample, and tell."""
    arrays = rows_of(sound_shard(1))
    return put_shard(folder, container(arrays, canonical_json(header_of(sound_shard(0)))))


@hostile("row 0 .sample 0. does not match", at="rows", verify="the checksum of 256 rows does not match, .*sample 0")
def rows_of_another_view(folder: Path) -> Path:
    """Rows that say view 3 in a shard of view 0: the crops of another augmentation."""
    arrays = rows_of(sound_shard())
    arrays["view"][:] = 3
    return put_shard(folder, container(checksummed(arrays, view=3), canonical_json(header_of(sound_shard()))))


@hostile("v000-00000.h5: its header describes another shard", at="verify")
def shard_that_names_another_teacher(folder: Path) -> Path:
    """A shard whose own header names another teacher than the manifest over it."""
    header = {**header_of(sound_shard()), "teacher": {"spec": "models:other"}}
    return put_shard(folder, container(rows_of(sound_shard()), canonical_json(header)))


@hostile("v000-00000.h5: bytes between its arrays, from byte [0-9]+ on, are not zero", at="verify")
def archive_in_the_padding_of_a_shard(folder: Path) -> Path:
    """A zip archive between two arrays of a shard, under a manifest that has the digest of it."""
    return put_shard(folder, with_archive(sound_shard()))


@hostile("v000-00000.h5: its sha256 is not the manifest's", at="verify")
def sha256_of_another_shard(folder: Path) -> Path:
    """The manifest lists the sha256 of a file that was audited. What lies there is another one, sound in itself."""
    manifest = sound_manifest()
    manifest["shards"][0]["sha256"] = hashlib.sha256(b"audited").hexdigest()
    return put_folder(folder, manifest)


@hostile("v000-00000.h5: row_max of sample 9 holds NaN or .inf", at="verify")
def row_maximum_that_is_infinite(folder: Path) -> Path:
    """A row maximum of +inf, checksum right: added to the logits it makes a row of infinities and NaN."""
    arrays = rows_of(sound_shard())
    arrays["row_max"][9] = np.inf
    return put_shard(folder, container(checksummed(arrays), canonical_json(header_of(sound_shard()))))


@hostile("teacher: the sample id 3 stands twice", at="verify")
def sample_id_in_two_shards(folder: Path) -> Path:
    """One id in two shards, each of which is sound: the later one wins, or the earlier."""
    arrays = rows_of(sound_shard(1))
    arrays["sample_id"][0] = 3
    data = container(checksummed(arrays, first=256), canonical_json(header_of(sound_shard(1))))
    path = put_shard(folder, data, 1)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["shards"][1]["ids"] = None
    (path / "manifest.json").write_bytes(sealed(manifest))
    return path


# --------------------------------------------------------------------------- sparse files


def _write_sparse(path: Path, header: str, rows: int) -> FileLayout:
    """A container whose metadata is all there and whose rows are one hole."""
    layout = build_layout(SCHEMA.specs, rows, header)
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, data in layout.metadata:
            file.seek(offset)
            file.write(data)
    return layout


@hostile("v000-00000.h5: row checksums were never written", at="rows")
def shard_of_a_hundred_million_rows_of_nothing(folder: Path) -> Path:
    """134 million rows, 20 GB in one hole of a sparse file that takes 8 KB. The HDF5 is sound; ids and row checksums,
    1.6 GB of zeros, would be hashed before one row is compared."""
    rows = 1 << 27
    path = put_folder(folder)
    header = canonical_json({**header_of(sound_shard()), "stop": rows})
    layout = _write_sparse(path / "shards" / "v000-00000.h5", header, rows)
    record = {**sound_manifest()["shards"][0], "stop": rows, "ids": [0, rows - 1], "size": layout.size}
    record["arrays"] = {name: [a.offset, a.dtype, list(a.shape)] for name, a in layout.arrays.items()}
    manifest = {**sound_manifest(), "samples": rows, "shard_rows": rows, "shards": [record]}
    (path / "manifest.json").write_bytes(sealed(manifest))
    return path


@hostile("teacher.h5: row checksums were never written")
def file_of_a_hundred_million_rows_of_nothing(folder: Path) -> Path:
    """The same as one file, where ids and row checksums are hashed as soon as it is opened."""
    rows = 1 << 27
    header = {**header_of(sound_file()), "samples": rows, "ids": [0, rows - 1]}
    _write_sparse(folder / "teacher.h5", canonical_json(header), rows)
    return folder / "teacher.h5"
