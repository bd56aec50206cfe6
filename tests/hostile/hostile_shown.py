"""Caches that are sound and say things about themselves that no terminal and no page should get as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hostile_base import CLASSES, PROVENANCE, container, header_of, open_writer, put_file, rows_of, write_sound
from hostile_cases import hostile

_TERMINAL = "\x1b]0;title\x07\x1b[2J\x1b[31m red \x9b1A\x7f\r\x08\u202etxt.exe\u2066\u200b"


def _saying(folder: Path, name: str = "teacher", **provenance: Any) -> Path:
    return write_sound(folder / name, provenance={**PROVENANCE, **provenance})


@hostile(at="shown", code=0)
def teacher_with_escape_sequences(folder: Path) -> Path:
    """The teacher's name sets the title of the terminal, clears it, moves the cursor up and turns letters round: what
    `inspect` seems to print is not what the cache says."""
    return _saying(folder, teacher={"spec": f"good{_TERMINAL}"}, data={"name": _TERMINAL})


@hostile(at="shown", code=0)
def keys_with_escape_sequences(folder: Path) -> Path:
    """The same in the keys of the provenance, which are printed as well."""
    return _saying(folder, **{_TERMINAL: {_TERMINAL: 1}})


@hostile(at="shown", code=0)
def file_with_escape_sequences(folder: Path) -> Path:
    """The same in the header of a one-file cache."""
    return _saying(folder, "teacher.h5", teacher={"spec": _TERMINAL}, licence=_TERMINAL)


@hostile(at="shown", code=0)
def class_names_with_escape_sequences(folder: Path) -> Path:
    """The same in the names of classes, which reports print beside numbers."""
    return write_sound(folder / "teacher", classes=[f"{_TERMINAL}{n}" for n in range(CLASSES)])


@hostile(at="shown", code=0)
def stray_file_with_escape_sequences(folder: Path) -> Path:
    """The same in the name of a file that the manifest does not list, which `inspect` reports."""
    path = write_sound(folder / "teacher")
    (path / "shards" / "x\x1b[2J\x9b\n\u202ey").write_text("")
    return path


@hostile(at="shown", code=0)
def card_with_markup(folder: Path) -> Path:
    """A licence that is a link to a script, a teacher that is a script, and data that are an image on the attacker's
    server: the card becomes a page on a hub."""
    return _saying(
        folder,
        licence="[MIT](javascript:alert(1))",
        teacher={"spec": "<script>alert(1)</script> | x | y |", "state_sha256": "` <img src=x onerror=alert(1)> `"},
        data={"name": "![i](https://evil.example/pixel.png) &lt;b&gt; <!-- "},
        teacher_seen="no\n\n# Verified by nobody",
    )


@hostile(at="shown", code=0)
def card_with_front_matter(folder: Path) -> Path:
    """A licence that ends the front matter of the card and begins another one: hubs read another licence there."""
    licence = '"\n---\nlicense: mit\nconfigs: [{data_files: /etc/passwd}]\n---\n'
    return _saying(folder, licence=licence, data={"name": "---"})


@hostile(at="shown", code=0)
def licence_of_fifty_kilobytes(folder: Path) -> Path:
    """A licence of 50,000 letters without a space, in every table."""
    return _saying(folder, licence="a" * 50_000)


@hostile("sample '.x1b.2J.x9b.u202e0'", at="rows")
def sample_id_with_escape_sequences(folder: Path) -> Path:
    """A sample id that clears the terminal, in a row whose checksum is wrong: the error message names the sample."""
    rng = np.random.default_rng(0)
    path = folder / "teacher.h5"
    with open_writer(path) as writer:
        ids = [f"\x1b[2J\x9b\u202e{n}" for n in range(20)]
        writer.write(ids, rng.standard_normal((20, CLASSES), np.float32), np.zeros(20, np.int64))
    data = path.read_bytes()
    path.unlink()
    arrays = rows_of(data)
    arrays["logits"][0, 0] += 1
    return put_file(folder, container(arrays, header_of(data)))
