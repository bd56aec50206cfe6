"""`folder:PATH`: images in class folders, `PATH/cat/1.png`, decoded when they are asked for.

The class is the first folder of an image's relative path and the sample id is that path, so that a cache made from
one copy of the folder serves every other. Only names and sizes are read at the start; the pixels are not part of the
fingerprint (hashing them would cost a pass over the data), their `input_digest` in the cache is.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.errors import DataError, MissingExtraError, UsageError
from kdcache.format.identity import as_sample_ids
from kdcache.stages.loaded_data import LoadedData, data_provenance
from kdcache.stages.specs import one_line
from kdcache.train.library_versions import pillow_versions

USAGE = "folder:PATH"
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})

# Pillow's other readers are rarely used, and some start programs (EPS: Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Items `(x, label)`: x float32 (3, H, W) in [0, 1], RGB; no resizing, no EXIF rotation, alpha dropped.

    Args:
        root: the folder, absolute.
        sample_ids: (N,) bytes, the relative path of each image in UTF-8.
        labels: (N,) int64.
        classes: the names of the class folders, ordered.
    """

    def __init__(self, root: Path, sample_ids: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self.sample_ids = sample_ids
        self.labels = labels
        self.classes = classes
        self._root = os.fsencode(root)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        relative = bytes(self.sample_ids[index])
        path = Path(os.fsdecode(os.path.join(self._root, relative)))
        return decode_image(path, name=os.fsdecode(relative)), int(self.labels[index])


def load_folder(rest: str) -> LoadedData:
    """The images under a folder of class folders, ordered by their relative path.

    Hidden files and files without an image's suffix are passed over. A symbolic link to a file is followed if it
    stays inside the folder.

    Raises:
        UsageError: no such folder.
        MissingExtraError: Pillow is not installed.
        DataError: no images, an image outside any class folder, a class folder without images, or a link that is not
            followed.
    """
    root = Path(rest).resolve()
    if not root.is_dir():
        raise UsageError(f"folder: there is no folder {rest}; expected {USAGE}")
    _import_pillow()
    classes, entries = _scan(root)
    sample_ids = as_sample_ids([relative for relative, _ in entries])
    index = {class_name: position for position, class_name in enumerate(classes)}
    labels = np.array([index[PurePosixPath(relative).parts[0]] for relative, _ in entries], np.int64)
    sizes = np.array([size for _, size in entries], "<i8")
    dataset = ImageFolder(root, sample_ids, labels, classes)
    provenance = data_provenance(
        name=root.name,
        rows=len(dataset),
        id_scheme="relative path",
        sample_ids=sample_ids,
        inputs="RGB uint8 / 255 -> float32 (3, H, W)",
        classes=classes,
        decoder=pillow_versions(),
        sizes_sha256=hashlib.sha256(sizes.tobytes()).hexdigest(),
    )
    return LoadedData(dataset, root.name, len(classes), classes, sample_ids, provenance)


def decode_image(path: Path, *, name: str) -> Tensor:
    """An image file as float32 (3, H, W) in [0, 1].

    Args:
        path: of the file.
        name: for the messages.

    Raises:
        DataError: not a readable image, or one with more than 8 bits a channel.
    """
    image_module = _import_pillow()
    try:
        with image_module.open(path, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"image {name} has the mode {image.mode}, expected 8 bits a channel; read it in a data set of your "
                    f"own (module:factory)"
                )
            # A palette with transparency goes through RGBA, which Pillow asks for with a warning otherwise.
            solid = image.convert("RGBA") if "transparency" in image.info else image
            pixels = np.array(solid.convert("RGB"))
    except DataError:
        raise
    # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others on damaged files.
    except Exception as error:
        raise DataError(
            f"image {name} cannot be read: {one_line(error).replace(str(path), path.name)}; repair or remove it"
        ) from error
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255))


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("pillow", extra="vision", what="folder: data") from error
    return Image


def _scan(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Class names and (relative path, bytes) of each image, both sorted."""
    classes: list[str] = []
    images: list[tuple[str, int]] = []
    for entry in _visible(root):
        if _is_folder(entry):
            found = list(_images(entry, root))
            if not found:
                raise DataError(
                    f"{root.name}: the class folder {entry.name} holds no images ({', '.join(sorted(SUFFIXES))})"
                )
            classes.append(entry.name)
            images.extend(found)
        elif _is_image(entry):
            raise DataError(
                f"{root.name}: the image {entry.name} lies in no class folder; expected {root.name}/CLASS/{entry.name} "
                f"(unlabelled images: a data set of your own, module:factory)"
            )
    if not images:
        raise DataError(f"{root.name}: no class folders with images; expected {root.name}/CLASS/1.png and the like")
    for relative, _ in images:
        if any(letter < " " or letter == "\x7f" or "\ud800" <= letter <= "\udfff" for letter in relative):
            raise DataError(
                f"{root.name}: the name {relative!r} is not plain UTF-8 text; rename it, names are sample ids"
            )
    return tuple(classes), sorted(images)


def _visible(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder {folder.name} cannot be listed: {error.strerror}") from error


def _images(folder: os.DirEntry[str], root: Path) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of the images in a folder and those below it."""
    for entry in _visible(folder):
        if _is_folder(entry):
            yield from _images(entry, root)
        elif _is_image(entry):
            yield Path(entry.path).relative_to(root).as_posix(), _size_bytes(entry, root)


def _size_bytes(entry: os.DirEntry[str], root: Path) -> int:
    try:
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            raise DataError(f"{entry.name} is a link out of {root.name}; copy the file into the folder")
        status = entry.stat()
    except (OSError, RuntimeError) as error:  # a link to nowhere, or to itself
        raise DataError(
            f"{root.name}: {entry.name} cannot be read ({type(error).__name__}); repair or remove it"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{root.name}: {entry.name} is not a regular file; remove it")
    return status.st_size


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink() and os.path.isdir(entry.path):  # False for a link in a circle, where is_dir() raises
        raise DataError(f"{entry.name} is a link to a folder; such links are not followed: copy the folder")
    return entry.is_dir(follow_symlinks=False)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in SUFFIXES
