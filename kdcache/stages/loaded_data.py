"""What loading a data SPEC gives, and the checks and the provenance that all data sets share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from kdcache.errors import DataError
from kdcache.format.identity import fingerprint, ids_sha256, names_sha256, show_id

NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class LoadedData:
    """A map-style data set and what is known about it.

    Built-in schemes give items `(x, label)`: a float32 tensor (int64 for stored integers that are not uint8) and an
    int, -1 where there is no label. A factory's items come as they are.
    """

    dataset: Dataset[Any]
    name: str
    num_classes: int | None
    classes: tuple[str, ...] | None
    sample_ids: np.ndarray | None
    provenance: dict[str, Any]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]


def data_provenance(
    *,
    name: str,
    rows: int,
    id_scheme: str | None,
    sample_ids: np.ndarray | None,
    inputs: str | None,
    classes: Sequence[str] | None = None,
    files: Sequence[dict[str, Any]] = (),
    decoder: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The `data` part of a cache's provenance.

    `fingerprint` covers all of it but names of files and folders, and the decoder: that is not the data's identity.

    Args:
        name: for people; no absolute path.
        rows: number of samples N.
        id_scheme: what a sample id is.
        sample_ids: (N,) as `as_sample_ids` gives them, None where they are not known here.
        inputs: how stored values become model inputs.
        classes: ordered names.
        files: from `describe_file`.
        decoder: versions of the libraries that decode images, for the diagnosis of inputs that differ.
        more: further facts that identify the data.
    """
    facts = {
        "rows": rows,
        "id_scheme": id_scheme,
        "ids_sha256": None if sample_ids is None else ids_sha256(sample_ids),
        "inputs": inputs,
        "classes_sha256": None if classes is None else names_sha256(classes),
        **more,
    }
    contents = [file["sha256"] for file in files]
    return {
        "name": name,
        **facts,
        **({} if decoder is None else {"decoder": dict(decoder)}),
        "files": list(files),
        "fingerprint": fingerprint({**facts, "contents": contents}),
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Base name, size and sha256 of a file (about 1 GB/s)."""
    state, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
            size += len(block)
    return {"name": path.name, "bytes": size, "sha256": state.hexdigest()}


def check_labels(labels: np.ndarray, *, num_classes: int | None, sample_ids: np.ndarray, name: str) -> np.ndarray:
    """Labels as int64.

    Args:
        labels: (N, ...) integers; -1 = no label.
        num_classes: the number of classes, None where it is not known.
        sample_ids: (N,), to name the offender.
        name: of the data set.

    Raises:
        DataError: not integers, another number of rows, below -1, or not below `num_classes`.
    """
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name}: labels must be integers, found {labels.dtype}")
    if labels.ndim == 0 or len(labels) != len(sample_ids):
        raise DataError(f"{name}: {len(sample_ids)} samples, but labels of shape {labels.shape}")
    limit = np.iinfo(np.int64).max if num_classes is None else num_classes - 1
    wrong = labels > limit if labels.dtype.kind == "u" else (labels < NO_LABEL) | (labels > limit)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        upper = "" if num_classes is None else f" and below {num_classes}"
        raise DataError(
            f"{name}: sample {show_id(sample_ids[first[0]])} has the label {labels[first]}; expected -1 (no label) or "
            f"an integer from 0 on{upper}"
        )
    return np.array(labels, dtype=np.int64)


def check_unique_ids(sample_ids: np.ndarray, *, name: str) -> None:
    """Ids are distinct.

    Raises:
        DataError: naming one that is not.
    """
    unique, counts = np.unique(sample_ids, return_counts=True)
    if len(unique) < len(sample_ids):
        twice = unique[int(np.argmax(counts))]
        raise DataError(
            f"{name}: the sample id {show_id(twice)} occurs {counts.max()} times; each sample needs an id of its own"
        )


def check_not_empty(rows: int, *, name: str) -> None:
    """There is at least one sample.

    Raises:
        DataError: there is none.
    """
    if rows == 0:
        raise DataError(f"{name}: no samples; a data set needs at least one")
