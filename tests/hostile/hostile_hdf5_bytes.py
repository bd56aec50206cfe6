"""Files that no library writes: bytes of ours changed by hand, and every checksum put right afterwards."""

from __future__ import annotations

import struct
from pathlib import Path

from hostile_base import (
    CLASSES,
    ROWS,
    container,
    create,
    edited,
    header_of,
    object_header,
    offset_of,
    patched,
    put_file,
    resealed,
    rows_of,
    sound_file,
    with_root_message,
)
from hostile_cases import hostile

_ROOT = 48
_U64 = struct.Struct("<Q").pack
_SHAPE = b"\x02\x02\x01\x01"  # of the logits: dataspace version 2, two dimensions, with maximum, simple
_LAYOUT = b"\x04\x02\x00\x02\x02\x00\x01\x08\x00"  # of label: version 4, chunked, no flags, chunk (256,) of 8 bytes


def _with_bytes(folder: Path, position: int, value: bytes, *, keep_checksums: bool = False) -> Path:
    image = bytearray(sound_file())
    image[position : position + len(value)] = value
    return put_file(folder, bytes(image) if keep_checksums else resealed(image))


# --------------------------------------------------------------------------- superblock


@hostile("wrong checksum of the superblock")
def superblock_with_a_wrong_checksum(folder: Path) -> Path:
    """The end of the file is 2**40 in a superblock whose checksum nobody looked at."""
    return _with_bytes(folder, 28, _U64(1 << 40), keep_checksums=True)


@hostile("wrong checksum of the header of the root group")
def root_group_with_a_wrong_checksum(folder: Path) -> Path:
    """A link that points elsewhere, in a header whose checksum nobody looked at."""
    position = sound_file().index(b"\x04view") + 5
    return _with_bytes(folder, position, _U64(1 << 20), keep_checksums=True)


@hostile("addresses or lengths are not of 8 bytes")
def addresses_of_four_bytes(folder: Path) -> Path:
    """Addresses of four bytes, says the superblock: every field behind it means something else."""
    return _with_bytes(folder, 9, b"\x04")


@hostile("base address is 8, not 0")
def base_address(folder: Path) -> Path:
    """Every address counts from byte 8: a reader that forgets to add it reads the row before."""
    return _with_bytes(folder, 12, _U64(8))


@hostile(r"its superblock says 18446744073709551615 \(truncated or grown\)")
def end_of_file_at_the_end_of_all_numbers(folder: Path) -> Path:
    """The file ends at byte 2**64-1: address + length is 0 in 64-bit arithmetic, and every check of bounds passes."""
    return _with_bytes(folder, 28, _U64(2**64 - 1))


@hostile(r"bytes long, its superblock says 1[0-9]{5} \(truncated or grown\)")
def archive_behind_the_end(folder: Path) -> Path:
    """A zip archive behind the last byte: the file is a cache to one program and an archive to another (zip is read
    from its end), and scanners look at one of the two."""
    return put_file(folder, sound_file() + b"PK\x05\x06" + bytes(18))


@hostile("only 40 bytes long")
def forty_bytes(folder: Path) -> Path:
    """A signature and nothing behind it: readers that take the rest for granted read beyond their buffer."""
    return put_file(folder, sound_file()[:40])


# --------------------------------------------------------------------------- object headers


@hostile("bytes 18446744073709551608 to 18446744073709551616 lie outside the file")
def root_group_beyond_the_end(folder: Path) -> Path:
    """The root group lies at byte 2**64-8."""
    return _with_bytes(folder, 36, _U64(2**64 - 8))


@hostile("no version 2 header of the root group at byte 0")
def root_group_in_the_superblock(folder: Path) -> Path:
    """The root group lies where the superblock lies: one structure is parsed as another one."""
    return _with_bytes(folder, 36, _U64(0))


@hostile(r"unexpected message 0x10 \(continuation\)")
def continuation_that_leads_back(folder: Path) -> Path:
    """The header of the root group goes on in itself. A naive parser follows it for ever (CVE-2018-17432 and many
    others in this place)."""
    return put_file(folder, with_root_message(0x10, 0, _U64(_ROOT) + _U64(64)))


@hostile(r"unexpected message 0x7f \(unknown\)")
def unknown_message_that_must_be_understood(folder: Path) -> Path:
    """A message of an unknown type whose flags say that a reader which does not know it must fail (0x80). A naive
    reader skips what it does not know, and with it the rule that changed the meaning of the rest."""
    return put_file(folder, with_root_message(0x7F, 0x88, bytes(16)))


@hostile(r"message 0x3 \(datatype\) of the array is shared")
def shared_message(folder: Path) -> Path:
    """The type of `label` is shared: the message holds an address where the type lies, anywhere in the file."""
    start = object_header(sound_file(), "label")
    position = sound_file().index(b"\x03\x0c\x00\x01", start) + 3  # the flags of a datatype message of 12 bytes
    return _with_bytes(folder, position, b"\x03")


