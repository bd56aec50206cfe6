"""The same random batches from other containers, each set up as its users would tune it.

Peers read the logits alone, while ours also gives row maximum, label and id: what is left out favours them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bench_data import CHUNK, CLASSES, ROWS, BenchData
from bench_measure import interleaved, ratio, rows_per_second
from bench_readers import Read, cache_reader

import kdcache

CHUNK_ROWS = 256


def compare(data: BenchData, figures: Any, peer: Read, *, name: str, target: str) -> None:
    ours = cache_reader(kdcache.open(data.one_file))
    peer(np.arange(CHUNK_ROWS))
    found = interleaved(
        {"ours": lambda: rows_per_second(ours, ROWS), "peer": lambda: rows_per_second(peer, ROWS)}, repeats=7
    )
    figures.add("random batches, one file", ratio(found["ours"], found["peer"]), target, against=name)


@pytest.mark.bench
def test_against_tuned_h5py_item_by_item(data: BenchData, figures: Any) -> None:
    with h5py.File(data.one_file, rdcc_nbytes=0) as file:
        logits = file["logits"]

        def read(rows: np.ndarray) -> list[np.ndarray]:
            return [logits[row] for row in rows.tolist()]

        compare(data, figures, read, name="h5py, rdcc_nbytes=0, an item at a time", target=">= 15")


@pytest.mark.bench
def test_against_h5py_sorted_fancy_index(data: BenchData, figures: Any) -> None:
    with h5py.File(data.one_file) as file:
        logits = file["logits"]

        def read(rows: np.ndarray) -> np.ndarray:
            order = np.argsort(rows)
            batch = np.empty((len(rows), CLASSES), np.float16)
            batch[order] = logits[rows[order]]
            return batch

        name = f"h5py, sorted fancy index, chunks of {logits.chunks[0]} rows"
        compare(data, figures, read, name=name, target=">= 150")


@pytest.mark.bench
@pytest.mark.interop("datasets")
def test_against_hugging_face_datasets(
    data: BenchData, figures: Any, bench_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    path = bench_folder / "rows.arrow"
    if not path.exists():
        logits = data.array("logits")
        features = datasets.Features({"logits": datasets.Sequence(datasets.Value("float16"), length=CLASSES)})
        with ArrowWriter(path=str(path), features=features) as writer:
            for start in range(0, ROWS, CHUNK):
                flat = pa.array(logits[start : start + CHUNK].reshape(-1))
                writer.write_table(pa.table({"logits": pa.FixedSizeListArray.from_arrays(flat, CLASSES)}))
            writer.finalize()
    rows = datasets.Dataset.from_file(str(path)).with_format("numpy")
    assert np.array_equal(rows[[5, 3]]["logits"], data.array("logits")[[5, 3]])

    def read(batch: np.ndarray) -> np.ndarray:
        found: np.ndarray = rows[batch.tolist()]["logits"]
        return found

    compare(data, figures, read, name="Hugging Face datasets (Arrow), a batch of indices at a time", target=">= 20")


@pytest.mark.bench
@pytest.mark.interop("zarr")
def test_against_zarr_3(data: BenchData, figures: Any, bench_folder: Path) -> None:
    import zarr

    path = bench_folder / "rows.zarr"
    if not path.exists():
        logits = data.array("logits")
        array = zarr.create_array(
            path, shape=logits.shape, chunks=(CHUNK_ROWS, CLASSES), dtype="float16", compressors=None
        )
        for start in range(0, ROWS, CHUNK):
            array[start : start + CHUNK] = logits[start : start + CHUNK]
    opened = zarr.open_array(path, mode="r")
    assert np.array_equal(opened.oindex[np.array([3, 5])], data.array("logits")[[3, 5]])
    name = f"zarr 3, uncompressed chunks of {CHUNK_ROWS} rows"
    compare(data, figures, lambda rows: opened.oindex[rows], name=name, target=">= 500")
