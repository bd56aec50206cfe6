"""`idx:` reads the MNIST files, and nothing that is not exactly one."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.stages.data import load_data
from kdcache.stages.data_idx import read_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
LABELS = np.array([0, 3, 9, 1, 1, 7], np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(
    folder: Path, *, part: str = "train", images: bytes, labels: bytes, dot: str = "-", zipped: bool = False
) -> Path:
    for stem, content in ((f"images{dot}idx3", images), (f"labels{dot}idx1", labels)):
        name = f"{part}-{stem}-ubyte{'.gz' if zipped else ''}"
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize(("part", "prefix"), [("train", "train"), ("test", "t10k")])
def test_images_and_labels_come_back(tmp_path: Path, part: str, prefix: str, dot: str, zipped: bool) -> None:
    write(tmp_path, part=prefix, images=idx(IMAGES), labels=idx(LABELS), dot=dot, zipped=zipped)
    data = load_data(f"idx:{tmp_path}:{part}")
    assert len(data) == 6
    assert data.num_classes == 10
    for index in range(6):
        x, label = data.dataset[index]
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.from_numpy(IMAGES[index, None] / np.float32(255)))
        assert label == LABELS[index]


def test_a_label_above_nine_means_more_classes(tmp_path: Path) -> None:
    data = load_data(f"idx:{write(tmp_path, images=idx(IMAGES), labels=idx(LABELS + np.uint8(20)))}:train")
    assert data.num_classes == 30


def test_provenance_names_the_folder_and_the_files_without_their_place(tmp_path: Path) -> None:
    provenance = load_data(f"idx:{write(tmp_path, images=idx(IMAGES), labels=idx(LABELS))}:train").provenance
    assert provenance["name"] == f"{tmp_path.name}:train"
    assert str(tmp_path.parent) not in str(provenance)
    assert [file["name"] for file in provenance["files"]] == ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]


@pytest.mark.parametrize("rest", ["", "train", ":train", "{}", "{}:validation", "{}/nowhere:train", "{}:test"])
def test_a_place_without_the_files_is_a_usage_error(tmp_path: Path, rest: str) -> None:
    write(tmp_path, images=idx(IMAGES), labels=idx(LABELS))
    with pytest.raises(UsageError):
        load_data(f"idx:{rest.format(tmp_path)}")


IMAGE_BYTES = idx(IMAGES)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (b"", "is not an IDX file"),
        (b"\x89PNG and so on", "is not an IDX file"),
        (b"\0\0\x0d" + IMAGE_BYTES[3:], "element type 0x0d in 3 dimensions"),
        (idx(LABELS), "in 1 dimensions; expected 0x08 .unsigned bytes. in 3"),
        (IMAGE_BYTES[:9], "ends inside its header"),
        (IMAGE_BYTES[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + IMAGE_BYTES[16:], "promises"),
        (idx(IMAGES[:0]), "images, .* has 6 labels"),
        (idx(IMAGES[:5]), "has 5 images, .* has 6 labels"),
        (idx(IMAGES[:, :0]), "no samples"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_images_that_do_not_fit_are_data_errors(tmp_path: Path, images: bytes, reason: str, zipped: bool) -> None:
    write(tmp_path, images=images, labels=idx(LABELS), zipped=zipped)
    with pytest.raises(DataError, match=reason):
        load_data(f"idx:{tmp_path}:train")


def test_no_images_at_all_is_a_data_error(tmp_path: Path) -> None:
    write(tmp_path, images=idx(IMAGES[:0]), labels=idx(LABELS[:0]))
    with pytest.raises(DataError, match="no samples"):
        load_data(f"idx:{tmp_path}:train")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_short_and_a_long_file_say_so(tmp_path: Path, zipped: bool) -> None:
    with pytest.raises(DataError, match=r"ends after 119 of 120|promises 120"):
        load_data(f"idx:{write(tmp_path, images=IMAGE_BYTES[:-1], labels=idx(LABELS), zipped=zipped)}:train")
    with pytest.raises(DataError, match="goes on after"):
        load_data(f"idx:{write(tmp_path, images=IMAGE_BYTES + b'!', labels=idx(LABELS), zipped=zipped)}:train")


@given(st.booleans(), st.integers(0, 500), st.integers(1, 255), st.booleans())
def test_damaged_files_are_refused_or_differ_in_pixels_alone(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, place: int, flip: int, cut: bool
) -> None:
    sound = gzip.compress(IMAGE_BYTES, mtime=0) if zipped else IMAGE_BYTES
    place %= len(sound)
    damaged = sound[:place] if cut else sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :]
    path = tmp_path_factory.getbasetemp() / f"damaged{'.gz' if zipped else ''}"
    path.write_bytes(damaged)
    try:
        images = read_idx(path, dimensions=3)
    except KDCacheError:
        return
    assert not cut
    assert images.size == IMAGES.size
    assert zipped or np.count_nonzero(images.ravel() != IMAGES.ravel()) <= 1
    assert not zipped or np.array_equal(images, IMAGES)
