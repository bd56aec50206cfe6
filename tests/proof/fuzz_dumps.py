"""Dumps in progress whose plan or commit record was mutated: going on refuses, or ends in a cache of all rows."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import fuzz_doors
import fuzz_json
import numpy as np
from fuzz_bases import Base
from fuzz_doors import Fault, Outcome
from fuzz_targets import Case, Target

from kdcache.format.identity import canonical_json
from kdcache.format.sealed import dump_sealed
from kdcache.store.cache import open as open_cache
from kdcache.store.plan import parse_plan
from kdcache.store.writer import Writer


class Unfinished(Target):
    """A dump that stopped with two of its shards; `Writer(resume=True)` takes it up, and goes on where it may."""

    mutated_file = ""

    def prepare(self) -> list[Base]:
        path, ids = self.home / "base", np.arange(5, 17)
        writer = Writer(path, classes=3, shard_rows=4)
        writer.write(ids[:10], *rows_of(ids[:10]))
        writer.abandon()
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".lock")
        content = {str(p.relative_to(path)): p.read_bytes() for p in files}
        schema = parse_plan(content["plan.json"], where="plan.json").schema
        return [Base(path, schema, (0,), len(ids), ids, content, {})]

    def run(self, rng: random.Random) -> Case:
        base, path, outcome = self.bases[0], self.home / "case", Outcome()
        shutil.rmtree(path, ignore_errors=True)
        base.write(path, self.changes(rng, base))
        outcome.attempt("open", lambda: open_cache(path))
        writer = outcome.attempt("resume", lambda: Writer(path, classes=3, resume=True))
        if writer is not None:
            _go_on(writer, outcome, base.ids)
        if (path / "manifest.json").exists():
            outcome.sound = self.check_finished(path, base.ids)
        return Case(base, path, outcome)

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        value = json.loads(base.files[self.mutated_file])
        if rng.random() < 0.15:
            return {self.mutated_file: fuzz_json.mutate_text(rng, canonical_json(value))}
        value = fuzz_json.mutate(rng, value)
        return {self.mutated_file: dump_sealed({k: v for k, v in value.items() if k != "seal"})}

    def check_finished(self, path: Path, ids: np.ndarray) -> bool:
        """What went on and was finished is sound and holds all rows, or is found damaged: a forged record may lie."""
        used = fuzz_doors.use(path, access="mmap", sample_ids=ids)
        if not used.sound:
            return False
        assert used.rows is not None
        if used.rows["sample_id"].tolist() != ids.tolist():
            raise Fault("the dump went on and was finished, but samples are missing")
        if not np.array_equal(used.rows["logits"] + used.rows["row_max"][:, None], rows_of(ids)[0]):
            raise Fault("the dump went on and was finished, but its rows are others")
        return True

    def warm_up(self) -> None:
        self.mutated_file, kept = "shards/v000-00001.json", self.mutated_file
        for number in range(5):
            self.run(random.Random(number))
        self.mutated_file = kept


class PlanFile(Unfinished):
    """The plan of an unfinished dump."""

    mutated_file = "plan.json"


class RecordFile(Unfinished):
    """The commit record of a shard of an unfinished dump."""

    mutated_file = "shards/v000-00000.json"


def rows_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) float32 logits that float16 keeps exactly, and (N,) labels, of samples."""
    return np.stack([ids / 4, -ids / 8, ids % 3], axis=1).astype(np.float32), ids % 3


def _go_on(writer: Writer, outcome: Outcome, ids: np.ndarray) -> None:
    left = ids[~np.isin(ids, writer.done)]
    if len(left):
        outcome.attempt("write", lambda: writer.write(left, *rows_of(left)))
    outcome.attempt("close", writer.close)
    writer.abandon()
