"""Factored caches whose head.h5, or what the manifest says of it, is not the last layer of their teacher."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from encoded_base import (
    FEATURES,
    head_file,
    layer,
    manifest_of,
    manifest_with_head,
    put,
    put_field,
    put_head,
)
from hostile_base import CLASSES, put_manifest, with_archive
from hostile_cases import hostile
from hostile_places import put_instead

from kdcache.format.hdf5_header import build_layout
from kdcache.format.head import HEAD_FILE, head_header, head_specs

# --------------------------------------------------------------------------- what the manifest says


@hostile("manifest.json: factored rows need a head with size, sha256 and arrays, found None")
def head_that_no_manifest_lists(folder: Path) -> Path:
    """No record of the head: a reader takes what lies there."""
    manifest = manifest_of("factored")
    del manifest["head"]
    return put(folder, "factored", manifest)


@hostile("manifest.json: factored rows need a head with size, sha256 and arrays, found {'arrays")
def head_with_an_address(folder: Path) -> Path:
    """A record with a URL, for readers that fetch what is missing."""
    return put_field(folder, "factored", "head", "url", value="https://evil.example/head.h5")


@hostile("manifest.json: a head stands beside factored rows only, found {'arrays")
def head_beside_other_rows(folder: Path) -> Path:
    """The head of a factored teacher beside dense rows: a file that is listed and that nobody checks."""
    return put_manifest(folder, "head", value=manifest_of("factored")["head"])


@hostile("manifest.json: the head has the sha256 '0000.*, the rows name")
def head_of_another_teacher_listed(folder: Path) -> Path:
    """The manifest lists another head than the one that the rows name."""
    return put_field(folder, "factored", "head", "sha256", value="0" * 64)


@hostile("manifest.json: the head's size must be a positive integer, found -1$")
def head_of_negative_size(folder: Path) -> Path:
    """A size of -1, which `read` takes for everything."""
    return put_field(folder, "factored", "head", "size", value=-1)


@hostile("manifest.json: the head's size must be a positive integer, found 281474976710656$")
def head_of_281_terabytes(folder: Path) -> Path:
    """A size of 2**48 bytes, all of which would be hashed."""
    return put_field(folder, "factored", "head", "size", value=2**48)


@hostile("manifest.json, head: array weight is '<f4' .16, 64., expected <f4 .64, 16.")
def weights_turned_round(folder: Path) -> Path:
    """The shape of the weights the other way round: the same bytes, and another product."""
    return put_field(folder, "factored", "head", "arrays", "weight", 2, value=[FEATURES, CLASSES])


@hostile("manifest.json, head: array weight is 'O' .64, 16., expected <f4")
def weights_that_are_objects(folder: Path) -> Path:
    """Weights of the type O: NumPy follows eight bytes of the file as an address."""
    return put_field(folder, "factored", "head", "arrays", "weight", 1, value="O")


@hostile("manifest.json, head: arrays .'weight'., expected .'bias', 'weight'.")
def layer_without_a_bias(folder: Path) -> Path:
    """No bias: whoever takes it for zeros has another teacher."""
    manifest = manifest_of("factored")
    del manifest["head"]["arrays"]["bias"]
    return put(folder, "factored", manifest)


@hostile("manifest.json, head: array bias lies outside the file of")
def bias_beyond_the_file(folder: Path) -> Path:
    """A bias behind the last byte of the head."""
    return put_field(folder, "factored", "head", "arrays", "bias", 0, value=1 << 40)


@hostile("manifest.json, head: arrays weight and bias overlap")
def bias_within_the_weights(folder: Path) -> Path:
    """A bias on the bytes of the weights."""
    weight = manifest_of("factored")["head"]["arrays"]["weight"][0]
    return put_field(folder, "factored", "head", "arrays", "bias", 0, value=weight + 64)


# --------------------------------------------------------------------------- what lies there


@hostile("head.h5 is missing", at="rows", code=4)
def head_that_is_missing(folder: Path) -> Path:
    """The layer was never sent: features without a meaning."""
    path = put(folder, "factored")
    (path / HEAD_FILE).unlink()
    return path


@hostile("head.h5 is a symbolic link", at="rows")
def link_as_a_head(folder: Path) -> Path:
    """A link to the right bytes, outside: they can change when everything was verified."""
    return _with(folder, "link")


@hostile("head.h5 is a FIFO, not a regular file", at="rows")
def fifo_as_a_head(folder: Path) -> Path:
    """A FIFO in the place of the head: opening the cache waits for ever."""
    return _with(folder, "fifo")


@hostile("head.h5 is a folder, not a regular file", at="rows")
def folder_as_a_head(folder: Path) -> Path:
    """A folder in the place of the head."""
    return _with(folder, "folder")


def _with(folder: Path, kind: str) -> Path:
    path = put(folder, "factored")
    put_instead(path / HEAD_FILE, kind, folder / "elsewhere")
    return path


@hostile("head.h5: [0-9]+ bytes, the manifest says [0-9]+; it is truncated", at="rows")
def head_cut_short(folder: Path) -> Path:
    """A head that lost its last bytes on the way."""
    data, _ = head_file(*layer())
    return put(folder, "factored", head_h5=data[:-8])


@hostile("head.h5: its sha256 is not the manifest's", at="rows")
def head_swapped_for_another(folder: Path) -> Path:
    """The layer of another teacher, sound in itself and of the same size: every row teaches something else."""
    weight, bias = layer()
    return put(folder, "factored", head_h5=head_file(weight[::-1].copy(), bias)[0])


@hostile("head.h5: weight holds NaN or infinity", at="rows")
def weights_that_are_no_numbers(folder: Path) -> Path:
    """NaN among the weights, every hash right: one class of each row is NaN, and the loss with it."""
    weight, bias = layer()
    weight[3, 5] = np.nan
    return put_head(folder, weight, bias)


@hostile("head.h5: bias holds NaN or infinity", at="rows")
def bias_that_is_infinite(folder: Path) -> Path:
    """A bias of +inf, every hash right: the teacher is certain of one class, whatever it sees."""
    weight, bias = layer()
    bias[3] = np.inf
    return put_head(folder, weight, bias)


@hostile("head.h5: its header is not that of a head of this cache", at="rows")
def head_that_says_it_is_a_shard(folder: Path) -> Path:
    """A head whose own header calls it a shard, every hash right."""
    header = head_header(CLASSES, FEATURES).replace("head", "shard")
    return put_head(folder, *layer(), header)


@hostile("head.h5: its arrays are not where the manifest says", at="rows")
def bias_among_the_weights(folder: Path) -> Path:
    """The manifest places the bias four bytes early, every hash right: each class has its neighbour's."""
    data, layouts = head_file(*layer())
    manifest = manifest_with_head(hashlib.sha256(data).hexdigest(), len(data), layouts)
    manifest["head"]["arrays"]["bias"][0] -= 4
    return put(folder, "factored", manifest, head_h5=data)


