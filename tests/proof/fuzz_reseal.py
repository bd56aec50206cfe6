"""Digests recomputed after a mutation, as somebody would who wants it to be believed."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import fuzz_hdf5
import fuzz_json
import numpy as np

from kdcache.format.arrays import ArrayLayout
from kdcache.format.checksums import header_digest, row_crcs, rows_digest
from kdcache.format.hdf5_messages import Refusal
from kdcache.format.hdf5_parser import ParsedFile, examine
from kdcache.format.identity import canonical_json, fingerprint


def parsed(image: bytes) -> ParsedFile | None:
    """What our parser finds, None where it refuses."""
    try:
        return examine(lambda offset, length: image[offset : offset + length], len(image))
    except Refusal:
        return None


def payload_of(image: bytes, layout: ArrayLayout) -> bytes:
    return image[layout.offset : layout.stop]


def reseal_rows(image: bytes, crc_names: tuple[str, ...], views: list[int], samples: int) -> bytes:
    """`row_crc` of a container whose rows were changed; the file as it was where its arrays are not those of rows."""
    found = parsed(image)
    if found is None or not {*crc_names, "row_crc"} <= set(found.arrays) or found.rows != samples * len(views):
        return image
    data, pieces = bytearray(image), []
    arrays = {n: np.frombuffer(payload_of(image, a), a.dtype).reshape(a.shape) for n, a in found.arrays.items()}
    for slot, view in enumerate(views):
        rows = slice(slot * samples, (slot + 1) * samples)
        pieces.append(row_crcs([arrays[n][rows] for n in crc_names], view=view, positions=np.arange(samples)))
    layout = found.arrays["row_crc"]
    crcs = np.concatenate(pieces).tobytes()
    if len(crcs) == layout.nbytes:
        data[layout.offset : layout.stop] = crcs
    return bytes(data)


def reseal_file(image: bytes) -> bytes:
    """The digests in the header of a one-file cache, as far as there are any."""
    found = parsed(image)
    if found is None:
        return image
    value = fuzz_json.lenient(found.attribute.encode())
    if not isinstance(value, dict) or not {"sample_id", "row_crc"} <= set(found.arrays):
        return image
    text = found.attribute
    payload = hashlib.sha256()
    for layout in found.arrays.values():
        payload.update(payload_of(image, layout))
    digests = {
        "payload_sha256": payload.hexdigest(),
        "rows_blake2b": rows_digest(lambda offset, length: image[offset : offset + length], found.arrays),
    }
    for name, digest in digests.items():
        old = value.get(name)
        if isinstance(old, str) and len(old) == 64:
            text = text.replace(f'"{name}":"{old}"', f'"{name}":"{digest}"')
    if text == found.attribute:
        return image
    data = image.replace(found.attribute.encode(), text.encode())
    sealed = bytearray(data)
    fuzz_hdf5.reseal(sealed, [struct.unpack_from("<Q", data, 36)[0]])
    return bytes(sealed)


def reseal_shard(record: dict[str, Any], image: bytes) -> None:
    """Makes the manifest's record of a shard fit its bytes, as far as the record has these fields."""
    found = parsed(image)
    if found is not None:
        record["arrays"] = {name: [a.offset, a.dtype, list(a.shape)] for name, a in found.arrays.items()}
    record["size"], record["sha256"] = len(image), hashlib.sha256(image).hexdigest()
    arrays = {n: ArrayLayout(n, entry[1], tuple(entry[2]), entry[0]) for n, entry in record["arrays"].items()}
    if {"sample_id", "row_crc"} <= set(arrays) and all(a.offset >= 0 and a.stop <= len(image) for a in arrays.values()):
        digest = header_digest(lambda offset, length: image[offset : offset + length], arrays, len(image))
        record["header_blake2b"] = digest


def reseal_manifest(value: Any) -> bytes:
    """The bytes of a manifest with root hash and seal of its content."""
    if isinstance(value, dict):
        body = {key: item for key, item in value.items() if key not in ("created", "root", "seal")}
        try:
            value = {**value, "root": fingerprint(body)}
            value["seal"] = fingerprint([value.get("created"), value["root"]])
        except (ValueError, TypeError, RecursionError):  # NaN, which no canonical text has
            return repr(value).encode("utf-8", "replace")
    return canonical_json(value).encode() + b"\n"
