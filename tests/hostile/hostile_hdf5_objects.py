"""What libhdf5 can put into a file beside plain arrays: links, groups, attributes, and older forms of a file."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5p, h5s, h5t
from hostile_base import (
    create,
    edited,
    object_header,
    patched,
    put_file,
    resealed,
    rows_of,
    set_text,
    sound_file,
    utf8_text,
)
from hostile_cases import hostile

V110 = ("v110", "v110")


def _with_link(folder: Path, link: Any) -> Path:
    return put_file(folder, edited(lambda file: file.__setitem__("logits", link)))


def _made_by_libhdf5(folder: Path, **settings: Any) -> Path:
    """The same arrays in a file that libhdf5 alone has made; `settings` go to h5py.File."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **{"libver": V110, **settings}) as file:
        for name, array in rows_of(sound_file()).items():
            file.create_dataset(name, data=array)
    return put_file(folder, buffer.getvalue())


# --------------------------------------------------------------------------- links


@hostile("an external link where only hard links may be")
def external_link(folder: Path) -> Path:
    """The link `logits` leads into another file. A naive reader opens whatever path the file names, here
    /etc/secret.h5, or a network mount that records who opened it."""
    return _with_link(folder, h5py.ExternalLink("/etc/secret.h5", "/x"))


@hostile("a soft link where only hard links may be")
def soft_link_to_itself(folder: Path) -> Path:
    """The link `logits` is symbolic and leads to itself. A naive reader that follows links by hand never ends."""
    return _with_link(folder, h5py.SoftLink("/logits"))


@hostile("a user-defined link of class 65")
def user_defined_link(folder: Path) -> Path:
    """A link of a class that only a plug-in can resolve: opening it runs code that the file chose by number."""
    image = bytearray(edited(lambda file: file.__setitem__("logits", h5py.SoftLink("/label"))))
    image[image.index(b"\x01\x08\x01\x06logits") + 2] = 65
    return put_file(folder, resealed(image))


@hostile(r"array 'view': unexpected message 0x2 \(link info\)")
def hard_link_cycle(folder: Path) -> Path:
    """The link `view` leads back to the root group that holds it. A naive walk over all objects never ends."""
    address = object_header(sound_file(), "view").to_bytes(8, "little")
    return put_file(folder, patched(b"\x04view" + address, b"\x04view" + (48).to_bytes(8, "little")))


@hostile(r"unexpected message 0x16 \(reference count\)")
def two_names_for_one_array(folder: Path) -> Path:
    """`logits` and `row_max` are one array. A naive reader adds the row maximum to itself; one that sums up the sizes
    of all names counts bytes that are not there."""
    return put_file(folder, edited(lambda file: file.__setitem__("logits", file["row_max"])))


@hostile("array 'logits': header flags of the array are 0x(0|20),")
def group_in_the_place_of_an_array(folder: Path) -> Path:
    """`logits` is a group with thousands of members. A naive reader asks it for a shape, or walks through all of it."""

    def edit(file: h5py.File) -> None:
        group = file.create_group("logits")
        for number in range(20):
            group[f"n{number}"] = h5py.SoftLink("/label")

    return put_file(folder, edited(edit))


@hostile("links are in dense storage")
def links_in_dense_storage(folder: Path) -> Path:
    """The root group keeps 200 links in a fractal heap and a B-tree, structures whose decoding has cost libhdf5 a
    long row of CVEs. Naive readers list all of them."""

    def edit(file: h5py.File) -> None:
        for number in range(200):
            file[f"n{number}"] = h5py.SoftLink("/label")

    return put_file(folder, edited(edit))


@hostile("array 'logits': header flags of the array are 0x(0|20),", alike="group_in_the_place_of_an_array")
def committed_type(folder: Path) -> Path:
    """`logits` is a named type. A naive reader takes every hard link for an array."""
    return _with_link(folder, np.dtype("<f2"))


# --------------------------------------------------------------------------- attributes