@hostile("head.h5: bytes between its arrays, from byte [0-9]+ on, are not zero", at="rows")
def archive_in_the_padding_of_a_head(folder: Path) -> Path:
    """A zip archive between two arrays of the head, under a manifest that has the hash of it."""
    weight, bias = layer()
    data, layouts = head_file(weight, bias)
    data = with_archive(data)
    manifest = manifest_with_head(hashlib.sha256(data).hexdigest(), len(data), layouts)
    return put(folder, "factored", manifest, head_h5=data)


@hostile("no HDF5 signature at byte 0", at="rows", alike="user_block_with_a_shell_script")
def head_that_is_a_pickle(folder: Path) -> Path:
    """A pickle in the place of the head, with its right hash: `torch.load` would run it."""
    data, layouts = head_file(*layer())
    data = b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR.".ljust(len(data), b".")
    manifest = manifest_with_head(hashlib.sha256(data).hexdigest(), len(data), layouts)
    return put(folder, "factored", manifest, head_h5=data)


@hostile("head.h5: weights were never written .a hole in a sparse file", at="rows")
def head_of_nothing(folder: Path) -> Path:
    """A layer of 268 million classes in one hole of 18 GB: a sparse file that takes 8 KB, and that would be read and
    hashed whole before one row is decoded, or copied."""
    classes = 1 << 28
    layout = build_layout(head_specs(FEATURES), classes, head_header(classes, FEATURES))
    manifest = manifest_with_head("0" * 64, layout.size, layout.arrays)
    manifest["encoding"]["shape"] = [classes]
    manifest["classes"] = {"count": classes, "sha256": None, "names": None}
    path = put(folder, "factored", manifest)
    with (path / HEAD_FILE).open("wb") as file:
        file.truncate(layout.size)
        for offset, data in layout.metadata:
            file.seek(offset)
            file.write(data)
    return path
