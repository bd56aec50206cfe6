"""An HDF5 container taken apart into messages, mutated, and put together again with every checksum recomputed.

What an attacker would do: nothing here is stopped by a checksum, so a mutation meets the checks behind it. `take_apart`
knows only what is needed to find the messages of the files that our writer makes; `Container.build` writes whatever
it is given, moving a header that no longer fits to the end of the file.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from kdcache.format.lookup3 import lookup3

SUPERBLOCK_BYTES, PREFIX_BYTES, CHECKSUM_BYTES = 48, 8, 4
NIL, LINK, LAYOUT, ATTRIBUTE = 0x00, 0x06, 0x08, 0x0C
# Where fixed-width fields stand in the bodies of messages: (offset, width).
FIELDS = {
    0x01: [(0, 1), (1, 1), (2, 1), (3, 1), (4, 8), (12, 8), (20, 8)],
    0x02: [(0, 1), (1, 1), (2, 8), (10, 8)],
    0x03: [(0, 1), (1, 1), (1, 3), (4, 4), (8, 2), (10, 2)],
    0x05: [(0, 1), (1, 1)],
    0x06: [(0, 1), (1, 1), (2, 1), (-8, 8)],
    0x08: [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (-9, 1), (-8, 8)],
    0x0A: [(0, 1), (1, 1), (2, 2), (4, 2)],
    0x0C: [(0, 1), (1, 1), (2, 2), (4, 2), (6, 2), (8, 1), (21, 4)],
    0x15: [(0, 1), (1, 1), (2, 8), (10, 8)],
}
SUPERBLOCK_FIELDS = [(0, 8), (8, 1), (9, 1), (10, 1), (11, 1), (12, 8), (20, 8), (28, 8), (36, 8)]
# Messages that libhdf5 knows and a cache never holds: external files, filters, times, continuations, references.
FOREIGN = [
    (0x07, struct.pack("<BxxxHHQ", 1, 1, 1, 48) + bytes(24)),
    (0x0B, struct.pack("<BBHHHHI", 2, 1, 32000, 1, 0, 1, 7)),
    (0x0B, struct.pack("<BBHHHI", 2, 1, 1, 0, 1, 9)),
    (0x10, struct.pack("<QQ", 48, 512)),
    (0x10, struct.pack("<QQ", 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)),
    (0x12, struct.pack("<BxxxI", 1, 1_700_000_000)),
    (0x11, struct.pack("<QQ", 48, 48)),
    (0x16, struct.pack("<BI", 0, 2)),
    (0x06, b"\x01\x08\x40\x01e" + struct.pack("<H", 14) + b"\0/etc/passwd\0/"),
    (0x06, b"\x01\x08\x01\x01s" + struct.pack("<H", 7) + b"/logits"),
    (0x0C, b"\x03\x00\x02\x00\x08\x00\x04\x00\x00x\0" + bytes(8) + b"\x02\0\0\0"),
]
TYPES = [
    bytes.fromhex("11200f00 02000000 00001000 0a05000a 0f000000"),
    bytes.fromhex("11201f00 04000000 00002000 17080017 7f000000"),
    bytes.fromhex("10080000 08000000 00004000"),
    bytes.fromhex("10000000 08000000 00004000"),
    bytes.fromhex("10000000 04000000 00002000"),
    bytes.fromhex("10000000 02000000 00001000"),
    bytes.fromhex("10000000 01000000 00000800"),
    bytes.fromhex("13010000 08000000"),
    bytes.fromhex("13010000 04000000"),
    bytes.fromhex("13010000 ffffff7f"),
    bytes.fromhex("19010000 10000000 10000000 01000000 00000800"),
    bytes.fromhex("36010000 08000000 00000000"),
]


@dataclass
class Message:
    """One header message; `declared` is the length that its header states, None for the true one."""

    kind: int
    flags: int
    body: bytearray
    declared: int | None = None

    def pack(self) -> bytes:
        length = len(self.body) if self.declared is None else self.declared
        return struct.pack("<BHB", self.kind & 0xFF, length & 0xFFFF, self.flags & 0xFF) + bytes(self.body)


@dataclass
class Block:
    """An object header: where it lay, how much room is there, and its messages."""

    address: int
    room: int
    messages: list[Message]
    prefix: bytearray = field(default_factory=lambda: bytearray(b"OHDR\x02\x01"))

    def find(self, kind: int) -> list[Message]:
        return [message for message in self.messages if message.kind == kind]


@dataclass
class Container:
    """A file taken apart. `rest` is the file with its headers blanked: payload and padding."""

    superblock: bytearray
    blocks: list[Block]  # of the root group first
    rest: bytearray

    def set_attribute(self, text: bytes) -> None:
        """Replaces the text of the root attribute."""
        body = self.blocks[0].find(ATTRIBUTE)[0].body
        struct.pack_into("<I", body, 21, len(text))
        body[29:] = text

    def build(self) -> bytes:
        """The file: headers where they were if they fit, else behind its end; addresses and checksums follow."""
        image = bytearray(self.rest)
        moved: dict[int, int] = {}
        for block in reversed(self.blocks):  # the root last: its links name the addresses of the others
            for link in block.find(LINK):
                if len(link.body) >= 8 and (target := struct.unpack("<Q", link.body[-8:])[0]) in moved:
                    link.body[-8:] = struct.pack("<Q", moved[target])
            packed = b"".join(message.pack() for message in block.messages)
            address = block.address
            if len(packed) > block.room:
                image += bytes(-len(image) % 8)
                address = moved[block.address] = len(image)
                image += bytes(PREFIX_BYTES + len(packed) + CHECKSUM_BYTES)
            else:
                packed += _filling(block.room - len(packed))
            header = bytes(block.prefix) + struct.pack("<H", min(len(packed), 0xFFFF)) + packed
            image[address : address + len(header)] = header
        if self.blocks[0].address in moved:
            struct.pack_into("<Q", self.superblock, 36, moved[self.blocks[0].address])
        image[:SUPERBLOCK_BYTES] = self.superblock[:SUPERBLOCK_BYTES]
        if moved:
            struct.pack_into("<Q", image, 28, len(image))
        reseal(image, [moved.get(block.address, block.address) for block in self.blocks])
        return bytes(image)


def _filling(room: int) -> bytes:
    """Padding as HDF5 makes it: an empty message, or zeros where there is no room for one."""
    return struct.pack("<BHB", NIL, room - 4, 0) + bytes(room - 4) if room >= 4 else bytes(room)


def reseal(image: bytearray, addresses: list[int]) -> None:
    """Recomputes the checksums of the superblock and of the headers at `addresses`, wherever their size puts them."""
    for address in addresses:
        if address + PREFIX_BYTES > len(image):
            continue
        stop = address + PREFIX_BYTES + int.from_bytes(image[address + 6 : address + 8], "little")
        if stop + CHECKSUM_BYTES <= len(image):
            struct.pack_into("<I", image, stop, lookup3(bytes(image[address:stop])))
    if len(image) >= SUPERBLOCK_BYTES:
        struct.pack_into("<I", image, SUPERBLOCK_BYTES - 4, lookup3(bytes(image[: SUPERBLOCK_BYTES - 4])))


def take_apart(image: bytes) -> Container:
    """The parts of a file that our writer made."""
    rest = bytearray(image)
    rest[:SUPERBLOCK_BYTES] = bytes(SUPERBLOCK_BYTES)
    (root,) = struct.unpack_from("<Q", image, 36)
    blocks = [_block(image, root, rest)]
    for link in blocks[0].find(LINK):
        blocks.append(_block(image, struct.unpack("<Q", link.body[-8:])[0], rest))
    return Container(bytearray(image[:SUPERBLOCK_BYTES]), blocks, rest)


def _block(image: bytes, address: int, rest: bytearray) -> Block:
    (room,) = struct.unpack_from("<H", image, address + 6)
    position, stop, messages = address + PREFIX_BYTES, address + PREFIX_BYTES + room, []
    while stop - position >= 4:
        kind, length, flags = struct.unpack_from("<BHB", image, position)
        if kind != NIL:
            messages.append(Message(kind, flags, bytearray(image[position + 4 : position + 4 + length])))
        position += 4 + length
    rest[address : stop + CHECKSUM_BYTES] = bytes(stop + CHECKSUM_BYTES - address)
    return Block(address, room, messages)


def boundary(rng: random.Random, width: int, size: int) -> int:
    """A number at which code goes wrong: zero, ones, powers of two and their neighbours, sizes around the file's."""
    limit = 1 << 8 * width
    choices = [0, 1, 2, limit - 1, limit >> 1, (limit >> 1) - 1, size, size - 1, size + 1, 48, rng.randrange(limit)]
    choices += [(1 << rng.randrange(8 * width)) + rng.randint(-1, 1), rng.randrange(max(1, size)), limit - size]
    return rng.choice(choices) % limit


