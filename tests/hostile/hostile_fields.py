"""Manifests whose text is canonical and whose hashes are right, and whose arrays and other fields lie."""

from __future__ import annotations

from pathlib import Path

from hostile_base import CLASSES, changed, put_folder, put_manifest, sound_manifest
from hostile_cases import hostile

_LOGITS = ("shards", 0, "arrays", "logits")


# --------------------------------------------------------------------------- arrays


@hostile("array logits is 'O' .256, 64., expected <f2")
def array_of_python_objects(folder: Path) -> Path:
    """Type O: NumPy reads eight bytes of the file as the address of a Python object, and follows it."""
    return put_manifest(folder, *_LOGITS, 1, value="O")


@hostile(r"array logits is '.V100000' .256, 64., expected <f2")
def array_of_large_elements(folder: Path) -> Path:
    """Type |V100000: 100,000 bytes an element, 1.6 GB for a batch of 256."""
    return put_manifest(folder, *_LOGITS, 1, value="|V100000")


@hostile(r"array logits is '<f2.x1b\[2J' .256, 64., expected <f2")
def type_with_an_escape_sequence(folder: Path) -> Path:
    """A type that clears the terminal of whoever reads the error message."""
    return put_manifest(folder, *_LOGITS, 1, value="<f2\x1b[2J")


@hostile(r"array logits is '<f2' .256, 4294967296., expected <f2")
def shape_that_multiplies_to_zero(folder: Path) -> Path:
    """256 x 2**32 elements of two bytes, times 2**23 shards: products like this are 0 in 64-bit arithmetic, and 0 bytes
    fit everywhere."""
    return put_manifest(folder, *_LOGITS, 2, value=[256, 2**32])


@hostile(r"array 'logits' needs .offset, type, shape")
def shape_with_a_negative_side(folder: Path) -> Path:
    """A side of -64, twice: the product is positive."""
    return put_manifest(folder, *_LOGITS, 2, value=[-256, -CLASSES])


@hostile("manifest.json, shard 0: array logits lies outside the file of", alike="offset_beyond_the_file")
def negative_offset(folder: Path) -> Path:
    """Offset -4096: `seek` from the end, or the byte before a map."""
    return put_manifest(folder, *_LOGITS, 0, value=-4096)


@hostile("manifest.json, shard 0: array logits lies outside the file of")
def offset_beyond_the_file(folder: Path) -> Path:
    """An array that begins behind the last byte: a map of it ends the process with SIGBUS."""
    return put_manifest(folder, *_LOGITS, 0, value=1 << 30)


@hostile("manifest.json, shard 0: array logits lies outside the file of", alike="offset_beyond_the_file")
def offset_whose_end_overflows(folder: Path) -> Path:
    """Offset 2**64-4096: offset + length is a small number in 64-bit arithmetic."""
    return put_manifest(folder, *_LOGITS, 0, value=2**64 - 4096)


@hostile("array 'row_max' needs .offset, type, shape")
def offset_that_is_a_float(folder: Path) -> Path:
    """A float as an offset, exact up to 2**53 and wrong from there on."""
    manifest = sound_manifest()
    manifest["shards"][0]["arrays"]["row_max"][0] += 0.5
    return put_folder(folder, manifest)


@hostile("array 'view' needs .offset, type, shape")
def offset_that_is_true(folder: Path) -> Path:
    """`true` as an offset: byte 1."""
    return put_manifest(folder, "shards", 0, "arrays", "view", 0, value=True)


@hostile("arrays sample_id and label overlap")
def arrays_on_one_another(folder: Path) -> Path:
    """Labels on the bytes of the ids."""
    manifest = sound_manifest()
    arrays = manifest["shards"][0]["arrays"]
    arrays["label"][0] = arrays["sample_id"][0] + 8
    return put_folder(folder, manifest)


