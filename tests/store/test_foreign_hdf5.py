"""HDF5 that somebody else wrote: what common tools write is read, what points away or has gaps is refused by name.

The reader runs in the process of the test here; tests/store/test_foreign_process.py runs it where it belongs.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from foreign_files import opened, read, rows_of
from h5py import h5d, h5p, h5s, h5t

from kdcache.errors import DataError
from kdcache.store.foreign_column import text_bytes, text_width
from kdcache.store.foreign_hdf5 import Hdf5Source

LOGITS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
SECRET = np.full((50, 6), 7, np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.h5"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunks": True, "compression": "gzip", "shuffle": True},
        {"chunks": (16, 4), "compression": "lzf", "fletcher32": True},
        {"chunks": (50, 1), "compression": "gzip"},
        {"chunks": (1, 6)},
        {"chunks": (16, 6), "maxshape": (None, 6)},
        {"dtype": ">f4"},
        {"dtype": ">f8"},
        {"dtype": "<f2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_arrays_as_common_tools_write_them(path: Path, how: dict[str, object], version: str) -> None:
    with h5py.File(path, "w", libver=version) as file:
        file.create_dataset("model/head/logits", data=LOGITS, **how)
    expected = LOGITS.astype(how.get("dtype", "f4"))
    np.testing.assert_array_equal(read(path, "HDF5", "model/head/logits"), expected)
    np.testing.assert_array_equal(read(path, "HDF5", "/model/head/logits"), expected)


def test_an_array_behind_a_block_of_its_users(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["logits"] = LOGITS
    np.testing.assert_array_equal(read(path, "HDF5", "logits"), LOGITS)


def test_bfloat16_comes_as_float32(path: Path) -> None:
    brain = h5t.IEEE_F16LE.copy()
    brain.set_fields(15, 7, 8, 0, 7)
    brain.set_ebias(127)
    exact = np.arange(12, dtype=np.float32).reshape(4, 3)
    with h5py.File(path, "w") as file:
        dataset = h5d.create(file.id, b"logits", brain, h5s.create_simple(exact.shape))
        dataset.write(h5s.ALL, h5s.ALL, exact)
    np.testing.assert_array_equal(read(path, "HDF5", "logits"), exact)


@pytest.mark.parametrize(
    "dtype", [h5py.string_dtype(), h5py.string_dtype("ascii"), "S12", h5py.string_dtype(length=12)]
)
def test_text_of_any_kind_becomes_bytes(path: Path, dtype: object) -> None:
    names = [f"img/{number}" for number in range(20)]
    if dtype != "S12" and h5py.check_string_dtype(np.dtype(dtype)).encoding == "utf-8":
        names[3] = "zoë/3"
    with h5py.File(path, "w") as file:
        file.create_dataset("ids", data=[name.encode() for name in names], dtype=dtype)
    with opened(path, "HDF5") as source:
        column = source.column("ids")
        assert column is not None
        assert column.is_text
        assert text_width(column, 7) == 6
        assert text_bytes("ids", rows_of(column)).tolist() == [name.encode() for name in names]


def test_a_text_that_is_no_sample_id_is_refused(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["ids"] = ["a" * 1025]
    with opened(path, "HDF5") as source, pytest.raises(DataError, match="a text of 1025 bytes"):
        text_width(source.column("ids"), 7)


# What points away from the file, and what should not be there; each gets a file and a private neighbour of it.


def _external_link(file: h5py.File, neighbour: Path) -> None:
    file["logits"] = h5py.ExternalLink(str(neighbour), "/logits")


def _external_group(file: h5py.File, neighbour: Path) -> None:
    file["group"] = h5py.ExternalLink(str(neighbour), "/")
    file["logits"] = h5py.SoftLink("/group/logits")


def _soft_link(file: h5py.File, neighbour: Path) -> None:
    file["other"] = LOGITS
    file["logits"] = h5py.SoftLink("/other")


def _soft_loop(file: h5py.File, neighbour: Path) -> None:
    file["logits"] = h5py.SoftLink("/logits")


def _external_storage(file: h5py.File, neighbour: Path) -> None:
    file.create_dataset("logits", (50, 6), "f4", external=[(str(neighbour), 0, h5py.h5f.UNLIMITED)])


def _virtual(file: h5py.File, neighbour: Path) -> None:
    layout = h5py.VirtualLayout((50, 6), "f4")
    layout[:] = h5py.VirtualSource(str(neighbour), "logits", shape=(50, 6), dtype="f4")
    file.create_virtual_dataset("logits", layout)


def _filtered(numbers: list[int]) -> Callable[[h5py.File, Path], None]:
    def write(file: h5py.File, neighbour: Path) -> None:
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_chunk((50, 6))
        for number in numbers:
            properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (4,))
        space = h5s.create_simple((50, 6))
        dataset = h5d.create(file.id, b"logits", h5t.IEEE_F32LE, space, properties)
        dataset.write_direct_chunk((0, 0), LOGITS.tobytes())

    return write


def _missing_chunk(file: h5py.File, neighbour: Path) -> None:
    file.create_dataset("logits", (50, 6), "f4", chunks=(10, 6))[:40] = LOGITS[:40]


def _never_written(file: h5py.File, neighbour: Path) -> None:
    file.create_dataset("logits", (50, 6), "f4")


def _of_type(dtype: object) -> Callable[[h5py.File, Path], None]:
    def write(file: h5py.File, neighbour: Path) -> None:
        file.create_dataset("logits", (50,), dtype)

    return write


def _empty(file: h5py.File, neighbour: Path) -> None:
    file["logits"] = h5py.Empty("f4")


REFUSED = {
    "a link into another file": (_external_link, "a link into another file, which is not followed"),
    "a group in another file": (_external_group, "behind a soft link to /group/logits"),
    "a soft link": (_soft_link, "a soft link to /other; name that array"),
    "a soft link to itself": (_soft_loop, "a soft link to /logits"),
    "raw data in another file": (_external_storage, "keeps its bytes in another file"),
    "a virtual data set": (_virtual, "a virtual data set"),
    "the filter of a plug-in": (_filtered([32001]), r"filter 32001 \(Blosc\); plug-ins are not loaded"),
    "a filter nobody knows": (_filtered([31999]), "filter 31999; plug-ins are not loaded"),
    "a filter twice": (_filtered([1, 1]), "the same HDF5 filter twice"),
    "a chunk that was never written": (_missing_chunk, "4 of its 5 chunks; the other rows were never written"),
    "nothing that was ever written": (_never_written, "its rows were never written"),
    "references": (_of_type(h5py.ref_dtype), "references or rows of varying length"),
    "rows of varying length": (_of_type(h5py.vlen_dtype("f4")), "references or rows of varying length"),
    "structures": (_of_type([("a", "f4", (6,))]), "expected plain numbers or text"),
    "opaque bytes": (_of_type("V8"), "expected plain numbers or text"),
    "complex numbers": (_of_type("c8"), "expected plain numbers or text"),
    "no data space": (_empty, "a null data space"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_array_is_refused_that_is(path: Path, tmp_path: Path, what: str) -> None:
    write, message = REFUSED[what]
    neighbour = tmp_path / "private.h5"
    with h5py.File(neighbour, "w") as file:
        file["logits"] = SECRET
    with h5py.File(path, "w") as file:
        write(file, neighbour)
    with opened(path, "HDF5") as source, pytest.raises(DataError, match=message):
        source.column("logits")


def test_a_group_in_another_file_is_not_entered(path: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "private.h5", "w") as file:
        file["logits"] = SECRET
    with h5py.File(path, "w") as file:
        file["group"] = h5py.ExternalLink(str(tmp_path / "private.h5"), "/")
    with opened(path, "HDF5") as source, pytest.raises(DataError, match="a link into another file"):
        source.column("group/logits")


@pytest.mark.parametrize(
    "name", ["nothing", "group", "group/", "array/deeper", "", "/", "..", "group/../array", "a\0b"]
)
def test_a_name_that_is_no_array_is_not_found(path: Path, name: str) -> None:
    with h5py.File(path, "w") as file:
        file["array"] = LOGITS
        file.create_group("group")
        file["a"] = np.dtype("f4")  # a committed type
    with opened(path, "HDF5") as source:
        assert source.column(name) is None


def test_the_listing_follows_no_link_and_no_circle_and_ends(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a/logits"] = LOGITS
        file["a/again"] = file["a"]
        file["linked"] = h5py.ExternalLink("private.h5", "/")
        file["ids"] = ["x"]
        for number in range(300):
            file[f"many/{number:03d}"] = number
    with opened(path, "HDF5") as source:
        listing = source.listing(200)
    assert len(listing) == 200
    assert {"name": "a/logits", "shape": [50, 6], "dtype": "float32"} in listing
    assert {"name": "ids", "shape": [1], "dtype": "text"} in listing
    assert {"name": "linked", "shape": [], "dtype": "link"} in listing


def test_a_chunk_is_decompressed_once_however_its_rows_are_asked_for(path: Path, monkeypatch) -> None:
    """Columns of 2 MiB as chunks, which HDF5 would forget from block to block: 16 MiB are more than it keeps."""
    rows = 1 << 19
    with h5py.File(path, "w") as file:
        logits = file.create_dataset("logits", (rows, 8), "f4", chunks=(rows, 1), compression="gzip")
        for column in range(8):
            logits.id.write_direct_chunk((0, column), zlib.compress(bytes(4 * rows), 1))
    data = io.BytesIO(path.read_bytes())
    reads = []
    monkeypatch.setattr(data, "readinto", lambda buffer: reads.append(len(buffer)) or io.BytesIO.readinto(data, buffer))
    with h5py.File(data, "r") as file:
        column = Hdf5Source(file, 1 << 28).column("logits")
        assert column is not None
        reads.clear()
        assert sum(len(block) for block in column.blocks(rows // 4)) == rows
    assert len(reads) == 8
