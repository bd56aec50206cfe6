"""`kdcache.convert`: a cache in another encoding, streamed, without the teacher.

From rows that hold all logits to any smaller form: dense to int4, to top-k, factored to dense. What was left out once
does not come back, so that top-k rows are refused as a source. The provenance of the new cache names the one that it
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
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.plan import default_shard_rows
from kdcache.store.rewrite import Block, Rewriting, check_target, chosen_views, write_cache

CONVERTED = "converted_from"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "float16",
    top_k: int | None = None,
    temperatures: Sequence[float | str] | None = None,
    views: Sequence[int] | None = None,
    shard_rows: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Writes the rows of a cache in another encoding.

    Args:
        source: a finished cache whose rows hold all logits.
        out: the file to make, if its name ends in `.h5`, else the folder. A call that was killed is finished by the
            same call.
        dtype: `float16`, `float32`, `int8` or `int4`.
        top_k: keep the K largest logits and the label's instead.
        temperatures: with `top_k`, at which the tail's logsumexp is stored, ascending, perhaps ending in "z2"; 1, 2
            and 4 by default.
        views: which views to take; all by default.
        shard_rows: rows of a shard of a folder; up to 131,072 and 256 MiB by default.
        overwrite: replace `out` if it exists.
        progress: called with the number of rows after each block.

    Returns:
        The root hash of the new cache.

    Raises:
        UsageError: rows that do not hold all logits; the same encoding; options or an `out` that cannot be meant.
        MismatchError: a view that the source does not have.
        CorruptCacheError: a damaged row in the source; nothing is written under `out`.
        IncompleteCacheError: shards, or the head of factored rows, are missing in the source.
        StorageError: the disk refused.
    """
    target = Path(out)
    choice = EncodingChoice(dtype, top_k, None if temperatures is None else tuple(temperatures))
    if shard_rows is not None and shard_rows < 1:
        raise UsageError(f"--shard-rows (shard_rows=) must be at least 1, found {shard_rows}")
    if os.path.realpath(target) == os.path.realpath(source):  # what an encoding leaves out would be gone for good
        raise UsageError(f"{target} is the cache that is read; choose another name")
    check_target(source, target, overwrite=overwrite)
    catalog = read_catalog(Path(source))
    result = _result(catalog, choice, source, shard_rows)
    if catalog.head is not None:
        catalog.head.keep()
    job = Rewriting(catalog, result, chosen_views(catalog, source, views), _recode(catalog, result))
    return write_cache(job, source, target, overwrite=overwrite, progress=progress)


def _result(catalog: Catalog, choice: EncodingChoice, source: str | Path, shard_rows: int | None) -> Catalog:
    """What is to be said of the new cache."""
    schema, old = catalog.schema, catalog.schema.encoding
    if not old.has_all_logits:
        raise UsageError(
            f"{source} holds part of the logits of each row (encoding {old.name}), and what was left out does not come "
            "back: convert the cache that it was made from, or run the teacher again"
        )
    new = choice.of(old.row_shape, labels=(2 if schema.is_mixed else 1) if schema.has_labels else 0)
    if new == old:
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
        provenance={**catalog.provenance, CONVERTED: lineage},
        shard_rows=shard_rows or default_shard_rows(made.row_bytes),
        extents=(),
        head=None,
    )


def _recode(catalog: Catalog, result: Catalog) -> Callable[[Block], tuple[dict[str, np.ndarray], int]]:
    old, new = catalog.schema.encoding, result.schema.encoding

    def recode(block: Block) -> tuple[dict[str, np.ndarray], int]:
        logits = old.decode({spec.name: block[spec.name] for spec in old.specs})
        labels = [block[name] for name in ("label", "label_b") if name in block]
        encoded = new.encode(logits, np.stack(labels, axis=1) if labels else None)
        return encoded.arrays, int(encoded.clamped.sum())

    return recode