# ---- mutations of the structure ----


def _pick(rng: random.Random, container: Container) -> tuple[Block, Message]:
    block = rng.choice(container.blocks)
    while not block.messages:
        block = container.blocks[0] if block is not container.blocks[0] else rng.choice(container.blocks)
    return block, rng.choice(block.messages)


def set_field(rng: random.Random, container: Container) -> None:
    """A fixed-width field of a message takes a boundary value, or one more or less than it had."""
    _, message = _pick(rng, container)
    offset, width = rng.choice(FIELDS.get(message.kind, [(0, 1)]))
    offset += len(message.body) if offset < 0 else 0
    field_bytes = message.body[offset : offset + width]
    value = int.from_bytes(field_bytes, "little") + rng.choice([-1, 1, -8, 8])
    if rng.random() < 0.8:
        value = boundary(rng, width, len(container.rest))
    message.body[offset : offset + len(field_bytes)] = (value % (1 << 8 * width)).to_bytes(width, "little")


def set_superblock(rng: random.Random, container: Container) -> None:
    """A field of the superblock takes a boundary value."""
    offset, width = rng.choice(SUPERBLOCK_FIELDS)
    value = boundary(rng, width, len(container.rest))
    container.superblock[offset : offset + width] = value.to_bytes(width, "little")


