"""`.npy` and `.npz` that somebody else wrote: streamed, compared with the file's size, and never unpickled.

The reader runs in the process of the test here; tests/store/test_foreign_process.py runs it where it belongs.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import opened, read, rows_of
from numpy.lib import format as npy_format

from kdcache.errors import DataError
from kdcache.store.foreign_column import text_bytes

LOGITS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def member(array: np.ndarray, **settings: object) -> bytes:
    """The bytes of an .npy file."""
    stream = io.BytesIO()
    npy_format.write_array(stream, array, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", ">f8", "<i4", ">i8", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_of_any_byte_order_and_memory_order(tmp_path: Path, dtype: str, order: str) -> None:
    values = (
        np.asarray(10 * LOGITS, dtype, order=order) if dtype != "|u1" else np.asarray(LOGITS > 0, dtype, order=order)
    )
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(read(tmp_path / "a.npy", "npy", "array"), values)


def test_the_second_version_of_the_npy_format_and_more_dimensions(tmp_path: Path) -> None:
    values = np.arange(50 * 3 * 4 * 2, dtype=np.float32).reshape(50, 3, 4, 2)
    for name, array in (("c", values), ("f", np.asfortranarray(values))):
        (tmp_path / f"{name}.npy").write_bytes(member(array, version=(2, 0)))
        np.testing.assert_array_equal(read(tmp_path / f"{name}.npy", "npy", "array"), values)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_arrays_of_an_npz_file_are_read_side_by_side(tmp_path: Path, save) -> None:
    ids = np.array([f"img/ä{number}" for number in range(50)])
    save(tmp_path / "a.npz", logits=LOGITS, y=np.arange(50), ids=ids)
    with opened(tmp_path / "a.npz", "npz") as source:
        columns = [source.column(name) for name in ("logits", "y", "ids")]
        parts = zip(*(column.blocks(7) for column in columns), strict=True)
        logits, labels, names = (np.concatenate(blocks) for blocks in zip(*parts, strict=True))
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(labels, np.arange(50))
    assert text_bytes("ids", names).tolist() == [text.encode() for text in ids.tolist()]


def test_a_name_that_is_no_array_is_not_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", logits=LOGITS)
    np.save(tmp_path / "a.npy", LOGITS)
    with opened(tmp_path / "a.npz", "npz") as source:
        assert source.column("logit") is None
        assert source.column("logits.npy") is None
        assert source.listing(9) == [{"name": "logits", "shape": [50, 6], "dtype": "float32"}]
    with opened(tmp_path / "a.npy", "npy") as source:
        assert source.column("logits") is None
        assert source.listing(9) == [{"name": "array", "shape": [50, 6], "dtype": "float32"}]


def test_objects_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    trap = np.array([Touch(tmp_path / "made")] * 50, object)
    np.savez(tmp_path / "a.npz", logits=trap)
    np.save(tmp_path / "a.npy", trap)
    for format in ("npz", "npy"):
        with opened(tmp_path / f"a.{format}", format) as source:
            name = source.listing(1)[0]["name"]
            with pytest.raises(DataError, match="holds objects, which would have to be unpickled"):
                source.column(name)
    assert not (tmp_path / "made").exists()


def test_a_file_of_torch_save_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    torch.save({"logits": torch.from_numpy(LOGITS)}, tmp_path / "a.pt")
    with (
        pytest.raises(DataError, match=r"a file of torch\.save, which holds pickled objects"),
        opened(tmp_path / "a.pt", "npz"),
    ):
        pass


@pytest.mark.parametrize("change", [-1, -100, 1, 4096])
def test_an_npy_file_that_is_too_short_or_too_long_is_refused(tmp_path: Path, change: int) -> None:
    data = member(LOGITS)
    (tmp_path / "a.npy").write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(DataError, match=rf"needs {len(data)} bytes, and {len(data) + change} are there"):
        read(tmp_path / "a.npy", "npy", "array")


def test_a_header_that_promises_terabytes_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    npy_format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": True, "shape": (1 << 40, 6)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("logits.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="needs 26388279066752 bytes"):
        read(tmp_path / "a.npz", "npz", "logits")


def test_a_member_that_unpacks_to_more_than_deflate_can_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", member(LOGITS))
        archive.infolist()[0].file_size = 1 << 40
    with pytest.raises(DataError, match="1099511627776 bytes cannot come from"):
        read(tmp_path / "a.npz", "npz", "logits")


@pytest.mark.parametrize("rows", [7, 4000])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_in_an_npz_file_is_compared_with_its_checksum(tmp_path: Path, method: int, rows: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("logits.npy", member(np.tile(LOGITS, (80, 1))))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 16] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with opened(tmp_path / "a.npz", "npz") as source:
        column = source.column("logits")
        with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
            list(column.blocks(rows))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_byte_in_an_npz_file_is_found(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("logits.npy", member(LOGITS))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[600] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises((zipfile.BadZipFile, zlib.error)):
        read(tmp_path / "a.npz", "npz", "logits")


def test_other_methods_passwords_and_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "xz.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("logits.npy", member(LOGITS))
    with pytest.raises(DataError, match="zip method 14; expected stored or deflated"):
        read(tmp_path / "xz.npz", "npz", "logits")
    with zipfile.ZipFile(tmp_path / "secret.npz", "w") as archive:
        archive.writestr("logits.npy", member(LOGITS))
    data = bytearray((tmp_path / "secret.npz").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.npz").write_bytes(data)
    with pytest.raises(DataError, match="is encrypted"):
        read(tmp_path / "secret.npz", "npz", "logits")
    with zipfile.ZipFile(tmp_path / "two.npz", "w") as archive:
        archive.writestr("logits.npy", member(LOGITS))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("logits.npy", member(-LOGITS))
    with pytest.raises(DataError, match="two arrays have one name"):
        read(tmp_path / "two.npz", "npz", "logits")


def test_a_listing_goes_on_behind_an_array_that_cannot_be_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("broken.npy", b"no header")
        archive.writestr("logits.npy", member(LOGITS))
        archive.writestr("notes.txt", b"not an array")
    with opened(tmp_path / "a.npz", "npz") as source:
        broken, logits = source.listing(9)
        assert broken["dtype"].startswith("not readable")
        assert logits["name"] == "logits"
        np.testing.assert_array_equal(rows_of(source.column("logits")), LOGITS)
