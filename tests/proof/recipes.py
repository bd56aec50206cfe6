"""The forms of caches that are damaged, and how each is made: every encoding, views, labels, long class lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcache.format.encoding import Encoding
from kdcache.format.encodings import EncodingChoice
from kdcache.format.factored import Factored
from kdcache.format.identity import as_sample_ids
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import DumpFolder, open_dump
from kdcache.store.head_writer import HeadContent, head_content, place_head
from kdcache.store.incoming import consecutive
from kdcache.store.merge import merge
from kdcache.store.plan import Plan

ONE_FILE = "teacher.h5"


@dataclass(frozen=True)
class Recipe:
    """One form of a cache; `names` are as long as it takes to need a classes.json.

    With `top_k` it keeps so many logits of a row, with `features` so many inputs of a last layer.
    """

    name: str
    rows: int = 120
    shard_rows: int = 50
    classes: int = 7
    trailing: tuple[int, ...] = ()
    dtype: str = "float16"
    top_k: int | None = None
    features: int | None = None
    views: tuple[int, ...] = (0,)
    text_ids: bool = False
    labels: bool = True
    digests: bool = False
    names: bool = False
    one_file: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def plan(self) -> Plan:
        """Of every dump of this form, so that their shards have the same headers."""
        ids = self.ids()
        id_dtype = "<i8" if ids.dtype.kind == "i" else f"|S{ids.dtype.itemsize}"
        schema = RowSchema(self.encoding, id_dtype, self.labels, self.digests)
        names = tuple(f"class {n:03d} {'of a long list ' * 6}" for n in range(self.classes)) if self.names else None
        provenance = {"teacher": {"spec": "module:factory"}, "data": {"name": "toy"}}
        classes = ClassList.of(self.classes, names)
        head = None if self.head is None else self.head.record
        return Plan(schema, classes, self.shard_rows, self.rows, provenance, self.views, head=head)

    @property
    def encoding(self) -> Encoding:
        """Of its rows."""
        if self.head is not None:
            return Factored((self.classes,), self.inputs[0], self.head.record.sha256)
        return EncodingChoice(self.dtype, self.top_k).of((self.classes, *self.trailing), labels=int(self.labels))

    @property
    def head(self) -> HeadContent | None:
        """The last layer of its teacher, the same for all dumps; None but for factored rows."""
        if self.features is None:
            return None
        rng = np.random.default_rng(self.features)
        return head_content(rng.normal(size=(self.classes, self.features)), rng.normal(size=self.classes))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of what a row is made of: its logits, or the features."""
        return (self.classes, *self.trailing) if self.features is None else (self.features,)

    def ids(self) -> np.ndarray:
        numbers = range(self.rows)
        return as_sample_ids([f"image {n * 7919 % self.rows}.png" for n in numbers] if self.text_ids else numbers)


FOLDERS = (
    Recipe("float16"),
    Recipe("text ids", dtype="float32", text_ids=True, labels=False, digests=True),
    Recipe("two views", views=(0, 3), rows=60, shard_rows=15),
    Recipe("two views of images", views=(1, 2), rows=40, shard_rows=16, trailing=(3, 2), labels=False, text_ids=True),
    Recipe("a vocabulary", classes=700, rows=30, shard_rows=20, names=True, digests=True),
    Recipe("top-k", classes=21, top_k=3, views=(0, 1), rows=60, shard_rows=25),
    Recipe("factored", classes=9, features=5, text_ids=True),
)
FILES = (
    Recipe("one file", digests=True, one_file=True),
    Recipe("one file of two views", dtype="float32", views=(0, 3), text_ids=True, rows=60, one_file=True),
    Recipe("one file of images", classes=4, trailing=(2, 3), labels=False, digests=True, one_file=True),
    Recipe("one file of int4", classes=21, dtype="int4", one_file=True),
)
# Several HDF5 chunks and many pages in a shard; the second has chunks of 1 MiB.
LARGE = (
    Recipe("chunks of 256 rows", rows=1_100, shard_rows=600, classes=20, digests=True),
    Recipe("chunks of 1 MiB", rows=1_200, shard_rows=600, classes=1_000, dtype="float32"),
    Recipe("one file with chunks of 256 rows", rows=700, classes=24, one_file=True),
)


def fill(dump: DumpFolder, recipe: Recipe, seed: int, *, until: int | None = None) -> None:
    """What a run of `precompute` does: claims and commits each shard that is not there, `until` shards at most.

    Dumps of other seeds have other logits for the same samples; one shard in three and one row in ten are equal.
    """
    plan, ids, head = dump.plan, recipe.ids(), recipe.head
    if head is not None:
        place_head(dump, head)
    for number in range(plan.shard_count if until is None else until):
        view, start, stop = plan.span(number)
        index = number % plan.shards_per_view
        if not dump.claim(view, index):
            continue
        rows = range(start, stop)
        shared = seed == 0 or (index + seed) % 3 == 0
        logits = np.stack([_logits(recipe, seed if n % 10 and not shared else 0, view, n) for n in rows])
        labels = np.array([n % recipe.classes for n in rows])
        stored = {"sample_id": ids[start:stop], **_encoded(plan.schema.encoding, logits, labels)}
        if recipe.labels:
            stored["label"] = labels
        if recipe.digests:
            stored["input_digest"] = np.array([(n * 0x9E3779B97F4A7C15) % 2**64 for n in rows], np.uint64)
        container = dump.container(view, index, start, stop)
        container.append(stored, view=view, positions=np.asarray(rows))
        dump.commit(container, container.record(view=view, start=start, ids=consecutive(ids[start:stop])), index)
        dump.release(view, index)


def _encoded(encoding: Encoding, values: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(encoding, Factored):
        return encoding.encode_features(values).arrays
    return encoding.encode(values, labels[:, None]).arrays


def _logits(recipe: Recipe, seed: int, view: int, row: int) -> np.ndarray:
    rng = np.random.default_rng((seed, view, row))
    return rng.normal(0, 4, recipe.inputs).astype(np.float32)


def make(folder: Path, recipe: Recipe, seed: int) -> Path:
    """A finished cache; the path of the folder or the file."""
    dump = open_dump(folder / f"dump {seed}", recipe.plan)
    fill(dump, recipe, seed)
    dump.finish(dump.all_records() or [], samples=recipe.rows)
    dump.leave()
    if not recipe.one_file:
        return dump.folder
    target = folder / f"file {seed}" / ONE_FILE
    merge(dump.folder, target)
    return target