def set_header(rng: random.Random, container: Container) -> None:
    """The kind, flags or declared length of a message change, or the prefix of an object header."""
    block, message = _pick(rng, container)
    what = rng.randrange(4)
    if what == 0:
        message.kind = rng.choice([*FIELDS, 0, 7, 0x0B, 0x10, 0x12, 0x16, rng.randrange(256)])
    elif what == 1:
        message.flags = rng.choice([0, 1, 2, 3, 4, 5, 0x80, 0xFF, rng.randrange(256)])
    elif what == 2:
        message.declared = rng.choice([0, 1, len(message.body) - 1, len(message.body) + 1, 0xFFFF, 0x8000])
    else:
        block.prefix[rng.randrange(4, 6)] = rng.randrange(256)


def move_messages(rng: random.Random, container: Container) -> None:
    """Messages are deleted, repeated, swapped, or moved to another object."""
    block, message = _pick(rng, container)
    what = rng.randrange(4)
    if what == 0:
        block.messages.remove(message)
    elif what == 1:
        block.messages.insert(rng.randint(0, len(block.messages)), _copy(message))
    elif what == 2:
        rng.shuffle(block.messages)
    else:
        rng.choice(container.blocks).messages.append(_copy(message))


def add_foreign(rng: random.Random, container: Container) -> None:
    """A message that a cache never holds."""
    kind, body = rng.choice(FOREIGN)
    block = rng.choice(container.blocks)
    block.messages.insert(rng.randint(0, len(block.messages)), Message(kind, rng.choice([0, 1, 4]), bytearray(body)))


