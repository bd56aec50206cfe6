"""Manifests whose text no strict reader takes: size, nesting, numbers, encodings of text, hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hostile_base import put_folder, sealed, sound_manifest
from hostile_cases import hostile

from kdcache.format.identity import canonical_json, fingerprint


def _with_text(folder: Path, text: bytes) -> Path:
    return put_folder(folder, text)


def _with_provenance(folder: Path, text: str) -> Path:
    """The manifest with a piece of JSON in its provenance that Python would not write; the root hash stays wrong."""
    manifest = {**sound_manifest(), "provenance": {"note": "PLACE"}}
    return put_folder(folder, sealed(manifest).replace(b'"PLACE"', text.encode()))


@hostile(r"manifest.json: not readable as JSON \(JSONDecodeError: Expecting value: line 1 column 1")
def manifest_of_nothing(folder: Path) -> Path:
    """An empty manifest, as a full disk leaves it."""
    return _with_text(folder, b"")


@hostile("manifest.json: expected a JSON object, found list")
def manifest_that_is_a_list(folder: Path) -> Path:
    """A list: `manifest["shards"]` is a TypeError."""
    return _with_text(folder, b"[]\n")


@hostile(r"manifest.json: not readable as JSON \(JSONDecodeError: Unexpected UTF-8 BOM")
def byte_order_mark(folder: Path) -> Path:
    """A byte order mark before the first bracket: some parsers skip it, others fail, and the hash covers it or not."""
    return _with_text(folder, b"\xef\xbb\xbf" + sealed(sound_manifest()))


@hostile(r"manifest.json: not readable as JSON \(UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff")
def manifest_in_utf16(folder: Path) -> Path:
    """UTF-16, which `json.loads` detects and decodes by itself: other bytes, the same content, another hash."""
    return _with_text(folder, sealed(sound_manifest()).decode().encode("utf-16"))


@hostile("manifest.json: half of a surrogate pair")
def half_of_a_surrogate_pair(folder: Path) -> Path:
    r"""The teacher is called \ud800. JSON can spell it and Unicode has no such character: printing the name, or writing
    a card with it, is a UnicodeEncodeError."""
    return _with_provenance(folder, r'"\ud800"')


@hostile("manifest.json: half of a surrogate pair", alike="half_of_a_surrogate_pair")
def surrogates_in_the_wrong_order(folder: Path) -> Path:
    r"""The two halves of an emoji in the wrong order, which is found only by who looks at both."""
    return _with_provenance(folder, r'"\ude00\ud83d"')


@hostile(r"manifest.json: not readable as JSON \(JSONDecodeError: Extra data")
def second_object_behind_the_first(folder: Path) -> Path:
    """Two manifests in one file: parsers that read on until the first is complete see another one than those that read
    the last."""
    return _with_text(folder, sealed(sound_manifest()) * 2)


@hostile(r"manifest.json: not readable as JSON \(RecursionError")
def hundred_thousand_brackets(folder: Path) -> Path:
    """100,000 opening brackets: parsers that recurse end on their stack, some of them with a crash."""
    return _with_provenance(folder, "[" * 100_000 + "]" * 100_000)


@hostile("manifest.json: nested more than 64 levels deep")
def hundred_levels(folder: Path) -> Path:
    """100 levels: the parser manages, and code that walks over the provenance does not."""
    return _with_provenance(folder, '{"a":' * 100 + "0" + "}" * 100)


@hostile("manifest.json: a key stands twice in one object")
def duplicate_keys(folder: Path) -> Path:
    """`shards` twice: the hash was taken by a parser that keeps the last one, the files are fetched by one that keeps
    the first."""
    return _with_text(folder, b'{"shards":[],' + sealed(sound_manifest())[1:])


@hostile("manifest.json: NaN is not allowed")
def nan_in_a_manifest(folder: Path) -> Path:
    """NaN is no JSON, but Python's parser takes it: equal to nothing, in no order, written by each program in its own
    way."""
    return _with_provenance(folder, "NaN")


@hostile("manifest.json: -Infinity is not allowed")
def minus_infinity_in_a_manifest(folder: Path) -> Path:
    """-Infinity, of which `int` makes an OverflowError."""
    return _with_provenance(folder, "-Infinity")


@hostile("manifest.json: 1e999 is not allowed")
def number_that_becomes_infinite(folder: Path) -> Path:
    """1e999 is JSON, and an infinity in every program that reads it: what NaN's absence should have kept out."""
    return _with_provenance(folder, "1e999")


@hostile("manifest.json: an integer of 5000 digits")
def integer_of_5000_digits(folder: Path) -> Path:
    """5,000 digits: Python refuses to convert more than 4,300 with a ValueError, older versions take quadratic time."""
    return _with_provenance(folder, "7" * 5000)


@hostile("manifest.json: a number of 5003 characters")
def fraction_of_5000_digits(folder: Path) -> Path:
    """A fraction of 5,000 digits: it rounds to the same float as many others do."""
    return _with_provenance(folder, "0." + "3" * 5001)