@hostile("array logits starts at byte [0-9]+, which is misaligned")
def array_that_cannot_be_mapped(folder: Path) -> Path:
    """Logits eight bytes further on, on no page: a reader that copies what it cannot map copies 200 GB into memory."""
    manifest = sound_manifest()
    manifest["shards"][0]["arrays"]["logits"][0] += 8
    return put_folder(folder, manifest)


@hostile("shard 0: [0-9]+ bytes from byte [0-9]+ on belong to no array")
def shard_of_a_terabyte_of_nothing(folder: Path) -> Path:
    """A shard of 1 TB whose arrays take 100 KB: all bytes outside the arrays are hashed before a row is read."""
    path = put_manifest(folder, "shards", 0, "size", value=1 << 40)
    with (path / "shards" / "v000-00000.h5").open("r+b") as file:
        file.truncate(1 << 40)
    return path


@hostile("shard 0: arrays .*'evil'.*, expected")
def array_without_a_meaning(folder: Path) -> Path:
    """One array more than the schema has, which no checksum covers."""
    return put_manifest(folder, "shards", 0, "arrays", "evil", value=[0, "<u2", [256]])


@hostile(r"shard 0: arrays \['aaa[a]*.*, expected")
def array_with_a_name_of_a_megabyte(folder: Path) -> Path:
    """A name of a megabyte in the message of its refusal."""
    return put_manifest(folder, "shards", 0, "arrays", "a" * 1_000_000, value=[0, "<u2", [256]])


@hostile("shard 0: arrays .*'logits', 'row_max', 'sample_id', 'view'., expected")
def array_left_out(folder: Path) -> Path:
    """No row checksums: a reader that checks what is there checks nothing."""
    manifest = sound_manifest()
    del manifest["shards"][0]["arrays"]["row_crc"]
    return put_folder(folder, manifest)


@hostile("shard 0: arrays must be an object of at most 32 entries")
def arrays_by_the_thousand(folder: Path) -> Path:
    """5,000 arrays in one shard, each with a map of its own."""
    arrays = {f"a{n}": [8 * n, "<u2", [256]] for n in range(5000)}
    return put_manifest(folder, "shards", 0, "arrays", value=arrays)


# --------------------------------------------------------------------------- other fields


@hostile("manifest.json: format version True, this kdcache reads version 1")
def format_version_true(folder: Path) -> Path:
    """Version `true`, which is equal to 1."""
    return put_manifest(folder, "format", value=True)


@hostile("manifest.json: kind is 'plan', expected 'folder'")
def plan_in_the_place_of_a_manifest(folder: Path) -> Path:
    """The plan of a dump that never ended, renamed: a cache of rows that were never computed."""
    return put_manifest(folder, "kind", value="plan")


@hostile(r"manifest.json: the encoding dense needs exactly dtype, name, shape, found .*__reduce__")
def encoding_with_a_hook(folder: Path) -> Path:
    """An encoding with one field more, for decoders that pass fields on as arguments."""
    encoding = changed(sound_manifest()["encoding"], __reduce__="os.system")
    return put_manifest(folder, "encoding", value=encoding)


@hostile("manifest.json: an encoding's shape must be a list of positive integers, found .2147483648.")
def two_billion_classes(folder: Path) -> Path:
    """2**31 classes: 8 GB for one row of float32."""
    encoding = changed(sound_manifest()["encoding"], shape=[2**31])
    return put_manifest(folder, "encoding", value=encoding)


@hostile("manifest.json: a row of 4253529[0-9]+ bytes, HDF5 stores less than 4294967296")
def shape_of_a_row_that_overflows(folder: Path) -> Path:
    """A row of (2**31-1)**4 elements, within each single limit and beyond all memory together."""
    manifest = sound_manifest()
    manifest["encoding"]["shape"] = [2**31 - 1] * 4
    manifest["classes"] = {"count": 2**31 - 1, "sha256": None, "names": None}
    return put_folder(folder, manifest)


