"""Files that libhdf5 can make and our writer does not: each is refused, and for its own reason.

They start from one of ours and change one thing, so that it is this thing that is refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import h5py
import numpy as np
import pytest
from h5py import h5a, h5d, h5p, h5s, h5t

from kdcache.errors import CorruptCacheError
from kdcache.format.arrays import ArraySpec
from kdcache.format.hdf5_header import build_layout
from kdcache.format.hdf5_parser import parse
from kdcache.format.lookup3 import lookup3

ROWS = 600
ATTRIBUTE = '{"format": 1}'
SPARE = "spare_with_a_long_name_so_that_its_link_leaves_room"
SPECS = [
    ArraySpec("logits", "<f2", (10,)),
    ArraySpec("label", "<i8"),
    ArraySpec("sample_id", "|S7"),
    ArraySpec(SPARE, "<u2"),
    ArraySpec(f"{SPARE}2", "<u2"),
]


def make_image() -> bytes:
    """A file as our writer makes it, whose rows are zero."""
    layout = build_layout(SPECS, ROWS, ATTRIBUTE)
    image = bytearray(layout.size)
    for offset, piece in layout.metadata:
        image[offset : offset + len(piece)] = piece
    return bytes(image)


def assert_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptCacheError, match=reason):
        parse(lambda offset, length: data[offset : offset + length], len(data), name="cache.h5")


def edited(*removed: str, edit: Callable[[h5py.File], object]) -> bytes:
    """A file of ours after libhdf5 has edited it."""
    buffer = io.BytesIO(make_image())
    with h5py.File(buffer, "r+", libver=("v110", "v110")) as file:
        for name in removed:
            del file[name]  # leaves room for another link in the root group
        edit(file)
    return blanked(completed(buffer))


def blanked(data: bytes) -> bytes:
    """`data` without what removed links leave in the padding of the root group, which would be refused first."""
    image = bytearray(data)
    position, stop = 56, 56 + int.from_bytes(data[54:56], "little")
    while stop - position >= 4:
        length = int.from_bytes(data[position + 1 : position + 3], "little")
        if data[position] == 0:
            image[position + 4 : position + 4 + length] = bytes(length)
        position += 4 + length
    image[stop : stop + 4] = lookup3(bytes(image[48:stop])).to_bytes(4, "little")
    return bytes(image)


def completed(buffer: io.BytesIO) -> bytes:
    """The file, with the room that libhdf5 allocated at the end without writing; superblocks before 2 differ there."""
    data = buffer.getvalue()
    end = int.from_bytes(data[28:36], "little") if data[8] >= 2 else len(data)
    return data.ljust(end, b"\0")


def create(file: h5py.File, name: str = "logits", **change: object) -> None:
    """Create an array as our writer does, but for `change`."""
    properties = h5p.create(h5p.DATASET_CREATE)
    shape = change.get("shape", (ROWS, 10))
    if "layout" in change:
        properties.set_layout(change["layout"])
    else:
        properties.set_chunk(change.get("chunk", (256, 10)))
    properties.set_alloc_time(change.get("alloc", h5d.ALLOC_TIME_EARLY))
    properties.set_fill_time(change.get("fill", h5d.FILL_TIME_NEVER))
    properties.set_obj_track_times(bool(change.get("times", False)))
    if change.get("deflate"):
        properties.set_deflate(1)
    if "fill_value" in change:
        properties.set_fill_value(np.array(change["fill_value"], "<f2"))
    kind = change.get("kind") or h5t.py_create(np.dtype(str(change.get("dtype", "<f2"))))
    space = h5s.create_simple(shape, change.get("max_shape"))
    h5d.create(file.id, name.encode(), kind, space, properties)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((ROWS, 10), "<f2")
    layout[:] = h5py.VirtualSource("/etc/secret.h5", "x", shape=(ROWS, 10), dtype="<f2")
    file.create_virtual_dataset("logits", layout)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("logits", (ROWS, 10), "<f2", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def attribute(file: h5py.File, name: str, value: str | np.ndarray | bytes) -> None:
    del file.attrs["kdcache"]
    file.attrs.create(name, value)


def with_link(link: object) -> Callable[[h5py.File], None]:
    return lambda file: file.__setitem__("logits", link)


def with_array(**change: object) -> Callable[[h5py.File], None]:
    return lambda file: create(file, **change)


ARRAYS_OF_LIBHDF5: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "external link": (with_link(h5py.ExternalLink("/etc/secret.h5", "/x")), "soft, external or user-defined link"),
    "soft link": (with_link(h5py.SoftLink("/label")), "soft, external or user-defined link"),
    "hard link to another array": (lambda file: with_link(file["label"])(file), "unexpected message 0x16|overlap"),
    "cycle of hard links": (lambda file: with_link(file["/"])(file), "header flags|unexpected message"),
    "group": (lambda file: file.create_group("logits"), "header flags|unexpected message"),
    "committed type": (with_link(np.dtype("<f2")), "header flags|unexpected message"),
    "virtual array": (virtual, "header flags|not chunked|unexpected message"),
    "external storage": (external_storage, "header flags|unexpected message 0x7|not chunked"),
    "contiguous array": (with_array(layout=h5d.CONTIGUOUS), "layout version|not chunked"),
    "compact array": (with_array(layout=h5d.COMPACT, shape=(10,), dtype="<f2"), "flags 0x0 on message 0x8|not chunked"),
    "gzip": (with_array(deflate=True), "unexpected message 0xb"),
    "timestamps": (with_array(times=True), "header flags"),
    "late allocation": (with_array(alloc=h5d.ALLOC_TIME_LATE), "flags 0x0 on message 0x8|fill value"),
    "incremental allocation": (with_array(alloc=h5d.ALLOC_TIME_INCR), "flags 0x0 on message 0x8|fill value"),
    "filling": (with_array(fill=h5d.FILL_TIME_ALLOC), "fill value"),
    "fill value": (with_array(fill_value=7), "fill value"),
    "resizable": (with_array(max_shape=(2 * ROWS, 10)), "can be extended"),
    "unlimited": (with_array(max_shape=(h5s.UNLIMITED, 10)), "can be extended"),
    "chunks that cut rows": (with_array(chunk=(256, 5)), r"chunk \(256, 5\) of"),
    "scalar": (with_array(shape=(), layout=h5d.CONTIGUOUS), "layout version|not chunked"),
    "big-endian": (with_array(dtype=">f2"), "element type"),
    "float64": (with_array(dtype="<f8"), "element type"),
    "complex": (with_array(dtype="<c8"), "element type"),
    "compound": (with_array(kind=h5t.py_create(np.dtype([("a", "<f2")]))), "element type"),
    "vlen": (with_array(kind=h5t.vlen_create(h5t.IEEE_F16LE), fill=h5d.FILL_TIME_IFSET), "element type"),
    "vlen string": (
        with_array(kind=h5t.py_create(h5py.string_dtype(), logical=True), fill=h5d.FILL_TIME_IFSET),
        "element type",
    ),
    "enum": (with_array(kind=h5t.py_create(h5py.enum_dtype({"A": 1}, "u1"), logical=True)), "element type"),
    "opaque": (with_array(dtype="|V8"), "element type"),
    "reference": (with_array(kind=h5t.STD_REF_OBJ), "element type"),
    "array type": (with_array(kind=h5t.py_create(np.dtype(("<f2", (3,))))), "element type"),
    "other rows": (with_array(shape=(ROWS + 1, 10)), "different numbers of rows"),
    "nine dimensions": (with_array(shape=(ROWS,) + (1,) * 8, chunk=(256,) + (1,) * 8), "9 dimensions"),
    "capital letters": (lambda file: create(file, "Logits"), "array name"),
    "control characters": (lambda file: create(file, "lo\ngits"), "array name"),
    "a name of 65 letters": (lambda file: create(file, "a" * 65), "array name"),
    "attribute of an array": (lambda file: file["label"].attrs.__setitem__("x", 1), "unexpected message 0x15"),
}


@pytest.mark.parametrize("case", ARRAYS_OF_LIBHDF5)
def test_arrays_that_our_writer_does_not_make_are_refused(case: str) -> None:
    change, reason = ARRAYS_OF_LIBHDF5[case]
    assert_refused(edited("logits", SPARE, f"{SPARE}2", edit=change), reason)


ATTRIBUTES_OF_LIBHDF5: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "none": (lambda file: file.attrs.__delitem__("kdcache"), "0 root attributes"),
    "two": (lambda file: file.attrs.__setitem__("x", np.int8(1)), "attribute b'x"),
    "another name": (lambda file: attribute(file, "kdcachf", np.bytes_("x")), "attribute b'kdcachf"),
    "vlen text": (lambda file: attribute(file, "kdcache", "text"), "fixed-length UTF-8"),
    "ASCII": (lambda file: attribute(file, "kdcache", np.bytes_("text")), "fixed-length UTF-8"),
    "number": (lambda file: attribute(file, "kdcache", np.array(1, "<i8")), "fixed-length UTF-8"),
    "array": (lambda file: attribute(file, "kdcache", np.array([b"a", b"b"])), "fixed-length UTF-8"),
    "array of texts": (lambda file: write_text(file, b"abcd", shape=(2,)), "can be extended|not a scalar"),
    "empty": (lambda file: write_text(file, b"\0"), "contains NUL"),
    "not UTF-8": (lambda file: write_text(file, b"\xff\xfe"), "not UTF-8"),
    "too long": (lambda file: write_text(file, b"x" * 60_000), "unexpected message 0x10|attribute of 60000"),
    "dense": (lambda file: [file.attrs.__setitem__(f"a{i}", i) for i in range(20)] and None, "dense|unexpected"),
}


def write_text(file: h5py.File, text: bytes, shape: tuple[int, ...] = ()) -> None:
    del file.attrs["kdcache"]
    kind = h5t.C_S1.copy()
    kind.set_size(len(text))
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    h5a.create(file.id, b"kdcache", kind, space).write(np.full(shape, text, f"S{len(text)}"), mtype=kind)


@pytest.mark.parametrize("case", ATTRIBUTES_OF_LIBHDF5)
def test_attributes_that_our_writer_does_not_make_are_refused(case: str) -> None:
    change, reason = ATTRIBUTES_OF_LIBHDF5[case]
    assert_refused(edited(SPARE, edit=change), reason)


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest", ("v110", "v110")])
def test_files_of_other_programs_are_refused(libver: str | tuple[str, str]) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=libver) as file:
        create(file)
        file.attrs["kdcache"] = np.bytes_(ATTRIBUTE.encode())
    assert_refused(completed(buffer), "superblock version|header flags|group does not|unexpected message")


def test_a_user_block_before_the_file_is_refused() -> None:
    assert_refused(b"#!/bin/sh\n".ljust(512, b"\0") + make_image(), "no HDF5 signature")


def test_what_a_removed_array_leaves_behind_is_refused() -> None:
    buffer = io.BytesIO(make_image())
    with h5py.File(buffer, "r+", libver=("v110", "v110")) as file:
        del file["label"]
    assert_refused(completed(buffer), "padding in the header of the root group is not zero")


def test_the_unchanged_file_is_accepted() -> None:
    data = make_image()
    parsed = parse(lambda offset, length: data[offset : offset + length], len(data), name="cache.h5")
    assert [array.spec for array in parsed.arrays.values()] == SPECS


def test_an_array_that_libhdf5_adds_as_our_writer_does_is_accepted() -> None:
    data = edited("logits", SPARE, f"{SPARE}2", edit=create)
    parsed = parse(lambda offset, length: data[offset : offset + length], len(data), name="cache.h5")
    assert parsed.arrays["logits"].shape == (ROWS, 10)