@hostile(r"flags 0x8 on message 0x8 \(layout\)")
def message_with_other_flags(folder: Path) -> Path:
    """A layout message whose flags tell old libraries to fail: one reader reads what another one refuses."""
    start = object_header(sound_file(), "label")
    position = sound_file().index(_LAYOUT, start) - 1
    return _with_bytes(folder, position, b"\x08")


@hostile("array 'label': no version 2 header of the array")
def header_of_version_1(folder: Path) -> Path:
    """An object header of version 1, without a checksum, whose continuation blocks can form a circle."""
    return _with_bytes(folder, object_header(sound_file(), "label"), b"\x01\x00\x05\x00\x01")


@hostile("array 'row_crc': bytes [0-9]+ to [0-9]+ lie outside the file")
def header_longer_than_the_file(folder: Path) -> Path:
    """The header of `row_crc`, near the end, claims 65,535 bytes of messages: a naive parser reads behind the end."""
    return _with_bytes(folder, object_header(sound_file(), "row_crc") + 6, b"\xff\xff")


@hostile("padding in the header of the root group is not zero")
def message_hidden_as_padding(folder: Path) -> Path:
    """What a removed link left behind stands in the padding of the root group: data that no reader sees, and a
    forensic tool does."""
    return put_file(folder, with_root_message(0, 0, b"deleted rows, still there"))


@hostile("message 0x1 is repeated")
def two_shapes_of_one_array(folder: Path) -> Path:
    """`label` has two dataspaces. Which of them counts differs from reader to reader."""
    start = object_header(sound_file(), "label")
    position = sound_file().index(b"\x05\x02\x00\x01", start)  # the fill value message becomes a second shape
    return _with_bytes(folder, position, b"\x01")


@hostile("two arrays are called 'viev'")
def two_arrays_of_one_name(folder: Path) -> Path:
    """Two arrays of one name: a reader that keeps the first checks other rows than one that keeps the last uses."""
    arrays = rows_of(sound_file())
    image = bytearray(container({**arrays, "viev": arrays["view"], "viex": arrays["view"]}, header_of(sound_file())))
    position = image.index(b"\x04viex")
    image[position : position + 5] = b"\x04viev"
    return put_file(folder, resealed(image))


@hostile(r"array name '../x' is not")
def array_called_like_a_path(folder: Path) -> Path:
    """An array called `../x`. A naive exporter writes one file for each array, and this one beside its folder."""
    return put_file(folder, patched(b"\x04view", b"\x04../x"))


@hostile(r"array name 'v.x1b\[2' is not")
def array_called_like_an_escape_sequence(folder: Path) -> Path:
    """An array whose name is a terminal's command. Listing the file clears the screen, or does worse."""
    return put_file(folder, patched(b"\x04view", b"\x04v\x1b[2"))


@hostile("array name 'View' is not")
def array_in_capital_letters(folder: Path) -> Path:
    """`View` beside `view`: two arrays for HDF5, one file each for an exporter on a disk that knows no capitals."""
    return put_file(folder, patched(b"\x04view", b"\x04View"))


@hostile("array name 'a{65}' is not")
def array_with_a_long_name(folder: Path) -> Path:
    """A name of 65 letters; HDF5 allows 64 KiB, and a naive reader makes a file name of it."""
    return put_file(folder, edited(lambda file: create(file, "a" * 65)))


@hostile("link flags are 0x10, not 0")
def link_name_in_another_character_set(folder: Path) -> Path:
    """A link with a character set field: names that look alike and differ, and another length of the message."""
    position = sound_file().index(b"\x01\x00\x04view") + 1
    return _with_bytes(folder, position, b"\x10")


# --------------------------------------------------------------------------- shapes and addresses


@hostile(r"bytes [0-9]+ to 1407374[0-9]+ lie outside the file")
def shape_of_two_to_the_forty(folder: Path) -> Path:
    """2**40 rows of 64 logits, allocated, says the file of 100 KB. A naive reader allocates 128 TiB, or kills the
    machine where memory is overcommitted."""
    return _reshaped(folder, (1 << 40, CLASSES))


@hostile(r"chunk \(256, 64\) of \(9223372036854775809, 64\)|bytes [0-9]+ to 1180591620717411[0-9]+ lie outside")
def shape_whose_product_overflows(folder: Path) -> Path:
    """2**63+1 rows: times 128 bytes that is 128 in 64-bit arithmetic, so the array seems to fit into the file."""
    return _reshaped(folder, (2**63 + 1, CLASSES))


@hostile("chunks have elements of 2 bytes, not 4")
def chunks_of_another_element_size(folder: Path) -> Path:
    """The chunks say two bytes an element, the type says four: one of two readers is off by half."""
    start = object_header(sound_file(), "row_max")
    position = sound_file().index(b"\x04\x02\x00\x02\x02\x00\x01\x04\x00", start)
    return _with_bytes(folder, position + 7, b"\x02")


