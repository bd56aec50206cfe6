"""Labels that were corrected after a dump, from a CSV file by sample id: what `kdcache convert --labels` puts in.

Such a file need not name every sample: the others keep the label that they have. The cache is read once before it is
written, labels only, so that a file that changes nothing is refused and the new cache can say how many it changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import DataError, MismatchError, StorageError, UsageError
from kdcache.format.encoding import label_count
from kdcache.format.identity import as_sample_ids, show_id, show_ids
from kdcache.store.cache import Cache
from kdcache.store.rewrite import Block

COLUMNS = ("sample_id", "label")
_MAX_DIGITS = 40


@dataclass(frozen=True, eq=False)
class CorrectedLabels:
    """Labels by sample.

    Attributes:
        sample_ids: (n,) ascending.
        labels: (n,) int64, -1 = none.
        provenance: name and sha256 of the file, how many samples it names, and how many had another label.
    """

    sample_ids: np.ndarray
    labels: np.ndarray
    provenance: dict[str, Any]

    def of(self, block: Block) -> np.ndarray:
        """(rows,) the labels of a block, corrected where the file names its sample."""
        ids = block["sample_id"]
        at = np.minimum(np.searchsorted(self.sample_ids, ids), len(self.sample_ids) - 1)
        found: np.ndarray = np.where(self.sample_ids[at] == ids, self.labels[at], block["label"])
        return found.astype(block["label"].dtype)


def corrected_labels(path: Path, cache: Cache) -> CorrectedLabels:
    """The labels in a CSV file with the columns sample_id and label, compared with a cache.

    Args:
        path: the file, as `kdcache suspects` writes it (further columns are not looked at) or as a spreadsheet does.
        cache: open.

    Raises:
        UsageError: no such file or columns, a cache without labels or of mixed views, or no label that differs.
        DataError: a label that is none of the classes, or a sample with two.
        MismatchError: samples that the cache does not hold.
        StorageError: the file cannot be read.
    """
    name = cache.path.name
    if not cache.has_labels:
        raise UsageError(f"{name} has no labels to be corrected: dump it again from data with labels")
    if cache.catalog.schema.is_mixed:
        raise UsageError(f"{name} holds mixed views (MixUp, CutMix), whose rows have two labels: dump it again")
    content = _content(path)
    texts, labels = _parse(path, content, label_count(cache.catalog.classes.count))
    ids = _ids(path, texts, cache)
    order = np.argsort(ids, kind="stable")
    ids, labels = ids[order], labels[order]
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if twice.size:
        raise DataError(
            f"--labels {path}: the sample {show_id(ids[twice[0]])} stands there twice; leave one line of it"
        )
    found = cache.find(ids, cache.views[0])
    if (found < 0).any():
        raise MismatchError(
            f"--labels {path} names {int((found < 0).sum())} samples that {name} does not hold "
            f"({show_ids(ids[found < 0][:6])}): remove their lines, or take the file of this data set"
        )
    changed = int((cache.stored("label", 0, cache.num_samples)[found] != labels).sum())
    if not changed:
        raise UsageError(f"--labels {path}: all {len(ids)} labels are those of {name}; nothing is to be corrected")
    about: dict[str, Any] = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    about |= {"samples": len(ids), "changed": changed}
    return CorrectedLabels(ids.astype(cache.catalog.schema.id_dtype), labels, about)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"--labels: there is no file {path}") from None
    except OSError as error:
        raise StorageError(f"--labels {path} could not be read: {error.strerror or error}") from error


def _parse(path: Path, content: bytes, classes: int) -> tuple[list[str], np.ndarray]:
    """The ids as text, and (n,) labels."""
    texts, labels = [], []
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))  # spreadsheets mark their files
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise UsageError(f"--labels {path} needs the columns sample_id and label, found {reader.fieldnames!s:.200}")
        for line in reader:
            label = (line["label"] or "").strip()
            if not label.removeprefix("-").isdecimal() or len(label) > 9 or not -1 <= int(label) < classes:
                raise DataError(
                    f"--labels {path}, line {reader.line_num}: the label is {label!r:.80}, expected a number from 0 to "
                    f"{classes - 1}, or -1 for none"
                )
            texts.append((line["sample_id"] or "").removeprefix("'"))  # see `csv_file.safe_text`
            labels.append(int(label))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--labels {path} is not a CSV file in UTF-8: {error}") from None
    if not labels:
        raise UsageError(f"--labels {path} has no line behind its header")
    return texts, np.array(labels, np.int64)


def _ids(path: Path, texts: list[str], cache: Cache) -> np.ndarray:
    if cache.catalog.schema.id_dtype != "<i8":
        return as_sample_ids(texts)
    # Python refuses to read thousands of digits; what is a little too long for int64 `as_sample_ids` names.
    wrong = next((t for t in texts if not t.removeprefix("-").isdecimal() or len(t) > _MAX_DIGITS), None)
    if wrong is not None:
        raise MismatchError(f"--labels {path}: the sample id {wrong!r:.80} is no integer, as those of the cache are")
    return as_sample_ids([int(text) for text in texts])