@hostile("attributes are in dense storage")
def attribute_of_50_megabytes(folder: Path) -> Path:
    """An attribute of 50 MB. A naive reader loads all attributes of a file that it only wants to list."""

    def edit(file: h5py.File) -> None:
        file.attrs.create("blob", np.zeros(50_000_000, "u1"))

    return put_file(folder, edited(edit, keep_logits=True))


@hostile("attributes are in dense storage", alike="attribute_of_50_megabytes")
def thousand_attributes(folder: Path) -> Path:
    """A thousand attributes of the root group, in dense storage: a fractal heap, which the reader has to parse."""

    def edit(file: h5py.File) -> None:
        for number in range(1000):
            file.attrs[f"a{number}"] = number

    return put_file(folder, edited(edit, keep_logits=True))


@hostile(r"attribute b'x.x00' \(only 'kdcache' is allowed\)")
def second_attribute(folder: Path) -> Path:
    """A second root attribute, which no hash of ours knows: a place to hide a message to another program."""
    return put_file(folder, edited(lambda file: file.attrs.create("x", np.int8(1))))


@hostile(r"attribute b'kdcachf.x00' \(only 'kdcache' is allowed\)")
def header_under_another_name(folder: Path) -> Path:
    """The header is called kdcachf. A naive reader takes the only attribute there is."""
    return put_file(folder, edited(lambda file: set_text(file, b"{}", name=b"kdcachf"), keep_logits=True))


@hostile("attribute of 60000 bytes .below 60000 are allowed.")
def header_of_sixty_thousand_bytes(folder: Path) -> Path:
    """A header that says it is longer than any of ours, and longer than the message that holds it."""
    position = sound_file().index(b"\x13\x11\x00\x00")
    length = sound_file()[position + 4 : position + 8]
    return put_file(folder, patched(b"\x13\x11\x00\x00" + length, b"\x13\x11\x00\x00" + struct.pack("<I", 60_000)))


@hostile(r"UTF-8 text but 1008[0-9a-f]+ \(integer\)")
def header_that_is_a_number(folder: Path) -> Path:
    """The header is a number: `json.loads` takes neither it nor its bytes."""

    def edit(file: h5py.File) -> None:
        del file.attrs["kdcache"]
        file.attrs.create("kdcache", np.int64(1))

    return put_file(folder, edited(edit))


@hostile("0 root attributes instead of one")
def no_attribute(folder: Path) -> Path:
    """No header at all. A naive reader guesses what the arrays mean."""
    return put_file(folder, edited(lambda file: file.attrs.__delitem__("kdcache"), keep_logits=True))


@hostile(r"UTF-8 text but 19[0-9a-f]+ \(variable-length\)")
def variable_length_attribute(folder: Path) -> Path:
    """The header is text of variable length: its bytes lie in a global heap anywhere in the file, and the length that
    is allocated for it stands there too."""

    def edit(file: h5py.File) -> None:
        del file.attrs["kdcache"]
        file.attrs["kdcache"] = "{}"

    return put_file(folder, edited(edit))


@hostile(r"UTF-8 text but 1301[0-9a-f]+ \(string\)")
def header_in_another_character_set(folder: Path) -> Path:
    """The header claims to be ASCII. Readers that believe it decode other names than those that were hashed."""
    return put_file(folder, edited(lambda file: set_text(file, b"{}", charset=h5t.CSET_ASCII)))


@hostile("attribute text contains NUL")
def header_with_nul(folder: Path) -> Path:
    """The header goes on behind a NUL: C programs read one cache in it, Python another one."""
    return put_file(folder, edited(lambda file: set_text(file, b'{"format":1}\0{"format":2}'), keep_logits=True))


@hostile("attribute text is not UTF-8")
def header_that_is_not_utf8(folder: Path) -> Path:
    """The header is no UTF-8. A naive reader ends in a UnicodeDecodeError, or drops what it cannot read."""
    return put_file(folder, edited(lambda file: set_text(file, b"\xff\xfe{}"), keep_logits=True))


@hostile(r"array 'label': unexpected message 0x15 \(attribute info\)")
def attribute_of_an_array(folder: Path) -> Path:
    """`label` has an attribute, an object reference. Libraries that map attributes to fields follow it."""

    def edit(file: h5py.File) -> None:
        file["label"].attrs["DIMENSION_LIST"] = file["label"].ref

    return put_file(folder, edited(edit, keep_logits=True))