@hostile("chunk has an empty dimension")
def chunks_of_no_rows(folder: Path) -> Path:
    """Chunks of no rows: the number of chunks is a division by zero."""
    return put_file(folder, patched(_LAYOUT, b"\x04\x02\x00\x02\x02\x00\x00\x08\x00", array="label"))


@hostile("chunk shape is malformed")
def chunk_shape_of_no_width(folder: Path) -> Path:
    """The numbers of the chunk shape are zero bytes wide."""
    return put_file(folder, patched(_LAYOUT, b"\x04\x02\x00\x02\x00\x00\x01\x08\x00", array="label"))


@hostile("chunks are filtered or partial")
def partial_chunks_unfiltered(folder: Path) -> Path:
    """A flag says that a last chunk which is not full is not filtered: two ways to read one chunk."""
    return put_file(folder, patched(_LAYOUT, b"\x04\x02\x01\x02\x02\x00\x01\x08\x00", array="label"))


@hostile(r"layout version is 3 \(chunked\), not 4")
def chunks_in_a_version_1_btree(folder: Path) -> Path:
    """Layout version 3: chunks lie anywhere and are found by a B-tree whose nodes can be their own children."""
    return put_file(folder, patched(_LAYOUT, b"\x03" + _LAYOUT[1:], array="label"))


@hostile("chunk index type 3 is neither")
def fixed_array_index(folder: Path) -> Path:
    """Chunks found by a fixed array: an index whose entries can all point at one chunk, or at each other's middle."""
    return put_file(folder, patched(_LAYOUT + b"\x02", _LAYOUT + b"\x03", array="label"))


@hostile("chunk index does not fit the number of chunks")
def single_chunk_index_of_three_chunks(folder: Path) -> Path:
    """Three chunks, and an index that knows of one."""
    return put_file(folder, patched(_LAYOUT + b"\x02", _LAYOUT + b"\x01", array="label"))


def _moved(folder: Path, name: str, target: int) -> Path:
    return put_file(folder, patched(_U64(offset_of(name)), _U64(target), array=name))


@hostile("two things overlap at byte")
def overlapping_arrays(folder: Path) -> Path:
    """`label` lies on the bytes of `sample_id`: labels that the attacker need not store, and sizes that add up to more
    than the file."""
    return _moved(folder, "label", offset_of("sample_id"))


@hostile("two things overlap at byte", alike="overlapping_arrays")
def array_over_the_superblock(folder: Path) -> Path:
    """`label` lies at byte 0: the header of the file becomes data, and a writer that updates labels destroys it."""
    return _moved(folder, "label", 0)


@hostile("bytes 18446744073709551608 to 18446744073709557[0-9]+ lie outside")
def array_at_the_end_of_all_numbers(folder: Path) -> Path:
    """`label` lies at byte 2**64-8: its end is a small number in 64-bit arithmetic."""
    return _moved(folder, "label", 2**64 - 8)


@hostile("bytes 1844674407370955161[0-9]+ to 18446744073709557[0-9]+ lie outside")
def array_at_an_undefined_address(folder: Path) -> Path:
    """`label` lies at 2**64-1, HDF5's word for nowhere: a naive reader fills in zeros."""
    return _moved(folder, "label", 2**64 - 1)


@hostile("array 'label': bytes 1[0-9]{5} to 1[0-9]{5} lie outside")
def chunk_out_of_the_file(folder: Path) -> Path:
    """The last rows of `label` lie behind the end of the file: a map of them ends the process with SIGBUS."""
    return _moved(folder, "label", len(sound_file()) // 8 * 8 - 1024)


@hostile("array 'logits': starts at byte 4097, which is misaligned")
def misaligned_chunk(folder: Path) -> Path:
    """The logits start one byte late: each value is made of halves of two others. Where a reader copies what it cannot
    map, an array of 200 GB is copied into memory."""
    return _moved(folder, "logits", offset_of("logits") + 1)


@hostile("[0-9]+ bytes from byte [0-9]+ on belong to nothing")
def gap_of_a_terabyte(folder: Path) -> Path:
    """A sparse file with 1 TB of nothing between two arrays, 100 KB on the disk. All bytes outside the rows are hashed
    when a cache is opened: that takes half an hour."""
    shift = 1 << 40
    image = bytearray(sound_file())
    last = offset_of("row_crc")
    start = object_header(bytes(image), "row_crc")
    position = image.index(_U64(last), start)
    image[position : position + 8] = _U64(last + shift)
    image[28:36] = _U64(len(image) + shift)
    data = resealed(image)
    path = folder / "teacher.h5"
    with path.open("wb") as file:
        file.write(data[:last])
        file.seek(last + shift)
        file.write(data[last:])
    return path


def _reshaped(folder: Path, shape: tuple[int, ...]) -> Path:
    sizes = b"".join(map(_U64, shape))
    old = _SHAPE + (_U64(ROWS) + _U64(CLASSES)) * 2
    return put_file(folder, patched(old, _SHAPE + sizes * 2, array="logits"))