def move_links(rng: random.Random, container: Container) -> None:
    """Links swap their targets or names, meet at one object, or point at the root group or elsewhere."""
    links = [link for link in container.blocks[0].find(LINK) if len(link.body) >= 11]
    if len(links) < 2:
        return
    first, second = rng.sample(links, 2)
    what = rng.randrange(5)
    if what == 0:
        first.body[-8:], second.body[-8:] = second.body[-8:], first.body[-8:]
    elif what == 1:
        first.body[:-8], second.body[:-8] = second.body[:-8], first.body[:-8]
    elif what == 2:
        first.body[-8:] = second.body[-8:]
    elif what == 3:
        first.body[:-8] = second.body[:-8]
    else:
        target = rng.choice([0, 48, container.blocks[0].address, rng.randrange(len(container.rest))])
        first.body[-8:] = struct.pack("<Q", target)


def swap_parts(rng: random.Random, container: Container) -> None:
    """Two objects swap a message of one kind: their types, their shapes, their places; or one takes another type."""
    if len(container.blocks) < 3:
        return
    first, second = rng.sample(container.blocks[1:], 2)
    kind = rng.choice([0x01, 0x03, 0x08])
    ours, theirs = first.find(kind), second.find(kind)
    if kind == 0x03 and ours and rng.random() < 0.6:
        ours[0].body[:] = rng.choice(TYPES)
    elif ours and theirs:
        ours[0].body, theirs[0].body = theirs[0].body, ours[0].body


def reshape(rng: random.Random, container: Container) -> None:
    """The shape and the chunks of one object, or of all, change together, as if another file had been made."""
    blocks = container.blocks[1:] if rng.random() < 0.5 else container.blocks[1:][:1]
    change = rng.choice([lambda n: n * 2, lambda n: n // 2, lambda n: n + 1, lambda n: 1, lambda n: n << 32])
    for block in blocks:
        for space in block.find(0x01):
            rank = space.body[1] if len(space.body) > 1 else 0
            for place in (4, 4 + 8 * rank):  # the shape and the maximal shape
                if place + 8 <= len(space.body):
                    (rows,) = struct.unpack_from("<Q", space.body, place)
                    struct.pack_into("<Q", space.body, place, change(rows) % (1 << 64))


def _copy(message: Message) -> Message:
    return Message(message.kind, message.flags, bytearray(message.body), message.declared)


STRUCTURAL: list[Callable[[random.Random, Container], None]] = [
    set_field,
    set_field,
    set_field,
    set_superblock,
    set_header,
    move_messages,
    add_foreign,
    move_links,
    swap_parts,
    reshape,
]


# ---- mutations of the bytes ----


def mutate_bytes(rng: random.Random, image: bytes, other: bytes) -> bytes:
    """Bits and bytes of the headers change, or bytes are spliced, deleted, inserted, cut off or added.

    The end that the superblock names follows the size half of the time, checksums always.

    Args:
        rng: of this case.
        image: a file.
        other: another one, from which pieces are taken.
    """
    parts = take_apart(image)
    spans = [(0, SUPERBLOCK_BYTES - 4)] + [(b.address, b.address + PREFIX_BYTES + b.room) for b in parts.blocks]
    data = bytearray(image)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        start, stop = rng.choice(spans)
        at = rng.randrange(start, min(stop, len(data))) if start < len(data) else rng.randrange(len(data))
        what = rng.randrange(9)
        if what <= 1:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            data[at] = rng.choice([0, 1, 2, 3, 4, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif what == 3:
            width = rng.choice([2, 4, 8])
            data[at : at + width] = boundary(rng, width, len(image)).to_bytes(width, "little")[: len(data) - at]
        elif what == 4:
            length, source = rng.choice([1, 4, 16, 64]), rng.randrange(len(other))
            data[at : at + length] = other[source : source + length]
        elif what == 5:
            del data[at : at + rng.choice([1, 2, 4, 8, 100])]
        elif what == 6:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8, 100]))
        elif what == 7:
            del data[rng.randrange(len(data)) :]
        else:
            data += bytes(rng.randrange(1, 64)) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 64))
        if not data:
            return b""
    if len(data) != len(image) and len(data) >= SUPERBLOCK_BYTES and rng.random() < 0.5:
        struct.pack_into("<Q", data, 28, len(data))
    reseal(data, [block.address for block in parts.blocks])
    return bytes(data)
