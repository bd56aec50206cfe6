"""`folder:` reads class folders of images, says which image is broken, and never leaves the folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdcache.errors import DataError, MissingExtraError, UsageError
from kdcache.stages.data import load_data

Image = pytest.importorskip("PIL.Image")

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)


def save(path: Path, pixels: np.ndarray = PIXELS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images, one of them a folder deeper, and files to pass over."""
    root = tmp_path / "pictures"
    save(root / "dog" / "b.png")
    save(root / "cat" / "deep" / "2.PNG")
    save(root / "cat" / "1.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "README.md").write_text("not an image")
    save(root / ".cache" / "x.png")
    return root


def test_ids_are_relative_paths_and_classes_are_folder_names(folder: Path) -> None:
    data = load_data(f"folder:{folder}")
    assert data.sample_ids is not None
    assert data.sample_ids.tolist() == [b"cat/1.png", b"cat/deep/2.PNG", b"dog/b.png"]
    assert data.classes == ("cat", "dog")
    assert [data.dataset[index][1] for index in range(3)] == [0, 0, 1]
    assert data.name == "pictures"


def test_an_image_is_rgb_between_zero_and_one(folder: Path) -> None:
    x, _ = load_data(f"folder:{folder}").dataset[0]
    assert x.dtype == torch.float32
    assert x.shape == (3, 5, 4)
    assert x.is_contiguous()
    assert np.array_equal(x.numpy(), PIXELS.transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_of_8_bits_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "set" / "a" / ("1.tif" if mode == "CMYK" else "1.png")
    path.parent.mkdir(parents=True)
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(path, **({"transparency": bytes(range(256))} if mode == "P" else {}))
    x, _ = load_data(f"folder:{tmp_path / 'set'}").dataset[0]
    assert x.shape == (3, 5, 4)


def test_more_than_8_bits_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "set" / "a" / "deep.png", PIXELS[..., 0].astype(np.uint16) * 200)
    with pytest.raises(DataError, match=r"a/deep\.png has the mode I;16"):
        load_data(f"folder:{tmp_path / 'set'}").dataset[0]


def test_workers_read_from_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    dataset = load_data("folder:pictures").dataset
    monkeypatch.chdir(folder)
    x, y = next(iter(DataLoader(dataset, batch_size=3, num_workers=1)))
    assert x.shape == (3, 3, 5, 4)
    assert y.tolist() == [0, 0, 1]


def test_provenance_is_that_of_the_files_and_not_of_their_place(folder: Path) -> None:
    first = load_data(f"folder:{folder}").provenance
    assert str(folder.parent) not in str(first)
    second = load_data(f"folder:{folder.rename(folder.with_name('moved'))}").provenance
    assert first["fingerprint"] == second["fingerprint"]
    (folder.with_name("moved") / "dog" / "b.png").unlink()
    save(folder.with_name("moved") / "dog" / "c.png")
    assert load_data(f"folder:{folder.with_name('moved')}").provenance["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_file_that_is_no_image_is_named_when_it_is_touched(folder: Path, content: bytes) -> None:
    (folder / "dog" / "b.png").write_bytes(content)
    data = load_data(f"folder:{folder}")
    data.dataset[0]
    with pytest.raises(DataError, match=r"image dog/b\.png cannot be read") as caught:
        data.dataset[2]
    assert str(folder) not in str(caught.value)


@pytest.mark.parametrize("kept", [10, 50, 90])
def test_a_truncated_image_is_named(folder: Path, kept: int) -> None:
    path = folder / "dog" / "b.jpg"
    (folder / "dog" / "b.png").unlink()
    Image.fromarray(np.tile(PIXELS, (20, 20, 1))).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * kept // 100])
    with pytest.raises(DataError, match=r"dog/b\.jpg"):
        load_data(f"folder:{folder}").dataset[2]


def test_an_image_that_is_gone_is_named(folder: Path) -> None:
    data = load_data(f"folder:{folder}")
    (folder / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cat/1\.png"):
        data.dataset[0]


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        load_data(f"folder:{tmp_path / 'nothing'}")


def test_an_empty_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders"):
        load_data(f"folder:{tmp_path}")


def test_a_class_without_images_is_a_data_error(folder: Path) -> None:
    (folder / "horse").mkdir()
    with pytest.raises(DataError, match="class folder horse holds no images"):
        load_data(f"folder:{folder}")


def test_an_image_outside_the_class_folders_is_a_data_error(folder: Path) -> None:
    save(folder / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png lies in no class folder"):
        load_data(f"folder:{folder}")


def test_a_link_inside_the_folder_is_read(folder: Path) -> None:
    (folder / "dog" / "z.png").symlink_to(folder / "cat" / "1.png")
    assert load_data(f"folder:{folder}").dataset[3][1] == 1


def test_a_link_to_the_folder_itself_is_read(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert len(load_data(f"folder:{link}")) == 3


def test_links_that_leave_the_folder_are_refused(folder: Path) -> None:
    outside = save(folder.parent / "secret.png")
    (folder / "dog" / "z.png").symlink_to(outside)
    with pytest.raises(DataError, match="link out of pictures"):
        load_data(f"folder:{folder}")


@pytest.mark.parametrize("target", ["..", "../cat", "."])
def test_links_to_folders_are_refused(folder: Path, target: str) -> None:
    (folder / "dog" / "all").symlink_to(target)
    with pytest.raises(DataError, match="link to a folder"):
        load_data(f"folder:{folder}")


@pytest.mark.parametrize("target", ["nowhere.png", "z.png"])
def test_links_to_nothing_are_refused(folder: Path, target: str) -> None:
    (folder / "dog" / "z.png").symlink_to(target)
    with pytest.raises(DataError, match=r"z\.png cannot be read"):
        load_data(f"folder:{folder}")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "dog" / "z.png")
    with pytest.raises(DataError, match="not a regular file"):
        load_data(f"folder:{folder}")


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[31m.png", os.fsdecode(b"\xff.png")])
def test_names_that_a_terminal_cannot_show_are_refused(folder: Path, name: str) -> None:
    save(folder / "dog" / "b.png").rename(folder / "dog" / name)
    with pytest.raises(DataError, match="not plain UTF-8"):
        load_data(f"folder:{folder}")


def test_without_pillow_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kdcache\[vision\]"'):
        load_data(f"folder:{folder}")