@hostile("attribute is not a scalar")
def header_that_is_a_list(folder: Path) -> Path:
    """The header is a list of two texts. A naive reader takes the first, another program the last."""

    def edit(file: h5py.File) -> None:
        del file.attrs["kdcache"]
        kind = utf8_text(2)
        h5a.create(file.id, b"kdcache", kind, h5s.create_simple((2,))).write(np.array([b"{}", b"[]"]), mtype=kind)

    return put_file(folder, edited(edit))


# --------------------------------------------------------------------------- files of other forms


@hostile("superblock version is 0, not 3")
def superblock_of_version_0(folder: Path) -> Path:
    """A file of the oldest form: groups are symbol tables over version 1 B-trees and local heaps, whose nodes can point
    at each other in a circle."""
    return _made_by_libhdf5(folder, libver="earliest")


@hostile("superblock version is 2, not 3")
def superblock_of_version_2(folder: Path) -> Path:
    """A superblock of version 2, as HDF5 1.8 wrote it, with everything else that may come with it."""
    return _made_by_libhdf5(folder, libver=("v108", "v108"))


@hostile("header flags of the root group are 0x(0|20),")
def file_of_another_program(folder: Path) -> Path:
    """The right arrays in a file that h5py made. Nothing in it is aligned, its chunks may lie anywhere, and one day
    one of its structures is not what it was in the test."""
    return _made_by_libhdf5(folder)


@hostile("no HDF5 signature at byte 0")
def user_block_with_a_shell_script(folder: Path) -> Path:
    """512 bytes before the HDF5 signature hold a shell script: one file is two things, and what a scanner takes for a
    script another program opens as data."""
    path = _made_by_libhdf5(folder, userblock_size=512)
    path.write_bytes(b"#!/bin/sh\necho polyglot\n".ljust(512, b"\0") + path.read_bytes()[512:])
    return path


@hostile("the file has a superblock extension")
def superblock_extension(folder: Path) -> Path:
    """A superblock extension with persistent free-space managers: further metadata, written over when the file closes,
    to be parsed before anything else is."""
    return _made_by_libhdf5(folder, fs_strategy="page", fs_persist=True)


@hostile("the file has a superblock extension", alike="superblock_extension")
def metadata_cache_image(folder: Path) -> Path:
    """A superblock extension whose message 0x18 brings an image of libhdf5's metadata cache: parsed metadata that is
    believed instead of what lies in the file."""
    image = bytearray(sound_file())
    message = b"\x18" + struct.pack("<HB", 17, 0) + bytes(1) + struct.pack("<QQ", 48, 64)
    image[20:28] = struct.pack("<Q", len(image))
    image += b"OHDR\x02" + struct.pack("<BH", 1, len(message)) + message + bytes(4)
    image[28:36] = struct.pack("<Q", len(image))
    return put_file(folder, resealed(image))


@hostile("superblock flags are set")
def left_open_by_a_writer(folder: Path) -> Path:
    """The consistency flags say that a writer (SWMR) still has the file. A naive reader waits for it, retries reads,
    or clears the flag: it writes into somebody's file."""
    image = bytearray(sound_file())
    image[11] = 0x05
    return put_file(folder, resealed(image))


@hostile("array 'logits': header flags of the array are 0x21")
def array_with_timestamps(folder: Path) -> Path:
    """An array that says when it was made and changed: 16 bytes more in its header, which shift all that follows, and
    bytes of a cache that differ from run to run."""
    return put_file(folder, edited(lambda file: create(file, times=True)))


@hostile("array 'logits': header flags of the array are 0xd")
def array_that_tracks_the_order_of_attributes(folder: Path) -> Path:
    """An array that numbers its attributes and indexes them by number: one more B-tree to be parsed."""
    order = h5p.CRT_ORDER_TRACKED | h5p.CRT_ORDER_INDEXED
    return put_file(folder, edited(lambda file: create(file, attribute_order=order)))
