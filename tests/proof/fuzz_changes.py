"""Mutations that keep a file's parts in step with each other, so that they come further than single ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import fuzz_hdf5
import fuzz_json
import fuzz_reseal
import numpy as np
from fuzz_bases import Base

from kdcache.format.identity import canonical_json
from kdcache.format.ranking import class_dtype
from kdcache.format.schema import RowSchema


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """Mostly canonical JSON of a mutated value, seldom a mutated text."""
    if rng.random() < 0.2:
        return fuzz_json.mutate_text(rng, canonical_json(value))
    return canonical_json(fuzz_json.mutate(rng, value)).encode() + rng.choice([b"\n", b""])


def mutate_container(rng: random.Random, image: bytes, other: bytes) -> bytes:
    """Structural mutations or mutations of bytes, or both, with all checksums of HDF5 recomputed."""
    if rng.random() < 0.65:
        parts = fuzz_hdf5.take_apart(image)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            rng.choice(fuzz_hdf5.STRUCTURAL)(rng, parts)
        image = parts.build()
        if rng.random() < 0.9:
            return image
        if fuzz_reseal.parsed(image) is None:
            return image
    return fuzz_hdf5.mutate_bytes(rng, image, other)


def change_rows(rng: random.Random, image: bytes) -> bytes:
    """Other bytes in some rows."""
    found = fuzz_reseal.parsed(image)
    if found is None:
        return image
    data = bytearray(image)
    for layout in rng.choices(list(found.arrays.values()), k=2):
        data[rng.randrange(layout.offset, layout.stop)] ^= rng.randrange(1, 256)
    return bytes(data)


def consistent_change(rng: random.Random, parts: fuzz_hdf5.Container, value: dict[str, Any], base: Base) -> RowSchema:
    """A change of the JSON together with the one of the arrays that it asks for; the schema of the result."""
    links = parts.blocks[0].find(fuzz_hdf5.LINK)
    place = {bytes(link.body[3:-8]).decode(): number for number, link in enumerate(links)}
    if base.schema.has_labels and rng.random() < 0.5:
        field, name = rng.choice([("labels", "label"), ("digests", "input_digest")])
        value[field] = False
        parts.blocks[0].messages.remove(links[place[name]])
        del parts.blocks[1 + place[name]]
        return replace(base.schema, has_labels=field != "labels", has_digests=field != "digests")
    width = base.rows["sample_id"].dtype.itemsize
    other = "|S8" if base.schema.id_dtype == "<i8" else "<i8"
    if width == 8:
        value["id"], value["ids"] = other, None
        parts.blocks[1 + place["sample_id"]].find(0x03)[0].body[:] = bytes.fromhex("1301000008000000")
        return replace(base.schema, id_dtype=other)
    return base.schema


def grow(rng: random.Random, value: dict[str, Any]) -> None:
    """Every count of a manifest grows, so that it describes a huge cache without a contradiction."""
    factor = rng.choice([2, 1000, 1 << 20, 1 << 27, 1 << 33, 1 << 40])
    wide = rng.random() < 0.3
    if wide:
        value["encoding"]["shape"][0] *= factor
        value["classes"] = {"count": value["encoding"]["shape"][0], "names": None, "sha256": None}
    else:
        value["samples"] *= factor
        value["shard_rows"] *= factor
    for record in value["shards"]:
        if not wide:
            record["start"], record["stop"] = record["start"] * factor, record["stop"] * factor
        if record["ids"] is not None:
            record["ids"] = [5 + record["start"], 4 + record["stop"]]
        offset = 0
        for name, entry in record["arrays"].items():
            if wide and name == "logits":
                entry[2][1] *= factor
            if wide and name == "topk_classes":  # k stays, and the rows are as small as they were
                entry[1] = class_dtype(value["encoding"]["shape"][0])
            entry[2][0] = record["stop"] - record["start"]
            entry[0] = offset
            offset += math.prod(entry[2]) * np.dtype(entry[1]).itemsize
        record["size"] = offset


def swap_records(rng: random.Random, value: dict[str, Any]) -> None:
    """Two records exchange a field, a record exchanges two arrays, or a view gets another number."""
    records = value["shards"]
    what = rng.randrange(3)
    if what == 0 and len(records) > 1:
        first, second = rng.sample(records, 2)
        for field in rng.sample(sorted(first), rng.choice([1, 1, 2, 5])):
            first[field], second[field] = second[field], first[field]
    elif what == 1:
        arrays = rng.choice(records)["arrays"]
        left, right = rng.sample(sorted(arrays), 2)
        arrays[left][0], arrays[right][0] = arrays[right][0], arrays[left][0]
    else:
        number = rng.choice([0, 1, 2, 3, 255, 65535])
        value["views"][-1] = number
        for record in records[-(len(records) // len(value["views"])) :]:
            record["view"] = number