@hostile("manifest.json: 104857600 bytes, more than the limit of 12582912")
def manifest_of_100_megabytes(folder: Path) -> Path:
    """100 MB of spaces before the first bracket, in a sparse file: read, decoded and scanned before anybody sees
    what it is."""
    path = _with_text(folder, b"")
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(100 << 20)
    return path


@hostile("manifest.json: about 838[0-9]+ values of JSON, more than the limit of 750000")
def millions_of_empty_lists(folder: Path) -> Path:
    """4 million empty lists in 12 MB of text: 64 bytes of memory for each, and a second of collecting garbage."""
    return _with_provenance(folder, "[" + "[]," * 4_190_000 + "[]]")


@hostile("manifest.json: provenance, and teacher, .*must be objects")
def as_many_lists_as_are_allowed(folder: Path) -> Path:
    """374,000 empty lists, just below the limit, hashes right: the most that a manifest can make a reader do."""
    return _with_text(folder, sealed({**sound_manifest(), "provenance": [[]] * 374_000}))


@hostile("manifest.json: the root hash does not match the content", alike="root_hash_of_another_manifest")
def twelve_megabytes_of_emoji(folder: Path) -> Path:
    """3 million emoji, just below the limit: decoded, parsed, and escaped again for the hash, each as 12 letters."""
    return _with_provenance(folder, '"' + "\U0001f600" * 3_140_000 + '"')


@hostile("manifest.json: the root hash does not match the content")
def root_hash_of_another_manifest(folder: Path) -> Path:
    """The root hash that the victim expects, over another content."""
    return _with_text(folder, sealed({**sound_manifest(), "samples": 599}).replace(b'"samples":599', b'"samples":600'))


@hostile("manifest.json: the root hash does not match the content", alike="root_hash_of_another_manifest")
def date_changed(folder: Path) -> Path:
    """Another date: the root hash leaves it out, the seal does not."""
    manifest = sound_manifest()
    text = canonical_json({**manifest, "created": "2001-01-01T00:00:00Z"}).encode() + b"\n"
    return _with_text(folder, text)


@hostile("manifest.json: not written as kdcache writes it")
def same_content_in_other_words(folder: Path) -> Path:
    """The same content, indented: it has the same root hash and other bytes, so two files pass for one."""
    return _with_text(folder, json.dumps(json.loads(sealed(sound_manifest())), indent=1).encode())


@hostile("manifest.json: not written as kdcache writes it", alike="same_content_in_other_words")
def float_in_another_spelling(folder: Path) -> Path:
    """1.0 spelt 1e0: one number, two texts, one hash."""
    manifest = {**sound_manifest(), "provenance": {"note": 1.0}}
    return _with_text(folder, sealed(manifest).replace(b'{"note":1.0}', b'{"note":1e0}'))


# --------------------------------------------------------------------------- classes.json


def _with_classes_file(folder: Path, text: bytes | None, names: object = None) -> Path:
    """A manifest whose class names stand in classes.json; by default the file does not match its hash."""
    manifest = sound_manifest()
    sha256 = fingerprint(names) if names is not None else "0" * 64
    manifest["classes"] = {"count": 64, "sha256": sha256}
    path = put_folder(folder, manifest)
    if text is not None:
        (path / "classes.json").write_bytes(text)
    return path


@hostile("classes.json: the class names do not match the hash in the manifest")
def class_list_of_another_cache(folder: Path) -> Path:
    """The names of another class list: every prediction gets the wrong name, and nothing else is amiss."""
    return _with_classes_file(folder, canonical_json([f"{n}" for n in range(64)]).encode())


@hostile("classes.json: expected a list of 64 names")
def class_list_that_is_an_object(folder: Path) -> Path:
    """An object where a list should be, with the right hash."""
    names = {"cat": 0}
    return _with_classes_file(folder, canonical_json(names).encode(), names)


@hostile("classes.json: a key stands twice in one object")
def class_list_that_closes_its_own_bracket(folder: Path) -> Path:
    """Text that is pasted into an object closes a list and opens another: what was hashed is not what is parsed."""
    text = b'["a"],"names":["b"]'
    manifest = sound_manifest()
    manifest["classes"] = {"count": 64, "sha256": hashlib.sha256(text).hexdigest()}
    path = put_folder(folder, manifest)
    (path / "classes.json").write_bytes(text)
    return path


@hostile("classes.json is missing", code=4)
def class_list_that_is_missing(folder: Path) -> Path:
    """The manifest speaks of a list that is not there."""
    return _with_classes_file(folder, None)


@hostile("classes.json: about 800001 values of JSON, more than the limit of 750000")
def class_list_of_800_thousand_names(folder: Path) -> Path:
    """800,000 names, with the right hash: 60 bytes of memory for a name of two letters."""
    names = ["ab"] * 800_000
    return _with_classes_file(folder, canonical_json(names).encode(), names)


@hostile("classes.json: 314572800 bytes, more than the limit of 12582912")
def class_list_of_300_megabytes(folder: Path) -> Path:
    """300 MB of class names, in a sparse file."""
    path = _with_classes_file(folder, b"")
    with (path / "classes.json").open("r+b") as file:
        file.truncate(300 << 20)
    return path