@hostile(r"sample ids of type '\|S1025', expected <i8 or \|S1 to \|S1024")
def ids_of_1025_bytes(folder: Path) -> Path:
    """Ids one byte longer than they may be."""
    return put_manifest(folder, "id", value="|S1025")


@hostile("manifest.json: labels and digests must be true or false")
def labels_as_text(folder: Path) -> Path:
    """`"false"`, which is true."""
    return put_manifest(folder, "labels", value="false")


@hostile("manifest.json: the class names do not match their number or their hash")
def class_names_of_others(folder: Path) -> Path:
    """The names turned round, under the hash of the right ones: cats for dogs."""
    manifest = sound_manifest()
    manifest["classes"]["names"].reverse()
    return put_folder(folder, manifest)


@hostile("manifest.json: class names must be a list of text")
def class_names_that_are_lists(folder: Path) -> Path:
    """Class names that are lists of lists."""
    return put_manifest(folder, "classes", "names", value=[[]] * CLASSES)


@hostile("manifest.json: the class count does not match the encoding's 64")
def class_count_as_a_float(folder: Path) -> Path:
    """64.0 classes."""
    return put_manifest(folder, "classes", "count", value=64.0)


@hostile("manifest.json: the hash of the class names is not a sha256")
def hash_of_class_names_that_is_a_path(folder: Path) -> Path:
    """A path in the place of a hash: readers that fetch files by their hash fetch this one."""
    return put_manifest(folder, "classes", "sha256", value="../../../etc/passwd")


@hostile("manifest.json: provenance, and teacher, .*must be objects", alike="as_many_lists_as_are_allowed")
def teacher_that_is_a_text(folder: Path) -> Path:
    """The teacher is a text: `provenance["teacher"]["spec"]` is a TypeError in the middle of somebody's report."""
    return put_manifest(folder, "provenance", "teacher", value="resnet")


@hostile("manifest.json: created is '<script>alert.1.</script>', not a date")
def date_that_is_a_script(folder: Path) -> Path:
    """A script in the place of the date, for the page that a card becomes on a hub."""
    return put_manifest(folder, "created", value="<script>alert(1)</script>")


@hostile("manifest.json: predecessor must be a root hash")
def predecessor_that_is_a_command(folder: Path) -> Path:
    """A command in the place of a hash, for scripts that paste it."""
    return put_manifest(folder, "predecessor", value="$(touch PWNED)")


@hostile("manifest.json: extents must be a list of 2 to 4096 numbers of samples")
def extents_without_end(folder: Path) -> Path:
    """Five thousand extents: a cache that grew by a sample at a time, for readers that make a list of each."""
    return put_manifest(folder, "extents", value=list(range(1, 5001)))


@hostile("manifest.json: extents must ascend from 1 or more to the number of samples")
def extents_that_turn_back(folder: Path) -> Path:
    """Extents 512, 256, 600: samples that belong to two shards."""
    return put_manifest(folder, "extents", value=[512, 256, 600])


@hostile("manifest.json: shard v000-00000.h5 ends at sample 255, expected 99")
def extent_within_a_shard(folder: Path) -> Path:
    """An extent of 100 samples where the first shard holds 256: which shard has sample 100 is anyone's guess."""
    return put_manifest(folder, "extents", value=[100, 600])


@hostile("shard 0: sha256 is not 64 hexadecimal digits")
def hash_in_capital_letters(folder: Path) -> Path:
    """A hash in capitals: equal for people, different for programs."""
    return put_manifest(folder, "shards", 0, "sha256", value="A" * 64)


@hostile("shard 0: a shard record needs exactly")
def record_with_a_field_more(folder: Path) -> Path:
    """A record with a URL, for readers that are helpful."""
    return put_manifest(folder, "shards", 0, "url", value="https://evil.example/x.h5")


@hostile("manifest.json: the field 'digests' is missing")
def field_left_out(folder: Path) -> Path:
    """A field less: defaults differ between versions."""
    manifest = sound_manifest()
    del manifest["digests"]
    return put_folder(folder, manifest)
