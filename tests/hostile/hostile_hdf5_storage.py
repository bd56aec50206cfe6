"""Element types, shapes, chunks and filters that libhdf5 can make and our writer does not."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t, h5z
from hostile_base import CLASSES, ROWS, create, edited, put_file
from hostile_cases import hostile

_CHUNK_BYTES = 256 * CLASSES * 2
_BOMB_BYTES = 2 << 30


def _with_logits(folder: Path, **change: Any) -> Path:
    return put_file(folder, edited(lambda file: create(file, **change)))


# --------------------------------------------------------------------------- element types


@hostile(r"element type 19[0-9a-f]+ \(variable-length\)")
def variable_length_rows(folder: Path) -> Path:
    """Rows of variable length: each is a pointer into a global heap, with the length to allocate beside it, so one row
    can claim 4 billion elements. libhdf5 has leaked and crashed here."""
    return _with_logits(folder, kind=h5t.vlen_create(h5t.IEEE_F16LE), fill=h5d.FILL_TIME_IFSET)


@hostile(r"element type 19[0-9a-f]+ \(variable-length\)", alike="variable_length_rows")
def python_objects(folder: Path) -> Path:
    """h5py's own type for Python text: a naive reader gets an array of objects, and one that goes on with
    `allow_pickle` runs what they hold."""
    return _with_logits(folder, kind=h5t.py_create(h5py.string_dtype(), logical=True), fill=h5d.FILL_TIME_IFSET)


@hostile(r"element type 15[0-9a-f]+ \(opaque\)")
def opaque_pickle(folder: Path) -> Path:
    """Opaque bytes that are a pickle which runs a shell command. Readers that store objects as opaque bytes unpickle
    whatever they find there."""
    payload = pickle.dumps(_Command(), 2)

    def edit(file: h5py.File) -> None:
        data = create(file, kind=h5t.py_create(np.dtype(f"V{len(payload)}")))
        data[...] = np.full((ROWS, CLASSES), np.void(payload))

    return put_file(folder, edited(edit))


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch PWNED",)


@hostile(r"element type 36[0-9a-f]+ \(compound\)")
def compound_rows(folder: Path) -> Path:
    """Rows that are records: nested without a bound, with fields that overlap, and with names that a naive reader turns
    into attributes."""
    return _with_logits(folder, kind=h5t.py_create(np.dtype([("__class__", "<f2"), ("b", "<i8")])))


@hostile(r"element type 38[0-9a-f]+ \(enum\)")
def enumerated_values(folder: Path) -> Path:
    """Numbers with names. h5py makes booleans of some of them, and a naive reader counts them as logits."""
    return _with_logits(folder, kind=h5t.py_create(h5py.enum_dtype({"FALSE": 0, "TRUE": 1}, "i1"), logical=True))


@hostile(r"element type 11210f00[0-9a-f]+ \(big-endian float\)")
def big_endian_floats(folder: Path) -> Path:
    """The right type in the other byte order. A reader that maps the bytes trains on noise that is finite, and hence
    goes unnoticed."""
    return _with_logits(folder, dtype=">f2")


@hostile(r"element type 10010000[0-9a-f]+ \(big-endian integer\)")
def big_endian_integers(folder: Path) -> Path:
    """Integers in the other byte order in the place of the logits: label 1 reads as label 2**56."""
    return _with_logits(folder, dtype=">u2")


@hostile(r"element type 11200f00 ?[0-9a-f]+ \(float\)")
def float_of_odd_bits(folder: Path) -> Path:
    """A float of 16 bits, 8 of them exponent (bfloat16, as a custom type): read as float16 every value is wrong, and
    nearly all of them are plausible."""
    kind = h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    return _with_logits(folder, kind=kind)


@hostile(r"element type 11203f00[0-9a-f]+ \(float\)")
def float_of_64_bits(folder: Path) -> Path:
    """float64 logits: four times the bytes that the schema says; a reader that believes the schema reads past rows."""
    return _with_logits(folder, dtype="<f8")


@hostile(r"element type 17000000[0-9a-f]+ \(reference\)")
def object_references(folder: Path) -> Path:
    """Elements that are addresses of objects; libhdf5 opens whatever lies there."""
    return _with_logits(folder, kind=h5t.STD_REF_OBJ)


@hostile(r"element type 17010000[0-9a-f]+ \(reference\)")
def region_references(folder: Path) -> Path:
    """Elements that are selections in other arrays, stored in a heap: parsed when a value is read."""
    return _with_logits(folder, kind=h5t.STD_REF_DSETREG)


@hostile(r"element type 14[0-9a-f]+ \(bit field\)")
def bit_fields(folder: Path) -> Path:
    """Bit fields: no NumPy type fits them, and readers differ in what they make of them."""
    return _with_logits(folder, kind=h5t.STD_B16LE)


@hostile(r"element type 12[0-9a-f]+ \(time\)")
def unix_times(folder: Path) -> Path:
    """The type class `time`, which no library maintains: h5py raises a TypeError in the middle of a read."""
    return _with_logits(folder, kind=h5t.UNIX_D32LE)


@hostile(r"element type 3a[0-9a-f]+ \(array\)")
def arrays_in_elements(folder: Path) -> Path:
    """Elements that are arrays of their own: the shape of the data set is not the shape of what is read, and the sizes
    of both multiply."""
    return _with_logits(folder, kind=h5t.py_create(np.dtype(("<f2", (1 << 20,)))), chunk=(1, 1), shape=(1, 1))


@hostile(r"element type 13110000[0-9a-f]+ \(string\)")
def text_of_another_character_set(folder: Path) -> Path:
    """Ids that are marked as UTF-8 text, so that h5py hands out str where the writer's ids are bytes: joins by id then
    find nothing."""
    kind = h5t.C_S1.copy()
    kind.set_size(8)
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    return _with_logits(folder, kind=kind)


@hostile(r"element type 13000000[0-9a-f]+ \(string\)")
def text_that_ends_with_nul(folder: Path) -> Path:
    """Ids that end at the first NUL: two different ids become one."""
    kind = h5t.C_S1.copy()
    kind.set_size(8)
    return _with_logits(folder, kind=kind)


# --------------------------------------------------------------------------- shapes


@hostile("fill value: space is allocated late")
def rows_that_were_never_written(folder: Path) -> Path:
    """2**40 rows without one chunk, in a file of a few kilobytes: 128 TiB of zeros for whoever reads them all."""
    return _with_logits(folder, shape=(1 << 40, CLASSES), alloc=h5d.ALLOC_TIME_LATE)


@hostile("array can be extended")
def array_that_can_grow(folder: Path) -> Path:
    """An array without an upper bound, indexed by an extensible array. Who knows its length when a batch is drawn?"""
    return _with_logits(folder, max_shape=(h5s.UNLIMITED, CLASSES))


@hostile("array can be extended", alike="array_that_can_grow")
def array_that_can_double(folder: Path) -> Path:
    """An array that can grow to twice its rows."""
    return _with_logits(folder, max_shape=(2 * ROWS, CLASSES))


@hostile("dataspace is neither a scalar nor a simple fixed shape")
def array_without_a_shape(folder: Path) -> Path:
    """A null dataspace: an array with a type and without a shape, not even an empty one."""
    return _with_logits(folder, space=h5s.create(h5s.NULL), layout=h5d.CONTIGUOUS)


@hostile(r"shape \(\) is empty or scalar")
def scalar_array(folder: Path) -> Path:
    """A scalar where rows should be: `len` fails, `[:]` gives one number."""
    return _with_logits(folder, shape=(), layout=h5d.COMPACT)


@hostile(r"shape \(0, 64\) is empty or scalar")
def array_of_no_rows(folder: Path) -> Path:
    """No rows at all: a naive reader divides by their number, or lets the epoch end before it began."""
    return _with_logits(folder, shape=(0, CLASSES), chunk=(1, CLASSES), max_shape=(0, CLASSES))


@hostile("9 dimensions, at most 8 are used")
def array_of_nine_dimensions(folder: Path) -> Path:
    """Nine dimensions. HDF5 has up to 32, and each one is a factor that can overflow."""
    return _with_logits(folder, shape=(ROWS,) + (1,) * 8, chunk=(256,) + (1,) * 8)


@hostile(r"arrays have different numbers of rows: \[600, 601\]")
def arrays_of_different_lengths(folder: Path) -> Path:
    """601 rows of logits beside 600 labels. Which row belongs to which label?"""
    return _with_logits(folder, shape=(ROWS + 1, CLASSES))


# --------------------------------------------------------------------------- storage


@hostile("array is not chunked but virtual")
def virtual_array(folder: Path) -> Path:
    """The logits are a view of another file, which libhdf5 opens by the path that the file names; where it is missing
    the rows read as zeros."""

    def edit(file: h5py.File) -> None:
        space, properties = h5s.create_simple((ROWS, CLASSES)), h5p.create(h5p.DATASET_CREATE)
        properties.set_virtual(space, b"/etc/secret.h5", b"x", space)
        properties.set_obj_track_times(False)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        h5d.create(file.id, b"logits", h5t.IEEE_F16LE, space, properties)

    return put_file(folder, edited(edit))


@hostile(r"unexpected message 0x7 \(external files\)")
def external_raw_storage(folder: Path) -> Path:
    """The bytes of the logits lie in /etc/passwd, as HDF5 allows: whoever republishes what was read publishes the file
    of the victim."""

    def edit(file: h5py.File) -> None:
        file.create_dataset("logits", (ROWS, CLASSES), "<f2", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])

    return put_file(folder, edited(edit))


@hostile(r"layout version is 3 \(contiguous\), not 4|not chunked but contiguous")
def contiguous_array(folder: Path) -> Path:
    """One block without chunks, which need not be there before it is written: an address of 2**64-1 means zeros."""
    return _with_logits(folder, layout=h5d.CONTIGUOUS, alloc=h5d.ALLOC_TIME_EARLY)


@hostile(r"layout version is 3 \(compact\), not 4|not chunked but compact")
def compact_array(folder: Path) -> Path:
    """An array that lies within its own header, where no row can be mapped."""
    return _with_logits(folder, shape=(8, 8), layout=h5d.COMPACT)


@hostile("fill value: space is allocated incrementally, not early")
def unallocated_chunks(folder: Path) -> Path:
    """Chunks that were never allocated. libhdf5 answers with the fill value: a missing shard becomes a teacher that is
    sure of nothing."""
    return _with_logits(folder, alloc=h5d.ALLOC_TIME_INCR)


@hostile("fill value is defined")
def fill_value_of_seven(folder: Path) -> Path:
    """A fill value: rows that nobody wrote read as sevens."""
    return _with_logits(folder, fill_value=7)


@hostile("fill value is written on allocation, not never")
def filled_when_allocated(folder: Path) -> Path:
    """Chunks that libhdf5 fills when it allocates them: on a full disk it crashes while doing so."""
    return _with_logits(folder, fill=h5d.FILL_TIME_ALLOC)


@hostile(r"chunk \(256, 32\) of \(600, 64\), expected \(256, 64\)")
def chunks_that_cut_rows(folder: Path) -> Path:
    """Chunks of half a row: row i no longer lies at offset + i * row bytes, and a reader by offset mixes two rows."""
    return _with_logits(folder, chunk=(256, CLASSES // 2))


@hostile(r"chunk \(100, 64\) of \(600, 64\), expected \(256, 64\)")
def chunks_of_other_rows(folder: Path) -> Path:
    """Chunks of 100 rows. Each row lies where ours would, but the padding of the last chunk is the attacker's choice: a
    chunk of 2**40 rows makes a sparse file of terabytes that is hashed when it is opened."""
    return _with_logits(folder, chunk=(100, CLASSES))


# --------------------------------------------------------------------------- filters


def _with_filter(folder: Path, chunks: list[bytes], filters: Any, mask: int = 0) -> Path:
    def edit(file: h5py.File) -> None:
        data = create(file, filters=filters, alloc=h5d.ALLOC_TIME_INCR)
        for number, chunk in enumerate(chunks):
            data.id.write_direct_chunk((256 * number, 0), chunk, mask)

    return put_file(folder, edited(edit))


def deflated_zeros(size: int) -> bytes:
    """`size` bytes of zeros, a multiple of 16 MiB, as zlib writes them: one block over and over."""
    block = 16 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", size % 65521, 1)
    return b"\x78\xda" + first * (size // block) + b"\x03\x00" + checksum


@hostile(r"unexpected message 0xb \(filters\)")
def inflate_bomb(folder: Path) -> Path:
    """One chunk of 2 MiB that inflates to 2 GiB: whoever decompresses first and compares sizes then is out of
    memory."""
    return _with_filter(folder, [deflated_zeros(_BOMB_BYTES)], [(h5z.FILTER_DEFLATE, 0, (9,))])


@hostile(r"unexpected message 0xb \(filters\)", alike="inflate_bomb")
def unknown_filter(folder: Path) -> Path:
    """Filter 31999, which nobody has registered. libhdf5 looks for a library of that name in HDF5_PLUGIN_PATH and loads
    it: code of the attacker's choice, where he can put a file there. The tests set that variable."""
    return _with_filter(folder, [bytes(_CHUNK_BYTES)], [(31999, h5z.FLAG_OPTIONAL, None)])


@hostile(r"unexpected message 0xb \(filters\)", alike="inflate_bomb")
def filter_mask_that_skips_the_checksum(folder: Path) -> Path:
    """Fletcher checksums that the mask of each chunk switches off: bytes that look protected and are not."""
    return _with_filter(folder, [bytes(_CHUNK_BYTES)] * 3, [(h5z.FILTER_FLETCHER32, 0, None)], mask=1)


@hostile(r"unexpected message 0xb \(filters\)", alike="inflate_bomb")
def filtered_twice(folder: Path) -> Path:
    """gzip in gzip: the ratio of a bomb squared."""
    chunk = zlib.compress(zlib.compress(bytes(_CHUNK_BYTES)))
    return _with_filter(folder, [chunk], [(h5z.FILTER_DEFLATE, 0, (9,))] * 2)
