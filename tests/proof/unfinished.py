"""Dumps with two of three shards committed, kept in memory, and the next run that finishes them, damaged or not.

Three ways to dump: what every dump is made of (`store.dump`), `kdcache.Writer`, `kdcache.precompute` with a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import contents, put
from recipes import Recipe, fill

from kdcache.errors import KDCacheError
from kdcache.stages.precompute import precompute
from kdcache.store.dump import open_dump
from kdcache.store.writer import Writer

ROWS, SHARD_ROWS, CLASSES = 60, 25, 4
RECIPE = Recipe("unfinished", rows=ROWS, shard_rows=SHARD_ROWS, classes=CLASSES, text_ids=True, digests=True)
IDS = [f"image {n}" for n in range(ROWS)]
LOGITS = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float32)


class Unfinished:
    """A dump that was interrupted, its files, and what it ends in when nothing is damaged."""

    ending = ""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / f"dump{self.ending}"
        self.parts = folder / f"dump{self.ending}.parts" if self.ending else self.path
        self.start(self.path)
        self.files = contents(self.parts)
        self.finish(self.path)
        self.whole = contents(self.path)

    def start(self, path: Path, seed: int = 0) -> None:
        """The run that is interrupted."""
        dump = open_dump(path, RECIPE.plan)
        fill(dump, RECIPE, seed, until=2)
        dump.leave()

    def finish(self, path: Path) -> None:
        """The next run."""
        dump = open_dump(path, RECIPE.plan)
        try:
            fill(dump, RECIPE, 0)
            records = dump.all_records()
            assert records is not None
            dump.finish(records, samples=ROWS)
        finally:
            dump.leave()

    def reset(self, damage: Mapping[str, bytes | None]) -> None:
        """The interrupted dump, with a damage."""
        if self.ending:
            put(self.path, None)
        there = contents(self.parts) if self.parts.exists() else {}
        wanted = {**self.files, **damage}
        for name in there.keys() | wanted.keys():
            if there.get(name) != wanted.get(name):
                put(self.parts / name, wanted.get(name))

    def outcome(self, damage: Mapping[str, bytes | None]) -> str:
        """What the next run makes of it: `refused`, `the same bytes`, or `other bytes`.

        A refusal names the file and publishes nothing.
        """
        assert all(data != self.files.get(name) for name, data in damage.items())
        self.reset(damage)
        return self.run_again(damage)

    def run_again(self, damage: Mapping[str, bytes | None]) -> str:
        """The same for what is on the disk."""
        refusal = self._refusal()
        if refusal is not None:
            assert any(Path(name).name in refusal for name in damage), refusal
            assert not (self.path if self.ending else self.path / "manifest.json").exists()
            return "refused"
        return "the same bytes" if contents(self.path) == self.whole else "other bytes"

    def _refusal(self) -> str | None:
        try:
            self.finish(self.path)
        except KDCacheError as error:
            return str(error)
        return None


class UnfinishedWriter(Unfinished):
    """It takes the size of its shards and the types of its arrays from the plan that it finds."""

    def start(self, path: Path) -> None:
        writer = Writer(path, classes=CLASSES, shard_rows=SHARD_ROWS)
        writer.write(IDS[:55], LOGITS[:55])
        writer.abandon()

    def finish(self, path: Path) -> None:
        with Writer(path, classes=CLASSES, resume=True) as writer:
            done = {name.decode() for name in writer.done.tolist()}
            left = [n for n in range(ROWS) if IDS[n] not in done]
            writer.write([IDS[n] for n in left], LOGITS[left])


class UnfinishedFile(UnfinishedWriter):
    ending = ".h5"


class Data:
    """Inputs that are their own logits."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(LOGITS[index]), index % CLASSES


class UnfinishedPrecompute(Unfinished):
    """It takes the number of threads from the plan that it finds."""

    def start(self, path: Path) -> None:
        for shard in ("0/3", "1/3"):
            self._dump(path, shard=shard)

    def finish(self, path: Path) -> None:
        self._dump(path)

    def _dump(self, path: Path, **options: Any) -> None:
        teacher = torch.nn.Identity()
        precompute(teacher, Data(), path, shard_rows=SHARD_ROWS, batch_size=10, device="cpu", quiet=True, **options)


class UnfinishedPrecomputeFile(UnfinishedPrecompute):
    ending = ".h5"
