"""`kdcache.convert`: a cache in another encoding, streamed, without the teacher.

From rows that hold all logits to any smaller form: dense to int4, to top-k, factored to dense. What was left out once
does not come back, so that top-k rows are refused as a source. Labels that were corrected since the dump come in on the
way. The provenance of the new cache names the one that it
was made from, since a float32 cache of int4 rows has the errors of int4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.encodings import EncodingChoice
from kdcache.store.cache import open as open_cache
from kdcache.store.corrected_labels import CorrectedLabels, corrected_labels
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.plan import default_shard_rows
from kdcache.store.rewrite import Block, Rewriting, check_target, chosen_views, write_cache

CONVERTED, CORRECTED = "converted_from", "corrected_labels"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    top_k: int | None = None,
    temperatures: Sequence[float | str] | None = None,
    labels: str | Path | None = None,
    views: Sequence[int] | None = None,
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Writes the rows of a cache in another encoding, or with corrected labels, or both.

    Args:
        source: a finished cache whose rows hold all logits.
        out: the file to make, if its name ends in `.h5`, else the folder. A call that was killed is finished by the
            same call.
        dtype: `float16`, `float32`, `int8` or `int4`; by default float16, with `labels` as they are.
        top_k: keep the K largest logits and the label's instead.
        temperatures: with `top_k`, at which the tail's logsumexp is stored, ascending, perhaps ending in "z2"; 1, 2
            and 4 by default.
        labels: a CSV file with the columns sample_id and label: these samples get these labels, in all views.
        views: which views to take; all by default.
        shard_rows: rows of a shard of a folder; up to 131,072 and 256 MiB by default.
        overwrite: replace `out` if it exists.
        progress: called with the number of rows after each block.

    Returns:
        The root hash of the new cache.

    Raises:
        UsageError: rows that do not hold all logits; the same encoding; options, labels or an `out` that cannot be
            meant.
        MismatchError: a view that the source does not have, or labels of samples that it does not hold.
        DataError: a label that is none of the classes.
        CorruptCacheError: a damaged row in the source; nothing is written under `out`.
        IncompleteCacheError: shards, or the head of factored rows, are missing in the source.
        StorageError: the disk refused.
    """
    target = Path(out)
    choice = EncodingChoice(dtype or "float16", top_k, None if temperatures is None else tuple(temperatures))
    if shard_rows is not None and shard_rows < 1:
        raise UsageError(f"--shard-rows (shard_rows=) must be at least 1, found {shard_rows}")
    if os.path.realpath(target) == os.path.realpath(source):  # what an encoding leaves out would be gone for good
        raise UsageError(f"{target} is the cache that is read; choose another name")
    check_target(source, target, overwrite=overwrite)
    catalog = read_catalog(Path(source))
    corrected = None
    if labels is not None:
        with open_cache(source) as cache:
            corrected = corrected_labels(Path(labels), cache)
    stays = corrected is not None and dtype is None and top_k is None
    result = _result(catalog, None if stays else choice, source, shard_rows, corrected)
    if catalog.head is not None:
        catalog.head.keep()
    job = Rewriting(catalog, result, chosen_views(catalog, source, views), _recode(catalog, result, corrected))
    return write_cache(job, source, target, overwrite=overwrite, progress=progress)


def _result(
    catalog: Catalog,
    choice: EncodingChoice | None,
    source: str | Path,
    shard_rows: int | None,
    corrected: CorrectedLabels | None,
) -> Catalog:
    """What is to be said of the new cache; without a choice it keeps the encoding."""
    schema, old = catalog.schema, catalog.schema.encoding
    if not old.has_all_logits:
        raise UsageError(
            f"{source} holds part of the logits of each row (encoding {old.name}), and what was left out does not come "
            "back: convert the cache that it was made from, or run the teacher again"
        )
    labels = (2 if schema.is_mixed else 1) if schema.has_labels else 0
    new = old if choice is None else choice.of(old.row_shape, labels=labels)
    if new == old and corrected is None:
        raise UsageError(
            f"{source} has this encoding already ({old.name} {old.dtype}); `kdcache merge` copies it as it is"
        )
    made = replace(schema, encoding=new)
    before = catalog.provenance.get(CONVERTED)
    origin = {"root": catalog.root, "encoding": old.to_json()}
    lineage = [*(before if isinstance(before, list) else []), origin]
    return replace(
        catalog,
        schema=made,
        provenance={
            **catalog.provenance,
            **({} if corrected is None else {CORRECTED: corrected.provenance}),
            CONVERTED: lineage,
        },
        shard_rows=shard_rows or default_shard_rows(made.row_bytes),
        extents=(),
        head=catalog.head if new == old else None,
    )


def _recode(
    catalog: Catalog, result: Catalog, corrected: CorrectedLabels | None
) -> Callable[[Block], tuple[dict[str, np.ndarray], int]]:
    old, new = catalog.schema.encoding, result.schema.encoding

    def recode(block: Block) -> tuple[dict[str, np.ndarray], int]:
        stored = {spec.name: block[spec.name] for spec in old.specs}
        changed = {} if corrected is None else {"label": corrected.of(block)}
        if new == old:
            return {**stored, **changed}, 0
        both = {**block, **changed}
        labels = [both[name] for name in ("label", "label_b") if name in both]
        encoded = new.encode(old.decode(stored), np.stack(labels, axis=1) if labels else None)
        return {**encoded.arrays, **changed}, int(encoded.clamped.sum())

    return recode
