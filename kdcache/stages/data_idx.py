"""`idx:FOLDER:train|test`: the four MNIST files, gzipped or not.

The format: two zero bytes, a type byte (8 = unsigned bytes), the number of dimensions, each dimension as a big-endian
uint32, then the values. Every length is compared with the file before anything is allocated.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdcache.errors import DataError, UsageError
from kdcache.stages.data_arrays import ArrayDataset
from kdcache.stages.loaded_data import LoadedData, check_not_empty, data_provenance, describe_file

USAGE = "idx:FOLDER:train|test"

_PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8
_MAX_DEFLATE_RATIO = 1032  # of the format itself: 258 bytes from 2 bits
_MNIST_CLASSES = 10


def load_idx(rest: str) -> LoadedData:
    """A part of an MNIST-like folder: x float32 (1, H, W) in [0, 1], label, sample_id = position in the file.

    The labels do not say how many classes there are: 10 as in MNIST, more where a label is above 9.

    Raises:
        UsageError: not of the form FOLDER:train|test, no such folder, or files missing in it.
        DataError: a file is damaged or not of this format, or images and labels differ in number.
    """
    place, colon, part = rest.rpartition(":")
    if not colon or part not in _PREFIXES or not place:
        raise UsageError(f"idx:{rest} names no part; expected {USAGE}")
    folder = Path(place)
    if not folder.is_dir():
        raise UsageError(f"idx: there is no folder {place}; expected {USAGE}")
    images_path = _find(folder, f"{_PREFIXES[part]}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{_PREFIXES[part]}-labels", "idx1-ubyte")
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    name = f"{folder.resolve().name}:{part}"
    if len(images) != len(labels):
        raise DataError(
            f"{name}: {images_path.name} has {len(images)} images, {labels_path.name} has {len(labels)} labels; they "
            f"are not of one data set"
        )
    check_not_empty(len(images), name=name)
    check_not_empty(images[0].size, name=f"{images_path.name}: images of {images.shape[1]}x{images.shape[2]}")
    num_classes = max(_MNIST_CLASSES, int(labels.max()) + 1)
    sample_ids = np.arange(len(images), dtype=np.int64)
    dataset = ArrayDataset(images[:, None], labels.astype(np.int64), sample_ids, divisor=255)
    provenance = data_provenance(
        name=name,
        rows=len(dataset),
        id_scheme="position in the file",
        sample_ids=sample_ids,
        inputs="uint8 / 255 -> float32",
        files=[describe_file(images_path), describe_file(labels_path)],
    )
    return LoadedData(dataset, name, num_classes, None, sample_ids, provenance)


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file; a name ending in `.gz` is decompressed.

    Args:
        path: the file.
        dimensions: how many the array must have.

    Returns:
        uint8, shape as the file says.

    Raises:
        DataError: any byte is not as the format has it, or there are too few or too many.
    """
    size = path.stat().st_size
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path, "rb") as stream:
                return _read(stream, size * _MAX_DEFLATE_RATIO, dimensions, path.name)  # type: ignore[arg-type]
        with path.open("rb") as stream:
            return _read(stream, size, dimensions, path.name)
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        raise DataError(f"{path.name} cannot be read: {error}; fetch the file again") from error


def _read(stream: BinaryIO, limit: int, dimensions: int, name: str) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{name} is not an IDX file: it starts with {magic.hex(' ')!r}, expected 00 00 08 0{dimensions}"
        )
    kind, found = magic[2], magic[3]
    if kind != _UNSIGNED_BYTE or found != dimensions:
        raise DataError(
            f"{name}: element type 0x{kind:02x} in {found} dimensions; expected 0x08 (unsigned bytes) in {dimensions}"
        )
    head = stream.read(4 * dimensions)
    if len(head) < 4 * dimensions:
        raise DataError(f"{name} ends inside its header; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", head)
    size = math.prod(shape)
    if size > limit:
        raise DataError(
            f"{name}: its header promises {size} bytes ({shape}), more than the file can hold; it is damaged"
        )
    values = np.empty(size, np.uint8)
    view, filled = values.data, 0
    while filled < size and (count := stream.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    if filled < size:
        raise DataError(f"{name} ends after {filled} of {size} bytes; fetch the file again")
    if stream.read(1):
        raise DataError(f"{name} goes on after the {size} bytes that its header promises ({shape}); it is damaged")
    return values.reshape(shape)


def _find(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{dot}{kind}{end}" for end in ("", ".gz") for dot in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"idx: no {names[0]} (or .gz) in {folder}; the folder must hold the MNIST files under their names")
